// The maths of the recurrent cells, written once for host and device. `M` supplies Vector, the type that holds one or
// many hidden units, and functions of it. Formulas: fastnets/reference/recurrent.py.
#pragma once

#if defined(__CUDACC__)
#define FASTNETS_CELL __host__ __device__ __forceinline__
#else
#define FASTNETS_CELL inline __attribute__((always_inline))
#endif

namespace fastnets {

// Gates i, f, g, o.
template <class M>
struct LstmCell {
  using V = typename M::Vector;

  // Gates before their activation become gates behind it; c becomes the next state. Returns h.
  static FASTNETS_CELL V forward(V (&gates)[4], V& c) {
    gates[0] = M::sigmoid(gates[0]);
    gates[1] = M::sigmoid(gates[1]);
    gates[2] = M::tanh(gates[2]);
    gates[3] = M::sigmoid(gates[3]);
    c = gates[1] * c + gates[0] * gates[2];
    return output(gates, c);
  }
  static FASTNETS_CELL V output(const V (&gates)[4], V c) { return gates[3] * M::tanh(c); }

  // Gates (behind the activation) become the gradients before it; grad_c, of c, becomes that of c_before.
  static FASTNETS_CELL void backward(V (&gates)[4], V c_before, V c, V grad_h, V& grad_c) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3], squashed = M::tanh(c);
    const V total = grad_c + grad_h * o * (1 - squashed * squashed);
    gates[0] = total * g * i * (1 - i);
    gates[1] = total * c_before * f * (1 - f);
    gates[2] = total * i * (1 - g * g);
    gates[3] = grad_h * squashed * o * (1 - o);
    grad_c = total * f;
  }
};

// What a vector of hidden units has of the variants' options, neutral where one is not in use.
template <class V>
struct LstmOptions {
  V peephole[3];  // of i, f and o; or 0
  V keep;         // factor of the candidate g; or 1
  V hold;         // how much of c stays; or 0
  V clip;         // or infinity
};

// What is added to the variance of a vector that is normalised.
constexpr double kNormEpsilon = 1e-5;

// An lstm with options. Its cell is in two halves, for layer norm comes between the new state and what tanh sees of it;
// zoneout follows both.
template <class M>
struct LstmVariantCell {
  using V = typename M::Vector;
  using Options = LstmOptions<V>;

  // Gates before their activation become, but for o, gates behind it. Returns the new state.
  static FASTNETS_CELL V forward(V (&gates)[4], V c_before, const Options& with) {
    gates[0] = M::sigmoid(gates[0] + with.peephole[0] * c_before);
    gates[1] = M::sigmoid(gates[1] + with.peephole[1] * c_before);
    gates[2] = M::tanh(gates[2]);
    return made(gates, c_before, with);
  }
  // The new state, from gates behind their activation.
  static FASTNETS_CELL V made(const V (&gates)[4], V c_before, const Options& with) {
    return M::clamp(unclipped(gates, c_before, with), with.clip);
  }
  static FASTNETS_CELL V unclipped(const V (&gates)[4], V c_before, const Options& with) {
    return gates[1] * c_before + gates[0] * gates[2] * with.keep;
  }
  // o before its activation becomes o behind it. Returns h, of the new state and of what tanh sees of it.
  static FASTNETS_CELL V output(V (&gates)[4], V made, V seen, const Options& with) {
    gates[3] = M::sigmoid(gates[3] + with.peephole[2] * made);
    return gates[3] * M::tanh(seen);
  }
  static FASTNETS_CELL V hold(V share, V before, V now) { return share * before + (1 - share) * now; }

  // o becomes its gradient before the activation. Returns that of what tanh saw, from that of h.
  static FASTNETS_CELL V backward_output(V (&gates)[4], V seen, V grad_h) {
    const V o = gates[3], squashed = M::tanh(seen);
    gates[3] = grad_h * squashed * o * (1 - o);
    return grad_h * o * (1 - squashed * squashed);
  }
  // i, f and g become their gradients before the activation, o's is there already. grad_made: of the new state, as far
  // as h depends on it; grad_c: of the state behind zoneout, becomes that of c_before.
  static FASTNETS_CELL void backward(V (&gates)[4], V c_before, V grad_made, V& grad_c, const Options& with) {
    const V i = gates[0], f = gates[1], g = gates[2], all = unclipped(gates, c_before, with);
    const V made = M::unless_beyond(all, with.clip, grad_made + (1 - with.hold) * grad_c + gates[3] * with.peephole[2]);
    gates[0] = made * g * with.keep * i * (1 - i);
    gates[1] = made * c_before * f * (1 - f);
    gates[2] = made * i * with.keep * (1 - g * g);
    grad_c = with.hold * grad_c + made * f + gates[0] * with.peephole[0] + gates[1] * with.peephole[1];
  }
};

// Gates n from x, r, z, n from h: the two halves of n apart, for r scales the second alone.
template <class M>
struct GruCell {
  using V = typename M::Vector;

  // gates: before the activation in, then n, r, z behind it and n's part from h as it was. Returns h.
  static FASTNETS_CELL V forward(V (&gates)[4], V h_before) {
    gates[1] = M::sigmoid(gates[1]);
    gates[2] = M::sigmoid(gates[2]);
    gates[0] = M::tanh(gates[0] + gates[1] * gates[3]);
    return gates[0] + gates[2] * (h_before - gates[0]);
  }

  // Gates as forward left them become the gradients before the activation. Returns grad_h's direct way to h_before.
  static FASTNETS_CELL V backward(V (&gates)[4], V h_before, V grad_h) {
    const V n = gates[0], r = gates[1], z = gates[2], from_h = gates[3];
    const V grad_n = grad_h * (1 - z) * (1 - n * n);
    gates[0] = grad_n;
    gates[1] = grad_n * from_h * r * (1 - r);
    gates[2] = grad_h * (h_before - n) * z * (1 - z);
    gates[3] = grad_n * r;
    return grad_h * z;
  }
};

template <class M>
struct TanhCell {
  using V = typename M::Vector;
  static FASTNETS_CELL V forward(V gate) { return M::tanh(gate); }
  // The gradient before the activation, from the output h.
  static FASTNETS_CELL V backward(V h, V grad_h) { return grad_h * (1 - h * h); }
};

template <class M>
struct ReluCell {
  using V = typename M::Vector;
  static FASTNETS_CELL V forward(V gate) { return M::positive(gate, gate); }
  static FASTNETS_CELL V backward(V h, V grad_h) { return M::positive(h, grad_h); }
};

}  // namespace fastnets

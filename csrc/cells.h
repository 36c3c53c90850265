// The maths of the recurrent cells, written once for host and device. `M` supplies Vector, the type that holds one or
// many hidden units, and sigmoid and tanh of it. Formulas: fastnets/reference/recurrent.py.
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

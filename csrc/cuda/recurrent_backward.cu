// A recurrent layer backwards over a whole sequence in one cooperative launch, as forwards: the transposed weights stay
// on the chip, and the gradients of the gates are the exchange. The products over all steps follow elsewhere, so that
// nothing here is summed in an order that could differ. With layer norm, blocks meet as they do forwards.
#include <array>

#include "recurrent.h"

namespace fastnets::cuda {
namespace {

constexpr int kTiles = 1, kSlots = 6;              // more would spill
constexpr int kUnits = kTiles * units_of_tile(1);  // of a strip

struct Parameters {
  RecurrentBackwardPass pass;
  Weights recurrent, projection;  // w_hh and w_hr transposed
  Residence residence;
};

// What one hidden unit of one row needs beside the gradient of its h, loaded ahead of that.
struct Inputs {
  float gates[4], c, c_before, grad_c, h;
  LstmOptions<float> with;  // of a variant
};

template <class T, bool Variant>
struct Layer {
  using VariantCell = LstmVariantCell<Math>;

  const RecurrentBackwardPass& p;
  const RecurrentShape& s = p.shape;
  const Times times{p.shape};

  // The gradients of the last states.
  __device__ __forceinline__ void start(int64_t b, int64_t j) const {
    const int64_t at = b * s.output + j;
    store_global(p.carried + at, p.grad_h == nullptr ? 0.0f : load_float<T>(p.grad_h, at));
  }
  __device__ __forceinline__ void start_cell(int64_t b, int64_t j) const {
    const int64_t at = b * s.hidden + j;
    store_global(p.state + at, p.grad_c == nullptr ? 0.0f : load_float<T>(p.grad_c, at));
  }
  __device__ __forceinline__ void finish_cell(int64_t b, int64_t j) const {
    const int64_t at = b * s.hidden + j;
    store_float<T>(p.grad_c0, at, load_global(p.state + at));
  }

  __device__ __forceinline__ int64_t before(int64_t t) const { return s.reverse ? t + 1 : t - 1; }

  template <int Gates>
  __device__ __forceinline__ Inputs load(int64_t t, int64_t b, int64_t j) const {
    Inputs in;
    const int64_t unit = b * s.hidden + j;
    const bool first = t == times.first_time(b);
    if (Gates > 1) {
      const float* const gates = static_cast<const float*>(p.gates) + (t * s.batch + b) * 4 * s.hidden + j;
#pragma unroll
      for (int g = 0; g < 4; ++g) in.gates[g] = load_global(gates + g * s.hidden);
    }
    if (Gates == 4) {
      const float* const cells = static_cast<const float*>(p.cells);
      if constexpr (Variant) {
        in.with = load_options<T>(s, t * s.batch + b, j);
      } else {
        in.c = load_global(cells + t * s.batch * s.hidden + unit);
      }
      in.c_before = first ? load_float<T>(p.c0, unit) : load_global(cells + before(t) * s.batch * s.hidden + unit);
      in.grad_c = load_global(p.state + unit);
    } else if (Gates == 3) {
      in.h = first ? load_float<T>(p.h0, unit) : load_float<T>(p.y, before(t) * s.batch * s.hidden + unit);
    } else {
      in.h = load_float<T>(p.y, t * s.batch * s.hidden + unit);
    }
    return in;
  }

  // Adds to the gradient of h what comes to it otherwise than through the next step's gates. False: that was all.
  __device__ __forceinline__ bool pass_on(int64_t t, int64_t b, int64_t j, bool ends, float& grad) const {
    const int64_t at = b * s.output + j, in_all = t * s.batch * s.output + at;
    grad += load_global(p.carried + at);
    if (ends) {
      store_float<T>(p.grad_h0, at, grad);
      return false;
    }
    const bool runs = times.runs(t, b);
    // The state passes through a step in which the row rests unchanged, and so does its gradient.
    store_global(p.carried + at, runs ? 0.0f : grad);
    if (runs && p.grad_y != nullptr) grad += load_float<T>(p.grad_y, in_all);
    if constexpr (Variant) {
      if (runs && holds_h(s.variant)) {
        const float stays = zoneout(s.variant.hold_h, s.variant.zoneout_h, in_all) * grad;
        store_global(p.carried + at, stays);
        grad -= stays;
      }
    }
    if (runs && p.h_before != nullptr && t == times.first_time(b)) {
      store_float<T>(p.h_before, in_all, load_float<T>(p.h0, at));
    }
    if (p.w_hr != nullptr) {
      store_float<T>(p.grad_projected, (t * s.batch + b) * p.output_row + j, runs ? grad : 0.0f);
    }
    return true;
  }

  // From the gradient of the unit's h.
  template <int Gates>
  __device__ __forceinline__ void run(int64_t t, int64_t b, int64_t j, const Inputs& in, float grad) const {
    float gates[4] = {in.gates[0], in.gates[1], in.gates[2], in.gates[3]};
    if constexpr (Variant) {
      const float now = VariantCell::made(gates, in.c_before, in.with);
      if (p.w_hr != nullptr) {
        store_float<T>(p.unprojected, (t * s.batch + b) * s.hidden + j, LstmCell<Math>::output(gates, now));
      }
      float grad_c = in.grad_c;
      const float of_now = VariantCell::backward_output(gates, now, grad);
      VariantCell::backward(gates, in.c_before, of_now, grad_c, in.with);
      store_global(p.state + b * s.hidden + j, grad_c);
      store_gates<Gates>(t, b, j, {gates[0], gates[1], gates[2], gates[3]});
      store_peephole(t, b, j, {gates[0] * in.c_before, gates[1] * in.c_before, gates[3] * now});
    } else if constexpr (Gates == 4) {
      if (p.w_hr != nullptr) {
        store_float<T>(p.unprojected, (t * s.batch + b) * s.hidden + j, LstmCell<Math>::output(gates, in.c));
      }
      float grad_c = in.grad_c;
      LstmCell<Math>::backward(gates, in.c_before, in.c, grad, grad_c);
      store_global(p.state + b * s.hidden + j, grad_c);
      store_gates<Gates>(t, b, j, {gates[0], gates[1], gates[2], gates[3]});
    } else if constexpr (Gates == 3) {
      store_global(p.carried + b * s.output + j, GruCell<Math>::backward(gates, in.h, grad));
      store_gates<Gates>(t, b, j, {gates[1], gates[2], gates[3]});
      store_inputs<Gates>(t, b, j, {gates[1], gates[2], gates[0]});
    } else {
      const bool tanh = s.cell == Cell::kRnnTanh;
      store_gates<Gates>(t, b, j, {tanh ? TanhCell<Math>::backward(in.h, grad) : ReluCell<Math>::backward(in.h, grad)});
    }
  }

  // With layer norm: a row from the gradient of h before w_hr on, by all threads of a block; as norm_row forwards.
  __device__ __forceinline__ void norm_row(int64_t t, int64_t b) const {
    const int64_t row = t * s.batch + b, count = 4 * s.hidden;
    float* const sums = p.grad_sums + row * 14 * s.hidden;
    if (!times.runs(t, b)) {
#pragma unroll 1
      for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
        rest<4>(t, b, j);
        store_inputs<4>(t, b, j, {});
#pragma unroll 1
        for (int g = 0; g < 14; ++g) store_global(sums + g * s.hidden + j, 0.0f);
      }
      return;
    }
    const float* const saved = static_cast<const float*>(p.gates) + row * 12 * s.hidden;
    float* const made = p.made + b * s.hidden;
    const int64_t former = (before(t) * s.batch + b) * s.hidden;
    const bool first = t == times.first_time(b);
    const auto c_before = [&](int64_t j) {
      return first ? load_float<T>(p.c0, b * s.hidden + j)
                   : load_global(static_cast<const float*>(p.cells) + former + j);
    };
    const auto load_gates = [&](int64_t j, float (&gates)[4]) {
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[g] = load_global(saved + g * s.hidden + j);
    };
    const auto of = [&](int64_t i) { return load_float<T>(s.variant.norm, i); };
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
      float gates[4];
      load_gates(j, gates);
      store_global(made + j, VariantCell::made(gates, c_before(j), load_options<T>(s, row, j)));
    }
    const Moments of_state = moments(s.hidden, [&](int64_t j) { return load_global(made + j); });
    const auto unit = [&](int64_t j) { return of_state.normalise(load_global(made + j)); };
    float *const of_gain = sums + 3 * count, *const of_bias = of_gain + s.hidden;
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
      float gates[4];
      load_gates(j, gates);
      const float seen = of(2 * count + j) * unit(j) + of(2 * count + s.hidden + j);
      if (p.w_hr != nullptr) store_float<T>(p.unprojected, row * s.hidden + j, LstmCell<Math>::output(gates, seen));
      const float of_seen = VariantCell::backward_output(gates, seen, load_global(p.grad_out + b * s.hidden + j));
      store_global(sums + 3 * s.hidden + j, gates[3]);
      store_global(of_gain + j, of_seen * unit(j));
      store_global(of_bias + j, of_seen);
    }
    const auto of_normed = [&](int64_t j) { return load_global(of_bias + j) * of(2 * count + j); };
    const NormGradient of_made = norm_gradient(of_state, s.hidden, of_normed, unit);
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
      float gates[4];
      load_gates(j, gates);
      gates[3] = load_global(sums + 3 * s.hidden + j);
      float grad_c = load_global(p.state + b * s.hidden + j);
      const float c = c_before(j), now = load_global(made + j);
      VariantCell::backward(gates, c, of_made(of_normed(j), unit(j)), grad_c, load_options<T>(s, row, j));
      store_global(p.state + b * s.hidden + j, grad_c);
#pragma unroll
      for (int g = 0; g < 3; ++g) store_global(sums + g * s.hidden + j, gates[g]);
      store_peephole(t, b, j, {gates[0] * c, gates[1] * c, gates[3] * now});
    }
    __syncthreads();  // what follows is dealt to threads by the gates' columns
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {  // of the products with x and with h
      const float* const product = saved + (i + 1) * count;
      const Moments of_product = moments(count, [&](int64_t k) { return load_global(product + k); });
      const auto normalised = [&](int64_t k) { return of_product.normalise(load_global(product + k)); };
      const auto grad = [&](int64_t k) { return load_global(sums + k) * of(i * count + k); };
      const NormGradient to = norm_gradient(of_product, count, grad, normalised);
#pragma unroll 1
      for (int64_t k = threadIdx.x; k < count; k += kThreads) {
        store_global(sums + (i + 1) * count + k, load_global(sums + k) * normalised(k));
        const float found = to(grad(k), normalised(k));
        if (i == 0) {
          store_float<T>(p.grad_inputs, row * count + k, found);
        } else {
          store_float<T>(p.grad_gates, row * p.gates_row + k, found);
        }
      }
    }
  }

  // What a row that rests leaves behind.
  template <int Gates>
  __device__ __forceinline__ void rest(int64_t t, int64_t b, int64_t j) const {
    store_gates<Gates>(t, b, j, {});
    if constexpr (Variant) store_peephole(t, b, j, {});
    if (Gates == 3) store_inputs<Gates>(t, b, j, {});
    if (p.w_hr != nullptr) store_float<T>(p.unprojected, (t * s.batch + b) * s.hidden + j, 0.0f);
  }

  __device__ __forceinline__ void store_peephole(int64_t t, int64_t b, int64_t j, const float (&grads)[3]) const {
    if (p.grad_peepholes == nullptr) return;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      store_global(p.grad_peepholes + ((t * s.batch + b) * 3 + q) * s.hidden + j, grads[q]);
    }
  }

  template <int Gates>
  __device__ __forceinline__ void store_gates(int64_t t, int64_t b, int64_t j, const float (&grads)[Gates]) const {
#pragma unroll
    for (int g = 0; g < Gates; ++g) {
      store_float<T>(p.grad_gates, (t * s.batch + b) * p.gates_row + g * s.hidden + j, grads[g]);
    }
  }
  template <int Gates>
  __device__ __forceinline__ void store_inputs(int64_t t, int64_t b, int64_t j, const float (&grads)[Gates]) const {
#pragma unroll
    for (int g = 0; g < Gates; ++g) {
      store_float<T>(p.grad_inputs, ((t * s.batch + b) * Gates + g) * s.hidden + j, grads[g]);
    }
  }
};

// Waits for the strips that make the gates' gradients that this warp reads: those of some units, or of all where its
// share of the depth spans two gates.
template <int Depth>
__device__ __forceinline__ void wait_for_gates(const Weights& w, const uint32_t* flags, int strips, int hidden,
                                               uint32_t steps) {
  const int first = static_cast<int>(threadIdx.x) / 32 * w.slots * Depth, last = first + w.slots * Depth - 1;
  const bool one_gate = first / hidden == last / hidden;
  wait_for(flags, one_gate ? first % hidden / kUnits : 0, one_gate ? last % hidden / kUnits + 1 : strips, steps);
}

template <class C, int Columns, bool Variant>
__global__ void __launch_bounds__(kThreads, 1) backward(const __grid_constant__ Directions<Parameters> all) {
  const Parameters& a = all.of[blockIdx.z];
  using T = typename C::Storage;
  using ProductType = Product<C, kTiles, Columns, kSlots>;
  DYNAMIC_SHARED(memory);
  ProductType product(memory, a.residence);
  product.keep(a.recurrent);
  if (a.projection.strips > 0) product.keep(a.projection);

  const RecurrentBackwardPass& p = a.pass;
  const RecurrentShape& s = p.shape;
  const Layer<T, Variant> layer{p};
  const Times times{s};
  const bool projects = a.projection.strips > 0;
  const int cell_strips = projects ? a.projection.strips : a.recurrent.strips;  // that make the gates' gradients
  for_own_units<kUnits, Columns>(a.recurrent.strips, s.output, s.batch,
                                 [&](int64_t b, int64_t j) { layer.start(b, j); });
  if (s.cell == Cell::kLstm) {
    for_own_units<kUnits, Columns>(cell_strips, s.hidden, s.batch,
                                   [&](int64_t b, int64_t j) { layer.start_cell(b, j); });
  }

  // One more than there are: the last gives the gradient of the first h.
  for (int64_t step = 0; step <= s.steps; ++step) {
    const bool ends = step == s.steps;
    const int64_t t = times.time(s.steps - 1 - step), former = times.time(s.steps - step);
    const uint32_t done = static_cast<uint32_t>(step);
    for (int64_t first = first_row<Columns>(); first < s.batch; first += next_rows<Columns>()) {
      const int rows = static_cast<int>(s.batch - first < Columns ? s.batch - first : Columns);
      uint32_t* const of_outputs = p.flags + first / Columns * (a.recurrent.strips + a.projection.strips);
      uint32_t* const of_cells = of_outputs + (projects ? a.recurrent.strips : 0);
      for (int phase = 0; phase < (projects && !ends ? 2 : 1); ++phase) {
        const Weights& w = phase == 0 ? a.recurrent : a.projection;
        const bool has_cells =
            phase == (projects ? 1 : 0);  // else it makes the gradient of h, to be taken through w_hr
        const bool any =
            phase == 1 ? times.any_runs<Columns>(t, first) : step > 0 && times.any_runs<Columns>(former, first);
        int own = 0;
        for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x, ++own) {
          const int64_t first_unit = int64_t{strip} * kUnits;
          Inputs ahead{};
          if (has_cells && !ends && threadIdx.x < kUnits * Columns) {
            const int64_t j = first_unit + threadIdx.x % kUnits, b = first + column_of<kUnits, Columns>(threadIdx.x);
            if (j < s.hidden && times.runs(t, b)) {
              with_gates<Variant>(s.cell, [&](auto gates) { ahead = layer.template load<gates.value>(t, b, j); });
            }
          }
          if (any) {
            if (own == 0 && phase == 1) {
              wait_for_depth<ProductType::kDepth>(w, of_outputs, a.recurrent.strips, kUnits, done + 1);
            } else if (own == 0) {
              wait_for_gates<ProductType::kDepth>(w, of_cells, cell_strips, s.hidden, done);
            }
            product(w, strip, own, rows, 0, [&](int column) -> const T* {
              const int64_t b = first + column;
              if (!times.runs(phase == 1 ? t : former, b)) return nullptr;
              if (phase == 1) return static_cast<const T*>(p.grad_projected) + (t * s.batch + b) * p.output_row;
              return static_cast<const T*>(p.grad_gates) + (former * s.batch + b) * p.gates_row;
            });
            __syncthreads();
          }
          for_items<kUnits, Columns>([&](int unit, int column) {
            const int64_t j = first_unit + unit, b = first + column;
            if (j >= w.units || b >= s.batch) return;
            float grad = any ? product.template sums<1>(w, unit, column)[0] : 0.0f;
            if (phase == 0 && !layer.pass_on(t, b, j, ends, grad)) return;
            if (!has_cells) return;
            const bool loaded = unit == static_cast<int>(threadIdx.x) % kUnits &&
                                column == column_of<kUnits, Columns>(static_cast<int>(threadIdx.x));
            with_gates<Variant>(s.cell, [&](auto gates) {
              if (!times.runs(t, b)) return layer.template rest<gates.value>(t, b, j);
              layer.template run<gates.value>(t, b, j, loaded ? ahead : layer.template load<gates.value>(t, b, j),
                                              grad);
            });
          });
          publish((phase == 0 ? of_outputs : of_cells) + strip, done + 1);
        }
      }
    }
  }
  if (s.cell == Cell::kLstm) {
    for_own_units<kUnits, Columns>(cell_strips, s.hidden, s.batch,
                                   [&](int64_t b, int64_t j) { layer.finish_cell(b, j); });
  }
}

// An lstm with layer norm. All blocks meet behind the products with w_hh, behind those with w_hr, and behind the rows.
template <class C>
__global__ void __launch_bounds__(kThreads, 1) backward_normed(const __grid_constant__ Directions<Parameters> all) {
  using T = typename C::Storage;
  using ProductType = Product<C, kTiles, kNormColumns, kSlots>;
  const Parameters& a = all.of[blockIdx.z];
  DYNAMIC_SHARED(memory);
  ProductType product(memory, a.residence);
  product.keep(a.recurrent);
  if (a.projection.strips > 0) product.keep(a.projection);

  const RecurrentBackwardPass& p = a.pass;
  const RecurrentShape& s = p.shape;
  const Layer<T, true> layer{p};
  const Times times{s};
  const bool projects = a.projection.strips > 0;
  const int cell_strips = projects ? a.projection.strips : a.recurrent.strips;
  for_own_units<kUnits, kNormColumns>(a.recurrent.strips, s.output, s.batch,
                                      [&](int64_t b, int64_t j) { layer.start(b, j); });
  for_own_units<kUnits, kNormColumns>(cell_strips, s.hidden, s.batch,
                                      [&](int64_t b, int64_t j) { layer.start_cell(b, j); });

#pragma unroll 1
  for (int64_t step = 0; step <= s.steps; ++step) {
    const bool ends = step == s.steps;
    const int64_t t = times.time(s.steps - 1 - step), former = times.time(s.steps - step);
#pragma unroll 1
    for (int phase = 0; phase < (projects && !ends ? 2 : 1); ++phase) {
      const Weights& w = phase == 0 ? a.recurrent : a.projection;
      for (int64_t first = first_row<kNormColumns>(); first < s.batch; first += next_rows<kNormColumns>()) {
        const int rows = static_cast<int>(s.batch - first < kNormColumns ? s.batch - first : kNormColumns);
        const bool any = phase == 1 ? times.any_runs<kNormColumns>(t, first)
                                    : step > 0 && times.any_runs<kNormColumns>(former, first);
        int own = 0;
        for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x, ++own) {
          if (any) {
            product(w, strip, own, rows, 0, [&](int column) -> const T* {
              const int64_t b = first + column;
              if (!times.runs(phase == 1 ? t : former, b)) return nullptr;
              if (phase == 1) return static_cast<const T*>(p.grad_projected) + (t * s.batch + b) * p.output_row;
              return static_cast<const T*>(p.grad_gates) + (former * s.batch + b) * p.gates_row;
            });
            __syncthreads();
          }
          for_items<kUnits, kNormColumns>([&](int unit, int column) {
            const int64_t j = int64_t{strip} * kUnits + unit, b = first + column;
            if (j >= w.units || b >= s.batch) return;
            float grad = any ? product.template sums<1>(w, unit, column)[0] : 0.0f;
            if (phase == 0 && !layer.pass_on(t, b, j, ends, grad)) return;
            if (phase == 1 || !projects) store_global(p.grad_out + b * s.hidden + j, grad);
          });
          __syncthreads();
        }
      }
      if (!ends) grid_barrier();
    }
    if (ends) break;
    const int64_t blocks = int64_t{gridDim.x} * gridDim.y;
    for (int64_t b = int64_t{blockIdx.y} * gridDim.x + blockIdx.x; b < s.batch; b += blocks) layer.norm_row(t, b);
    grid_barrier();
  }
  for_own_units<kUnits, kNormColumns>(cell_strips, s.hidden, s.batch,
                                      [&](int64_t b, int64_t j) { layer.finish_cell(b, j); });
}

}  // namespace

void recurrent_backward(std::span<const RecurrentBackwardPass> directions, Stream stream) {
  const RecurrentShape& s = directions[0].shape;
  const bool normed = s.variant.norm != nullptr;
  const auto run = [&](auto product, auto kernel) {
    using ProductType = typename decltype(product)::type;
    std::array<Parameters, 2> all{};
    for (size_t i = 0; i < directions.size(); ++i) {
      const RecurrentBackwardPass& p = directions[i];
      Parameters& a = all[i] = {p, {}, {}, {}};
      a.recurrent = weights_of<ProductType>(p.w_hh, s.output, p.gates_row, 1);
      if (p.w_hr != nullptr) a.projection = weights_of<ProductType>(p.w_hr, s.hidden, p.output_row, 1);
    }
    launch_persistent<ProductType>("recurrent_backward", kernel, std::span(all).first(directions.size()), true, 1,
                                   normed ? kSumScratch : 0, stream);
  };
  if (normed) {
    return with_norm_arithmetic(s, [&](auto arithmetic) {
      using C = decltype(arithmetic);
      run(std::type_identity<Product<C, kTiles, kNormColumns, kSlots>>{}, backward_normed<C>);
    });
  }
  with_arithmetic(s, [&](auto arithmetic, auto columns) {
    using C = decltype(arithmetic);
    run(std::type_identity<Product<C, kTiles, columns.value, kSlots>>{},
        s.is_variant ? backward<C, columns.value, true> : backward<C, columns.value, false>);
  });
}

}  // namespace fastnets::cuda

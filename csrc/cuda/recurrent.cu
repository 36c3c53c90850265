// A recurrent layer forwards over a whole sequence in one cooperative launch. A step's block waits for the flags of the
// units that it reads, multiplies them with its weights, which stay on the chip, applies the cell and hands h on: in y
// itself, where its rows are whole pieces of 16 bytes. Where they are not, it goes through two padded steps' rows in
// turn: who overwrites one has waited for all who have read it. A single step makes its product with x, too, and its
// blocks wait for nobody: one launch like any other.
//
// Layer norm needs sums over all units of a row, of the product and of the new state. There the blocks hand on the
// products alone, meet, and take whole rows of the batch through the rest of the step (forward_normed).
#include <array>

#include "recurrent.h"

namespace fastnets::cuda {
namespace {

constexpr int kTiles = 2, kSlots = 4;  // more would spill

struct Parameters {
  RecurrentForwardPass pass;
  Weights recurrent, projection;
  Weights input;  // w_ih, where the kernel is to make the product with x; no strips where that is given
  int units;      // of a strip of the recurrent weights
  Residence residence;
};

// What one hidden unit of one row needs beside its sums, loaded ahead of them.
struct Inputs {
  float from_x[4], bias[4], state;
  LstmOptions<float> with;  // of a variant
};

template <class T, bool Variant>
struct Layer {
  using VariantCell = LstmVariantCell<Math>;

  const RecurrentForwardPass& p;
  const RecurrentShape& s = p.shape;
  const Times times{p.shape};
  T* next = nullptr;  // [B, output_row]: where h goes for the next step besides y, or null

  // h and, for lstm and gru, the state in float, where they lie before the first step; a sequence of no steps keeps
  // them.
  __device__ __forceinline__ void start(int64_t b, int64_t j) const {
    const int64_t at = b * s.hidden + j;
    if (s.cell == Cell::kLstm) {
      const float c = load_float<T>(p.c0, at);
      store_global(p.state + at, c);
      store_float<T>(p.c, at, c);
    }
    if (p.w_hr != nullptr) return;
    const float h = load_float<T>(p.h0, at);
    if (s.cell == Cell::kGru) store_global(p.state + at, h);
    store_float<T>(p.h, at, h);
  }
  __device__ __forceinline__ void start_projected(int64_t b, int64_t j) const {
    store_float<T>(p.h, b * s.output + j, load_float<T>(p.h0, b * s.output + j));
  }

  template <int Gates>
  __device__ __forceinline__ Inputs load(int64_t t, int64_t b, int64_t j) const {
    Inputs in;
#pragma unroll
    for (int g = 0; g < Gates; ++g) {
      in.from_x[g] =
          p.from_x == nullptr ? 0.0f : load_float<T>(p.from_x, ((t * s.batch + b) * Gates + g) * s.hidden + j);
      in.bias[g] = p.b_ih == nullptr ? 0.0f : load_float<T>(p.b_ih, g * s.hidden + j);
      const float bias = p.b_hh == nullptr ? 0.0f : load_float<T>(p.b_hh, g * s.hidden + j);
      if (Gates == 3 && g == 2) {
        in.bias[3] = bias;  // gru's n has its two halves apart
      } else {
        in.bias[g] += bias;
      }
    }
    if (Gates > 1) in.state = load_global(p.state + b * s.hidden + j);
    if constexpr (Variant) in.with = load_options<T>(s, t * s.batch + b, j);
    return in;
  }

  template <int Gates>
  __device__ __forceinline__ void run(int64_t t, int64_t b, int64_t j, const Inputs& in,
                                      const Vector<float, 4>& sums) const {
    if constexpr (Gates == 4) {
      float gates[4], c = in.state;
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[g] = in.from_x[g] + in.bias[g] + sums[g];
      float h;
      if constexpr (Variant) {
        const float now = VariantCell::forward(gates, c, in.with);
        h = VariantCell::output(gates, now, now, in.with);
        c = VariantCell::hold(in.with.hold, c, now);
      } else {
        h = LstmCell<Math>::forward(gates, c);
      }
      save(t, b, j, gates);
      finish(t, b, j, c, h);
    } else if constexpr (Gates == 3) {
      float gates[4] = {in.from_x[2] + in.bias[2], in.from_x[0] + in.bias[0] + sums[0],
                        in.from_x[1] + in.bias[1] + sums[1], in.bias[3] + sums[2]};
      const float h = GruCell<Math>::forward(gates, in.state);
      store_global(p.state + b * s.hidden + j, h);
      save(t, b, j, gates);
      emit(t, b, j, h);
    } else {
      const float gate = in.from_x[0] + in.bias[0] + sums[0];
      emit(t, b, j, s.cell == Cell::kRnnTanh ? TanhCell<Math>::forward(gate) : ReluCell<Math>::forward(gate));
    }
  }

  // An lstm's new state, and h before w_hr and zoneout.
  __device__ __forceinline__ void finish(int64_t t, int64_t b, int64_t j, float c, float h) const {
    store_global(p.state + b * s.hidden + j, c);
    if (p.cells != nullptr) store_global(static_cast<float*>(p.cells) + (t * s.batch + b) * s.hidden + j, c);
    if (t == times.last_time(b)) store_float<T>(p.c, b * s.hidden + j, c);
    if (p.w_hr != nullptr) {
      store_float<T>(p.unprojected, b * p.hidden_row + j, h);
    } else {
      emit(t, b, j, held(t, b, j, h));
    }
  }

  // h behind zoneout.
  __device__ __forceinline__ float held(int64_t t, int64_t b, int64_t j, float h) const {
    if constexpr (Variant) {
      if (!holds_h(s.variant)) return h;
      const int64_t at = b * s.output + j, step = s.batch * s.output;
      const float before = t == times.first_time(b) ? load_float<T>(p.h0, at)
                                                    : load_float<T>(p.y, (s.reverse ? t + 1 : t - 1) * step + at);
      return VariantCell::hold(zoneout(s.variant.hold_h, s.variant.zoneout_h, t * step + at), before, h);
    }
    return h;
  }

  // With layer norm: where a row's gates are kept, the products with x and with h, before it, behind them.
  __device__ __forceinline__ float* kept(int64_t t, int64_t b) const {
    return p.gates == nullptr ? p.kept + b * 12 * s.hidden
                              : static_cast<float*>(p.gates) + (t * s.batch + b) * 12 * s.hidden;
  }

  // With layer norm: a row from the product with h on, by all threads of a block. A thread's units are its own in every
  // loop, and what it has stored of them it reads back.
  __device__ __forceinline__ void norm_row(int64_t t, int64_t b) const {
    const int64_t row = t * s.batch + b, count = 4 * s.hidden;
    float* const gates_of_row = kept(t, b);
    if (!times.runs(t, b)) {
      for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
#pragma unroll 1
        for (int g = 0; g < 12; ++g) store_global(gates_of_row + g * s.hidden + j, 0.0f);
        rest_state(t, b, j);
      }
      return;
    }
    float* const made = p.made + b * s.hidden;
    const auto of = [&](int64_t i) { return load_float<T>(s.variant.norm, i); };
    const auto from_x = [&](int64_t i) { return load_global(static_cast<const float*>(p.from_x) + row * count + i); };
    const auto from_h = [&](int64_t i) { return load_global(gates_of_row + 2 * count + i); };
    const Moments of_x = moments(count, from_x), of_h = moments(count, from_h);
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
      float gates[4];
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const int64_t i = g * s.hidden + j;
        const float x = from_x(i);
        gates[g] = of(i) * of_x.normalise(x) + of(count + i) * of_h.normalise(from_h(i));
        if (p.b_ih != nullptr) gates[g] += load_float<T>(p.b_ih, i);
        if (p.b_hh != nullptr) gates[g] += load_float<T>(p.b_hh, i);
        if (p.gates != nullptr) store_global(gates_of_row + count + i, x);
      }
      const float c = load_global(p.state + b * s.hidden + j);
      store_global(made + j, VariantCell::forward(gates, c, load_options<T>(s, row, j)));
#pragma unroll
      for (int g = 0; g < 4; ++g) store_global(gates_of_row + g * s.hidden + j, gates[g]);
    }
    const Moments of_state = moments(s.hidden, [&](int64_t j) { return load_global(made + j); });
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < s.hidden; j += kThreads) {
      const LstmOptions<float> with = load_options<T>(s, row, j);
      const float now = load_global(made + j);
      const float seen = of(2 * count + j) * of_state.normalise(now) + of(2 * count + s.hidden + j);
      float gates[4] = {0.0f, 0.0f, 0.0f, load_global(gates_of_row + 3 * s.hidden + j)};
      const float h = VariantCell::output(gates, now, seen, with);
      store_global(gates_of_row + 3 * s.hidden + j, gates[3]);
      finish(t, b, j, VariantCell::hold(with.hold, load_global(p.state + b * s.hidden + j), now), h);
    }
  }

  // What a row that rests leaves behind.
  __device__ __forceinline__ void rest(int64_t t, int64_t b, int64_t j) const {
    save(t, b, j, {0.0f, 0.0f, 0.0f, 0.0f});
    rest_state(t, b, j);
  }
  __device__ __forceinline__ void rest_state(int64_t t, int64_t b, int64_t j) const {
    const int64_t at = (t * s.batch + b) * s.hidden + j;
    if (p.cells != nullptr) store_global(static_cast<float*>(p.cells) + at, 0.0f);
    if (p.w_hr == nullptr) store_float<T>(p.y, at, 0.0f);
  }

  __device__ __forceinline__ void emit(int64_t t, int64_t b, int64_t j, float h) const {
    store_float<T>(p.y, (t * s.batch + b) * s.output + j, h);
    if (next != nullptr) store_float<T>(next, b * p.output_row + j, h);
    if (t == times.last_time(b)) store_float<T>(p.h, b * s.output + j, h);
  }

  __device__ __forceinline__ void save(int64_t t, int64_t b, int64_t j, const float (&gates)[4]) const {
    if (p.gates == nullptr) return;
    float* const to = static_cast<float*>(p.gates) + (t * s.batch + b) * 4 * s.hidden + j;
#pragma unroll
    for (int g = 0; g < 4; ++g) store_global(to + g * s.hidden, gates[g]);
  }
};

// Of two buffers the one that a step reads; the next step's it fills.
__device__ __forceinline__ int64_t buffer_of(int64_t step) { return step % 2; }

template <int Gates>
constexpr int kUnits = kTiles * units_of_tile(Gates);  // of a strip

template <class C, int Columns, bool Variant>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ Directions<Parameters> all) {
  const Parameters& a = all.of[blockIdx.z];
  using T = typename C::Storage;
  using ProductType = Product<C, kTiles, Columns, kSlots>;
  constexpr int kOutputs = kUnits<1>;
  DYNAMIC_SHARED(memory);
  ProductType product(memory, a.residence);
  product.keep(a.recurrent);
  if (a.projection.strips > 0) product.keep(a.projection);

  const RecurrentForwardPass& p = a.pass;
  const RecurrentShape& s = p.shape;
  Layer<T, Variant> layer{p};
  const Times times{s};
  const bool projects = a.projection.strips > 0, makes_from_x = a.input.strips > 0;
  with_gates<Variant>(s.cell, [&](auto gates) {
    for_own_units<kUnits<gates.value>, Columns>(a.recurrent.strips, s.hidden, s.batch,
                                                [&](int64_t b, int64_t j) { layer.start(b, j); });
  });
  for_own_units<kOutputs, Columns>(a.projection.strips, s.output, s.batch,
                                   [&](int64_t b, int64_t j) { layer.start_projected(b, j); });

  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t t = times.time(step);
    const uint32_t done = static_cast<uint32_t>(step);
    const T* former = static_cast<const T*>(p.y) + (s.reverse ? t + 1 : t - 1) * s.batch * s.output;
    if (p.exchange != nullptr) {
      T* const exchange = static_cast<T*>(p.exchange);
      former = exchange + buffer_of(step) * s.batch * p.output_row;
      layer.next = exchange + buffer_of(step + 1) * s.batch * p.output_row;
    }
    for (int64_t first = first_row<Columns>(); first < s.batch; first += next_rows<Columns>()) {
      uint32_t* const of_cells = p.flags + first / Columns * (a.recurrent.strips + a.projection.strips);
      uint32_t* const of_outputs = of_cells + a.recurrent.strips;
      const int rows = static_cast<int>(s.batch - first < Columns ? s.batch - first : Columns);
      const bool any = times.any_runs<Columns>(t, first);
      for (int phase = 0; phase < (projects ? 2 : 1); ++phase) {
        const Weights& w = phase == 0 ? a.recurrent : a.projection;
        int own = 0;
        for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x, ++own) {
          Inputs ahead{};
          if (phase == 0) {
            with_gates<Variant>(s.cell, [&](auto gates) {
              constexpr int kOwn = kUnits<gates.value>;
              const int64_t j = int64_t{strip} * kOwn + threadIdx.x % kOwn;
              const int64_t b = first + column_of<kOwn, Columns>(threadIdx.x);
              if (threadIdx.x < kOwn * Columns && j < s.hidden && times.runs(t, b)) {
                ahead = layer.template load<gates.value>(t, b, j);
              }
            });
          }
          if (any) {
            if (own == 0 && phase == 1) {
              wait_for_depth<ProductType::kDepth>(w, of_cells, a.recurrent.strips, a.units, done + 1);
            } else if (own == 0 && projects) {
              wait_for_depth<ProductType::kDepth>(w, of_outputs, a.projection.strips, kOutputs, done);
            } else if (own == 0) {
              wait_for_depth<ProductType::kDepth>(w, of_cells, a.recurrent.strips, a.units, done);
            }
#pragma unroll 1
            for (int place = 0; place < (phase == 0 && makes_from_x ? 2 : 1); ++place) {
              product(place == 0 ? w : a.input, strip, own, rows, place, [&](int column) -> const T* {
                const int64_t b = first + column;
                if (!times.runs(t, b)) return nullptr;
                if (place == 1) return static_cast<const T*>(p.x) + b * s.input;
                if (phase == 1) return static_cast<const T*>(p.unprojected) + b * p.hidden_row;
                return (t == times.first_time(b) ? static_cast<const T*>(p.first_h) : former) + b * p.output_row;
              });
            }
            __syncthreads();
          }
          if (phase == 0) {
            with_gates<Variant>(s.cell, [&](auto gates) {
              constexpr int kOwn = kUnits<gates.value>;
              for_items<kOwn, Columns>([&](int unit, int column) {
                const int64_t j = int64_t{strip} * kOwn + unit, b = first + column;
                if (j >= s.hidden || b >= s.batch) return;
                if (!times.runs(t, b)) return layer.rest(t, b, j);
                const bool loaded = unit == static_cast<int>(threadIdx.x) % kOwn &&
                                    column == column_of<kOwn, Columns>(static_cast<int>(threadIdx.x));
                Inputs in = loaded ? ahead : layer.template load<gates.value>(t, b, j);
                const auto sums = product.template sums<gates.value>(w, unit, column);
                if (makes_from_x) {
                  const auto of_x = product.template sums<gates.value>(a.input, unit, column, 1);
#pragma unroll
                  for (int g = 0; g < gates.value; ++g) in.from_x[g] = of_x[g];
                }
                layer.template run<gates.value>(t, b, j, in, sums);
              });
            });
            publish(of_cells + strip, done + 1);
          } else {
            for_items<kOutputs, Columns>([&](int unit, int column) {
              const int64_t j = int64_t{strip} * kOutputs + unit, b = first + column;
              if (j >= s.output || b >= s.batch) return;
              if (times.runs(t, b)) {
                return layer.emit(t, b, j, layer.held(t, b, j, product.template sums<1>(w, unit, column)[0]));
              }
              store_float<T>(p.y, (t * s.batch + b) * s.output + j, 0.0f);
            });
            publish(of_outputs + strip, done + 1);
          }
        }
      }
    }
  }
}

// An lstm with layer norm. All blocks meet behind the products with h, behind the rows, and behind those with w_hr.
template <class C>
__global__ void __launch_bounds__(kThreads, 1) forward_normed(const __grid_constant__ Directions<Parameters> all) {
  using T = typename C::Storage;
  using ProductType = Product<C, kTiles, kNormColumns, kSlots>;
  constexpr int kOwn = kUnits<4>, kOutputs = kUnits<1>;
  const Parameters& a = all.of[blockIdx.z];
  DYNAMIC_SHARED(memory);
  ProductType product(memory, a.residence);
  product.keep(a.recurrent);
  if (a.projection.strips > 0) product.keep(a.projection);

  const RecurrentForwardPass& p = a.pass;
  const RecurrentShape& s = p.shape;
  Layer<T, true> layer{p};
  const Times times{s};
  for_own_units<kOwn, kNormColumns>(a.recurrent.strips, s.hidden, s.batch,
                                    [&](int64_t b, int64_t j) { layer.start(b, j); });
  for_own_units<kOutputs, kNormColumns>(a.projection.strips, s.output, s.batch,
                                        [&](int64_t b, int64_t j) { layer.start_projected(b, j); });

#pragma unroll 1
  for (int64_t step = 0; step < s.steps; ++step) {
    const int64_t t = times.time(step);
    const T* former = static_cast<const T*>(p.y) + (s.reverse ? t + 1 : t - 1) * s.batch * s.output;
    if (p.exchange != nullptr) {
      T* const exchange = static_cast<T*>(p.exchange);
      former = exchange + buffer_of(step) * s.batch * p.output_row;
      layer.next = exchange + buffer_of(step + 1) * s.batch * p.output_row;
    }
#pragma unroll 1
    for (int phase = 0; phase < (a.projection.strips > 0 ? 2 : 1); ++phase) {
      const Weights& w = phase == 0 ? a.recurrent : a.projection;
      for (int64_t first = first_row<kNormColumns>(); first < s.batch; first += next_rows<kNormColumns>()) {
        const int rows = static_cast<int>(s.batch - first < kNormColumns ? s.batch - first : kNormColumns);
        const bool any = times.any_runs<kNormColumns>(t, first);
        int own = 0;
        for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x, ++own) {
          if (any) {
            product(w, strip, own, rows, 0, [&](int column) -> const T* {
              const int64_t b = first + column;
              if (!times.runs(t, b)) return nullptr;
              if (phase == 1) return static_cast<const T*>(p.unprojected) + b * p.hidden_row;
              return (t == times.first_time(b) ? static_cast<const T*>(p.first_h) : former) + b * p.output_row;
            });
            __syncthreads();
          }
          if (phase == 0) {
            for_items<kOwn, kNormColumns>([&](int unit, int column) {
              const int64_t j = int64_t{strip} * kOwn + unit, b = first + column;
              if (j >= s.hidden || !times.runs(t, b)) return;
              const auto sums = product.template sums<4>(w, unit, column);
#pragma unroll
              for (int g = 0; g < 4; ++g) store_global(layer.kept(t, b) + (8 + g) * s.hidden + j, sums[g]);
            });
          } else {
            for_items<kOutputs, kNormColumns>([&](int unit, int column) {
              const int64_t j = int64_t{strip} * kOutputs + unit, b = first + column;
              if (j >= s.output || b >= s.batch) return;
              if (times.runs(t, b)) {
                return layer.emit(t, b, j, layer.held(t, b, j, product.template sums<1>(w, unit, column)[0]));
              }
              store_float<T>(p.y, (t * s.batch + b) * s.output + j, 0.0f);
            });
          }
          __syncthreads();
        }
      }
      grid_barrier();
      if (phase == 1) continue;
      const int64_t blocks = int64_t{gridDim.x} * gridDim.y;
      for (int64_t b = int64_t{blockIdx.y} * gridDim.x + blockIdx.x; b < s.batch; b += blocks) layer.norm_row(t, b);
      grid_barrier();
    }
  }
}

}  // namespace

int64_t recurrent_flags(const RecurrentShape& s) {
  // One a strip, of the fewest units that one has in either direction, and a group of the fewest rows.
  return (s.hidden / (kTiles * units_of_tile(4)) + s.output / units_of_tile(1) + 2) * (s.batch / 16 + 1);
}

void recurrent_forward(std::span<const RecurrentForwardPass> directions, Stream stream) {
  const RecurrentShape& s = directions[0].shape;
  const bool normed = s.variant.norm != nullptr, makes_from_x = directions[0].from_x == nullptr;
  const int gates = gates_of(s.cell);
  const auto run = [&](auto product, auto kernel) {
    using ProductType = typename decltype(product)::type;
    std::array<Parameters, 2> all{};
    for (size_t i = 0; i < directions.size(); ++i) {
      const RecurrentForwardPass& p = directions[i];
      Parameters& a = all[i] = {p, {}, {}, {}, kTiles * units_of_tile(gates), {}};
      a.recurrent = weights_of<ProductType>(p.w_hh, s.hidden, p.output_row, gates);
      if (p.w_hr != nullptr) a.projection = weights_of<ProductType>(p.w_hr, s.output, p.hidden_row, 1);
      if (makes_from_x) a.input = weights_of<ProductType>(p.w_ih, s.hidden, s.input, gates);
    }
    launch_persistent<ProductType>("recurrent_forward", kernel, std::span(all).first(directions.size()),
                                   directions[0].waits(), makes_from_x ? 2 : 1, normed ? kSumScratch : 0, stream);
  };
  if (normed) {
    return with_norm_arithmetic(s, [&](auto arithmetic) {
      using C = decltype(arithmetic);
      run(std::type_identity<Product<C, kTiles, kNormColumns, kSlots>>{}, forward_normed<C>);
    });
  }
  with_arithmetic(s, [&](auto arithmetic, auto columns) {
    using C = decltype(arithmetic);
    run(std::type_identity<Product<C, kTiles, columns.value, kSlots>>{},
        s.is_variant ? forward<C, columns.value, true> : forward<C, columns.value, false>);
  });
}

}  // namespace fastnets::cuda

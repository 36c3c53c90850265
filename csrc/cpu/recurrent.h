// What the recurrent kernels share: memory, packed weights, the product of one step, and how steps go over threads.
#pragma once

#include <cmath>

#include "../cells.h"
#include "few_rows.h"

namespace fastnets::FASTNETS_ISA {

// Rows (steps x batch) that one product over many steps covers at least, where the sequence has as many: enough to
// amortise packing its weights, few enough that its result stays in the second- or third-level cache.
constexpr int64_t kChunkRows = 1024;
// A single step of a few rows uses its weights once: packing them would cost more than it gains.
inline bool reads_weights_once(const RecurrentShape& s) { return s.steps == 1 && s.batch <= kFewRows; }
// With enough rows the weights of the step's own product with x are worth reading every step: one product less to pack,
// store and load. (Told by the batch alone: a row's result is not to depend on the threads.)
inline bool fuses_input(const RecurrentShape& s) {
  constexpr int64_t enough = 6;
  return s.cell != Cell::kGru && s.variant.norm == nullptr && s.batch >= enough;
}
inline int64_t chunk_steps(const RecurrentShape& s) { return at_most(s.steps, kChunkRows / (s.batch + 1) + 1); }

template <class T>
struct Simd {
  using Vector = Vec<T>;
  static FASTNETS_INLINE Vector sigmoid(Vector x) { return FASTNETS_ISA::sigmoid<T>(x); }
  static FASTNETS_INLINE Vector tanh(Vector x) { return FASTNETS_ISA::tanh<T>(x); }
  static FASTNETS_INLINE Vector positive(Vector x, Vector y) {  // y where x > 0 (NaN stays), else 0
    return select<T>(x <= Vector{}, Vector{}, y);
  }
  static FASTNETS_INLINE Vector clamp(Vector x, Vector most) {  // NaN stays
    return select<T>(x > most, most, select<T>(x < -most, -most, x));
  }
  static FASTNETS_INLINE Vector unless_beyond(Vector x, Vector most, Vector y) {  // y where |x| <= most, else 0
    return select<T>(absolute<T>(x) > most, Vector{}, y);
  }
};

template <class S>
FASTNETS_INLINE Vec<Compute<S>> load_lanes(const S* p, int n) {
  return n == kLanes<Compute<S>> ? load(p) : load_partial(p, n);
}
template <class S>
FASTNETS_INLINE void store_lanes(S* p, Vec<Compute<S>> v, int n) {
  if (n == kLanes<Compute<S>>) return store(p, v);
  store_partial<S>(p, v, n);
}

template <class S>
void convert_row(const S* from, int64_t n, Compute<S>* to) {
  constexpr int lanes = kLanes<Compute<S>>;
  for (int64_t i = 0; i < n; i += lanes) {
    const int left = static_cast<int>(at_most(lanes, n - i));
    store_lanes(to + i, load_lanes(from + i, left), left);
  }
}
template <class S>
void convert_back(const Compute<S>* from, int64_t n, S* to) {
  constexpr int lanes = kLanes<Compute<S>>;
  for (int64_t i = 0; i < n; i += lanes) {
    const int left = static_cast<int>(at_most(lanes, n - i));
    store_lanes(to + i, load_lanes(from + i, left), left);
  }
}

// Hands out pieces of one block of scratch memory; with no block yet, only counts.
struct Arena {
  char* block = nullptr;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = block == nullptr ? nullptr : reinterpret_cast<T*>(block + used);
    used += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
};

// Places what a pass needs, whose place(arena) must take the same whether there is a block or not.
template <class Pass>
void place_in_scratch(Pass& pass) {
  Arena count;
  pass.place(count);
  Arena arena{static_cast<char*>(scratch(0, count.used))};
  pass.place(arena);
  if (arena.used != count.used) __builtin_trap();
}

// Where each sequence begins and ends. Rows that run at time t are those with t < length.
struct Rows {
  const RecurrentShape* shape;
  int64_t* length = nullptr;   // [B], clamped; null: all T
  int64_t* running = nullptr;  // [T], one past the last row that runs

  void place(const RecurrentShape& s, Arena& arena) {
    shape = &s;
    if (s.lengths == nullptr) return;
    length = arena.take<int64_t>(s.batch);
    running = arena.take<int64_t>(s.steps);
  }
  void fill() {
    if (length == nullptr) return;
    std::memset(running, 0, shape->steps * sizeof *running);
    for (int64_t b = 0; b < shape->batch; ++b) {
      const int64_t given = shape->lengths[b];
      length[b] = given < 0 ? 0 : at_most(given, shape->steps);
      for (int64_t t = length[b] - 1; t >= 0; --t) running[t] = b + 1;
    }
  }

  int64_t time(int64_t step) const { return shape->reverse ? shape->steps - 1 - step : step; }
  int64_t length_of(int64_t b) const { return length == nullptr ? shape->steps : length[b]; }
  bool runs(int64_t t, int64_t b) const { return length == nullptr || t < length[b]; }
  int64_t running_at(int64_t t) const { return running == nullptr ? shape->batch : running[t]; }
  int64_t first_time(int64_t b) const { return shape->reverse ? length_of(b) - 1 : 0; }
  int64_t last_time(int64_t b) const { return shape->reverse ? 0 : length_of(b) - 1; }
};

// ---- an lstm's variants ----------------------------------------------------------------------------------------

template <class T>
FASTNETS_INLINE Vec<T> load_mask(const uint8_t* p, int n) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes{};
  std::memcpy(&bytes, p, static_cast<size_t>(n));
  return __builtin_convertvector(bytes, Vec<T>);
}

// The options, their parameters in the type that arithmetic runs in.
template <class T>
struct Options {
  const RecurrentShape& s;
  const LstmVariant& v = s.variant;
  const bool holds_h = v.hold_h != nullptr || v.zoneout_h != 0;
  T *peephole = nullptr, *norm = nullptr;  // [3 H], [10 H]

  void place(Arena& arena) {  // whole vectors are read, also of the last units
    if (v.peephole != nullptr) peephole = arena.take<T>(3 * s.hidden + kLanes<T>);
    if (v.norm != nullptr) norm = arena.take<T>(10 * s.hidden + kLanes<T>);
  }
  template <class S>
  void fill() {
    if (v.peephole != nullptr) convert_row(static_cast<const S*>(v.peephole), 3 * s.hidden, peephole);
    if (v.norm != nullptr) convert_row(static_cast<const S*>(v.norm), 10 * s.hidden, norm);
  }

  // Of n units from j on in row t * B + b.
  FASTNETS_INLINE LstmOptions<Vec<T>> at(int64_t row, int64_t j, int n) const {
    LstmOptions<Vec<T>> with;
    for (int q = 0; q < 3; ++q) with.peephole[q] = peephole == nullptr ? Vec<T>{} : load(peephole + q * s.hidden + j);
    const Vec<T> scale = broadcast<T>(static_cast<T>(v.keep_scale));
    with.keep = v.keep_g == nullptr ? scale : scale * load_mask<T>(v.keep_g + row * s.hidden + j, n);
    with.hold = share(v.hold_c, v.zoneout_c, row * s.hidden + j, n);
    with.clip = broadcast<T>(static_cast<T>(v.clip));
    return with;
  }
  // How much of h stays.
  FASTNETS_INLINE Vec<T> hold_h(int64_t row, int64_t j, int n) const {
    return share(v.hold_h, v.zoneout_h, row * s.output + j, n);
  }

 private:
  static FASTNETS_INLINE Vec<T> share(const uint8_t* mask, double rate, int64_t at, int n) {
    return mask == nullptr ? broadcast<T>(static_cast<T>(rate)) : load_mask<T>(mask + at, n);
  }
};

template <class T>
struct Moments {
  T mean, scale;  // scale: one over the standard deviation
  FASTNETS_INLINE Vec<T> normalise(Vec<T> x) const { return (x - mean) * scale; }
};

// The sum over a row of what value(j, n) gives for the n elements from j on.
template <class T, class Value>
FASTNETS_INLINE T row_sum(int64_t count, const Value& value) {
  Vec<T> sum{};
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const int n = static_cast<int>(at_most(kLanes<T>, count - j));
    sum += keep_first<T>(value(j, n), n, T(0));
  }
  return reduce_add<T>(sum);
}

template <class T>
Moments<T> moments(const T* x, int64_t count) {
  const T mean = row_sum<T>(count, [&](int64_t j, int n) { return load_lanes(x + j, n); }) / static_cast<T>(count);
  const T squares = row_sum<T>(count, [&](int64_t j, int n) {
    const Vec<T> deviation = load_lanes(x + j, n) - mean;
    return deviation * deviation;
  });
  return {mean, T(1) / std::sqrt(squares / static_cast<T>(count) + static_cast<T>(kNormEpsilon))};
}

// The gradient of the row x, from that of gain * normalise(x).
template <class T>
void norm_backward(const T* grad, const T* gain, const T* x, Moments<T> of, int64_t count, T* to) {
  const auto scaled = [&](int64_t j, int n) { return load_lanes(grad + j, n) * load(gain + j); };
  const auto normalised = [&](int64_t j, int n) { return of.normalise(load_lanes(x + j, n)); };
  const T mean = row_sum<T>(count, scaled) / static_cast<T>(count);
  const T along =
      row_sum<T>(count, [&](int64_t j, int n) { return scaled(j, n) * normalised(j, n); }) / static_cast<T>(count);
  for (int64_t j = 0; j < count; j += kLanes<T>) {
    const int n = static_cast<int>(at_most(kLanes<T>, count - j));
    store_lanes(to + j, (scaled(j, n) - mean - normalised(j, n) * along) * of.scale, n);
  }
}

// ---- the product of one step: a few rows against weights that were packed once a sequence ----------------------

// Rows of a register tile of so many vectors: with AVX-512 24 of 32 registers accumulate, else 8 to 12 of 16.
constexpr int max_rows(int vectors) {
  if (kVectorBytes == 64) return vectors == 3 ? 8 : 6;
  return vectors == 4 ? 3 : 4;
}
constexpr int kMaxVectors = 4;
constexpr int kMaxTile = kVectorBytes == 64 ? 24 : 12;  // vectors of the largest tile

// A right operand [depth, gates x units] in panels of whole vectors: panel[p][gate][unit]. A panel holds either all
// gates of one vector of units (lstm, gru), or the only gate of kMaxVectors vectors.
template <class T>
struct Panels {
  T* data = nullptr;
  int64_t depth, units;
  int gates;

  // `used`: false where the weights are to be read where they lie.
  void place(int64_t d, int64_t n, int g, bool used, Arena& arena) {
    depth = d, units = n, gates = g;
    data = arena.take<T>(used ? count() * depth * gates * units_of_panel() : 0);
  }
  int64_t units_of_panel() const { return (gates == 1 ? kMaxVectors : 1) * kLanes<T>; }
  int64_t count() const { return (units + units_of_panel() - 1) / units_of_panel(); }
  // Vectors of a panel: the last may have fewer.
  int vectors(int64_t panel) const {
    const int64_t left = units - panel * units_of_panel();
    return gates * static_cast<int>((at_most(left, units_of_panel()) + kLanes<T> - 1) / kLanes<T>);
  }
  T* at(int64_t panel) const { return data + panel * depth * gates * units_of_panel(); }

  // From w[gates x units, deep], a weight as torch lays it out: panel[begin + p][g][j] = w[g * units + j][p].
  template <class S>
  void pack_transposed(const S* w, int64_t deep, int64_t begin = 0) {
    each_panel([&](int64_t i) {
      const int64_t first = i * units_of_panel();
      const int stride = vectors(i) * kLanes<T>, width = stride / gates;
      const int lines = static_cast<int>(at_most(width, units - first));
      for (int g = 0; g < gates; ++g) {
        const S* from = w + (g * units + first) * deep;
        T* to = at(i) + begin * stride + g * width;
        int line = 0;
        for (; line + 4 <= lines; line += 4) pack_quad(from + line * deep, deep, deep, to + line, stride);
        for (; line < width; ++line) {
          for (int64_t p = 0; p < deep; ++p) {
            to[p * stride + line] = line < lines ? T(to_float(from[line * deep + p])) : T(0);
          }
        }
      }
    });
  }
  // From w[2 depth, units] of one gate, for products in pairs.
  void pack_paired(const BFloat16* w) {
    each_panel([&](int64_t i) {
      const int64_t first = i * units_of_panel();
      const int lines = static_cast<int>(at_most(units_of_panel(), units - first));
      with_count<kMaxVectors>(vectors(i), [&](auto n) {
        pack_pairs<n.value * kLanes<T>>(w + first, units, lines, 2 * depth, depth, at(i));
      });
    });
  }
  // From w[depth, units] of one gate.
  template <class S>
  void pack(const S* w) {
    each_panel([&](int64_t i) {
      const int64_t first = i * units_of_panel();
      T* to = at(i);
      for (int64_t p = 0; p < depth; ++p) {
        for (int v = 0; v < vectors(i); ++v, to += kLanes<T>) {
          const int64_t j = first + v * kLanes<T>;
          store(to, load_lanes(w + p * units + j, static_cast<int>(at_most(kLanes<T>, units - j))));
        }
      }
    });
  }

 private:
  // On torch's threads.
  template <class Body>
  void each_panel(const Body& body) const {
    constexpr int64_t least_packed = int64_t{1} << 15;  // elements worth waking a thread for
    const int64_t size = depth * gates * units_of_panel();
    parallel(count(), least_packed / (size + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  }
};

// Left operands side by side, whose depths make up a panel's: x and h, or one matrix alone. Of depth 0 both: zeros.
template <class T>
struct Lefts {
  struct {
    const T* data;
    int64_t row, depth;
  } of[2];

  Lefts from(int64_t r) const {
    Lefts at = *this;
    for (auto& left : at.of) {
      if (left.depth > 0) left.data += r * left.row;
    }
    return at;
  }
};

// sums[row][vector] = left operands times one panel; of pairs, depths count them.
template <class T, bool kPairs, int kRows, int kVectors>
void panel_product(const Lefts<T>& lefts, const T* __restrict w, T* __restrict out) {
  Vec<T> sums[kRows][kVectors] = {};
  for (const auto& left : lefts.of) {
    const T* a = left.data;
    const int64_t row = left.row, depth = left.depth;
    for (int64_t p = 0; p < depth; ++p, ++a, w += kVectors * kLanes<T>) {
      Vec<T> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = load(w + v * kLanes<T>);
        // One or two rows are bound by reading the weights: ahead of what the hardware fetches by itself.
        if constexpr (kRows <= 2) __builtin_prefetch(w + (8 * kVectors + v) * kLanes<T>);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const T one = a[r * row];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<T, kPairs>(one, right[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + (r * kVectors + v) * kLanes<T>, sums[r][v]);
  }
}

template <class T, bool kPairs, int kVectors>
void panel_product_rows(int rows, const Lefts<T>& lefts, const T* w, T* out) {
  with_count<max_rows(kVectors)>(rows, [&](auto n) { panel_product<T, kPairs, n.value, kVectors>(lefts, w, out); });
}

// Rows [row_begin, row_end) of the left operands times panels [panel_begin, panel_end): finish(panel, first row, past
// row, sums) is called with each tile's sums, [rows][vectors of the panel]. Every other step takes the panels from the
// last on: those that a step ends with are in the caches when the next one begins (1 MB of weights, a row: 1.17 times
// as fast).
template <bool kPairs = false, class T, class Finish>
FASTNETS_INLINE void multiply_panels(const Panels<T>& w, const Lefts<T>& lefts, int64_t step, int64_t row_begin,
                                     int64_t row_end, int64_t panel_begin, int64_t panel_end, const Finish& finish) {
  alignas(kVectorBytes) T sums[kMaxTile * kLanes<T>];
  const int64_t rows = row_end - row_begin;
  if (rows <= 0) return;
  for (int64_t turn = panel_begin; turn < panel_end; ++turn) {
    const int64_t panel = step % 2 == 0 ? turn : panel_begin + panel_end - 1 - turn;
    const int vectors = w.vectors(panel);
    const int64_t tiles = (rows + max_rows(vectors) - 1) / max_rows(vectors);  // as even as they can be
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = row_begin + rows * i / tiles, past = row_begin + rows * (i + 1) / tiles;
      const int count = static_cast<int>(past - first);
      const Lefts<T> tile = lefts.from(first);
      switch (vectors) {
        case 1: panel_product_rows<T, kPairs, 1>(count, tile, w.at(panel), sums); break;
        case 2: panel_product_rows<T, kPairs, 2>(count, tile, w.at(panel), sums); break;
        case 3: panel_product_rows<T, kPairs, 3>(count, tile, w.at(panel), sums); break;
        default: panel_product_rows<T, kPairs, 4>(count, tile, w.at(panel), sums); break;
      }
      finish(panel, first, past, sums);
    }
  }
}

// As multiply_panels, of products[rows, gates x units] that are there already.
template <class T, class Finish>
void visit_products(const Panels<T>& w, const T* products, int64_t row_begin, int64_t row_end, int64_t panel_begin,
                    int64_t panel_end, const Finish& finish) {
  alignas(kVectorBytes) T sums[kMaxTile * kLanes<T>];
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * w.units_of_panel();
    const int vectors = w.vectors(panel), width = vectors / w.gates;
    for (int64_t b = row_begin; b < row_end; ++b) {
      for (int v = 0; v < vectors; ++v) {
        const int64_t j = first + v % width * kLanes<T>;
        const T* from = products + b * w.gates * w.units + v / width * w.units + j;
        store(sums + v * kLanes<T>, load_lanes(from, static_cast<int>(at_most(kLanes<T>, w.units - j))));
      }
      finish(panel, b, b + 1, sums);
    }
  }
}

// ---- threads ---------------------------------------------------------------------------------------------------

// One product of a step with what follows it: run(step, row_begin, row_end, panel_begin, panel_end).
template <class Run>
struct Stage {
  int64_t panels;
  Run run;
};
template <class Run>
Stage(int64_t, Run) -> Stage<Run>;

// Runs the stages of steps [begin, end). Rows are independent, so that threads that share the batch meet only at the
// end; where there are fewer rows than that pays for, and weights enough to be worth a meeting a stage, they share the
// hidden units: each reads its part of the weights alone. (16 rows on two threads, 2 MB of weights: 1.06 times as
// fast.) `weights`: elements read a step. A row's result does not depend on how many threads there are.
template <class... Stages>
void run_steps(int64_t begin, int64_t end, int64_t batch, int64_t weights, const Stages&... stages) {
  constexpr int64_t least_work = int64_t{1} << 18;    // multiply-adds worth waking a thread for
  constexpr int64_t least_shared = int64_t{1} << 16;  // worth a meeting of threads that are awake
  constexpr int64_t few = 2, several = 16;            // rows a thread, with so many weights or twice as many
  constexpr int64_t count = sizeof...(stages);
  const int64_t threads = thread_count();
  const int64_t too_few = weights < least_shared ? 0 : weights < 2 * least_shared ? few : several;
  if (threads > 1 && batch < too_few * threads && (end - begin) * weights >= least_work) {
    in_phases((end - begin) * count, threads, [&](int64_t phase, int64_t piece) {
      int64_t i = 0;
      const auto share = [&](const auto& stage) {
        if (i++ != phase % count) return;
        const int64_t first = stage.panels * piece / threads, past = stage.panels * (piece + 1) / threads;
        if (first < past) stage.run(begin + phase / count, 0, batch, first, past);
      };
      (share(stages), ...);
    });
    return;
  }
  const int64_t share = (batch + threads - 1) / threads, least = least_work / ((end - begin) * weights + 1) + 1;
  parallel(batch, share > least ? share : least, [&](int64_t first, int64_t past) {
    for (int64_t step = begin; step < end; ++step) (stages.run(step, first, past, 0, stages.panels), ...);
  });
}

// Blocks of the product with x: `count` rows of w_ih (and b_ih) from `weight` on belong to the gates' columns from
// `gate` on.
struct InputBlock {
  int64_t weight, gate, count;
};
struct GateLayout {
  int gates;                      // G
  int64_t columns;                // of the gates' buffer
  int64_t recurrent, recurrents;  // first column and number of those that belong to w_hh's rows, in their order
  InputBlock blocks[2];
  int block_count;
};
inline GateLayout gate_layout(Cell cell, int64_t hidden, bool normed) {
  // With layer norm the gates, whose columns come first, and the products that they are made of are apart.
  if (normed) return {4, 12 * hidden, 8 * hidden, 4 * hidden, {{0, 4 * hidden, 4 * hidden}}, 1};
  switch (cell) {
    case Cell::kLstm: return {4, 4 * hidden, 0, 4 * hidden, {{0, 0, 4 * hidden}}, 1};
    case Cell::kGru: return {3, 4 * hidden, hidden, 3 * hidden, {{0, hidden, 2 * hidden}, {2 * hidden, 0, hidden}}, 2};
    default: return {1, hidden, 0, hidden, {{0, 0, hidden}}, 1};
  }
}

}  // namespace fastnets::FASTNETS_ISA

// A recurrent layer forwards: step by step the products with x and h, the gates and the next state in one pass over the
// packed weights; the product with x for many steps at once before, where a step has too few rows for it.

#include "recurrent.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kLeastConverted = 1 << 15;  // elements worth waking a thread for

template <class S>
struct Forward {
  using T = Compute<S>;
  using Variant = LstmVariantCell<Simd<T>>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr bool kSame = std::is_same_v<S, T>;
  static constexpr bool kMayPair = kHasPairs && std::is_same_v<S, BFloat16>;

  const RecurrentForward& p;
  const RecurrentShape& s = p.shape;
  const bool normed = s.variant.norm != nullptr;
  const GateLayout layout = gate_layout(s.cell, s.hidden, normed);
  const int64_t h_row = round_up(s.output, kWidth), c_row = round_up(s.hidden, kWidth);
  const int64_t chunk = chunk_steps(s);
  const bool once = reads_weights_once(s), fused = fuses_input(s), pairs = multiplies_pairs();
  Rows rows{};
  Panels<T> recurrent{}, projection{};  // with `fused`, first what belongs to x
  Options<T> options{s};
  T* x_chunk;   // [chunk, B, I], with `fused`: x where its own type is another
  T* products;  // [B, G H], with `once`: those with h0
  T *bias, *h_now, *h_next, *c, *made, *unprojected, *gates_chunk;

  explicit Forward(const RecurrentForward& params) : p(params) {}

  void place(Arena& arena) {
    rows.place(s, arena);
    recurrent.place(depth(fused ? s.input : 0) + depth(s.output), s.hidden, layout.gates, !once, arena);
    if (p.w_hr != nullptr) projection.place(s.hidden, s.output, 1, true, arena);
    x_chunk = arena.take<T>(fused && !kSame && !pairs ? chunk * s.batch * s.input : 0);
    products = arena.take<T>(once ? s.batch * layout.recurrents : 0);
    bias = arena.take<T>(layout.columns + kWidth);
    h_now = arena.take<T>(s.batch * h_row);
    h_next = arena.take<T>(s.batch * h_row);
    c = arena.take<T>(s.cell == Cell::kLstm ? s.batch * c_row : 0);
    made = arena.take<T>(normed ? s.batch * c_row : 0);
    options.place(arena);
    unprojected = arena.take<T>(p.w_hr == nullptr ? 0 : s.batch * c_row);
    gates_chunk = arena.take<T>(saves_gates() || fused ? 0 : chunk * s.batch * layout.columns);
  }
  // Both operands of bfloat16 as they lie, h from y. (Reversed, a shorter sequence's first h is h0, but not in y.)
  bool multiplies_pairs() const {
    if (!kMayPair || !fuses_input(s)) return false;
    uintptr_t places = 0;
    for (const void* of : {p.x, p.h0, p.w_ih, p.w_hh, static_cast<const void*>(p.y)}) {
      places |= reinterpret_cast<uintptr_t>(of);
    }
    return s.input % 2 == 0 && s.output % 2 == 0 && places % sizeof(T) == 0 && !(s.reverse && s.lengths != nullptr);
  }
  int64_t depth(int64_t columns) const { return pairs ? columns / 2 : columns; }
  static const T* words_of(const S* of) { return reinterpret_cast<const T*>(of); }
  bool saves_gates() const { return p.gates != nullptr; }

  void run() {
    place_in_scratch(*this);
    rows.fill();
    prepare();
    for (int64_t step = 0; step < s.steps; step += chunk) run_chunk(step, at_most(step + chunk, s.steps));
  }

  void prepare() {
    if (once) {
      multiply_transposed<T>(s.batch, layout.recurrents, s.output, static_cast<const S*>(p.h0), s.output,
                             static_cast<const S*>(p.w_hh), products, layout.recurrents, false);
    } else {
      pack_recurrent();
    }
    if (p.w_hr != nullptr) projection.pack_transposed(static_cast<const S*>(p.w_hr), s.hidden);
    options.template fill<S>();
    std::memset(bias, 0, (layout.columns + kWidth) * sizeof(T));
    if (p.b_ih != nullptr) {
      const S* b = static_cast<const S*>(p.b_ih);
      for (int i = 0; i < layout.block_count; ++i) {
        const InputBlock& block = layout.blocks[i];
        for (int64_t j = 0; j < block.count; ++j) bias[block.gate + j] += to_float(b[block.weight + j]);
      }
    }
    if (p.b_hh != nullptr) {
      const S* b = static_cast<const S*>(p.b_hh);
      for (int64_t j = 0; j < layout.recurrents; ++j) bias[layout.recurrent + j] += to_float(b[j]);
    }
    // Rows that never run, or not yet, keep the first state: it is the last one until a step replaces it.
    std::memcpy(p.h, p.h0, s.batch * s.output * sizeof(S));
    for (int64_t b = 0; b < s.batch; ++b) {
      convert_row(static_cast<const S*>(p.h0) + b * s.output, s.output, h_now + b * h_row);
      convert_row(static_cast<const S*>(p.h0) + b * s.output, s.output, h_next + b * h_row);
    }
    if (s.cell == Cell::kLstm) {
      std::memcpy(p.c, p.c0, s.batch * s.hidden * sizeof(S));
      for (int64_t b = 0; b < s.batch; ++b) {
        convert_row(static_cast<const S*>(p.c0) + b * s.hidden, s.hidden, c + b * c_row);
      }
    }
    if (s.lengths == nullptr) return;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t t = rows.length_of(b); t < s.steps; ++t) clear(t * s.batch + b);
    }
  }

  void pack_recurrent() {
    if (pairs) {
      recurrent.pack_transposed(static_cast<const T*>(p.w_ih), depth(s.input));
      recurrent.pack_transposed(static_cast<const T*>(p.w_hh), depth(s.output), depth(s.input));
    } else {
      if (fused) recurrent.pack_transposed(static_cast<const S*>(p.w_ih), s.input);
      recurrent.pack_transposed(static_cast<const S*>(p.w_hh), s.output, fused ? s.input : 0);
    }
  }

  // What a row that rests leaves behind.
  void clear(int64_t row) {
    std::memset(static_cast<S*>(p.y) + row * s.output, 0, s.output * sizeof(S));
    if (p.gates != nullptr) {
      std::memset(static_cast<T*>(p.gates) + row * layout.columns, 0, layout.columns * sizeof(T));
    }
    if (p.cells != nullptr) std::memset(static_cast<T*>(p.cells) + row * s.hidden, 0, s.hidden * sizeof(T));
  }

  // Steps [begin, end), whose times make up one stretch from `low` on.
  void run_chunk(int64_t begin, int64_t end) {
    const int64_t low = s.reverse ? rows.time(end - 1) : begin, count = (end - begin) * s.batch;
    T* gates = saves_gates() ? static_cast<T*>(p.gates) + low * s.batch * layout.columns : gates_chunk;
    const S* x = static_cast<const S*>(p.x) + low * s.batch * s.input;
    if (fused && !kSame && !pairs) {
      parallel(count, kLeastConverted / (s.input + 1) + 1, [&](int64_t first, int64_t past) {
        convert_row(x + first * s.input, (past - first) * s.input, x_chunk + first * s.input);
      });
    }
    for (int i = 0; i < layout.block_count && !fused; ++i) {
      const InputBlock& block = layout.blocks[i];
      const S* w = static_cast<const S*>(p.w_ih) + block.weight * s.input;
      T* to = gates + block.gate;
      if (once) {
        multiply_transposed<T>(count, block.count, s.input, x, s.input, w, to, layout.columns, false);
      } else {
        gemm<T>(count, block.count, s.input, View<S>{x, s.input, 1}, View<S>{w, 1, s.input}, to, layout.columns, false);
      }
    }
    if (s.is_variant) return run_variant(begin, end, low, gates);
    switch (s.cell) {
      case Cell::kLstm: return run_cells(begin, end, low, gates, [&](const Tile& at) { lstm(at); });
      case Cell::kGru: return run_cells(begin, end, low, gates, [&](const Tile& at) { gru(at); });
      case Cell::kRnnTanh:
        return run_cells(begin, end, low, gates, [&](const Tile& at) { rnn<TanhCell<Simd<T>>>(at); });
      case Cell::kRnnRelu:
        return run_cells(begin, end, low, gates, [&](const Tile& at) { rnn<ReluCell<Simd<T>>>(at); });
    }
  }

  void run_variant(int64_t begin, int64_t end, int64_t low, T* gates) {
    if (!normed) return run_cells(begin, end, low, gates, [&](const Tile& at) { variant(at); });
    const auto keep = [&](const Tile& at) {
      each_row(at, [&](int64_t, const T* sums, T* to) {
        for (int q = 0; q < 4; ++q) store_lanes(to + layout.recurrent + q * s.hidden, load(sums + q * kWidth), at.n);
      });
    };
    // A row's norms need all of its units: those who share them leave the rest of the step to one.
    const Stage rest{1, [&](int64_t step, int64_t row, int64_t past, int64_t, int64_t) {
                       const int64_t t = rows.time(step);
                       for (int64_t b = row; b < at_most(past, rows.running_at(t)); ++b) {
                         if (rows.runs(t, b)) norm_row(step, t, b, gates + ((t - low) * s.batch + b) * layout.columns);
                       }
                     }};
    run_cells(begin, end, low, gates, keep, rest);
  }

  // What a step's weights are multiplied with; time t is the chunk's `place`-th.
  Lefts<T> lefts(int64_t step, int64_t place, int64_t t) const {
    const T* h = h_of(step);
    if (!fused) return {{{h, h_row, s.output}}};
    const T* x = x_chunk + place * s.batch * s.input;
    if constexpr (kSame) x = static_cast<const T*>(p.x) + t * s.batch * s.input;
    return {{{x, s.input, s.input}, {h, h_row, s.output}}};
  }

  Lefts<T> pairs_of(int64_t step, int64_t t) const {
    const S *x = static_cast<const S*>(p.x), *y = static_cast<const S*>(p.y);
    const S* h = step == 0 ? static_cast<const S*>(p.h0) : y + rows.time(step - 1) * s.batch * s.output;
    const int64_t of_x = depth(s.input), of_h = depth(s.output);
    return {{{words_of(x + t * s.batch * s.input), of_x, of_x}, {words_of(h), of_h, of_h}}};
  }

  T* h_of(int64_t step) const { return step % 2 == 0 ? h_now : h_next; }

  // One vector of units of a register tile's rows.
  struct Tile {
    int64_t step, t, first, past, j;  // rows [first, past), units from j on
    int n;                            // units
    const T* sums;                    // of row `first`; the next row's are sums_row further
    int64_t sums_row;
    T* gates;  // of row `first` and unit j, in rows of layout.columns
  };

  // body(row, its sums, its gates) for the tile's rows that run.
  template <class Body>
  FASTNETS_INLINE void each_row(const Tile& at, const Body& body) {
    const int64_t past = at.past, sums_row = at.sums_row, columns = layout.columns;
    const int64_t* const length = rows.length;
    const T* sums = at.sums;
    T* gates = at.gates;
    for (int64_t b = at.first, t = at.t; b < past; ++b, sums += sums_row, gates += columns) {
      if (length == nullptr || t < length[b]) body(b, sums, gates);
    }
  }

  // cell(tile) does one vector of units; `more` follow within a step.
  template <class Cells, class... More>
  FASTNETS_INLINE void run_cells(int64_t begin, int64_t end, int64_t low, T* gates, const Cells& cell,
                                 const More&... more) {
    const Stage cells{
        recurrent.count(), [&](int64_t step, int64_t row, int64_t past, int64_t panel, int64_t last) {
          const int64_t t = rows.time(step);
          const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
            const int64_t unit = at * recurrent.units_of_panel(), sums_row = recurrent.vectors(at) * kWidth;
            const int vectors = recurrent.vectors(at) / recurrent.gates;
            T* row_gates = gates + ((t - low) * s.batch + first) * layout.columns;
            for (int v = 0; v < vectors; ++v) {
              const int64_t j = unit + v * kWidth;
              const int n = static_cast<int>(at_most(kWidth, s.hidden - j));
              cell(Tile{step, t, first, end_row, j, n, sums + v * kWidth, sums_row, row_gates + j});
            }
          };
          past = at_most(past, rows.running_at(t));
          if (once) return visit_products(recurrent, products, row, past, panel, last, finish);
          if (pairs) {
            return multiply_panels<kMayPair>(recurrent, pairs_of(step, t), step, row, past, panel, last, finish);
          }
          multiply_panels(recurrent, lefts(step, t - low, t), step, row, past, panel, last, finish);
        }};
    const int64_t weights = recurrent.depth * layout.recurrents;
    if (p.w_hr == nullptr) return run_steps(begin, end, s.batch, weights, cells, more...);
    const Stage project{projection.count(), [&](int64_t step, int64_t row, int64_t past, int64_t panel, int64_t last) {
                          const int64_t t = rows.time(step);
                          const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
                            const int64_t unit = at * projection.units_of_panel();
                            for (int64_t b = first; b < end_row; ++b) {
                              for (int v = 0; v < projection.vectors(at); ++v, sums += kWidth) {
                                const int64_t j = unit + v * kWidth;
                                const int n = static_cast<int>(at_most(kWidth, s.output - j));
                                if (rows.runs(t, b)) emit(step, t, b, j, n, held(step, t, b, j, n, load(sums)));
                              }
                            }
                          };
                          const Lefts<T> whole{{{unprojected, c_row, s.hidden}}};
                          multiply_panels(projection, whole, step, row, at_most(past, rows.running_at(t)), panel, last,
                                          finish);
                        }};
    run_steps(begin, end, s.batch, weights + s.hidden * s.output, cells, more..., project);
  }

  // n units of h from unit j on, in row b at time t.
  FASTNETS_INLINE void emit(int64_t step, int64_t t, int64_t b, int64_t j, int n, Vec<T> h) {
    store(h_of(step + 1) + b * h_row + j, h);
    store_lanes(static_cast<S*>(p.y) + (t * s.batch + b) * s.output + j, h, n);
    if (t == rows.last_time(b)) store_lanes(static_cast<S*>(p.h) + b * s.output + j, h, n);
  }

  void lstm(const Tile& at) {
    if (at.n == kWidth) return lstm_rows(at, std::integral_constant<int, kWidth>{});
    lstm_rows(at, at.n);
  }
  // What a row needs is at hand before the loop, which its stores would have it read again: else a layer of 64 units
  // takes 1.1 times as long.
  template <class Lanes>
  FASTNETS_INLINE void lstm_rows(const Tile& at, Lanes n) {
    const int64_t hidden = s.hidden, state_row = c_row, next_row = p.w_hr == nullptr ? h_row : c_row, t = at.t;
    const bool adds = !fused, saves = saves_gates(), projects = p.w_hr != nullptr;
    const bool ends = rows.length != nullptr || t == rows.last_time(0);
    T* const state = c + at.j;
    T* const next = projects ? unprojected + at.j : h_of(at.step + 1) + at.j;
    S* const y = static_cast<S*>(p.y) + at.t * s.batch * hidden + at.j;  // without a projection
    T* const cells = saves ? static_cast<T*>(p.cells) + at.t * s.batch * hidden + at.j : nullptr;
    Vec<T> of_bias[4];
    for (int q = 0; q < 4; ++q) of_bias[q] = load(bias + q * hidden + at.j);
    each_row(at, [&, n](int64_t b, const T* sums, T* gates) {
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) {
        g[q] = load(sums + q * kWidth) + of_bias[q];
        if (adds) g[q] += load_lanes(gates + q * hidden, n);
      }
      Vec<T> cell = load(state + b * state_row);
      const Vec<T> h = LstmCell<Simd<T>>::forward(g, cell);
      if (saves) {
        for (int q = 0; q < 4; ++q) store_lanes(gates + q * hidden, g[q], n);
        store_lanes(cells + b * hidden, cell, n);
      }
      store(state + b * state_row, cell);
      store(next + b * next_row, h);
      if (!projects) store_lanes(y + b * hidden, h, n);
      if (!ends || t != rows.last_time(b)) return;
      store_lanes(static_cast<S*>(p.c) + b * hidden + at.j, cell, n);
      if (!projects) store_lanes(static_cast<S*>(p.h) + b * hidden + at.j, h, n);
    });
  }
  FASTNETS_INLINE void keep_cell(int64_t t, int64_t b, int64_t j, int n, Vec<T> cell) {
    store(c + b * c_row + j, cell);
    if (saves_gates()) store_lanes(static_cast<T*>(p.cells) + (t * s.batch + b) * s.hidden + j, cell, n);
    if (t == rows.last_time(b)) store_lanes(static_cast<S*>(p.c) + b * s.hidden + j, cell, n);
  }

  // h behind zoneout.
  FASTNETS_INLINE Vec<T> held(int64_t step, int64_t t, int64_t b, int64_t j, int n, Vec<T> h) {
    if (!options.holds_h) return h;
    return Variant::hold(options.hold_h(t * s.batch + b, j, n), load(h_of(step) + b * h_row + j), h);
  }

  void variant(const Tile& at) {
    each_row(at, [&](int64_t b, const T* sums, T* gates) {
      const LstmOptions<Vec<T>> with = options.at(at.t * s.batch + b, at.j, at.n);
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) {
        g[q] = load(sums + q * kWidth) + load(bias + q * s.hidden + at.j);
        if (!fused) g[q] += load_lanes(gates + q * s.hidden, at.n);
      }
      const Vec<T> now = Variant::forward(g, load(c + b * c_row + at.j), with);
      finish_variant(at.step, at.t, b, at.j, at.n, now, Variant::output(g, now, now, with), with);
      if (!saves_gates()) return;
      for (int q = 0; q < 4; ++q) store_lanes(gates + q * s.hidden, g[q], at.n);
    });
  }
  FASTNETS_INLINE void finish_variant(int64_t step, int64_t t, int64_t b, int64_t j, int n, Vec<T> now, Vec<T> h,
                                      const LstmOptions<Vec<T>>& with) {
    keep_cell(t, b, j, n, Variant::hold(with.hold, load(c + b * c_row + j), now));
    if (p.w_hr == nullptr) {
      emit(step, t, b, j, n, held(step, t, b, j, n, h));
    } else {
      store(unprojected + b * c_row + j, h);
    }
  }

  // With layer norm: a row of the batch from the products on. Gates as laid out by gate_layout.
  void norm_row(int64_t step, int64_t t, int64_t b, T* gates) {
    const int64_t row = t * s.batch + b, count = 4 * s.hidden;
    const T *from_x = gates + count, *from_h = gates + layout.recurrent, *of_c = options.norm + 2 * count;
    const Moments<T> of_x = moments(from_x, count), of_h = moments(from_h, count);
    T* state = made + b * c_row;
    for (int64_t j = 0; j < s.hidden; j += kWidth) {
      const int n = static_cast<int>(at_most(kWidth, s.hidden - j));
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) {
        const int64_t at = q * s.hidden + j;
        g[q] = load(options.norm + at) * of_x.normalise(load_lanes(from_x + at, n)) +
               load(options.norm + count + at) * of_h.normalise(load_lanes(from_h + at, n)) + load(bias + count + at) +
               load(bias + layout.recurrent + at);
      }
      store(state + j, Variant::forward(g, load(c + b * c_row + j), options.at(row, j, n)));
      for (int q = 0; q < 4; ++q) store_lanes(gates + q * s.hidden + j, g[q], n);
    }
    const Moments<T> of_state = moments(state, s.hidden);
    for (int64_t j = 0; j < s.hidden; j += kWidth) {
      const int n = static_cast<int>(at_most(kWidth, s.hidden - j));
      const LstmOptions<Vec<T>> with = options.at(row, j, n);
      Vec<T> g[4] = {};
      g[3] = load_lanes(gates + 3 * s.hidden + j, n);
      const Vec<T> now = load(state + j);
      const Vec<T> seen = load(of_c + j) * of_state.normalise(now) + load(of_c + s.hidden + j);
      finish_variant(step, t, b, j, n, now, Variant::output(g, now, seen, with), with);
      store_lanes(gates + 3 * s.hidden + j, g[3], n);
    }
  }

  void gru(const Tile& at) {
    each_row(at, [&](int64_t b, const T* sums, T* gates) {
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) {
        g[q] = load(bias + q * s.hidden + at.j);
        if (q < 3) g[q] += load_lanes(gates + q * s.hidden, at.n);
        if (q > 0) g[q] += load(sums + (q - 1) * kWidth);
      }
      const Vec<T> h = GruCell<Simd<T>>::forward(g, load(h_of(at.step) + b * h_row + at.j));
      if (saves_gates()) {
        for (int q = 0; q < 4; ++q) store_lanes(gates + q * s.hidden, g[q], at.n);
      }
      emit(at.step, at.t, b, at.j, at.n, h);
    });
  }

  template <class RnnCell>
  void rnn(const Tile& at) {
    each_row(at, [&](int64_t b, const T* sums, T* gates) {
      Vec<T> gate = load(sums) + load(bias + at.j);
      if (!fused) gate += load_lanes(gates, at.n);
      emit(at.step, at.t, b, at.j, at.n, RnnCell::forward(gate));
    });
  }
};

}  // namespace

void recurrent_forward(const RecurrentForward& p) {
  with_storage(p.shape.dtype, [&](auto kind) { Forward<decltype(kind)>(p).run(); });
}

}  // namespace fastnets::FASTNETS_ISA

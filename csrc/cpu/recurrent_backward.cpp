// A recurrent layer backwards: step by step from the last, the product that carries the gradient to the step before
// and the gradients of that step's gates in one pass over the packed weights; then, for many steps at once, the
// products that give the gradients of x and of the weights.

#include "recurrent.h"

namespace fastnets::FASTNETS_ISA {
namespace {

template <class S>
struct Backward {
  using T = Compute<S>;
  using Variant = LstmVariantCell<Simd<T>>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr bool kSame = std::is_same_v<S, T>;
  static constexpr bool kMayPair = kHasPairs && std::is_same_v<S, BFloat16>;

  const RecurrentBackward& p;
  const RecurrentShape& s = p.shape;
  const bool normed = s.variant.norm != nullptr;
  const GateLayout layout = gate_layout(s.cell, s.hidden, normed);
  const bool projects = p.w_hr != nullptr, wants_weights = p.grad_w_ih != nullptr;
  const int64_t h_row = round_up(s.output, kWidth), c_row = round_up(s.hidden, kWidth);
  const int64_t chunk = chunk_steps(s);
  const bool once = reads_weights_once(s);
  // Products in pairs, of the gates' gradients rounded to bfloat16.
  const bool pairs = kMayPair && !once && !s.is_variant && !projects && s.lengths == nullptr && s.hidden % 2 == 0;
  Rows rows{};
  Panels<T> recurrent{}, projection{};
  Options<T> options{s};
  T* carried;     // [B, h_row]: the gradient of h that reaches the next step to come other than through its gates
  T* grad_c;      // [B, c_row]
  T* c0;          // [B, H]
  T* grad_gates;  // [chunk, B, columns]
  T* edge;        // [B, columns]: the former chunk's last step
  S *rounded, *rounded_edge;  // as grad_gates and edge, with `pairs`
  T* at_start;                // [B, columns]: every sequence's first step, whose h_before is h0
  T* grad_h;                  // [chunk, B, P], with a projection
  T* unprojected;             // [chunk, B, H], likewise
  T* products;                // [B, P], with `once`: of the gates' gradients with w_hh
  T* bias;                    // [columns]
  // Of a variant: the new cell states, what they are normalised to, the gradient of what tanh saw of them, [chunk, B,
  // H] each; a row's gradient of h and of its new state [B, c_row]; sums [3 H] and [10 H].
  T *made, *normalised, *grad_seen, *grad_out, *grad_made, *sum_peephole, *sum_norm;
  Moments<T>* of_products;  // [chunk, B, 2], of those with x and with h
  bool has_grad_w_hh = false;
  T *grad_x, *grad_w_ih, *grad_w_hh, *grad_w_hr;  // the results, or where they are summed up before their rounding

  explicit Backward(const RecurrentBackward& params) : p(params) {}

  void place(Arena& arena) {
    const int64_t most = chunk * s.batch;
    rows.place(s, arena);
    recurrent.place(pairs ? layout.recurrents / 2 : layout.recurrents, s.output, 1, !once, arena);
    if (projects) projection.place(s.output, s.hidden, 1, true, arena);
    carried = arena.take<T>(s.batch * h_row);
    const bool lstm = s.cell == Cell::kLstm;
    grad_c = arena.take<T>(lstm ? s.batch * c_row : 0);
    c0 = arena.take<T>(lstm ? s.batch * s.hidden : 0);
    grad_gates = arena.take<T>(most * layout.columns);
    edge = arena.take<T>(s.batch * layout.columns);
    rounded = arena.take<S>(pairs ? most * layout.columns : 0);
    rounded_edge = arena.take<S>(pairs ? s.batch * layout.columns : 0);
    at_start = arena.take<T>(s.batch * layout.columns);
    grad_h = arena.take<T>(projects ? most * s.output : 0);
    unprojected = arena.take<T>(projects ? most * s.hidden : 0);
    products = arena.take<T>(once ? s.batch * s.output : 0);
    bias = arena.take<T>(layout.columns);
    options.place(arena);
    made = arena.take<T>(s.is_variant ? most * s.hidden : 0);
    normalised = arena.take<T>(normed ? most * s.hidden : 0);
    grad_seen = arena.take<T>(normed ? most * s.hidden : 0);
    grad_out = arena.take<T>(normed ? s.batch * c_row : 0);
    grad_made = arena.take<T>(normed ? s.batch * c_row : 0);
    sum_peephole = arena.take<T>(s.variant.peephole == nullptr ? 0 : 3 * s.hidden);
    sum_norm = arena.take<T>(normed ? 10 * s.hidden : 0);
    of_products = arena.take<Moments<T>>(normed ? 2 * most : 0);
    const int64_t recurrents = layout.recurrents;
    grad_x = in_place_or(p.grad_x, most * s.input, arena);
    grad_w_ih = in_place_or(p.grad_w_ih, recurrents * s.input, arena);
    grad_w_hh = in_place_or(p.grad_w_hh, recurrents * s.output, arena);
    grad_w_hr = in_place_or(p.grad_w_hr, s.output * s.hidden, arena);
  }
  T* in_place_or(void* result, int64_t count, Arena& arena) {
    if (result == nullptr || kSame) return static_cast<T*>(result);
    return arena.take<T>(count);
  }

  void run() {
    place_in_scratch(*this);
    rows.fill();
    prepare();
    for (int64_t done = 0; done < s.steps; done += chunk) run_chunk(done, at_most(done + chunk, s.steps));
    finish_states();
    if (wants_weights) finish_weights();
  }

  void prepare() {
    if constexpr (kMayPair) {
      if (pairs) recurrent.pack_paired(static_cast<const S*>(p.w_hh));
    }
    if (!once && !pairs) recurrent.pack(static_cast<const S*>(p.w_hh));
    if (projects) projection.pack(static_cast<const S*>(p.w_hr));
    options.template fill<S>();
    load_state(p.grad_h, s.output, carried, h_row);
    if (s.cell == Cell::kLstm) {
      load_state(p.grad_c, s.hidden, grad_c, c_row);
      convert_row(static_cast<const S*>(p.c0), s.batch * s.hidden, c0);
    }
    std::memset(at_start, 0, s.batch * layout.columns * sizeof(T));
    if (!wants_weights) return;
    std::memset(bias, 0, layout.columns * sizeof(T));
    if (options.peephole != nullptr) std::memset(sum_peephole, 0, 3 * s.hidden * sizeof(T));
    if (normed) std::memset(sum_norm, 0, 10 * s.hidden * sizeof(T));
    if (s.steps > 0) return;  // the first products overwrite what is there
    std::memset(grad_w_ih, 0, layout.recurrents * s.input * sizeof(T));
    if (projects) std::memset(grad_w_hr, 0, s.output * s.hidden * sizeof(T));
  }
  void load_state(const void* from, int64_t columns, T* to, int64_t to_row) {
    std::memset(to, 0, s.batch * to_row * sizeof(T));
    if (from == nullptr) return;
    for (int64_t b = 0; b < s.batch; ++b)
      convert_row(static_cast<const S*>(from) + b * columns, columns, to + b * to_row);
  }

  // ---- step by step --------------------------------------------------------------------------------------------

  // Backward step n undoes forward step T - 1 - n.
  int64_t time(int64_t done) const { return rows.time(s.steps - 1 - done); }

  // Backward steps [begin, end), whose times make up one stretch from `low` on.
  void run_chunk(int64_t begin, int64_t end) {
    const int64_t low = s.reverse ? time(begin) : time(end - 1), high = low + end - begin;
    clear_rows_that_rest(low, high);
    switch (s.cell) {
      case Cell::kLstm:
        if (s.is_variant) {
          run_variant(begin, end, low);
        } else {
          run_cells(begin, end, low, [&](const Tile& at) { lstm(at); });
        }
        break;
      case Cell::kGru: run_cells(begin, end, low, [&](const Tile& at) { gru(at); }); break;
      case Cell::kRnnTanh: run_cells(begin, end, low, [&](const Tile& at) { rnn<TanhCell<Simd<T>>>(at); }); break;
      case Cell::kRnnRelu: run_cells(begin, end, low, [&](const Tile& at) { rnn<ReluCell<Simd<T>>>(at); }); break;
    }
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t t = rows.first_time(b);
      if (t >= low && t < high) copy_gates(at_start + b * layout.columns, gates_of(t, b, low), 1);
    }
    if (p.grad_x != nullptr) grad_of_x(low, high);
    if (wants_weights) grad_of_weights(low, high, begin > 0);
    copy_gates(edge, gates_of(time(end - 1), 0, low), s.batch);
    if (pairs) std::memcpy(rounded_edge, rounded_of(time(end - 1), 0, low), s.batch * layout.columns * sizeof(S));
  }

  T* gates_of(int64_t t, int64_t b, int64_t low) const {
    return grad_gates + ((t - low) * s.batch + b) * layout.columns;
  }
  S* rounded_of(int64_t t, int64_t b, int64_t low) const {
    return rounded + ((t - low) * s.batch + b) * layout.columns;
  }
  void copy_gates(T* to, const T* from, int64_t count) const {
    std::memcpy(to, from, count * layout.columns * sizeof(T));
  }
  void clear_rows_that_rest(int64_t low, int64_t high) {
    if (rows.length == nullptr) return;
    for (int64_t t = low; t < high; ++t) {
      for (int64_t b = 0; b < s.batch; ++b) {
        if (rows.runs(t, b)) continue;
        const int64_t row = (t - low) * s.batch + b;
        std::memset(grad_gates + row * layout.columns, 0, layout.columns * sizeof(T));
        if (!projects) continue;
        std::memset(grad_h + row * s.output, 0, s.output * sizeof(T));
        std::memset(unprojected + row * s.hidden, 0, s.hidden * sizeof(T));
      }
    }
  }

  // The gradients of w_hh's gates of the step before (in the order of this pass); nothing at the first.
  Lefts<T> former_gates(int64_t done, int64_t begin, int64_t low) const {
    if (done == 0) return {};
    if (pairs) return of_pairs(done == begin ? rounded_edge : rounded_of(time(done - 1), 0, low));
    return of_gates(done == begin ? edge : gates_of(time(done - 1), 0, low));
  }
  Lefts<T> of_pairs(const S* grad) const {
    return {{{reinterpret_cast<const T*>(grad + layout.recurrent), layout.columns / 2, layout.recurrents / 2}}};
  }
  Lefts<T> of_gates(const T* grad) const { return {{{grad + layout.recurrent, layout.columns, layout.recurrents}}}; }

  template <class Finish>
  FASTNETS_INLINE void multiply_recurrent(const Lefts<T>& grad, int64_t step, int64_t row, int64_t past, int64_t panel,
                                          int64_t last, const Finish& finish) const {
    if (pairs) return multiply_panels<kMayPair>(recurrent, grad, step, row, past, panel, last, finish);
    multiply_panels(recurrent, grad, step, row, past, panel, last, finish);
  }

  void run_variant(int64_t begin, int64_t end, int64_t low) {
    if (!normed) return run_cells(begin, end, low, [&](const Tile& at) { variant(at); });
    const auto keep = [&](const Tile& at) {
      each_row(at, at.n, [&](int64_t b, Vec<T> grad) { store(grad_out + b * c_row + at.j, grad); });
    };
    const Stage rest{1, [&](int64_t done, int64_t row, int64_t past, int64_t, int64_t) {
                       const int64_t t = time(done);
                       for (int64_t b = row; b < at_most(past, rows.running_at(t)); ++b) {
                         if (rows.runs(t, b)) norm_row(t, low, b);
                       }
                     }};
    run_cells(begin, end, low, keep, rest);
  }

  // One vector of units of a register tile's rows, and the products that make up the gradient of their h: with what
  // else reaches it or, `projected`, all of it, before the projection.
  struct Tile {
    int64_t t, low, first, past, j;  // rows [first, past), units from j on
    int n;                           // units
    bool projected;
    const T* sums;  // of row `first`; the next row's are sums_row further
    int64_t sums_row;
  };

  // Calls cell(tile) for every vector of the panel `at` of w, whose rows [first, past) have these sums.
  template <class Cells>
  FASTNETS_INLINE void each_tile(const Panels<T>& w, int64_t at, int64_t first, int64_t past, const T* sums, int64_t t,
                                 int64_t low, bool projected, const Cells& cell) const {
    const int vectors = w.vectors(at);
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = at * w.units_of_panel() + v * kWidth;
      const int n = static_cast<int>(at_most(kWidth, w.units - j));
      cell(Tile{t, low, first, past, j, n, projected, sums + v * kWidth, vectors * kWidth});
    }
  }

  // body(row, gradient of its h) for the tile's rows that run; n: at.n, a constant if it can be.
  template <class Lanes, class Body>
  FASTNETS_INLINE void each_row(const Tile& at, Lanes n, const Body& body) {
    const int64_t t = at.t, past = at.past, sums_row = at.sums_row, rest_row = h_row, y_row = s.output;
    const int64_t* const length = rows.length;
    const bool projected = at.projected, holds = options.holds_h;
    const S* const y = p.grad_y == nullptr ? nullptr : static_cast<const S*>(p.grad_y) + t * s.batch * y_row + at.j;
    const T* sums = at.sums;
    T* rest = carried + at.first * rest_row + at.j;
    for (int64_t b = at.first; b < past; ++b, sums += sums_row, rest += rest_row) {
      const bool runs = length == nullptr || t < length[b];
      Vec<T> grad = load(sums);
      if (!projected) {
        grad += load(rest);
        Vec<T> stays = grad;  // the state passed through a step that rests unchanged, and so does its gradient
        if (runs) {
          if (y != nullptr) grad += load_lanes(y + b * y_row, n);
          stays = holds ? options.hold_h(t * s.batch + b, at.j, n) * grad : Vec<T>{};
          if (holds) grad -= stays;
        }
        store(rest, stays);
      }
      if (runs) body(b, grad);
    }
  }

  // cell(tile) does one vector of units; `more` follow within a step.
  template <class Cells, class... More>
  FASTNETS_INLINE void run_cells(int64_t begin, int64_t end, int64_t low, const Cells& cell, const More&... more) {
    const auto project = [&](const Tile& at) {
      each_row(at, at.n, [&](int64_t b, Vec<T> grad) {
        store_lanes(grad_h + ((at.t - low) * s.batch + b) * s.output + at.j, grad, at.n);
      });
    };
    const Stage carry{recurrent.count(), [&](int64_t done, int64_t row, int64_t past, int64_t panel, int64_t last) {
                        const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
                          if (projects) {
                            each_tile(recurrent, at, first, end_row, sums, time(done), low, false, project);
                          } else {
                            each_tile(recurrent, at, first, end_row, sums, time(done), low, false, cell);
                          }
                        };
                        multiply_recurrent(former_gates(done, begin, low), done, row, past, panel, last, finish);
                      }};
    const int64_t weights = recurrent.depth * recurrent.units;
    if (!projects) return run_steps(begin, end, s.batch, weights, carry, more...);
    const Stage gates{projection.count(), [&](int64_t done, int64_t row, int64_t past, int64_t panel, int64_t last) {
                        const int64_t t = time(done);
                        const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
                          each_tile(projection, at, first, end_row, sums, t, low, true, cell);
                        };
                        const Lefts<T> grad{{{grad_h + (t - low) * s.batch * s.output, s.output, s.output}}};
                        multiply_panels(projection, grad, done, row, past, panel, last, finish);
                      }};
    run_steps(begin, end, s.batch, weights + s.hidden * s.output, carry, gates, more...);
  }

  const T* saved_gates(int64_t t, int64_t b) const {
    return static_cast<const T*>(p.gates) + (t * s.batch + b) * layout.columns;
  }
  // Row b at the time before t (in the order of the forward pass), of a tensor of all steps or of the first states.
  template <class E>
  const E* before(const E* all, const E* first, int64_t t, int64_t b, int64_t columns) const {
    if (t == rows.first_time(b)) return first + b * columns;
    return all + ((s.reverse ? t + 1 : t - 1) * s.batch + b) * columns;
  }

  FASTNETS_INLINE Vec<T> state_before(int64_t t, int64_t b, int64_t j, int n) const {
    return load_lanes(before(static_cast<const T*>(p.cells), c0, t, b, s.hidden) + j, n);
  }

  void lstm(const Tile& at) {
    if (at.n == kWidth) return lstm_rows(at, std::integral_constant<int, kWidth>{});
    lstm_rows(at, at.n);
  }
  template <class Lanes>
  FASTNETS_INLINE void lstm_rows(const Tile& at, Lanes n) {
    const int64_t t = at.t, hidden = s.hidden, columns = layout.columns, state_row = c_row;
    const bool makes_output = projects, rounds = pairs;
    const T *const saved = saved_gates(t, 0) + at.j, *const cells = static_cast<const T*>(p.cells) + at.j;
    const T *const now = cells + t * s.batch * hidden, *const first = c0 + at.j;
    T *const to = gates_of(t, 0, at.low) + at.j, *const state = grad_c + at.j;
    T* const output = unprojected + (t - at.low) * s.batch * hidden + at.j;
    S* const rounded_to = rounded_of(t, 0, at.low) + at.j;
    each_row(at, n, [&, n](int64_t b, Vec<T> grad) {
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + b * columns + q * hidden, n);
      const Vec<T> c = load_lanes(now + b * hidden, n);
      if (makes_output) store_lanes(output + b * hidden, LstmCell<Simd<T>>::output(g, c), n);
      Vec<T> total = load(state + b * state_row);
      LstmCell<Simd<T>>::backward(g, load_lanes(before(cells, first, t, b, hidden), n), c, grad, total);
      store(state + b * state_row, total);
      for (int q = 0; q < 4; ++q) {
        store_lanes(to + b * columns + q * hidden, g[q], n);
        if (rounds) store_lanes(rounded_to + b * columns + q * hidden, g[q], n);
      }
    });
  }

  void variant(const Tile& at) {
    const int64_t t = at.t, j = at.j;
    const int n = at.n;
    each_row(at, n, [&](int64_t b, Vec<T> grad) {
      const T* saved = saved_gates(t, b) + j;
      const int64_t row = (t - at.low) * s.batch + b;
      const LstmOptions<Vec<T>> with = options.at(t * s.batch + b, j, n);
      const Vec<T> c_before = state_before(t, b, j, n);
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + q * s.hidden, n);
      const Vec<T> now = Variant::made(g, c_before, with);
      store_lanes(made + row * s.hidden + j, now, n);
      if (projects) store_lanes(unprojected + row * s.hidden + j, LstmCell<Simd<T>>::output(g, now), n);
      T* state = grad_c + b * c_row + j;
      Vec<T> total = load(state);
      const Vec<T> of_now = Variant::backward_output(g, now, grad);
      Variant::backward(g, c_before, of_now, total, with);
      store(state, total);
      store_gates(at, b, g);
    });
  }

  // With layer norm: a row of the batch, from the gradient of h on.
  void norm_row(int64_t t, int64_t low, int64_t b) {
    const int64_t row = (t - low) * s.batch + b, count = 4 * s.hidden;
    const T *saved = saved_gates(t, b), *of_c = options.norm + 2 * count;
    T *to = gates_of(t, b, low), *states = made + row * s.hidden, *of_states = grad_made + b * c_row;
    const auto units = [&](const auto& body) {
      for (int64_t j = 0; j < s.hidden; j += kWidth) {
        const int n = static_cast<int>(at_most(kWidth, s.hidden - j));
        Vec<T> g[4];
        for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + q * s.hidden + j, n);
        body(j, n, g, options.at(t * s.batch + b, j, n));
      }
    };
    units([&](int64_t j, int n, auto& g, const auto& with) {
      store_lanes(states + j, Variant::made(g, state_before(t, b, j, n), with), n);
    });
    const Moments<T> of_state = moments(states, s.hidden);
    units([&](int64_t j, int n, auto& g, const auto&) {
      const Vec<T> unit = of_state.normalise(load_lanes(states + j, n));
      const Vec<T> seen = load(of_c + j) * unit + load(of_c + s.hidden + j);
      if (projects) store_lanes(unprojected + row * s.hidden + j, LstmCell<Simd<T>>::output(g, seen), n);
      store_lanes(normalised + row * s.hidden + j, unit, n);
      const Vec<T> of_seen = Variant::backward_output(g, seen, load(grad_out + b * c_row + j));
      store_lanes(grad_seen + row * s.hidden + j, of_seen, n);
      store_lanes(to + 3 * s.hidden + j, g[3], n);
    });
    norm_backward(grad_seen + row * s.hidden, of_c, states, of_state, s.hidden, of_states);
    units([&](int64_t j, int n, auto& g, const auto& with) {
      g[3] = load_lanes(to + 3 * s.hidden + j, n);
      T* state = grad_c + b * c_row + j;
      Vec<T> total = load(state);
      Variant::backward(g, state_before(t, b, j, n), load_lanes(of_states + j, n), total, with);
      store(state, total);
      for (int q = 0; q < 3; ++q) store_lanes(to + q * s.hidden + j, g[q], n);
    });
    for (int i = 0; i < 2; ++i) {
      const T* product = saved + (i + 1) * count;
      const Moments<T> of = moments(product, count);
      norm_backward(to, options.norm + i * count, product, of, count, to + (i + 1) * count);
      of_products[2 * row + i] = of;
    }
  }

  void gru(const Tile& at) {
    each_row(at, at.n, [&](int64_t b, Vec<T> grad) {
      const T* saved = saved_gates(at.t, b) + at.j;
      Vec<T> g[4];
      for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + q * s.hidden, at.n);
      const S* h = before(static_cast<const S*>(p.y), static_cast<const S*>(p.h0), at.t, b, s.hidden);
      store(carried + b * h_row + at.j, GruCell<Simd<T>>::backward(g, load_lanes(h + at.j, at.n), grad));
      store_gates(at, b, g);
    });
  }

  template <class RnnCell>
  void rnn(const Tile& at) {
    const S* y = static_cast<const S*>(p.y) + at.t * s.batch * s.hidden + at.j;
    each_row(at, at.n, [&](int64_t b, Vec<T> grad) {
      const Vec<T> gate[1] = {RnnCell::backward(load_lanes(y + b * s.hidden, at.n), grad)};
      store_gates(at, b, gate);
    });
  }

  // The gradients of row b's gates.
  template <int kCount>
  FASTNETS_INLINE void store_gates(const Tile& at, int64_t b, const Vec<T> (&g)[kCount]) const {
    T* to = gates_of(at.t, b, at.low) + at.j;
    S* rounded_to = rounded_of(at.t, b, at.low) + at.j;
    for (int q = 0; q < kCount; ++q) {
      store_lanes(to + q * s.hidden, g[q], at.n);
      if (pairs) store_lanes(rounded_to + q * s.hidden, g[q], at.n);
    }
  }

  // ---- many steps at once --------------------------------------------------------------------------------------

  void grad_of_x(int64_t low, int64_t high) {
    const int64_t count = (high - low) * s.batch, offset = low * s.batch * s.input;
    T* to = kSame ? grad_x + offset : grad_x;
    for (int i = 0; i < layout.block_count; ++i) {
      const InputBlock& block = layout.blocks[i];
      const S* w = static_cast<const S*>(p.w_ih) + block.weight * s.input;
      const T* grad = grad_gates + block.gate;
      if constexpr (kMayPair) {
        if (pairs) {
          gemm<T>(count, s.input, block.count / 2, PairedLeft{rounded + block.gate, layout.columns, 1, block.count},
                  PairedRight{w, s.input, block.count}, to, s.input, i > 0);
          continue;
        }
      }
      if (once) {
        multiply_plain<T>(count, s.input, block.count, grad, layout.columns, w, to, s.input, i > 0);
      } else {
        gemm<T>(count, s.input, block.count, View<T>{grad, layout.columns, 1}, View<S>{w, s.input, 1}, to, s.input,
                i > 0);
      }
    }
    if constexpr (!kSame) convert_back(to, count * s.input, static_cast<S*>(p.grad_x) + offset);
  }

  void grad_of_weights(int64_t low, int64_t high, bool accumulate) {
    const int64_t count = (high - low) * s.batch;
    for (int i = 0; i < layout.block_count; ++i) {
      const InputBlock& block = layout.blocks[i];
      grad_of_weight(0, block.gate, block.count, count, static_cast<const S*>(p.x) + low * s.batch * s.input, s.input,
                     grad_w_ih + block.weight * s.input, accumulate);
    }
    // The h of the step before; the first steps, whose h is h0, come at the end. (Reversed, y is zero behind the end of
    // a shorter sequence, so that its first step adds nothing here.)
    const int64_t from = s.reverse ? low : low > 0 ? low : 1, to = s.reverse ? at_most(high, s.steps - 1) : high;
    if (from < to) {
      const S* h = static_cast<const S*>(p.y) + (s.reverse ? from + 1 : from - 1) * s.batch * s.output;
      grad_of_weight((from - low) * s.batch, layout.recurrent, layout.recurrents, (to - from) * s.batch, h, s.output,
                     grad_w_hh, has_grad_w_hh);
      has_grad_w_hh = true;
    }
    if (projects) {
      gemm<T>(s.output, s.hidden, count, View<T>{grad_h, 1, s.output}, View<T>{unprojected, s.hidden, 1}, grad_w_hr,
              s.hidden, accumulate);
    }
    const int64_t biases = normed ? 4 * s.hidden : layout.columns;
    add_rows(count, biases, bias, [&](int64_t row, int64_t j, int n) { return of_gate(row, j, n); });
    if (options.peephole != nullptr) grad_of_peephole(low, count);
    if (normed) grad_of_norm(low, count);
  }

  // grad[gates, columns] (+)= the gradients of `gates` gates from column `gate` on, of the chunk's `count` rows from
  // `first` on, times what they were multiplied with: of[count, columns].
  void grad_of_weight(int64_t first, int64_t gate, int64_t gates, int64_t count, const S* of, int64_t columns, T* grad,
                      bool accumulate) {
    const int64_t at = first * layout.columns + gate;
    if constexpr (kMayPair) {
      if (pairs) {
        return gemm<T>(gates, columns, (count + 1) / 2, PairedLeft{rounded + at, 1, layout.columns, count},
                       PairedRight{of, columns, count}, grad, columns, accumulate);
      }
    }
    gemm<T>(gates, columns, count, View<T>{grad_gates + at, 1, layout.columns}, View<S>{of, columns, 1}, grad, columns,
            accumulate);
  }

  FASTNETS_INLINE Vec<T> of_gate(int64_t row, int64_t column, int n) const {
    return load_lanes(grad_gates + row * layout.columns + column, n);
  }

  // Adds value(row, j, n), n elements from column j on, of all rows. In blocks of rows, so that rounding errors grow
  // with the number of blocks and not with that of rows.
  template <class Value>
  FASTNETS_INLINE void add_rows(int64_t count, int64_t columns, T* to, const Value& value) {
    constexpr int64_t block = 32, least_added = int64_t{1} << 15;  // elements worth waking a thread for
    const int64_t vectors = (columns + kWidth - 1) / kWidth;
    parallel(vectors, least_added / (count * kWidth + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < count; row += block) {
        const int64_t past = at_most(row + block, count);
        for (int64_t j = begin * kWidth; j < at_most(end * kWidth, columns); j += kWidth) {
          const int n = static_cast<int>(at_most(kWidth, columns - j));
          Vec<T> sum{};
          for (int64_t r = row; r < past; ++r) sum += value(r, j, n);
          store_lanes(to + j, load_lanes(to + j, n) + sum, n);
        }
      }
    });
  }
  // Likewise of those rows that run, whose times begin with `low`: value(t, b, row, j, n).
  template <class Value>
  FASTNETS_INLINE void add_running(int64_t low, int64_t count, int64_t columns, T* to, const Value& value) {
    add_rows(count, columns, to, [&](int64_t row, int64_t j, int n) {
      const int64_t t = low + row / s.batch, b = row % s.batch;
      return rows.runs(t, b) ? value(t, b, row, j, n) : Vec<T>{};
    });
  }

  void grad_of_peephole(int64_t low, int64_t count) {
    for (int q = 0; q < 2; ++q) {  // of i and f
      add_running(low, count, s.hidden, sum_peephole + q * s.hidden,
                  [&](int64_t t, int64_t b, int64_t row, int64_t j, int n) {
                    return of_gate(row, q * s.hidden + j, n) * state_before(t, b, j, n);
                  });
    }
    add_running(low, count, s.hidden, sum_peephole + 2 * s.hidden,
                [&](int64_t, int64_t, int64_t row, int64_t j, int n) {
                  return of_gate(row, 3 * s.hidden + j, n) * load_lanes(made + row * s.hidden + j, n);
                });
  }

  void grad_of_norm(int64_t low, int64_t count) {
    const int64_t gates = 4 * s.hidden;
    for (int i = 0; i < 2; ++i) {  // of the products with x and with h
      add_running(low, count, gates, sum_norm + i * gates, [&](int64_t t, int64_t b, int64_t row, int64_t j, int n) {
        const Vec<T> product = load_lanes(saved_gates(t, b) + (i + 1) * gates + j, n);
        return of_gate(row, j, n) * of_products[2 * row + i].normalise(product);
      });
    }
    const auto seen = [&](int64_t row, int64_t j, int n) { return load_lanes(grad_seen + row * s.hidden + j, n); };
    T* of_c = sum_norm + 2 * gates;
    add_running(low, count, s.hidden, of_c, [&](int64_t, int64_t, int64_t row, int64_t j, int n) {
      return seen(row, j, n) * load_lanes(normalised + row * s.hidden + j, n);
    });
    add_running(low, count, s.hidden, of_c + s.hidden,
                [&](int64_t, int64_t, int64_t row, int64_t j, int n) { return seen(row, j, n); });
  }

  // The gradients of the first states: one more product.
  void finish_states() {
    const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
      for (int64_t b = first; b < end_row; ++b) {
        for (int v = 0; v < recurrent.vectors(at); ++v, sums += kWidth) {
          const int64_t j = at * recurrent.units_of_panel() + v * kWidth;
          const Vec<T> total = load(sums) + load(carried + b * h_row + j);
          store_lanes(static_cast<S*>(p.grad_h0) + b * s.output + j, total,
                      static_cast<int>(at_most(kWidth, s.output - j)));
        }
      }
    };
    if (once) {
      multiply_plain<T>(s.batch, s.output, layout.recurrents, edge + layout.recurrent, layout.columns,
                        static_cast<const S*>(p.w_hh), products, s.output, false);
      visit_products(recurrent, products, 0, s.batch, 0, recurrent.count(), finish);
    } else {
      const Lefts<T> grad = s.steps == 0 ? Lefts<T>{} : pairs ? of_pairs(rounded_edge) : of_gates(edge);
      multiply_recurrent(grad, 0, 0, s.batch, 0, recurrent.count(), finish);
    }
    if (s.cell != Cell::kLstm) return;
    for (int64_t b = 0; b < s.batch; ++b) {
      convert_back(grad_c + b * c_row, s.hidden, static_cast<S*>(p.grad_c0) + b * s.hidden);
    }
  }

  void finish_weights() {
    gemm<T>(layout.recurrents, s.output, s.batch, View<T>{at_start + layout.recurrent, 1, layout.columns},
            View<S>{static_cast<const S*>(p.h0), s.output, 1}, grad_w_hh, s.output, has_grad_w_hh);
    for (int i = 0; i < layout.block_count; ++i) {
      const InputBlock& block = layout.blocks[i];
      const int64_t gate = normed ? block.weight : block.gate;
      convert_back(bias + gate, block.count, static_cast<S*>(p.grad_b_ih) + block.weight);
    }
    convert_back(bias + (normed ? 0 : layout.recurrent), layout.recurrents, static_cast<S*>(p.grad_b_hh));
    if (options.peephole != nullptr) convert_back(sum_peephole, 3 * s.hidden, static_cast<S*>(p.grad_peephole));
    if (normed) convert_back(sum_norm, 10 * s.hidden, static_cast<S*>(p.grad_norm));
    if constexpr (!kSame) {
      convert_back(grad_w_ih, layout.recurrents * s.input, static_cast<S*>(p.grad_w_ih));
      convert_back(grad_w_hh, layout.recurrents * s.output, static_cast<S*>(p.grad_w_hh));
      if (projects) convert_back(grad_w_hr, s.output * s.hidden, static_cast<S*>(p.grad_w_hr));
    }
  }
};

}  // namespace

void recurrent_backward(const RecurrentBackward& p) {
  with_storage(p.shape.dtype, [&](auto kind) { Backward<decltype(kind)>(p).run(); });
}

}  // namespace fastnets::FASTNETS_ISA

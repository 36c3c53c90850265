// A recurrent layer backwards: step by step from the last, the product that carries the gradient to the step before
// and the gradients of that step's gates in one pass over the packed weights; then, for many steps at once, the
// products that give the gradients of x and of the weights.

#include "recurrent.h"

namespace fastnets::FASTNETS_ISA {
namespace {

template <class S>
struct Backward {
  using T = Compute<S>;
  static constexpr int kWidth = kLanes<T>;
  static constexpr bool kSame = std::is_same_v<S, T>;

  const RecurrentBackward& p;
  const RecurrentShape& s = p.shape;
  const GateLayout layout = gate_layout(s.cell, s.hidden);
  const bool projects = p.w_hr != nullptr, wants_weights = p.grad_w_ih != nullptr;
  const int64_t h_row = round_up(s.output, kWidth), c_row = round_up(s.hidden, kWidth);
  const int64_t chunk = chunk_steps(s);
  const bool once = reads_weights_once(s);
  Rows rows{};
  Panels<T> recurrent{}, projection{};
  T* carried;      // [B, h_row]: the gradient of h that reaches the next step to come other than through its gates
  T* grad_c;       // [B, c_row]
  T* c0;           // [B, H]
  T* grad_gates;   // [chunk, B, columns]
  T* edge;         // [B, columns]: the former chunk's last step
  T* at_start;     // [B, columns]: every sequence's first step, whose h_before is h0
  T* grad_h;       // [chunk, B, P], with a projection
  T* unprojected;  // [chunk, B, H], likewise
  T* products;     // [B, P], with `once`: of the gates' gradients with w_hh
  T* bias;         // [columns]
  bool has_grad_w_hh = false;
  T *grad_x, *grad_w_ih, *grad_w_hh, *grad_w_hr;  // the results, or where they are summed up before their rounding

  explicit Backward(const RecurrentBackward& params) : p(params) {}

  void place(Arena& arena) {
    const int64_t most = chunk * s.batch;
    rows.place(s, arena);
    recurrent.place(layout.recurrents, s.output, 1, !once, arena);
    if (projects) projection.place(s.output, s.hidden, 1, true, arena);
    carried = arena.take<T>(s.batch * h_row);
    const bool lstm = s.cell == Cell::kLstm;
    grad_c = arena.take<T>(lstm ? s.batch * c_row : 0);
    c0 = arena.take<T>(lstm ? s.batch * s.hidden : 0);
    grad_gates = arena.take<T>(most * layout.columns);
    edge = arena.take<T>(s.batch * layout.columns);
    at_start = arena.take<T>(s.batch * layout.columns);
    grad_h = arena.take<T>(projects ? most * s.output : 0);
    unprojected = arena.take<T>(projects ? most * s.hidden : 0);
    products = arena.take<T>(once ? s.batch * s.output : 0);
    bias = arena.take<T>(layout.columns);
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
    Arena count;
    place(count);
    Arena arena{static_cast<char*>(scratch(0, count.used))};
    place(arena);
    rows.fill();
    prepare();
    for (int64_t done = 0; done < s.steps; done += chunk) run_chunk(done, at_most(done + chunk, s.steps));
    finish_states();
    if (wants_weights) finish_weights();
  }

  void prepare() {
    if (!once) recurrent.pack(static_cast<const S*>(p.w_hh));
    if (projects) projection.pack(static_cast<const S*>(p.w_hr));
    load_state(p.grad_h, s.output, carried, h_row);
    if (s.cell == Cell::kLstm) {
      load_state(p.grad_c, s.hidden, grad_c, c_row);
      convert_row(static_cast<const S*>(p.c0), s.batch * s.hidden, c0);
    }
    std::memset(at_start, 0, s.batch * layout.columns * sizeof(T));
    if (!wants_weights) return;
    std::memset(bias, 0, layout.columns * sizeof(T));
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
      case Cell::kLstm: run_cells(begin, end, low, [&](auto... at) { lstm(at...); }); break;
      case Cell::kGru: run_cells(begin, end, low, [&](auto... at) { gru(at...); }); break;
      case Cell::kRnnTanh: run_cells(begin, end, low, [&](auto... at) { rnn<TanhCell<Simd<T>>>(at...); }); break;
      case Cell::kRnnRelu: run_cells(begin, end, low, [&](auto... at) { rnn<ReluCell<Simd<T>>>(at...); }); break;
    }
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t t = rows.first_time(b);
      if (t >= low && t < high) copy_gates(at_start + b * layout.columns, gates_of(t, b, low), 1);
    }
    if (p.grad_x != nullptr) grad_of_x(low, high);
    if (wants_weights) grad_of_weights(low, high, begin > 0);
    copy_gates(edge, gates_of(time(end - 1), 0, low), s.batch);
  }

  T* gates_of(int64_t t, int64_t b, int64_t low) const {
    return grad_gates + ((t - low) * s.batch + b) * layout.columns;
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

  // The gradients of w_hh's gates of the step before (in the order of this pass), or null at the first.
  const T* former_gates(int64_t done, int64_t begin, int64_t low) const {
    if (done == 0) return nullptr;
    return (done == begin ? edge : gates_of(time(done - 1), 0, low)) + layout.recurrent;
  }

  // cell(t, row, unit, units, gradient of h before the projection, gradients of the row's gates).
  template <class Cells>
  FASTNETS_INLINE void run_cells(int64_t begin, int64_t end, int64_t low, const Cells& cell) {
    const Stage carry{
        recurrent.count(), [&](int64_t done, int64_t row, int64_t past, int64_t panel, int64_t last) {
          const int64_t t = time(done), j0 = recurrent.units_of_panel();
          const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
            const int vectors = recurrent.vectors(at);
            for (int64_t b = first; b < end_row; ++b) {
              for (int v = 0; v < vectors; ++v, sums += kWidth) {
                const int64_t j = at * j0 + v * kWidth;
                const int n = static_cast<int>(at_most(kWidth, s.output - j));
                T* rest = carried + b * h_row + j;
                Vec<T> grad = load(sums) + load(rest);
                if (!rows.runs(t, b)) {  // the state passed through this step unchanged, and so does its gradient
                  store(rest, grad);
                  continue;
                }
                if (p.grad_y != nullptr) {
                  grad += load_lanes(static_cast<const S*>(p.grad_y) + (t * s.batch + b) * s.output + j, n);
                }
                store(rest, Vec<T>{});
                if (projects) {
                  store_lanes(grad_h + ((t - low) * s.batch + b) * s.output + j, grad, n);
                } else {
                  cell(t, low, b, j, n, grad, gates_of(t, b, low) + j);
                }
              }
            }
          };
          multiply_panels(recurrent, former_gates(done, begin, low), layout.columns, row, past, panel, last, finish);
        }};
    const int64_t weights = recurrent.depth * recurrent.units;
    if (!projects) return run_steps(begin, end, s.batch, weights, carry);
    const Stage gates{projection.count(), [&](int64_t done, int64_t row, int64_t past, int64_t panel, int64_t last) {
                        const int64_t t = time(done), j0 = projection.units_of_panel();
                        const auto finish = [&](int64_t at, int64_t first, int64_t end_row, const T* sums) {
                          const int vectors = projection.vectors(at);
                          for (int64_t b = first; b < end_row; ++b) {
                            for (int v = 0; v < vectors; ++v, sums += kWidth) {
                              const int64_t j = at * j0 + v * kWidth;
                              const int n = static_cast<int>(at_most(kWidth, s.hidden - j));
                              if (rows.runs(t, b)) cell(t, low, b, j, n, load(sums), gates_of(t, b, low) + j);
                            }
                          }
                        };
                        const T* grad = grad_h + (t - low) * s.batch * s.output;
                        multiply_panels(projection, grad, s.output, row, past, panel, last, finish);
                      }};
    run_steps(begin, end, s.batch, weights + s.hidden * s.output, carry, gates);
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

  FASTNETS_INLINE void lstm(int64_t t, int64_t low, int64_t b, int64_t j, int n, Vec<T> grad, T* to) {
    const T *saved = saved_gates(t, b) + j, *cells = static_cast<const T*>(p.cells);
    Vec<T> g[4];
    for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + q * s.hidden, n);
    const Vec<T> c = load_lanes(cells + (t * s.batch + b) * s.hidden + j, n);
    if (projects) {
      store_lanes(unprojected + ((t - low) * s.batch + b) * s.hidden + j, LstmCell<Simd<T>>::output(g, c), n);
    }
    T* state = grad_c + b * c_row + j;
    Vec<T> total = load(state);
    LstmCell<Simd<T>>::backward(g, load_lanes(before(cells, c0, t, b, s.hidden) + j, n), c, grad, total);
    store(state, total);
    for (int q = 0; q < 4; ++q) store_lanes(to + q * s.hidden, g[q], n);
  }

  FASTNETS_INLINE void gru(int64_t t, int64_t, int64_t b, int64_t j, int n, Vec<T> grad, T* to) {
    const T* saved = saved_gates(t, b) + j;
    Vec<T> g[4];
    for (int q = 0; q < 4; ++q) g[q] = load_lanes(saved + q * s.hidden, n);
    const S* h = before(static_cast<const S*>(p.y), static_cast<const S*>(p.h0), t, b, s.hidden);
    store(carried + b * h_row + j, GruCell<Simd<T>>::backward(g, load_lanes(h + j, n), grad));
    for (int q = 0; q < 4; ++q) store_lanes(to + q * s.hidden, g[q], n);
  }

  template <class RnnCell>
  FASTNETS_INLINE void rnn(int64_t t, int64_t, int64_t b, int64_t j, int n, Vec<T> grad, T* to) {
    const Vec<T> h = load_lanes(static_cast<const S*>(p.y) + (t * s.batch + b) * s.hidden + j, n);
    store_lanes(to, RnnCell::backward(h, grad), n);
  }

  // ---- many steps at once --------------------------------------------------------------------------------------

  void grad_of_x(int64_t low, int64_t high) {
    const int64_t count = (high - low) * s.batch, offset = low * s.batch * s.input;
    T* to = kSame ? grad_x + offset : grad_x;
    for (int i = 0; i < layout.block_count; ++i) {
      const InputBlock& block = layout.blocks[i];
      const S* w = static_cast<const S*>(p.w_ih) + block.weight * s.input;
      const T* grad = grad_gates + block.gate;
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
    const View<S> x{static_cast<const S*>(p.x) + low * s.batch * s.input, s.input, 1};
    for (int i = 0; i < layout.block_count; ++i) {
      const InputBlock& block = layout.blocks[i];
      gemm<T>(block.count, s.input, count, View<T>{grad_gates + block.gate, 1, layout.columns}, x,
              grad_w_ih + block.weight * s.input, s.input, accumulate);
    }
    // The h of the step before; the first steps, whose h is h0, come at the end. (Reversed, y is zero behind the end of
    // a shorter sequence, so that its first step adds nothing here.)
    const int64_t from = s.reverse ? low : low > 0 ? low : 1, to = s.reverse ? at_most(high, s.steps - 1) : high;
    if (from < to) {
      const View<S> h{static_cast<const S*>(p.y) + (s.reverse ? from + 1 : from - 1) * s.batch * s.output, s.output, 1};
      const View<T> grad{gates_of(from, 0, low) + layout.recurrent, 1, layout.columns};
      gemm<T>(layout.recurrents, s.output, (to - from) * s.batch, grad, h, grad_w_hh, s.output, has_grad_w_hh);
      has_grad_w_hh = true;
    }
    if (projects) {
      gemm<T>(s.output, s.hidden, count, View<T>{grad_h, 1, s.output}, View<T>{unprojected, s.hidden, 1}, grad_w_hr,
              s.hidden, accumulate);
    }
    add_to_bias(count);
  }

  // In blocks of rows, so that rounding errors grow with the number of blocks and not with that of rows.
  void add_to_bias(int64_t count) {
    constexpr int64_t block = 32;
    for (int64_t row = 0; row < count; row += block) {
      const int64_t past = at_most(row + block, count);
      for (int64_t j = 0; j < layout.columns; j += kWidth) {
        const int n = static_cast<int>(at_most(kWidth, layout.columns - j));
        Vec<T> sum{};
        for (int64_t r = row; r < past; ++r) sum += load_lanes(grad_gates + r * layout.columns + j, n);
        store_lanes(bias + j, load_lanes(bias + j, n) + sum, n);
      }
    }
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
    const T* grad = s.steps > 0 ? edge + layout.recurrent : nullptr;
    if (once) {
      multiply_plain<T>(s.batch, s.output, layout.recurrents, grad, layout.columns, static_cast<const S*>(p.w_hh),
                        products, s.output, false);
      visit_products(recurrent, products, 0, s.batch, 0, recurrent.count(), finish);
    } else {
      multiply_panels(recurrent, grad, layout.columns, 0, s.batch, 0, recurrent.count(), finish);
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
      convert_back(bias + block.gate, block.count, static_cast<S*>(p.grad_b_ih) + block.weight);
    }
    convert_back(bias + layout.recurrent, layout.recurrents, static_cast<S*>(p.grad_b_hh));
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

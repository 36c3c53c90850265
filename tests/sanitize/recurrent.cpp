// Recurrent layers: every cell in both directions, projection, lengths, bias, an lstm's options, and gradients that are
// not there; rows of whole pieces of 16 bytes and others; one strip of the weights a block, several, and weights that
// do not fit on the chip; one direction and both; forwards and backwards.
#include <cmath>
#include <memory>

#include "recurrent_layer.h"

namespace sanitize {
namespace {

constexpr unsigned kMany = 32;
constexpr size_t kLarge = 99 << 10, kSmall = 24 << 10;

const Shape kShapes[] = {
    {"lstm", Cell::kLstm, false, 4, 5, 20, 0, {}, true, true, kMany, kLarge},
    {"lstm, reverse, lengths", Cell::kLstm, true, 4, 5, 17, 0, {4, 0, 2, 1, 3}, true, true, kMany, kLarge},
    {"lstm, projected", Cell::kLstm, false, 4, 3, 40, 7, {2, 4, 0}, true, true, kMany, kLarge},
    {"lstm, projected, reverse", Cell::kLstm, true, 3, 11, 24, 24, {}, false, false, kMany, kLarge},
    {"lstm, two groups of rows", Cell::kLstm, false, 3, 35, 9, 3, {}, true, true, kMany, kLarge},
    {"gru, two groups of rows in one block", Cell::kGru, true, 3, 40, 9, 0, {}, true, true, 1, kLarge},
    {"lstm, streamed", Cell::kLstm, false, 3, 3, 72, 40, {3, 3, 2}, true, true, 2, kSmall},
    {"gru", Cell::kGru, false, 4, 5, 20, 0, {3, 4, 0, 2, 4}, true, true, kMany, kLarge},
    {"gru, reverse", Cell::kGru, true, 4, 19, 17, 0, {}, true, false, kMany, kLarge},
    {"gru, one block", Cell::kGru, false, 3, 2, 48, 0, {}, false, true, 1, kSmall},
    {"tanh", Cell::kRnnTanh, false, 4, 3, 40, 0, {}, true, true, kMany, kLarge},
    {"tanh, reverse, lengths", Cell::kRnnTanh, true, 5, 9, 33, 0, {5, 1, 2, 3, 4, 0, 5, 5, 1}, true, true, 2, kLarge},
    {"relu", Cell::kRnnRelu, false, 4, 6, 36, 0, {1, 0, 4, 4, 2, 3}, true, true, kMany, kLarge},
    {"relu, reverse", Cell::kRnnRelu, true, 2, 1, 100, 0, {}, true, true, 3, kSmall},
    {"tanh, one step", Cell::kRnnTanh, true, 1, 18, 33, 0, {}, true, true, kMany, kLarge},
    {"gru, one step and x", Cell::kGru, false, 1, 4, 25, 0, {}, true, true, kMany, kLarge, true},
    {"lstm, one step and x, projected",
     Cell::kLstm,
     false,
     1,
     9,
     25,
     6,
     {1, 0, 1, 1, 1, 0, 0, 1, 1},
     true,
     true,
     3,
     kLarge,
     true},
    {"lstm, options",
     Cell::kLstm,
     true,
     3,
     5,
     20,
     0,
     {3, 0, 2, 1, 3},
     true,
     true,
     kMany,
     kLarge,
     false,
     Options::kElementwise},
    {"lstm, options, projected",
     Cell::kLstm,
     false,
     3,
     4,
     18,
     7,
     {},
     false,
     true,
     kMany,
     kLarge,
     false,
     Options::kElementwise},
    {"lstm, norm", Cell::kLstm, false, 3, 3, 17, 0, {}, true, false, 1, kLarge, false, Options::kNorm},
    {"lstm, all options",
     Cell::kLstm,
     true,
     3,
     19,
     20,
     0,
     {3, 0, 2, 1, 3, 3, 0, 2, 1, 3, 3, 0, 2, 1, 3, 0, 0, 1, 1},
     true,
     true,
     kMany,
     kSmall,
     false,
     Options::kAll},
    {"lstm, all options, projected",
     Cell::kLstm,
     false,
     3,
     3,
     18,
     7,
     {2, 3, 0},
     true,
     true,
     kMany,
     kLarge,
     false,
     Options::kAll},
    {"lstm, both directions",
     Cell::kLstm,
     false,
     3,
     3,
     20,
     0,
     {3, 1, 2},
     true,
     true,
     kMany,
     kLarge,
     false,
     Options::kNone,
     true},
    {"gru, both directions one after the other",
     Cell::kGru,
     false,
     3,
     2,
     36,
     0,
     {},
     true,
     true,
     3,
     kLarge,
     false,
     Options::kNone,
     true},
    {"lstm, norm, both directions",
     Cell::kLstm,
     false,
     2,
     3,
     20,
     0,
     {},
     true,
     true,
     kMany,
     kLarge,
     false,
     Options::kNorm,
     true},
    {"tanh, one step, both directions",
     Cell::kRnnTanh,
     false,
     1,
     3,
     33,
     0,
     {},
     true,
     true,
     kMany,
     kLarge,
     true,
     Options::kNone,
     true},
};

Tensor filled(Dtype dtype, int64_t count, double value) {
  Tensor t(dtype, count);
  for (int64_t i = 0; i < count; ++i) t.set(i, value);
  return t;
}

Tensor rounded(Dtype dtype, const Doubles& values) {
  Tensor t(dtype, static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < t.size(); ++i) t.set(i, values[i]);
  return t;
}

// Elements of a padded row.
int64_t padded(Dtype dtype, int64_t columns) {
  const int64_t piece = dtype == Dtype::kFloat32 ? 4 : 8;
  return (columns + piece - 1) / piece * piece;
}

// A matrix of so many columns, or its transpose, in padded rows.
Tensor padded(const Tensor& t, int64_t columns, bool transposes = false) {
  const int64_t rows = t.size() / columns, row = padded(t.dtype(), transposes ? rows : columns);
  Tensor result = filled(t.dtype(), (transposes ? columns : rows) * row, 0);
  for (int64_t i = 0; i < t.size(); ++i) {
    const int64_t r = i / columns, c = i % columns;
    result.set(transposes ? c * row + r : r * row + c, t[i]);
  }
  return result;
}

// What lies in front of the padding of rows.
Tensor cut(const Tensor& t, int64_t row, int64_t columns) {
  Tensor result(t.dtype(), t.size() / row * columns);
  for (int64_t i = 0; i < result.size(); ++i) result.set(i, t[i / columns * row + i % columns]);
  return result;
}

double tolerance(const RecurrentShape& s) {
  return s.tf32 ? 0.02 : s.dtype == Dtype::kFloat32 ? 2e-5 : 12 * epsilon(s.dtype);
}

// A direction's pass, with the memory that it points at.
struct ForwardRun {
  const Layer layer;
  const RecurrentShape& s = layer.s;
  const Dtype dtype = s.dtype;
  const bool lstm = s.cell == Cell::kLstm, saves = lstm || s.cell == Cell::kGru, normed = layer.norm.size() > 0;
  const int64_t output_row = padded(dtype, s.output), hidden_row = padded(dtype, s.hidden);
  const Tensor w_hh = padded(layer.w_hh, s.output), first_h = padded(layer.h0, s.output);
  const Tensor w_hr = layer.projects() ? padded(layer.w_hr, s.hidden) : Tensor();
  const Tensor exchange = filled(dtype, output_row == s.output ? 0 : 2 * s.batch * output_row, 0);
  const Tensor unprojected = filled(dtype, layer.projects() ? s.batch* hidden_row : 0, 0);
  const Tensor state = Tensor(Dtype::kFloat32, s.batch* s.hidden);
  const Tensor made = Tensor(Dtype::kFloat32, normed ? s.batch* s.hidden : 0);
  std::vector<uint32_t> flags = std::vector<uint32_t>(fastnets::cuda::recurrent_flags(s));
  const Tensor y = Tensor(dtype, s.steps* s.batch* s.output), h = Tensor(dtype, s.batch* s.output);
  const Tensor c = Tensor(dtype, s.batch* s.hidden);
  const Tensor gates = Tensor(Dtype::kFloat32, saves ? s.steps* s.batch* layer.kept() : 0);
  const Tensor cells = Tensor(Dtype::kFloat32, lstm ? s.steps* s.batch* s.hidden : 0);
  fastnets::cuda::RecurrentForwardPass p{};

  ForwardRun(const Shape& of, Dtype type, bool tf32, bool reverse) : layer(of, type, tf32, reverse) {
    p.shape = s;
    p.output_row = output_row, p.hidden_row = hidden_row;
    p.h0 = layer.h0.data(), p.c0 = lstm ? layer.c0.data() : nullptr;
    p.w_hh = w_hh.data(), p.w_hr = w_hr.data(), p.b_ih = layer.b_ih.data(), p.b_hh = layer.b_hh.data();
    p.y = y.data(), p.h = h.data(), p.c = c.data(), p.gates = gates.data(), p.cells = cells.data();
    p.x = layer.x.data(), p.w_ih = layer.w_ih.data(), p.from_x = of.makes_from_x ? nullptr : layer.from_x.data();
    p.first_h = first_h.data(), p.exchange = exchange.data();
    p.unprojected = unprojected.data(), p.state = static_cast<float*>(state.data()), p.flags = flags.data();
    p.made = static_cast<float*>(made.data());
  }
  ForwardRun(const ForwardRun&) = delete;

  void check() const {
    expect_close("y", y, layer.y, tolerance(s));
    expect_close("h", h, layer.h, tolerance(s));
    if (lstm) expect_close("c", c, layer.c, tolerance(s));
    if (saves) expect_close("gates", gates, layer.saved, tolerance(s));
    if (lstm) expect_close("cells", cells, layer.cells, tolerance(s));
  }
};

struct BackwardRun {
  const Layer layer;
  const RecurrentShape& s = layer.s;
  const Dtype dtype = s.dtype;
  const bool lstm = s.cell == Cell::kLstm, normed = layer.norm.size() > 0, apart = s.cell == Cell::kGru || normed;
  const int64_t rows = s.steps * s.batch, columns = layer.gates * s.hidden;
  const int64_t output_row = padded(dtype, s.output), gates_row = padded(dtype, columns);
  const Tensor w_hh = padded(layer.w_hh, s.output, true);
  const Tensor w_hr = layer.projects() ? padded(layer.w_hr, s.hidden, true) : Tensor();
  const Tensor y = rounded(dtype, layer.y), gates = rounded(Dtype::kFloat32, layer.saved);
  const Tensor cells = rounded(Dtype::kFloat32, layer.cells);
  const Tensor grad_gates = filled(dtype, rows* gates_row, 0), grad_inputs = Tensor(dtype, apart ? rows* columns : 0);
  const Tensor grad_projected = filled(dtype, layer.projects() ? rows* output_row : 0, 0);
  const Tensor unprojected = Tensor(dtype, layer.projects() ? rows* s.hidden : 0);
  Tensor h_before = rounded(dtype, layer.h_before);  // the kernel sets those of sequences' first steps
  const Tensor grad_h0 = Tensor(dtype, s.batch* s.output), grad_c0 = Tensor(dtype, s.batch* s.hidden);
  const Tensor carried = Tensor(Dtype::kFloat32, s.batch* s.output);
  const Tensor state = Tensor(Dtype::kFloat32, s.batch* s.hidden);
  const Tensor grad_sums = Tensor(Dtype::kFloat32, normed ? rows * 14 * s.hidden : 0);
  const Tensor grad_out = Tensor(Dtype::kFloat32, normed ? s.batch* s.hidden : 0);
  const Tensor made = Tensor(Dtype::kFloat32, normed ? s.batch* s.hidden : 0);
  const Tensor grad_peepholes = Tensor(Dtype::kFloat32, rows* layer.peephole.size());
  std::vector<uint32_t> flags = std::vector<uint32_t>(fastnets::cuda::recurrent_flags(s));
  fastnets::cuda::RecurrentBackwardPass p{};

  BackwardRun(const Shape& of, Dtype type, bool tf32, bool reverse) : layer(of, type, tf32, reverse) {
    p.shape = s;
    p.output_row = output_row, p.gates_row = gates_row;
    for (int64_t i = 0; i < h_before.size(); ++i) {
      if (layer.begins(i / s.output / s.batch, i / s.output % s.batch)) h_before.set(i, NAN);
    }
    p.grad_y = layer.grad_y.data(), p.grad_h = layer.grad_h.data(), p.grad_c = lstm ? layer.grad_c.data() : nullptr;
    p.h0 = layer.h0.data(), p.c0 = lstm ? layer.c0.data() : nullptr;
    p.w_hh = w_hh.data(), p.w_hr = w_hr.data(), p.y = y.data(), p.gates = gates.data(), p.cells = cells.data();
    p.grad_h0 = grad_h0.data(), p.grad_c0 = grad_c0.data();
    p.grad_gates = grad_gates.data(), p.grad_inputs = grad_inputs.data(), p.h_before = h_before.data();
    p.grad_projected = grad_projected.data(), p.unprojected = unprojected.data();
    p.carried = static_cast<float*>(carried.data()), p.state = static_cast<float*>(state.data());
    p.grad_sums = static_cast<float*>(grad_sums.data()), p.grad_out = static_cast<float*>(grad_out.data());
    p.made = static_cast<float*>(made.data()), p.grad_peepholes = static_cast<float*>(grad_peepholes.data());
    p.flags = flags.data();
  }
  BackwardRun(const BackwardRun&) = delete;

  void check() const {
    expect_close("grad_gates", cut(grad_gates, gates_row, columns), layer.grad_gates, tolerance(s));
    if (apart) expect_close("grad_inputs", grad_inputs, layer.grad_inputs, tolerance(s));
    expect_close("grad_h0", grad_h0, layer.grad_h0, tolerance(s));
    if (lstm) expect_close("grad_c0", grad_c0, layer.grad_c0, tolerance(s));
    expect_close("h_before", h_before, layer.h_before, tolerance(s));
    if (normed) expect_close("grad_sums", grad_sums, layer.grad_sums, tolerance(s));
    if (layer.peephole.size() > 0) expect_close("grad_peepholes", grad_peepholes, layer.grad_peepholes, tolerance(s));
    if (!layer.projects()) return;
    expect_close("grad_projected", cut(grad_projected, output_row, s.output), layer.grad_projected, tolerance(s));
    expect_close("unprojected", unprojected, layer.unprojected, tolerance(s));
  }
};

// One direction, or both in the same call.
template <class Run, class Launch>
void run(const Shape& of, Dtype dtype, bool tf32, const Launch& launch) {
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<decltype(Run::p)> passes;
  for (int direction = 0; direction < (of.both ? 2 : 1); ++direction) {
    runs.push_back(std::make_unique<Run>(of, dtype, tf32, of.reverse != (direction == 1)));
    passes.push_back(runs.back()->p);
  }
  launch(passes, nullptr);
  for (const auto& one : runs) one->check();
}

void forward(const Shape& of, Dtype dtype, bool tf32) {
  run<ForwardRun>(of, dtype, tf32, fastnets::cuda::recurrent_forward);
}
void backward(const Shape& of, Dtype dtype, bool tf32) {
  run<BackwardRun>(of, dtype, tf32, fastnets::cuda::recurrent_backward);
}

}  // namespace

// Every shape in float32 and bfloat16; the first ones in float16, whose kernels differ in the product alone, and in
// TF32.
void add_cases(Cases& cases) {
  constexpr size_t kFirst = 2;
  struct Arithmetic {
    const char* name;
    Dtype dtype;
    bool tf32;
    size_t shapes;
  };
  constexpr Arithmetic kArithmetic[] = {{"float32", Dtype::kFloat32, false, std::size(kShapes)},
                                        {"bfloat16", Dtype::kBFloat16, false, std::size(kShapes)},
                                        {"float16", Dtype::kFloat16, false, kFirst},
                                        {"tf32", Dtype::kFloat32, true, kFirst}};
  for (const auto [type, dtype, tf32, shapes] : kArithmetic) {
    for (size_t i = 0; i < shapes; ++i) {
      const Shape& shape = kShapes[i];
      for (const bool forwards : {true, false}) {
        cases.add((forwards ? "forward, " : "backward, ") + std::string(shape.name) + " " + type,
                  [&shape, dtype = dtype, tf32 = tf32, forwards] {
                    simt::set_resident_limit(shape.resident);
                    simt::set_shared_limit(shape.shared);
                    (forwards ? forward : backward)(shape, dtype, tf32);
                  });
      }
    }
  }
}

}  // namespace sanitize

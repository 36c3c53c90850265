// Recurrent layers: every cell in both directions, projection, lengths, bias, and gradients that are not there; rows of
// whole pieces of 16 bytes and others; one strip of the weights a block, several, and weights that do not fit on the
// chip; forwards and backwards.
#include <cmath>

#include "driver.h"

namespace sanitize {
namespace {

using fastnets::Cell;
using fastnets::RecurrentShape;

struct Shape {
  const char* name;
  Cell cell;
  bool reverse;
  int64_t steps, batch, hidden, projected;  // 0: no projection
  std::vector<int64_t> lengths;             // empty: all steps
  bool bias, last_gradients;                // gradients of h and c, or of y alone
  unsigned resident;                        // blocks
  size_t shared;                            // bytes of a block
  bool makes_from_x = false;                // the kernel, in the same launch
};

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
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

using Doubles = std::vector<double>;

// A layer's operands, and by loops in double everything that the kernels are to give, or to be given.
struct Layer {
  RecurrentShape s{};
  int64_t gates;
  Random random;
  Tensor x, w_ih, from_x, h0, c0, w_hh, w_hr, b_ih, b_hh, grad_y, grad_h, grad_c;
  Doubles y, h, c, saved, cells;  // forwards; `saved`: the gates behind their activation, 4 H a row
  Doubles h_before, grad_gates, grad_inputs, grad_projected, unprojected, grad_h0, grad_c0;

  Layer(const Shape& of, Dtype dtype, bool tf32) {
    s.dtype = dtype, s.cell = of.cell, s.reverse = of.reverse, s.tf32 = tf32;
    s.steps = of.steps, s.batch = of.batch, s.hidden = of.hidden, s.input = 24;
    s.output = of.projected > 0 ? of.projected : of.hidden;
    s.lengths = of.lengths.empty() ? nullptr : of.lengths.data();
    gates = s.cell == Cell::kLstm ? 4 : s.cell == Cell::kGru ? 3 : 1;
    const double scale = 1 / std::sqrt(static_cast<double>(s.hidden));
    const auto draw = [&](int64_t count, double range) { return random.tensor(dtype, count, -range, range); };
    x = draw(s.steps * s.batch * s.input, 1), w_ih = draw(gates * s.hidden * s.input, 0.4);
    const Doubles product = times_w_ih();
    from_x = Tensor(of.makes_from_x ? Dtype::kFloat64 : dtype, static_cast<int64_t>(product.size()));
    for (int64_t i = 0; i < from_x.size(); ++i) from_x.set(i, product[i]);
    h0 = draw(s.batch * s.output, 1), c0 = draw(s.batch * s.hidden, 1);
    w_hh = draw(gates * s.hidden * s.output, 2 * scale);
    if (of.projected > 0) w_hr = draw(s.output * s.hidden, 2 * scale);
    if (of.bias) b_ih = draw(gates * s.hidden, 1), b_hh = draw(gates * s.hidden, 1);
    grad_y = draw(s.steps * s.batch * s.output, 1);
    if (of.last_gradients) grad_h = draw(s.batch * s.output, 1), grad_c = draw(s.batch * s.hidden, 1);
    y.resize(s.steps * s.batch * s.output), h.resize(s.batch * s.output), c.resize(s.batch * s.hidden);
    saved.resize(s.steps * s.batch * 4 * s.hidden), cells.resize(s.steps * s.batch * s.hidden);
    h_before.resize(y.size()), grad_projected.resize(y.size()), unprojected.resize(cells.size());
    grad_gates.resize(s.steps * s.batch * gates * s.hidden), grad_inputs.resize(grad_gates.size());
    grad_h0.resize(h.size()), grad_c0.resize(c.size());
    for (int64_t b = 0; b < s.batch; ++b) forwards(b);
    for (int64_t b = 0; b < s.batch; ++b) backwards(b);
  }

  bool projects() const { return w_hr.size() > 0; }
  int64_t length(int64_t b) const { return s.lengths == nullptr ? s.steps : s.lengths[b]; }
  bool runs(int64_t t, int64_t b) const { return t < length(b); }
  int64_t time(int64_t b, int64_t step) const { return s.reverse ? length(b) - 1 - step : step; }
  bool begins(int64_t t, int64_t b) const { return length(b) > 0 && t == time(b, 0); }
  static double bias(const Tensor& of, int64_t i) { return of.size() > 0 ? of[i] : 0; }

 private:
  Doubles times_w_ih() const {
    const int64_t rows = s.steps * s.batch, columns = gates * s.hidden;
    Doubles product(rows * columns);
    for (int64_t i = 0; i < rows * columns; ++i) {
      for (int64_t k = 0; k < s.input; ++k) {
        product[i] += x[i / columns * s.input + k] * w_ih[i % columns * s.input + k];
      }
    }
    return product;
  }

  void forwards(int64_t b) {
    Doubles now(s.output), state(s.hidden), raw(s.hidden);
    for (int64_t j = 0; j < s.output; ++j) now[j] = h0[b * s.output + j];
    for (int64_t j = 0; j < s.hidden; ++j) state[j] = c0[b * s.hidden + j];
    for (int64_t step = 0; step < length(b); ++step) {
      const int64_t row = time(b, step) * s.batch + b;
      for (int64_t j = 0; j < s.output; ++j) h_before[row * s.output + j] = now[j];
      for (int64_t j = 0; j < s.hidden; ++j) {
        double x[4] = {}, sums[4] = {};
        for (int64_t g = 0; g < gates; ++g) {
          x[g] = from_x[(row * gates + g) * s.hidden + j] + bias(b_ih, g * s.hidden + j);
          sums[g] = bias(b_hh, g * s.hidden + j);
          for (int64_t k = 0; k < s.output; ++k) sums[g] += w_hh[(g * s.hidden + j) * s.output + k] * now[k];
        }
        double* const keep = &saved[row * 4 * s.hidden + j];
        if (s.cell == Cell::kLstm) {
          const double i = sigmoid(x[0] + sums[0]), f = sigmoid(x[1] + sums[1]);
          const double g = std::tanh(x[2] + sums[2]), o = sigmoid(x[3] + sums[3]);
          state[j] = f * state[j] + i * g;
          cells[row * s.hidden + j] = state[j];
          raw[j] = unprojected[row * s.hidden + j] = o * std::tanh(state[j]);
          keep[0] = i, keep[s.hidden] = f, keep[2 * s.hidden] = g, keep[3 * s.hidden] = o;
        } else if (s.cell == Cell::kGru) {
          const double r = sigmoid(x[0] + sums[0]), z = sigmoid(x[1] + sums[1]), n = std::tanh(x[2] + r * sums[2]);
          raw[j] = (1 - z) * n + z * now[j];
          keep[0] = n, keep[s.hidden] = r, keep[2 * s.hidden] = z, keep[3 * s.hidden] = sums[2];
        } else {
          const double sum = x[0] + sums[0];
          raw[j] = s.cell == Cell::kRnnTanh ? std::tanh(sum) : std::fmax(sum, 0);
        }
      }
      for (int64_t j = 0; j < s.output; ++j) {
        now[j] = projects() ? 0 : raw[j];
        for (int64_t k = 0; projects() && k < s.hidden; ++k) now[j] += w_hr[j * s.hidden + k] * raw[k];
        y[row * s.output + j] = now[j];
      }
    }
    for (int64_t j = 0; j < s.output; ++j) h[b * s.output + j] = now[j];
    for (int64_t j = 0; j < s.hidden; ++j) c[b * s.hidden + j] = state[j];
  }

  void backwards(int64_t b) {
    Doubles of_h(s.output), of_c(s.hidden), of_raw(s.hidden);
    for (int64_t j = 0; j < s.output; ++j) of_h[j] = bias(grad_h, b * s.output + j);
    for (int64_t j = 0; j < s.hidden; ++j) of_c[j] = bias(grad_c, b * s.hidden + j);
    for (int64_t step = length(b) - 1; step >= 0; --step) {
      const int64_t row = time(b, step) * s.batch + b;
      for (int64_t j = 0; j < s.output; ++j) {
        of_h[j] += grad_y[row * s.output + j];
        grad_projected[row * s.output + j] = of_h[j];
      }
      for (int64_t j = 0; j < s.hidden; ++j) {
        of_raw[j] = projects() ? 0 : of_h[j];
        for (int64_t k = 0; projects() && k < s.output; ++k) of_raw[j] += w_hr[k * s.hidden + j] * of_h[k];
      }
      Doubles before(s.output);
      for (int64_t j = 0; j < s.hidden; ++j) {
        const double* const keep = &saved[row * 4 * s.hidden + j];
        double of[4] = {}, of_x[4] = {};  // the gates' gradients: what the rows of w_hh receive, and those of w_ih
        if (s.cell == Cell::kLstm) {
          const double i = keep[0], f = keep[s.hidden], g = keep[2 * s.hidden], o = keep[3 * s.hidden];
          const int64_t former = time(b, step - 1) * s.batch + b;
          const double c_before = step == 0 ? c0[b * s.hidden + j] : cells[former * s.hidden + j];
          const double squashed = std::tanh(cells[row * s.hidden + j]);
          of_c[j] += of_raw[j] * o * (1 - squashed * squashed);
          of[0] = of_c[j] * g * i * (1 - i), of[1] = of_c[j] * c_before * f * (1 - f);
          of[2] = of_c[j] * i * (1 - g * g), of[3] = of_raw[j] * squashed * o * (1 - o);
          of_c[j] *= f;
        } else if (s.cell == Cell::kGru) {
          const double n = keep[0], r = keep[s.hidden], z = keep[2 * s.hidden], from_h = keep[3 * s.hidden];
          const double h_was = h_before[row * s.output + j], of_n = of_raw[j] * (1 - z) * (1 - n * n);
          of[0] = of_n * from_h * r * (1 - r), of[1] = of_raw[j] * (h_was - n) * z * (1 - z), of[2] = of_n * r;
          of_x[2] = of_n;
          before[j] += of_raw[j] * z;
        } else {
          const double out = y[row * s.output + j];
          of[0] = of_raw[j] * (s.cell == Cell::kRnnTanh ? 1 - out * out : out > 0 ? 1 : 0);
        }
        for (int64_t g = 0; g < gates; ++g) {
          const bool apart = s.cell == Cell::kGru && g == 2;
          grad_gates[(row * gates + g) * s.hidden + j] = of[g];
          grad_inputs[(row * gates + g) * s.hidden + j] = apart ? of_x[g] : of[g];
          for (int64_t k = 0; k < s.output; ++k) before[k] += w_hh[(g * s.hidden + j) * s.output + k] * of[g];
        }
      }
      of_h = before;
    }
    for (int64_t j = 0; j < s.output; ++j) grad_h0[b * s.output + j] = of_h[j];
    for (int64_t j = 0; j < s.hidden; ++j) grad_c0[b * s.hidden + j] = of_c[j];
  }
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

void forward(const Shape& of, Dtype dtype, bool tf32) {
  const Layer layer(of, dtype, tf32);
  const RecurrentShape& s = layer.s;
  const bool lstm = s.cell == Cell::kLstm, saves = lstm || s.cell == Cell::kGru;
  fastnets::cuda::RecurrentForwardPass p{};
  p.shape = s;
  p.output_row = padded(dtype, s.output), p.hidden_row = padded(dtype, s.hidden);
  const Tensor w_hh = padded(layer.w_hh, s.output), first_h = padded(layer.h0, s.output);
  const Tensor w_hr = layer.projects() ? padded(layer.w_hr, s.hidden) : Tensor();
  const Tensor exchange = filled(dtype, p.output_row == s.output ? 0 : 2 * s.batch * p.output_row, 0);
  const Tensor unprojected = filled(dtype, layer.projects() ? s.batch * p.hidden_row : 0, 0);
  const Tensor state(Dtype::kFloat32, s.batch * s.hidden);
  std::vector<uint32_t> flags(fastnets::cuda::recurrent_flags(s));
  const Tensor y(dtype, s.steps * s.batch * s.output), h(dtype, s.batch * s.output), c(dtype, s.batch * s.hidden);
  const Tensor gates(Dtype::kFloat32, saves ? s.steps * s.batch * 4 * s.hidden : 0);
  const Tensor cells(Dtype::kFloat32, lstm ? s.steps * s.batch * s.hidden : 0);
  p.h0 = layer.h0.data(), p.c0 = lstm ? layer.c0.data() : nullptr;
  p.w_hh = w_hh.data(), p.w_hr = w_hr.data(), p.b_ih = layer.b_ih.data(), p.b_hh = layer.b_hh.data();
  p.y = y.data(), p.h = h.data(), p.c = c.data(), p.gates = gates.data(), p.cells = cells.data();
  p.x = layer.x.data(), p.w_ih = layer.w_ih.data(), p.from_x = of.makes_from_x ? nullptr : layer.from_x.data();
  p.first_h = first_h.data(), p.exchange = exchange.data();
  p.unprojected = unprojected.data(), p.state = static_cast<float*>(state.data()), p.flags = flags.data();
  fastnets::cuda::recurrent_forward(p, nullptr);
  expect_close("y", y, layer.y, tolerance(s));
  expect_close("h", h, layer.h, tolerance(s));
  if (lstm) expect_close("c", c, layer.c, tolerance(s));
  if (saves) expect_close("gates", gates, layer.saved, tolerance(s));
  if (lstm) expect_close("cells", cells, layer.cells, tolerance(s));
}

void backward(const Shape& of, Dtype dtype, bool tf32) {
  const Layer layer(of, dtype, tf32);
  const RecurrentShape& s = layer.s;
  const bool lstm = s.cell == Cell::kLstm, gru = s.cell == Cell::kGru;
  const int64_t rows = s.steps * s.batch, columns = layer.gates * s.hidden;
  fastnets::cuda::RecurrentBackwardPass p{};
  p.shape = s;
  p.output_row = padded(dtype, s.output), p.gates_row = padded(dtype, columns);
  const Tensor w_hh = padded(layer.w_hh, s.output, true);
  const Tensor w_hr = layer.projects() ? padded(layer.w_hr, s.hidden, true) : Tensor();
  const Tensor y = rounded(dtype, layer.y), gates = rounded(Dtype::kFloat32, layer.saved);
  const Tensor cells = rounded(Dtype::kFloat32, layer.cells);
  const Tensor grad_gates = filled(dtype, rows * p.gates_row, 0), grad_inputs(dtype, gru ? rows * columns : 0);
  const Tensor grad_projected = filled(dtype, layer.projects() ? rows * p.output_row : 0, 0);
  const Tensor unprojected(dtype, layer.projects() ? rows * s.hidden : 0);
  Tensor h_before = rounded(dtype, layer.h_before);  // the kernel sets those of sequences' first steps
  for (int64_t i = 0; i < h_before.size(); ++i) {
    if (layer.begins(i / s.output / s.batch, i / s.output % s.batch)) h_before.set(i, NAN);
  }
  const Tensor grad_h0(dtype, s.batch * s.output), grad_c0(dtype, s.batch * s.hidden);
  const Tensor carried(Dtype::kFloat32, s.batch * s.output), state(Dtype::kFloat32, s.batch * s.hidden);
  std::vector<uint32_t> flags(fastnets::cuda::recurrent_flags(s));
  p.grad_y = layer.grad_y.data(), p.grad_h = layer.grad_h.data(), p.grad_c = lstm ? layer.grad_c.data() : nullptr;
  p.h0 = layer.h0.data(), p.c0 = lstm ? layer.c0.data() : nullptr;
  p.w_hh = w_hh.data(), p.w_hr = w_hr.data(), p.y = y.data(), p.gates = gates.data(), p.cells = cells.data();
  p.grad_h0 = grad_h0.data(), p.grad_c0 = grad_c0.data();
  p.grad_gates = grad_gates.data(), p.grad_inputs = grad_inputs.data(), p.h_before = h_before.data();
  p.grad_projected = grad_projected.data(), p.unprojected = unprojected.data();
  p.carried = static_cast<float*>(carried.data()), p.state = static_cast<float*>(state.data());
  p.flags = flags.data();
  fastnets::cuda::recurrent_backward(p, nullptr);
  expect_close("grad_gates", cut(grad_gates, p.gates_row, columns), layer.grad_gates, tolerance(s));
  if (gru) expect_close("grad_inputs", grad_inputs, layer.grad_inputs, tolerance(s));
  expect_close("grad_h0", grad_h0, layer.grad_h0, tolerance(s));
  if (lstm) expect_close("grad_c0", grad_c0, layer.grad_c0, tolerance(s));
  expect_close("h_before", h_before, layer.h_before, tolerance(s));
  if (!layer.projects()) return;
  expect_close("grad_projected", cut(grad_projected, p.output_row, s.output), layer.grad_projected, tolerance(s));
  expect_close("unprojected", unprojected, layer.unprojected, tolerance(s));
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

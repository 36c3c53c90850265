// A recurrent layer's operands and, by loops in double, everything that the kernels are to give, or to be given.
#pragma once

#include <cmath>

#include "driver.h"

namespace sanitize {

using fastnets::Cell;
using fastnets::RecurrentShape;

enum class Options { kNone, kElementwise, kNorm, kAll };  // of an lstm; all but norm, norm alone

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
  Options options = Options::kNone;
  bool both = false;  // directions at once
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

using Doubles = std::vector<double>;

// A row, normalised, and the way back from the gradient of that.
struct Normed {
  Doubles unit;
  double scale;

  Normed(const double* x, int64_t count) : unit(x, x + count) {
    double mean = 0, squares = 0;
    for (const double v : unit) mean += v / count;
    for (double& v : unit) v -= mean, squares += v * v / count;
    scale = 1 / std::sqrt(squares + 1e-5);
    for (double& v : unit) v *= scale;
  }
  Doubles back(const Doubles& grad) const {
    const double count = static_cast<double>(unit.size());
    double mean = 0, along = 0;
    for (size_t j = 0; j < unit.size(); ++j) mean += grad[j] / count, along += grad[j] * unit[j] / count;
    Doubles of(unit.size());
    for (size_t j = 0; j < unit.size(); ++j) of[j] = (grad[j] - mean - unit[j] * along) * scale;
    return of;
  }
};

struct Layer {
  RecurrentShape s{};
  int64_t gates;
  Random random;
  Tensor x, w_ih, from_x, h0, c0, w_hh, w_hr, b_ih, b_hh, grad_y, grad_h, grad_c;
  Doubles y, h, c, saved, cells;  // forwards; `saved`: the gates behind their activation, 4 H a row, 12 H with norm
  Doubles h_before, grad_gates, grad_inputs, grad_projected, unprojected, grad_h0, grad_c0;
  Tensor peephole, norm;  // of an lstm's options
  std::vector<uint8_t> keep_g, hold_h, hold_c;
  Doubles grad_sums, grad_peepholes;

  Layer(const Shape& of, Dtype dtype, bool tf32, bool reverse) {
    s.dtype = dtype, s.cell = of.cell, s.reverse = reverse, s.tf32 = tf32;
    s.steps = of.steps, s.batch = of.batch, s.hidden = of.hidden, s.input = 24;
    s.output = of.projected > 0 ? of.projected : of.hidden;
    s.lengths = of.lengths.empty() ? nullptr : of.lengths.data();
    gates = s.cell == Cell::kLstm ? 4 : s.cell == Cell::kGru ? 3 : 1;
    const double scale = 1 / std::sqrt(static_cast<double>(s.hidden));
    const auto draw = [&](int64_t count, double range) { return random.tensor(dtype, count, -range, range); };
    x = draw(s.steps * s.batch * s.input, 1), w_ih = draw(gates * s.hidden * s.input, 0.4);
    const Doubles product = times_w_ih();
    const bool has_norm = of.options == Options::kNorm || of.options == Options::kAll;
    const Dtype kept_in = of.makes_from_x ? Dtype::kFloat64 : has_norm ? Dtype::kFloat32 : dtype;
    from_x = Tensor(kept_in, static_cast<int64_t>(product.size()));
    for (int64_t i = 0; i < from_x.size(); ++i) from_x.set(i, product[i]);
    h0 = draw(s.batch * s.output, 1), c0 = draw(s.batch * s.hidden, 1);
    w_hh = draw(gates * s.hidden * s.output, 2 * scale);
    if (of.projected > 0) w_hr = draw(s.output * s.hidden, 2 * scale);
    if (of.bias) b_ih = draw(gates * s.hidden, 1), b_hh = draw(gates * s.hidden, 1);
    grad_y = draw(s.steps * s.batch * s.output, 1);
    if (of.last_gradients) grad_h = draw(s.batch * s.output, 1), grad_c = draw(s.batch * s.hidden, 1);
    const int64_t rows = s.steps * s.batch;
    s.variant.clip = INFINITY, s.variant.keep_scale = 1;
    s.is_variant = of.options != Options::kNone;
    if (has_norm) norm = draw(10 * s.hidden, 1);
    if (of.options == Options::kElementwise || of.options == Options::kAll) {
      peephole = draw(3 * s.hidden, 1);
      keep_g = random.booleans(rows * s.hidden, 0.6), hold_c = random.booleans(rows * s.hidden, 0.4);
      hold_h = random.booleans(rows * s.output, 0.4);
      s.variant.keep_g = keep_g.data(), s.variant.hold_h = hold_h.data(), s.variant.hold_c = hold_c.data();
      s.variant.keep_scale = 1.5, s.variant.clip = 0.9;
    }
    s.variant.peephole = peephole.data(), s.variant.norm = norm.data();
    grad_sums.resize(norm.size() > 0 ? rows * 14 * s.hidden : 0), grad_peepholes.resize(rows * peephole.size());
    y.resize(s.steps * s.batch * s.output), h.resize(s.batch * s.output), c.resize(s.batch * s.hidden);
    saved.resize(rows * kept()), cells.resize(s.steps * s.batch * s.hidden);
    h_before.resize(y.size()), grad_projected.resize(y.size()), unprojected.resize(cells.size());
    grad_gates.resize(s.steps * s.batch * gates * s.hidden), grad_inputs.resize(grad_gates.size());
    grad_h0.resize(h.size()), grad_c0.resize(c.size());
    for (int64_t b = 0; b < s.batch; ++b) forwards(b);
    for (int64_t b = 0; b < s.batch; ++b) backwards(b);
  }

  int64_t kept() const { return (norm.size() > 0 ? 12 : 4) * s.hidden; }  // of a row's gates
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

  // The options of unit j in a row.
  double peep(int64_t q, int64_t j) const { return bias(peephole, q * s.hidden + j); }
  double keep(int64_t row, int64_t j) const {
    return keep_g.empty() ? 1 : keep_g[row * s.hidden + j] * s.variant.keep_scale;
  }
  static double held(const std::vector<uint8_t>& mask, int64_t at) { return mask.empty() ? 0 : mask[at]; }

  // An lstm's step with options, from the products: the new state before it is held back, and h before w_hr.
  void options_forwards(int64_t row, const Doubles& of_x, const Doubles& of_h, Doubles& state, Doubles& raw) {
    const int64_t count = 4 * s.hidden;
    double* const to = &saved[row * kept()];
    const Normed x(of_x.data(), count), h_part(of_h.data(), count);
    Doubles gates(count), made(s.hidden);
    for (int64_t i = 0; i < count; ++i) {
      const bool has = norm.size() > 0;
      gates[i] = has ? norm[i] * x.unit[i] + norm[count + i] * h_part.unit[i] : of_x[i] + of_h[i];
      gates[i] += bias(b_ih, i) + bias(b_hh, i);
      if (has) to[count + i] = of_x[i], to[2 * count + i] = of_h[i];
    }
    for (int64_t j = 0; j < s.hidden; ++j) {
      const double i = sigmoid(gates[j] + peep(0, j) * state[j]);
      const double f = sigmoid(gates[s.hidden + j] + peep(1, j) * state[j]), g = std::tanh(gates[2 * s.hidden + j]);
      made[j] = std::fmin(std::fmax(f * state[j] + i * g * keep(row, j), -s.variant.clip), s.variant.clip);
      to[j] = i, to[s.hidden + j] = f, to[2 * s.hidden + j] = g;
    }
    const Normed of_made(made.data(), s.hidden);
    for (int64_t j = 0; j < s.hidden; ++j) {
      const double seen =
          norm.size() > 0 ? norm[2 * count + j] * of_made.unit[j] + norm[2 * count + s.hidden + j] : made[j];
      const double o = sigmoid(gates[3 * s.hidden + j] + peep(2, j) * made[j]);
      to[3 * s.hidden + j] = o;
      raw[j] = unprojected[row * s.hidden + j] = o * std::tanh(seen);
      const double stays = held(hold_c, row * s.hidden + j);
      state[j] = stays * state[j] + (1 - stays) * made[j];
      cells[row * s.hidden + j] = state[j];
    }
  }

  // Its way back, from the gradient of h before w_hr: of_c becomes that of the state before, `of` that of the product
  // with h.
  void options_backwards(int64_t row, const Doubles& c_before, const Doubles& of_raw, Doubles& of_c, Doubles& of) {
    const int64_t hidden = s.hidden, count = 4 * hidden;
    const double* const gates = &saved[row * kept()];
    Doubles all(hidden), made(hidden), of_seen(hidden), of_made(hidden), sums(count);
    for (int64_t j = 0; j < hidden; ++j) {
      all[j] = gates[hidden + j] * c_before[j] + gates[j] * gates[2 * hidden + j] * keep(row, j);
      made[j] = std::fmin(std::fmax(all[j], -s.variant.clip), s.variant.clip);
    }
    const Normed of_state(made.data(), hidden);
    for (int64_t j = 0; j < hidden; ++j) {
      const bool has = norm.size() > 0;
      const double seen = has ? norm[2 * count + j] * of_state.unit[j] + norm[2 * count + hidden + j] : made[j];
      const double o = gates[3 * hidden + j], squashed = std::tanh(seen);
      of_seen[j] = of_raw[j] * o * (1 - squashed * squashed);
      sums[3 * hidden + j] = of_raw[j] * squashed * o * (1 - o);
      of_made[j] = of_seen[j] * (has ? norm[2 * count + j] : 1);
      if (has) grad_sums[row * 14 * hidden + 3 * count + j] = of_seen[j] * of_state.unit[j];
      if (has) grad_sums[row * 14 * hidden + 3 * count + hidden + j] = of_seen[j];
    }
    if (norm.size() > 0) of_made = of_state.back(of_made);
    for (int64_t j = 0; j < hidden; ++j) {
      const double i = gates[j], f = gates[hidden + j], g = gates[2 * hidden + j];
      const double stays = held(hold_c, row * hidden + j);
      double total = of_made[j] + (1 - stays) * of_c[j] + sums[3 * hidden + j] * peep(2, j);
      if (std::fabs(all[j]) > s.variant.clip) total = 0;
      sums[j] = total * g * keep(row, j) * i * (1 - i), sums[hidden + j] = total * c_before[j] * f * (1 - f);
      sums[2 * hidden + j] = total * i * keep(row, j) * (1 - g * g);
      of_c[j] = stays * of_c[j] + total * f + sums[j] * peep(0, j) + sums[hidden + j] * peep(1, j);
      if (peephole.size() == 0) continue;
      double* const to = &grad_peepholes[row * 3 * hidden + j];
      to[0] = sums[j] * c_before[j], to[hidden] = sums[hidden + j] * c_before[j];
      to[2 * hidden] = sums[3 * hidden + j] * made[j];
    }
    of = sums;
    if (norm.size() == 0) return;
    double* const all_sums = &grad_sums[row * 14 * hidden];
    for (int64_t k = 0; k < count; ++k) all_sums[k] = sums[k];
    for (int64_t i = 0; i < 2; ++i) {
      const Normed product(gates + (i + 1) * count, count);
      Doubles grad(count);
      for (int64_t k = 0; k < count; ++k) {
        grad[k] = sums[k] * norm[i * count + k];
        all_sums[(i + 1) * count + k] = sums[k] * product.unit[k];
      }
      of = product.back(grad);
      for (int64_t k = 0; i == 0 && k < count; ++k) grad_inputs[row * count + k] = of[k];
    }
  }

  void forwards(int64_t b) {
    Doubles now(s.output), state(s.hidden), raw(s.hidden);
    for (int64_t j = 0; j < s.output; ++j) now[j] = h0[b * s.output + j];
    for (int64_t j = 0; j < s.hidden; ++j) state[j] = c0[b * s.hidden + j];
    for (int64_t step = 0; step < length(b); ++step) {
      const int64_t row = time(b, step) * s.batch + b;
      for (int64_t j = 0; j < s.output; ++j) h_before[row * s.output + j] = now[j];
      Doubles of_x(gates * s.hidden), of_h(gates * s.hidden);
      for (int64_t j = 0; j < s.hidden; ++j) {
        double x[4] = {}, sums[4] = {};
        for (int64_t g = 0; g < gates; ++g) {
          x[g] = from_x[(row * gates + g) * s.hidden + j] + bias(b_ih, g * s.hidden + j);
          sums[g] = bias(b_hh, g * s.hidden + j);
          for (int64_t k = 0; k < s.output; ++k) sums[g] += w_hh[(g * s.hidden + j) * s.output + k] * now[k];
        }
        if (s.is_variant) {
          for (int64_t g = 0; g < gates; ++g) {
            of_x[g * s.hidden + j] = x[g] - bias(b_ih, g * s.hidden + j);
            of_h[g * s.hidden + j] = sums[g] - bias(b_hh, g * s.hidden + j);
          }
          continue;
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
      if (s.is_variant) options_forwards(row, of_x, of_h, state, raw);
      for (int64_t j = 0; j < s.output; ++j) {
        const double stays = held(hold_h, row * s.output + j);
        double made = projects() ? 0 : raw[j];
        for (int64_t k = 0; projects() && k < s.hidden; ++k) made += w_hr[j * s.hidden + k] * raw[k];
        now[j] = stays * now[j] + (1 - stays) * made;
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
      Doubles before(s.output), of_products(gates * s.hidden), c_before(s.hidden);
      for (int64_t j = 0; j < s.output; ++j) {
        of_h[j] += grad_y[row * s.output + j];
        before[j] = held(hold_h, row * s.output + j) * of_h[j];
        of_h[j] -= before[j];
        grad_projected[row * s.output + j] = of_h[j];
      }
      for (int64_t j = 0; j < s.hidden; ++j) {
        of_raw[j] = projects() ? 0 : of_h[j];
        for (int64_t k = 0; projects() && k < s.output; ++k) of_raw[j] += w_hr[k * s.hidden + j] * of_h[k];
      }
      const int64_t former = time(b, step - 1) * s.batch + b;
      for (int64_t j = 0; s.cell == Cell::kLstm && j < s.hidden; ++j) {
        c_before[j] = step == 0 ? c0[b * s.hidden + j] : cells[former * s.hidden + j];
      }
      if (s.is_variant) options_backwards(row, c_before, of_raw, of_c, of_products);
      for (int64_t j = 0; j < s.hidden; ++j) {
        const double* const keep = &saved[row * kept() + j];
        double of[4] = {}, of_x[4] = {};  // the gates' gradients: what the rows of w_hh receive, and those of w_ih
        if (s.is_variant) {
          for (int64_t g = 0; g < gates; ++g) of[g] = of_products[g * s.hidden + j];
        } else if (s.cell == Cell::kLstm) {
          const double i = keep[0], f = keep[s.hidden], g = keep[2 * s.hidden], o = keep[3 * s.hidden];
          const double squashed = std::tanh(cells[row * s.hidden + j]);
          of_c[j] += of_raw[j] * o * (1 - squashed * squashed);
          of[0] = of_c[j] * g * i * (1 - i), of[1] = of_c[j] * c_before[j] * f * (1 - f);
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
          if (norm.size() == 0) grad_inputs[(row * gates + g) * s.hidden + j] = apart ? of_x[g] : of[g];
          for (int64_t k = 0; k < s.output; ++k) before[k] += w_hh[(g * s.hidden + j) * s.output + k] * of[g];
        }
      }
      of_h = before;
    }
    for (int64_t j = 0; j < s.output; ++j) grad_h0[b * s.output + j] = of_h[j];
    for (int64_t j = 0; j < s.hidden; ++j) grad_c0[b * s.hidden + j] = of_c[j];
  }
};

}  // namespace sanitize

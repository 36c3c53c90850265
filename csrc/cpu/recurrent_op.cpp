#include <tuple>

#include "op.h"

namespace fastnets {
namespace {

constexpr int kLstm = static_cast<int>(Cell::kLstm), kGru = static_cast<int>(Cell::kGru);

// A tensor that the kernels read: of x's dtype, contiguous and of the given size.
void check_operand(const Tensor& t, const Tensor& x, std::initializer_list<int64_t> size, const char* name) {
  check_dtype(t, x.scalar_type(), name);
  check_contiguous(t, name);
  check_dim(t, static_cast<int64_t>(size.size()), name);
  int64_t dim = 0;
  for (const int64_t expected : size) check_size(t, dim++, expected, name);
}
void check_operand(const std::optional<Tensor>& t, const Tensor& x, std::initializer_list<int64_t> size,
                   const char* name) {
  if (t) check_operand(*t, x, size, name);
}

RecurrentShape shape_of(const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0, const Tensor& w_ih,
                        const Tensor& w_hh, const std::optional<Tensor>& w_hr, const std::optional<Tensor>& lengths,
                        int64_t cell, bool reverse) {
  STD_TORCH_CHECK(0 <= cell && cell <= static_cast<int>(Cell::kRnnRelu), "cell must lie in [0, 3], is ", cell);
  check_dim(x, 3, "x");
  check_dim(h0, 2, "h0");
  check_dim(w_hh, 2, "w_hh");
  RecurrentShape s{};
  s.dtype = dtype_of(x);
  s.cell = static_cast<Cell>(cell);
  s.reverse = reverse;
  s.steps = x.size(0), s.batch = x.size(1), s.input = x.size(2), s.output = h0.size(1);
  if (w_hr) check_dim(*w_hr, 2, "w_hr");
  s.hidden = w_hr ? w_hr->size(1) : s.output;
  const int64_t gates = (cell == kLstm ? 4 : cell == kGru ? 3 : 1) * s.hidden;
  STD_TORCH_CHECK(c0.has_value() == (cell == kLstm), "c0 belongs to lstm, and to lstm alone");
  STD_TORCH_CHECK(!w_hr || cell == kLstm, "w_hr belongs to lstm alone");
  check_operand(x, x, {s.steps, s.batch, s.input}, "x");
  check_operand(h0, x, {s.batch, s.output}, "h0");
  check_operand(c0, x, {s.batch, s.hidden}, "c0");
  check_operand(w_ih, x, {gates, s.input}, "w_ih");
  check_operand(w_hh, x, {gates, s.output}, "w_hh");
  check_operand(w_hr, x, {s.output, s.hidden}, "w_hr");
  if (lengths) {
    check_dtype(*lengths, ScalarType::Long, "lengths");
    check_contiguous(*lengths, "lengths");
    check_dim(*lengths, 1, "lengths");
    check_size(*lengths, 0, s.batch, "lengths");
    s.lengths = static_cast<const int64_t*>(lengths->data_ptr());
  }
  return s;
}

ScalarType computing(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward recurrent_forward(const Tensor& x, const Tensor& h0, const std::optional<Tensor>& c0, const Tensor& w_ih,
                          const Tensor& w_hh, const std::optional<Tensor>& b_ih, const std::optional<Tensor>& b_hh,
                          const std::optional<Tensor>& w_hr, const std::optional<Tensor>& lengths, int64_t cell,
                          bool reverse, bool save) {
  RecurrentForward p{};
  p.shape = shape_of(x, h0, c0, w_ih, w_hh, w_hr, lengths, cell, reverse);
  const RecurrentShape& s = p.shape;
  check_operand(b_ih, x, {w_hh.size(0)}, "b_ih");
  check_operand(b_hh, x, {w_hh.size(0)}, "b_hh");
  using Size = std::vector<int64_t>;
  const bool keeps_gates = save && (cell == kLstm || cell == kGru), keeps_cells = save && cell == kLstm;
  Tensor y = torch::stable::new_empty(x, Size{s.steps, s.batch, s.output});
  Tensor h = torch::stable::new_empty(x, Size{s.batch, s.output});
  Tensor c = torch::stable::new_empty(x, c0 ? Size{s.batch, s.hidden} : Size{0});
  Tensor gates =
      torch::stable::new_empty(x, keeps_gates ? Size{s.steps, s.batch, 4 * s.hidden} : Size{0}, computing(x));
  Tensor cells = torch::stable::new_empty(x, keeps_cells ? Size{s.steps, s.batch, s.hidden} : Size{0}, computing(x));
  p.x = x.data_ptr(), p.h0 = h0.data_ptr(), p.c0 = pointer_or_null(c0);
  p.w_ih = w_ih.data_ptr(), p.w_hh = w_hh.data_ptr(), p.w_hr = pointer_or_null(w_hr);
  p.b_ih = pointer_or_null(b_ih), p.b_hh = pointer_or_null(b_hh);
  p.y = y.data_ptr(), p.h = h.data_ptr(), p.c = c.data_ptr();
  if (keeps_gates) p.gates = gates.data_ptr();
  if (keeps_cells) p.cells = cells.data_ptr();
  kernels().recurrent_forward(p);
  return {y, h, c, gates, cells};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward recurrent_backward(const std::optional<Tensor>& grad_y, const std::optional<Tensor>& grad_h,
                            const std::optional<Tensor>& grad_c, const Tensor& x, const Tensor& h0,
                            const std::optional<Tensor>& c0, const Tensor& w_ih, const Tensor& w_hh,
                            const std::optional<Tensor>& w_hr, const std::optional<Tensor>& lengths, const Tensor& y,
                            const std::optional<Tensor>& gates, const std::optional<Tensor>& cells, int64_t cell,
                            bool reverse, bool need_x, bool need_weights) {
  RecurrentBackward p{};
  p.shape = shape_of(x, h0, c0, w_ih, w_hh, w_hr, lengths, cell, reverse);
  const RecurrentShape& s = p.shape;
  check_operand(y, x, {s.steps, s.batch, s.output}, "y");
  check_operand(grad_y, x, {s.steps, s.batch, s.output}, "grad_y");
  check_operand(grad_h, x, {s.batch, s.output}, "grad_h");
  check_operand(grad_c, x, {s.batch, s.hidden}, "grad_c");
  const auto check_saved = [&](const std::optional<Tensor>& t, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.has_value(), name, " must be what the forward pass saved");
    check_dtype(*t, computing(x), name);
    check_contiguous(*t, name);
    STD_TORCH_CHECK(t->numel() == s.steps * s.batch * columns, name, " must be what the forward pass saved");
  };
  if (cell == kLstm || cell == kGru) check_saved(gates, 4 * s.hidden, "gates");
  if (cell == kLstm) check_saved(cells, s.hidden, "cells");
  const auto gradient = [&](const Tensor& of, bool needed, void*& to) {
    Tensor grad = needed ? torch::stable::empty_like(of) : torch::stable::new_empty(x, std::vector<int64_t>{0});
    if (needed) to = grad.data_ptr();
    return grad;
  };
  const Tensor& none = x;
  Tensor grad_x = gradient(x, need_x, p.grad_x), grad_h0 = gradient(h0, true, p.grad_h0);
  Tensor grad_c0 = gradient(c0 ? *c0 : none, c0.has_value(), p.grad_c0);
  Tensor grad_w_ih = gradient(w_ih, need_weights, p.grad_w_ih), grad_w_hh = gradient(w_hh, need_weights, p.grad_w_hh);
  Tensor grad_b_ih = torch::stable::new_empty(x, std::vector<int64_t>{need_weights ? w_hh.size(0) : 0});
  Tensor grad_b_hh = torch::stable::empty_like(grad_b_ih);
  p.grad_b_ih = grad_b_ih.data_ptr(), p.grad_b_hh = grad_b_hh.data_ptr();
  Tensor grad_w_hr = gradient(w_hr ? *w_hr : none, w_hr && need_weights, p.grad_w_hr);
  p.grad_y = pointer_or_null(grad_y), p.grad_h = pointer_or_null(grad_h), p.grad_c = pointer_or_null(grad_c);
  p.x = x.data_ptr(), p.h0 = h0.data_ptr(), p.c0 = pointer_or_null(c0), p.y = y.data_ptr();
  p.w_ih = w_ih.data_ptr(), p.w_hh = w_hh.data_ptr(), p.w_hr = pointer_or_null(w_hr);
  p.gates = pointer_or_null(gates), p.cells = pointer_or_null(cells);
  kernels().recurrent_backward(p);
  return {grad_x, grad_h0, grad_c0, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_w_hr};
}

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&fastnets::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&fastnets::recurrent_backward));
}

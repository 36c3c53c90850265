// The recurrent operators on every device: from torch's tensors to the kernels' parameters. A Device has
//   forward(p, operands): fills the results that p points at,
//   backward(p, operands, y, need_x, need_weights): likewise, and returns the gradients of x and of the weights.
#pragma once

#include <limits>
#include <tuple>
#include <vector>

#include "cpu/op.h"

namespace fastnets {

using OptionalTensor = std::optional<Tensor>;

struct VariantOperands {
  const OptionalTensor &peephole, &norm, &keep_g, &hold_h, &hold_c;
  double keep_scale, zoneout_h, zoneout_c, clip;
};

// What both directions are given.
struct RecurrentOperands {
  const Tensor &x, &h0;
  const OptionalTensor& c0;
  const Tensor &w_ih, &w_hh;
  const OptionalTensor &w_hr, &lengths;
  const VariantOperands variant;
};

struct RecurrentGradients {
  Tensor x, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, norm;  // empty where nobody asks
};

inline Tensor new_empty(const Tensor& x, std::initializer_list<int64_t> size, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(x, {size.begin(), size.size()}, dtype);
}

inline ScalarType computing(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Of the gates' tensor, in multiples of H.
inline int64_t saved_gates(const RecurrentShape& s) { return s.variant.norm == nullptr ? 4 : 12; }
inline int64_t gate_count(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }

namespace detail {
// A tensor that the kernels read: of x's dtype, contiguous and of the given size.
inline void check_operand(const Tensor& t, const Tensor& x, std::initializer_list<int64_t> size, const char* name) {
  check_dtype(t, x.scalar_type(), name);
  check_contiguous(t, name);
  check_dim(t, static_cast<int64_t>(size.size()), name);
  int64_t dim = 0;
  for (const int64_t expected : size) check_size(t, dim++, expected, name);
}
inline void check_operand(const OptionalTensor& t, const Tensor& x, std::initializer_list<int64_t> size,
                          const char* name) {
  if (t) check_operand(*t, x, size, name);
}

inline const uint8_t* check_mask(const OptionalTensor& t, const RecurrentShape& s, int64_t columns, const char* name) {
  if (!t) return nullptr;
  check_dtype(*t, ScalarType::Bool, name);
  check_contiguous(*t, name);
  check_dim(*t, 3, name);
  check_size(*t, 0, s.steps, name);
  check_size(*t, 1, s.batch, name);
  check_size(*t, 2, columns, name);
  return static_cast<const uint8_t*>(t->data_ptr());
}

inline void place_variant(const VariantOperands& v, const Tensor& x, RecurrentShape& s) {
  s.is_variant =
      v.peephole || v.norm || v.keep_g || v.hold_h || v.hold_c || v.zoneout_h != 0 || v.zoneout_c != 0 || v.clip != 0;
  STD_TORCH_CHECK(!s.is_variant || s.cell == Cell::kLstm, "peephole and what follows it belong to lstm alone");
  check_operand(v.peephole, x, {3 * s.hidden}, "peephole");
  check_operand(v.norm, x, {10 * s.hidden}, "norm");
  s.variant = {.peephole = pointer_or_null(v.peephole),
               .norm = pointer_or_null(v.norm),
               .keep_g = check_mask(v.keep_g, s, s.hidden, "keep_g"),
               .hold_h = check_mask(v.hold_h, s, s.output, "hold_h"),
               .hold_c = check_mask(v.hold_c, s, s.hidden, "hold_c"),
               .keep_scale = v.keep_scale,
               .zoneout_h = v.zoneout_h,
               .zoneout_c = v.zoneout_c,
               .clip = v.clip > 0 ? v.clip : std::numeric_limits<double>::infinity()};
}

inline RecurrentShape shape_of(const RecurrentOperands& o, int64_t cell, bool reverse, bool tf32) {
  STD_TORCH_CHECK(0 <= cell && cell <= static_cast<int>(Cell::kRnnRelu), "cell must lie in [0, 3], is ", cell);
  check_dim(o.x, 3, "x");
  check_dim(o.h0, 2, "h0");
  check_dim(o.w_hh, 2, "w_hh");
  RecurrentShape s{};
  s.dtype = dtype_of(o.x);
  s.cell = static_cast<Cell>(cell);
  s.reverse = reverse, s.tf32 = tf32;
  s.steps = o.x.size(0), s.batch = o.x.size(1), s.input = o.x.size(2), s.output = o.h0.size(1);
  if (o.w_hr) check_dim(*o.w_hr, 2, "w_hr");
  s.hidden = o.w_hr ? o.w_hr->size(1) : s.output;
  const int64_t gates = gate_count(s.cell) * s.hidden;
  STD_TORCH_CHECK(o.c0.has_value() == (s.cell == Cell::kLstm), "c0 belongs to lstm, and to lstm alone");
  STD_TORCH_CHECK(!o.w_hr || s.cell == Cell::kLstm, "w_hr belongs to lstm alone");
  check_operand(o.x, o.x, {s.steps, s.batch, s.input}, "x");
  check_operand(o.h0, o.x, {s.batch, s.output}, "h0");
  check_operand(o.c0, o.x, {s.batch, s.hidden}, "c0");
  check_operand(o.w_ih, o.x, {gates, s.input}, "w_ih");
  check_operand(o.w_hh, o.x, {gates, s.output}, "w_hh");
  check_operand(o.w_hr, o.x, {s.output, s.hidden}, "w_hr");
  if (o.lengths) {
    check_dtype(*o.lengths, ScalarType::Long, "lengths");
    check_contiguous(*o.lengths, "lengths");
    check_dim(*o.lengths, 1, "lengths");
    check_size(*o.lengths, 0, s.batch, "lengths");
    s.lengths = static_cast<const int64_t*>(o.lengths->data_ptr());
  }
  place_variant(o.variant, o.x, s);
  return s;
}

}  // namespace detail

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Forward recurrent_forward(const Tensor& x, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
                          const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                          const OptionalTensor& w_hr, const OptionalTensor& lengths, int64_t cell, bool reverse,
                          bool tf32, bool save, const OptionalTensor& peephole, const OptionalTensor& norm,
                          const OptionalTensor& keep_g, const OptionalTensor& hold_h, const OptionalTensor& hold_c,
                          double keep_scale, double zoneout_h, double zoneout_c, double clip) {
  const VariantOperands variant{peephole, norm, keep_g, hold_h, hold_c, keep_scale, zoneout_h, zoneout_c, clip};
  const RecurrentOperands operands{x, h0, c0, w_ih, w_hh, w_hr, lengths, variant};
  RecurrentForward p{};
  p.shape = detail::shape_of(operands, cell, reverse, tf32);
  const RecurrentShape& s = p.shape;
  detail::check_operand(b_ih, x, {w_hh.size(0)}, "b_ih");
  detail::check_operand(b_hh, x, {w_hh.size(0)}, "b_hh");
  const bool keeps_cells = save && s.cell == Cell::kLstm, keeps_gates = keeps_cells || (save && s.cell == Cell::kGru);
  Tensor y = new_empty(x, {s.steps, s.batch, s.output}), h = new_empty(x, {s.batch, s.output});
  Tensor c = c0 ? new_empty(x, {s.batch, s.hidden}) : new_empty(x, {0});
  Tensor gates = keeps_gates ? new_empty(x, {s.steps, s.batch, saved_gates(s) * s.hidden}, computing(x))
                             : new_empty(x, {0}, computing(x));
  Tensor cells =
      keeps_cells ? new_empty(x, {s.steps, s.batch, s.hidden}, computing(x)) : new_empty(x, {0}, computing(x));
  p.x = x.data_ptr(), p.h0 = h0.data_ptr(), p.c0 = pointer_or_null(c0);
  p.w_ih = w_ih.data_ptr(), p.w_hh = w_hh.data_ptr(), p.w_hr = pointer_or_null(w_hr);
  p.b_ih = pointer_or_null(b_ih), p.b_hh = pointer_or_null(b_hh);
  p.y = y.data_ptr(), p.h = h.data_ptr(), p.c = c.data_ptr();
  if (keeps_gates) p.gates = gates.data_ptr();
  if (keeps_cells) p.cells = cells.data_ptr();
  Device::forward(p, operands);
  return {y, h, c, gates, cells};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Backward recurrent_backward(const OptionalTensor& grad_y, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                            const Tensor& x, const Tensor& h0, const OptionalTensor& c0, const Tensor& w_ih,
                            const Tensor& w_hh, const OptionalTensor& w_hr, const OptionalTensor& lengths,
                            const Tensor& y, const OptionalTensor& gates, const OptionalTensor& cells, int64_t cell,
                            bool reverse, bool tf32, bool need_x, bool need_weights, const OptionalTensor& peephole,
                            const OptionalTensor& norm, const OptionalTensor& keep_g, const OptionalTensor& hold_h,
                            const OptionalTensor& hold_c, double keep_scale, double zoneout_h, double zoneout_c,
                            double clip) {
  const VariantOperands variant{peephole, norm, keep_g, hold_h, hold_c, keep_scale, zoneout_h, zoneout_c, clip};
  const RecurrentOperands operands{x, h0, c0, w_ih, w_hh, w_hr, lengths, variant};
  RecurrentBackward p{};
  p.shape = detail::shape_of(operands, cell, reverse, tf32);
  const RecurrentShape& s = p.shape;
  detail::check_operand(y, x, {s.steps, s.batch, s.output}, "y");
  detail::check_operand(grad_y, x, {s.steps, s.batch, s.output}, "grad_y");
  detail::check_operand(grad_h, x, {s.batch, s.output}, "grad_h");
  detail::check_operand(grad_c, x, {s.batch, s.hidden}, "grad_c");
  const auto check_saved = [&](const OptionalTensor& t, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.has_value(), name, " must be what the forward pass saved");
    check_dtype(*t, computing(x), name);
    check_contiguous(*t, name);
    STD_TORCH_CHECK(t->numel() == s.steps * s.batch * columns, name, " must be what the forward pass saved");
  };
  if (s.cell == Cell::kLstm || s.cell == Cell::kGru) check_saved(gates, saved_gates(s) * s.hidden, "gates");
  if (s.cell == Cell::kLstm) check_saved(cells, s.hidden, "cells");
  Tensor grad_h0 = torch::stable::empty_like(h0);
  Tensor grad_c0 = c0 ? torch::stable::empty_like(*c0) : new_empty(x, {0});
  p.grad_h0 = grad_h0.data_ptr();
  if (c0) p.grad_c0 = grad_c0.data_ptr();
  p.grad_y = pointer_or_null(grad_y), p.grad_h = pointer_or_null(grad_h), p.grad_c = pointer_or_null(grad_c);
  p.x = x.data_ptr(), p.h0 = h0.data_ptr(), p.c0 = pointer_or_null(c0), p.y = y.data_ptr();
  p.w_ih = w_ih.data_ptr(), p.w_hh = w_hh.data_ptr(), p.w_hr = pointer_or_null(w_hr);
  p.gates = pointer_or_null(gates), p.cells = pointer_or_null(cells);
  const RecurrentGradients of = Device::backward(p, operands, y, need_x, need_weights);
  return {of.x, grad_h0, grad_c0, of.w_ih, of.w_hh, of.b_ih, of.b_hh, of.w_hr, of.peephole, of.norm};
}

}  // namespace fastnets

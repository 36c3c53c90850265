// The recurrent operators on every device: from torch's tensors to the kernels' parameters. A Device has
//   forward(calls): fills the results that their parameters point at, of one direction or both,
//   backward(calls, need_x, need_weights): likewise, and the gradients of x and of the weights in `of`.
#pragma once

#include <array>
#include <limits>
#include <span>
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

// One direction of a layer, with what came of it.
struct ForwardCall {
  RecurrentOperands operands;
  RecurrentForward p;
  Tensor y, h, c, gates, cells;
};
struct BackwardCall {
  RecurrentOperands operands;
  RecurrentBackward p;
  const Tensor& y;
  Tensor grad_h0, grad_c0;
  RecurrentGradients of;
};

inline Tensor new_empty(const Tensor& x, std::initializer_list<int64_t> size, std::optional<ScalarType> dtype = {}) {
  return allocate(x, {size.begin(), size.size()}, dtype);
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

// Checks the operands and makes room for the results.
inline ForwardCall forward_call(const RecurrentOperands& o, const OptionalTensor& b_ih, const OptionalTensor& b_hh,
                                int64_t cell, bool reverse, bool tf32, bool save) {
  const Tensor& x = o.x;
  RecurrentForward p{};
  p.shape = shape_of(o, cell, reverse, tf32);
  const RecurrentShape& s = p.shape;
  check_operand(b_ih, x, {o.w_hh.size(0)}, "b_ih");
  check_operand(b_hh, x, {o.w_hh.size(0)}, "b_hh");
  const bool keeps_cells = save && s.cell == Cell::kLstm, keeps_gates = keeps_cells || (save && s.cell == Cell::kGru);
  Tensor y = new_empty(x, {s.steps, s.batch, s.output}), h = new_empty(x, {s.batch, s.output});
  Tensor c = o.c0 ? new_empty(x, {s.batch, s.hidden}) : new_empty(x, {0});
  Tensor gates = keeps_gates ? new_empty(x, {s.steps, s.batch, saved_gates(s) * s.hidden}, computing(x))
                             : new_empty(x, {0}, computing(x));
  Tensor cells =
      keeps_cells ? new_empty(x, {s.steps, s.batch, s.hidden}, computing(x)) : new_empty(x, {0}, computing(x));
  p.x = x.data_ptr(), p.h0 = o.h0.data_ptr(), p.c0 = pointer_or_null(o.c0);
  p.w_ih = o.w_ih.data_ptr(), p.w_hh = o.w_hh.data_ptr(), p.w_hr = pointer_or_null(o.w_hr);
  p.b_ih = pointer_or_null(b_ih), p.b_hh = pointer_or_null(b_hh);
  p.y = y.data_ptr(), p.h = h.data_ptr(), p.c = c.data_ptr();
  if (keeps_gates) p.gates = gates.data_ptr();
  if (keeps_cells) p.cells = cells.data_ptr();
  return {o, p, y, h, c, gates, cells};
}

inline BackwardCall backward_call(const OptionalTensor& grad_y, const OptionalTensor& grad_h,
                                  const OptionalTensor& grad_c, const RecurrentOperands& o, const Tensor& y,
                                  const OptionalTensor& gates, const OptionalTensor& cells, int64_t cell, bool reverse,
                                  bool tf32) {
  const Tensor& x = o.x;
  RecurrentBackward p{};
  p.shape = shape_of(o, cell, reverse, tf32);
  const RecurrentShape& s = p.shape;
  check_operand(y, x, {s.steps, s.batch, s.output}, "y");
  check_operand(grad_y, x, {s.steps, s.batch, s.output}, "grad_y");
  check_operand(grad_h, x, {s.batch, s.output}, "grad_h");
  check_operand(grad_c, x, {s.batch, s.hidden}, "grad_c");
  const auto check_saved = [&](const OptionalTensor& t, int64_t columns, const char* name) {
    STD_TORCH_CHECK(t.has_value(), name, " must be what the forward pass saved");
    check_dtype(*t, computing(x), name);
    check_contiguous(*t, name);
    STD_TORCH_CHECK(t->numel() == s.steps * s.batch * columns, name, " must be what the forward pass saved");
  };
  if (s.cell == Cell::kLstm || s.cell == Cell::kGru) check_saved(gates, saved_gates(s) * s.hidden, "gates");
  if (s.cell == Cell::kLstm) check_saved(cells, s.hidden, "cells");
  Tensor grad_h0 = new_empty(x, {s.batch, s.output});
  Tensor grad_c0 = o.c0 ? new_empty(x, {s.batch, s.hidden}) : new_empty(x, {0});
  p.grad_h0 = grad_h0.data_ptr();
  if (o.c0) p.grad_c0 = grad_c0.data_ptr();
  p.grad_y = pointer_or_null(grad_y), p.grad_h = pointer_or_null(grad_h), p.grad_c = pointer_or_null(grad_c);
  p.x = x.data_ptr(), p.h0 = o.h0.data_ptr(), p.c0 = pointer_or_null(o.c0), p.y = y.data_ptr();
  p.w_ih = o.w_ih.data_ptr(), p.w_hh = o.w_hh.data_ptr(), p.w_hr = pointer_or_null(o.w_hr);
  p.gates = pointer_or_null(gates), p.cells = pointer_or_null(cells);
  return {o, p, y, grad_h0, grad_c0, {x, x, x, x, x, x, x, x}};
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
  ForwardCall call = detail::forward_call(operands, b_ih, b_hh, cell, reverse, tf32, save);
  Device::forward(std::span(&call, 1));
  return {call.y, call.h, call.c, call.gates, call.cells};
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
  BackwardCall call = detail::backward_call(grad_y, grad_h, grad_c, operands, y, gates, cells, cell, reverse, tf32);
  Device::backward(std::span(&call, 1), need_x, need_weights);
  const RecurrentGradients& of = call.of;
  return {of.x, call.grad_h0, call.grad_c0, of.w_ih, of.w_hh, of.b_ih, of.b_hh, of.w_hr, of.peephole, of.norm};
}

// Both directions of a layer, each with a list of what is its own, in the order of the operator's schema.
using Own = std::vector<OptionalTensor>;

namespace detail {
inline RecurrentOperands operands_of(const Tensor& x, const OptionalTensor& lengths, const Own& own, double keep_scale,
                                     double zoneout_h, double zoneout_c, double clip) {
  STD_TORCH_CHECK(own.size() == 12, "a direction has 12 tensors, some of them None");
  for (const int required : {0, 2, 3}) STD_TORCH_CHECK(own[required], "h0, w_ih and w_hh must be there");
  const VariantOperands variant{own[7], own[8], own[9], own[10], own[11], keep_scale, zoneout_h, zoneout_c, clip};
  return {x, *own[0], own[1], *own[2], *own[3], own[6], lengths, variant};
}

// What a launch for both directions takes from the first one.
inline void check_alike(const RecurrentShape& a, const RecurrentShape& b) {
  STD_TORCH_CHECK(a.hidden == b.hidden && a.output == b.output, "both directions have the same sizes");
  STD_TORCH_CHECK(a.is_variant == b.is_variant && (a.variant.norm == nullptr) == (b.variant.norm == nullptr),
                  "both directions have the same options");
}
}  // namespace detail

template <class Device>
std::vector<Tensor> recurrent_forward_both(const Tensor& x, const Own& ahead, const Own& back,
                                           const OptionalTensor& lengths, int64_t cell, bool tf32, bool save,
                                           double keep_scale, double zoneout_h, double zoneout_c, double clip) {
  const auto call = [&](const Own& own, bool reverse) {
    const RecurrentOperands o = detail::operands_of(x, lengths, own, keep_scale, zoneout_h, zoneout_c, clip);
    return detail::forward_call(o, own[4], own[5], cell, reverse, tf32, save);
  };
  std::array<ForwardCall, 2> calls{call(ahead, false), call(back, true)};
  detail::check_alike(calls[0].p.shape, calls[1].p.shape);
  Device::forward(calls);
  std::vector<Tensor> found;
  for (const ForwardCall& of : calls) found.insert(found.end(), {of.y, of.h, of.c, of.gates, of.cells});
  return found;
}

// `of_ahead` and `of_back`: the gradients of y, h and c, then y, gates and cells.
template <class Device>
std::vector<Tensor> recurrent_backward_both(const Tensor& x, const Own& ahead, const Own& back, const Own& of_ahead,
                                            const Own& of_back, const OptionalTensor& lengths, int64_t cell, bool tf32,
                                            bool need_x, bool need_weights, double keep_scale, double zoneout_h,
                                            double zoneout_c, double clip) {
  const auto call = [&](const Own& own, const Own& of, bool reverse) {
    const RecurrentOperands o = detail::operands_of(x, lengths, own, keep_scale, zoneout_h, zoneout_c, clip);
    STD_TORCH_CHECK(of.size() == 6 && of[3], "a direction comes back with 6 tensors, of which y must be there");
    return detail::backward_call(of[0], of[1], of[2], o, *of[3], of[4], of[5], cell, reverse, tf32);
  };
  std::array<BackwardCall, 2> calls{call(ahead, of_ahead, false), call(back, of_back, true)};
  detail::check_alike(calls[0].p.shape, calls[1].p.shape);
  Device::backward(calls, need_x, need_weights);
  std::vector<Tensor> found;
  for (const BackwardCall& one : calls) {
    const RecurrentGradients& of = one.of;
    found.insert(found.end(),
                 {of.x, one.grad_h0, one.grad_c0, of.w_ih, of.w_hh, of.b_ih, of.b_hh, of.w_hr, of.peephole, of.norm});
  }
  return found;
}

}  // namespace fastnets

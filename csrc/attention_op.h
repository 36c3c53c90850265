// The attention operators on every device: from torch's tensors to the kernels' parameters. A Device has
//   check_starts(starts, last, name): what it can check of the sequences' bounds without waiting for them
//   run(p, q): starts its kernels for AttentionForward, AttentionWeights and AttentionBackward, where q lies.
#pragma once

#include <algorithm>
#include <array>
#include <tuple>

#include "cpu/op.h"

namespace fastnets {

using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;

inline AttentionArray array_of(const Tensor& x, const char* name) {
  check_dim(x, 4, name);
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, name, " must have contiguous rows");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Empty, of the given sizes, with the first three dimensions in memory in the order of x's.
inline Tensor empty_like_rows(const Tensor& x, std::array<int64_t, 4> sizes) {
  std::array<int64_t, 3> order = {0, 1, 2};
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.stride(a) > x.stride(b); });
  const std::array<int64_t, 4> shape = {sizes[order[0]], sizes[order[1]], sizes[order[2]], sizes[3]};
  Tensor y = allocate(x, {shape.data(), shape.size()});
  // Swaps bring every dimension to its place; order says which one stands where.
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t from = std::find(order.begin(), order.end(), d) - order.begin();
    if (from == d) continue;
    y = torch::stable::transpose(y, d, from);
    std::swap(order[d], order[from]);
  }
  return y;
}

template <class Device>
const int64_t* starts_of(const OptionalTensor& starts, int64_t batch, int64_t total, const char* name) {
  if (!starts) return nullptr;
  check_dim(*starts, 1, name);
  check_dtype(*starts, ScalarType::Long, name);
  check_contiguous(*starts, name);
  check_size(*starts, 0, batch + 1, name);
  Device::check_starts(*starts, total, name);
  return static_cast<const int64_t*>(starts->data_ptr());
}

struct AttentionExtras {
  const OptionalTensor &mask, &slopes, &seed, &starts_q, &starts_k;
  double scale, softcap;
  OptionalInt left, right, offset;
  double dropout;
  bool tf32;
};

template <class Device>
void fill(Attention& p, const Tensor& q, const Tensor& k, const Tensor& v, const AttentionExtras& x) {
  p.dtype = dtype_of(q);
  check_dtype(k, q.scalar_type(), "k");
  check_dtype(v, q.scalar_type(), "v");
  p.q = array_of(q, "q"), p.k = array_of(k, "k"), p.v = array_of(v, "v");
  p.heads = q.size(1), p.lq = q.size(2), p.lk = k.size(2), p.d = q.size(3), p.dv = v.size(3);
  for (int64_t d = 0; d < 3; ++d) check_size(v, d, k.size(d), "v");
  check_size(k, 0, q.size(0), "k");
  check_size(k, 3, p.d, "k");
  STD_TORCH_CHECK(k.size(1) > 0 ? p.heads > 0 && p.heads % k.size(1) == 0 : p.heads == 0, "k's heads must divide q's");
  p.groups = k.size(1) > 0 ? p.heads / k.size(1) : 1;
  STD_TORCH_CHECK(x.starts_q.has_value() == x.starts_k.has_value(), "starts_q and starts_k go together");
  p.batch = x.starts_q ? x.starts_q->numel() - 1 : q.size(0);
  if (x.starts_q) check_size(q, 0, 1, "q");
  p.starts_q = starts_of<Device>(x.starts_q, p.batch, p.lq, "starts_q");
  p.starts_k = starts_of<Device>(x.starts_k, p.batch, p.lk, "starts_k");
  if (x.mask) {
    STD_TORCH_CHECK(!x.starts_q, "mask does not go with starts");
    check_dim(*x.mask, 4, "mask");
    const int64_t full[] = {p.batch, p.heads, p.lq, p.lk};
    for (int64_t d = 0; d < 4; ++d) {
      const int64_t size = x.mask->size(d);
      STD_TORCH_CHECK(size == 1 || size == full[d], "mask.size(", d, ") must be 1 or ", full[d], ", is ", size);
      p.mask_strides[d] = size == 1 ? 0 : x.mask->stride(d);
    }
    const bool boolean = x.mask->scalar_type() == ScalarType::Bool;
    p.mask_kind = boolean ? MaskKind::kBool : MaskKind::kAdditive;
    if (!boolean) p.mask_dtype = dtype_of(*x.mask);
    p.mask = x.mask->data_ptr();
  }
  if (x.slopes) {
    check_dtype(*x.slopes, p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float, "slopes");
    check_dim(*x.slopes, 2, "slopes");
    check_size(*x.slopes, 0, p.batch, "slopes");
    check_size(*x.slopes, 1, p.heads, "slopes");
    p.slopes = x.slopes->data_ptr();
    p.slope_strides[0] = x.slopes->stride(0), p.slope_strides[1] = x.slopes->stride(1);
  }
  const auto bounded = [](const OptionalInt& n) { return std::clamp(n.value_or(kUnlimited), -kUnlimited, kUnlimited); };
  p.left = bounded(x.left), p.right = bounded(x.right);
  p.offset = std::clamp(x.offset.value_or(0), -kUnlimited, kUnlimited);
  p.bottom_right = !x.offset.has_value();
  p.scale = x.scale, p.softcap = x.softcap, p.dropout = x.dropout, p.tf32 = x.tf32;
  if (p.dropout != 0) {
    STD_TORCH_CHECK(x.seed.has_value(), "dropout needs a seed");
    check_dtype(*x.seed, ScalarType::Long, "seed");
    check_contiguous(*x.seed, "seed");
    check_size(*x.seed, 0, 2, "seed");
    p.seed = static_cast<const int64_t*>(x.seed->data_ptr());
  }
}

inline ScalarType lse_dtype(const Attention& p) {
  return p.dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline const void* lse_of(const Attention& p, const Tensor& lse, const char* name) {
  check_dtype(lse, lse_dtype(p), name);
  check_contiguous(lse, name);
  check_dim(lse, 3, name);
  check_size(lse, 1, p.heads, name);
  check_size(lse, 2, p.lq, name);
  STD_TORCH_CHECK(p.starts_q || lse.size(0) == p.batch, name, " has another batch than q");
  return lse.data_ptr();
}

template <class Device>
std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& mask, const OptionalTensor& slopes,
                                             const OptionalTensor& seed, const OptionalTensor& starts_q,
                                             const OptionalTensor& starts_k, double scale, double softcap,
                                             OptionalInt left, OptionalInt right, OptionalInt offset, double dropout,
                                             bool tf32) {
  AttentionForward p{};
  fill<Device>(p, q, k, v,
               {mask, slopes, seed, starts_q, starts_k, scale, softcap, left, right, offset, dropout, tf32});
  Tensor out = empty_like_rows(q, {q.size(0), p.heads, p.lq, p.dv});
  const std::array<int64_t, 3> rows = {q.size(0), p.heads, p.lq};
  Tensor lse = allocate(q, {rows.data(), rows.size()}, lse_dtype(p));
  p.out = array_of(out, "out");
  p.lse = lse.data_ptr();
  if (lse.numel() > 0) Device::run(p, q);
  return {out, lse};
}

template <class Device>
Tensor attention_weights(const Tensor& q, const Tensor& k, const Tensor& lse, const OptionalTensor& mask,
                         const OptionalTensor& slopes, const OptionalTensor& seed, double scale, double softcap,
                         OptionalInt left, OptionalInt right, OptionalInt offset, double dropout, bool tf32) {
  AttentionWeights p{};
  const OptionalTensor none;
  fill<Device>(p, q, k, k, {mask, slopes, seed, none, none, scale, softcap, left, right, offset, dropout, tf32});
  p.lse = lse_of(p, lse, "lse");
  const std::array<int64_t, 4> shape = {p.batch, p.heads, p.lq, p.lk};
  Tensor weights = allocate(q, {shape.data(), shape.size()});
  p.weights = weights.data_ptr();
  if (weights.numel() > 0) Device::run(p, q);
  return weights;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const OptionalTensor& grad_weights, const Tensor& q,
    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& mask,
    const OptionalTensor& slopes, const OptionalTensor& seed, const OptionalTensor& starts_q,
    const OptionalTensor& starts_k, double scale, double softcap, OptionalInt left, OptionalInt right,
    OptionalInt offset, double dropout, bool tf32, bool bias_gradient, bool deterministic) {
  AttentionBackward p{};
  fill<Device>(p, q, k, v,
               {mask, slopes, seed, starts_q, starts_k, scale, softcap, left, right, offset, dropout, tf32});
  for (const Tensor* x : {&grad_out, &out}) {
    const char* name = x == &out ? "out" : "grad_out";
    check_dtype(*x, q.scalar_type(), name);
    check_dim(*x, 4, name);
    for (int64_t d = 0; d < 3; ++d) check_size(*x, d, q.size(d), name);
    check_size(*x, 3, p.dv, name);
  }
  p.grad_out = array_of(grad_out, "grad_out"), p.out = array_of(out, "out");
  p.lse = lse_of(p, lse, "lse");
  if (grad_lse) p.grad_lse = lse_of(p, *grad_lse, "grad_lse");
  if (grad_weights) {
    check_dtype(*grad_weights, q.scalar_type(), "grad_weights");
    check_contiguous(*grad_weights, "grad_weights");
    STD_TORCH_CHECK(!starts_q && grad_weights->numel() == p.batch * p.heads * p.lq * p.lk,
                    "grad_weights has another size than the weights");
    p.grad_weights = grad_weights->data_ptr();
  }
  Tensor grad_q = empty_like_rows(q, {q.size(0), p.heads, p.lq, p.d});
  Tensor grad_k = empty_like_rows(k, {k.size(0), k.size(1), p.lk, p.d});
  Tensor grad_v = empty_like_rows(v, {v.size(0), v.size(1), p.lk, p.dv});
  p.grad_q = array_of(grad_q, "grad_q"), p.grad_k = array_of(grad_k, "grad_k"), p.grad_v = array_of(grad_v, "grad_v");

  const std::array<int64_t, 1> none = {0};
  Tensor grad_mask = allocate(q, {none.data(), none.size()});
  if (bias_gradient) {
    STD_TORCH_CHECK(p.mask_kind == MaskKind::kAdditive, "only an additive mask has a gradient");
    for (int64_t d = 0; d < 4; ++d) p.mask_sizes[d] = mask->size(d);
    grad_mask = allocate(*mask, {p.mask_sizes, 4});
    if (grad_mask.numel() > 0) p.grad_mask = grad_mask.data_ptr();
  }

  p.deterministic = deterministic;
  Device::run(p, q);  // of nothing, too: a mask of size 1 has a gradient, of zeros
  return {grad_q, grad_k, grad_v, grad_mask};
}

}  // namespace fastnets

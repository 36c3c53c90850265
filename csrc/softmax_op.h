// The softmax operators on every device: from torch's tensors to the kernels' parameters. `run` starts a device's
// kernel for parameters that lie where the given tensor does.
#pragma once

#include "cpu/op.h"

namespace fastnets {

struct SoftmaxLayout {
  int64_t outer = 1, size, inner = 1;
};

inline SoftmaxLayout softmax_layout(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.dim() <= kMaxDims, "softmax takes at most ", kMaxDims, " dimensions");
  STD_TORCH_CHECK(0 <= dim && dim < x.dim(), "dim must lie in [0, ", x.dim(), "), is ", dim);
  SoftmaxLayout at;
  at.size = x.size(dim);
  for (int64_t d = 0; d < dim; ++d) at.outer *= x.size(d);
  for (int64_t d = dim + 1; d < x.dim(); ++d) at.inner *= x.size(d);
  return at;
}

template <void (*run)(const SoftmaxForward&, const Tensor&)>
Tensor softmax_forward(const Tensor& x, const std::optional<Tensor>& mask, int64_t dim, double scale) {
  check_contiguous(x, "x");
  const SoftmaxLayout at = softmax_layout(x, dim);
  Tensor y = torch::stable::empty_like(x);
  SoftmaxForward p{};
  p.dtype = dtype_of(x);
  p.x = x.data_ptr();
  p.y = y.data_ptr();
  p.outer = at.outer, p.size = at.size, p.inner = at.inner;
  p.scale = scale;
  if (mask) {
    check_dim(*mask, x.dim(), "mask");
    for (int64_t d = 0; d < x.dim(); ++d) {
      check_size(*mask, d, x.size(d), "mask");
      if (d == dim) {
        p.mask_stride = mask->stride(d);
      } else if (d < dim) {
        p.outer_sizes[p.outer_dims] = x.size(d);
        p.outer_strides[p.outer_dims++] = mask->stride(d);
      } else {
        p.inner_sizes[p.inner_dims] = x.size(d);
        p.inner_strides[p.inner_dims++] = mask->stride(d);
      }
    }
    const bool boolean = mask->scalar_type() == ScalarType::Bool;
    if (!boolean) check_dtype(*mask, x.scalar_type(), "mask");
    p.mask_kind = boolean ? MaskKind::kBool : MaskKind::kAdditive;
    p.mask = mask->data_ptr();
  }
  if (x.numel() > 0) run(p, x);
  return y;
}

template <void (*run)(const SoftmaxBackward&, const Tensor&)>
Tensor softmax_backward(const Tensor& grad, const Tensor& y, int64_t dim, double scale) {
  check_contiguous(grad, "grad");
  check_contiguous(y, "y");
  check_dtype(grad, y.scalar_type(), "grad");
  STD_TORCH_CHECK(grad.numel() == y.numel(), "grad and y must have the same size");
  const SoftmaxLayout at = softmax_layout(y, dim);
  Tensor grad_x = torch::stable::empty_like(y);
  if (y.numel() > 0) {
    run({dtype_of(y), grad.data_ptr(), y.data_ptr(), grad_x.data_ptr(), at.outer, at.size, at.inner, scale}, y);
  }
  return grad_x;
}

}  // namespace fastnets

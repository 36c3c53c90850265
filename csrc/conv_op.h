// The convolution operators on every device: from torch's tensors to the kernels' parameters. A Device has forward,
// grad_input, grad_weight and grad_epilogue: each starts its kernel for parameters that lie where the given tensor
// does. kSumsBias: whether grad_weight's sums the bias's gradient too.
#pragma once

#include <tuple>
#include <utility>
#include <vector>

#include "cpu/op.h"

namespace fastnets {

using Ints = std::vector<int64_t>;
using ConvResult = std::tuple<Tensor, Tensor>;

constexpr int kLastActivation = static_cast<int>(Activation::kTanh);

inline Activation activation_of(int64_t index) {
  STD_TORCH_CHECK(0 <= index && index <= kLastActivation, "activation must lie in [0, ", kLastActivation, "], is ",
                  index);
  return static_cast<Activation>(index);
}

// The spatial values of 1, 2 or 3 dimensions as those of three.
inline void fill(int64_t* to, const Ints& values, int64_t dims, int64_t lead, const char* name) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, name, " must have ", dims, " elements");
  for (int64_t d = 0; d < 3; ++d) to[d] = d < 3 - dims ? lead : values[d - (3 - dims)];
}

inline Ints spatial(const Tensor& t) {
  Ints sizes;
  for (int64_t d = 2; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// [N, C, *size], contiguous or with its channels innermost.
inline Tensor new_tensor(const Tensor& like, int64_t batch, int64_t channels, const Ints& size, bool channels_last) {
  Ints shape{batch};
  if (!channels_last) shape.push_back(channels);
  shape.insert(shape.end(), size.begin(), size.end());
  if (channels_last) shape.push_back(channels);
  Tensor t = allocate(like, shape);
  for (int64_t d = t.dim() - 1; channels_last && d > 1; --d) t = torch::stable::transpose(t, d, d - 1);
  return t;
}

inline void check_format(Tensor t, bool channels_last, const char* name) {
  for (int64_t d = 1; channels_last && d + 1 < t.dim(); ++d) t = torch::stable::transpose(t, d, d + 1);
  check_contiguous(t, name);
}

inline void fill_weight_strides(ConvShape& s, const Tensor& weight) {
  s.weight_strides[0] = weight.stride(0), s.weight_strides[1] = weight.stride(1);
  for (int64_t d = 2; d < weight.dim(); ++d) s.weight_strides[5 - weight.dim() + d] = weight.stride(d);
}

struct ConvOptions {
  const Ints &stride, &padding, &dilation;
  int64_t groups;
  bool channels_last, tf32;
};

// The geometry of y = conv(x, weight), from whichever of the tensors are there.
inline ConvShape shape_of(const Tensor& weight, int64_t batch, const Ints& in, const Ints& out, const ConvOptions& of) {
  const int64_t dims = weight.dim() - 2;
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "weight must have 3 to 5 dimensions, has ", weight.dim());
  STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "weight must have channels");
  STD_TORCH_CHECK(of.groups > 0 && weight.size(0) % of.groups == 0, "groups must divide weight.size(0)");
  ConvShape s{};
  s.dtype = dtype_of(weight);
  s.channels_last = of.channels_last, s.tf32 = of.tf32;
  s.batch = batch, s.groups = of.groups;
  s.in_channels = weight.size(1), s.out_channels = weight.size(0) / of.groups;
  fill(s.in, in, dims, 1, "x"), fill(s.out, out, dims, 1, "y"), fill(s.kernel, spatial(weight), dims, 1, "weight");
  fill(s.stride, of.stride, dims, 1, "stride"), fill(s.dilation, of.dilation, dims, 1, "dilation");
  fill(s.padding, of.padding, dims, 0, "padding");
  for (int d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(s.stride[d] > 0 && s.dilation[d] > 0, "stride and dilation must be positive");
    STD_TORCH_CHECK(s.padding[d] >= 0 && s.in[d] >= 0 && s.out[d] >= 0, "padding and size must not be negative");
  }
  fill_weight_strides(s, weight);
  return s;
}

// What a kernel is told: one pixel an image lies alike in both formats, of which one needs no turning.
inline ConvShape as_it_lies(ConvShape s) {
  const auto is_one = [](const int64_t (&sizes)[3]) { return sizes[0] == 1 && sizes[1] == 1 && sizes[2] == 1; };
  s.channels_last = s.channels_last || (is_one(s.in) && is_one(s.out));
  return s;
}

// Source and result share everything but their channels and sizes: forwards and backwards differ in the kernel.
inline ConvResult run(void (*kernel)(const ConvGather&, const Tensor&), const ConvShape& shape, const Tensor& source,
                      const Tensor& weight, int64_t source_channels, int64_t channels,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, const Ints& size,
                      Activation activation, bool keep) {
  check_dim(source, weight.dim(), "the source");
  check_size(source, 1, source_channels, "the source");
  check_dtype(source, weight.scalar_type(), "the source");
  check_format(source, shape.channels_last, "the source");
  Tensor result = new_tensor(source, shape.batch, channels, size, shape.channels_last);
  Tensor kept = keep ? torch::stable::empty_like(result) : torch::stable::new_empty(source, {0});
  Tensor line;  // owns the bias until the kernel is done
  if (bias) {
    check_dim(*bias, 1, "bias");
    check_size(*bias, 0, channels, "bias");
    check_dtype(*bias, weight.scalar_type(), "bias");
    line = torch::stable::contiguous(*bias);
  }
  if (residual) {
    check_dim(*residual, weight.dim(), "residual");
    for (int64_t d = 0; d < weight.dim(); ++d) check_size(*residual, d, result.size(d), "residual");
    check_dtype(*residual, weight.scalar_type(), "residual");
    check_format(*residual, shape.channels_last, "residual");
  }
  if (result.numel() > 0) {
    kernel({as_it_lies(shape), source.data_ptr(), weight.data_ptr(), bias ? line.data_ptr() : nullptr,
            pointer_or_null(residual), result.data_ptr(), keep ? kept.data_ptr() : nullptr, activation},
           result);
  }
  return {result, kept};
}

template <class Device>
ConvResult conv_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& residual, Ints size, Ints stride, Ints padding, Ints dilation,
                        int64_t groups, bool channels_last, bool tf32, int64_t activation, bool keep) {
  const ConvShape shape =
      shape_of(weight, x.size(0), spatial(x), size, {stride, padding, dilation, groups, channels_last, tf32});
  return run(Device::forward, shape, x, weight, weight.size(1) * groups, weight.size(0), bias, residual, size,
             activation_of(activation), keep);
}

template <class Device>
ConvResult conv_grad_input(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& residual, Ints size, Ints stride, Ints padding, Ints dilation,
                           int64_t groups, bool channels_last, bool tf32, int64_t activation, bool keep) {
  const ConvShape shape =
      shape_of(weight, grad.size(0), size, spatial(grad), {stride, padding, dilation, groups, channels_last, tf32});
  return run(Device::grad_input, shape, grad, weight, weight.size(0), weight.size(1) * groups, bias, residual, size,
             activation_of(activation), keep);
}

template <class Device>
ConvResult conv_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& weight, Ints stride, Ints padding,
                            Ints dilation, int64_t groups, bool channels_last, bool tf32, bool bias) {
  const ConvShape shape =
      shape_of(weight, x.size(0), spatial(x), spatial(grad), {stride, padding, dilation, groups, channels_last, tf32});
  check_dim(grad, weight.dim(), "grad");
  check_size(grad, 0, x.size(0), "grad");
  check_size(grad, 1, weight.size(0), "grad");
  check_size(x, 1, weight.size(1) * groups, "x");
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>{grad, "grad"}, {x, "x"}}) {
    check_dtype(t, weight.scalar_type(), name);
    check_format(t, channels_last, name);
  }
  Tensor grad_weight = torch::stable::empty_like(weight);
  const bool in_kernel = bias && Device::kSumsBias;
  Tensor grad_bias = torch::stable::new_empty(grad, {in_kernel ? grad.size(1) : 0});
  if (bias && !in_kernel) {
    Ints over;
    for (int64_t d = 0; d < grad.dim(); ++d) {
      if (d != 1) over.push_back(d);
    }
    grad_bias = torch::stable::sum(grad, over);
  }
  if (grad.numel() == 0) return {torch::stable::fill_(grad_weight, 0.0), torch::stable::fill_(grad_bias, 0.0)};
  ConvGradWeight p{as_it_lies(shape), grad.data_ptr(), x.data_ptr(), grad_weight.data_ptr(),
                   in_kernel ? grad_bias.data_ptr() : nullptr};
  fill_weight_strides(p.shape, grad_weight);
  Device::grad_weight(p, grad_weight);
  return {grad_weight, grad_bias};
}

template <class Device>
Tensor conv_grad_epilogue(const Tensor& grad, const Tensor& saved, int64_t activation) {
  check_dim(saved, grad.dim(), "saved");
  check_dtype(saved, grad.scalar_type(), "saved");
  // Both are dense; the order of their dimensions must be the same.
  for (int64_t d = 0; d < grad.dim(); ++d) {
    check_size(saved, d, grad.size(d), "saved");
    STD_TORCH_CHECK(grad.size(d) == 1 || grad.numel() == 0 || saved.stride(d) == grad.stride(d),
                    "saved must have grad's strides");
  }
  Tensor result = torch::stable::empty_like(grad);
  const Activation of = activation_of(activation);
  if (grad.numel() > 0) {
    Device::grad_epilogue({dtype_of(grad), of, grad.data_ptr(), saved.data_ptr(), result.data_ptr(), grad.numel()},
                          result);
  }
  return result;
}

}  // namespace fastnets

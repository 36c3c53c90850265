#include "op.h"

namespace fastnets {
namespace {

using Ints = std::vector<int64_t>;
using Result = std::tuple<Tensor, Tensor>;

constexpr int kTanh = static_cast<int>(Activation::kTanh);

// The spatial values of 1, 2 or 3 dimensions as those of three.
void fill(int64_t* to, const Ints& values, int64_t dims, int64_t lead, const char* name) {
  STD_TORCH_CHECK(static_cast<int64_t>(values.size()) == dims, name, " must have ", dims, " elements");
  for (int64_t d = 0; d < 3; ++d) to[d] = d < 3 - dims ? lead : values[d - (3 - dims)];
}

Ints spatial(const Tensor& t) {
  Ints sizes;
  for (int64_t d = 2; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

// [N, C, *size], contiguous or with its channels innermost.
Tensor new_tensor(const Tensor& like, int64_t batch, int64_t channels, const Ints& size, bool channels_last) {
  Ints shape{batch};
  if (!channels_last) shape.push_back(channels);
  shape.insert(shape.end(), size.begin(), size.end());
  if (channels_last) shape.push_back(channels);
  Tensor t = torch::stable::new_empty(like, shape);
  for (int64_t d = t.dim() - 1; channels_last && d > 1; --d) t = torch::stable::transpose(t, d, d - 1);
  return t;
}

void check_format(Tensor t, bool channels_last, const char* name) {
  for (int64_t d = 1; channels_last && d + 1 < t.dim(); ++d) t = torch::stable::transpose(t, d, d + 1);
  check_contiguous(t, name);
}

// The geometry of y = conv(x, weight), from whichever of the tensors are there.
ConvShape shape_of(const Tensor& weight, int64_t batch, const Ints& in, const Ints& out, const Ints& stride,
                   const Ints& padding, const Ints& dilation, int64_t groups, bool channels_last) {
  const int64_t dims = weight.dim() - 2;
  STD_TORCH_CHECK(1 <= dims && dims <= 3, "weight must have 3 to 5 dimensions, has ", weight.dim());
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0, "groups must divide weight.size(0)");
  ConvShape s{};
  s.dtype = dtype_of(weight);
  s.channels_last = channels_last;
  s.batch = batch, s.groups = groups;
  s.in_channels = weight.size(1), s.out_channels = weight.size(0) / groups;
  fill(s.in, in, dims, 1, "x"), fill(s.out, out, dims, 1, "y"), fill(s.kernel, spatial(weight), dims, 1, "weight");
  fill(s.stride, stride, dims, 1, "stride"), fill(s.dilation, dilation, dims, 1, "dilation");
  fill(s.padding, padding, dims, 0, "padding");
  for (int d = 0; d < 3; ++d) {
    STD_TORCH_CHECK(s.stride[d] > 0 && s.dilation[d] > 0, "stride and dilation must be positive");
    STD_TORCH_CHECK(s.padding[d] >= 0 && s.in[d] >= 0 && s.out[d] >= 0, "padding and size must not be negative");
  }
  s.weight_strides[0] = weight.stride(0), s.weight_strides[1] = weight.stride(1);
  for (int64_t d = 0; d < dims; ++d) s.weight_strides[5 - dims + d] = weight.stride(2 + d);
  return s;
}

// Source and result share everything but their channels and sizes: forwards and backwards differ in the kernel.
Result run(void (*kernel)(const ConvGather&), const ConvShape& shape, const Tensor& source, const Tensor& weight,
           int64_t source_channels, int64_t channels, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& residual, const Ints& size, int64_t activation, bool keep) {
  check_dim(source, weight.dim(), "the source");
  check_size(source, 1, source_channels, "the source");
  check_dtype(source, weight.scalar_type(), "the source");
  check_format(source, shape.channels_last, "the source");
  STD_TORCH_CHECK(0 <= activation && activation <= kTanh, "activation must lie in [0, ", kTanh, "], is ", activation);
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
    kernel({shape, source.data_ptr(), weight.data_ptr(), bias ? line.data_ptr() : nullptr, pointer_or_null(residual),
            result.data_ptr(), keep ? kept.data_ptr() : nullptr, static_cast<Activation>(activation)});
  }
  return {result, kept};
}

Result conv_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& residual, Ints size, Ints stride, Ints padding, Ints dilation,
                    int64_t groups, bool channels_last, int64_t activation, bool keep) {
  const ConvShape shape =
      shape_of(weight, x.size(0), spatial(x), size, stride, padding, dilation, groups, channels_last);
  return run(kernels().conv_forward, shape, x, weight, weight.size(1) * groups, weight.size(0), bias, residual, size,
             activation, keep);
}

Result conv_grad_input(const Tensor& grad, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, Ints size, Ints stride, Ints padding, Ints dilation,
                       int64_t groups, bool channels_last, int64_t activation, bool keep) {
  const ConvShape shape =
      shape_of(weight, grad.size(0), size, spatial(grad), stride, padding, dilation, groups, channels_last);
  return run(kernels().conv_grad_input, shape, grad, weight, weight.size(0), weight.size(1) * groups, bias, residual,
             size, activation, keep);
}

Tensor conv_grad_weight(const Tensor& grad, const Tensor& x, const Tensor& weight, Ints stride, Ints padding,
                        Ints dilation, int64_t groups, bool channels_last) {
  const ConvShape shape =
      shape_of(weight, x.size(0), spatial(x), spatial(grad), stride, padding, dilation, groups, channels_last);
  check_dim(grad, weight.dim(), "grad");
  check_size(grad, 0, x.size(0), "grad");
  check_size(grad, 1, weight.size(0), "grad");
  check_size(x, 1, weight.size(1) * groups, "x");
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>{grad, "grad"}, {x, "x"}}) {
    check_dtype(t, weight.scalar_type(), name);
    check_format(t, channels_last, name);
  }
  Tensor grad_weight = torch::stable::empty_like(weight);
  ConvGradWeight p{shape, grad.data_ptr(), x.data_ptr(), grad_weight.data_ptr()};
  p.shape.weight_strides[0] = grad_weight.stride(0), p.shape.weight_strides[1] = grad_weight.stride(1);
  for (int64_t d = 2; d < weight.dim(); ++d) p.shape.weight_strides[5 - weight.dim() + d] = grad_weight.stride(d);
  if (grad_weight.numel() > 0) kernels().conv_grad_weight(p);
  return grad_weight;
}

Tensor conv_grad_epilogue(const Tensor& grad, const Tensor& saved, int64_t activation) {
  STD_TORCH_CHECK(0 <= activation && activation <= kTanh, "activation must lie in [0, ", kTanh, "], is ", activation);
  check_dim(saved, grad.dim(), "saved");
  check_dtype(saved, grad.scalar_type(), "saved");
  // Both are dense; the order of their dimensions must be the same.
  for (int64_t d = 0; d < grad.dim(); ++d) {
    check_size(saved, d, grad.size(d), "saved");
    STD_TORCH_CHECK(grad.size(d) == 1 || grad.numel() == 0 || saved.stride(d) == grad.stride(d),
                    "saved must have grad's strides");
  }
  Tensor result = torch::stable::empty_like(grad);
  if (grad.numel() > 0) {
    kernels().conv_grad_epilogue({dtype_of(grad), static_cast<Activation>(activation), grad.data_ptr(),
                                  saved.data_ptr(), result.data_ptr(), grad.numel()});
  }
  return result;
}

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&fastnets::conv_forward));
  m.impl("conv_grad_input", TORCH_BOX(&fastnets::conv_grad_input));
  m.impl("conv_grad_weight", TORCH_BOX(&fastnets::conv_grad_weight));
  m.impl("conv_grad_epilogue", TORCH_BOX(&fastnets::conv_grad_epilogue));
}

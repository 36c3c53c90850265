#include "op.h"

namespace fastnets {
namespace {

Tensor dropout(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& seed, double p) {
  check_contiguous(x, "x");
  check_dim(seed, 1, "seed");
  check_size(seed, 0, 2, "seed");
  check_contiguous(seed, "seed");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long, "seed must be int64");
  STD_TORCH_CHECK(0.0 <= p && p <= 1.0, "p must lie in [0, 1], is ", p);
  if (residual) {
    check_contiguous(*residual, "residual");
    check_dtype(*residual, x.scalar_type(), "residual");
    check_dim(*residual, x.dim(), "residual");
    for (int64_t d = 0; d < x.dim(); ++d) check_size(*residual, d, x.size(d), "residual");
  }
  Tensor y = allocate(x, x.sizes());
  if (x.numel() > 0) {
    const auto* words = static_cast<const int64_t*>(seed.data_ptr());
    kernels().dropout({dtype_of(x), x.data_ptr(), pointer_or_null(residual), y.data_ptr(), x.numel(), words, p});
  }
  return y;
}

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) { m.impl("dropout", TORCH_BOX(&fastnets::dropout)); }

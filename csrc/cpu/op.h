// What the CPU operators share: from torch's tensors to the kernels' parameters.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "kernels.h"

namespace fastnets {

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: STD_TORCH_CHECK(false, "the CPU kernels take float32, float64, bfloat16 and float16");
  }
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// As torch::stable::new_empty, which looks the operator up by its name: 0.4 us a tensor, of which a call has up to 15.
inline Tensor allocate(const Tensor& like, Sizes size, std::optional<ScalarType> dtype = {}) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype.value_or(like.scalar_type())));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), size.data(), static_cast<int64_t>(size.size()),
                                                          &type, nullptr, nullptr, 0, nullptr, &made));
  return Tensor(made);
}

inline const void* pointer_or_null(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

}  // namespace fastnets

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

inline const void* pointer_or_null(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

}  // namespace fastnets

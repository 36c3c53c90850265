// What the operators (`*_op.cpp`, compiled once, with torch's headers) may ask of the kernels (`softmax.cpp`, ...,
// compiled once an instruction set, without torch's headers so that no inline symbol is shared between them).
#pragma once

#include <cstdint>

namespace fastnets {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };
enum class MaskKind : int { kNone, kBool, kAdditive };  // an additive mask has the tensor's own dtype

constexpr int kMaxDims = 8;

struct SoftmaxForward {
  Dtype dtype;
  const void* x;     // [outer, size, inner], contiguous
  const void* mask;  // of the same shape through mask_strides, or null
  void* y;           // [outer, size, inner], contiguous
  MaskKind mask_kind;
  int64_t outer, size, inner;
  double scale;
  // Sizes and mask strides (in elements) of the dimensions that make up `outer`, then those that make up `inner`.
  int outer_dims, inner_dims;
  int64_t outer_sizes[kMaxDims], outer_strides[kMaxDims];
  int64_t inner_sizes[kMaxDims], inner_strides[kMaxDims];
  int64_t mask_stride;  // along the softmax dimension
};

struct SoftmaxBackward {
  Dtype dtype;
  const void* grad;  // [outer, size, inner]
  const void* y;     // [outer, size, inner]
  void* grad_x;      // [outer, size, inner]
  int64_t outer, size, inner;
  double scale;
};

// One row a kernel: its name and its parameters. Every instruction set implements all of them.
#define FASTNETS_CPU_KERNELS(X)      \
  X(softmax_forward, SoftmaxForward) \
  X(softmax_backward, SoftmaxBackward)

struct Kernels {
#define FASTNETS_FIELD(name, Params) void (*name)(const Params&);
  FASTNETS_CPU_KERNELS(FASTNETS_FIELD)
#undef FASTNETS_FIELD
};

#define FASTNETS_DECLARE(name, Params) void name(const Params&);
namespace generic {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
namespace avx2 {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
namespace avx512 {
FASTNETS_CPU_KERNELS(FASTNETS_DECLARE)
}
#undef FASTNETS_DECLARE

// The kernels of the best instruction set of this machine, or of the one that FASTNETS_CPU names.
const Kernels& kernels();

}  // namespace fastnets

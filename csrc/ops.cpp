// Every operator of fastnets: the table of contents. Each device file registers its own implementations; shapes and
// meaning are in fastnets/reference, the definition of every operator. Arguments arrive validated (fastnets/ops).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastnets, m) {
  // softmax over `dim` of x * scale + mask, mask boolean (True takes part) or additive, of x's shape (strides may be
  // 0).
  m.def("softmax_forward(Tensor x, Tensor? mask, int dim, float scale) -> Tensor");
  m.def("softmax_backward(Tensor grad, Tensor y, int dim, float scale) -> Tensor");
  // The instruction set that the CPU kernels run on: 0 generic, 1 avx2, 2 avx512.
  m.def("cpu_capability() -> int");
}

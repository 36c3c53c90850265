#include "../softmax_op.h"

namespace fastnets {
namespace {

void run_forward(const SoftmaxForward& p, const Tensor&) { kernels().softmax_forward(p); }
void run_backward(const SoftmaxBackward& p, const Tensor&) { kernels().softmax_backward(p); }

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("softmax_forward", TORCH_BOX(&fastnets::softmax_forward<fastnets::run_forward>));
  m.impl("softmax_backward", TORCH_BOX(&fastnets::softmax_backward<fastnets::run_backward>));
}

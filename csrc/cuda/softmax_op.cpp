#include "../softmax_op.h"

#include "op.h"

namespace fastnets {
namespace {

void run_forward(const SoftmaxForward& p, const Tensor& x) { cuda::softmax_forward(p, Queue(x).stream()); }
void run_backward(const SoftmaxBackward& p, const Tensor& y) { cuda::softmax_backward(p, Queue(y).stream()); }

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(FASTNETS_LIBRARY, FASTNETS_KEY, m) {
  m.impl("softmax_forward", TORCH_BOX(&fastnets::softmax_forward<fastnets::run_forward>));
  m.impl("softmax_backward", TORCH_BOX(&fastnets::softmax_backward<fastnets::run_backward>));
}

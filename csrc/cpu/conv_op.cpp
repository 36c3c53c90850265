#include "../conv_op.h"

namespace fastnets {
namespace {

struct Cpu {
  static constexpr bool kSumsBias = true;
  static void forward(const ConvGather& p, const Tensor&) { kernels().conv_forward(p); }
  static void grad_input(const ConvGather& p, const Tensor&) { kernels().conv_grad_input(p); }
  static void grad_weight(const ConvGradWeight& p, const Tensor&) { kernels().conv_grad_weight(p); }
  static void grad_epilogue(const ConvGradEpilogue& p, const Tensor&) { kernels().conv_grad_epilogue(p); }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("conv_forward", TORCH_BOX(&fastnets::conv_forward<fastnets::Cpu>));
  m.impl("conv_grad_input", TORCH_BOX(&fastnets::conv_grad_input<fastnets::Cpu>));
  m.impl("conv_grad_weight", TORCH_BOX(&fastnets::conv_grad_weight<fastnets::Cpu>));
  m.impl("conv_grad_epilogue", TORCH_BOX(&fastnets::conv_grad_epilogue<fastnets::Cpu>));
}

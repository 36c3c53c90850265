#include "../conv_op.h"

#include "op.h"

namespace fastnets {
namespace {

// Bytes of the device's memory, where `like` lies.
Tensor workspace(const Tensor& like, size_t bytes) {
  const Ints size{static_cast<int64_t>(bytes)};
  return torch::stable::new_empty(like, size, ScalarType::Byte);
}

struct Gpu {
  static constexpr bool kSumsBias = false;
  static void forward(const ConvGather& p, const Tensor& on) {
    const Queue queue(on);
    const Tensor memory = workspace(on, cuda::conv_forward_workspace(p));
    cuda::conv_forward(p, memory.data_ptr(), queue.stream());
  }
  static void grad_input(const ConvGather& p, const Tensor& on) {
    const Queue queue(on);
    const Tensor memory = workspace(on, cuda::conv_grad_input_workspace(p));
    cuda::conv_grad_input(p, memory.data_ptr(), queue.stream());
  }
  static void grad_weight(const ConvGradWeight& p, const Tensor& on) {
    const Queue queue(on);
    const Tensor memory = workspace(on, cuda::conv_grad_weight_workspace(p));
    cuda::conv_grad_weight(p, memory.data_ptr(), queue.stream());
  }
  static void grad_epilogue(const ConvGradEpilogue& p, const Tensor& on) {
    cuda::conv_grad_epilogue(p, Queue(on).stream());
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(FASTNETS_LIBRARY, FASTNETS_KEY, m) {
  m.impl("conv_forward", TORCH_BOX(&fastnets::conv_forward<fastnets::Gpu>));
  m.impl("conv_grad_input", TORCH_BOX(&fastnets::conv_grad_input<fastnets::Gpu>));
  m.impl("conv_grad_weight", TORCH_BOX(&fastnets::conv_grad_weight<fastnets::Gpu>));
  m.impl("conv_grad_epilogue", TORCH_BOX(&fastnets::conv_grad_epilogue<fastnets::Gpu>));
}

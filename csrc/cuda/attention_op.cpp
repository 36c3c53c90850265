#include "../attention_op.h"

#include "op.h"

namespace fastnets {
namespace {

struct Gpu {
  static void check_starts(const Tensor&, int64_t, const char*) {}  // the kernels keep within the tensors

  template <class Parameters>
  static void run(const Parameters& p, const Tensor& q) {
    const Queue queue(q);
    if constexpr (std::is_same_v<Parameters, AttentionWeights>) {
      cuda::attention_weights(p, queue.stream());
    } else {
      // Given back when the operator returns: the next one to get it is queued behind this one.
      const std::array<int64_t, 1> bytes = {static_cast<int64_t>(cuda::attention_workspace(p))};
      const Tensor workspace = torch::stable::new_empty(q, {bytes.data(), bytes.size()}, ScalarType::Byte);
      if constexpr (std::is_same_v<Parameters, AttentionForward>) {
        cuda::attention_forward(p, workspace.data_ptr(), queue.stream());
      } else {
        cuda::attention_backward(p, workspace.data_ptr(), queue.stream());
      }
    }
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(FASTNETS_LIBRARY, FASTNETS_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&fastnets::attention_forward<fastnets::Gpu>));
  m.impl("attention_weights", TORCH_BOX(&fastnets::attention_weights<fastnets::Gpu>));
  m.impl("attention_backward", TORCH_BOX(&fastnets::attention_backward<fastnets::Gpu>));
}

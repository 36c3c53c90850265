#include "../attention_op.h"

#include "runtime.h"

namespace fastnets {
namespace {

constexpr int64_t kSplitKeys = 64;  // keys in a block of the backward kernel: what a split is made of

struct Cpu {
  static void check_starts(const Tensor& starts, int64_t last, const char* name) {
    const int64_t* const at = static_cast<const int64_t*>(starts.data_ptr());
    const int64_t count = starts.numel();
    STD_TORCH_CHECK(at[0] == 0 && at[count - 1] == last && std::is_sorted(at, at + count), name,
                    " must ascend from 0 to ", last);
  }

  static void run(const AttentionForward& p, const Tensor&) { kernels().attention_forward(p); }
  static void run(const AttentionWeights& p, const Tensor&) { kernels().attention_weights(p); }

  static void run(AttentionBackward& p, const Tensor& q) {
    // Fewer heads than threads: divide each head's keys, and add up the queries' gradients afterwards.
    const int64_t units = p.batch * p.heads / p.groups, key_blocks = (p.lk + kSplitKeys - 1) / kSplitKeys;
    p.splits = 1;
    if (!p.starts_q && units > 0) {
      p.splits = std::clamp<int64_t>(thread_count() / units, 1, std::max<int64_t>(1, key_blocks / 2));
    }
    OptionalTensor partial;
    if (p.splits > 1) {
      const std::array<int64_t, 4> shape = {units * p.splits, p.groups, p.lq, (p.d + 15) / 16 * 16};
      partial = torch::stable::new_empty(q, {shape.data(), shape.size()}, lse_dtype(p));
      p.partial_grad_q = partial->data_ptr();
    }
    kernels().attention_backward(p);  // of nothing, too: a mask of size 1 has a gradient, of zeros
  }
};

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastnets::attention_forward<fastnets::Cpu>));
  m.impl("attention_weights", TORCH_BOX(&fastnets::attention_weights<fastnets::Cpu>));
  m.impl("attention_backward", TORCH_BOX(&fastnets::attention_backward<fastnets::Cpu>));
}

// The backward of a fused epilogue.

#include "activation.h"

namespace fastnets::FASTNETS_ISA {

// result = grad * activation'
void conv_grad_epilogue(const ConvGradEpilogue& p) {
  constexpr int64_t grain = 1 << 14;  // elements worth waking a thread for
  with_storage(p.dtype, [&](auto kind) {
    using S = decltype(kind);
    using T = Compute<S>;
    const S *grad = static_cast<const S*>(p.grad), *saved = static_cast<const S*>(p.saved);
    S* result = static_cast<S*>(p.result);
    parallel(p.count, grain, [&](int64_t begin, int64_t end) {
      int64_t i = begin;
      for (; i + kLanes<T> <= end; i += kLanes<T>) {
        store(result + i, load(grad + i) * derivative<T>(p.activation, load(saved + i)));
      }
      if (const int n = static_cast<int>(end - i); n > 0) {
        const Vec<T> slope = derivative<T>(p.activation, load_partial(saved + i, n));
        store_partial<S>(result + i, load_partial(grad + i, n) * slope, n);
      }
    });
  });
}

}  // namespace fastnets::FASTNETS_ISA

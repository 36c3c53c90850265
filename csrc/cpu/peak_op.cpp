#include <torch/csrc/stable/library.h>

#include "peak.h"

namespace fastnets {
namespace {

int64_t cpu_multiply_adds(int64_t rounds) {
#if defined(__x86_64__)
  switch (capability()) {
    case Capability::kGeneric: return generic::multiply_adds(rounds);
    case Capability::kAvx2: return avx2::multiply_adds(rounds);
    default: return avx512::multiply_adds(rounds);
  }
#else
  return generic::multiply_adds(rounds);
#endif
}

}  // namespace
}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CompositeExplicitAutograd, m) {
  m.impl("cpu_multiply_adds", TORCH_BOX(&fastnets::cpu_multiply_adds));
}

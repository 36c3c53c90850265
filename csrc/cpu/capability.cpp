// Which instruction set the CPU kernels run on: decided once, at the first call.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "kernels.h"
#include "peak.h"

namespace fastnets {
namespace {

constexpr int kCapabilities = 4;
constexpr const char* kNames[kCapabilities] = {"generic", "avx2", "avx512", "avx512_bf16"};

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return static_cast<int>(bf16     ? Capability::kAvx512Bf16
                          : avx512 ? Capability::kAvx512
                          : avx2   ? Capability::kAvx2
                                   : Capability::kGeneric);
#else
  return static_cast<int>(Capability::kGeneric);
#endif
}

int choose() {
  const int best = detect();
  const char* asked = std::getenv("FASTNETS_CPU");
  if (asked == nullptr || *asked == '\0') return best;
  const std::string name(asked);
  int wanted = 0;
  while (wanted < kCapabilities && name != kNames[wanted]) ++wanted;
  STD_TORCH_CHECK(wanted < kCapabilities, "FASTNETS_CPU must be generic, avx2, avx512 or avx512_bf16, is ", name);
  STD_TORCH_CHECK(wanted <= best, "FASTNETS_CPU asks for ", name, ", which this processor does not have");
  return wanted;
}

bool cpu_is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") != 0;
#else
  return false;
#endif
}

int64_t cpu_capability() { return static_cast<int64_t>(capability()); }

}  // namespace

Capability capability() {
  static const auto chosen = static_cast<Capability>(choose());
  return chosen;
}

const Kernels& kernels() {
#define FASTNETS_GENERIC(name, Params) generic::name,
  static const Kernels generic_kernels{FASTNETS_CPU_KERNELS(FASTNETS_GENERIC)};
#if defined(__x86_64__)
#define FASTNETS_AVX2(name, Params) avx2::name,
#define FASTNETS_AVX512(name, Params) avx512::name,
  static const Kernels avx2_kernels{FASTNETS_CPU_KERNELS(FASTNETS_AVX2)};
  static const Kernels avx512_kernels{FASTNETS_CPU_KERNELS(FASTNETS_AVX512)};
  static const Kernels bf16_kernels = [] {
    Kernels table = avx512_kernels;
    table.recurrent_forward = avx512_bf16::recurrent_forward;
    table.recurrent_backward = avx512_bf16::recurrent_backward;
    table.attention_forward = avx512_bf16::attention_forward;
    table.attention_weights = avx512_bf16::attention_weights;
    table.attention_backward = avx512_bf16::attention_backward;
    return table;
  }();
  switch (capability()) {
    case Capability::kAvx512Bf16: return bf16_kernels;
    case Capability::kAvx512: return avx512_kernels;
    case Capability::kAvx2: return avx2_kernels;
    case Capability::kGeneric: break;
  }
#endif
  return generic_kernels;
}

}  // namespace fastnets

STABLE_TORCH_LIBRARY_IMPL(fastnets, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&fastnets::cpu_capability));
  m.impl("cpu_is_amd", TORCH_BOX(&fastnets::cpu_is_amd));
}

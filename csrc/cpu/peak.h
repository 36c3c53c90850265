// The processor: its instruction set, and what it can do at most, which a benchmark holds its figures against.
#pragma once

#include <cstdint>

namespace fastnets {

enum class Capability : int { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// The best of this machine, or the one that FASTNETS_CPU names.
Capability capability();

#define FASTNETS_DECLARE_PEAK(isa) \
  namespace isa {                  \
  int64_t multiply_adds(int64_t);  \
  }
FASTNETS_DECLARE_PEAK(generic)
FASTNETS_DECLARE_PEAK(avx2)
FASTNETS_DECLARE_PEAK(avx512)
#undef FASTNETS_DECLARE_PEAK

}  // namespace fastnets

// Multiply-adds of float32 that need nothing but registers.
#include "peak.h"

#include "simd.h"

namespace fastnets::FASTNETS_ISA {

// `rounds` of them on every thread; returns how many there were altogether.
int64_t multiply_adds(int64_t rounds) {
  constexpr int sums = 12;  // enough that none waits for the one before it
  parallel(thread_count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      Vec<float> sum[sums] = {};
      for (Vec<float>& s : sum) in_register<float>(s);  // the compiler does not know that they are the same
      for (int64_t i = 0; i < rounds; ++i) {
        Vec<float> factor = broadcast(0.5f);
        in_register<float>(factor);  // nor what is added
#pragma GCC unroll 12
        for (int s = 0; s < sums; ++s) sum[s] = fma<float>(sum[s], factor, factor);
      }
      for (Vec<float>& s : sum) in_register<float>(s);
    }
  });
  return thread_count() * rounds * sums * kLanes<float>;
}

}  // namespace fastnets::FASTNETS_ISA

// Dropout's random numbers: Philox 4x32-10 (Salmon et al., SC 2011) as fastnets/reference/attention.py and dropout.py
// count it, a vector of blocks at a time.
#pragma once

#include "simd.h"

namespace fastnets::FASTNETS_ISA {

// Words of 32 bits in lanes of 64, which their products fill; what is in the upper halves does not matter.
typedef uint64_t RandomWords __attribute__((vector_size(kVectorBytes)));
constexpr int kRandomLanes = kVectorBytes / 8;

FASTNETS_INLINE RandomWords random_lanes() {
  RandomWords at;
  for (int l = 0; l < kRandomLanes; ++l) at[l] = static_cast<uint64_t>(l);
  return at;
}

// The 64-bit products of the lower halves.
FASTNETS_INLINE RandomWords multiply_halves(RandomWords x, uint32_t y) {
#if defined(__AVX512F__)
  return RandomWords(_mm512_mul_epu32(__m512i(x), _mm512_set1_epi64(y)));
#elif defined(__AVX2__)
  return RandomWords(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(y)));
#else
  return (x & 0xFFFFFFFFu) * y;
#endif
}

// Half of the key in a round.
FASTNETS_INLINE uint32_t round_key(const int64_t* seed, int round, int half) {
  return static_cast<uint32_t>(seed[half]) + static_cast<uint32_t>(round) * (half ? 0xBB67AE85u : 0x9E3779B9u);
}

// The ten rounds, for sets of four words that begin as counters; key(round, half) as round_key.
template <int kSets, class Key>
FASTNETS_INLINE void philox(RandomWords (&sets)[kSets][4], const Key& key) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int s = 0; s < kSets; ++s) {
      RandomWords* words = sets[s];
      const RandomWords from_a = multiply_halves(words[0], 0xD2511F53u),
                        from_c = multiply_halves(words[2], 0xCD9E8D57u);
      words[0] = (from_c >> 32) ^ words[1] ^ key(round, 0);
      words[2] = (from_a >> 32) ^ words[3] ^ key(round, 1);
      words[1] = from_c;
      words[3] = from_a;
    }
  }
}

// The blocks of four words that the lanes' counters give.
struct RandomBlocks {
  RandomWords words[4];

  FASTNETS_INLINE RandomBlocks(const int64_t* seed, RandomWords a, RandomWords b, uint32_t c, uint32_t d) {
    RandomWords sets[1][4] = {{a, b, RandomWords{} + c, RandomWords{} + d}};
    philox(sets, [&](int round, int half) { return round_key(seed, round, half); });
    for (int w = 0; w < 4; ++w) words[w] = sets[0][w];
  }
};

// What dropout multiplies weights with.
template <class T>
struct Dropout {
  uint32_t threshold;  // of words' upper 24 bits
  T factor;

  explicit Dropout(double probability)
      : threshold(static_cast<uint32_t>(__builtin_rint(probability * 0x1p24))),
        factor(probability == 1.0 ? T(0) : T(1.0 / (1.0 - probability))) {}

  // Of kRandomLanes weights.
  FASTNETS_INLINE void factors(RandomWords words, T* to) const {
    typedef uint32_t Halves __attribute__((vector_size(kVectorBytes / 2)));
    uint32_t drawn[kRandomLanes];
    const Halves halves = __builtin_convertvector(words, Halves);
    std::memcpy(drawn, &halves, sizeof halves);
    for (int l = 0; l < kRandomLanes; ++l) to[l] = drawn[l] >> 8 >= threshold ? factor : T(0);
  }
};

}  // namespace fastnets::FASTNETS_ISA

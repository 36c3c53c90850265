// Dropout of a tensor's elements, as fastnets/reference/dropout.py defines it, and the sum with a residual.

#include "attention_dropout.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kBlocks = 16, kGroup = 4 * kBlocks;  // blocks of random numbers whose elements lie together, and these
constexpr int64_t kGrain = 1 << 6;                 // groups that a thread should get at least

// The words that decide the elements of group `group`: word w of its block b stands at kBlocks w + b.
FASTNETS_INLINE void draw(const int64_t* seed, int64_t group, uint32_t* to) {
  const RandomWords even = 2 * random_lanes() + static_cast<uint64_t>(kBlocks * group);
  for (int b = 0; b < kBlocks; b += 2 * kRandomLanes) {
    const RandomWords lower = even + static_cast<uint64_t>(b), upper = lower + 1;
    const RandomBlocks first(seed, lower, lower >> 32, 0, 0), second(seed, upper, upper >> 32, 0, 0);
    for (int w = 0; w < 4; ++w) {
      const RandomWords both = (first.words[w] & 0xFFFFFFFFu) | second.words[w] << 32;
      std::memcpy(to + kBlocks * w + b, &both, sizeof both);
    }
  }
}

// What kLanes<T> elements are multiplied with.
template <class T>
FASTNETS_INLINE Vec<T> factors(const Dropout<T>& dropout, const uint32_t* words) {
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes<T>)));
  typedef Int<T> Upper __attribute__((vector_size(kVectorBytes)));
  Words drawn;
  std::memcpy(&drawn, words, sizeof drawn);
  const Upper upper = __builtin_convertvector(drawn >> 8, Upper);
  return select<T>(upper >= static_cast<Int<T>>(dropout.threshold), broadcast<T>(dropout.factor), Vec<T>{});
}

}  // namespace

void dropout(const ElementDropout& p) {
  with_storage(p.dtype, [&](auto kind) {
    using S = decltype(kind);
    using T = Compute<S>;
    constexpr int lanes = kLanes<T>;
    const S *x = static_cast<const S*>(p.x), *residual = static_cast<const S*>(p.residual);
    S* y = static_cast<S*>(p.y);
    const Dropout<T> dropout(p.probability);
    const int64_t bytes = p.count * static_cast<int64_t>(sizeof(S));
    const bool aligned = reinterpret_cast<intptr_t>(y) % kVectorBytes == 0;
    const bool streams = std::is_same_v<S, T> && aligned && passes_caches(bytes, residual ? 3 * bytes : 2 * bytes);
    parallel((p.count + kGroup - 1) / kGroup, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        alignas(kVectorBytes) uint32_t words[kGroup];
        draw(p.seed, group, words);
        const int64_t first = group * kGroup, last = first + kGroup < p.count ? first + kGroup : p.count;
        int64_t i = first;
        for (; i + lanes <= last; i += lanes) {
          Vec<T> value = load(x + i) * factors<T>(dropout, words + (i - first));
          in_register<T>(value);  // rounded before the sum on every instruction set
          if (residual) value += load(residual + i);
          if constexpr (std::is_same_v<S, T>) {
            if (streams) {
              stream(y + i, value);
              continue;
            }
          }
          store(y + i, value);
        }
        if (const int rest = static_cast<int>(last - i); rest > 0) {
          Vec<T> value = load_partial(x + i, rest) * factors<T>(dropout, words + (i - first));
          in_register<T>(value);
          if (residual) value += load_partial(residual + i, rest);
          store_partial<S>(y + i, value, rest);
        }
      }
      if (streams) streamed();
    });
  });
}

}  // namespace fastnets::FASTNETS_ISA

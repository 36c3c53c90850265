// Dropout of a tensor's elements, as fastnets/reference/dropout.py defines it, and the sum with a residual.

#include "attention_dropout.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kBlocks = 16, kGroup = 4 * kBlocks;  // blocks of random numbers whose elements lie together, and these
constexpr int kChunk = 2 * kGroup;                 // elements whose numbers are drawn at once
constexpr int64_t kGrain = 1 << 7;  // chunks that a thread should get at least: below, waking it costs more

// Sets of words that go through their rounds together, as many as registers hold: one waits for its products. With
// AVX-512 drawing takes 15 ns a group for two of them, 11 for four.
constexpr int kSets = kVectorBytes == 64 ? 4 : 2;

// The key in every round, in vectors: a call's own, not made again for every chunk.
struct RoundKeys {
  RandomWords words[10][2];

  explicit RoundKeys(const int64_t* seed) {
    for (int round = 0; round < 10; ++round) {
      for (int half = 0; half < 2; ++half) words[round][half] = RandomWords{} + round_key(seed, round, half);
    }
  }
};

// The words that decide the elements of a chunk. Word w of block b of a group stands at kBlocks w + b.
FASTNETS_INLINE void draw(const RoundKeys& keys, int64_t chunk, uint32_t* to) {
  constexpr int both = 2 * kRandomLanes;  // the blocks of two sets: even and odd ones, which share a vector at the end
  const RandomWords even = 2 * random_lanes() + static_cast<uint64_t>(kChunk / 4 * chunk);
  for (int at = 0; at < kChunk / 4; at += kSets / 2 * both) {
    RandomWords sets[kSets][4];
    for (int s = 0; s < kSets; ++s) {
      const RandomWords blocks = even + static_cast<uint64_t>(at + s / 2 * both + s % 2);
      sets[s][0] = blocks;
      sets[s][1] = blocks >> 32;
      sets[s][2] = sets[s][3] = RandomWords{};
    }
    philox(sets, [&](int round, int half) { return keys.words[round][half]; });
    for (int s = 0; s < kSets; s += 2) {
      const int block = at + s / 2 * both;
      for (int w = 0; w < 4; ++w) {
        const RandomWords words = (sets[s][w] & 0xFFFFFFFFu) | sets[s + 1][w] << 32;
        std::memcpy(to + block / kBlocks * kGroup + kBlocks * w + block % kBlocks, &words, sizeof words);
      }
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
    parallel((p.count + kChunk - 1) / kChunk, kGrain, [&](int64_t begin, int64_t end) {
      const RoundKeys keys(p.seed);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        alignas(kVectorBytes) uint32_t words[kChunk];
        draw(keys, chunk, words);
        const int64_t first = chunk * kChunk, last = first + kChunk < p.count ? first + kChunk : p.count;
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

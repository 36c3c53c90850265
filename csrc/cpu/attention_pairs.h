// Attention's operands as pairs of bfloat16, which vdpbf16ps multiplies: along their rows, or of two rows each.
#pragma once

#include "attention.h"

namespace fastnets::FASTNETS_ISA {

constexpr int64_t words(int64_t n) { return (n + 1) / 2; }

// to[r][c] = the pair from[r][2 c], from[r][2 c + 1]; zeros up to the next full vector.
inline void load_words(const void* data, int64_t at, int64_t row, int64_t rows, int64_t cols, float* to) {
  const BFloat16* from = static_cast<const BFloat16*>(data) + at;
  const int64_t width = padded<float>(words(cols));
  for (int64_t r = 0; r < rows; ++r, from += row, to += width) {
    const size_t size = static_cast<size_t>(cols) * sizeof(BFloat16);
    std::memcpy(to, from, size);
    std::memset(reinterpret_cast<char*>(to) + size, 0, static_cast<size_t>(width) * sizeof(float) - size);
  }
}

// The words of x's rows from `at` on, where they are if they lie at even places; else `to` receives them.
inline Rows<float> words_of(const AttentionArray& x, int64_t at, int64_t rows, int64_t cols, float* to) {
  if (at % 2 == 0 && x.row % 2 == 0 && cols % 2 == 0) return {static_cast<const float*>(x.data) + at / 2, x.row / 2};
  load_words(x.data, at, x.row, rows, cols, to);
  return {to, padded<float>(words(cols))};
}

// to[c][r] = the pair from[r][2 c], from[r][2 c + 1], with kKeys columns a row of `to`; `staged` has room for the rows.
inline void load_words_across(const AttentionArray& x, int64_t at, int64_t rows, int64_t cols, float* staged,
                              float* to) {
  const Rows<float> from = words_of(x, at, rows, cols, staged);
  load_transposed<float>(Dtype::kFloat32, from.data, 0, from.row, rows, words(cols), to);
}

// to[r][c] = the pair from[2 r][c], from[2 r + 1][c]; columns up to the next full vector, and a row past the last, are
// zero.
inline void load_row_pairs(const void* data, int64_t at, int64_t row, int64_t rows, int64_t cols, float* to) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  const auto widened = [&](const BFloat16* p, int64_t c) {
    Half half{};
    if (c + kLanes<float> <= cols) {
      std::memcpy(&half, p + c, sizeof half);
    } else {
      std::memcpy(&half, p + c, static_cast<size_t>(cols - c) * sizeof *p);
    }
    return __builtin_convertvector(half, Word);
  };
  const BFloat16* from = static_cast<const BFloat16*>(data) + at;
  for (int64_t r = 0; r < rows; r += 2, from += 2 * row, to += padded<float>(cols)) {
    for (int64_t c = 0; c < cols; c += kLanes<float>) {
      const Word pairs = widened(from, c) | (r + 1 < rows ? widened(from + row, c) << 16 : Word{});
      std::memcpy(to + c, &pairs, sizeof pairs);
    }
  }
}

#if defined(__AVX512BF16__)
// Two vectors rounded: a pair is two neighbours.
FASTNETS_INLINE Vec<float> round_pairs(Vec<float> low, Vec<float> high) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(__m512(high), __m512(low));
  Vec<float> pairs;
  std::memcpy(&pairs, &rounded, sizeof pairs);
  return pairs;
}

// to[c] = the pair from[2 c], from[2 c + 1], rounded; n is read in whole vectors.
inline void round_words(const float* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += 2 * kLanes<float>) {
    const Vec<float> high = c + kLanes<float> < n ? load(from + c + kLanes<float>) : Vec<float>{};
    store(to + c / 2, round_pairs(load(from + c), high));
  }
}

// to[r][c] = the pair from[2 r][c], from[2 r + 1][c], rounded; rows of kKeys, of which n columns are read in whole
// vectors.
inline void round_row_pairs(const float* from, int64_t rows, int64_t n, float* to) {
  alignas(64) static constexpr uint16_t zipped[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(zipped);
  for (int64_t r = 0; r < rows; r += 2, from += 2 * kKeys, to += kKeys) {
    for (int64_t c = 0; c < n; c += kLanes<float>) {
      const Vec<float> second = r + 1 < rows ? load(from + kKeys + c) : Vec<float>{};
      const __m512i both = __m512i(round_pairs(load(from + c), second));
      store(to + c, Vec<float>(_mm512_permutexvar_epi16(order, both)));
    }
  }
}
#endif

}  // namespace fastnets::FASTNETS_ISA

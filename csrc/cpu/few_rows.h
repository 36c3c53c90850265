// Products of a few rows with a matrix that is used only once: bound by reading it, so it is read where it lies.
#pragma once

#include "gemm.h"

namespace fastnets::FASTNETS_ISA {

constexpr int64_t kFewRows = 4;

// c[kRows, kLines] (+)= a[kRows, k] times the transpose of w[kLines, k].
template <class T, int kRows, int kLines, class A, class W>
FASTNETS_INLINE void dots(int64_t k, const A* a, int64_t a_row, const W* w, int64_t w_row, T* c, int64_t c_row,
                          bool accumulate) {
  Vec<T> sums[kRows][kLines] = {};
  for (int64_t p = 0; p < k; p += kLanes<T>) {
    const int left = static_cast<int>(at_most(kLanes<T>, k - p));
    Vec<T> lines[kLines];
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) {
      lines[i] = left == kLanes<T> ? load(w + i * w_row + p) : load_partial(w + i * w_row + p, left);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> row = left == kLanes<T> ? load(a + r * a_row + p) : load_partial(a + r * a_row + p, left);
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) sums[r][i] = fma<T>(row, lines[i], sums[r][i]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kLines; ++i) {
      const T sum = reduce_add<T>(sums[r][i]);
      c[r * c_row + i] = accumulate ? c[r * c_row + i] + sum : sum;
    }
  }
}

// c[m, n] (+)= a[m, k] times the transpose of w[n, k], m <= kFewRows, on torch's threads.
template <class T, class A, class W>
void multiply_transposed(int64_t m, int64_t n, int64_t k, const A* a, int64_t a_row, const W* w, T* c, int64_t c_row,
                         bool accumulate) {
  constexpr int64_t least_work = int64_t{1} << 18;  // multiply-adds worth waking a thread for
  if (m == 0) return;
  const auto lines = [&](auto rows, int64_t begin, int64_t end) {
    int64_t j = begin;
    for (; j + 4 <= end; j += 4) {
      dots<T, rows.value, 4>(k, a, a_row, w + j * k, k, c + j, c_row, accumulate);
    }
    for (; j < end; ++j) dots<T, rows.value, 1>(k, a, a_row, w + j * k, k, c + j, c_row, accumulate);
  };
  parallel(n, least_work / (m * k + 1) + 1, [&](int64_t begin, int64_t end) {
    with_count<kFewRows>(static_cast<int>(m), [&](auto rows) { lines(rows, begin, end); });
  });
}

// c[m, n] (+)= a[m, k] times w[k, n], m <= kFewRows, on torch's threads: rows of w in fours, c in the nearest cache.
template <class T, class W>
void multiply_plain(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const W* w, T* c, int64_t c_row,
                    bool accumulate) {
  constexpr int64_t least_work = int64_t{1} << 18;  // multiply-adds worth waking a thread for
  parallel((n + kLanes<T> - 1) / kLanes<T>, least_work / (m * k * kLanes<T> + 1) + 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kLanes<T>, past = at_most(end * kLanes<T>, n);
    for (int64_t r = 0; r < m && !accumulate; ++r) std::memset(c + r * c_row + first, 0, (past - first) * sizeof(T));
    for (int64_t p = 0; p < k; p += 4) {
      const int depth = static_cast<int>(at_most(4, k - p));
      for (int64_t j = first; j < past; j += kLanes<T>) {
        const int left = static_cast<int>(at_most(kLanes<T>, past - j));
        Vec<T> rows[4] = {};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          if (i < depth)
            rows[i] = left == kLanes<T> ? load(w + (p + i) * n + j) : load_partial(w + (p + i) * n + j, left);
        }
        for (int64_t r = 0; r < m; ++r) {
          T* to = c + r * c_row + j;
          Vec<T> sum = left == kLanes<T> ? load(to) : load_partial(to, left);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum = fma<T>(broadcast<T>(i < depth ? a[r * a_row + p + i] : T(0)), rows[i], sum);
          if (left == kLanes<T>) {
            store(to, sum);
          } else {
            store_partial<T>(to, sum, left);
          }
        }
      }
    }
  });
}

}  // namespace fastnets::FASTNETS_ISA

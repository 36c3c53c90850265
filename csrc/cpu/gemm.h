// Blocked matrix products on packed panels and register tiles; every family's arithmetic runs through `tile`.
//
//   A [m, k] is packed into panels of kTileRows rows:    panel[p][row], p < k, rows past m zero
//   B [k, n] is packed into panels of kTileCols columns: panel[p][column], columns past n zero
//   C [m, n] is row-major, in the type that arithmetic runs in
//
// Packing converts from the stored type, so the inner loop sees float and double only.
#pragma once

#include "simd.h"

namespace fastnets::FASTNETS_ISA {

// A register tile: kTileRows rows of two vectors. 24 of 32 registers accumulate with AVX-512, 12 of 16 with AVX2, 8 of
// 16 with SSE: enough independent sums to hide the latency of the fused multiply-add, few enough to spill none.
constexpr int kTileRows = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileCols = kTileVectors * kLanes<T>;

// Depth of a block: long enough that reading and writing C is a few percent (384: 5% slower); a panel of B (64 KB with
// AVX-512) then comes from the second-level cache, which the tile's 24 products a step leave time for.
constexpr int64_t kBlockDepth = 512;
// Rows and columns of a block: A's (156 x 512 floats = 320 KB) stays in the second-level cache.
constexpr int64_t kBlockRows = kTileRows * 13;
constexpr int64_t kBlockCols = 1024;

// A matrix in memory: element (i, j) is data[i * row + j * col].
template <class S>
struct View {
  static constexpr bool kPairs = false;
  const S* data;
  int64_t row, col;

  View at(int64_t i, int64_t j) const { return {data + i * row + j * col, row, col}; }
};

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements that the packed form of an [m, k] left or [k, n] right operand takes.
constexpr int64_t packed_rows_size(int64_t m, int64_t k) { return round_up(m, kTileRows) * k; }
template <class T>
constexpr int64_t packed_cols_size(int64_t k, int64_t n) {
  return round_up(n, kTileCols<T>) * k;
}

template <class T>
struct QuadOf {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
using Quad = typename QuadOf<T>::type;  // four values, whatever the instruction set

template <class T, class S>
FASTNETS_INLINE Quad<T> load_quad(const S* p) {
  if constexpr (std::is_same_v<S, T>) {
    Quad<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    return Quad<T>{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
}

// to[p * stride + line] = from[line * stride of from + p] for four lines and p < k.
template <class T, class S>
void pack_quad(const S* from, int64_t from_line, int64_t k, T* to, int64_t to_stride) {
  int64_t p = 0;
  for (; p + 4 <= k; p += 4, to += 4 * to_stride) {
    const Quad<T> a = load_quad<T>(from + p), b = load_quad<T>(from + from_line + p);
    const Quad<T> c = load_quad<T>(from + 2 * from_line + p), d = load_quad<T>(from + 3 * from_line + p);
    const Quad<T> ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                  ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad<T> cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5),
                  cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Quad<T> columns[4] = {
        __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
        __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &columns[i], sizeof columns[i]);
  }
  for (; p < k; ++p, to += to_stride) {
    for (int line = 0; line < 4; ++line) to[line] = to_float(from[line * from_line + p]);
  }
}

// What pack_quad reads next, of lines that lie apart: short stretches of many are nothing that a processor foresees.
template <class S>
FASTNETS_INLINE void fetch_quad(const S* from, int64_t from_line, int64_t k) {
  for (int line = 0; line < 4; ++line, from += from_line) {
    for (int64_t p = 0; p < k; p += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + p);
  }
}

constexpr int64_t kPackStretch = 128;

// One panel: to[p * kWidth + line] = from[line * from_line + p * from_step], zero from `lines` to kWidth.
template <class T, int kWidth, class S>
void pack_panel(const S* from, int64_t from_line, int64_t from_step, int lines, int64_t k, T* to) {
  if (from_line == 1 && lines == kWidth) {
    for (int64_t p = 0; p < k; ++p, from += from_step, to += kWidth) {
      if constexpr (kWidth % kLanes<T> == 0) {
        for (int line = 0; line < kWidth; line += kLanes<T>) store(to + line, load(from + line));
      } else {
        for (int line = 0; line < kWidth; ++line) to[line] = to_float(from[line]);
      }
    }
    return;
  }
  // Stretches of a line, so that what four lines wrote is still near when the next four come.
  const int quads = from_step == 1 ? lines / 4 * 4 : 0;
  for (int64_t p = 0; quads > 0 && p < k; p += kPackStretch) {
    const int64_t stretch = at_most(kPackStretch, k - p);
    for (int line = 0; line < quads; line += 4) {
      fetch_quad(line + 4 < quads ? from + (line + 4) * from_line + p : from + p + stretch, from_line, stretch);
      pack_quad(from + line * from_line + p, from_line, stretch, to + p * kWidth + line, kWidth);
    }
  }
  for (int line = quads; line < kWidth; ++line) {
    if (line < lines) {
      for (int64_t p = 0; p < k; ++p) to[p * kWidth + line] = to_float(from[line * from_line + p * from_step]);
    } else {
      for (int64_t p = 0; p < k; ++p) to[p * kWidth + line] = T(0);
    }
  }
}

// Packs the left operand a[m, k].
template <class T, class S>
void pack_rows(View<S> a, int64_t m, int64_t k, T* packed) {
  if constexpr (std::is_same_v<S, T>) {
    if (a.row == 1) {  // line by line, as it lies: panel by panel would read each line many times
      const int64_t whole = m / kTileRows * kTileRows;
      for (int64_t p = 0; p < k; ++p) {
        const T* line = a.data + p * a.col;
        T* to = packed + p * kTileRows;
        for (int64_t i = 0; i < whole; i += kTileRows, to += kTileRows * k) {
          std::memcpy(to, line + i, kTileRows * sizeof(T));
        }
      }
      a = a.at(whole, 0), packed += whole * k, m -= whole;
    }
  }
  for (int64_t i = 0; i < m; i += kTileRows, packed += kTileRows * k) {
    const int lines = static_cast<int>(at_most(kTileRows, m - i));
    pack_panel<T, kTileRows>(a.data + i * a.row, a.row, a.col, lines, k, packed);
  }
}

// Packs the right operand b[k, n].
template <class T, class S>
void pack_cols(View<S> b, int64_t k, int64_t n, T* packed) {
  for (int64_t j = 0; j < n; j += kTileCols<T>, packed += kTileCols<T> * k) {
    const int lines = static_cast<int>(at_most(kTileCols<T>, n - j));
    pack_panel<T, kTileCols<T>>(b.data + j * b.col, b.col, b.row, lines, k, packed);
  }
}

// Operands of bfloat16 for products in pairs: `depth` elements, which at() and packing count in pairs, the last one's
// second half zero where depth is odd. Of the left one element (i, k) is data[i * row + k * col], of the right one
// (k, j) is data[k * row + j].
struct PairedLeft {
  static constexpr bool kPairs = true;
  const BFloat16* data;
  int64_t row, col, depth;

  PairedLeft at(int64_t i, int64_t p) const { return {data + i * row + 2 * p * col, row, col, depth - 2 * p}; }
};
struct PairedRight {
  static constexpr bool kPairs = true;
  const BFloat16* data;
  int64_t row, depth;

  PairedRight at(int64_t p, int64_t j) const { return {data + 2 * p * row + j, row, depth - 2 * p}; }
};

// to[p * kWidth + line] = the pair from[2 p * step + line], from[(2 p + 1) * step + line]; p < k, zero past `lines`.
template <int kWidth>
void pack_pairs(const BFloat16* from, int64_t step, int lines, int64_t depth, int64_t k, float* to) {
  for (int64_t p = 0; p < k; ++p, from += 2 * step, to += kWidth) {
    uint32_t pairs[kWidth] = {};
    const bool whole = 2 * p + 1 < depth;
    if (whole && lines == kWidth) {
      for (int line = 0; line < kWidth; ++line) pairs[line] = from[line].bits | uint32_t{from[step + line].bits} << 16;
    } else {
      for (int line = 0; line < lines; ++line) {
        pairs[line] = from[line].bits | (whole ? uint32_t{from[step + line].bits} << 16 : 0);
      }
    }
    std::memcpy(to, pairs, sizeof pairs);
  }
}
template <class T>
void pack_rows(PairedLeft a, int64_t m, int64_t k, T* packed) {
  for (int64_t i = 0; i < m; i += kTileRows, packed += kTileRows * k) {
    const int lines = static_cast<int>(at_most(kTileRows, m - i));
    if (a.col == 1) {  // pairs as they lie; depth and row are even
      pack_panel<T, kTileRows>(reinterpret_cast<const T*>(a.data + i * a.row), a.row / 2, 1, lines, k, packed);
    } else {
      pack_pairs<kTileRows>(a.data + i * a.row, a.col, lines, a.depth, k, packed);
    }
  }
}
template <class T>
void pack_cols(PairedRight b, int64_t k, int64_t n, T* packed) {
  for (int64_t j = 0; j < n; j += kTileCols<T>, packed += kTileCols<T> * k) {
    const int lines = static_cast<int>(at_most(kTileCols<T>, n - j));
    pack_pairs<kTileCols<T>>(b.data + j, b.row, lines, b.depth, k, packed);
  }
}

template <class T, int kRows, bool kPairs>
void tile_of(int64_t k, const T* __restrict a, const T* __restrict b, T* __restrict c, int64_t c_row, int cols,
             bool accumulate) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sums[kRows][kTileVectors] = {};
  for (int64_t p = 0; p < k; ++p, a += kTileRows, b += kTileCols<T>) {
    Vec<T> right[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      right[v] = load(b + v * lanes);
      if constexpr (kRows <= 6) in_register<T>(right[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T left = a[r];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = multiply_add<T, kPairs>(left, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r, c += c_row) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const int left = cols - v * lanes;
      if (left >= lanes) {
        store(c + v * lanes, accumulate ? load(c + v * lanes) + sums[r][v] : sums[r][v]);
      } else if (left > 0) {
        const Vec<T> before = accumulate ? load_partial(c + v * lanes, left) : Vec<T>{};
        store_partial<T>(c + v * lanes, before + sums[r][v], left);
      }
    }
  }
}

// c[rows, cols] (+)= the product of one packed panel of A and one of B over depth k; rows <= kTileRows,
// cols <= kTileCols. kPairs: of pairs, which k counts.
template <class T, bool kPairs = false>
FASTNETS_INLINE void tile(int rows, int cols, int64_t k, const T* a, const T* b, T* c, int64_t c_row, bool accumulate) {
  with_count<kTileRows>(rows, [&](auto n) { tile_of<T, n.value, kPairs>(k, a, b, c, c_row, cols, accumulate); });
}

// c[m, n] (+)= packed A times packed B, both packed over the same depth k.
template <class T, bool kPairs = false>
void multiply_packed(int64_t m, int64_t n, int64_t k, const T* a, const T* b, T* c, int64_t c_row, bool accumulate) {
  for (int64_t j = 0; j < n; j += kTileCols<T>) {
    for (int64_t i = 0; i < m; i += kTileRows) {
      tile<T, kPairs>(static_cast<int>(at_most(kTileRows, m - i)), static_cast<int>(at_most(kTileCols<T>, n - j)), k,
                      a + i * k, b + j * k, c + i * c_row + j, c_row, accumulate);
    }
  }
}

struct NothingMore {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};

// c[m, n] (+)= a[m, k] b[k, n] on this thread; Views, or paired operands. done(row, rows, column, columns) is called
// for every block of c whose sums are complete. Uses the scratch slots kScratchSlots - 1 and - 2.
template <class T, class A, class B, class Done = NothingMore>
void gemm_serial(int64_t m, int64_t n, int64_t k, A a, B b, T* c, int64_t c_row, bool accumulate,
                 const Done& done = {}) {
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) std::memset(c + i * c_row, 0, n * sizeof(T));
  }
  if (k == 0) return done(0, m, 0, n);
  const int64_t depth = at_most(k, kBlockDepth);
  T* packed_a =
      static_cast<T*>(scratch(kScratchSlots - 1, packed_rows_size(at_most(m, kBlockRows), depth) * sizeof(T)));
  T* packed_b =
      static_cast<T*>(scratch(kScratchSlots - 2, packed_cols_size<T>(depth, at_most(n, kBlockCols)) * sizeof(T)));
  for (int64_t j = 0; j < n; j += kBlockCols) {
    const int64_t cols = at_most(kBlockCols, n - j);
    for (int64_t p = 0; p < k; p += kBlockDepth) {
      const int64_t deep = at_most(kBlockDepth, k - p);
      pack_cols<T>(b.at(p, j), deep, cols, packed_b);
      for (int64_t i = 0; i < m; i += kBlockRows) {
        const int64_t rows = at_most(kBlockRows, m - i);
        pack_rows<T>(a.at(i, p), rows, deep, packed_a);
        multiply_packed<T, A::kPairs>(rows, cols, deep, packed_a, packed_b, c + i * c_row + j, c_row,
                                      accumulate || p > 0);
        if (p + deep == k) done(i, rows, j, cols);
      }
    }
  }
}

// c[m, n] (+)= a[m, k] b[k, n] on torch's threads, split along the longer side of c. Deterministic: k is never split.
template <class T, class A, class B, class Done = NothingMore>
void gemm(int64_t m, int64_t n, int64_t k, A a, B b, T* c, int64_t c_row, bool accumulate, const Done& done = {}) {
  if (m == 0 || n == 0) return;
  constexpr int64_t least_work = int64_t{1} << 18;  // multiply-adds worth waking a thread for
  const bool by_rows = m >= n;
  const int64_t unit = by_rows ? kTileRows : kTileCols<T>;
  const int64_t units = ((by_rows ? m : n) + unit - 1) / unit;
  const int64_t work = unit * (by_rows ? n : m) * (k + 1);  // of one unit
  const int64_t share = (units + thread_count() - 1) / thread_count(), least = least_work / work + 1;
  parallel(units, share > least ? share : least, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * unit, past = at_most(end * unit, by_rows ? m : n);
    if (by_rows) {
      gemm_serial<T>(past - first, n, k, a.at(first, 0), b, c + first * c_row, c_row, accumulate,
                     [&](int64_t i, int64_t rows, int64_t j, int64_t cols) { done(first + i, rows, j, cols); });
    } else {
      gemm_serial<T>(m, past - first, k, a, b.at(0, first), c + first, c_row, accumulate,
                     [&](int64_t i, int64_t rows, int64_t j, int64_t cols) { done(i, rows, first + j, cols); });
    }
  });
}

}  // namespace fastnets::FASTNETS_ISA

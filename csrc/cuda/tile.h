// Tiles of shared memory and products of them on the tensor cores: what attention and convolution are made of.
//
// A tile's rows are cut into chunks of 16 bytes, and row r keeps its chunk c at place c ^ swizzle(r): so that the eight
// rows of a matrix of ldmatrix, the 4-byte loads of a transposed 32-bit operand and the chunks that neighbouring
// threads write lie in different banks.
//
// Products are D[16, 16] += A[16, depth] B[depth, 16] of a warp, D in float, `depth` being 32 bytes of the operands:
// 16 elements of 16 bits, 8 of 32. Fragments are those of tensor_core.h, B's of two blocks of 8 columns.
#pragma once

#include <initializer_list>

#include "tensor_core.h"

namespace fastnets {

// The arithmetic of a product, and what its operands are stored in. Sums are float everywhere.
struct Bf16 {
  using Storage = BFloat16;
  static constexpr int kParts = 1;
};
struct Fp16 {
  using Storage = Float16;
  static constexpr int kParts = 1;
};
struct Tf32 {  // operands rounded to 11 bits
  using Storage = float;
  static constexpr int kParts = 1;
};
// x = big + small, each rounded to 11 bits; three of the four products are within a few ulp of float's
// (https://arxiv.org/abs/2203.03341).
struct Fp32 {
  using Storage = float;
  static constexpr int kParts = 2;
};

template <class C>
constexpr int kDepth = 32 / sizeof(typename C::Storage);

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements

template <class T, int RowCount, int ColumnCount>
struct Tile {
  using Element = T;
  static constexpr int kRows = RowCount, kColumns = ColumnCount, kChunks = kColumns / kChunk<T>;
  static constexpr int kPitch = kColumns * sizeof(T), kBytes = kRows * kPitch;
  // Rows whose first chunks lie in different banks need no swizzle: as many as there are odd multiples of 16 bytes.
  static constexpr int kBits = kChunks % 8 == 0 ? 3 : kChunks % 4 == 0 ? 2 : kChunks % 2 == 0 ? 1 : 0;
  static_assert(kColumns % kChunk<T> == 0);

  char* data;  // aligned to 128 bytes

  __device__ __forceinline__ explicit Tile(void* memory) : data(static_cast<char*>(memory)) {}

  // What row r's chunks are exchanged by. Its upper two bits differ between rows 0, 1, 2, 3 and 4, 5, 6, 7, as between
  // 0, 2, 4, 6 and 1, 3, 5, 7: the rows that a transposed 32-bit operand is gathered from, two chunks of each.
  static __device__ __forceinline__ int swizzle(int row) {
    if constexpr (kBits < 3) {
      return row >> (3 - kBits) & ((1 << kBits) - 1);
    } else if constexpr (sizeof(T) == 4) {
      return ((row ^ row >> 2) & 1) << 1 | (row & 2) << 1 | (row & 1);
    } else {
      return row & 7;
    }
  }

  __device__ __forceinline__ T* at(int row, int column) const {
    const int chunk = column / kChunk<T> ^ swizzle(row);
    return reinterpret_cast<T*>(data + row * kPitch + chunk * 16) + column % kChunk<T>;
  }
};

// The widest copy, of 16, 8 or 4 bytes, that rows of such a place and such strides (in elements) allow; 0 where
// elements have to go one by one.
template <class T>
int copy_width(const void* p, std::initializer_list<int64_t> strides) {
  uint64_t bits = reinterpret_cast<uintptr_t>(p);
  for (const int64_t stride : strides) bits |= static_cast<uint64_t>(stride) * sizeof(T);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 0;
}

namespace detail {

template <int Threads, int Bytes, class TileType, class T, class RowOf>
__device__ __forceinline__ void copy_tile(TileType tile, int thread, int columns, const T* any, const RowOf& row_of) {
  constexpr int kElements = Bytes == 0 ? 1 : Bytes / static_cast<int>(sizeof(T));
  constexpr int kPieces = TileType::kColumns / kElements, kTotal = TileType::kRows * kPieces;
#pragma unroll(Bytes == 16 ? 4 : 1)  // the other widths are for odd strides
  for (int first = 0; first < kTotal; first += Threads) {
    const int i = first + thread;
    if (kTotal % Threads != 0 && i >= kTotal) break;
    const int column = i % kPieces * kElements;
    const T* const row = row_of(i / kPieces);
    const int valid = row == nullptr || column >= columns ? 0 : min(columns - column, kElements);
    const T* const from = valid > 0 ? row + column : any;
    T* const to = tile.at(i / kPieces, column);
    if constexpr (Bytes == 0) {
      store_shared(to, load_global_if<1>(valid > 0, from)[0]);
    } else {
      copy_async<Bytes>(to, from, valid * static_cast<int>(sizeof(T)));
    }
  }
}

}  // namespace detail

// Starts to copy a tile from rows in global memory, by `Threads` threads of which this one is `thread`. row_of(r)
// points at what the tile's row r holds, or is null: zeros. Of a row the first `columns` elements are read, zeros
// follow. `width` is copy_width's; `any` may be read and is aligned to it. The caller commits, waits, synchronizes.
template <int Threads, class TileType, class T, class RowOf>
__device__ __forceinline__ void copy_tile(TileType tile, int thread, int width, int columns, const T* any,
                                          const RowOf& row_of) {
  switch (width) {
    case 16: return detail::copy_tile<Threads, 16>(tile, thread, columns, any, row_of);
    case 8: return detail::copy_tile<Threads, 8>(tile, thread, columns, any, row_of);
    case 4: return detail::copy_tile<Threads, 4>(tile, thread, columns, any, row_of);
    default: return detail::copy_tile<Threads, 0>(tile, thread, columns, any, row_of);
  }
}

// As copy_tile, of rows `stride` elements apart: tile row r < count is the r-th from `rows` on, the others are zeros.
// For loops: most of what it computes, in the usual width, does not change from one tile to the next.
template <int Threads, class TileType, class T>
__device__ __forceinline__ void copy_rows(TileType tile, int thread, int width, int columns, const T* any,
                                          const T* rows, int64_t stride, int count) {
  constexpr int kPieces = TileType::kChunks, kStep = Threads / kPieces;
  if constexpr (Threads % kPieces == 0) {
    if (width == 16) {
      const int first = thread / kPieces, column = thread % kPieces * kChunk<T>;
      const int valid = min(max(columns - column, 0), kChunk<T>) * static_cast<int>(sizeof(T));
      const T* from = rows + first * stride + column;
#pragma unroll 4
      for (int r = 0; r < TileType::kRows; r += kStep) {
        if (TileType::kRows % kStep != 0 && first + r >= TileType::kRows) break;
        const bool exists = first + r < count;
        copy_async<16>(tile.at(first + r, column), exists ? from : any, exists ? valid : 0);
        from += kStep * stride;
      }
      return;
    }
  }
  copy_tile<Threads>(tile, thread, width, columns, any, [&](int r) { return r < count ? rows + r * stride : nullptr; });
}

// A fragment of A [16, depth], or of B [depth, 16] (its left block's two registers, then its right one's), in every
// part of the arithmetic.
template <class C>
struct Fragment {
  uint32_t parts[C::kParts][4];
};

template <class C>
__device__ __forceinline__ Fragment<C> to_fragment(const uint32_t (&r)[4]) {
  Fragment<C> f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(typename C::Storage) == 2) {
      f.parts[0][i] = r[i];
    } else {
      const float x = __uint_as_float(r[i]);
      f.parts[0][i] = to_tf32(x);
      if constexpr (C::kParts == 2) f.parts[1][i] = to_tf32(x - __uint_as_float(f.parts[0][i]));
    }
  }
  return f;
}

// The order in which a product runs through the depth; its two operands must agree. kPaired is that of accumulators
// handed on as A (accumulators_as_a): it differs for 32-bit elements only.
enum class Order { kPlain, kPaired };
enum class Side { kA, kB };

// Reads fragments from tiles that hold A [m, k] or B [n, k] or, transposed, [k, m] or [k, n]. The object is what
// depends on the lane.
template <class C, class TileType, Side side, bool Transposed = false, Order order = Order::kPlain>
class Reader {
  using T = typename C::Storage;
  static constexpr bool kGathers = Transposed && sizeof(T) == 4;  // ldmatrix transposes 16-bit elements only
  static constexpr int kPitch = TileType::kPitch;
  static constexpr int kNext = order == Order::kPaired ? 1 : 4;  // rows between a lane's two places in the depth
  static_assert(Transposed || order == Order::kPlain || sizeof(T) == 2, "ldmatrix reads in plain order");
  static_assert(!kGathers || TileType::kBits == 3, "rows of 32-bit elements must be whole multiples of 128 bytes");

 public:
  __device__ __forceinline__ Reader() {
    const int lane = threadIdx.x % 32;
    // Of ldmatrix's four matrices (lanes 8 m give the rows of m), or of the four elements of a transposed 32-bit
    // operand, the second is the next one in m or n where the fragment's registers go so: A, but B transposed.
    constexpr bool kRowsFirst = (side == Side::kA) != Transposed;
    const int row = kGathers     ? lane % 4 * (kNext == 1 ? 2 : 1)
                    : kRowsFirst ? lane / 8 % 2 * 8 + lane % 8
                                 : lane / 16 * 8 + lane % 8;
    const int chunk = kGathers || kRowsFirst ? lane / 16 : lane / 8 % 2;
    place_ = row * kPitch + (kGathers ? lane / 4 % 4 * 4 : 0);
    exchange_ = (chunk ^ TileType::swizzle(row)) * 16;
  }

  // The registers of the fragment at that row and column of the tile: multiples of 8, the column of 16 bytes' elements
  // times two; they cost nothing where they are constants.
  __device__ __forceinline__ void load(uint32_t (&r)[4], TileType tile, int row, int column FASTNETS_AT) const {
    const char* const base = tile.data + place_ + row * kPitch;
    const int chunks = column / kChunk<T> * 16;
    if constexpr (kGathers) {
      constexpr int kExchange = (kNext == 1 ? 3 : 2) * 16;  // of the row kNext further, beyond this one's
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int right = side == Side::kA ? i % 2 : i / 2, next = side == Side::kA ? i / 2 : i % 2;
        const int place = ((chunks + right * 32) ^ exchange_ ^ next * kExchange) + next * kNext * kPitch;
        r[i] = load_shared(reinterpret_cast<const uint32_t*>(base + place) FASTNETS_PASS_AT);
      }
    } else {
      load_matrix<Transposed>(r, base + (chunks ^ exchange_) FASTNETS_PASS_AT);
    }
  }

  __device__ __forceinline__ Fragment<C> operator()(TileType tile, int row, int column FASTNETS_AT) const {
    uint32_t r[4];
    load(r, tile, row, column FASTNETS_PASS_AT);
    return to_fragment<C>(r);
  }

 private:
  int place_, exchange_;  // bytes
};

namespace detail {

template <class C>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTNETS_AT) {
  if constexpr (std::is_same_v<C, Bf16>) {
    mma_bf16(d, a, b FASTNETS_PASS_AT);
  } else if constexpr (std::is_same_v<C, Fp16>) {
    mma_fp16(d, a, b FASTNETS_PASS_AT);
  } else {
    mma_tf32(d, a, b FASTNETS_PASS_AT);
  }
}

}  // namespace detail

// D += A B, D in two blocks of 8 columns.
template <class C>
__device__ __forceinline__ void multiply(float (&left)[4], float (&right)[4], const Fragment<C>& a,
                                         const Fragment<C>& b FASTNETS_AT) {
  // The small products first: they would be lost on the large sum.
#pragma unroll
  for (int product = 2 * C::kParts - 2; product >= 0; --product) {
    const uint32_t (&x)[4] = a.parts[product / 2], (&y)[4] = b.parts[product % 2];
    detail::multiply<C>(left, x, {y[0], y[1]} FASTNETS_PASS_AT);
    detail::multiply<C>(right, x, {y[2], y[3]} FASTNETS_PASS_AT);
  }
}

// The next product's A from accumulators, whose columns become its depth: `blocks` is one block of 8 columns for every
// 8 of the depth. Its B is read in Order::kPaired.
template <class C>
__device__ __forceinline__ Fragment<C> accumulators_as_a(const float (*blocks)[4]) {
  using T = typename C::Storage;
  uint32_t r[4];
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = pack<T>(blocks[i / 2][i % 2 * 2], blocks[i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = __float_as_uint(blocks[0][i % 2 * 2 + i / 2]);
  }
  return to_fragment<C>(r);
}

// Stores accumulators of 16 rows and 8 columns to a tile at that row and column, both multiples of 8.
template <class TileType>
__device__ __forceinline__ void store_accumulators(TileType tile, int row, int column,
                                                   const float (&d)[4] FASTNETS_AT) {
  using T = typename TileType::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vector<T, 2> pair{{from_float<T>(d[2 * half]), from_float<T>(d[2 * half + 1])}};
    store_shared(tile.at(row + lane / 4 + 8 * half, column + lane % 4 * 2), pair FASTNETS_PASS_AT);
  }
}

}  // namespace fastnets

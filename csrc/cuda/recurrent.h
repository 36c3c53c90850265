// What the two persistent kernels of the recurrent layers share: weights that stay on the chip for a whole sequence,
// the product of one step with them, and the flags by which blocks hand one step's result to the next step.
//
// A product is sums[rows of weights, batch], the weights as left operand. Rows of the weights go in tiles of 16, so
// many hidden units with all their gates that fit; `Tiles` of them are a strip, the work of one block, which may have
// several strips. A block's warps share the depth. It runs in chunks of 64 bytes; of a chunk each lane reads 16 bytes
// of every row, of weights and batch alike: the order in which a product runs through its depth is free, so fragments
// need no other layout than the tensors'.
//
// Products are the tensor cores', of 8 columns at least, but for float and a batch of up to 4: there as many
// multiplications as there are rows cost less than splitting every weight in two (docs/gpu.md has the count), and lose
// nothing.
#pragma once

#include <span>

#include "../cells.h"
#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace fastnets::cuda {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

struct Weights {
  const void* data;         // [gates * units, depth], rows of whole pieces of 16 bytes
  int units, depth, gates;  // row g * units + j is gate g of unit j
  int strips;
  int slots;       // chunks of the depth that a warp has of every strip
  int first_slot;  // where this block's chunks begin in the order in which they stay on the chip
};

// A block's part of the chip: the first chunks of each warp stay in registers, the next ones in shared memory; what is
// left is read from global memory at every step.
struct Residence {
  int in_registers, in_shared;  // slots
};

// What a kernel is given: a grid's z are the directions of the layer that it runs at once, which never meet.
template <class Parameters>
struct Directions {
  Parameters of[2];
};

__host__ __device__ constexpr int units_of_tile(int gates) { return 16 / gates; }

// The arithmetic of a small batch: float products, one by one.
struct Scalar {
  using Storage = float;
  static constexpr int kParts = 1;
};

template <class M>
struct DeviceMath {
  using Vector = M;
  static __device__ __forceinline__ M sigmoid(M x) { return 1.0f / (1.0f + expf(-x)); }
  static __device__ __forceinline__ M tanh(M x) { return tanhf(x); }
  static __device__ __forceinline__ M positive(M x, M y) { return x <= 0.0f ? 0.0f : y; }  // y where x > 0; NaN stays
  static __device__ __forceinline__ M clamp(M x, M most) {
    return x > most ? most : x < -most ? -most : x;
  }  // likewise
  static __device__ __forceinline__ M unless_beyond(M x, M most, M y) { return fabsf(x) > most ? 0.0f : y; }
};
using Math = DeviceMath<float>;

// 16 bytes of a row from k on; zeros behind its end and where there is no row.
template <class T>
__device__ __forceinline__ void load_piece(uint32_t (&words)[4], const T* row, int k, int depth) {
  const bool inside = row != nullptr && k < depth;
  const Vector<T, kChunk<T>> piece = load_global_if<kChunk<T>>(inside, inside ? row + k : row);
  __builtin_memcpy(words, &piece, sizeof(piece));
}

// Columns: rows of the batch that a product covers. Slots: those that stay in registers, fewer of an arithmetic in two
// parts, for the compiler keeps both.
template <class C, int Tiles, int Columns, int Slots>
class Product {
  using T = typename C::Storage;
  static constexpr bool kScalar = std::is_same_v<C, Scalar>;
  // Rows of the batch that a lane reads: all of them, or one of every 8 that the tensor cores take at a time.
  static constexpr int kRows = kScalar ? Columns : Columns / 8;
  static constexpr int kSums = kScalar ? 2 : 4;  // that a lane has of a tile for each of those
  // A column's sums are neighbours: so the gates of a unit are. Those that the tensor cores' lanes store together, of
  // four columns, lie in banks of their own.
  static constexpr int kPitch = Tiles * 16 + (kScalar ? 0 : 4);
  // Chunks of the batch that are under way at once, beside weights in registers and others.
  static constexpr int kAhead = (kRows < 4 ? 4 : 2) / C::kParts, kFewer = kAhead > 1 ? kAhead / 2 : 1;
  static_assert(kScalar || Columns % 8 == 0);

 public:
  static constexpr int kColumns = Columns, kTiles = Tiles;
  static constexpr int kDepth = 4 * kChunk<T>;  // elements of a chunk
  static constexpr int kRegisterSlots = Slots / C::kParts / (C::kParts * Columns > 32 ? 2 : 1);
  static constexpr int kSumBytes = kWarps * Columns * kPitch * sizeof(float);
  static constexpr int kSlotBytes = kThreads * Tiles * 2 * 16;

  // `shared`: kSumBytes, then kSlotBytes for each slot in shared memory.
  __device__ __forceinline__ Product(unsigned char* shared, Residence residence)
      : sums_(reinterpret_cast<float*>(shared)),
        kept_(reinterpret_cast<uint32_t*>(shared + (kSumBytes + 15) / 16 * 16) + threadIdx.x * 4),
        residence_(residence) {}

  static int shared_bytes(int slots) { return (kSumBytes + 15) / 16 * 16 + slots * kSlotBytes; }

  // Brings this block's part of the weights where it stays. A thread reads what it has written itself, and that alone.
  __device__ __forceinline__ void keep(const Weights& w) {
    if (w.first_slot == 0) {
#pragma unroll
      for (int j = 0; j < kRegisterSlots; ++j) load_left(held_[j], w, blockIdx.x, j, j < residence_.in_registers);
    }
    int slot = w.first_slot - residence_.in_registers;
    for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x) {
      for (int j = 0; j < w.slots; ++j, ++slot) {
        if (slot < 0) continue;
        if (slot >= residence_.in_shared) return;
        Left left;
        load_left(left, w, strip, j, true);
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) {
          store_shared(kept_ + (slot * 2 * Tiles + i) * kThreads * 4, as_vector(left.words[i]));
        }
      }
    }
  }

  // Multiplies a strip, this block's `own`-th, with the batch's first `columns` rows, row_of(c) for column c, null for
  // zeros. The sums are there, in one of two places, after the next barrier.
  template <class RowOf>
  __device__ __forceinline__ void operator()(const Weights& w, int strip, int own, int columns, int place,
                                             const RowOf& row_of) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * w.slots;
    const int count = min(w.slots, (w.depth + kDepth - 1) / kDepth - first);
    if (count <= 0) return;
    const T* rows[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) rows[n] = row_of(kScalar ? n : 8 * n + lane / 4);
    Sums sums = {};
    int j = 0;
    if (own == 0 && w.first_slot == 0 && residence_.in_registers > 0) {
#pragma unroll
      for (; j < kRegisterSlots; j += kAhead) {
        Right right[kAhead];
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          load_right(right[a], w, rows, first + j + a, j + a < min(count, kRegisterSlots));
        }
#pragma unroll
        for (int a = 0; a < kAhead; ++a) {
          if (j + a >= kRegisterSlots || j + a >= count) continue;
          multiply(sums, held_[min(j + a, kRegisterSlots - 1)], right[a], columns);
        }
      }
      j = kRegisterSlots;
    }
#pragma unroll 1
    for (; j < count; j += kFewer) {
      Right right[kFewer];
#pragma unroll
      for (int a = 0; a < kFewer; ++a) load_right(right[a], w, rows, first + j + a, j + a < count);
#pragma unroll
      for (int a = 0; a < kFewer; ++a) {
        if (j + a >= count) break;
        Left left;
        load_kept(left, w, strip, own, j + a);
        multiply(sums, left, right[a], columns);
      }
    }
    store(sums, columns, place);
  }

  // The sums of the gates of the strip's unit `unit`, for the batch's column.
  template <int Gates>
  __device__ __forceinline__ Vector<float, 4> sums(const Weights& w, int unit, int column, int place = 0) const {
    constexpr int kUnits = units_of_tile(Gates);
    const int chunks = (w.depth + kDepth - 1) / kDepth, warps = (chunks + w.slots - 1) / w.slots;
    const float* from = at(place * kWarps, column, unit / kUnits * 16 + unit % kUnits * Gates);
    Vector<float, 4> total{};
    for (int warp = 0; warp < warps; ++warp, from += Columns * kPitch) {
      if constexpr (Gates == 4) {
        const auto four = load_shared<4>(from);
#pragma unroll
        for (int g = 0; g < 4; ++g) total[g] += four[g];
      } else {
#pragma unroll
        for (int g = 0; g < Gates; ++g) total[g] += load_shared(from + g);
      }
    }
    return total;
  }

 private:
  // Of both rows that a lane has of every tile, lane / 4 and eight further, 16 bytes.
  struct Left {
    uint32_t words[2 * Tiles][4];
  };

  using Right = uint32_t[kRows][4];
  using Sums = float[Tiles][kRows][kSums];  // of the tensor cores' rows and columns, or of the rows lane / 4 and + 8

  static __device__ __forceinline__ Vector<uint32_t, 4> as_vector(const uint32_t (&words)[4]) {
    return {{words[0], words[1], words[2], words[3]}};
  }

  // A chunk that is not in registers.
  __device__ __forceinline__ void load_kept(Left& left, const Weights& w, int strip, int own, int j) const {
    const int slot = w.first_slot + own * w.slots + j - residence_.in_registers;
    if (slot >= residence_.in_shared) return load_left(left, w, strip, j, true);
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const auto piece = load_shared<4>(kept_ + (slot * 2 * Tiles + i) * kThreads * 4);
      __builtin_memcpy(left.words[i], &piece, sizeof(piece));
    }
  }

  static __device__ __forceinline__ void load_left(Left& left, const Weights& w, int strip, int j, bool exists) {
    const int lane = threadIdx.x % 32, chunk = threadIdx.x / 32 * w.slots + j, units = units_of_tile(w.gates);
#pragma unroll
    for (int i = 0; i < 2 * Tiles; ++i) {
      const int row = lane / 4 + i % 2 * 8, of_tile = row / w.gates, gate = row - of_tile * w.gates;
      const int unit = (strip * Tiles + i / 2) * units + of_tile;
      const bool inside = exists && of_tile < units && unit < w.units;
      const T* const from = static_cast<const T*>(w.data) + (int64_t{gate} * w.units + unit) * w.depth;
      load_piece(left.words[i], inside ? from : nullptr, chunk * kDepth + lane % 4 * kChunk<T>, w.depth);
    }
  }

  static __device__ __forceinline__ void load_right(Right& right, const Weights& w, const T* const (&rows)[kRows],
                                                    int chunk, bool exists) {
    const int k = chunk * kDepth + threadIdx.x % 4 * kChunk<T>;
#pragma unroll
    for (int n = 0; n < kRows; ++n) load_piece(right[n], exists ? rows[n] : nullptr, k, w.depth);
  }

  static __device__ __forceinline__ void multiply(Sums& sums, const Left& left, const Right& right, int columns) {
    if constexpr (kScalar) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (n >= columns) break;
#pragma unroll
        for (int i = 0; i < 2 * Tiles; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sums[i / 2][n][i % 2] =
                fmaf(__uint_as_float(left.words[i][k]), __uint_as_float(right[n][k]), sums[i / 2][n][i % 2]);
          }
        }
      }
    } else if constexpr (kRows == 1) {
      const Fragment<C> b = to_fragment<C>(right[0]);
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) {
          const Fragment<C> a = fragment(left, tile, half);
#pragma unroll
          for (int product = 2 * C::kParts - 2; product >= 0; --product) {
            const uint32_t (&y)[4] = b.parts[product % 2];
            detail::multiply<C>(sums[tile][0], a.parts[product / 2], {y[half], y[half + 1]});
          }
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        Fragment<C> a[Tiles];
#pragma unroll
        for (int tile = 0; tile < Tiles; ++tile) a[tile] = fragment(left, tile, half);
#pragma unroll
        for (int n = 0; n < kRows; n += 2) {
          const Fragment<C> b =
              to_fragment<C>({right[n][half], right[n][half + 1], right[n + 1][half], right[n + 1][half + 1]});
#pragma unroll
          for (int tile = 0; tile < Tiles; ++tile) {
            fastnets::multiply<C>(sums[tile][n], sums[tile][n + 1], a[tile], b);
          }
        }
      }
    }
  }

  // A lane's 16 bytes are two products' depth: the first half and the second.
  static __device__ __forceinline__ Fragment<C> fragment(const Left& left, int tile, int half) {
    const uint32_t (&upper)[4] = left.words[2 * tile], (&lower)[4] = left.words[2 * tile + 1];
    return to_fragment<C>({upper[half], lower[half], upper[half + 1], lower[half + 1]});
  }

  __device__ __forceinline__ float* at(int warp, int column, int row) const {
    return sums_ + (warp * Columns + column) * kPitch + row;
  }

  // A warp's sums, for the block to add up.
  __device__ __forceinline__ void store(const Sums& sums, int columns, int place) const {
    const int lane = threadIdx.x % 32, warp = place * kWarps + threadIdx.x / 32;
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
#pragma unroll
      for (int n = 0; n < kRows; ++n) {
        if (kScalar && n >= columns) break;
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          float sum = sums[tile][n][i];
          const int half = kScalar ? i : i / 2, column = kScalar ? n : 8 * n + lane % 4 * 2 + i % 2;
          if (kScalar) {  // four lanes share a row
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (lane % 4 != 0) continue;
          }
          store_shared(at(warp, column, tile * 16 + lane / 4 + half * 8), sum);
        }
      }
    }
  }

  float* sums_;     // [place][warp][column][row]
  uint32_t* kept_;  // [slot][2 Tiles][thread][4]
  Residence residence_;
  Left held_[kRegisterSlots];
};

// Every strip has a flag for every group of the batch's rows: how many steps of it are done, written by the block that
// has the strip and read by those that need its units. Nobody waits for a strip that it does not read.
__device__ __forceinline__ void wait_for(const uint32_t* flags, int first, int past, uint32_t steps) {
  for (int i = first + static_cast<int>(threadIdx.x) % 32; i < past; i += 32) {
    while (load_acquire(flags + i) < steps) {
    }
  }
  __syncwarp();
}

// Waits for the strips of `units` units each that make what this warp reads of a product's other operand.
template <int Depth>
__device__ __forceinline__ void wait_for_depth(const Weights& w, const uint32_t* flags, int strips, int units,
                                               uint32_t steps) {
  const int first = static_cast<int>(threadIdx.x) / 32 * w.slots * Depth;
  wait_for(flags, first / units, min((first + w.slots * Depth + units - 1) / units, strips), steps);
}

// After the block's threads have stored what the step gave, and read the sums it was made of.
__device__ __forceinline__ void publish(uint32_t* flag, uint32_t steps) {
  __syncthreads();
  if (threadIdx.x == 0) store_release(flag, steps);
}

__host__ __device__ constexpr int gates_of(Cell cell) { return cell == Cell::kLstm ? 4 : cell == Cell::kGru ? 3 : 1; }

// Calls f with the number of the cell's gates as a constant. A variant is of lstm.
template <bool Variant, class F>
__device__ __forceinline__ void with_gates(Cell cell, F&& f) {
  if constexpr (Variant) {
    f(std::integral_constant<int, 4>{});
  } else {
    switch (cell) {
      case Cell::kLstm: return f(std::integral_constant<int, 4>{});
      case Cell::kGru: return f(std::integral_constant<int, 3>{});
      default: return f(std::integral_constant<int, 1>{});
    }
  }
}

// Calls f with the arithmetic of the layer's products and, a constant, the rows of the batch that one covers.
template <class F>
void with_arithmetic(const RecurrentShape& s, F&& f) {
  const auto with_columns = [&](auto arithmetic) {
    if (s.batch <= 8) return f(arithmetic, std::integral_constant<int, 8>{});
    if (s.batch <= 16) return f(arithmetic, std::integral_constant<int, 16>{});
    f(arithmetic, std::integral_constant<int, 32>{});
  };
  switch (s.dtype) {
    case Dtype::kBFloat16: return with_columns(Bf16{});
    case Dtype::kFloat16: return with_columns(Fp16{});
    case Dtype::kFloat32:
      if (s.batch <= 4) return f(Scalar{}, std::integral_constant<int, 4>{});
      return s.tf32 ? with_columns(Tf32{}) : with_columns(Fp32{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// One number of rows for layer norm, whose steps are longer than a product, and no TF32: few instantiations.
constexpr int kNormColumns = 16;
template <class F>
void with_norm_arithmetic(const RecurrentShape& s, F&& f) {
  switch (s.dtype) {
    case Dtype::kBFloat16: return f(Bf16{});
    case Dtype::kFloat16: return f(Fp16{});
    case Dtype::kFloat32: return f(Fp32{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Where each sequence begins and ends: rows that run at time t are those with t < length.
struct Times {
  const RecurrentShape& s;

  __device__ __forceinline__ int64_t time(int64_t step) const { return s.reverse ? s.steps - 1 - step : step; }
  __device__ __forceinline__ int64_t length(int64_t b) const {
    if (s.lengths == nullptr) return s.steps;
    const int64_t given = load_global(s.lengths + b);
    return given < 0 ? 0 : given < s.steps ? given : s.steps;
  }
  __device__ __forceinline__ bool runs(int64_t t, int64_t b) const { return b < s.batch && t < length(b); }
  __device__ __forceinline__ int64_t first_time(int64_t b) const { return s.reverse ? length(b) - 1 : 0; }
  __device__ __forceinline__ int64_t last_time(int64_t b) const { return s.reverse ? 0 : length(b) - 1; }
  // Whether any of these rows runs; the same in every warp.
  template <int Columns>
  __device__ __forceinline__ bool any_runs(int64_t t, int64_t first) const {
    return __any_sync(~0u, threadIdx.x % 32 < Columns && runs(t, first + threadIdx.x % 32));
  }
};

template <class T>
__device__ __forceinline__ float load_float(const void* p, int64_t i) {
  return to_float(load_global(static_cast<const T*>(p) + i));
}
template <class T>
__device__ __forceinline__ void store_float(void* p, int64_t i, float x) {
  store_global(static_cast<T*>(p) + i, from_float<T>(x));
}

// How much of a state stays: by zoneout's mask, or else its rate.
__device__ __forceinline__ float zoneout(const uint8_t* mask, double rate, int64_t at) {
  return mask == nullptr ? static_cast<float>(rate) : static_cast<float>(load_global(mask + at));
}
// A variant's options of unit j in row t * B + b.
template <class T>
__device__ __forceinline__ LstmOptions<float> load_options(const RecurrentShape& s, int64_t row, int64_t j) {
  const LstmVariant& v = s.variant;
  LstmOptions<float> with;
#pragma unroll
  for (int q = 0; q < 3; ++q) {
    with.peephole[q] = v.peephole == nullptr ? 0.0f : load_float<T>(v.peephole, q * s.hidden + j);
  }
  const bool keeps = v.keep_g == nullptr || load_global(v.keep_g + row * s.hidden + j) != 0;
  with.keep = keeps ? static_cast<float>(v.keep_scale) : 0.0f;
  with.hold = zoneout(v.hold_c, v.zoneout_c, row * s.hidden + j);
  with.clip = static_cast<float>(v.clip);
  return with;
}
__device__ __forceinline__ bool holds_h(const LstmVariant& v) { return v.hold_h != nullptr || v.zoneout_h != 0.0; }

constexpr size_t kSumScratch = 128;  // bytes of static shared memory that block_sum takes

// Layer norm of a row, by all threads of a block: the sum over j < count of value(j), each thread its own j.
template <class Value>
__device__ __forceinline__ float row_sum(int64_t count, const Value& value) {
  float sum = 0.0f;
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < count; j += kThreads) sum += value(j);
  return block_sum(sum);
}
struct Moments {
  float mean, scale;  // scale: one over the standard deviation
  __device__ __forceinline__ float normalise(float x) const { return (x - mean) * scale; }
};
template <class Value>
__device__ __forceinline__ Moments moments(int64_t count, const Value& value) {
  const float mean = row_sum(count, value) / static_cast<float>(count);
  const float squares = row_sum(count, [&](int64_t j) {
    const float deviation = value(j) - mean;
    return deviation * deviation;
  });
  return {mean, rsqrtf(squares / static_cast<float>(count) + static_cast<float>(kNormEpsilon))};
}
// From the gradient of the normalised row, that of the row before, for its element j.
struct NormGradient {
  Moments of;
  float mean, along;
  __device__ __forceinline__ float operator()(float grad, float unit) const {
    return (grad - mean - unit * along) * of.scale;
  }
};
// grad(j): of the normalised row; unit(j): that row itself.
template <class Grad, class Unit>
__device__ __forceinline__ NormGradient norm_gradient(Moments of, int64_t count, const Grad& grad, const Unit& unit) {
  const float mean = row_sum(count, grad) / static_cast<float>(count);
  const float along = row_sum(count, [&](int64_t j) { return grad(j) * unit(j); }) / static_cast<float>(count);
  return {of, mean, along};
}

// The column of a block's item, whose unit is item % Units. A warp that reads 16 units of two columns takes columns
// whose sums lie in banks of their own: those four apart.
template <int Units, int Columns>
__device__ __forceinline__ int column_of(int item) {
  const int place = item / Units;
  if constexpr (Units != 16 || Columns < 8) return place;
  return place / 8 * 8 + place % 2 * 4 + place / 2 % 4;
}

// Calls f(unit, column) for this thread's share of a strip's units and the batch's columns.
template <int Units, int Columns, class F>
__device__ __forceinline__ void for_items(F&& f) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Units * Columns; i += kThreads) f(i % Units, column_of<Units, Columns>(i));
}

// A grid's x shares out the strips, its y groups of the batch's rows, which never meet: this block's first row, and how
// far it is to its next one.
template <int Columns>
__device__ __forceinline__ int64_t first_row() {
  return int64_t{blockIdx.y} * Columns;
}
template <int Columns>
__device__ __forceinline__ int64_t next_rows() {
  return int64_t{gridDim.y} * Columns;
}

// Calls f(row of the batch, unit) for this thread's share of every strip that the block has.
template <int Units, int Columns, class F>
__device__ __forceinline__ void for_own_units(int strips, int64_t units, int64_t batch, F&& f) {
  for (int strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    for (int64_t first = first_row<Columns>(); first < batch; first += next_rows<Columns>()) {
      for_items<Units, Columns>([&](int unit, int column) {
        const int64_t j = int64_t{strip} * Units + unit, b = first + column;
        if (j < units && b < batch) f(b, j);
      });
    }
  }
}

// A matrix of so many units and gates as the kernel's products take it.
template <class ProductType>
Weights weights_of(const void* data, int64_t units, int64_t depth, int gates) {
  const int units_of_strip = ProductType::kTiles * units_of_tile(gates);
  const int chunks = static_cast<int>((depth + ProductType::kDepth - 1) / ProductType::kDepth);
  return {data,
          static_cast<int>(units),
          static_cast<int>(depth),
          gates,
          static_cast<int>((units + units_of_strip - 1) / units_of_strip),
          (chunks + kWarps - 1) / kWarps,
          0};
}

// Deals the strips of both products (the second may have none) to blocks, keeps of their weights on the chip what fits,
// and launches. Blocks that wait for each other must all run at once; where there is room for more, both directions do,
// or they share the rows of the batch out, too, each share with the weights of its own. A sequence of one step reads
// its weights once and keeps nothing. `places`: for sums; `fixed`: bytes of static shared memory.
template <class ProductType, class Parameters>
void launch_persistent(const char* name, void (*kernel)(Directions<Parameters>), std::span<Parameters> directions,
                       bool waits, int places, size_t fixed, Stream stream) {
  const Parameters& like = directions[0];
  const Weights &first = like.recurrent, &second = like.projection;
  const size_t least = ProductType::shared_bytes(0) + (places - 1) * ProductType::kSumBytes;
  const bool keeps = like.pass.shape.steps > 1;
  const int room = keeps ? static_cast<int>((shared_limit() - fixed - least) / ProductType::kSlotBytes) : 0;
  const int strips = std::max(first.strips, second.strips);
  const int64_t groups = (like.pass.shape.batch + ProductType::kColumns - 1) / ProductType::kColumns;
  int blocks = strips;
  int64_t shares = std::min<int64_t>(groups, 65535);  // of the batch
  if (waits) {
    const int resident =
        resident_blocks(reinterpret_cast<const void*>(kernel), kThreads, least + room * ProductType::kSlotBytes);
    if (resident == 0) throw std::runtime_error(std::string(name) + ": the device takes no cooperative launch");
    const int each = (strips + resident - 1) / resident;
    blocks = (strips + each - 1) / each;
    if (blocks * static_cast<int>(directions.size()) > resident) {
      for (Parameters& one : directions) {
        launch_persistent<ProductType>(name, kernel, std::span(&one, 1), waits, places, fixed, stream);
      }
      return;
    }
    shares = std::min<int64_t>(shares, resident / (blocks * static_cast<int>(directions.size())));
  }
  const auto slots = [&](const Weights& w) { return (w.strips + blocks - 1) / blocks * w.slots; };
  Residence residence{};
  if (keeps) {
    residence.in_registers = std::min(first.slots, ProductType::kRegisterSlots);
    residence.in_shared = std::min(room, slots(first) + slots(second) - residence.in_registers);
  }
  Directions<Parameters> all{};
  for (size_t i = 0; i < directions.size(); ++i) {
    all.of[i] = directions[i];
    all.of[i].projection.first_slot = slots(first);
    all.of[i].residence = residence;
  }
  const size_t shared = least + residence.in_shared * ProductType::kSlotBytes;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(shares),
                  static_cast<unsigned>(directions.size()));
  launch({name, grid, kThreads, stream, shared, waits}, kernel, all);
}

}  // namespace fastnets::cuda

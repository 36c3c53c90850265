// The products of a convolution: their tiles, the loop over the depth, and the shares of it that blocks sum up.
#pragma once

#include "conv.h"

namespace fastnets::cuda {

// The tile of a block: M rows by N columns in WarpsM x WarpsN warps, Stages of 128 bytes of the depth in flight.
template <int M, int N, int WarpsM, int WarpsN, int StageCount, int BlockCount>
struct Shape {
  static constexpr int kM = M, kN = N, kWarpsM = WarpsM, kWarpsN = WarpsN, kStages = StageCount, kBlocks = BlockCount;
  static constexpr int kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0);
};

constexpr int kStageBytes = 128;  // of a row: all eight places of a swizzled tile, and four sectors of global memory
template <class T>
constexpr int kStageDepth = kStageBytes / static_cast<int>(sizeof(T));

// The stages' shared memory.
template <class S>
constexpr int kProductBytes = S::kStages * (S::kM + S::kN) * kStageBytes;

// The tile table, one for every architecture: all entries fit the 99 KB that a block may have on 8.6, 8.9 and 12.0, and
// 8.0, 9.0 and 10.0 hold more blocks of them instead (docs/gpu.md has the figures). What a multiply reads of shared
// memory is as 1 / a warp's rows + 1 / its columns, what a block reads of L2 as 1 / the tile's rows + 1 / its columns.
//
// Each tap brings its own pixels (conv_gather, conv_weight):
//  - Wide: many results in both directions. 96 KB; 64 sums a thread; 8 warps of 64 x 32.
//  - Tall: up to 32 result channels, of which wider tiles would compute zeros. 60 KB, 4 warps of 32 x 32.
//  - Small: the rest: few results, where waves of Wide would leave multiprocessors idle. 48 KB.
//  - Flat: a weight's gradient of up to 64 rows. 72 KB, 8 warps of 32 x 32.
// The pixels stay while the taps pass (conv_held), in two places where their channels take more than 128 bytes. Of L2
// the weight is most, so that tall tiles come first. 3 x 3 taps of images W wide take, beside the weight's stages, a
// place of 128 bytes for each of the tile's rows and 2 W + 2 pixels:
//  - HeldTall: many results. 24 KB and the pixels: of one place, or of two where W is up to 20, 8.6, 8.9 and 12.0 have
//    room for them too.
//  - HeldWide: in its place there, up to 36 wide, where results have many channels. 48 KB and the pixels.
//  - HeldMiddle: fewer results, and images of up to 84. 24 KB and the pixels.
//  - HeldSmall: few results. 24 KB and the pixels.
// and their weight's gradient (conv_held_weight):
//  - HeldTaps: 3 x 3 taps at once, so that 64 + 32 elements come for each result and 64 x 288 sums; with twice as many
//    sums a block, those of the shares would outweigh what is read. 25 KB and a ring of 20 KB for images of 56 x 56;
//    6 warps of 32 x 96, 96 sums a thread: a second block on a multiprocessor would spill.
// Few source channels (conv_few), whose whole weight stays on chip; 3 x 3 or 7 x 7 taps of 3 channels:
//  - FewTall: up to 32 result channels. 42 or 52 KB.
//  - FewWide: more of them. 50 or 70 KB, with float32's 5 stages of depth 86 KB.
// and their weight's gradient (conv_few_weight):
//  - PackedNarrow: up to 64 taps and channels. 34 KB.
//  - PackedWide: 160 hold 7 x 7 taps of 3 channels. 52 KB, 80 sums a thread in 4 warps of 32 x 80.
using Wide = Shape<128, 128, 2, 4, 3, 1>;
using Tall = Shape<128, 32, 4, 1, 3, 2>;
using Small = Shape<64, 64, 2, 2, 3, 3>;
using Flat = Shape<64, 128, 2, 4, 3, 1>;
using HeldTall = Shape<256, 64, 4, 2, 3, 1>;
using HeldWide = Wide;
using HeldMiddle = Shape<128, 64, 4, 2, 3, 1>;
using HeldSmall = Shape<64, 64, 2, 2, 3, 2>;
struct HeldTaps : Shape<64, 288, 2, 3, 3, 1> {
  static constexpr int kTaps = 9, kChannels = 32;
};

using FewTall = Shape<128, 32, 4, 1, 2, 2>;
using FewWide = Shape<128, 64, 4, 2, 2, 2>;
using PackedNarrow = Shape<64, 64, 2, 2, 3, 2>;
using PackedWide = Shape<64, 160, 2, 2, 3, 2>;
constexpr int64_t kFewChannels = 4, kFewDepth = 256;  // at most; more channels fill chunks of 16 bytes

template <class S>
int64_t tiles_of(int64_t rows, int64_t columns) {
  return (rows + S::kM - 1) / S::kM * ((columns + S::kN - 1) / S::kN);
}

// Whether so many blocks keep the device busy: where a quarter of it is left idle by large tiles, smaller ones would
// bring up to twice as much from L2, and shares of the depth their sums.
inline bool fills_device(int64_t blocks) { return 4 * blocks >= 3 * int64_t{multiprocessors()}; }

// Calls f with the shape for `rows` x `columns` results, `batch` times.
template <class F>
void with_shape(int64_t rows, int64_t columns, int64_t batch, F&& f) {
  if (columns <= Tall::kN && fills_device(tiles_of<Tall>(rows, columns) * batch)) return f(Tall{});
  if (columns > Small::kN && fills_device(tiles_of<Wide>(rows, columns) * batch)) return f(Wide{});
  return f(Small{});
}

// The same where pixels are held, until one has room for them: f returns whether.
template <class F>
bool with_held(int64_t rows, int64_t columns, int64_t batch, F&& f) {
  const auto fills = [&](auto shape) {
    return fills_device(tiles_of<decltype(shape)>(rows, columns) * batch) && f(shape);
  };
  return fills(HeldTall{}) || (columns > HeldMiddle::kN && fills(HeldWide{})) || fills(HeldMiddle{}) || f(HeldSmall{});
}

template <class F>
void with_few(int64_t columns, F&& f) {
  if (columns <= FewTall::kN) return f(FewTall{});
  return f(FewWide{});
}

template <class F>
void with_few_weight(int64_t columns, F&& f) {
  if (columns <= PackedNarrow::kN) return f(PackedNarrow{});
  return f(PackedWide{});
}

// The shape for a weight's gradient, whose shares fill the device whatever it is.
template <class F>
void with_weight_shape(int64_t rows, int64_t columns, F&& f) {
  if (columns <= Tall::kN) return f(Tall{});
  if (columns <= Small::kN) return f(Small{});
  if (rows <= Flat::kM) return f(Flat{});
  return f(Wide{});
}

// Into how many shares the depth is cut where the tiles alone would not fill the device: each of at least four stages.
inline int splits_for(int64_t blocks, int64_t steps) {
  constexpr int64_t kLeast = 4;
  const int64_t wanted = multiprocessors();
  if (fills_device(blocks) || steps < 2 * kLeast) return 1;
  return static_cast<int>(std::min((wanted + blocks - 1) / blocks, steps / kLeast));
}

// Where share `index` of `count` begins.
__device__ __forceinline__ int share(int steps, int index, int count) {
  return static_cast<int>(int64_t{steps} * index / count);
}

// Lines of `Length` elements in chunks of 16 bytes, copied in `Count` pieces each: the threads' lines and places.
template <class T, class S, int Length, int Count>
struct LinePieces {
  static constexpr int kBytes = 16 / Count, kElements = kBytes / static_cast<int>(sizeof(T));
  static constexpr int kAcross = Length / kElements, kStep = S::kThreads / kAcross;  // a line's pieces, lines at once
  static_assert(S::kThreads % kAcross == 0);
  static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x) / kAcross; }
  static __device__ __forceinline__ int place() { return static_cast<int>(threadIdx.x) % kAcross * kElements; }
};

// Calls f with the arithmetic that computes this dtype.
template <class F>
void with_arithmetic(Dtype dtype, bool tf32, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: return tf32 ? f(Tf32{}) : f(Fp32{});
    case Dtype::kBFloat16: return f(Bf16{});
    case Dtype::kFloat16: return f(Fp16{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// The shares' sums of a product [rows, columns] of each group, [share][group][rows][pitch].
struct Partial {
  float* data;
  int splits, groups, rows, columns, pitch;

  static Partial take(Workspace& workspace, int splits, int groups, int rows, int columns) {
    const int pitch = (columns + 7) / 8 * 8;  // whole sectors
    return {static_cast<float*>(workspace.take(int64_t{4} * splits * groups * rows * pitch)),
            splits,
            groups,
            rows,
            columns,
            pitch};
  }
  __device__ __forceinline__ float* row(int split, int group, int row) const {
    return data + ((int64_t{split} * groups + group) * rows + row) * pitch;
  }
  // The shares added in their order: the same bits in every run.
  __device__ __forceinline__ Vector<float, 4> sum(int group, int row_, int column) const {
    Vector<float, 4> total = load_global<4>(row(0, group, row_) + column);
    for (int split = 1; split < splits; ++split) {
      const Vector<float, 4> share = load_global<4>(row(split, group, row_) + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += share[e];
    }
    return total;
  }
};

// The sums of a block's tile, a warp's part in registers.
template <class C, class S>
struct Sums {
  static constexpr int kRows = S::kWarpM / 16, kColumns = S::kWarpN / 16;
  float sums[kRows][kColumns][2][4] = {};

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / 32 / S::kWarpsN * S::kWarpM; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) / 32 % S::kWarpsN * S::kWarpN; }

  // += the product of steps [begin, end) of the depth. Of a Feed, copy(step) starts to bring a step's operands,
  // turn(step) makes it the one that a(i, k) and b(j, k) read at element k of its depth(): the warp's i-th 16 rows,
  // j-th 16 columns.
  template <class Feed>
  __device__ __forceinline__ void accumulate(int begin, int end, Feed& feed) {
#pragma unroll
    for (int ahead = 0; ahead < S::kStages - 1; ++ahead) {
      if (begin + ahead < end) feed.copy(begin + ahead);
      copy_async_commit();
    }
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      copy_async_wait<S::kStages - 2>();
      __syncthreads();  // this step is here, and nobody reads the one before it any more
      if (step + S::kStages - 1 < end) feed.copy(step + S::kStages - 1);
      copy_async_commit();
      feed.turn(step);
      multiply(feed);
    }
  }

  // Stores a share.
  __device__ __forceinline__ void store(const Partial& to, int split, int group, int row, int column) const {
    pairs([&](int r, int c, const Vector<float, 2>& pair) {
      if (row + r < to.rows && column + c < to.pitch) store_global(to.row(split, group, row + r) + column + c, pair);
    });
  }

  // Calls store(row, column, two sums) for every pair of neighbours in a row.
  template <class F>
  __device__ __forceinline__ void pairs(const F& store) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kColumns; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const d = sums[i][j / 2][j % 2] + 2 * half;
          store(row() + 16 * i + lane / 4 + 8 * half, column() + 8 * j + lane % 4 * 2, Vector<float, 2>{{d[0], d[1]}});
        }
      }
    }
  }

 private:
  template <class Feed>
  __device__ __forceinline__ void multiply(const Feed& feed) {
#pragma unroll
    for (int k = 0; k < kStageDepth<typename C::Storage>; k += kDepth<C>) {
      if (k >= feed.depth()) break;
      if constexpr (kRows < kColumns) {  // held are the fragments that are fewer
        Fragment<C> a[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) a[i] = feed.a(i, k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const Fragment<C> b = feed.b(j, k);
#pragma unroll
          for (int i = 0; i < kRows; ++i) fastnets::multiply<C>(sums[i][j][0], sums[i][j][1], a[i], b);
        }
      } else {
        Fragment<C> b[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) b[j] = feed.b(j, k);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const Fragment<C> a = feed.a(i, k);
#pragma unroll
          for (int j = 0; j < kColumns; ++j) fastnets::multiply<C>(sums[i][j][0], sums[i][j][1], a, b[j]);
        }
      }
    }
  }
};

// The tile that a block computes of tiles_m x tiles_n of them, in a share of a group's depth. Neighbouring blocks have
// rows in common.
struct Place {
  int row, column, group, split;

  template <class S>
  static __device__ __forceinline__ Place of(int tiles_m, int tiles_n, int groups) {
    int rest = blockIdx.x;
    Place p;
    p.column = rest % tiles_n * S::kN;
    rest /= tiles_n;
    p.row = rest % tiles_m * S::kM;
    rest /= tiles_m;
    p.group = rest % groups;
    p.split = rest / groups;
    return p;
  }
};

// Operands of a tile in a ring of stages, A's part of each before B's.
template <class S, class A, class B>
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(unsigned char* shared) : shared_(shared) {}
  __device__ __forceinline__ A a(int step) const { return A(shared_ + step % S::kStages * (A::kBytes + B::kBytes)); }
  __device__ __forceinline__ B b(int step) const { return B(a(step).data + A::kBytes); }

 private:
  static_assert(A::kBytes + B::kBytes == kProductBytes<S> / S::kStages);
  unsigned char* shared_;
};

}  // namespace fastnets::cuda

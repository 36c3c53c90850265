// What the convolution kernels share: geometry without divisions, operands laid out anew, the tiles of a product and
// the way of a tile of sums to the result.
//
// Products read operands whose channels are innermost and padded to whole chunks of 16 bytes: so they lie in a tensor
// whose channels do so already, and everything else is rearranged once (conv_layout.cu), read once and written once.
#pragma once

#define FASTNETS_ISA cuda
#include "../conv_axis.h"
#include "activation.h"
#include "launch.h"
#include "tile.h"

namespace fastnets::cuda {

constexpr int64_t kLimit = int64_t{1} << 31;

// Throws for a size that the kernels' 32-bit positions cannot hold.
inline int to_int(int64_t size, const char* what) {
  if (size >= kLimit) throw std::invalid_argument(std::string("the CUDA convolution takes fewer than 2^31 ") + what);
  return static_cast<int>(size);
}

// n / d of 0 <= n < 2^31 as a product: Granlund and Montgomery, "Division by invariant integers using multiplication",
// PLDI 1994, figure 4.1.
struct Divisor {
  uint32_t multiplier = 1, shift = 0;
  int by = 1;

  Divisor() = default;
  explicit Divisor(int d) : by(d) {
    while (int64_t{1} << shift < d) ++shift;
    multiplier = static_cast<uint32_t>((((int64_t{1} << shift) - d) << 32) / d + 1);
  }
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((__umulhi(n, multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
  // Leaves the remainder in n.
  __device__ __forceinline__ int divide(int& n) const {
    const int q = quotient(n);
    n -= q * by;
    return q;
  }
};

// A number as three coordinates, the last one fastest.
struct Coordinates {
  Divisor height, width;

  Coordinates() = default;
  Coordinates(int height, int width) : height(std::max(height, 1)), width(std::max(width, 1)) {}
  __device__ __forceinline__ void operator()(int n, int (&at)[3]) const {
    at[2] = n;
    at[1] = width.divide(at[2]);
    at[0] = height.divide(at[1]);
  }
};

// Where in the source the taps of a result are.
struct Window {
  Divisor positions;     // of the results of an image
  Coordinates at, taps;  // of a result's position, and of a tap
  int extent[3], pull[3], offset[3], tap_step[3];
  int64_t image, pixel[3];  // strides of the source

  // The place of a result's first tap, which may lie outside, and its position.
  __device__ __forceinline__ int64_t begin(int result, int (&from)[3]) const {
    int64_t place = positions.divide(result) * image;
    at(result, from);
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      from[d] = from[d] * pull[d] + offset[d];
      place += from[d] * pixel[d];
    }
    return place;
  }
  // How far a tap lies from the first one.
  __device__ __forceinline__ void tap(int index, int (&by)[3]) const {
    taps(index, by);
#pragma unroll
    for (int d = 0; d < 3; ++d) by[d] *= tap_step[d];
  }
  __device__ __forceinline__ int64_t moved(const int (&by)[3]) const {
    return by[0] * pixel[0] + by[1] * pixel[1] + by[2] * pixel[2];
  }
  __device__ __forceinline__ bool inside(const int (&from)[3], const int (&by)[3]) const {
    bool all = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) all = all && static_cast<unsigned>(from[d] + by[d]) < static_cast<unsigned>(extent[d]);
    return all;
  }
};

// Throws for sizes that 32-bit positions cannot hold; those beyond the source on either side count, too.
inline Window window_of(const Axis (&axes)[3], const int64_t (&pixel)[3], int64_t image) {
  Window w{};
  for (int d = 0; d < 3; ++d) {
    const Axis& axis = axes[d];
    const int64_t last = std::max(axis.extent, axis.count * axis.pull) + axis.span();
    if (last - std::min<int64_t>(axis.offset, 0) >= kLimit / 4) {
      throw std::invalid_argument("the CUDA convolution takes fewer than 2^29 positions along a dimension");
    }
    w.extent[d] = static_cast<int>(axis.extent), w.pull[d] = static_cast<int>(axis.pull);
    w.offset[d] = static_cast<int>(axis.offset), w.tap_step[d] = static_cast<int>(axis.offset_step);
    w.pixel[d] = pixel[d];
  }
  w.image = image;
  const int64_t positions = axes[0].count * axes[1].count * axes[2].count;
  w.positions = Divisor(std::max(to_int(positions, "positions in an image"), 1));
  w.at = Coordinates(static_cast<int>(axes[1].count), static_cast<int>(axes[2].count));
  w.taps = Coordinates(static_cast<int>(axes[1].taps), static_cast<int>(axes[2].taps));
  return w;
}

// ---- layout --------------------------------------------------------------------------------------------------------

// Rearranges `outer` times `inner` matrices: element [p][c] of `from` goes to row p of `to`, with zeros from `channels`
// to `padded`.
struct Layout {
  const void* from;
  void* to;
  int outer, inner, pixels, channels, padded;
  int64_t from_outer, from_inner, from_pixel[3], from_channel;
  int64_t to_outer, to_inner, to_pixel;
  Coordinates at;       // of a pixel
  bool channels_first;  // neighbouring channels lie closer in `from` than neighbouring pixels
};

void arrange(Dtype dtype, const Layout& p, Stream stream);

template <class T>
int64_t padded(int64_t channels) {
  return (channels + kChunk<T> - 1) / kChunk<T> * kChunk<T>;
}

// Hands out the workspace; without one it counts the bytes that it would have to have, and nothing is launched.
class Workspace {
 public:
  Workspace() : counts_(true) {}
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  void* take(int64_t bytes) {
    void* const place = counts_ ? nullptr : memory_ + taken_;
    taken_ += (bytes + 255) / 256 * 256;
    return place;
  }
  bool counts() const { return counts_; }
  size_t taken() const { return taken_; }

 private:
  char* memory_ = nullptr;
  bool counts_ = false;
  int64_t taken_ = 0;
};

// A tensor [batch, pixels, groups, channels] as the products read it.
template <class T>
struct Operand {
  const T* data;
  int channels;  // of a group, padded
  int64_t pixel, image;
};

// The tensor itself, or a copy in the workspace.
template <class T>
Operand<T> operand_of(const void* data, const ConvShape& s, int64_t channels, const int64_t* sizes,
                      Workspace& workspace, Stream stream) {
  const int64_t pixels = sizes[0] * sizes[1] * sizes[2], width = padded<T>(channels);
  const bool innermost = s.channels_last || pixels == 1;
  const Operand<T> found{static_cast<const T*>(data), static_cast<int>(width), s.groups * width,
                         s.groups * width * pixels};
  if (innermost && width == channels && reinterpret_cast<uintptr_t>(data) % 16 == 0) return found;
  void* const memory = workspace.take(s.batch * found.image * sizeof(T));
  Operand<T> copy = found;
  copy.data = static_cast<const T*>(memory);
  if (workspace.counts()) return copy;
  Layout p{};
  p.from = data, p.to = memory;
  p.outer = to_int(s.batch, "images"), p.inner = to_int(s.groups, "groups"), p.pixels = to_int(pixels, "positions");
  p.channels = static_cast<int>(channels), p.padded = found.channels;
  p.from_outer = s.groups * channels * pixels, p.from_inner = innermost ? channels : channels * pixels;
  p.from_pixel[2] = innermost ? s.groups * channels : 1, p.from_channel = innermost ? 1 : pixels;
  p.to_outer = found.image, p.to_inner = width, p.to_pixel = found.pixel;
  p.at = Coordinates(1, p.pixels);
  p.channels_first = innermost;
  arrange(s.dtype, p, stream);
  return copy;
}

// ---- tiles ---------------------------------------------------------------------------------------------------------

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

// The tile table. All entries fit the 99 KB of 8.6, 8.9 and 12.0; larger ones would gain bytes that the L2 cache
// serves and lose the only ones that run everywhere. Loads of shared memory a product: (1 / warp rows + 1 / warp
// columns), so 64 x 32 is 1.5 times as dense as 32 x 32.
//  - kWide: many results in both directions. 96 KB, one block of 8 warps a multiprocessor, 64 sums a thread.
//  - kTall: up to 32 result channels, of which wider tiles would compute zeros. 60 KB: one block on 8.6, two on 8.0.
//  - kSmall: the rest: few results, where waves of kWide would leave multiprocessors idle. 48 KB: two blocks on 8.6,
//    three on 8.0, four on 9.0.
using Wide = Shape<128, 128, 2, 4, 3, 1>;
using Tall = Shape<128, 32, 4, 1, 3, 2>;
using Small = Shape<64, 64, 2, 2, 3, 3>;
constexpr int64_t kBlocksWanted = 132;  // about as many as an A100 (108), H100 (132), B200 (148) or RTX 5090 (170) has

// Calls f with the shape for `rows` x `columns` results, `batch` times.
template <class F>
auto with_shape(int64_t rows, int64_t columns, int64_t batch, F&& f) {
  const auto tiles = [&](int64_t m, int64_t n) { return (rows + m - 1) / m * ((columns + n - 1) / n) * batch; };
  if (columns <= Tall::kN && tiles(Tall::kM, Tall::kN) >= kBlocksWanted) return f(Tall{});
  if (columns > Small::kN && tiles(Wide::kM, Wide::kN) >= kBlocksWanted) return f(Wide{});
  return f(Small{});
}

// Into how many shares the depth is cut where the tiles alone would not fill the device: each of at least four stages.
inline int splits_for(int64_t blocks, int64_t steps) {
  constexpr int64_t kLeast = 4;
  if (blocks >= kBlocksWanted || steps < 2 * kLeast) return 1;
  return static_cast<int>(std::min((kBlocksWanted + blocks - 1) / blocks, steps / kLeast));
}

// Where share `index` of `count` begins.
__device__ __forceinline__ int share(int steps, int index, int count) {
  return static_cast<int>(int64_t{steps} * index / count);
}

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
    const int pitch = (columns + 3) / 4 * 4;
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

  // += A B over one stage.
  template <class ReadA, class ReadB>
  __device__ __forceinline__ void multiply(const ReadA& read_a, const ReadB& read_b) {
#pragma unroll
    for (int k = 0; k < kStageDepth<typename C::Storage>; k += kDepth<C>) {
      Fragment<C> b[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) b[j] = read_b(column() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Fragment<C> a = read_a(row() + 16 * i, k);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) fastnets::multiply<C>(sums[i][j][0], sums[i][j][1], a, b[j]);
      }
    }
  }

  // The product of steps [begin, end): copy(step, a, b) starts to bring a stage, read_a(a, row, depth) and read_b read
  // it.
  template <class A, class B, class Copy, class ReadA, class ReadB>
  __device__ __forceinline__ void accumulate(unsigned char* shared, int begin, int end, const Copy& copy,
                                             const ReadA& read_a, const ReadB& read_b) {
    const auto a_of = [&](int stage) { return A(shared + stage % S::kStages * (A::kBytes + B::kBytes)); };
    const auto b_of = [&](int stage) { return B(a_of(stage).data + A::kBytes); };
    static_assert(A::kBytes + B::kBytes == kProductBytes<S> / S::kStages);
#pragma unroll
    for (int stage = 0; stage < S::kStages - 1; ++stage) {
      if (begin + stage < end) copy(begin + stage, a_of(stage), b_of(stage));
      copy_async_commit();
    }
#pragma unroll 1
    for (int stage = 0; begin + stage < end; ++stage) {
      copy_async_wait<S::kStages - 2>();
      __syncthreads();  // this stage is here, and nobody reads the one before it any more
      const int ahead = stage + S::kStages - 1;
      if (begin + ahead < end) copy(begin + ahead, a_of(ahead), b_of(ahead));
      copy_async_commit();
      const A a = a_of(stage);
      const B b = b_of(stage);
      multiply([&](int row, int k) { return read_a(a, row, k); },
               [&](int column, int k) { return read_b(b, column, k); });
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
};

}  // namespace fastnets::cuda

// Convolution backwards to its weight: implicit GEMM whose rows are the result's channels, whose columns are taps and
// source channels, and whose depth are the pixels of all images. Few results of a long sum: the depth is shared out,
// and the shares are added in their order, so that every run gives the same bits.
#include "conv_output.h"

namespace fastnets::cuda {
namespace {

struct Weight {
  const void *grad, *x;                              // Operands
  Partial partial;                                   // [out channels, taps * channels padded] of each group
  int first_split, splits, steps, tiles_m, tiles_n;  // of this launch
  int pixels;                                        // of the images of this launch
  int grad_channels, channels;                       // of a group, padded
  int64_t grad_pixel;
  Divisor tap_channels;
  Window window;  // of x
};

// Copies pixels `step * kDepth` and following: of the gradient, and of x at the taps. A thread has the same channels of
// the same tap for several pixels.
template <class C, class S>
class WeightCopy {
  using T = typename C::Storage;
  static constexpr int kDepth = kStageDepth<T>;
  static constexpr int kChunksA = S::kM / kChunk<T>, kChunksB = S::kN / kChunk<T>;
  static constexpr int kStepA = S::kThreads / kChunksA, kStepB = S::kThreads / kChunksB;
  static_assert(S::kThreads % kChunksA == 0 && S::kThreads % kChunksB == 0);
  static_assert(kDepth % kStepA == 0 && kDepth % kStepB == 0);

 public:
  using A = Tile<T, kDepth, S::kM>;
  using B = Tile<T, kDepth, S::kN>;

  __device__ __forceinline__ WeightCopy(const Weight& p, int row, int column, int group) : p_(p) {
    const int k = row + place_a() * kChunk<T>, n = column + place_b() * kChunk<T>;
    has_a_ = k < p.grad_channels;
    grad_ = static_cast<const T*>(p.grad) + static_cast<int64_t>(group) * p.grad_channels + k;
    has_b_ = n < p.partial.columns;
    int channel = n;
    p.window.tap(p.tap_channels.divide(channel), tap_);
    x_ = static_cast<const T*>(p.x) + static_cast<int64_t>(group) * p.channels + channel + p.window.moved(tap_);
  }

  __device__ __forceinline__ void operator()(int step, A a, B b) const {
#pragma unroll
    for (int i = 0; i < kDepth / kStepA; ++i) {
      const int line = line_a() + i * kStepA, m = step * kDepth + line;
      const bool inside = has_a_ && m < p_.pixels;
      copy_async<16>(a.at(line, place_a() * kChunk<T>),
                     inside ? grad_ + m * p_.grad_pixel : static_cast<const T*>(p_.grad), inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kDepth / kStepB; ++i) {
      const int line = line_b() + i * kStepB;
      const int m = step * kDepth + line;
      int at[3];
      const int64_t place = p_.window.begin(m < p_.pixels ? m : 0, at);
      const bool inside = has_b_ && m < p_.pixels && p_.window.inside(at, tap_);
      copy_async<16>(b.at(line, place_b() * kChunk<T>), inside ? x_ + place : static_cast<const T*>(p_.x),
                     inside ? 16 : 0);
    }
  }

 private:
  static __device__ __forceinline__ int line_a() { return static_cast<int>(threadIdx.x) / kChunksA; }
  static __device__ __forceinline__ int place_a() { return static_cast<int>(threadIdx.x) % kChunksA; }
  static __device__ __forceinline__ int line_b() { return static_cast<int>(threadIdx.x) / kChunksB; }
  static __device__ __forceinline__ int place_b() { return static_cast<int>(threadIdx.x) % kChunksB; }

  const Weight& p_;
  const T *grad_, *x_;
  bool has_a_, has_b_;
  int tap_[3];
};

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_weight(Weight p) {
  using Copy = WeightCopy<C, S>;
  using A = typename Copy::A;
  using B = typename Copy::B;
  DYNAMIC_SHARED(shared);
  int rest = blockIdx.x;
  const int column = rest % p.tiles_n * S::kN;
  rest /= p.tiles_n;
  const int row = rest % p.tiles_m * S::kM;
  rest /= p.tiles_m;
  const int group = rest % p.partial.groups, split = rest / p.partial.groups;
  const Copy copy(p, row, column, group);
  const Reader<C, A, Side::kA, true> read_a;
  const Reader<C, B, Side::kB, true> read_b;
  Sums<C, S> sums;
  sums.template accumulate<A, B>(
      shared, share(p.steps, split, p.splits), share(p.steps, split + 1, p.splits), copy,
      [&](A a, int r, int k) { return read_a(a, k, r); }, [&](B b, int c, int k) { return read_b(b, k, c); });
  sums.store(p.partial, p.first_split + split, group, row, column);
}

// Where the results go: rows of all groups, taps and channels through the weight's strides.
struct Target {
  void* data;
  int64_t row, channel, tap[3];
  int channels, padded;  // of a group
  Divisor tap_count;
  Coordinates taps;
};

constexpr int kThreads = 256, kTile = 32;

// Adds the shares. A block has a tile of kTile taps of rows by kTile channels, read along channels, written along taps
// where these lie closer.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) conv_weight_shares(Partial partial, Target to, int lines) {
  SHARED_ARRAY(float, tile, kTile*(kTile + 1));
  const int across = (to.channels + kTile - 1) / kTile;
  const int line = static_cast<int>(blockIdx.x) / across * kTile,
            channel = static_cast<int>(blockIdx.x) % across * kTile;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int y = i / kTile, x = i % kTile;
    int tap = line + y;
    const int row = to.tap_count.divide(tap);
    float sum = 0.0f;
    for (int split = 0; split < partial.splits; ++split) {
      sum += load_global_if<1>(line + y < lines && channel + x < to.channels,
                               partial.row(split, 0, row) + tap * to.padded + channel + x)[0];
    }
    store_shared(&tile[y * (kTile + 1) + x], sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int y = to.channel == 1 ? i / kTile : i % kTile, x = to.channel == 1 ? i % kTile : i / kTile;
    int tap = line + y, at[3];
    const int row = to.tap_count.divide(tap);
    to.taps(tap, at);
    if (line + y < lines && channel + x < to.channels) {
      store_global(static_cast<T*>(to.data) + row * to.row + (channel + x) * to.channel + at[0] * to.tap[0] +
                       at[1] * to.tap[1] + at[2] * to.tap[2],
                   from_float<T>(load_shared(&tile[y * (kTile + 1) + x])));
    }
  }
}

template <class C>
void grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  using T = typename C::Storage;
  const ConvShape& s = p.shape;
  const auto grad = operand_of<T>(p.grad, s, s.out_channels, s.out, workspace, stream);
  const auto x = operand_of<T>(p.x, s, s.in_channels, s.in, workspace, stream);
  const int64_t positions = s.out[0] * s.out[1] * s.out[2], taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  Weight w{};
  w.grad = grad.data, w.x = x.data;
  w.grad_channels = grad.channels, w.channels = x.channels;
  w.grad_pixel = grad.pixel;
  w.tap_channels = Divisor(x.channels);
  w.window = window_of({forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}, strides_of(true, x.pixel, s.in).at,
                       x.image);
  const int rows = static_cast<int>(s.out_channels), columns = to_int(taps * x.channels, "elements of a filter");

  // As many images a launch as 32 bits can number the pixels of. The shares fill the device whatever the tiles are.
  const int64_t together = std::min(s.batch, (kLimit - 1) / std::max<int64_t>(positions, 1));
  const int64_t launches = together == 0 ? 1 : (s.batch + together - 1) / together;
  with_shape(rows, columns, s.groups * kBlocksWanted, [&](auto shape) {
    using S = decltype(shape);
    w.tiles_m = (rows + S::kM - 1) / S::kM, w.tiles_n = (columns + S::kN - 1) / S::kN;
    const int64_t tiles = int64_t{w.tiles_m} * w.tiles_n * s.groups;
    const int64_t steps = (together * positions + kStageDepth<T> - 1) / kStageDepth<T>;
    w.splits = splits_for(tiles, steps);
    w.partial =
        Partial::take(workspace, static_cast<int>(launches * w.splits), to_int(s.groups, "groups"), rows, columns);
    if (workspace.counts()) return;
    for (int64_t i = 0; i < launches; ++i) {
      w.pixels = static_cast<int>(std::min(together, s.batch - i * together) * positions);
      w.steps = (w.pixels + kStageDepth<T> - 1) / kStageDepth<T>;
      w.first_split = static_cast<int>(i * w.splits);
      launch({"conv_grad_weight", static_cast<unsigned>(to_int(tiles * w.splits, "blocks")), S::kThreads, stream,
              kProductBytes<S>},
             conv_weight<C, S>, w);
      w.grad = static_cast<const T*>(w.grad) + together * grad.image;
      w.x = static_cast<const T*>(w.x) + together * x.image;
    }
  });
  if (workspace.counts()) return;
  Target to{};
  to.data = p.grad_weight, to.row = s.weight_strides[0], to.channel = s.weight_strides[1];
  for (int d = 0; d < 3; ++d) to.tap[d] = s.weight_strides[2 + d];
  to.channels = static_cast<int>(s.in_channels), to.padded = x.channels;
  to.tap_count = Divisor(static_cast<int>(taps)), to.taps = w.window.taps;
  const int lines = to_int(s.groups * rows * taps, "filters' taps");
  const int64_t tiles = (int64_t{lines} + kTile - 1) / kTile * ((s.in_channels + kTile - 1) / kTile);
  launch({"conv_grad_weight_shares", static_cast<unsigned>(to_int(tiles, "blocks")), kThreads, stream},
         conv_weight_shares<T>, w.partial, to, lines);
}

void grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  if (is_depthwise(p.shape)) return depthwise_grad_weight(p, workspace, stream);
  with_arithmetic(p.shape.dtype, p.shape.tf32,
                  [&](auto arithmetic) { grad_weight<decltype(arithmetic)>(p, workspace, stream); });
}

}  // namespace

size_t conv_grad_weight_workspace(const ConvGradWeight& p) {
  Workspace workspace;
  grad_weight(p, workspace, nullptr);
  return workspace.taken();
}

void conv_grad_weight(const ConvGradWeight& p, void* memory, Stream stream) {
  Workspace workspace(memory);
  grad_weight(p, workspace, stream);
}

}  // namespace fastnets::cuda

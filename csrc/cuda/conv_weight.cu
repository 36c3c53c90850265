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

// Where a group's results go: tap and channel through the weight's strides.
struct Target {
  void* data;
  int64_t row, group, channel, tap[3];
  int channels;
  Divisor tap_channels;
  Coordinates taps;
};

constexpr int kThreads = 256;

// Adds the shares; a thread has four neighbouring channels.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_weight_shares(Partial partial, Target to) {
  const int quads = partial.pitch / 4;
  const int64_t count = int64_t{quads} * partial.rows * partial.groups;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const int column = static_cast<int>(i % quads) * 4;
    const int row = static_cast<int>(i / quads % partial.rows), group = static_cast<int>(i / quads / partial.rows);
    const Vector<float, 4> total = partial.sum(group, row, column);
    int channel = column, tap[3];
    to.taps(to.tap_channels.divide(channel), tap);
    T* const at = static_cast<T*>(to.data) + group * to.group + row * to.row + channel * to.channel +
                  tap[0] * to.tap[0] + tap[1] * to.tap[1] + tap[2] * to.tap[2];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (channel + e < to.channels) store_global(at + e * to.channel, from_float<T>(total[e]));
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
  Target to{p.grad_weight,
            s.weight_strides[0],
            s.out_channels * s.weight_strides[0],
            s.weight_strides[1],
            {},
            static_cast<int>(s.in_channels),
            w.tap_channels,
            w.window.taps};
  for (int d = 0; d < 3; ++d) to.tap[d] = s.weight_strides[2 + d];
  const int64_t quads = int64_t{w.partial.pitch} / 4 * rows * s.groups;
  launch({"conv_grad_weight_shares", blocks_for((quads + kThreads - 1) / kThreads), kThreads, stream},
         conv_weight_shares<T>, w.partial, to);
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

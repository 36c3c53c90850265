// The weight's gradient of a convolution of few source channels: implicit GEMM whose columns are the packed axis of
// taps and channels, and whose depth are tiles of results. The gradient comes as in conv_weight.cu, x as the tile's
// patch, from which each result's row of the packed axis is spread out.
#include "conv_few.h"
#include "conv_weight.h"

namespace fastnets::cuda {
namespace {

struct FewWeight : WeightPass {  // of an Operand, and of the tensor x itself
  Patch patch;
  int64_t group;  // stride of x
};

template <class C, class S>
class FewWeightFeed {
  using T = typename C::Storage;
  static constexpr int kDepth = kStageDepth<T>, kWarps = S::kThreads / 32;
  using A = Tile<T, kDepth, S::kM>;
  using B = Tile<T, kDepth, S::kN>;
  using Results = FewTile<T, kDepth>;
  static constexpr int kChunksA = S::kM / kChunk<T>, kStepA = S::kThreads / kChunksA;
  static constexpr int kEach = 4 / static_cast<int>(sizeof(T)), kTurns = (S::kN + 32 * kEach - 1) / (32 * kEach);
  static_assert(S::kThreads % kChunksA == 0 && kDepth % kStepA == 0 && S::kN % kEach == 0);

 public:
  // Of shared memory: the packed rows, the stages of the gradient, those of patches.
  static int64_t bytes(const Patch& p) { return B::kBytes + S::kStages * (A::kBytes + patch_bytes<T>(p)); }

  __device__ __forceinline__ FewWeightFeed(const FewWeight& p, unsigned char* shared, const Place& at)
      : p_(p), shared_(shared), a_(nullptr) {
    const int k = at.row + static_cast<int>(threadIdx.x) % kChunksA * kChunk<T>;
    has_a_ = k < p.grad_channels;
    grad_ = static_cast<const T*>(p.grad) + static_cast<int64_t>(at.group) * p.grad_channels + k;
    x_ = static_cast<const T*>(p.x) + at.group * p.group;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int n = at.column + column(i) + e, first = at.column + i * 32 * kEach + e, last = p.partial.columns - 1;
        places_[i][e] = n <= last ? Results::place(p.patch, n) : ~Results::place(p.patch, min(first, last));
      }
    }
  }

  __device__ __forceinline__ void copy(int step) const {
    const Results results(p_.patch, step);
    const A a = a_of(step);
    const int chunk = static_cast<int>(threadIdx.x) % kChunksA;
#pragma unroll
    for (int i = 0; i < kDepth / kStepA; ++i) {
      const int line = static_cast<int>(threadIdx.x) / kChunksA + i * kStepA, m = results.result(line);
      const bool inside = has_a_ && m >= 0;
      copy_async<16>(a.at(line, chunk * kChunk<T>), inside ? grad_ + m * p_.grad_pixel : static_cast<const T*>(p_.grad),
                     inside ? 16 : 0);
    }
    results.template load<S::kThreads>(patch(step), x_);
  }

  // Spreads out the step's results; of those that do not exist the rows are zeros, for x may be infinite there.
  __device__ __forceinline__ void turn(int step) {
    const Results results(p_.patch, step);
    constexpr int kWhole = S::kN / (32 * kEach);
    spread<0, kWhole>(results, patch(step));
    if (kWhole < kTurns && column(kWhole) < S::kN) spread<kWhole, kTurns>(results, patch(step));
    __syncthreads();
    a_ = a_of(step);
  }

  static constexpr __device__ __forceinline__ int depth() { return kDepth; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, k, Sums<C, S>::row() + 16 * i); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const {
    return read_b_(B(shared_), k, Sums<C, S>::column() + 16 * j);
  }

 private:
  // Elements of the packed axis: those of these turns, in all rows of a warp.
  template <int Begin, int End>
  __device__ __forceinline__ void spread(const Results& results, const T* from) const {
    const B b(shared_);
#pragma unroll 1
    for (int r = threadIdx.x / 32; r < kDepth; r += kWarps) {
      const bool exists = results.result(r) >= 0;
      const int first = Results::place_of(p_.patch, r);
#pragma unroll
      for (int i = Begin; i < End; ++i) {
        Vector<T, kEach> values;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int place = places_[i][e];
          const T value = load_shared(from + first + (place < 0 ? ~place : place));
          values[e] = exists && place >= 0 ? value : from_float<T>(0.0f);
        }
        store_shared(b.at(r, column(i)), values);
      }
    }
  }
  static __device__ __forceinline__ int column(int i) { return (i * 32 + static_cast<int>(threadIdx.x) % 32) * kEach; }
  __device__ __forceinline__ A a_of(int step) const { return A(shared_ + B::kBytes + step % S::kStages * A::kBytes); }
  __device__ __forceinline__ T* patch(int step) const {
    return reinterpret_cast<T*>(shared_ + B::kBytes + S::kStages * A::kBytes) +
           step % S::kStages * static_cast<int>(p_.patch.elements);
  }

  const FewWeight& p_;
  unsigned char* shared_;
  const T *grad_, *x_;
  bool has_a_;
  int places_[kTurns][kEach];  // behind the last column, ~ of what the first lane reads
  A a_;
  Reader<C, A, Side::kA, true> read_a_;
  Reader<C, B, Side::kB, true> read_b_;
};

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_few_weight(FewWeight p) {
  DYNAMIC_SHARED(shared);
  const Place at = Place::of<S>(p.tiles_m, p.tiles_n, p.partial.groups);
  FewWeightFeed<C, S> feed(p, shared, at);
  Sums<C, S> sums;
  sums.accumulate(share(p.steps, at.split, p.splits), share(p.steps, at.split + 1, p.splits), feed);
  sums.store(p.partial, p.first_split + at.split, at.group, at.row, at.column);
}

template <class C>
std::optional<WeightShares> shares(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  using T = typename C::Storage;
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const Strides strides = strides_of(s.channels_last, s.groups * s.in_channels, s.in);
  const int channels = static_cast<int>(s.in_channels);
  const int taps = static_cast<int>(s.kernel[0] * s.kernel[1] * s.kernel[2]), columns = taps * channels;
  std::optional<WeightShares> found;
  with_few_weight(columns, [&](auto shape) {
    using S = decltype(shape);
    FewWeight w{};
    w.patch = patch_of<T>(axes, strides, s.groups * s.in_channels * s.in[0] * s.in[1] * s.in[2], s.in_channels,
                          kStageDepth<T>);
    const int64_t bytes = FewWeightFeed<C, S>::bytes(w.patch);
    if (bytes > static_cast<int64_t>(shared_limit())) return;
    const auto grad = operand_of<T>(p.grad, s, s.out_channels, s.out, workspace, stream);
    w.grad = grad.data, w.grad_channels = grad.channels, w.grad_pixel = grad.pixel;
    w.x = p.x, w.group = s.in_channels * strides.channel;
    const int64_t positions = s.out[0] * s.out[1] * s.out[2];
    const auto steps_of = [&](int64_t images) {
      return images * s.out[0] * w.patch.tiles.height.by * w.patch.tiles.width.by;
    };
    const unsigned blocks =
        w.divide<S>(workspace, s, columns, (columns + S::kN - 1) / S::kN, steps_of(images_together(s)));
    found = is_innermost(strides) ? WeightShares{w.partial, channels, 1} : WeightShares{w.partial, 1, taps};
    if (workspace.counts()) return;
    w.template for_launches<T>(s, grad.image, w.patch.window.image, [&](int64_t images) {
      w.steps = positions == 0 ? 0 : to_int(steps_of(images), "tiles");
      launch({"conv_grad_weight", blocks, S::kThreads, stream, static_cast<size_t>(bytes)}, conv_few_weight<C, S>, w);
    });
  });
  return found;
}

}  // namespace

std::optional<WeightShares> few_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  if (s.in_channels > kFewChannels || s.kernel[0] * s.kernel[1] * s.kernel[2] * s.in_channels > kFewDepth) return {};
  std::optional<WeightShares> found;
  with_arithmetic(s.dtype, s.tf32,
                  [&](auto arithmetic) { found = shares<decltype(arithmetic)>(p, workspace, stream); });
  return found;
}

}  // namespace fastnets::cuda

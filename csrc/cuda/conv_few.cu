// Convolution of few source channels, forwards and backwards to the input: implicit GEMM whose depth is the packed axis
// of taps and channels. A block keeps its part of the weight and takes one tile of results after the other; each is
// spread out from its patch to rows of the packed axis in shared memory.
#include "conv_few.h"
#include "conv_gather.h"

namespace fastnets::cuda {
namespace {

struct Few {
  Patch patch;
  Output output;
  const void *source, *weight;  // the tensors themselves
  int64_t group;                // stride of the source
  int64_t weight_group, weight_column, weight_channel, weight_tap[3];
  int groups, tiles, tiles_n, steps;
};

template <class C, class S>
class FewFeed {
  using T = typename C::Storage;
  using A = Tile<T, S::kM, kStageDepth<T>>;
  using B = Tile<T, S::kN, kStageDepth<T>>;
  static constexpr int kDepth = kStageDepth<T>, kEach = kDepth / 32, kWarps = S::kThreads / 32;

 public:
  // Shared memory: the weight, two stages of A where the tile of sums lies later, the patch.
  static constexpr int kFinish = std::max(2 * A::kBytes, (Finish<T, S>::kBytes + 127) / 128 * 128);
  static int64_t bytes(const Patch& p, int steps) { return int64_t{steps} * B::kBytes + kFinish + patch_bytes<T>(p); }

  __device__ __forceinline__ FewFeed(const Few& p, unsigned char* shared)
      : p_(p), shared_(shared), a_(nullptr), b_(nullptr) {}

  __device__ __forceinline__ unsigned char* sums() const { return shared_ + p_.steps * B::kBytes; }
  __device__ __forceinline__ T* patch() const { return reinterpret_cast<T*>(sums() + kFinish); }

  // The block's part of the weight, zeros where the depth ends.
  __device__ __forceinline__ void load_weight(int group, int column) const {
    const T* const from = static_cast<const T*>(p_.weight) + group * p_.weight_group;
    const int across = p_.steps * kDepth;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kN * across; i += S::kThreads) {
      const int n = i / across, k = i - n * across;
      int tap[3];
      const int channel = element(p_.patch, k, tap);
      const int64_t place = (column + n) * p_.weight_column + channel * p_.weight_channel + tap[0] * p_.weight_tap[0] +
                            tap[1] * p_.weight_tap[1] + tap[2] * p_.weight_tap[2];
      const bool inside = k < p_.patch.depth && column + n < p_.output.columns;
      store_shared(b_of(k / kDepth).at(n, k % kDepth), load_global_if<1>(inside, from + place)[0]);
    }
  }

  // Spreads out the step's part of the depth: a lane has the same elements of it for every row of its warp. Behind the
  // last one lanes read what the first lane reads.
  __device__ __forceinline__ void copy(int step) const {
    const A a = a_of(step);
    const int lane = threadIdx.x % 32 * kEach;
    int places[kEach];
    bool inside[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int k = step * kDepth + lane + e;
      inside[e] = k < p_.patch.depth;
      places[e] = FewTile<T, S::kM>::place(p_.patch, inside[e] ? k : min(step * kDepth + e, p_.patch.depth - 1));
    }
    for (int r = threadIdx.x / 32; r < S::kM; r += kWarps) {
      const T* const first = patch() + FewTile<T, S::kM>::place_of(p_.patch, r);
      Vector<T, kEach> values;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const T value = load_shared(first + places[e]);
        values[e] = inside[e] ? value : from_float<T>(0.0f);
      }
      store_shared(a.at(r, lane), values);
    }
  }

  __device__ __forceinline__ void turn(int step) {
    a_ = a_of(step), b_ = b_of(step);
    depth_ = p_.patch.depth - step * kDepth;
  }
  __device__ __forceinline__ int depth() const { return depth_; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, Sums<C, S>::row() + 16 * i, k); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, Sums<C, S>::column() + 16 * j, k); }

 private:
  __device__ __forceinline__ A a_of(int step) const { return A(sums() + step % 2 * A::kBytes); }
  __device__ __forceinline__ B b_of(int step) const { return B(shared_ + step * B::kBytes); }

  const Few& p_;
  unsigned char* shared_;
  int depth_ = 0;
  A a_;
  B b_;
  Reader<C, A, Side::kA> read_a_;
  Reader<C, B, Side::kB> read_b_;
};

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_few(Few p) {
  using T = typename C::Storage;
  DYNAMIC_SHARED(shared);
  int rest = blockIdx.x;
  const int column = rest % p.tiles_n * S::kN;
  rest /= p.tiles_n;
  const int group = rest % p.groups;
  FewFeed<C, S> feed(p, shared);
  feed.load_weight(group, column);
  for (int tile = rest / p.groups; tile < p.tiles; tile += static_cast<int>(gridDim.x) / p.tiles_n / p.groups) {
    const FewTile<T, S::kM> results(p.patch, tile);
    results.template load<S::kThreads>(feed.patch(), static_cast<const T*>(p.source) + group * p.group);
    __syncthreads();  // the patch is here, and the former tile's sums are gone
    Sums<C, S> sums;
    sums.accumulate(0, p.steps, feed);
    __syncthreads();  // the stages' memory becomes the tile's
    const Finish<T, S> finish(p.output, feed.sums(), column, group, [&](int r) { return results.result(r); });
    sums.pairs([&](int r, int c, const Vector<float, 2>& pair) { finish.put(r, c, pair); });
    finish();
  }
}

}  // namespace

bool gather_few(const Phase& phase, const ConvGather& p, const char* name, bool counts, Stream stream) {
  const ConvShape& s = p.shape;
  if (phase.taps() == 0 || phase.source_channels > kFewChannels || phase.taps() * phase.source_channels > kFewDepth)
    return false;
  bool fits = false;
  with_arithmetic(s.dtype, s.tf32, [&](auto arithmetic) {
    using C = decltype(arithmetic);
    using T = typename C::Storage;
    with_few(phase.channels, [&](auto shape) {
      using S = decltype(shape);
      const int64_t pixels = phase.source_sizes[0] * phase.source_sizes[1] * phase.source_sizes[2];
      const int64_t source_channels = s.groups * phase.source_channels;
      const Strides strides = strides_of(s.channels_last, source_channels, phase.source_sizes);
      Few f{};
      f.patch = patch_of<T>(phase.axes, strides, source_channels * pixels, phase.source_channels, S::kM);
      f.steps = (f.patch.depth + kStageDepth<T> - 1) / kStageDepth<T>;
      const int64_t bytes = FewFeed<C, S>::bytes(f.patch, f.steps);
      fits = bytes <= static_cast<int64_t>(shared_limit());
      if (!fits || counts) return;
      f.output = output_of(phase, p, sizeof(T));
      f.output.wide = f.output.wide && (f.output.innermost || phase.axes[2].count % 4 == 0);
      f.source = p.source, f.group = phase.source_channels * strides.channel;
      f.groups = to_int(s.groups, "groups");
      f.weight_group = s.out_channels * s.weight_strides[0];
      f.weight_column = phase.result_stride, f.weight_channel = phase.source_stride;
      int64_t first = 0;
      for (int d = 0; d < 3; ++d) {
        first += phase.axes[d].tap * s.weight_strides[2 + d];
        f.weight_tap[d] = phase.axes[d].tap_step * s.weight_strides[2 + d];
      }
      f.weight = static_cast<const T*>(p.weight) + first;
      f.tiles_n = static_cast<int>((phase.channels + S::kN - 1) / S::kN);
      const int64_t planes = phase.axes[0].count, together = images_together(phase, s.batch);
      for (int64_t image = 0; image < s.batch; image += together) {
        const int64_t images = std::min(together, s.batch - image);
        f.output.rows = static_cast<int>(images * phase.positions());
        const int64_t tiles = images * planes * f.patch.tiles.height.by * f.patch.tiles.width.by;
        f.tiles = to_int(tiles, "tiles");
        const int64_t columns = int64_t{f.tiles_n} * f.groups;
        const int64_t blocks =
            columns * std::min<int64_t>(tiles, (S::kBlocks * multiprocessors() + columns - 1) / columns);
        launch({name, static_cast<unsigned>(to_int(blocks, "blocks")), S::kThreads, stream, static_cast<size_t>(bytes)},
               conv_few<C, S>, f);
        f.source = static_cast<const T*>(f.source) + together * f.patch.window.image;
        f.output.first += together * f.output.image;
      }
    });
  });
  return fits;
}

}  // namespace fastnets::cuda

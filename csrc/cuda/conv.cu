// Convolution forwards, and backwards to its input: implicit GEMM. Rows are the pixels of the results, columns their
// channels, the depth runs over taps and, in each, over the source's channels in chunks of 16 bytes. A thread copies
// the same chunk of the depth for several rows, so that what a tap adds to a row's place is found once for all of them.
#include "conv_output.h"

namespace fastnets::cuda {
namespace {

// One phase: results whose taps are the same (see conv_axis.h), in images of one launch.
struct Gather {
  const void* source;  // Operand
  const void* weight;  // [groups, columns, chunks], zeros where channels end
  Output output;
  Partial partial;  // where splits > 1
  int chunks, steps, tiles_m, tiles_n;
  Divisor tap_chunks;  // chunks of a tap
  Window window;
  int64_t group;  // stride of the source
};

template <class C, class S>
class GatherCopy {
  using T = typename C::Storage;
  static constexpr int kChunks = kStageBytes / 16, kStep = S::kThreads / kChunks;
  static constexpr int kRowsA = S::kM / kStep, kRowsB = S::kN / kStep;
  static_assert(S::kM % kStep == 0 && S::kN % kStep == 0);

 public:
  using A = Tile<T, S::kM, kStageDepth<T>>;
  using B = Tile<T, S::kN, kStageDepth<T>>;

  __device__ __forceinline__ GatherCopy(const Gather& p, int row, int column, int group) : p_(p) {
    source_ = static_cast<const T*>(p.source) + group * p.group;
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const int m = row + line() + i * kStep;
      const bool exists = m < p.output.rows;
      place_[i] = p.window.begin(exists ? m : 0, at_[i]);
      if (!exists) at_[i][0] = kNowhere;
    }
    column_ = column + line();
    weight_ = static_cast<const T*>(p.weight) +
              (static_cast<int64_t>(group) * p.output.columns + column_) * p.chunks * kChunk<T>;
  }

  // Starts to copy the step's part of the depth.
  __device__ __forceinline__ void operator()(int step, A a, B b) const {
    const int chunk = step * kChunks + place();
    const bool within = chunk < p_.chunks;
    int in_tap = chunk, by[3];
    p_.window.tap(p_.tap_chunks.divide(in_tap), by);
    const int64_t moved = in_tap * kChunk<T> + p_.window.moved(by);
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) {
      const bool inside = within && p_.window.inside(at_[i], by);
      copy_async<16>(a.at(line() + i * kStep, place() * kChunk<T>), inside ? source_ + place_[i] + moved : source_,
                     inside ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const bool inside = within && column_ + i * kStep < p_.output.columns;
      const int64_t by_rows = (static_cast<int64_t>(i) * kStep * p_.chunks + chunk) * kChunk<T>;
      copy_async<16>(b.at(line() + i * kStep, place() * kChunk<T>),
                     inside ? weight_ + by_rows : static_cast<const T*>(p_.weight), inside ? 16 : 0);
    }
  }

 private:
  static constexpr int kNowhere = -(1 << 30);  // no tap leads from here into the source

  static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ __forceinline__ int place() { return static_cast<int>(threadIdx.x) % kChunks; }

  const Gather& p_;
  const T *source_, *weight_;
  int at_[kRowsA][3], column_;
  int64_t place_[kRowsA];
};

template <class C, class S>
constexpr int kGatherBytes = std::max(kProductBytes<S>, Finish<typename C::Storage, S>::kBytes);

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_gather(Gather p) {
  using T = typename C::Storage;
  using Copy = GatherCopy<C, S>;
  using A = typename Copy::A;
  using B = typename Copy::B;
  DYNAMIC_SHARED(shared);

  // Neighbouring blocks share rows: the source is the larger operand.
  int rest = blockIdx.x;
  const int column = rest % p.tiles_n * S::kN;
  rest /= p.tiles_n;
  const int row = rest % p.tiles_m * S::kM;
  rest /= p.tiles_m;
  const int split = rest % p.partial.splits, group = rest / p.partial.splits;

  Sums<C, S> sums;
  {
    const Copy copy(p, row, column, group);
    const Reader<C, A, Side::kA> read_a;
    const Reader<C, B, Side::kB> read_b;
    sums.template accumulate<A, B>(
        shared, share(p.steps, split, p.partial.splits), share(p.steps, split + 1, p.partial.splits), copy,
        [&](A a, int r, int k) { return read_a(a, r, k); }, [&](B b, int c, int k) { return read_b(b, c, k); });
  }
  if (p.partial.splits > 1) return sums.store(p.partial, split, group, row, column);
  __syncthreads();  // the stages' memory becomes the tile's
  const Finish<T, S> finish(p.output, shared, row, column, group);
  sums.pairs([&](int r, int c, const Vector<float, 2>& pair) { finish.put(r, c, pair); });
  finish();
}

using Gathered = Shape<32, 64, 1, 4, 1, 6>;  // of a block that adds shares: small, for they are many where results few

// Adds the shares and finishes.
template <class T>
__global__ void __launch_bounds__(Gathered::kThreads, Gathered::kBlocks) conv_gather_shares(Gather p) {
  using S = Gathered;
  SHARED_ARRAY(unsigned char, shared, (Finish<T, S>::kBytes));
  int rest = blockIdx.x;
  const int column = rest % p.tiles_n * S::kN;
  rest /= p.tiles_n;
  const int row = rest % p.tiles_m * S::kM, group = rest / p.tiles_m;
  const Finish<T, S> finish(p.output, shared, row, column, group);
  // A warp takes two fours of 16 rows: whole sectors, and other banks, however the tile is laid out.
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kM * S::kN / 4; i += S::kThreads) {
    const int r = i / 2 % S::kM, c = (i / 2 / S::kM * 2 + i % 2) * 4;
    if (row + r < p.partial.rows && column + c < p.partial.pitch) {
      finish.put(r, c, p.partial.sum(group, row + r, column + c));
    }
  }
  finish();
}

// The phase's taps of the weight, [groups, channels, taps, source channels padded].
template <class T>
const void* weight_of(const Phase& phase, const ConvGather& p, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  const int64_t width = padded<T>(phase.source_channels), taps = phase.taps(), *strides = s.weight_strides;
  int64_t first = 0, dense = width;
  bool ready =
      width == phase.source_channels && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 && phase.source_stride == 1;
  for (int d = 2; d >= 0; --d) {
    const Axis& axis = phase.axes[d];
    first += axis.tap * strides[2 + d];
    ready = ready && (axis.taps == 1 || axis.tap_step * strides[2 + d] == dense);
    dense *= axis.taps;
  }
  ready = ready && first == 0 && phase.result_stride == dense &&
          (s.groups == 1 || s.out_channels * strides[0] == phase.channels * dense);
  if (ready) return p.weight;
  void* const memory = workspace.take(s.groups * phase.channels * taps * width * sizeof(T));
  if (workspace.counts() || taps == 0) return memory;
  Layout q{};
  q.from = p.weight, q.to = memory;
  q.outer = to_int(s.groups, "groups"), q.inner = to_int(phase.channels, "channels");
  q.channels = static_cast<int>(phase.source_channels), q.padded = static_cast<int>(width);
  q.from_outer = s.out_channels * strides[0], q.from_inner = phase.result_stride;
  q.from_channel = phase.source_stride;
  q.to_outer = phase.channels * taps * width, q.to_inner = taps * width, q.to_pixel = width;
  fill_taps(q, phase, s, sizeof(T));
  if (phase.result_stride < phase.source_stride && phase.axes[0].taps == 1) {  // channels and taps side by side: lines
    q.from_pixel[0] = phase.result_stride;
    q.pixels = to_int(phase.channels * taps, "elements of a filter");
    q.inner = 1;
  }
  arrange(s.dtype, q, stream);
  return memory;
}

template <class C, class S>
void launch_gather(Gather& g, int splits, const char* name, Stream stream) {
  using T = typename C::Storage;
  const int64_t blocks = int64_t{g.tiles_m} * g.tiles_n * g.partial.groups * splits;
  launch({name, static_cast<unsigned>(to_int(blocks, "blocks")), S::kThreads, stream, kGatherBytes<C, S>},
         conv_gather<C, S>, g);
  if (splits == 1) return;
  g.tiles_m = (g.output.rows + Gathered::kM - 1) / Gathered::kM;
  g.tiles_n = (g.output.columns + Gathered::kN - 1) / Gathered::kN;
  launch({"conv_gather_shares", static_cast<unsigned>(int64_t{g.tiles_m} * g.tiles_n * g.partial.groups),
          Gathered::kThreads, stream},
         conv_gather_shares<T>, g);
}

template <class C>
void gather(const Phase& phase, const ConvGather& p, const Operand<typename C::Storage>& source, Workspace& workspace,
            const char* name, Stream stream) {
  using T = typename C::Storage;
  const ConvShape& s = p.shape;
  Gather g{};
  g.source = source.data;
  g.weight = weight_of<T>(phase, p, workspace, stream);
  g.output = output_of(phase, p, sizeof(T));
  const int tap_chunks = source.channels / kChunk<T>;
  g.chunks = to_int(phase.taps() * tap_chunks, "elements that make one result");
  constexpr int kChunks = kStageBytes / 16;
  g.steps = (g.chunks + kChunks - 1) / kChunks;
  g.tap_chunks = Divisor(std::max(tap_chunks, 1));
  g.window = window_of(phase.axes, strides_of(true, source.pixel, phase.source_sizes).at, source.image);
  g.group = source.channels;

  // As many images a launch as 32 bits can number the pixels of.
  const int64_t together = std::min(s.batch, (kLimit - 1) / phase.positions());
  for (int64_t image = 0; image < s.batch; image += together) {
    const int64_t rows = std::min(together, s.batch - image) * phase.positions();
    with_shape(rows, phase.channels, s.groups, [&](auto shape) {
      using S = decltype(shape);
      g.tiles_m = static_cast<int>((rows + S::kM - 1) / S::kM);
      g.tiles_n = static_cast<int>((phase.channels + S::kN - 1) / S::kN);
      const int groups = to_int(s.groups, "groups");
      const int splits = splits_for(int64_t{g.tiles_m} * g.tiles_n * groups, g.steps);
      g.output.rows = static_cast<int>(rows);
      g.partial = {nullptr, 1, groups, static_cast<int>(rows), g.output.columns, 0};
      if (splits > 1) g.partial = Partial::take(workspace, splits, groups, static_cast<int>(rows), g.output.columns);
      if (!workspace.counts()) launch_gather<C, S>(g, splits, name, stream);
    });
    g.source = static_cast<const T*>(g.source) + together * g.window.image;
    g.output.first += together * g.output.image;
  }
}

// Calls f with every phase.
template <class F>
void for_phases(const ConvShape& s, bool forwards, F&& f) {
  if (forwards) {
    return f(Phase{{forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)},
                   s.in_channels,
                   s.out_channels,
                   s.weight_strides[1],
                   s.weight_strides[0],
                   s.in,
                   s.out,
                   true});
  }
  for (int64_t d = 0; d < std::min(s.stride[0], s.in[0]); ++d) {
    for (int64_t h = 0; h < std::min(s.stride[1], s.in[1]); ++h) {
      for (int64_t w = 0; w < std::min(s.stride[2], s.in[2]); ++w) {
        f(Phase{{grad_input_axis(s, 0, d), grad_input_axis(s, 1, h), grad_input_axis(s, 2, w)},
                s.out_channels,
                s.in_channels,
                s.weight_strides[0],
                s.weight_strides[1],
                s.out,
                s.in,
                false});
      }
    }
  }
}

void gather(const ConvGather& p, bool forwards, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  const char* const name = forwards ? "conv_forward" : "conv_grad_input";
  if (is_depthwise(s)) {
    return for_phases(s, forwards, [&](const Phase& phase) {
      if (phase.positions() > 0) depthwise_gather(phase, p, name, workspace, stream);
    });
  }
  with_arithmetic(s.dtype, s.tf32, [&](auto arithmetic) {
    using C = decltype(arithmetic);
    const auto source = operand_of<typename C::Storage>(p.source, s, forwards ? s.in_channels : s.out_channels,
                                                        forwards ? s.in : s.out, workspace, stream);
    for_phases(s, forwards, [&](const Phase& phase) {
      if (phase.positions() > 0) gather<C>(phase, p, source, workspace, name, stream);
    });
  });
}

size_t gather_workspace(const ConvGather& p, bool forwards) {
  Workspace workspace;
  gather(p, forwards, workspace, nullptr);
  return workspace.taken();
}

void gather(const ConvGather& p, bool forwards, void* memory, Stream stream) {
  Workspace workspace(memory);
  gather(p, forwards, workspace, stream);
}

}  // namespace

size_t conv_forward_workspace(const ConvGather& p) { return gather_workspace(p, true); }
void conv_forward(const ConvGather& p, void* memory, Stream stream) { gather(p, true, memory, stream); }
size_t conv_grad_input_workspace(const ConvGather& p) { return gather_workspace(p, false); }
void conv_grad_input(const ConvGather& p, void* memory, Stream stream) { gather(p, false, memory, stream); }

}  // namespace fastnets::cuda

// Convolution forwards, and backwards to its input: implicit GEMM. Rows are the pixels of the results, columns their
// channels, the depth runs over taps and, in each, over the source's channels in chunks of 16 bytes. A thread copies
// the same chunk of the depth for several rows, so that what a tap adds to a row's place is found once for all of them.
// Here are the ways from an operation to its kernels, too.
#include <optional>

#include "conv_gather.h"

namespace fastnets::cuda {
namespace {

template <class C, class S>
class GatherFeed {
  using T = typename C::Storage;
  using A = Tile<T, S::kM, kStageDepth<T>>;
  using B = Tile<T, S::kN, kStageDepth<T>>;
  using Filter = FilterCopy<T, S>;
  static constexpr int kChunks = Filter::kChunks, kStep = Filter::kStep, kRows = S::kM / kStep;
  static_assert(S::kM % kStep == 0);

 public:
  __device__ __forceinline__ GatherFeed(const Gather& p, unsigned char* shared, const Place& at)
      : p_(p), filter_(p, at), ring_(shared), a_(nullptr), b_(nullptr) {
    source_ = static_cast<const T*>(p.source) + at.group * p.group;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int m = at.row + Filter::line() + i * kStep;
      const bool exists = m < p.output.rows;
      place_[i] = p.window.begin(exists ? m : 0, at_[i]);
      if (!exists) at_[i][0] = kNowhere;
    }
  }

  __device__ __forceinline__ void copy(int step) const {
    const int chunk = step * kChunks + Filter::place();
    const bool within = chunk < p_.chunks;
    int in_tap = chunk, by[3];
    p_.window.tap(p_.tap_chunks.divide(in_tap), by);
    const int64_t moved = in_tap * kChunk<T> + p_.window.moved(by);
    const A a = ring_.a(step);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool inside = within && p_.window.inside(at_[i], by);
      copy_async<16>(a.at(Filter::line() + i * kStep, Filter::place() * kChunk<T>),
                     inside ? source_ + place_[i] + moved : source_, inside ? 16 : 0);
    }
    filter_(ring_.b(step), chunk, within);
  }

  __device__ __forceinline__ void turn(int step) { a_ = ring_.a(step), b_ = ring_.b(step); }
  static constexpr __device__ __forceinline__ int depth() { return kStageDepth<T>; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, Sums<C, S>::row() + 16 * i, k); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, Sums<C, S>::column() + 16 * j, k); }

 private:
  static constexpr int kNowhere = -(1 << 30);  // no tap leads from here into the source

  const Gather& p_;
  const T* source_;
  int at_[kRows][3];
  int64_t place_[kRows];
  Filter filter_;
  Ring<S, A, B> ring_;
  A a_;
  B b_;
  Reader<C, A, Side::kA> read_a_;
  Reader<C, B, Side::kB> read_b_;
};

// One tap, of images whose planes are whole halves of chunks: the source as it lies with its pixels innermost, 16 bytes
// a copy, or 8 where a chunk may begin in one image and end in the next. Neighbouring threads copy what lies side by
// side.
template <class C, class S>
class PlanesFeed {
  using T = typename C::Storage;
  using A = Tile<T, kStageDepth<T>, S::kM>;
  using B = Tile<T, S::kN, kStageDepth<T>>;

 public:
  __device__ __forceinline__ PlanesFeed(const Gather& p, unsigned char* shared, const Place& at)
      : p_(p), filter_(p, at), ring_(shared), a_(nullptr), b_(nullptr) {
    const int m = at.row + (p.whole ? Pieces<1>::place() : Pieces<2>::place());
    int pixel = m;
    const int64_t image = p.window.positions.divide(pixel);
    source_ = m < p.output.rows ? static_cast<const T*>(p.source) + image * p.window.image + at.group * p.group + pixel
                                : nullptr;
  }

  __device__ __forceinline__ void copy(int step) const {
    if (p_.whole) {
      copy<Pieces<1>>(step);
    } else {
      copy<Pieces<2>>(step);
    }
    const int chunk = step * FilterCopy<T, S>::kChunks + FilterCopy<T, S>::place();
    filter_(ring_.b(step), chunk, chunk < p_.chunks);
  }

  __device__ __forceinline__ void turn(int step) { a_ = ring_.a(step), b_ = ring_.b(step); }
  static constexpr __device__ __forceinline__ int depth() { return kStageDepth<T>; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, k, Sums<C, S>::row() + 16 * i); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, Sums<C, S>::column() + 16 * j, k); }

 private:
  template <int Count>
  using Pieces = LinePieces<T, S, S::kM, Count>;

  template <class P>
  __device__ __forceinline__ void copy(int step) const {
    static_assert(kStageDepth<T> % P::kStep == 0);
    const A a = ring_.a(step);
#pragma unroll
    for (int i = 0; i < kStageDepth<T> / P::kStep; ++i) {
      const int line = P::line() + i * P::kStep, channel = step * kStageDepth<T> + line;
      const bool inside = channel < p_.channels && source_ != nullptr;
      copy_async<P::kBytes>(a.at(line, P::place()),
                            inside ? source_ + channel * p_.plane : static_cast<const T*>(p_.source),
                            inside ? P::kBytes : 0);
    }
  }

  const Gather& p_;
  const T* source_;
  FilterCopy<T, S> filter_;
  Ring<S, A, B> ring_;
  A a_;
  B b_;
  Reader<C, A, Side::kA, true> read_a_;
  Reader<C, B, Side::kB> read_b_;
};

template <class C, class S>
constexpr int kGatherBytes = std::max(kProductBytes<S>, Finish<typename C::Storage, S>::kBytes);

template <class C, class S, class Feed>
__device__ __forceinline__ void gather(const Gather& p) {
  DYNAMIC_SHARED(shared);
  const Place at = Place::of<S>(p.tiles_m, p.tiles_n, p.partial.groups);
  Sums<C, S> sums;
  {
    Feed feed(p, shared, at);
    sums.accumulate(share(p.steps, at.split, p.partial.splits), share(p.steps, at.split + 1, p.partial.splits), feed);
  }
  finish_gather<typename C::Storage, S>(p, sums, shared, at);
}

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_gather(Gather p) {
  gather<C, S, GatherFeed<C, S>>(p);
}

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_planes(Gather p) {
  gather<C, S, PlanesFeed<C, S>>(p);
}

using Gathered = Shape<32, 64, 1, 4, 1, 6>;  // of a block that adds shares: small, for they are many where results few

template <class T>
__global__ void __launch_bounds__(Gathered::kThreads, Gathered::kBlocks) conv_gather_shares(Gather p) {
  using S = Gathered;
  SHARED_ARRAY(unsigned char, shared, (Finish<T, S>::kBytes));
  const Place at = Place::of<S>(p.tiles_m, p.tiles_n, p.partial.groups);
  const auto finish = finish_of<T, S>(p.output, shared, at);
  // A warp takes two fours of 16 rows: whole sectors, and other banks, however the tile is laid out.
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kM * S::kN / 4; i += S::kThreads) {
    const int r = i / 2 % S::kM, c = (i / 2 / S::kM * 2 + i % 2) * 4;
    if (at.row + r < p.partial.rows && at.column + c < p.partial.pitch) {
      finish.put(r, c, p.partial.sum(at.group, at.row + r, at.column + c));
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
  q.to_outer = phase.channels * taps * width, q.to_inner = taps * width;
  fill_taps(q, phase, s, width, sizeof(T));
  if (phase.result_stride < phase.source_stride && phase.axes[0].taps == 1) {  // channels and taps side by side: lines
    q.from_pixel[0] = phase.result_stride, q.to_pixel[0] = q.to_inner;
    q.pixels = to_int(phase.channels * taps, "elements of a filter");
    q.inner = 1;
    if (phase.result_stride == 1) {  // of channels at each tap
      for (int64_t* strides : {q.from_pixel, q.to_pixel}) std::rotate(strides, strides + 1, strides + 3);
      q.at = Coordinates(static_cast<int>(phase.axes[2].taps), static_cast<int>(phase.channels));
    }
  }
  arrange(s.dtype, q, stream);
  return memory;
}

// Whether the results are those of one tap, pixel by pixel, and the tensor can be read as it lies.
template <class T>
bool is_planes(const Phase& phase, const ConvShape& s, const void* source) {
  for (const Axis& axis : phase.axes) {
    if (axis.taps != 1 || axis.pull != 1 || axis.offset != 0 || axis.count != axis.extent) return false;
  }
  return !s.channels_last && phase.positions() > 1 && phase.positions() % (kChunk<T> / 2) == 0 &&
         reinterpret_cast<uintptr_t>(source) % 16 == 0;
}

template <class C>
void gather(const Phase& phase, const ConvGather& p, const Operand<typename C::Storage>& source, bool planes,
            Workspace& workspace, const char* name, Stream stream) {
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
  if (planes) {
    g.channels = static_cast<int>(phase.source_channels), g.plane = phase.positions();
    g.group = g.channels * g.plane;
    g.window.image = s.groups * g.group;
    g.whole = g.plane % kChunk<T> == 0;
  }
  g.partial.groups = to_int(s.groups, "groups");

  const int64_t together = images_together(phase, s.batch);
  for (int64_t image = 0; image < s.batch; image += together) {
    const int64_t images = std::min(together, s.batch - image);
    g.output.rows = static_cast<int>(images * phase.positions());
    if (planes || !gather_held(phase, g, s.dtype, s.tf32, name, workspace, stream)) {
      with_shape(g.output.rows, phase.channels, s.groups, [&](auto shape) {
        using S = decltype(shape);
        const int64_t blocks = g.divide<S>(workspace, g.partial.groups);
        if (workspace.counts()) return;
        launch({name, static_cast<unsigned>(blocks), S::kThreads, stream, kGatherBytes<C, S>},
               planes ? conv_planes<C, S> : conv_gather<C, S>, g);
        if (g.partial.splits > 1) gather_shares(s.dtype, g, stream);
      });
    }
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
  with_arithmetic(s.dtype, s.tf32, [&](auto arithmetic) {
    using C = decltype(arithmetic);
    using T = typename C::Storage;
    std::optional<Operand<T>> source;
    for_phases(s, forwards, [&](const Phase& phase) {
      if (phase.positions() == 0) return;
      if (is_direct(phase, s)) return direct_gather(phase, p, name, workspace, stream);
      if (gather_few(phase, p, name, workspace.counts(), stream)) return;
      if (is_planes<T>(phase, s, p.source)) {
        const int width = static_cast<int>(padded<T>(phase.source_channels));
        return gather<C>(phase, p, {static_cast<const T*>(p.source), width, 0, 0}, true, workspace, name, stream);
      }
      if (!source) {
        source = operand_of<T>(p.source, s, phase.source_channels, phase.source_sizes, workspace, stream);
      }
      gather<C>(phase, p, *source, false, workspace, name, stream);
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

void gather_shares(Dtype dtype, Gather p, Stream stream) {
  p.tiles_m = (p.output.rows + Gathered::kM - 1) / Gathered::kM;
  p.tiles_n = (p.output.columns + Gathered::kN - 1) / Gathered::kN;
  const int64_t blocks = int64_t{p.tiles_m} * p.tiles_n * p.partial.groups;
  with_storage(dtype, [&](auto kind) {
    launch({"conv_gather_shares", static_cast<unsigned>(to_int(blocks, "blocks")), Gathered::kThreads, stream},
           conv_gather_shares<decltype(kind)>, p);
  });
}

size_t conv_forward_workspace(const ConvGather& p) { return gather_workspace(p, true); }
void conv_forward(const ConvGather& p, void* memory, Stream stream) { gather(p, true, memory, stream); }
size_t conv_grad_input_workspace(const ConvGather& p) { return gather_workspace(p, false); }
void conv_grad_input(const ConvGather& p, void* memory, Stream stream) { gather(p, false, memory, stream); }

}  // namespace fastnets::cuda

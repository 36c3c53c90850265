// Convolution backwards to its weight: implicit GEMM whose rows are the result's channels, whose columns are taps and
// source channels, and whose depth are the pixels of all images. Few results of a long sum: the depth is shared out,
// and the shares are added in their order, so that every run gives the same bits.
#include "conv_output.h"
#include "conv_weight.h"

namespace fastnets::cuda {
namespace {

struct Weight : WeightPass {  // of Operands
  int pixels;                 // of the images of this launch
  int channels;               // of a group of x, padded
  Divisor tap_channels;
  Window window;  // of x
  // Of tensors read in planes:
  int64_t plane, grad_image;
};

// Copies pixels `step * kDepth` and following: of the gradient, and of x at the taps. A thread has the same channels of
// the same tap for several pixels.
template <class C, class S>
class WeightFeed {
  using T = typename C::Storage;
  using A = Tile<T, kStageDepth<T>, S::kM>;
  using B = Tile<T, kStageDepth<T>, S::kN>;
  static constexpr int kDepth = kStageDepth<T>;
  static constexpr int kChunksA = S::kM / kChunk<T>, kChunksB = S::kN / kChunk<T>;
  static constexpr int kStepA = S::kThreads / kChunksA, kStepB = S::kThreads / kChunksB;
  static_assert(S::kThreads % kChunksA == 0 && S::kThreads % kChunksB == 0);
  static_assert(kDepth % kStepA == 0 && kDepth % kStepB == 0);

 public:
  __device__ __forceinline__ WeightFeed(const Weight& p, unsigned char* shared, const Place& at)
      : p_(p), ring_(shared), a_(nullptr), b_(nullptr) {
    const int k = at.row + place_a() * kChunk<T>, n = at.column + place_b() * kChunk<T>, group = at.group;
    has_a_ = k < p.grad_channels;
    grad_ = static_cast<const T*>(p.grad) + static_cast<int64_t>(group) * p.grad_channels + k;
    has_b_ = n < p.partial.columns;
    int channel = n;
    p.window.tap(p.tap_channels.divide(channel), tap_);
    x_ = static_cast<const T*>(p.x) + static_cast<int64_t>(group) * p.channels + channel + p.window.moved(tap_);
  }

  __device__ __forceinline__ void copy(int step) const {
    const A a = ring_.a(step);
    const B b = ring_.b(step);
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

  __device__ __forceinline__ void turn(int step) { a_ = ring_.a(step), b_ = ring_.b(step); }
  static constexpr __device__ __forceinline__ int depth() { return kDepth; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, k, Sums<C, S>::row() + 16 * i); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, k, Sums<C, S>::column() + 16 * j); }

 private:
  static __device__ __forceinline__ int line_a() { return static_cast<int>(threadIdx.x) / kChunksA; }
  static __device__ __forceinline__ int place_a() { return static_cast<int>(threadIdx.x) % kChunksA; }
  static __device__ __forceinline__ int line_b() { return static_cast<int>(threadIdx.x) / kChunksB; }
  static __device__ __forceinline__ int place_b() { return static_cast<int>(threadIdx.x) % kChunksB; }

  const Weight& p_;
  const T *grad_, *x_;
  bool has_a_, has_b_;
  int tap_[3];
  Ring<S, A, B> ring_;
  A a_;
  B b_;
  Reader<C, A, Side::kA, true> read_a_;
  Reader<C, B, Side::kB, true> read_b_;
};

// One tap at every pixel, of images whose planes are whole halves of chunks: both tensors as they lie with their pixels
// innermost, 16 bytes a copy, or 8 where a chunk may begin in one image and end in the next. Neighbouring threads copy
// what lies side by side.
template <class C, class S>
class WeightPlanesFeed {
  using T = typename C::Storage;
  using A = Tile<T, S::kM, kStageDepth<T>>;
  using B = Tile<T, S::kN, kStageDepth<T>>;

 public:
  __device__ __forceinline__ WeightPlanesFeed(const Weight& p, unsigned char* shared, const Place& at)
      : p_(p), whole_(p.plane % kChunk<T> == 0), ring_(shared), a_(nullptr), b_(nullptr) {
    const int line = whole_ ? Pieces<1>::line() : Pieces<2>::line();
    row_ = at.row + line, column_ = at.column + line;
    grad_ = static_cast<const T*>(p.grad) + (int64_t{at.group} * p.partial.rows + row_) * p.plane;
    x_ = static_cast<const T*>(p.x) + (int64_t{at.group} * p.partial.columns + column_) * p.plane;
  }

  __device__ __forceinline__ void copy(int step) const {
    if (whole_) {
      copy<Pieces<1>>(step);
    } else {
      copy<Pieces<2>>(step);
    }
  }

  __device__ __forceinline__ void turn(int step) { a_ = ring_.a(step), b_ = ring_.b(step); }
  static constexpr __device__ __forceinline__ int depth() { return kStageDepth<T>; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, Sums<C, S>::row() + 16 * i, k); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, Sums<C, S>::column() + 16 * j, k); }

 private:
  template <int Count>
  using Pieces = LinePieces<T, S, kStageDepth<T>, Count>;

  template <class P>
  __device__ __forceinline__ void copy(int step) const {
    int pixel = step * kStageDepth<T> + P::place();
    const bool within = pixel < p_.pixels;
    const int64_t image = p_.window.positions.divide(pixel);
    lines<P, S::kM>(ring_.a(step), within, grad_ + image * p_.grad_image + pixel, row_, p_.partial.rows, p_.grad);
    lines<P, S::kN>(ring_.b(step), within, x_ + image * p_.window.image + pixel, column_, p_.partial.columns, p_.x);
  }
  template <class P, int Count, class Operand>
  __device__ __forceinline__ void lines(Operand to, bool within, const T* from, int first, int count,
                                        const void* any) const {
    static_assert(Count % P::kStep == 0);
#pragma unroll
    for (int i = 0; i < Count / P::kStep; ++i) {
      const bool inside = within && first + i * P::kStep < count;
      copy_async<P::kBytes>(to.at(P::line() + i * P::kStep, P::place()),
                            inside ? from + i * P::kStep * p_.plane : static_cast<const T*>(any),
                            inside ? P::kBytes : 0);
    }
  }

  const Weight& p_;
  const bool whole_;
  int row_, column_;
  const T *grad_, *x_;
  Ring<S, A, B> ring_;
  A a_;
  B b_;
  Reader<C, A, Side::kA> read_a_;
  Reader<C, B, Side::kB> read_b_;
};

template <class C, class S, class Feed>
__device__ __forceinline__ void weight(const Weight& p) {
  DYNAMIC_SHARED(shared);
  const Place at = Place::of<S>(p.tiles_m, p.tiles_n, p.partial.groups);
  Feed feed(p, shared, at);
  Sums<C, S> sums;
  sums.accumulate(share(p.steps, at.split, p.splits), share(p.steps, at.split + 1, p.splits), feed);
  sums.store(p.partial, p.first_split + at.split, at.group, at.row, at.column);
}

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_weight(Weight p) {
  weight<C, S, WeightFeed<C, S>>(p);
}

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_weight_planes(Weight p) {
  weight<C, S, WeightPlanesFeed<C, S>>(p);
}

// Where the results go: rows of all groups, taps and channels through the weight's strides.
struct Target {
  void* data;
  int64_t row, channel, tap[3];
  int channels;                      // of a group
  int tap_columns, channel_columns;  // of the sums, from one to the next
  int lines, tile_lines;             // taps of rows: in all, of a tile
  Divisor tap_count, tile_taps;      // of a row: in all, of a tile
  Coordinates taps;
};

constexpr int kThreads = 256, kTile = 32;

// Adds the shares. A block has a tile of up to kTile taps, of whole rows where these have no more, by kTile channels,
// read along what lies side by side in the sums and written along what will.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) conv_weight_shares(Partial partial, Target to) {
  SHARED_ARRAY(float, tile, kTile * kTile * 3 / 2);  // [rows][channels][taps], an odd number of taps apart
  const int across = (to.channels + kTile - 1) / kTile, pitch = to.tile_taps.by | 1;
  const int line = static_cast<int>(blockIdx.x) / across * to.tile_lines,
            channel = static_cast<int>(blockIdx.x) % across * kTile;
  for (int i = threadIdx.x; i < kTile * kTile; i += kThreads) {
    const int y = to.tap_columns == 1 ? i % kTile : i / kTile, x = to.tap_columns == 1 ? i / kTile : i % kTile;
    const bool exists = y < to.tile_lines && line + y < to.lines && channel + x < to.channels;
    int tap = line + y, in_tile = y;
    const int row = to.tap_count.divide(tap), tile_row = to.tile_taps.divide(in_tile);
    float sum = 0.0f;
    for (int split = 0; split < partial.splits; ++split) {
      sum += load_global_if<1>(
          exists, partial.row(split, 0, row) + tap * to.tap_columns + (channel + x) * to.channel_columns)[0];
    }
    if (y < to.tile_lines) store_shared(&tile[(tile_row * kTile + x) * pitch + in_tile], sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < to.tile_lines * kTile; i += kThreads) {
    int tile_row, x, in_tile;
    if (to.channel == 1) {
      in_tile = i / kTile, x = i % kTile;
      tile_row = to.tile_taps.divide(in_tile);
    } else {
      in_tile = i;
      x = to.tile_taps.divide(in_tile);
      tile_row = x / kTile, x %= kTile;
    }
    int tap = line + tile_row * to.tile_taps.by + in_tile, at[3];
    const bool exists = tap < to.lines && channel + x < to.channels;
    const int row = to.tap_count.divide(tap);
    to.taps(tap, at);
    if (exists) {
      store_global(static_cast<T*>(to.data) + row * to.row + (channel + x) * to.channel + at[0] * to.tap[0] +
                       at[1] * to.tap[1] + at[2] * to.tap[2],
                   from_float<T>(load_shared(&tile[(tile_row * kTile + x) * pitch + in_tile])));
    }
  }
}

// Whether results and pixels are the same, and both tensors can be read as they lie.
template <class T>
bool is_planes(const ConvGradWeight& p) {
  const ConvShape& s = p.shape;
  for (int d = 0; d < 3; ++d) {
    if (s.kernel[d] != 1 || s.stride[d] != 1 || s.padding[d] != 0 || s.out[d] != s.in[d]) return false;
  }
  const int64_t pixels = s.out[0] * s.out[1] * s.out[2];
  return !s.channels_last && pixels > 1 && pixels % (kChunk<T> / 2) == 0 &&
         (reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.x)) % 16 == 0;
}

template <class C>
WeightShares shares(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  using T = typename C::Storage;
  const ConvShape& s = p.shape;
  const bool planes = is_planes<T>(p);
  Operand<T> grad{static_cast<const T*>(p.grad), 0, 0, 0}, x{static_cast<const T*>(p.x), 0, 0, 0};
  const int64_t positions = s.out[0] * s.out[1] * s.out[2], taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  if (planes) {
    grad.image = s.groups * s.out_channels * positions, x.image = s.groups * s.in_channels * positions;
  } else {
    grad = operand_of<T>(p.grad, s, s.out_channels, s.out, workspace, stream);
    x = operand_of<T>(p.x, s, s.in_channels, s.in, workspace, stream);
  }
  Weight w{};
  w.grad = grad.data, w.x = x.data;
  w.grad_channels = grad.channels, w.channels = x.channels;
  w.grad_pixel = grad.pixel, w.grad_image = grad.image, w.plane = positions;
  const int width = static_cast<int>(planes ? s.in_channels : x.channels);  // columns of a tap
  w.tap_channels = Divisor(width);
  w.window = window_of({forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}, strides_of(true, x.pixel, s.in).at,
                       x.image);
  const int columns = to_int(taps * width, "elements of a filter");
  with_weight_shape(s.out_channels, columns, [&](auto shape) {
    using S = decltype(shape);
    const auto steps_of = [&](int64_t images) { return (images * positions + kStageDepth<T> - 1) / kStageDepth<T>; };
    const unsigned blocks =
        w.divide<S>(workspace, s, columns, (columns + S::kN - 1) / S::kN, steps_of(images_together(s)));
    if (workspace.counts()) return;
    w.template for_launches<T>(s, grad.image, x.image, [&](int64_t images) {
      w.pixels = static_cast<int>(images * positions), w.steps = static_cast<int>(steps_of(images));
      launch({"conv_grad_weight", blocks, S::kThreads, stream, kProductBytes<S>},
             planes ? conv_weight_planes<C, S> : conv_weight<C, S>, w);
    });
  });
  return {w.partial, width, 1};
}

template <class T>
void add_shares(const ConvGradWeight& p, const WeightShares& shares, Stream stream) {
  const ConvShape& s = p.shape;
  int64_t taps = 1, next = shares.tap;
  bool in_order = s.in_channels == 1 || s.weight_strides[1] == shares.channel;
  for (int d = 2; d >= 0; --d) {
    in_order = in_order && (s.kernel[d] == 1 || s.weight_strides[2 + d] == next);
    next *= s.kernel[d], taps *= s.kernel[d];
  }
  Target to{};
  to.data = p.grad_weight, to.row = s.weight_strides[0];
  if (in_order) {  // the columns are a row's elements as they lie: channels of a single tap
    to.channels = static_cast<int>(taps * s.in_channels), to.channel = to.channel_columns = 1;
    taps = 1;
  } else {
    to.channels = static_cast<int>(s.in_channels), to.channel = s.weight_strides[1];
    for (int d = 0; d < 3; ++d) to.tap[d] = s.weight_strides[2 + d];
    to.tap_columns = shares.tap, to.channel_columns = shares.channel;
  }
  const int64_t of_row = std::min<int64_t>(taps, kTile);
  to.tap_count = Divisor(static_cast<int>(taps)), to.tile_taps = Divisor(static_cast<int>(of_row));
  to.taps = Coordinates(static_cast<int>(s.kernel[1]), static_cast<int>(s.kernel[2]));
  to.lines = to_int(s.groups * s.out_channels * taps, "filters' taps");
  to.tile_lines = static_cast<int>(kTile / of_row * of_row);
  const int64_t tiles = (int64_t{to.lines} + to.tile_lines - 1) / to.tile_lines * ((to.channels + kTile - 1) / kTile);
  launch({"conv_grad_weight_shares", static_cast<unsigned>(to_int(tiles, "blocks")), kThreads, stream},
         conv_weight_shares<T>, shares.sums, to);
}

// ---- few terms -----------------------------------------------------------------------------------------------------

struct Terms {
  const float *grad, *x;
  float* to;
  int64_t grad_image, grad_pixel, grad_channel, x_channel;
  int64_t row, channel, tap[3];  // strides of the weight
  Window window;                 // of x
  Divisor channels, taps, group_rows;
  int terms;
};

// A thread sums up one element of the weight, of float32 results so few that products are not exact enough.
__global__ void __launch_bounds__(kThreads) conv_weight_terms(Terms p, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    int channel = static_cast<int>(i), at[3], by[3];
    int tap = p.channels.divide(channel);
    const int row = p.taps.divide(tap), group = p.group_rows.quotient(row);
    p.window.tap(tap, by);
    p.window.taps(tap, at);
    const int64_t to = row * p.row + channel * p.channel + at[0] * p.tap[0] + at[1] * p.tap[1] + at[2] * p.tap[2];
    const float* const x = p.x + (group * p.channels.by + channel) * p.x_channel + p.window.moved(by);
    float sum = 0.0f;
    for (int term = 0; term < p.terms; ++term) {
      int from[3], pixel = term;
      const int64_t begin = p.window.begin(term, from), image = p.window.positions.divide(pixel);
      const bool inside = p.window.inside(from, by);
      const float value = load_global_if<1>(inside, x + begin)[0];
      const float grad = load_global(p.grad + image * p.grad_image + pixel * p.grad_pixel + row * p.grad_channel);
      if (inside) sum = fmaf(value, grad, sum);
    }
    store_global(p.to + to, sum);
  }
}

void few_terms(const ConvGradWeight& p, Stream stream) {
  const ConvShape& s = p.shape;
  const Strides of_grad = strides_of(s.channels_last, s.groups * s.out_channels, s.out);
  const Strides of_x = strides_of(s.channels_last, s.groups * s.in_channels, s.in);
  const int64_t positions = s.out[0] * s.out[1] * s.out[2], taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  Terms t{};
  t.grad = static_cast<const float*>(p.grad), t.x = static_cast<const float*>(p.x);
  t.to = static_cast<float*>(p.grad_weight);
  t.grad_image = s.groups * s.out_channels * positions, t.grad_pixel = of_grad.at[2], t.grad_channel = of_grad.channel;
  t.x_channel = of_x.channel;
  t.row = s.weight_strides[0], t.channel = s.weight_strides[1];
  for (int d = 0; d < 3; ++d) t.tap[d] = s.weight_strides[2 + d];
  t.window = window_of({forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)}, of_x.at,
                       s.groups * s.in_channels * s.in[0] * s.in[1] * s.in[2]);
  t.channels = Divisor(static_cast<int>(s.in_channels)), t.taps = Divisor(static_cast<int>(taps));
  t.group_rows = Divisor(static_cast<int>(s.out_channels));
  t.terms = static_cast<int>(s.batch * positions);
  const int count = to_int(s.groups * s.out_channels * s.in_channels * taps, "elements of a weight");
  launch({"conv_grad_weight", blocks_for((int64_t{count} + kThreads - 1) / kThreads), kThreads, stream},
         conv_weight_terms, t, count);
}

void grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  if (is_depthwise(s)) return depthwise_grad_weight(p, workspace, stream);
  if (s.dtype == Dtype::kFloat32 && s.batch * s.out[0] * s.out[1] * s.out[2] < kFewTerms) {
    return workspace.counts() ? void() : few_terms(p, stream);
  }
  with_arithmetic(p.shape.dtype, p.shape.tf32, [&](auto arithmetic) {
    using C = decltype(arithmetic);
    std::optional<WeightShares> found = few_weight(p, workspace, stream);
    if (!found) found = held_weight(p, workspace, stream);
    if (!found) found = shares<C>(p, workspace, stream);
    if (!workspace.counts()) add_shares<typename C::Storage>(p, *found, stream);
  });
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

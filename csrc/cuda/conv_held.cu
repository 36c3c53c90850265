// Convolution whose results meet neighbouring pixels, forwards and backwards to the input: implicit GEMM that reads the
// source once for many taps. Rows are results in a row, columns their channels. The depth runs over fillings, each of
// up to 128 bytes of the channels of those pixels that a tile's results meet, and in a filling over the taps: a tap is
// the same pixels read further on. A result whose tap lies outside the source reads a line of zeros. A pixel's place in
// a filling is its number, set apart so that eight results in a row meet lines in different banks.
//
// From L2 come, for each tap, the weight's part of the tile and 1 / taps of the pixels, where conv_gather brings all of
// them with each tap.
#include "conv_gather.h"

namespace fastnets::cuda {
namespace {

// The dimensions of a filling's taps: the last two where their pixels fit, else the last one.
struct Held {
  Gather gather;
  Divisor taps;      // of a filling
  Divisor fillings;  // of the same taps
  int span[3];       // how far the last tap of a filling lies from its first one
  int pixel_bytes;   // that a filling may have
};

template <class C, class S>
class HeldFeed {
  using T = typename C::Storage;
  using A = Tile<T, 1, kStageDepth<T>>;  // a pixel
  using B = Tile<T, S::kN, kStageDepth<T>>;
  using Filter = FilterCopy<T, S>;
  static constexpr int kChunks = Filter::kChunks, kStep = Filter::kStep, kRows = Sums<C, S>::kRows;
  static constexpr int kPixels = kStageBytes + S::kStages * B::kBytes;  // where they begin

 public:
  // Of shared memory: zeros, the stages of the weight, the pixels.
  static constexpr int64_t bytes(int fillings, int64_t pixel_bytes) {
    return kPixels + std::min(fillings, 2) * pixel_bytes;
  }

  // `begin`: the first step of the block.
  __device__ __forceinline__ HeldFeed(const Held& p, unsigned char* shared, const Place& at, int begin)
      : p_(p), filter_(p.gather, at), shared_(shared), begin_(begin), b_(nullptr) {
    const Gather& g = p.gather;
    source_ = static_cast<const T*>(g.source) + at.group * g.group + Filter::place() * kChunk<T>;
    first_image_ = g.window.positions.quotient(at.row);
    g.window.begin(at.row, first_);
    const int last = min(at.row + S::kM, g.output.rows) - 1;
    last_image_ = g.window.positions.quotient(last);
    g.window.begin(last, last_);
    first_row_ = at.row + Sums<C, S>::row() + static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int from[3];
      pixel_[i] = begin_of(i, from);
      pixel_[i] = p.gather.window.number(pixel_[i], from);
    }
    for (int i = threadIdx.x; i < kStageBytes / 4; i += S::kThreads) {
      store_shared(reinterpret_cast<float*>(shared) + i, 0.0f);
    }
  }

  __device__ __forceinline__ void copy(int step) const {
    int tap = step;
    const int filling = p_.taps.divide(tap), taps = filling_taps(filling), chunk = filling_chunk(filling);
    const Gather& g = p_.gather;
    const int place = Filter::place(), chunks = g.tap_chunks.by - chunk;
    if (place >= chunks + chunks % 2) return;  // products take two chunks at a time
    const bool within = place < chunks;
    if (tap == 0 || step == begin_) {
      int by[3];
      g.window.tap(taps, by);
      const int from = first(by), count = min(end(by) - from, p_.pixel_bytes / kStageBytes);
      const A a = pixels(filling);
#pragma unroll 4
      for (int line = Filter::line(); line < count; line += kStep) {
        int pixel[3];
        const int image = g.window.pixel_of(from + line, pixel);
        const bool inside = within && g.window.inside(pixel, {0, 0, 0});
        copy_async<16>(
            a.at(line, place * kChunk<T>),
            inside ? source_ + (image * g.window.image + g.window.moved(pixel)) + chunk * kChunk<T> : source_,
            inside ? 16 : 0);
      }
    }
    filter_(filter(step), (taps + tap) * g.tap_chunks.by + chunk + place, within);
  }

  __device__ __forceinline__ void turn(int step) {
    int tap = step;
    const int filling = p_.taps.divide(tap), taps = filling_taps(filling), chunk = filling_chunk(filling);
    const Window& window = p_.gather.window;
    int by[3], to[3];
    window.tap(taps, by);
    if ((tap == 0 && chunk == 0) || step == begin_) find(taps);
    window.tap(taps + tap, to);
    const int moved = window.number(0, to) - first(by);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int line = pixel_[i] + moved;
      line_[i] = inside_[i] >> tap & 1 ? kPixels + filling % 2 * p_.pixel_bytes + line * kStageBytes : 0;
      exchange_[i] = (static_cast<int>(threadIdx.x) % 32 / 16 ^ A::swizzle(line)) * 16;
    }
    depth_ = (p_.gather.tap_chunks.by - chunk) * kChunk<T>;
    b_ = filter(step);
  }

  __device__ __forceinline__ int depth() const { return depth_; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const {
    uint32_t r[4];
    load_matrix(r, shared_ + line_[i] + (k / kChunk<T> * 16 ^ exchange_[i]));
    return to_fragment<C>(r);
  }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const { return read_b_(b_, Sums<C, S>::column() + 16 * j, k); }

 private:
  // A filling's first tap, and its first chunk of the channels.
  __device__ __forceinline__ int filling_taps(int filling) const { return p_.fillings.quotient(filling) * p_.taps.by; }
  __device__ __forceinline__ int filling_chunk(int filling) const {
    p_.fillings.divide(filling);
    return filling * kChunks;
  }
  __device__ __forceinline__ A pixels(int filling) const { return A(shared_ + kPixels + filling % 2 * p_.pixel_bytes); }
  __device__ __forceinline__ B filter(int step) const {
    return B(shared_ + kStageBytes + step % S::kStages * B::kBytes);
  }

  // The image of the warp's i-th row of this lane, and its place.
  __device__ __forceinline__ int begin_of(int i, int (&from)[3]) const {
    const Gather& g = p_.gather;
    const int row = first_row_ + 16 * i;  // behind the last result, too, for the same banks
    g.window.begin(row, from);
    return g.window.positions.quotient(row);
  }

  // Of the pixels that the block's rows meet at taps from `by` on: the first one, and the one behind the last.
  __device__ __forceinline__ int first(const int (&by)[3]) const {
    return p_.gather.window.bound(first_image_, first_, by, 0);
  }
  __device__ __forceinline__ int end(const int (&by)[3]) const {
    const int last[3] = {last_[0] + p_.span[0], last_[1] + p_.span[1], last_[2] + p_.span[2]};
    return p_.gather.window.bound(last_image_, last, by, 1);
  }

  // Which of the filling's taps lie in the source.
  __device__ __forceinline__ void find(int taps) {
    const Window& window = p_.gather.window;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      int from[3];
      begin_of(i, from);
      inside_[i] = 0;
      const bool exists = first_row_ + 16 * i < p_.gather.output.rows;
#pragma unroll 1
      for (int tap = 0; tap < p_.taps.by; ++tap) {
        int by[3];
        window.tap(taps + tap, by);
        inside_[i] |= static_cast<uint32_t>(exists && window.inside(from, by)) << tap;
      }
    }
  }

  const Held& p_;
  const T* source_;
  int first_image_, first_[3], last_image_, last_[3];
  int first_row_, pixel_[kRows];
  uint32_t inside_[kRows];
  Filter filter_;
  unsigned char* shared_;
  int begin_, depth_ = 0, line_[kRows], exchange_[kRows];
  B b_;
  Reader<C, B, Side::kB> read_b_;
};

template <class C, class S>
int64_t held_bytes(int fillings, int64_t pixel_bytes) {
  return std::max<int64_t>(HeldFeed<C, S>::bytes(fillings, pixel_bytes), Finish<typename C::Storage, S>::kBytes);
}

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_held(Held p) {
  DYNAMIC_SHARED(shared);
  const Gather& g = p.gather;
  const Place at = Place::of<S>(g.tiles_m, g.tiles_n, g.partial.groups);
  Sums<C, S> sums;
  {
    const int begin = share(g.steps, at.split, g.partial.splits);
    HeldFeed<C, S> feed(p, shared, at, begin);
    sums.accumulate(begin, share(g.steps, at.split + 1, g.partial.splits), feed);
  }
  finish_gather<typename C::Storage, S>(g, sums, shared, at);
}

constexpr int kMostTaps = 32;  // bits

// How many pixels `rows` results in a row may meet at a filling's taps, from the first to the last one. Where results
// are fewer along a dimension than pixels, each end of it that they pass adds the pixels that are met by none. Where
// the first result lies past the end of a dimension, those before the first one that is met are brought, too: as many
// as results lie there. (What follows the last one, up to where the next result's line, plane or image begins, is not.)
int64_t lines_for(const Window& window, const Phase& phase, const int (&span)[3], int64_t rows) {
  int64_t lines = rows, results = 1, pixels = 1;
  for (int d = 2; d >= 0; --d) {
    const Axis& axis = phase.axes[d];
    results *= axis.count;
    const int64_t ends = (rows - 1 + results - 1) / results;
    const int64_t past = axis.offset + axis.span() - span[d] + axis.count - axis.extent;
    const int64_t further = d > 0 ? window.next[d - 1].by : window.next_image.by;
    lines +=
        ends * std::max<int64_t>(further - axis.count * pixels, 0) + (span[d] + std::max<int64_t>(past, 0)) * pixels;
    pixels = further;
  }
  return lines;
}

}  // namespace

bool gather_held(const Phase& phase, Gather g, Dtype dtype, bool tf32, const char* name, Workspace& workspace,
                 Stream stream) {
  for (const Axis& axis : phase.axes) {
    if (axis.pull != 1) return false;
  }
  set_apart(g.window, phase.axes, 8, g.output.rows / phase.positions());
  const int64_t groups = g.partial.groups;
  for (const int inner : {2, 1}) {
    int64_t taps = 1;
    Held p{};
    for (int d = 3 - inner; d < 3; ++d) {
      taps *= phase.axes[d].taps;
      p.span[d] = static_cast<int>(std::max<int64_t>(phase.axes[d].span(), 0));
    }
    if (taps < 2 || taps > kMostTaps) continue;
    const bool fits = with_held(g.output.rows, phase.channels, groups, [&](auto shape) {
      using S = decltype(shape);
      p.taps = Divisor(static_cast<int>(taps));
      p.fillings = Divisor((g.tap_chunks.by * 16 + kStageBytes - 1) / kStageBytes);
      g.steps = static_cast<int>(phase.taps()) * p.fillings.by;
      const int fillings = static_cast<int>(g.steps / taps);
      const int64_t lines = lines_for(g.window, phase, p.span, S::kM), pixel_bytes = lines * kStageBytes;
      if (lines > S::kM * phase.axes[3 - inner].taps) return false;  // of a dimension less they would be fewer
      if (held_bytes<Bf16, S>(fillings, pixel_bytes) > static_cast<int64_t>(shared_limit())) return false;
      p.pixel_bytes = static_cast<int>(pixel_bytes);
      const int64_t blocks = g.divide<S>(workspace, static_cast<int>(groups));
      if (workspace.counts()) return true;
      p.gather = g;
      with_arithmetic(dtype, tf32, [&](auto arithmetic) {
        using C = decltype(arithmetic);
        launch({name, static_cast<unsigned>(blocks), S::kThreads, stream,
                static_cast<size_t>(held_bytes<C, S>(fillings, pixel_bytes))},
               conv_held<C, S>, p);
      });
      if (g.partial.splits > 1) gather_shares(dtype, g, stream);
      return true;
    });
    if (fits) return true;
  }
  return false;
}

}  // namespace fastnets::cuda

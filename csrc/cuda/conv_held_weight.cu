// The weight's gradient of a convolution whose results meet neighbouring pixels: implicit GEMM as in conv_weight.cu,
// that reads x once for many taps. A block has some channels of x at up to kTaps taps. While results pass by, so do the
// pixels that they meet, in a ring on chip: a tap is the same pixels read further on, and one outside reads zeros.
//
// A pixel's line of the ring is its number, in which lines, planes and images of x are set apart so that results in a
// row meet lines whose numbers are as far apart at the end of a line of them as within, but for cycles of the banks.
//
// From L2 come, for each result, the tile's rows and kChannels of x, where conv_weight brings x with each tap.
#include "conv_output.h"
#include "conv_weight.h"

namespace fastnets::cuda {
namespace {

struct HeldWeight : WeightPass {  // of Operands
  int results;                    // of the images of this launch
  int channels;                   // of a group of x, padded
  Window window;                  // of x
  Divisor tap_groups;             // kTaps each
  int taps, span[3];              // of all of them
  Divisor lines;                  // of the ring
  int images;                     // of this launch
  int shift;  // of the numbers of pixels that results in a row meet, the last bits that are the same
};

template <class C, class S>
class HeldWeightFeed {
  using T = typename C::Storage;
  static constexpr int kDepth = kStageDepth<T>;
  using A = Tile<T, kDepth, S::kM>;
  static constexpr int kChunksA = S::kM / kChunk<T>, kStepA = S::kThreads / kChunksA;
  static constexpr int kChunksX = S::kChannels / kChunk<T>, kStepX = S::kThreads / kChunksX;
  static constexpr int kSlots = S::kWarpN / S::kChannels;  // taps of a warp
  static constexpr int kProducts = kDepth / fastnets::kDepth<C>;
  // Results of a product that a lane reads the pixels of: 32-bit elements are gathered from two.
  static constexpr int kRows = sizeof(T) == 4 ? 2 : 1;
  static constexpr int kLineBytes = S::kChannels * static_cast<int>(sizeof(T));
  static constexpr int kZeros = 128, kRing = kZeros + S::kStages * A::kBytes;
  static_assert(S::kThreads % kChunksA == 0 && S::kThreads % kChunksX == 0 && S::kWarpN % S::kChannels == 0);
  static_assert(kProducts * kRows * kSlots <= 32);

 public:
  // Of shared memory: zeros in every bank, the stages of the gradient, the ring.
  static int64_t bytes(int64_t lines) { return kRing + lines * kLineBytes; }

  // `begin`: the first step of the block.
  __device__ __forceinline__ HeldWeightFeed(const HeldWeight& p, unsigned char* shared, const Place& at, int begin)
      : p_(p), shared_(shared), a_(nullptr) {
    const int row = at.row + static_cast<int>(threadIdx.x) % kChunksA * kChunk<T>;
    has_a_ = row < p.grad_channels;
    grad_ = at.group * p.grad_channels + row;
    first_tap_ = at.column / S::kN;
    const int channel =
        p.tap_groups.divide(first_tap_) * S::kChannels + static_cast<int>(threadIdx.x) % kChunksX * kChunk<T>;
    first_tap_ *= S::kTaps;
    has_x_ = channel < p.channels;
    x_ = at.group * p.channels + channel;
    for (int i = threadIdx.x; i < kZeros / 4; i += S::kThreads) {
      store_shared(reinterpret_cast<float*>(shared) + i, 0.0f);
    }
    next_ = first(begin);
  }

  __device__ __forceinline__ void copy(int step) {
    const T *const grad = static_cast<const T*>(p_.grad), *const x = static_cast<const T*>(p_.x);
    const A a = gradient(step);
#pragma unroll 1
    for (int line = static_cast<int>(threadIdx.x) / kChunksA; line < kDepth; line += kStepA) {
      const int m = step * kDepth + line;
      const bool inside = has_a_ && m < p_.results;
      copy_async<16>(a.at(line, static_cast<int>(threadIdx.x) % kChunksA * kChunk<T>),
                     inside ? grad + (grad_ + m * p_.grad_pixel) : grad, inside ? 16 : 0);
    }
    const int end = this->end(step), place = static_cast<int>(threadIdx.x) % kChunksX;
#pragma unroll 1
    for (int number = next_ + static_cast<int>(threadIdx.x) / kChunksX; number < end; number += kStepX) {
      int line = number, at[3];
      p_.lines.divide(line);
      const int image = p_.window.pixel_of(number, at);
      const bool inside = has_x_ && image < p_.images && p_.window.inside(at, {0, 0, 0});
      copy_async<16>(shared_ + kRing + chunk(line, place),
                     inside ? x + (x_ + image * p_.window.image + p_.window.moved(at)) : x, inside ? 16 : 0);
    }
    next_ = end;
  }

  __device__ __forceinline__ void turn(int step) {
    a_ = gradient(step);
    const int begin = first(step), in_ring = begin - p_.lines.quotient(begin) * p_.lines.by;
    int by[kSlots][3];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int tap = first_tap_ + Sums<C, S>::column() / S::kChannels + s;
      p_.window.tap(min(tap, p_.taps - 1), by[s]);
      moved_[s] = p_.window.number(0, by[s]);
      if (tap >= p_.taps) by[s][0] = kNowhere;
    }
    inside_ = 0;
#pragma unroll
    for (int i = 0; i < kProducts * kRows; ++i) {
      const int m = step * kDepth + i / kRows * fastnets::kDepth<C> + row() + i % kRows * 4;
      const bool exists = m < p_.results;
      int at[3];  // behind the last result, too, for the same banks
      line_[i] = p_.window.number(begin_of(m, at), at) - begin + in_ring;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        inside_ |= static_cast<uint32_t>(exists && p_.window.inside(at, by[s])) << (i * kSlots + s);
      }
    }
  }

  static constexpr __device__ __forceinline__ int depth() { return kDepth; }
  __device__ __forceinline__ Fragment<C> a(int i, int k) const { return read_a_(a_, k, Sums<C, S>::row() + 16 * i); }
  __device__ __forceinline__ Fragment<C> b(int j, int k) const {
    constexpr int kHalf = 16 * static_cast<int>(sizeof(T)), kHalves = S::kChannels / 16;
    const int slot = j / kHalves, half = j % kHalves * kHalf, product = k / fastnets::kDepth<C>;
    uint32_t r[4];
    if constexpr (sizeof(T) == 2) {
      load_matrix<true>(r, shared_ + (place(product, slot) ^ half));
    } else {
      const int places[2] = {place(2 * product, slot), place(2 * product + 1, slot)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i] = load_shared(reinterpret_cast<const uint32_t*>(shared_ + (places[i % 2] ^ half ^ i / 2 * kHalf / 2)));
      }
    }
    return to_fragment<C>(r);
  }

  // Stores a share.
  __device__ __forceinline__ void store(const Sums<C, S>& sums, int split, const Place& at) const {
    const int first = p_.tap_groups.quotient(at.column / S::kN) * S::kChannels;
    sums.pairs([&](int r, int c, const Vector<float, 2>& pair) {
      const int tap = first_tap_ + c / S::kChannels, channel = first + c % S::kChannels;
      if (at.row + r < p_.partial.rows && tap < p_.taps && channel < p_.channels) {
        store_global(p_.partial.row(split, at.group, at.row + r) + tap * p_.channels + channel, pair);
      }
    });
  }

 private:
  static constexpr int kNowhere = -(1 << 30);  // no result's tap is inside from here

  __device__ __forceinline__ A gradient(int step) const { return A(shared_ + kZeros + step % S::kStages * A::kBytes); }
  // Where a chunk of a line lies in the ring, in bytes. Chunks are exchanged so that the banks of a matrix of ldmatrix,
  // eight lines in a row as results meet them, differ, as do those of four lines that 32-bit elements are gathered
  // from, two chunks of each. Lines of 16-bit elements fill half of the banks; two in a row, of which the first one's
  // number is even, fill all.
  __device__ __forceinline__ int chunk(int line, int index) const {
    const int by = sizeof(T) == 4 ? (line >> p_.shift & 3) << 1 : line >> p_.shift & 7;
    return (line * kLineBytes + index * 16) ^ by * 16;
  }
  // Of this lane, in the depth of a product: of ldmatrix's rows, or of the elements that it gathers.
  static __device__ __forceinline__ int row() {
    const int lane = threadIdx.x % 32;
    return sizeof(T) == 4 ? lane % 4 : lane % 16;
  }
  __device__ __forceinline__ int begin_of(int result, int (&at)[3]) const {
    p_.window.begin(result, at);
    return p_.window.positions.quotient(result);
  }
  // Of the pixels that a step meets: the first one, and the one behind the last; both even.
  __device__ __forceinline__ int first(int step) const {
    int at[3];
    const int image = begin_of(step * kDepth, at);
    return p_.window.bound(image, at, {}, 0) & -2;
  }
  __device__ __forceinline__ int end(int step) const {
    int at[3];
    const int image = begin_of(min((step + 1) * kDepth, p_.results) - 1, at);
    return (p_.window.bound(image, at, p_.span, 1) + 1) & -2;
  }
  // Where this lane reads row i's pixel at a tap, or zeros in the same banks.
  __device__ __forceinline__ int place(int i, int slot) const {
    const int lane = threadIdx.x % 32;
    int line = line_[i] + moved_[slot];
    line -= line >= p_.lines.by ? p_.lines.by : 0;
    const int place = chunk(line, lane / 16) + (sizeof(T) == 4 ? lane / 4 % 4 * 4 : 0);
    return inside_ >> (i * kSlots + slot) & 1 ? kRing + place : place & (kZeros - 1);
  }

  const HeldWeight& p_;
  unsigned char* shared_;
  int grad_, x_;  // where this thread's channels begin
  bool has_a_, has_x_;
  int first_tap_;
  int next_;  // pixel to be brought
  int line_[kProducts * kRows], moved_[kSlots];
  uint32_t inside_;
  A a_;
  Reader<C, A, Side::kA, true> read_a_;
};

template <class C, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) conv_held_weight(HeldWeight p) {
  DYNAMIC_SHARED(shared);
  const Place at = Place::of<S>(p.tiles_m, p.tiles_n, p.partial.groups);
  const int begin = share(p.steps, at.split, p.splits);
  HeldWeightFeed<C, S> feed(p, shared, at, begin);
  Sums<C, S> sums;
  sums.accumulate(begin, share(p.steps, at.split + 1, p.splits), feed);
  feed.store(sums, p.first_split + at.split, at);
}

constexpr int kMostShift = 2;

// How many lines lie from the first pixel that `results` in a row meet to the last one: what each result, and each end
// of a line, plane or image that they pass, moves on by.
int64_t lines_for(const Window& window, const Axis (&axes)[3], int64_t results) {
  int64_t lines = 1 + (results - 1) * axes[2].pull, count = 1, pixels = 1;
  for (int d = 2; d >= 0; --d) {
    const Axis& axis = axes[d];
    count *= axis.count;
    const int64_t ends = (results - 1 + count - 1) / count;
    const int64_t further = d > 0 ? axes[d - 1].pull * window.next[d - 1].by : window.next_image.by;
    lines += axis.span() * pixels + ends * std::max<int64_t>(further - axis.count * axis.pull * pixels, 0);
    if (d > 0) pixels = window.next[d - 1].by;
  }
  return lines;
}

template <class C>
std::optional<WeightShares> shares(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  using T = typename C::Storage;
  using S = HeldTaps;
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const int64_t positions = s.out[0] * s.out[1] * s.out[2];
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], width = padded<T>(s.in_channels);
  const int64_t together = images_together(s);
  HeldWeight w{};
  w.window =
      window_of(axes, strides_of(true, s.groups * width, s.in).at, s.groups * width * s.in[0] * s.in[1] * s.in[2]);
  while (w.shift < kMostShift && (axes[2].pull >> w.shift) % 2 == 0) ++w.shift;
  const int cycle = 8 << w.shift;
  const bool numbered = set_apart(w.window, axes, cycle, together);
  const int64_t lines = (lines_for(w.window, axes, S::kStages * kStageDepth<T>) + 2 + cycle - 1) / cycle * cycle;
  const int64_t tap_groups = (taps + S::kTaps - 1) / S::kTaps, parts = (width + S::kChannels - 1) / S::kChannels;
  bool fits = positions > 0 && 2 * taps * width >= tap_groups * parts * S::kN && numbered &&
              HeldWeightFeed<C, S>::bytes(lines) <= static_cast<int64_t>(shared_limit());
  for (const Axis& axis : axes) fits = fits && -axis.offset <= axis.span();  // the pixels of a result are in order
  if (!fits) return {};
  const auto grad = operand_of<T>(p.grad, s, s.out_channels, s.out, workspace, stream);
  const auto x = operand_of<T>(p.x, s, s.in_channels, s.in, workspace, stream);
  w.grad = grad.data, w.x = x.data;
  w.grad_channels = grad.channels, w.channels = x.channels, w.grad_pixel = grad.pixel;
  w.tap_groups = Divisor(static_cast<int>(tap_groups)), w.taps = static_cast<int>(taps);
  for (int d = 0; d < 3; ++d) w.span[d] = static_cast<int>(axes[d].span());
  w.lines = Divisor(static_cast<int>(lines));
  const auto steps_of = [&](int64_t images) { return (images * positions + kStageDepth<T> - 1) / kStageDepth<T>; };
  const int columns = to_int(taps * width, "elements of a filter");
  const unsigned blocks = w.divide<S>(workspace, s, columns, tap_groups * parts, steps_of(together));
  const WeightShares found{w.partial, static_cast<int>(width), 1};
  if (workspace.counts()) return found;
  w.template for_launches<T>(s, grad.image, x.image, [&](int64_t images) {
    w.images = static_cast<int>(images), w.results = static_cast<int>(images * positions);
    w.steps = static_cast<int>(steps_of(images));
    launch({"conv_grad_weight", blocks, S::kThreads, stream, static_cast<size_t>(HeldWeightFeed<C, S>::bytes(lines))},
           conv_held_weight<C, S>, w);
  });
  return found;
}

}  // namespace

std::optional<WeightShares> held_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  std::optional<WeightShares> found;
  with_arithmetic(p.shape.dtype, p.shape.tf32,
                  [&](auto arithmetic) { found = shares<decltype(arithmetic)>(p, workspace, stream); });
  return found;
}

}  // namespace fastnets::cuda

// What the convolution kernels share: geometry without divisions, and operands laid out anew.
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
  // Pixels are numbered over all images, as many from one image, plane and line to the next: without gaps, or
  // set_apart.
  Divisor next_image, next[2];

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
  __device__ __forceinline__ int number(int image, const int (&at)[3]) const {
    return image * next_image.by + at[0] * next[0].by + at[1] * next[1].by + at[2];
  }
  // The image of the pixel of that number and, in `at`, where it lies there: outside, of a number between pixels.
  __device__ __forceinline__ int pixel_of(int number, int (&at)[3]) const {
    at[2] = number;
    const int image = next_image.divide(at[2]);
    at[0] = next[0].divide(at[2]), at[1] = next[1].divide(at[2]);
    return image;
  }
  // The number of the pixel at `at` moved on, or of the one `behind` it. Where a coordinate lies outside it is that of
  // the line, plane or image that is next: it never falls from one result to the next.
  __device__ __forceinline__ int bound(int image, const int (&at)[3], const int (&by)[3], int behind) const {
    int found = image * next_image.by;
    bool inside = true;
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int v = at[d] + by[d];
      found += inside ? min(max(v + (d == 2 ? behind : 0), 0), extent[d]) * (d == 2 ? 1 : next[d].by) : 0;
      inside = inside && 0 <= v && v < extent[d];
    }
    return found;
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
  int64_t pixels = 1;  // beyond 32 bits: of a source that is not numbered
  for (int d = 2; d >= 0; --d) {
    pixels = std::clamp<int64_t>(pixels * w.extent[d], 1, kLimit - 1);
    (d > 0 ? w.next[d - 1] : w.next_image) = Divisor(static_cast<int>(pixels));
  }
  const int64_t positions = axes[0].count * axes[1].count * axes[2].count;
  w.positions = Divisor(std::max(to_int(positions, "positions in an image"), 1));
  w.at = Coordinates(static_cast<int>(axes[1].count), static_cast<int>(axes[2].count));
  w.taps = Coordinates(static_cast<int>(axes[1].taps), static_cast<int>(axes[2].taps));
  return w;
}

constexpr int kMostRows = 256;  // of a tile

// Sets the numbers of pixels apart: so that from a result to the next, whether in its line or not, they move on by as
// many, but for multiples of `cycle`. False where `images`, and as many more as a tile has rows, take more than 32
// bits: then they are left as they are.
inline bool set_apart(Window& window, const Axis (&axes)[3], int cycle, int64_t images) {
  Window found = window;
  int64_t results = axes[2].pull, pixels = 1;
  for (int d = 2; d >= 0; --d) {
    const int64_t pull = d > 0 ? axes[d - 1].pull : 1;
    results *= axes[d].count, pixels *= axes[d].extent;
    int more = 0;
    while (more < cycle && ((pixels + more) * pull - results) % cycle != 0) ++more;
    pixels += more % cycle;
    if (pixels * (images + kMostRows) >= kLimit) return false;
    (d > 0 ? found.next[d - 1] : found.next_image) = Divisor(static_cast<int>(pixels));
  }
  window = found;
  return true;
}

// ---- layout --------------------------------------------------------------------------------------------------------

// Rearranges `outer` times `inner` matrices: element [p][c] of `from` goes to row p of `to`, with zeros from `channels`
// to `padded`. Pixels are counted as they lie in `from`.
struct Layout {
  const void* from;
  void* to;
  int outer, inner, pixels, channels, padded;
  int64_t from_outer, from_inner, from_pixel[3], from_channel;
  int64_t to_outer, to_inner, to_pixel[3];
  Coordinates at;       // of a pixel
  bool channels_first;  // neighbouring channels lie closer in `from` than neighbouring pixels
  bool pairs;           // rows of `to` may be written two elements at a time
};

void arrange(Dtype dtype, Layout p, Stream stream);

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
  p.to_outer = found.image, p.to_inner = width, p.to_pixel[2] = found.pixel;
  p.at = Coordinates(1, p.pixels);
  p.channels_first = innermost;
  arrange(s.dtype, p, stream);
  return copy;
}

}  // namespace fastnets::cuda

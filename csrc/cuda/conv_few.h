// Few source channels, as in a network's first layer: chunks of 16 bytes would be mostly padding and every tap would
// bring pixels anew. The pixels that a tile of results meets lie on chip as they are, element by element, and taps and
// channels are one packed axis, of which element k lies at place(k) from where a result's first tap does. Its order is
// the source's: the channels are its fastest dimension where they are the source's innermost one, else its slowest.
//
// A patch's lines, planes and channels are set apart so that, without dilation, place(k) is k but for whole multiples
// of 128 bytes: so elements of the packed axis in a row are read without bank conflicts.
#pragma once

#include "conv_product.h"

namespace fastnets::cuda {

// Whether a source's channels are its innermost dimension.
inline bool is_innermost(const Strides& strides) { return strides.channel == 1; }

struct Patch {
  Window window;            // of the source itself, in any layout
  int64_t channel;          // its stride
  int depth;                // taps * channels
  Divisor inner, taps;      // channels that lie beside each other: all of a group's, or one; taps
  Divisor line;             // elements of a patch's lines
  Divisor height, planes;   // lines of a plane; planes, one for each tap along the first dimension, of a channel
  int lines;                // in all
  int pitch, plane, outer;  // from one line to the next, from one plane, from one channel where they are outermost
  int64_t elements;         // of a patch; more than any block may have where that is beyond 32 bits
  int tile_width;           // log2: of a tile of `Results` in rows of the result's last dimension
  int count[3];             // the results of an image
  Coordinates tiles;        // of a plane of results: down, across
};

// Element k of the packed axis: its tap, and its channel, which is returned.
__device__ __forceinline__ int element(const Patch& p, int k, int (&tap)[3]) {
  int rest = p.inner.divide(k);
  const int outer = p.taps.divide(rest);
  p.window.taps(rest, tap);
  return outer + k;
}

// A tile of Results results and their patch, which all threads of a block take part in.
template <class T, int Results>
class FewTile {
 public:
  __device__ __forceinline__ FewTile(const Patch& p, int tile) : p_(p) {
    int at[3];
    p.tiles(tile, at);
    plane_ = at[0];
    first_[0] = at[1] * (Results >> p.tile_width), first_[1] = at[2] << p.tile_width;
  }

  // The number of the tile's result r, -1 where it has none.
  __device__ __forceinline__ int result(int r) const {
    const int h = first_[0] + (r >> p_.tile_width), w = first_[1] + (r & ((1 << p_.tile_width) - 1));
    return h < p_.count[1] && w < p_.count[2] ? (plane_ * p_.count[1] + h) * p_.count[2] + w : -1;
  }

  // Where the first tap of result r lies in the patch.
  static __device__ __forceinline__ int place_of(const Patch& p, int r) {
    const int h = r >> p.tile_width, w = r & ((1 << p.tile_width) - 1);
    return h * p.window.pull[1] * p.pitch + w * p.window.pull[2] * p.inner.by;
  }
  // How far from there element k of the packed axis lies.
  static __device__ __forceinline__ int place(const Patch& p, int k) {
    int tap[3];
    const int channel = element(p, k, tap);
    const int h = tap[1] * p.window.tap_step[1], w = tap[2] * p.window.tap_step[2];
    return tap[0] * p.plane + h * p.pitch + w * p.inner.by + channel * (p.inner.by > 1 ? 1 : p.outer);
  }

  // Loads the patch of a group's channels; the caller synchronizes.
  template <int Threads>
  __device__ __forceinline__ void load(T* patch, const T* source) const {
    const Window& window = p_.window;
    const int depth = p_.count[0], image = plane_ / depth;
    const int from[3] = {(plane_ - image * depth) * window.pull[0] + window.offset[0],
                         first_[0] * window.pull[1] + window.offset[1], first_[1] * window.pull[2] + window.offset[2]};
    // Neighbouring threads take what lies side by side in the source.
#pragma unroll 1
    for (int i = threadIdx.x; i < p_.line.by * p_.lines; i += Threads) {
      int rest = i, y = p_.line.divide(rest), to = rest;
      const int x = p_.inner.divide(rest);
      int plane = p_.height.divide(y);
      const int outer = p_.planes.divide(plane), channel = outer + rest;
      to += y * p_.pitch + plane * p_.plane + outer * p_.outer;
      const int by[3] = {plane * window.tap_step[0], y, x};
      const int64_t place = image * window.image + (from[0] + by[0]) * window.pixel[0] +
                            (from[1] + by[1]) * window.pixel[1] + (from[2] + by[2]) * window.pixel[2] +
                            channel * p_.channel;
      store_shared(patch + to, load_global_if<1>(window.inside(from, by), source + place)[0]);
    }
  }

 private:
  const Patch& p_;
  int plane_, first_[2];
};

// The patch of tiles of `results`, for axes in which each result takes its taps.
template <class T>
Patch patch_of(const Axis (&axes)[3], const Strides& strides, int64_t image, int64_t channels, int results) {
  Patch p{};
  p.window = window_of(axes, strides.at, image);
  p.channel = strides.channel;
  const int64_t inner = is_innermost(strides) ? channels : 1, outer = channels / inner;
  const int64_t taps = axes[0].taps * axes[1].taps * axes[2].taps;
  p.inner = Divisor(static_cast<int>(inner)), p.taps = Divisor(to_int(taps, "taps"));
  p.depth = to_int(taps * channels, "elements of a filter");
  for (int d = 0; d < 3; ++d) p.count[d] = static_cast<int>(axes[d].count);
  int width = 16;
  while (width < results && results / width >= 2 * p.count[1]) width *= 2;
  while (width > 4 && width / 2 >= p.count[2]) width /= 2;
  const int height = results / width;
  while (1 << p.tile_width < width) ++p.tile_width;
  p.tiles = Coordinates((p.count[1] + height - 1) / height, (p.count[2] + width - 1) / width);

  const int64_t down = to_int((height - 1) * axes[1].pull + axes[1].span() + 1, "positions");
  const int64_t across = to_int(((width - 1) * axes[2].pull + axes[2].span() + 1) * inner, "positions");
  // The least that is not less than `size` and as many elements as one takes of the packed axis, but for whole cycles.
  constexpr int64_t kCycle = 128 / sizeof(T);
  const auto set_apart = [](int64_t size, int64_t packed) {
    return size + ((packed - size) % kCycle + kCycle) % kCycle;
  };
  const int64_t pitch = set_apart(across, axes[2].taps * inner);
  const int64_t plane = std::min(set_apart(down * pitch, axes[1].taps * axes[2].taps * inner), kLimit);
  const int64_t of_channel = set_apart(axes[0].taps * plane, taps * inner);
  p.elements = outer * of_channel;
  p.pitch = static_cast<int>(pitch), p.plane = static_cast<int>(plane), p.outer = static_cast<int>(of_channel);
  p.line = Divisor(static_cast<int>(across)), p.height = Divisor(static_cast<int>(down));
  p.planes = Divisor(static_cast<int>(axes[0].taps)), p.lines = static_cast<int>(outer * axes[0].taps * down);
  return p;
}

// Of a patch in shared memory.
template <class T>
int64_t patch_bytes(const Patch& p) {
  return (p.elements * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
}

}  // namespace fastnets::cuda

// Few source channels, as in a network's first layer: chunks of 16 bytes would be mostly padding and every tap would
// bring pixels anew. The pixels that a tile of results meets lie on chip as they are, element by element, and taps and
// channels are one packed axis, of which element k lies at place(k) from where a result's first tap does.
#pragma once

#include "conv_product.h"

namespace fastnets::cuda {

struct Patch {
  Window window;      // of the source itself, in any layout
  int64_t channel;    // its stride
  Divisor channels;   // of a group
  int depth;          // taps * channels
  int height, width;  // of a patch: source pixels
  int planes;         // one for each tap along the first dimension
  int tile_width;     // log2: of a tile of `Results` in rows of the result's last dimension
  int count[3];       // the results of an image
  Coordinates tiles;  // of a plane of results: down, across
  bool innermost;     // the source's channels
};

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
    return (h * p.window.pull[1] * p.width + w * p.window.pull[2]) * p.channels.by;
  }
  // How far from there element k of the packed axis lies.
  static __device__ __forceinline__ int place(const Patch& p, int k) {
    int channel = k, tap[3];
    p.window.taps(p.channels.divide(channel), tap);
    const int h = tap[1] * p.window.tap_step[1], w = tap[2] * p.window.tap_step[2];
    return ((tap[0] * p.height + h) * p.width + w) * p.channels.by + channel;
  }

  // Loads the patch of a group's channels; the caller synchronizes.
  template <int Threads>
  __device__ __forceinline__ void load(T* patch, const T* source) const {
    const Window& window = p_.window;
    const int depth = p_.count[0], image = plane_ / depth;
    const int from[3] = {(plane_ - image * depth) * window.pull[0] + window.offset[0],
                         first_[0] * window.pull[1] + window.offset[1], first_[1] * window.pull[2] + window.offset[2]};
    const int line = p_.width * p_.channels.by, lines = p_.planes * p_.height;
    // Neighbouring threads take what lies side by side in the source.
#pragma unroll 1
    for (int i = threadIdx.x; i < line * lines; i += Threads) {
      const int y = i / line, rest = i - y * line;
      const int x = p_.innermost ? rest / p_.channels.by : rest % p_.width;
      const int channel = p_.innermost ? rest - x * p_.channels.by : rest / p_.width;
      const int plane = y / p_.height;
      const int by[3] = {plane * window.tap_step[0], y - plane * p_.height, x};
      const int64_t place = image * window.image + (from[0] + by[0]) * window.pixel[0] +
                            (from[1] + by[1]) * window.pixel[1] + (from[2] + by[2]) * window.pixel[2] +
                            channel * p_.channel;
      store_shared(patch + (y * p_.width + x) * p_.channels.by + channel,
                   load_global_if<1>(window.inside(from, by), source + place)[0]);
    }
  }

 private:
  const Patch& p_;
  int plane_, first_[2];
};

// The patch of tiles of `results`, for axes in which each result takes its taps.
inline Patch patch_of(const Axis (&axes)[3], const Strides& strides, int64_t image, int64_t channels, int results) {
  Patch p{};
  p.window = window_of(axes, strides.at, image);
  p.channel = strides.channel, p.innermost = strides.channel == 1;
  p.channels = Divisor(to_int(channels, "channels"));
  p.depth = to_int(axes[0].taps * axes[1].taps * axes[2].taps * channels, "elements of a filter");
  for (int d = 0; d < 3; ++d) p.count[d] = static_cast<int>(axes[d].count);
  int width = 16;
  while (width < results && results / width >= 2 * p.count[1]) width *= 2;
  while (width > 4 && width / 2 >= p.count[2]) width /= 2;
  const int height = results / width;
  while (1 << p.tile_width < width) ++p.tile_width;
  p.height = to_int((height - 1) * axes[1].pull + axes[1].span() + 1, "positions");
  p.width = to_int((width - 1) * axes[2].pull + axes[2].span() + 1, "positions");
  p.planes = static_cast<int>(axes[0].taps);
  p.tiles = Coordinates((p.count[1] + height - 1) / height, (p.count[2] + width - 1) / width);
  return p;
}

// Of a patch in shared memory; more than any block may have where that is beyond 32 bits.
template <class T>
int64_t patch_bytes(const Patch& p) {
  return (int64_t{p.planes} * p.height * p.width * p.channels.by * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
}

}  // namespace fastnets::cuda

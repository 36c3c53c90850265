// Backwards to the weight: what its kernels share.
#pragma once

#include <optional>

#include "conv_product.h"

namespace fastnets::cuda {

// As many images a launch as 32 bits can number the results of.
inline int64_t images_together(const ConvShape& s) {
  return std::min(s.batch, (kLimit - 1) / std::max<int64_t>(s.out[0] * s.out[1] * s.out[2], 1));
}

// How many launches that takes: one for no images, which sets everything to zero.
inline int64_t launches_for(const ConvShape& s) {
  const int64_t together = images_together(s);
  return together == 0 ? 1 : (s.batch + together - 1) / together;
}

// What every kernel is given: a launch, whose depth is shared out.
struct WeightPass {
  const void *grad, *x;
  Partial partial;  // [out channels, taps and channels of x] of each group
  int first_split, splits, steps, tiles_m, tiles_n;
  int grad_channels;  // of a group, padded
  int64_t grad_pixel;

  // Cuts up to `steps` of the depth into shares, with memory for the sums of all launches; `across`: tiles of columns.
  // Returns how many blocks a launch has.
  template <class S>
  unsigned divide(Workspace& workspace, const ConvShape& s, int columns, int64_t across, int64_t most_steps) {
    const int rows = static_cast<int>(s.out_channels), groups = to_int(s.groups, "groups");
    tiles_m = (rows + S::kM - 1) / S::kM, tiles_n = to_int(across, "blocks");
    const int64_t tiles = int64_t{tiles_m} * tiles_n * groups;
    splits = splits_for(tiles, most_steps);
    partial = Partial::take(workspace, static_cast<int>(launches_for(s) * splits), groups, rows, columns);
    return static_cast<unsigned>(to_int(tiles * splits, "blocks"));
  }

  // Calls start(images) for every launch, with its first image and share here.
  template <class T, class F>
  void for_launches(const ConvShape& s, int64_t grad_image, int64_t x_image, F&& start) {
    const int64_t together = images_together(s);
    for (int64_t i = 0; i < launches_for(s); ++i) {
      first_split = static_cast<int>(i * splits);
      start(std::min(together, s.batch - i * together));
      grad = static_cast<const T*>(grad) + together * grad_image;
      x = static_cast<const T*>(x) + together * x_image;
    }
  }
};

// The sums, and how many of their columns lie from one tap to the next, and from one channel.
struct WeightShares {
  Partial sums;
  int tap, channel;
};

// Several taps that meet neighbouring pixels (conv_held_weight.cu). Nothing where too little of a tile would be used or
// the pixels do not fit.
std::optional<WeightShares> held_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream);

// Few channels of x (conv_few_weight.cu). Nothing where there are more or they do not fit.
std::optional<WeightShares> few_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream);

}  // namespace fastnets::cuda

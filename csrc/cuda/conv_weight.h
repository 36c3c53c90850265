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

// Several taps that meet neighbouring pixels (conv_held_weight.cu): the shares of the sums, nothing where too little of
// a tile would be used or the pixels do not fit.
std::optional<Partial> held_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream);

// Few channels of x (conv_few_weight.cu): the shares of the sums, nothing where there are more or they do not fit.
std::optional<Partial> few_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream);

}  // namespace fastnets::cuda

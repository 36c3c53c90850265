// The geometry of a convolution on every device: what a result takes from where. Included with FASTNETS_ISA naming the
// namespace: an instruction set, or `cuda`, so that no inline function is shared between them.
#pragma once

#include "cpu/kernels.h"

namespace fastnets::FASTNETS_ISA {

// One spatial axis. Result position first + j * step, j < count, takes at its i-th tap, i < taps, kernel position
// tap + i * tap_step and source position j * pull + offset + i * offset_step, which counts if it lies in [0, extent).
struct Axis {
  int64_t count, first, step;
  int64_t pull, taps, tap, tap_step, offset, offset_step, extent;

  int64_t span() const { return (taps - 1) * offset_step; }
};

inline Axis forward_axis(const ConvShape& s, int d) {
  return {s.out[d], 0, 1, s.stride[d], s.kernel[d], 0, 1, -s.padding[d], s.dilation[d], s.in[d]};
}

// The gradient in x: x's positions phase, phase + stride, ... meet the same taps, those with stride dividing
// phase + padding - tap * dilation. With their order reversed the offsets ascend. Without taps the result is zero.
inline Axis grad_input_axis(const ConvShape& s, int d, int64_t phase) {
  const int64_t stride = s.stride[d], dilation = s.dilation[d], ahead = phase + s.padding[d];
  Axis axis{(s.in[d] - phase + stride - 1) / stride, phase, stride, 1, 0, 0, 0, 0, 1, s.out[d]};
  int64_t common = stride, rest = dilation;
  while (rest != 0) {
    const int64_t next = common % rest;
    common = rest, rest = next;
  }
  const int64_t every = stride / common;  // taps apart
  for (int64_t tap = 0; tap < s.kernel[d] && tap < every; ++tap) {
    if ((ahead - tap * dilation) % stride != 0) continue;
    axis.taps = (s.kernel[d] - 1 - tap) / every + 1;
    axis.tap = tap + (axis.taps - 1) * every;
    axis.tap_step = -every;
    axis.offset_step = dilation / common;
    axis.offset = (ahead - axis.tap * dilation) / stride;
  }
  return axis;
}

// A tensor [batch, channels, *sizes] in memory, one image and group of it: element strides.
struct Strides {
  int64_t channel, at[3];
};
inline Strides strides_of(bool channels_last, int64_t channels, const int64_t* sizes) {
  const int64_t pixel = channels_last ? channels : 1;
  return {channels_last ? 1 : sizes[0] * sizes[1] * sizes[2], {sizes[1] * sizes[2] * pixel, sizes[2] * pixel, pixel}};
}

}  // namespace fastnets::FASTNETS_ISA

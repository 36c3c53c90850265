// Convolution as a matrix product without the matrix. The part of the source that a block of results needs is staged:
// copied once into float or double, channels innermost, zeros where padding lies. In it the operand row of a result is
// a few runs of consecutive elements at the same distances for every result, so that the register tiles read it where
// it lies: im2col is an address, not a copy.
#pragma once

#include "gemm.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kWeightSlot = 0, kStageSlot = 1, kSumSlot = 2, kRunSlot = 3, kGradSlot = 4;  // scratch memory
constexpr int64_t kStageBytes = 256 << 10;  // of a staged block: with a panel of the weight, in the second-level cache
constexpr int64_t kGrain = 1 << 17;         // multiply-adds worth waking a thread for

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

// How one axis of a block of results lies in its staged source: result j (counted in the block), tap i at position
// j * pull + i * tap; position p is source position low + p * scale.
struct StagedAxis {
  int64_t begin, count;  // the block's results
  int64_t size, pull, tap, low, scale;
};
inline StagedAxis staged_axis(const Axis& axis, int64_t begin, int64_t count) {
  const int64_t low = begin * axis.pull + axis.offset;
  // Where only one result, or only one tap, is at stake, nothing between its positions is staged.
  if (count == 1) return {begin, count, axis.taps, 0, 1, low, axis.offset_step};
  if (axis.taps <= 1) return {begin, count, count, 1, 0, low, axis.pull};
  return {begin, count, (count - 1) * axis.pull + axis.span() + 1, axis.pull, axis.offset_step, low, 1};
}

// A block of results and its staged source [axes[0].size][axes[1].size][axes[2].size][channels].
struct Block {
  StagedAxis axes[3];
  int64_t channels;

  int64_t pixels() const { return axes[0].count * axes[1].count * axes[2].count; }
  int64_t stride(int d) const {
    return d == 2 ? channels : d == 1 ? axes[2].size * channels : axes[1].size * axes[2].size * channels;
  }
  int64_t elements() const { return axes[0].size * stride(0); }
  // Where the operand row of the block's q-th result begins.
  int64_t row(int64_t q) const {
    const int64_t w = q % axes[2].count, h = q / axes[2].count % axes[1].count, d = q / axes[2].count / axes[1].count;
    return d * axes[0].pull * stride(0) + h * axes[1].pull * stride(1) + w * axes[2].pull * stride(2);
  }
};

// Consecutive elements of an operand row.
struct Run {
  int64_t offset, length;
};

// The runs of the block's operand rows, in the order of taps; returns how many. Taps that lie beside each other in the
// innermost axis form one run.
inline int64_t runs_of(const Block& block, const Axis* axes, Run* runs) {
  const bool joined = block.axes[2].tap == 1 || axes[2].taps == 1;
  const int64_t apart = joined ? 1 : axes[2].taps, length = joined ? axes[2].taps * block.channels : block.channels;
  int64_t n = 0;
  for (int64_t d = 0; d < axes[0].taps; ++d) {
    for (int64_t h = 0; h < axes[1].taps; ++h) {
      for (int64_t w = 0; w < apart; ++w) {
        runs[n++] = {d * block.axes[0].tap * block.stride(0) + h * block.axes[1].tap * block.stride(1) +
                         w * block.axes[2].tap * block.stride(2),
                     length};
      }
    }
  }
  return n;
}

template <class T, class S>
FASTNETS_INLINE void copy_converted(const S* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load(from + i));
  if (i < n) store_partial<T>(to + i, load_partial(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

// Stages a block: `source` is one image and group, its channels strides.channel apart.
template <class T, class S>
void stage(const S* source, const Strides& strides, const Axis* axes, const Block& block, T* to) {
  const int64_t channels = block.channels, width = block.axes[2].size;
  const StagedAxis& w = block.axes[2];
  // Positions [begin, end) of the row lie inside the source.
  int64_t begin = w.low >= 0 ? 0 : (-w.low + w.scale - 1) / w.scale;
  int64_t end = w.low >= axes[2].extent ? 0 : (axes[2].extent - 1 - w.low) / w.scale + 1;
  begin = at_most(begin, width), end = at_most(end, width);
  if (end < begin) end = begin;
  const int64_t step = w.scale * strides.at[2];
  for (int64_t i = 0; i < block.axes[0].size; ++i) {
    const int64_t d = block.axes[0].low + i * block.axes[0].scale;
    for (int64_t j = 0; j < block.axes[1].size; ++j, to += width * channels) {
      const int64_t h = block.axes[1].low + j * block.axes[1].scale;
      if (d < 0 || d >= axes[0].extent || h < 0 || h >= axes[1].extent || begin == end) {
        std::memset(to, 0, static_cast<size_t>(width * channels) * sizeof(T));
        continue;
      }
      std::memset(to, 0, static_cast<size_t>(begin * channels) * sizeof(T));
      std::memset(to + end * channels, 0, static_cast<size_t>((width - end) * channels) * sizeof(T));
      const S* from = source + d * strides.at[0] + h * strides.at[1] + (w.low + begin * w.scale) * strides.at[2];
      T* row = to + begin * channels;
      if (strides.channel == 1) {
        if (step == channels) {
          copy_converted<T>(from, (end - begin) * channels, row);
        } else {
          for (int64_t p = begin; p < end; ++p, from += step, row += channels) copy_converted<T>(from, channels, row);
        }
        continue;
      }
      int64_t c = 0;
      if (step == 1) {
        for (; c + 4 <= channels; c += 4) {
          pack_quad<T>(from + c * strides.channel, strides.channel, end - begin, row + c, channels);
        }
      }
      for (; c < channels; ++c) {
        const S* plane = from + c * strides.channel;
        for (int64_t p = 0; p < end - begin; ++p) row[p * channels + c] = to_float(plane[p * step]);
      }
    }
  }
}

// How the results are cut into blocks: at most `size` along each axis.
struct Cut {
  const Axis* axes;
  int64_t channels;  // of the source
  int64_t size[3], pieces[3];

  int64_t count() const { return pieces[0] * pieces[1] * pieces[2]; }
  Block block(int64_t index) const {
    Block block{};
    block.channels = channels;
    for (int d = 2; d >= 0; --d) {
      const int64_t begin = index % pieces[d] * size[d];
      block.axes[d] = staged_axis(axes[d], begin, at_most(size[d], axes[d].count - begin));
      index /= pieces[d];
    }
    return block;
  }
};

inline Cut cut_into(const Axis* axes, int64_t channels, const int64_t (&sizes)[3]) {
  Cut cut{axes, channels, {}, {}};
  for (int d = 0; d < 3; ++d) {
    const int64_t count = axes[d].count, pieces = (count + sizes[d] - 1) / sizes[d];
    cut.size[d] = (count + pieces - 1) / pieces;  // evenly
    cut.pieces[d] = (count + cut.size[d] - 1) / cut.size[d];
  }
  return cut;
}

// Blocks of up to `pixels` results: whole rows where their staged source fits the second-level cache, one plane deep;
// smaller ones where `outer` times as many would not feed every thread.
template <class T>
Cut choose_cut(const Axis* axes, int64_t channels, int64_t outer, int64_t pixels) {
  const auto staged = [&](int64_t h, int64_t w) {
    const Block block{{staged_axis(axes[0], 0, 1), staged_axis(axes[1], 0, h), staged_axis(axes[2], 0, w)}, channels};
    return block.elements() * static_cast<int64_t>(sizeof(T));
  };
  int64_t sizes[3] = {1, 1, at_most(axes[2].count, pixels)};
  auto& [d, h, w] = sizes;
  while (w > 2 * kTileRows && staged(1, w) > kStageBytes) w = (w + 1) / 2;
  if (w == axes[2].count) {
    while (h < axes[1].count && (h + 1) * w <= pixels && staged(h + 1, w) <= kStageBytes) ++h;
  }
  const int64_t threads = thread_count(), wanted = threads > 1 ? 3 * threads : 1;
  while (h > 1 && (h - 1) * w >= kTileRows && outer * cut_into(axes, channels, sizes).count() < wanted) --h;
  return cut_into(axes, channels, sizes);
}

// The weight is packed in panels, [panel][tap][source channel][column]: kTileVectors wide, the last one half if it can.
template <class T>
int64_t panel_count(int64_t channels) {
  return (channels + kTileCols<T> - 1) / kTileCols<T>;
}
template <class T>
int panel_vectors(int64_t channels, int64_t first) {
  return channels - first > kLanes<T> ? kTileVectors : 1;
}

}  // namespace fastnets::FASTNETS_ISA

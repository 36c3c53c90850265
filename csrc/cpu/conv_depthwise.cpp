// Depthwise convolution: a group is one channel, so lanes are channels and every tap is a product lane by lane. Staged
// as the others, a few vectors of channels at a time.

#include "conv.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kRows = kVectorBytes == 16 ? 4 : 6;  // pixels, or taps, of a tile: two vectors each
constexpr int64_t kChannelsTogether = 256;
constexpr int64_t kGatherPixels = 32 * kRows, kWeightPixels = 16 * kRows;

// sums[kRows][kTileVectors] (+)= over the runs, the operand rows' vectors times the weight[tap][kTileVectors].
// A tap's elements are `step` apart from those of the tap beside it.
template <class T>
void gather_tile(const T* const* rows, const Run* runs, int64_t count, int64_t step, const T* weight, bool accumulate,
                 T* sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kTileVectors] = {};
  for (const Run* run = runs; run < runs + count; ++run) {
    for (int64_t p = run->offset, end = p + run->length; p < end; p += step, weight += kTileCols<T>) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> factor = load(weight + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = fma<T>(load(rows[r] + p + v * lanes), factor, sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* at = sums + (r * kTileVectors + v) * lanes;
      store(at, accumulate ? load(at) + sum[r][v] : sum[r][v]);
    }
  }
}

// sums[taps][kTileVectors] += over h x w pixels, x at each tap times the gradient [pixel][kTileVectors].
template <class T>
void weight_tile(int64_t height, int64_t width, const T* x, int64_t x_h, int64_t x_w, const int64_t* offsets, int taps,
                 const T* grad, T* sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kTileVectors] = {};
  for (int64_t h = 0; h < height; ++h) {
    const T* at = x + h * x_h;
    for (int64_t w = 0; w < width; ++w, at += x_w, grad += kTileCols<T>) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> factor = load(grad + v * lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = fma<T>(load(at + offsets[r] + v * lanes), factor, sum[r][v]);
      }
    }
  }
  for (int r = 0; r < taps; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* at = sums + (r * kTileVectors + v) * lanes;
      store(at, load(at) + sum[r][v]);
    }
  }
}

// packed[tap][kTileCols] of the result's channels from `first`, in pass `pass`.
template <class T, class S>
void pack_weight(const Phase& phase, int64_t passes, int64_t first, int64_t pass, T* packed) {
  const ConvShape& s = phase.p.shape;
  const int64_t columns = at_most(kTileCols<T>, phase.channels - first), *strides = s.weight_strides;
  const Axis* axes = phase.axes;
  const S* weight = static_cast<const S*>(phase.p.weight) + (first * passes + pass) * strides[0];
  for (int64_t tap = 0; tap < phase.taps(); ++tap, packed += kTileCols<T>) {
    const int64_t w = tap % axes[2].taps, h = tap / axes[2].taps % axes[1].taps, d = tap / axes[2].taps / axes[1].taps;
    const S* from = weight + (axes[0].tap + d * axes[0].tap_step) * strides[2] +
                    (axes[1].tap + h * axes[1].tap_step) * strides[3] +
                    (axes[2].tap + w * axes[2].tap_step) * strides[4];
    for (int64_t c = 0; c < kTileCols<T>; ++c) {
      packed[c] = c < columns ? T(to_float(from[c * passes * strides[0]])) : T(0);
    }
  }
}

// How many panels of channels are staged together: side by side in memory, they are read in one sweep.
template <class T>
int64_t panels_together(const ConvShape& s, int64_t channels) {
  return s.channels_last ? at_most(panel_count<T>(channels), kChannelsTogether / kTileCols<T>) : 1;
}

// One block of the channels from `first`.
template <class T, class S>
void compute(const Phase& phase, const Block& block, int64_t image, int64_t first, int64_t repeat, int64_t passes,
             const T* packed) {
  const ConvShape& s = phase.p.shape;
  const int64_t pixels = block.pixels(), panels = block.channels / kTileCols<T>,
                panel_size = round_up(pixels, kRows) * kTileCols<T>;
  const int64_t source_pixels = phase.axes[0].extent * phase.axes[1].extent * phase.axes[2].extent;
  const int64_t result_pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  T* staged = static_cast<T*>(scratch(kStageSlot, (block.elements() + 1) * sizeof(T)));
  T* sums = static_cast<T*>(scratch(kSumSlot, panels * panel_size * sizeof(T)));
  Run* runs = static_cast<Run*>(scratch(kRunSlot, (phase.taps() + 1) * sizeof(Run)));
  const int64_t count = runs_of(block, phase.axes, runs);
  const Channels channels{at_most(block.channels, phase.channels - first), repeat, first % repeat};
  const Strides strides{phase.source.channel * passes, {phase.source.at[0], phase.source.at[1], phase.source.at[2]}};
  const Finish<T, S> finish{phase, block, image * phase.channels * result_pixels, 0};
  for (int64_t pass = 0; pass < passes; ++pass) {
    const S* source = static_cast<const S*>(phase.p.source) + image * phase.source_channels * source_pixels +
                      (first / repeat * passes + pass) * phase.source.channel;
    stage(source, strides, phase.axes, block, channels, staged);
    for (int64_t panel = 0; panel < panels && first + panel * kTileCols<T> < phase.channels; ++panel) {
      const T* weight = packed + (panel * passes + pass) * phase.taps() * kTileCols<T>;
      T* to = sums + panel * panel_size;
      for (int64_t q = 0; q < pixels; q += kRows) {
        const T* rows[kRows];
        for (int r = 0; r < kRows; ++r) {
          rows[r] = staged + block.row(at_most(q + r, pixels - 1)) + panel * kTileCols<T>;
        }
        gather_tile<T>(rows, runs, count, block.channels, weight, pass > 0, to + q * kTileCols<T>);
      }
      if (pass + 1 < passes) continue;
      if (s.channels_last) {
        finish.channels_last(first + panel * kTileCols<T>, kTileVectors, to);
      } else {
        finish.planes(first + panel * kTileCols<T>, kTileVectors, to);
      }
    }
  }
}

template <class T, class S>
void gather(const Phase& phase, int64_t repeat, int64_t passes) {
  const ConvShape& s = phase.p.shape;
  const int64_t panels = panel_count<T>(phase.channels), panel_size = passes * phase.taps() * kTileCols<T>;
  T* packed = static_cast<T*>(scratch(kWeightSlot, (panels * panel_size + 1) * sizeof(T)));
  for (int64_t i = 0; i < panels * passes; ++i) {
    const int64_t panel = i / passes, pass = i % passes;
    pack_weight<T, S>(phase, passes, panel * kTileCols<T>, pass,
                      packed + panel * panel_size + pass * phase.taps() * kTileCols<T>);
  }
  const int64_t together = panels_together<T>(s, phase.channels), sweeps = (panels + together - 1) / together;
  const Cut cut = choose_cut<T>(phase.axes, together * kTileCols<T>, s.batch * sweeps, kGatherPixels);
  const int64_t work = cut.size[0] * cut.size[1] * cut.size[2] * (panel_size + 1) * together;
  parallel(s.batch * cut.count() * sweeps, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i % sweeps * together, piece = i / sweeps % cut.count(), image = i / sweeps / cut.count();
      compute<T, S>(phase, cut.block(piece), image, panel * kTileCols<T>, repeat, passes, packed + panel * panel_size);
    }
  });
}

// sums[panel][taps][kTileCols] of the channels from `first`, over some of the blocks.
template <class T, class S>
void accumulate(const ConvGradWeight& p, const Cut& cut, int64_t first, int64_t block_begin, int64_t block_end,
                T* sums) {
  const ConvShape& s = p.shape;
  const int64_t channels = s.groups * s.out_channels, taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  const Strides x_strides = strides_of(s.channels_last, s.groups, s.in);
  const Strides grad_strides = strides_of(s.channels_last, channels, s.out);
  const int64_t given = at_most(cut.channels, channels - first);
  std::memset(sums, 0, static_cast<size_t>(taps * cut.channels) * sizeof(T));
  for (int64_t b = block_begin; b < block_end; ++b) {
    const Block block = cut.block(b % cut.count());
    const int64_t image = b / cut.count();
    T* staged = static_cast<T*>(scratch(kStageSlot, (block.elements() + 1) * sizeof(T)));
    T* staged_grad = static_cast<T*>(scratch(kGradSlot, block.pixels() * kTileCols<T> * sizeof(T)));
    Run* runs = static_cast<Run*>(scratch(kRunSlot, (taps + 1) * sizeof(Run)));
    const int64_t count = runs_of(block, cut.axes, runs);
    stage(static_cast<const S*>(p.x) + image * s.groups * s.in[0] * s.in[1] * s.in[2] +
              first / s.out_channels * x_strides.channel,
          x_strides, cut.axes, block, {given, s.out_channels, first % s.out_channels}, staged);
    const S* grad = static_cast<const S*>(p.grad) + image * channels * s.out[0] * s.out[1] * s.out[2];
    T* to = sums;
    for (int64_t c = 0; c < given; c += kTileCols<T>) {
      stage_grad<T, kTileVectors>(grad + (first + c) * grad_strides.channel, grad_strides, block,
                                  static_cast<int>(at_most(kTileCols<T>, given - c)), staged_grad);
      int64_t offsets[kRows];
      int waiting = 0;
      const auto flush = [&] {
        for (int r = waiting; r < kRows; ++r) offsets[r] = offsets[0];  // computed and dropped
        weight_tile<T>(block.axes[1].count, block.axes[2].count, staged + c, block.axes[1].pull * block.stride(1),
                       block.axes[2].pull * block.stride(2), offsets, waiting, staged_grad, to);
        to += waiting * kTileCols<T>;
        waiting = 0;
      };
      for (const Run* run = runs; run < runs + count; ++run) {
        for (int64_t at = run->offset; at < run->offset + run->length; at += block.channels) {
          offsets[waiting++] = at;
          if (waiting == kRows) flush();
        }
      }
      if (waiting > 0) flush();
    }
  }
}

template <class T, class S>
void grad_weight(const ConvGradWeight& p) {
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const int64_t channels = s.groups * s.out_channels, taps = s.kernel[0] * s.kernel[1] * s.kernel[2];
  const int64_t together = panels_together<T>(s, channels), threads = thread_count();
  const int64_t sweeps = (panel_count<T>(channels) + together - 1) / together, size = together * taps * kTileCols<T>;
  const bool empty = s.batch * s.out[0] * s.out[1] * s.out[2] == 0;
  const Cut cut = empty ? Cut{axes, together * kTileCols<T>, {}, {}}
                        : choose_cut<T>(axes, together * kTileCols<T>, s.batch * sweeps, kWeightPixels);
  const int64_t blocks = s.batch * cut.count();
  // Each chunk of the blocks has sums of its own, added in their order.
  const int64_t chunks = sweeps >= threads || empty ? 1 : at_most(blocks, (threads + sweeps - 1) / sweeps);
  T* sums = static_cast<T*>(scratch(kWeightSlot, sweeps * chunks * size * sizeof(T)));
  const int64_t work = blocks * cut.size[1] * cut.size[2] * size / chunks + 1;
  parallel(sweeps * chunks, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i % chunks;
      accumulate<T, S>(p, cut, i / chunks * cut.channels, blocks * chunk / chunks, blocks * (chunk + 1) / chunks,
                       sums + i * size);
    }
  });
  for (int64_t tap = 0; tap < taps; ++tap) {
    S* to = static_cast<S*>(p.grad_weight) + tap % s.kernel[2] * s.weight_strides[4] +
            tap / s.kernel[2] % s.kernel[1] * s.weight_strides[3] +
            tap / s.kernel[2] / s.kernel[1] * s.weight_strides[2];
    for (int64_t k = 0; k < channels; ++k) {
      const int64_t panel = k / kTileCols<T>;
      const T* from = sums + panel / together * chunks * size + (panel % together * taps + tap) * kTileCols<T>;
      T total = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) total += from[chunk * size + k % kTileCols<T>];
      to[k * s.weight_strides[0]] = from_float<S>(total);
    }
  }
}

}  // namespace

void depthwise_gather(const Phase& phase, int64_t repeat, int64_t passes) {
  Phase all = phase;  // groups at once
  all.source_channels *= phase.p.shape.groups, all.channels *= phase.p.shape.groups;
  with_storage(phase.p.shape.dtype,
               [&](auto kind) { gather<Compute<decltype(kind)>, decltype(kind)>(all, repeat, passes); });
}

void depthwise_grad_weight(const ConvGradWeight& p) {
  with_storage(p.shape.dtype, [&](auto kind) { grad_weight<Compute<decltype(kind)>, decltype(kind)>(p); });
}

}  // namespace fastnets::FASTNETS_ISA

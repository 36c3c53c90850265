// Convolution forwards, and backwards to its input (with an epilogue, the transposed convolution): one gather.

#include "conv.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kBlockPixels = 40 * kTileRows;

// Of `tiles` times kRows results: to[r][kVectors] = start + rows[r], each a sequence of runs, times the panel. The
// first `asking` tiles ask for the next one's rows, which have not been read before.
template <class T, int kRows, int kVectors>
void tiles_of(int64_t tiles, const T* const* rows, const Run* runs, int64_t count, const T* panel, const T* start,
              T* const* to, bool stream, int64_t asking) {
  constexpr int lanes = kLanes<T>;
  for (; tiles > 0; --tiles, --asking, rows += kRows, to += kRows) {
    Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = load(start + v * lanes);
        if (!stream) __builtin_prefetch(to[r] + v * lanes, 1);  // a small sum is done before its line would have come
      }
    }
    const T* factors = panel;
    for (const Run* run = runs; run < runs + count; ++run) {
      for (int64_t p = run->offset, end = p + run->length; p < end; ++p, factors += kVectors * lanes) {
        if (asking > 0 && p % lanes == 0) {  // a line's first element
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) __builtin_prefetch(rows[kRows + r] + p);
        }
        Vec<T> right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          right[v] = load(factors + v * lanes);
          in_register<T>(right[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const Vec<T> left = broadcast<T>(rows[r][p]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(left, right[v], sum[r][v]);
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) put(to[r] + v * lanes, sum[r][v], stream);
    }
  }
}

// `height` is even, or the tile's full one.
template <class T, int kVectors>
void run_tiles(int height, int64_t tiles, const T* const* rows, const Run* runs, int64_t count, const T* panel,
               const T* start, T* const* to, bool stream, int64_t asking) {
  with_count<kTileRows, 2>(height, [&](auto n) {
    tiles_of<T, n.value, kVectors>(tiles, rows, runs, count, panel, start, to, stream, asking);
  });
}

// Whether every result has one tap, which lies inside the source: channels there are read where they are.
bool reads_in_place(const Phase& phase) {
  if (phase.taps() != 1 || phase.source.channel != 1) return false;
  for (const Axis& axis : phase.axes) {
    if (axis.offset < 0 || (axis.count - 1) * axis.pull + axis.offset >= axis.extent) return false;
  }
  return true;
}

// One block: stages it, then panel after panel of the weight, tile after tile.
template <class T, class S>
void compute(const Phase& phase, const Block& block, int64_t image, int64_t group, const T* packed, int64_t panel_begin,
             int64_t panel_end) {
  const ConvGather& p = phase.p;
  const ConvShape& shape = p.shape;
  const int64_t pixels = block.pixels(), depth = phase.depth();
  const int64_t source_pixels = phase.axes[0].extent * phase.axes[1].extent * phase.axes[2].extent;
  const int64_t result_pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  const S* source = static_cast<const S*>(p.source) + image * shape.groups * phase.source_channels * source_pixels +
                    group * phase.source_channels * phase.source.channel;
  const StagedAxis* axes = block.axes;
  const int64_t* strides = phase.source.at;
  const T* operand = nullptr;
  Walk operands = operand_rows(block);
  bool in_place = false;
  if constexpr (std::is_same_v<S, T>) {
    in_place = reads_in_place(phase);
    if (in_place) {
      operand = source + axes[0].low * strides[0] + axes[1].low * strides[1] + axes[2].low * strides[2];
      operands = {block, 0, axes[0].scale * strides[0], axes[1].scale * strides[1], axes[2].scale * strides[2]};
    }
  }
  if (!in_place) {
    T* staged = static_cast<T*>(scratch(kStageSlot, (block.elements() + 1) * sizeof(T)));
    if (depth > 0) stage(source, phase.source, phase.axes, block, block.channels, staged);
    operand = staged;
  }
  Run* runs = static_cast<Run*>(scratch(kRunSlot, (phase.taps() + 1) * sizeof(Run)));
  const int64_t count = runs_of(block, phase.axes, runs);
  // Tiles of the same height, an even one; past the last pixel they repeat it.
  const int64_t tiles = (pixels + kTileRows - 1) / kTileRows;
  const int rows = static_cast<int>(round_up((pixels + tiles - 1) / tiles, 2));
  T* sums = static_cast<T*>(scratch(kSumSlot, tiles * rows * kTileCols<T> * sizeof(T)));
  const Finish<T, S> finish{
      phase, block,
      image * shape.groups * phase.channels * result_pixels + group * phase.channels * phase.result.channel,
      group * phase.channels};
  const T* row[kBlockPixels];  // of whole tiles: no more, since kTileRows divides it
  operands.take<const T>(tiles * rows, operand, row);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * kTileCols<T>;
    const int vectors = panel_vectors<T>(phase.channels, first);
    const T* weight = packed + first * depth;
    // Where nothing comes after the bias the results go where they belong at once.
    T start[kTileCols<T>] = {};
    S* result = static_cast<S*>(p.result) + first;
    const bool direct =
        std::is_same_v<S, T> && shape.channels_last && finish.plain() && first + vectors * kLanes<T> <= phase.channels;
    const bool stream = direct && finish.streams(shape.groups * phase.channels);
    if (direct && p.bias) {
      const S* bias = static_cast<const S*>(p.bias) + finish.channel + first;
      for (int v = 0; v < vectors; ++v) store(start + v * kLanes<T>, load(bias + v * kLanes<T>));
    }
    S* at[kBlockPixels];
    if (shape.channels_last) finish.results().take(tiles * rows, result, at);
    // Sums for the channels' places are finished a tile at a time, while they are near.
    const bool near = shape.channels_last && !direct;
    T* of_sums[kBlockPixels];
    for (int64_t q = 0; q < (direct ? 0 : tiles * rows); ++q) {
      of_sums[q] = sums + (near ? q % rows : q) * vectors * kLanes<T>;
    }
    T* const* const to = direct ? reinterpret_cast<T* const*>(at) : of_sums;
    const int64_t together = near ? 1 : tiles;
    for (int64_t q = 0; q < tiles * rows; q += together * rows) {
      const int64_t left = tiles - 1 - q / rows, asking = in_place ? at_most(together, left) : 0;
      if (vectors == kTileVectors) {
        run_tiles<T, kTileVectors>(rows, together, row + q, runs, count, weight, start, to + q, stream, asking);
      } else {
        run_tiles<T, 1>(rows, together, row + q, runs, count, weight, start, to + q, stream, asking);
      }
      if (near) finish.channels_last(first, vectors, sums, at + q, at_most(rows, pixels - q));
    }
    if (!shape.channels_last) finish.planes(first, vectors, sums);
  }
}

// Images of one plane are planes of one image, of which a block may take several: the batch becomes the first axis.
bool one_plane(const Phase& phase) {
  const Axis& axis = phase.axes[0];
  return phase.result_sizes[0] == 1 && axis.taps == 1 && axis.extent == 1 && axis.offset == 0;
}
struct Folded {
  ConvGather p;
  int64_t sizes[3];

  explicit Folded(const Phase& phase)
      : p(phase.p), sizes{phase.p.shape.batch, phase.result_sizes[1], phase.result_sizes[2]} {
    p.shape.batch = 1;
  }
  Phase operator()(const Phase& of) const {
    Phase phase{p,
                {of.axes[0], of.axes[1], of.axes[2]},
                of.source_channels,
                of.channels,
                of.source_stride,
                of.result_stride,
                of.group_stride,
                sizes,
                of.source,
                of.result};
    phase.axes[0].count = phase.axes[0].extent = sizes[0];
    phase.axes[0].pull = phase.axes[0].step = 1;
    const int64_t groups = p.shape.groups;
    phase.source.at[0] = groups * of.source_channels * of.axes[1].extent * of.axes[2].extent;
    phase.result.at[0] = groups * of.channels * sizes[1] * sizes[2];
    return phase;
  }
};

template <class T, class S>
void gather_blocks(const Phase& whole) {
  const Folded folded(whole);
  const Phase phase = one_plane(whole) ? folded(whole) : whole;
  const ConvShape& shape = phase.p.shape;
  const int64_t panels = panel_count<T>(phase.channels);
  const int64_t packed_size = panels * kTileCols<T> * phase.depth();
  T* packed = static_cast<T*>(scratch(kWeightSlot, (shape.groups * packed_size + 1) * sizeof(T)));
  for (int64_t g = 0; g < shape.groups; ++g) {
    pack_weight<T>(phase, static_cast<const S*>(phase.p.weight) + g * phase.group_stride, packed + g * packed_size);
  }
  // A weight that outgrows the second-level cache comes once a block: larger blocks, of which threads share the panels,
  // at the price of staging each more than once.
  const bool heavy = packed_size * static_cast<int64_t>(sizeof(T)) > kHeavyBytes;
  const int64_t outer = shape.batch * shape.groups, bytes = heavy ? 3 * kStageBytes : kStageBytes;
  const Cut cut = choose_cut<T>(phase.axes, phase.source_channels, heavy ? outer * panels : outer, kBlockPixels, bytes,
                                one_plane(whole));
  const int64_t blocks = outer * cut.count(), wanted = heavy ? wanted_pieces() : thread_count();
  int64_t shares = 1;
  while (blocks * shares < wanted && shares < panels) ++shares;
  const int64_t work = cut.size[0] * cut.size[1] * cut.size[2] * (phase.depth() + 1) * phase.channels / shares + 1;
  parallel(blocks * shares, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i % shares, piece = i / shares % cut.count(), outer = i / shares / cut.count();
      const int64_t image = outer / shape.groups, group = outer % shape.groups;
      compute<T, S>(phase, cut.block(piece), image, group, packed + group * packed_size, panels * share / shares,
                    panels * (share + 1) / shares);
    }
    streamed();
  });
}

// `repeat`: results of one source channel, and `passes`: sources of one result channel, where groups are that small.
void gather(const Phase& phase, int64_t repeat, int64_t passes) {
  if (phase.positions() == 0) return;
  const ConvShape& s = phase.p.shape;
  if (s.groups > 1 && s.in_channels == 1) return depthwise_gather(phase, repeat, passes);
  if (product_pays(phase)) return product_gather(phase);
  if (winograd_pays(phase)) return winograd_gather(phase);
  if (planes_pay(phase)) return planes_gather(phase);
  with_storage(s.dtype, [&](auto kind) { gather_blocks<Compute<decltype(kind)>, decltype(kind)>(phase); });
}

}  // namespace

void gather_block(const Phase& phase, const Block& block, int64_t image, int64_t group, const void* packed,
                  int64_t panel) {
  with_storage(phase.p.shape.dtype, [&](auto kind) {
    using T = Compute<decltype(kind)>;
    compute<T, decltype(kind)>(phase, block, image, group, static_cast<const T*>(packed), panel, panel + 1);
  });
}

void conv_forward(const ConvGather& p) {
  const ConvShape& s = p.shape;
  Phase phase{p,
              {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)},
              s.in_channels,
              s.out_channels,
              s.weight_strides[1],
              s.weight_strides[0],
              s.out_channels * s.weight_strides[0],
              s.out,
              strides_of(s.channels_last, s.groups * s.in_channels, s.in),
              strides_of(s.channels_last, s.groups * s.out_channels, s.out)};
  gather(phase, s.out_channels, 1);
}

void conv_grad_input(const ConvGather& p) {
  const ConvShape& s = p.shape;
  const auto phase_of = [&](int64_t d, int64_t h, int64_t w) {
    return Phase{p,
                 {grad_input_axis(s, 0, d), grad_input_axis(s, 1, h), grad_input_axis(s, 2, w)},
                 s.out_channels,
                 s.in_channels,
                 s.weight_strides[0],
                 s.weight_strides[1],
                 s.out_channels * s.weight_strides[0],
                 s.in,
                 strides_of(s.channels_last, s.groups * s.out_channels, s.out),
                 strides_of(s.channels_last, s.groups * s.in_channels, s.in)};
  };
  if (scatter_pays(s)) return scatter_gather(phase_of(0, 0, 0));
  for (int64_t d = 0; d < at_most(s.stride[0], s.in[0]); ++d) {
    for (int64_t h = 0; h < at_most(s.stride[1], s.in[1]); ++h) {
      for (int64_t w = 0; w < at_most(s.stride[2], s.in[2]); ++w) gather(phase_of(d, h, w), 1, s.out_channels);
    }
  }
}

}  // namespace fastnets::FASTNETS_ISA

// Convolution as a matrix product without the matrix. The part of the source that a block of results needs is staged:
// copied once into float or double, channels innermost, zeros where padding lies. In it the operand row of a result is
// a few runs of consecutive elements at the same distances for every result, so that the register tiles read it where
// it lies: im2col is an address, not a copy.
#pragma once

#include "../conv_axis.h"
#include "activation.h"
#include "gemm.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kWeightSlot = 0, kStageSlot = 1, kSumSlot = 2, kRunSlot = 3, kGradSlot = 4;  // scratch memory
constexpr int kTransformSlot = 5;
constexpr int64_t kStageBytes = 256 << 10;  // of a staged block: with a panel of the weight, in the second-level cache
constexpr int64_t kHeavyBytes = 1 << 20;    // of a weight: it outgrows the second-level cache
constexpr int64_t kGrain = 1 << 17;         // multiply-adds worth waking a thread for

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
};

// An address for each of a block's results, one after the other; past the last it stays there. (A division a result
// would cost as much as the products of a shallow sum.)
class Walk {
 public:
  Walk(const Block& block, int64_t start, int64_t d, int64_t h, int64_t w)
      : ends_{block.axes[0].count, block.axes[1].count, block.axes[2].count},
        steps_{d, h, w},
        plane_(start),
        line_(start),
        at_(start) {}

  // The next n of them, from `base`.
  template <class P>
  FASTNETS_INLINE void take(int n, P* base, P** to) {
    while (n > 0) {
      const int now = static_cast<int>(at_most(n, ends_[2] - w_));
      P* at = base + at_;
      for (int i = 0; i < now; ++i) to[i] = at + i * steps_[2];
      n -= now, to += now, w_ += now, at_ += now * steps_[2];
      if (n == 0) return;
      if (h_ + 1 < ends_[1]) {
        ++h_, w_ = 0, at_ = line_ += steps_[1];
      } else if (d_ + 1 < ends_[0]) {
        ++d_, h_ = w_ = 0, at_ = line_ = plane_ += steps_[0];
      } else {
        for (int i = 0; i < n; ++i) to[i] = base + at_ - steps_[2];
        return;
      }
    }
  }

 private:
  int64_t ends_[3], steps_[3];
  int64_t d_ = 0, h_ = 0, w_ = 0, plane_, line_, at_;
};

// Where the operand rows of a block's results begin in its staged source.
inline Walk operand_rows(const Block& block) {
  const StagedAxis* axes = block.axes;
  return {block, 0, axes[0].pull * block.stride(0), axes[1].pull * block.stride(1), axes[2].pull * block.stride(2)};
}

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

// n elements, `step` apart; the other lanes are zero.
template <class S>
FASTNETS_INLINE Vec<Compute<S>> load_apart(const S* from, int n, int64_t step) {
  if (step == 1) return n == kLanes<Compute<S>> ? load(from) : load_partial(from, n);
  Compute<S> values[kLanes<Compute<S>>] = {};
  for (int i = 0; i < n; ++i) values[i] = to_float(from[i * step]);
  return load(values);
}

// Stages a block. `source`: its first channel in one image. Of the block's channels the first `given` are there, the
// others become zero.
template <class T, class S>
void stage(const S* source, const Strides& strides, const Axis* axes, const Block& block, int64_t given, T* to) {
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
      int64_t c = 0;
      if (strides.channel == 1) {
        c = given;
        if (step == channels && c == channels) {
          copy_converted<T>(from, (end - begin) * channels, row);
        } else {
          for (int64_t p = 0; p < end - begin; ++p) copy_converted<T>(from + p * step, c, row + p * channels);
        }
      } else if (step == 1) {
        for (; c + 4 <= given; c += 4) {
          pack_quad<T>(from + c * strides.channel, strides.channel, end - begin, row + c, channels);
        }
      }
      for (; c < channels; ++c) {
        const S* plane = from + c * strides.channel;
        for (int64_t p = 0; p < end - begin; ++p) {
          row[p * channels + c] = c < given ? T(to_float(plane[p * step])) : T(0);
        }
      }
    }
  }
}

// Stages one panel of a block's gradient, [pixel][kVectors * lanes].
template <class T, int kVectors, class S>
void stage_grad(const S* grad, const Strides& strides, const Block& block, int columns, T* to) {
  constexpr int width = kVectors * kLanes<T>;
  const StagedAxis* axes = block.axes;
  for (int64_t h = 0; h < axes[1].count; ++h, to += axes[2].count * width) {
    const S* row =
        grad + axes[0].begin * strides.at[0] + (axes[1].begin + h) * strides.at[1] + axes[2].begin * strides.at[2];
    pack_panel<T, width>(row, strides.channel, strides.at[2], columns, axes[2].count, to);
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

// Pieces that the work is cut into, so that no thread waits long for the last.
inline int64_t wanted_pieces() {
  const int64_t threads = thread_count();
  return threads > 1 ? 3 * threads : 1;
}

// Blocks of up to `pixels` results, and of `bytes` of staged source: whole rows, and with `deep` whole planes; smaller
// ones where `outer` times as many would not feed every thread.
template <class T>
Cut choose_cut(const Axis* axes, int64_t channels, int64_t outer, int64_t pixels, int64_t bytes, bool deep) {
  const auto fits = [&](int64_t d, int64_t h, int64_t w) {
    const Block block{{staged_axis(axes[0], 0, d), staged_axis(axes[1], 0, h), staged_axis(axes[2], 0, w)}, channels};
    return d * h * w <= pixels && block.elements() * static_cast<int64_t>(sizeof(T)) <= bytes;
  };
  int64_t sizes[3] = {1, 1, at_most(axes[2].count, pixels)};
  auto& [d, h, w] = sizes;
  while (w > 2 * kTileRows && !fits(1, 1, w)) w -= kTileRows;
  if (w == axes[2].count) {
    while (h < axes[1].count && fits(1, h + 1, w)) ++h;
  }
  if (deep && h == axes[1].count) {
    while (d < axes[0].count && fits(d + 1, h, w)) ++d;
  }
  const auto few = [&] { return outer * cut_into(axes, channels, sizes).count() < wanted_pieces(); };
  while (d > 1 && (d - 1) * h * w >= kTileRows && few()) --d;
  while (h > 1 && (h - 1) * w >= kTileRows && few()) --h;
  // A line of results alone: as many pieces for every thread.
  const auto uneven = [&] { return outer * cut_into(axes, channels, sizes).count() % thread_count() != 0; };
  if (axes[0].count == 1 && axes[1].count == 1) {
    while (w > 4 * kTileRows && uneven()) w -= kTileRows;
  }
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

// The gather of one phase: one set of taps.
struct Phase {
  const ConvGather& p;
  Axis axes[3];
  int64_t source_channels, channels;                   // of one group, of the source and of the result
  int64_t source_stride, result_stride, group_stride;  // of the weight: its channels' and the groups'
  const int64_t* result_sizes;
  Strides source, result;

  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
  int64_t depth() const { return taps() * source_channels; }
  int64_t positions() const { return axes[0].count * axes[1].count * axes[2].count; }
};

// Source channels [begin, end) of one panel, kWidth wide; `offsets` of the taps in the weight, in their order.
template <class T, int kWidth, class S>
void pack_taps(const Phase& phase, const S* from, const int64_t* offsets, int columns, int64_t begin, int64_t end,
               T* to) {
  constexpr int64_t chunk = 128;  // columns of a transposed piece, in the nearest cache
  const ConvShape& s = phase.p.shape;
  const int64_t *strides = s.weight_strides + 2, *kernel = s.kernel, inner = phase.source_channels, taps = phase.taps();
  const int64_t volume = kernel[0] * kernel[1] * kernel[2];
  if (strides[2] != 1 || strides[1] != kernel[2] || strides[0] != kernel[1] * kernel[2] || volume == 1) {
    from += begin * phase.source_stride, to += begin * kWidth;
    for (int64_t t = 0; t < taps; ++t, to += inner * kWidth) {
      pack_panel<T, kWidth>(from + offsets[t], phase.result_stride, phase.source_stride, columns, end - begin, to);
    }
    return;
  }
  // The taps of a channel lie together: all of them are read at once.
  const int64_t most = phase.source_stride == volume && volume < chunk ? chunk / volume : 1;
  T* turned = static_cast<T*>(scratch(kStageSlot, most * volume * kWidth * sizeof(T)));
  for (int64_t c = begin; c < end; c += most) {
    const int64_t count = at_most(most, end - c);
    pack_panel<T, kWidth>(from + c * phase.source_stride, phase.result_stride, 1, columns, count * volume, turned);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        std::memcpy(to + (t * inner + c + i) * kWidth, turned + (i * volume + offsets[t]) * kWidth, kWidth * sizeof(T));
      }
    }
  }
}

// Packs the phase's taps of one group's weight, [panel][tap][source channel][column].
constexpr int64_t kPiece = 32;
template <class T, class S>
void pack_weight(const Phase& phase, const S* weight, T* packed) {
  const int64_t panels = panel_count<T>(phase.channels), pieces = (phase.source_channels + kPiece - 1) / kPiece;
  const int64_t* strides = phase.p.shape.weight_strides + 2;
  int64_t* offsets = static_cast<int64_t*>(scratch(kRunSlot, (phase.taps() + 1) * sizeof(int64_t)));
  int64_t n = 0;
  for (int64_t d = 0; d < phase.axes[0].taps; ++d) {
    for (int64_t h = 0; h < phase.axes[1].taps; ++h) {
      for (int64_t w = 0; w < phase.axes[2].taps; ++w, ++n) {
        const int64_t at[3] = {d, h, w};
        offsets[n] = 0;
        for (int i = 0; i < 3; ++i) offsets[n] += (phase.axes[i].tap + at[i] * phase.axes[i].tap_step) * strides[i];
      }
    }
  }
  // In the order in which the weight lies: far jumps would cost more than the copies.
  const bool along = phase.result_stride < phase.source_stride;
  const int64_t work = phase.taps() * kPiece * kTileCols<T>;
  parallel(panels * pieces, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = along ? i % panels : i / pieces, piece = along ? i / panels : i % pieces;
      const int64_t first = panel * kTileCols<T>, channel = piece * kPiece;
      const int64_t past = at_most(channel + kPiece, phase.source_channels);
      const int vectors = panel_vectors<T>(phase.channels, first);
      const int columns = static_cast<int>(at_most(vectors * kLanes<T>, phase.channels - first));
      const S* from = weight + first * phase.result_stride;
      T* to = packed + first * phase.depth();
      if (vectors == kTileVectors) {
        pack_taps<T, kTileCols<T>>(phase, from, offsets, columns, channel, past, to);
      } else {
        pack_taps<T, kLanes<T>>(phase, from, offsets, columns, channel, past, to);
      }
    }
  });
}

// Stores a vector of results, past the caches where it `streams` (of the type that arithmetic runs in).
template <class S>
FASTNETS_INLINE void put(S* to, Vec<Compute<S>> v, bool streams) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    if (streams) return stream(to, v);
  }
  store(to, v);
}

// Writes sums [pixel][vectors * lanes] to the result's channels from `first`, through the epilogue.
template <class T, class S>
struct Finish {
  const Phase& phase;
  const Block& block;
  int64_t image;    // offset of the image and group in the result
  int64_t channel;  // of the result, all groups counted: for the bias

  // Its results go past the caches, and lie as streaming stores ask: vectors of `every` elements.
  bool streams(int64_t every) const {
    const ConvShape& s = phase.p.shape;
    const int64_t* sizes = phase.result_sizes;
    const int64_t images = s.batch * s.groups * static_cast<int64_t>(sizeof(S)),
                  result = images * phase.channels * sizes[0] * sizes[1] * sizes[2];
    const int64_t source =
        images * phase.source_channels * phase.axes[0].extent * phase.axes[1].extent * phase.axes[2].extent;
    return std::is_same_v<S, T> && passes_caches(result, source + result) && every % kLanes<T> == 0 &&
           reinterpret_cast<uintptr_t>(phase.p.result) % kVectorBytes == 0;
  }
  // Nothing but a bias is added.
  bool plain() const { return !phase.p.residual && !phase.p.kept && phase.p.activation == Activation::kNone; }

  // The block's results: their offsets.
  Walk results() const {
    const Axis* axes = phase.axes;
    const int64_t* at = phase.result.at;
    return {block, offset(0, 0), axes[0].step * at[0], axes[1].step * at[1], axes[2].step * at[2]};
  }

  // `count` results, of channels from `first`, at the result's addresses `to`.
  void channels_last(int64_t first, int vectors, const T* sums, S* const* to, int64_t count) const {
    const ConvGather& p = phase.p;
    const int columns = static_cast<int>(at_most(vectors * kLanes<T>, phase.channels - first));
    Vec<T> bias[kTileVectors] = {};
    for (int v = 0; p.bias && v * kLanes<T> < columns; ++v) {
      const int n = static_cast<int>(at_most(kLanes<T>, columns - v * kLanes<T>));
      bias[v] = load_partial(static_cast<const S*>(p.bias) + channel + first + v * kLanes<T>, n);
    }
    const bool plain = this->plain();
    for (int64_t i = 0; i < count; ++i, sums += vectors * kLanes<T>) {
      for (int v = 0; v * kLanes<T> < columns; ++v) {
        const Vec<T> value = load(sums + v * kLanes<T>) + bias[v];
        const int n = static_cast<int>(at_most(kLanes<T>, columns - v * kLanes<T>));
        if (plain && n == kLanes<T>) {
          store(to[i] + v * kLanes<T>, value);
        } else {
          write(value, to[i] - static_cast<S*>(p.result) + v * kLanes<T>, n, 1);
        }
      }
    }
  }

  // All of the block's results, to the channels' planes: a vector of pixels of one channel at a time.
  void planes(int64_t first, int vectors, const T* sums) const {
    const ConvGather& p = phase.p;
    const Axis* axes = phase.axes;
    const int64_t columns = at_most(vectors * kLanes<T>, phase.channels - first), row = vectors * kLanes<T>;
    const int64_t step = axes[2].step * phase.result.at[2];
    // Lines of results `step` apart: whole rows of the result join.
    const bool joined = step == 1 && axes[1].step == 1 && block.axes[2].count == phase.result_sizes[2];
    const int64_t lines = joined ? 1 : block.axes[1].count, count = block.axes[2].count * block.axes[1].count / lines;
    const S* bias = p.bias ? static_cast<const S*>(p.bias) + channel + first : nullptr;
    const bool past_caches = step == 1 && plain() && streams(phase.result.channel);
    for (int64_t line = 0; line < block.axes[0].count * lines; ++line) {
      const int64_t start = offset(line / lines, line % lines) + first * phase.result.channel;
      const bool streams = past_caches && start % kLanes<T> == 0;
      for (int64_t i = 0; i < count; i += kLanes<T>) {
        const int n = static_cast<int>(at_most(kLanes<T>, count - i));
        for (int64_t c = 0; c < columns; c += kLanes<T>) {
          Vec<T> turned[kLanes<T>];  // pixels, then channels
#pragma GCC unroll 16
          for (int q = 0; q < kLanes<T>; ++q) turned[q] = q < n ? load(sums + q * row + c) : Vec<T>{};
          turn<T>(turned);
          const int given = static_cast<int>(at_most(kLanes<T>, columns - c));
#pragma GCC unroll 16
          for (int k = 0; k < kLanes<T>; ++k) {
            if (k >= given) break;
            Vec<T> value = turned[k];
            if (bias) value += broadcast<T>(to_float(bias[c + k]));
            const int64_t at = start + i * step + (c + k) * phase.result.channel;
            if (streams && n == kLanes<T>) {
              put(static_cast<S*>(p.result) + at, value, true);
            } else {
              write(value, at, n, step);
            }
          }
        }
        sums += n * row;
      }
    }
  }

  // Of the first result in line `h` of the block's plane `d`.
  int64_t offset(int64_t d, int64_t h) const {
    const Axis* axes = phase.axes;
    const int64_t* at = phase.result.at;
    return image + (axes[0].first + (block.axes[0].begin + d) * axes[0].step) * at[0] +
           (axes[1].first + (block.axes[1].begin + h) * axes[1].step) * at[1] +
           (axes[2].first + block.axes[2].begin * axes[2].step) * at[2];
  }

  // n results, `step` apart.
  FASTNETS_INLINE void write(Vec<T> value, int64_t at, int n, int64_t step) const {
    const ConvGather& p = phase.p;
    if (p.residual) value += load_apart(static_cast<const S*>(p.residual) + at, n, step);
    if (p.kept) store_apart(static_cast<S*>(p.kept) + at, value, n, step);
    store_apart(static_cast<S*>(p.result) + at, activate<T>(p.activation, value), n, step);
  }

 private:
  FASTNETS_INLINE static void store_apart(S* to, Vec<T> value, int n, int64_t step) {
    if (step == 1 && n == kLanes<T>) return store(to, value);
    if (step == 1) return store_partial<S>(to, value, n);
    if (step == 2 && n == kLanes<T>) return store_every_second<S>(to, value);
    for (int i = 0; i < n; ++i) to[i * step] = from_float<S>(value[i]);
  }
};

// One block and one panel of the weight, which pack_weight packed for the group.
void gather_block(const Phase& phase, const Block& block, int64_t image, int64_t group, const void* packed,
                  int64_t panel);

// Pointwise convolutions as matrix products, where that pays; the weight's gradient: false where it does not.
bool product_pays(const Phase& phase);
void product_gather(const Phase& phase);
bool product_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]);

// The gather by Winograd's algorithm, where it pays.
bool winograd_pays(const Phase& phase);
void winograd_gather(const Phase& phase);

// The weight's gradient by Winograd's algorithm; false where that does not pay, or where a sum is not finite: the
// transforms spread an infinite source over more sums than it is part of.
bool winograd_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]);

// The gather with pixels as lanes, where that pays.
bool planes_pay(const Phase& phase);
void planes_gather(const Phase& phase);

// Backwards to an input of few channels, all its phases at once, where that pays.
bool scatter_pays(const ConvShape& shape);
void scatter_gather(const Phase& phase);

// The weight's gradient with pixels as lanes; false where that does not pay.
bool planes_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]);

// The gather where every result channel takes one source channel: with `passes` = 1 channel k takes k / repeat, else
// channel c the sum of c * passes, c * passes + 1, ...
void depthwise_gather(const Phase& phase, int64_t repeat, int64_t passes);
void depthwise_grad_weight(const ConvGradWeight& p);
void depthwise_planes_gather(const Phase& phase, int64_t repeat, int64_t passes);  // all groups in `phase`
void depthwise_planes_grad_weight(const ConvGradWeight& p);

}  // namespace fastnets::FASTNETS_ISA

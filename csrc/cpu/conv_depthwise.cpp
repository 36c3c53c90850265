// Depthwise convolution: a result channel takes one channel of the source (its gradient in x, with a channel
// multiplier, a few), so there is no matrix product, and what counts is how often x is read. Two ways:
//
//   channels last, no multiplier: lanes are channels, and x is read where it lies, past its borders not at all (here)
//   otherwise: lanes are pixels of a row (conv_depthwise_planes.cpp)
#include <utility>

#include "conv_bias.h"
#include "planes.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kResults = kVectorBytes == 16 ? 4 : 6;  // results of a tile
constexpr int kSquareRows = 4, kSquareColumns = 2;    // of a tile of results of three times three taps
constexpr int kTapsTogether = 9;                      // of the weight's gradient, in registers at once
constexpr int kWeightVectors = kVectorBytes == 64 ? 2 : 1;

// Results [begin, end) of the axis take taps inside the source alone.
struct Interior {
  int64_t begin, end;

  explicit Interior(const Axis& axis) {
    const int64_t room = axis.extent - 1 - axis.offset - axis.span();
    begin = at_most(positive_ceil(-axis.offset, axis.pull), axis.count);
    end = room < 0 ? 0 : at_most(room / axis.pull + 1, axis.count);
    if (end < begin) end = begin;
  }
};

int64_t taps_of(const Axis* axes) { return axes[0].taps * axes[1].taps * axes[2].taps; }

// How many of `columns` the vector v has.
template <class T>
int lanes_of(int64_t columns, int v) {
  const int64_t left = columns - v * kLanes<T>;
  return left < 0 ? 0 : static_cast<int>(at_most(left, kLanes<T>));
}

// A tap of a row of results: where the first result takes it, as a position in the row's axis and as an offset in the
// source.
struct TapAt {
  int64_t x, offset;
};

// Results beside each other in one row, of the channels of one panel.
template <class T, class S>
struct ChannelsTile {
  const Phase& phase;
  const Finish<T, S>& finish;
  const TapAt* taps;
  const T* const* factors;  // of each tap
  int64_t count;            // of taps
  bool plain = finish.plain(), streams = plain && finish.streams(phase.channels);

  // Results from `w`, of `columns` channels from `first`; `source` is at that channel. More results than one lie in the
  // interior.
  template <int kCount, bool kWhole>
  FASTNETS_INLINE void run(const S* source, int64_t w, int64_t first, int64_t columns, const Vec<T>* bias,
                           int64_t to) const {
    const Axis& axis = phase.axes[2];
    const int64_t apart = axis.pull * phase.source.at[2], step = axis.step * phase.result.at[2];
    Vec<T> sum[kCount][kTileVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = bias[v];
    }
    source += w * apart;
    if (kCount > 1 &&
        count > 0) {  // what the next results take of the last row: the others were read for the row before
      const S* next = source + taps[count - 1].offset + 2 * kCount * apart;
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(next + r * apart + v * kLanes<T>);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      if (kCount == 1 && !inside(axis, taps[t].x + w * axis.pull)) continue;
      const S* at = source + taps[t].offset;
      asm("" : "+r"(at));  // the results' distances stay in registers, not their addresses
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const Vec<T> factor = load(factors[t] + first * phase.taps() + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
          const S* x = at + r * apart + v * kLanes<T>;
          sum[r][v] = fma<T>(kWhole ? load(x) : load_partial(x, lanes_of<T>(columns, v)), factor, sum[r][v]);
        }
      }
    }
    to += w * step + first;
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = to + r * step + v * kLanes<T>;
        if (kWhole && plain) {
          put(static_cast<S*>(phase.p.result) + at, sum[r][v], streams);
        } else {
          finish.write(sum[r][v], at, lanes_of<T>(columns, v), 1);
        }
      }
    }
  }

  // All channels of results from `w`; panel after panel, so that x is read in its order.
  template <int kCount>
  void panels(const S* source, int64_t w, int64_t to) const {
    const S* given = static_cast<const S*>(phase.p.bias);
    for (int64_t first = 0; first < phase.channels; first += kTileCols<T>) {
      const int64_t columns = at_most(kTileCols<T>, phase.channels - first);
      Vec<T> bias[kTileVectors] = {};
      for (int v = 0; given && v < kTileVectors; ++v) {
        bias[v] = load_partial(given + first + v * kLanes<T>, lanes_of<T>(columns, v));
      }
      if (columns == kTileCols<T>) {
        run<kCount, true>(source + first, w, first, columns, bias, to);
      } else {
        run<kCount, false>(source + first, w, first, columns, bias, to);
      }
    }
  }

  // Results [begin, end) of a row.
  void row(const S* source, const Interior& interior, int64_t begin, int64_t end, int64_t to) const {
    for (int64_t w = begin; w < end;) {
      if (w >= interior.begin && w < interior.end && interior.end - interior.begin >= kResults) {
        w = at_most(w, interior.end - kResults);  // the last overlaps the one before
        panels<kResults>(source, w, to);
        w += kResults;
      } else {
        panels<1>(source, w++, to);
      }
    }
  }
};

// Three times three neighbouring taps: a tile of results below and beside each other reads every vector of the source
// once, where a row of results alone would read each for nine of them.
template <class T, class S>
struct SquareTile {
  const Phase& phase;
  const Finish<T, S>& finish;
  const T* packed;
  const S* rows[kSquareRows + 2];  // of the source, at the first tap of result 0; outside the source, of zeros
  int64_t apart[kSquareRows + 2];  // its pixels
  bool plain = finish.plain(), streams = plain && finish.streams(phase.channels);

  static bool takes(const Phase& phase) {
    return phase.axes[0].taps == 1 && three_neighbours(phase.axes[1]) && three_neighbours(phase.axes[2]);
  }

  // Results from `w`, all channels; `to` is the first row's first.
  void run(int64_t w, int64_t to) const {
    const S* bias = static_cast<const S*>(phase.p.bias);
    for (int64_t c = 0; c < phase.channels; c += kLanes<T>) {
      const int n = lanes_of<T>(phase.channels - c, 0);
      if (n == kLanes<T>) {
        tile<true>(w, c, n, bias ? load(bias + c) : Vec<T>{}, to);
      } else {
        tile<false>(w, c, n, bias ? load_partial(bias + c, n) : Vec<T>{}, to);
      }
    }
  }

 private:
  template <bool kWhole>
  FASTNETS_INLINE void tile(int64_t w, int64_t c, int n, Vec<T> bias, int64_t to) const {
    const T* factor = packed + c / kTileCols<T> * 9 * kTileCols<T> + c % kTileCols<T>;
    Vec<T> factors[9], sum[kSquareRows][kSquareColumns];
#pragma GCC unroll 16
    for (int t = 0; t < 9; ++t) factors[t] = load(factor + t * kTileCols<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kSquareRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < kSquareColumns; ++q) sum[r][q] = bias;
    }
#pragma GCC unroll 8
    for (int y = 0; y < kSquareRows + 2; ++y) {
      const S* at = rows[y] + w * apart[y] + c;
#pragma GCC unroll 8
      for (int column = 0; column < kSquareColumns + 2; ++column, at += apart[y]) {
        const Vec<T> x = kWhole ? load(at) : load_partial(at, n);
#pragma GCC unroll 4
        for (int i = 0; i < 3; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < 3; ++j) {
            const int r = y - i, q = column - j;
            if (r >= 0 && r < kSquareRows && q >= 0 && q < kSquareColumns) {
              sum[r][q] = fma<T>(x, factors[3 * i + j], sum[r][q]);
            }
          }
        }
      }
    }
    const int64_t down = phase.axes[1].step * phase.result.at[1], across = phase.axes[2].step * phase.result.at[2];
    to += w * across + c;
#pragma GCC unroll 8
    for (int r = 0; r < kSquareRows; ++r) {
#pragma GCC unroll 4
      for (int q = 0; q < kSquareColumns; ++q) {
        const int64_t at = to + r * down + q * across;
        if (kWhole && plain) {
          put(static_cast<S*>(phase.p.result) + at, sum[r][q], streams);
        } else {
          finish.write(sum[r][q], at, n, 1);
        }
      }
    }
  }
};

// packed[panel][tap][kTileCols]
template <class T, class S>
void pack_channels(const Phase& phase, T* packed) {
  const int64_t* strides = phase.p.shape.weight_strides;
  const Axis* axes = phase.axes;
  for (int64_t first = 0; first < phase.channels; first += kTileCols<T>) {
    const int64_t columns = at_most(kTileCols<T>, phase.channels - first);
    for (int64_t tap = 0; tap < phase.taps(); ++tap, packed += kTileCols<T>) {
      const int64_t w = tap % axes[2].taps, h = tap / axes[2].taps % axes[1].taps;
      const int64_t d = tap / axes[2].taps / axes[1].taps;
      const S* from = static_cast<const S*>(phase.p.weight) + first * strides[0] +
                      (axes[0].tap + d * axes[0].tap_step) * strides[2] +
                      (axes[1].tap + h * axes[1].tap_step) * strides[3] +
                      (axes[2].tap + w * axes[2].tap_step) * strides[4];
      for (int64_t c = 0; c < kTileCols<T>; ++c) packed[c] = c < columns ? T(to_float(from[c * strides[0]])) : T(0);
    }
  }
}

template <class T, class S>
void gather_channels(const Phase& phase) {
  const ConvShape& s = phase.p.shape;
  const Axis* axes = phase.axes;
  const Strides& strides = phase.source;
  T* packed = static_cast<T*>(
      scratch(kWeightSlot, (panel_count<T>(phase.channels) * phase.taps() * kTileCols<T> + 1) * sizeof(T)));
  pack_channels<T, S>(phase, packed);
  const Interior interior(axes[2]);
  const int64_t source_pixels = axes[0].extent * axes[1].extent * axes[2].extent;
  const int64_t result_pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  const int64_t row_work = axes[2].count * phase.channels * phase.taps();
  const ConvGather& p = phase.p;
  const bool square = SquareTile<T, S>::takes(phase) && interior.end - interior.begin >= kSquareColumns;
  const int64_t together = square ? kSquareRows : 1, blocks = (axes[1].count + together - 1) / together;
  parallel(s.batch * axes[0].count * blocks, kGrain / (together * row_work + 1) + 1, [&](int64_t begin, int64_t end) {
    TapAt* taps = static_cast<TapAt*>(scratch(kRunSlot, (phase.taps() + 1) * sizeof(TapAt)));
    const T** factors = static_cast<const T**>(scratch(kSumSlot, (phase.taps() + 1) * sizeof(T*)));
    S* zeros = nullptr;
    if (square) {
      zeros = static_cast<S*>(scratch(kGradSlot, phase.channels * sizeof(S)));
      std::memset(zeros, 0, static_cast<size_t>(phase.channels) * sizeof(S));
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * together, d = i / blocks % axes[0].count, image = i / blocks / axes[0].count;
      const S* source = static_cast<const S*>(p.source) + image * phase.channels * source_pixels;
      const auto row_at = [&](int64_t h) {
        return Block{{staged_axis(axes[0], d, 1), staged_axis(axes[1], h, 1), staged_axis(axes[2], 0, axes[2].count)},
                     1};
      };
      const bool tiled = square && first + kSquareRows <= axes[1].count;
      if (tiled) {
        const Block row = row_at(first);
        const Finish<T, S> finish{phase, row, image * phase.channels * result_pixels, 0};
        SquareTile<T, S> tile{phase, finish, packed, {}, {}};
        const int64_t z = low(axes[0], d) * strides.at[0] + axes[2].offset * strides.at[2];
        for (int y = 0; y < kSquareRows + 2; ++y) {
          const int64_t at = low(axes[1], first) + y;
          const bool there = inside(axes[0], low(axes[0], d)) && inside(axes[1], at);
          tile.rows[y] = there ? source + z + at * strides.at[1] : zeros;
          tile.apart[y] = there ? strides.at[2] : 0;
        }
        for (int64_t w = interior.begin; w < interior.end; w += kSquareColumns) {
          tile.run(at_most(w, interior.end - kSquareColumns), finish.offset(0, 0));
        }
      }
      for (int64_t h = first; h < first + together && h < axes[1].count; ++h) {
        int64_t count = 0;
        for (int64_t tap = 0; tap < phase.taps(); ++tap) {
          const int64_t line = tap / axes[2].taps, k = tap % axes[2].taps;
          const int64_t z = low(axes[0], d) + line / axes[1].taps * axes[0].offset_step;
          const int64_t y = low(axes[1], h) + line % axes[1].taps * axes[1].offset_step;
          if (!inside(axes[0], z) || !inside(axes[1], y)) continue;
          const int64_t x = axes[2].offset + k * axes[2].offset_step;
          taps[count] = {x, z * strides.at[0] + y * strides.at[1] + x * strides.at[2]};
          factors[count++] = packed + tap * kTileCols<T>;
        }
        const Block row = row_at(h);
        const Finish<T, S> finish{phase, row, image * phase.channels * result_pixels, 0};
        const ChannelsTile<T, S> tile{phase, finish, taps, factors, count};
        if (tiled) {
          tile.row(source, interior, 0, interior.begin, finish.offset(0, 0));
          tile.row(source, interior, interior.end, axes[2].count, finish.offset(0, 0));
        } else {
          tile.row(source, interior, 0, axes[2].count, finish.offset(0, 0));
        }
      }
    }
    streamed();
  });
}

// sums[given of kTapsTogether][kWeightVectors] += over a row of results, x at each tap times the gradient. (A row's sum
// starts from zero: one sum over all rows would lose its last digits.)
template <class T, bool kWhole, class S>
void channels_weight_row(const Axis& axis, const Interior& interior, const S* source, int64_t source_step,
                         const S* grad, int64_t grad_step, const TapAt* taps, int given, int64_t columns, T* sums) {
  constexpr int lanes = kLanes<T>;
  const auto read = [&](const S* from, int v) {
    return kWhole ? load(from + v * lanes) : load_partial(from + v * lanes, lanes_of<T>(columns, v));
  };
  Vec<T> sum[kTapsTogether][kWeightVectors] = {};
  const S* at[kTapsTogether];
  for (int t = 0; t < kTapsTogether; ++t) at[t] = source + taps[t < given ? t : 0].offset;
  for (int64_t w = 0; w < axis.count; ++w, grad += grad_step) {
    Vec<T> factor[kWeightVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kWeightVectors; ++v) factor[v] = read(grad, v);
    const int64_t from = w * axis.pull * source_step;
#pragma GCC unroll 4
    for (int v = 0; v < kWeightVectors; ++v) {  // of the next row: pixels lie too far apart
      __builtin_prefetch(grad + axis.count * grad_step + v * lanes);
      __builtin_prefetch(at[given - 1] + from + axis.extent * source_step + v * lanes);
    }
    if (w >= interior.begin && w < interior.end) {
#pragma GCC unroll 16
      for (int t = 0; t < kTapsTogether; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < kWeightVectors; ++v) sum[t][v] = fma<T>(read(at[t] + from, v), factor[v], sum[t][v]);
      }
    } else {
#pragma GCC unroll 16
      for (int t = 0; t < kTapsTogether; ++t) {
        if (t >= given || !inside(axis, taps[t].x + w * axis.pull)) continue;
#pragma GCC unroll 4
        for (int v = 0; v < kWeightVectors; ++v) sum[t][v] = fma<T>(read(at[t] + from, v), factor[v], sum[t][v]);
      }
    }
  }
  for (int t = 0; t < given; ++t) {
    for (int v = 0; v < kWeightVectors; ++v) {
      T* to = sums + (t * kWeightVectors + v) * lanes;
      store(to, load(to) + sum[t][v]);
    }
  }
}

template <class T, class S>
void grad_weight_channels(const ConvGradWeight& p) {
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  constexpr int64_t width = kWeightVectors * kLanes<T>;
  const int64_t channels = s.groups, taps = taps_of(axes), panels = (channels + width - 1) / width;
  const int64_t rows = s.batch * axes[0].count * axes[1].count, threads = thread_count();
  const Strides x = strides_of(true, channels, s.in), g = strides_of(true, channels, s.out);
  const Interior interior(axes[2]);
  // Each share of the rows has sums of its own, added in their order. A row's taps are summed kTapsTogether at a time;
  // the room past the last is computed and dropped.
  const int64_t shares = at_most(rows > 0 ? rows : 1, threads), size = (taps + kTapsTogether) * width;
  T* all = static_cast<T*>(scratch(kWeightSlot, panels * shares * size * sizeof(T)));
  const BiasSums<T> bias(p, shares);
  const int64_t work = rows / shares * axes[2].count * channels * taps;
  parallel(shares, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      T* sums = all + share * panels * size;
      const BiasLine<T> line = bias.piece(share);
      std::memset(sums, 0, static_cast<size_t>(panels * size) * sizeof(T));
      for (int64_t row = rows * share / shares; row < rows * (share + 1) / shares; ++row) {
        const int64_t h = row % axes[1].count, d = row / axes[1].count % axes[0].count;
        const int64_t image = row / axes[1].count / axes[0].count;
        const S* source = static_cast<const S*>(p.x) + image * channels * s.in[0] * s.in[1] * s.in[2];
        const S* grad = static_cast<const S*>(p.grad) + image * channels * s.out[0] * s.out[1] * s.out[2] +
                        d * g.at[0] + h * g.at[1];
        TapAt waiting[kTapsTogether];
        int given = 0;
        int64_t tap = 0, start = 0;
        const auto flush = [&] {
          if (given == 0) return;
          T* to = sums + start * width;
          for (int64_t first = 0; first < channels; first += width, to += size) {  // memory in its order
            const int64_t columns = at_most(width, channels - first);
            const auto add_row = columns == width ? channels_weight_row<T, true, S> : channels_weight_row<T, false, S>;
            add_row(axes[2], interior, source + first, x.at[2], grad + first, g.at[2], waiting, given, columns, to);
          }
          given = 0;
        };
        for (int64_t i = 0; i < axes[0].taps; ++i) {
          const int64_t z = low(axes[0], d) + i * axes[0].offset_step;
          for (int64_t j = 0; j < axes[1].taps; ++j) {
            const int64_t y = low(axes[1], h) + j * axes[1].offset_step;
            if (!inside(axes[0], z) || !inside(axes[1], y)) {
              flush();  // taps that are summed together lie beside each other
              tap += axes[2].taps;
              continue;
            }
            for (int64_t k = 0; k < axes[2].taps; ++k, ++tap) {
              if (given == 0) start = tap;
              const int64_t at = axes[2].offset + k * axes[2].offset_step;
              waiting[given++] = {at, z * x.at[0] + y * x.at[1] + at * x.at[2]};
              if (given == kTapsTogether) flush();
            }
          }
        }
        flush();
        if (line) add_pixels(grad, g.at[2], axes[2].count, channels, line);
      }
    }
  });
  bias.template write<S>();
  for (int64_t tap = 0; tap < taps; ++tap) {
    S* to = static_cast<S*>(p.grad_weight) + tap % s.kernel[2] * s.weight_strides[4] +
            tap / s.kernel[2] % s.kernel[1] * s.weight_strides[3] +
            tap / s.kernel[2] / s.kernel[1] * s.weight_strides[2];
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = all + c / width * size + tap * width + c % width;
      T total = 0;
      for (int64_t share = 0; share < shares; ++share) total += from[share * panels * size];
      to[c * s.weight_strides[0]] = from_float<S>(total);
    }
  }
}

}  // namespace

void depthwise_gather(const Phase& phase, int64_t repeat, int64_t passes) {
  Phase all = phase;  // groups at once
  all.source_channels *= phase.p.shape.groups, all.channels *= phase.p.shape.groups;
  with_storage(phase.p.shape.dtype, [&](auto kind) {
    using S = decltype(kind);
    if (phase.p.shape.channels_last && repeat == 1 && passes == 1) return gather_channels<Compute<S>, S>(all);
    depthwise_planes_gather(all, repeat, passes);
  });
}

void depthwise_grad_weight(const ConvGradWeight& p) {
  with_storage(p.shape.dtype, [&](auto kind) {
    using S = decltype(kind);
    if (p.shape.channels_last && p.shape.out_channels == 1) return grad_weight_channels<Compute<S>, S>(p);
    depthwise_planes_grad_weight(p);
  });
}

}  // namespace fastnets::FASTNETS_ISA

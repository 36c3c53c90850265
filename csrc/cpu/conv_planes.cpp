// Convolution where the lanes of a vector are pixels of one channel, for tensors of planes and for results of few
// channels: no lane stands for a channel that is not there. A block's source is staged, plane after plane (planes.h); a
// register tile is some channels of two vectors of pixels. Of few channels and three times three neighbouring taps it
// is some rows of one vector: every vector of the source is then loaded once for all the results that take it.
#include "planes.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kPixelVectors = 2;
// Of few channels a tile is that many vectors wide: as many sums, and an element of the weight serves them all.
constexpr int kFewRows = 4, kFewVectors = kTileRows * kPixelVectors / kFewRows;
constexpr int kMostVectors = kFewVectors > kPixelVectors ? kFewVectors : kPixelVectors;

constexpr int kSquareRows = 4, kFewSquareRows = 8;  // of results; the latter of one or two channels

// Of one panel of the weight.
int64_t panel_rows(int64_t channels) { return channels <= kFewRows ? kFewRows : kTileRows; }

// A vector of results: where its first tap lies in the staged source, where it goes, and how many lanes count.
struct Pixels {
  int64_t from, to;
  int lanes;
};

// Rows of the source for a tile of PlanesTile::square, and which lanes of two neighbouring vectors lie inside them.
template <class T>
struct SquareRows {
  const T* at[kFewSquareRows + 2];
  int64_t step[kFewSquareRows + 2];  // from one pass, a channel's nine taps, to the next
  int64_t ahead;                     // to the rows that a later tile takes first
  int begin[2], end[2];
};

template <class T, class S>
struct PlanesTile {
  const Finish<T, S>& finish;
  const T* source;         // staged, or in place
  const int64_t* offsets;  // of each element of the sum
  bool in_place;
  int64_t depth;
  int64_t step;  // from a result to the next

  // Channels [first, first + channels) of the vectors; weight[depth][panel_rows].
  template <int kRows, int kVectors>
  void run(const T* __restrict weight, const Pixels* pixels, int64_t first, int channels, bool plain,
           bool stream) const {
    constexpr int64_t panel = kVectors == kPixelVectors ? kTileRows : kFewRows;
    Vec<T> sum[kRows][kVectors];
    const ConvGather& p = finish.phase.p;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const S* bias = static_cast<const S*>(p.bias) + finish.channel + first + r;
      const Vec<T> start = broadcast<T>(p.bias && r < channels ? T(to_float(*bias)) : T(0));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = start;
    }
    const T* at[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) at[v] = source + pixels[v].from;
    for (int64_t k = 0; k < depth; ++k, weight += panel) {
      Vec<T> x[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        if (in_place) __builtin_prefetch(at[v] + offsets[k] + kVectors * kLanes<T>);  // planes lie too far apart
        x[v] = load(at[v] + offsets[k]);
        in_register<T>(x[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> factor = broadcast<T>(weight[r]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(x[v], factor, sum[r][v]);
      }
    }
    finish_tile<kRows, kVectors>(sum, pixels, first, channels, plain, stream);
  }

  // Three times three neighbouring taps: all channels (the only panel) of kRows rows of a vector. The columns' vectors
  // are made from two in registers: as many loads for nine taps as for two. pixels[kRows].
  template <int kChannels, int kRows>
  void square(const T* __restrict weight, SquareRows<T> rows, const Pixels* pixels, bool plain, bool stream) const {
    Vec<T> sum[kChannels][kRows];
    const ConvGather& p = finish.phase.p;
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) {
      const S* bias = static_cast<const S*>(p.bias) + finish.channel + c;
      const Vec<T> start = broadcast<T>(p.bias ? T(to_float(*bias)) : T(0));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[c][r] = start;
    }
    for (int64_t k = 0; k < depth; k += 9, weight += 9 * kFewRows) {
#pragma GCC unroll 8
      for (int r = 2; r < kRows + 2; ++r) __builtin_prefetch(rows.at[r] + rows.ahead);
      square_column<kChannels, kRows, 0>(rows, weight, sum);
      square_column<kChannels, kRows, 1>(rows, weight + kFewRows, sum);
      square_column<kChannels, kRows, 2>(rows, weight + 2 * kFewRows, sum);
#pragma GCC unroll 16
      for (int y = 0; y < kRows + 2; ++y) rows.at[y] += rows.step[y];
    }
    const bool beside = finish.phase.result.channel == 1 && step == kChannels;  // a pixel's channels, and the pixels
    if (kChannels > 1 && beside) return finish_pixels<kChannels, kRows>(sum, pixels);
    finish_tile<kChannels, kRows>(sum, pixels, 0, kChannels, plain, stream);
  }

 private:
  // All channels of a pixel lie beside each other: they get there by way of memory, as single stores are slow.
  template <int kChannels, int kRows>
  FASTNETS_INLINE void finish_pixels(const Vec<T> (&sum)[kChannels][kRows], const Pixels* pixels) const {
    constexpr int lanes = kLanes<T>;
    T turned[kRows][kChannels * lanes + kFewRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      T sums[kFewRows][lanes] = {};
      for (int c = 0; c < kChannels; ++c) store(sums[c], sum[c][r]);
      pack_quad<T>(sums[0], lanes, lanes, turned[r], kChannels);  // what a pixel has too much the next one overwrites
    }
    for (int r = 0; r < kRows; ++r) {
      const int count = kChannels * pixels[r].lanes;
      for (int i = 0; i < count; i += lanes) {
        finish.write(load(turned[r] + i), pixels[r].to + i, static_cast<int>(at_most(lanes, count - i)), 1);
      }
    }
  }

  template <int kChannels, int kRows, int kColumn>
  FASTNETS_INLINE static void square_column(const SquareRows<T>& rows, const T* weight,
                                            Vec<T> (&sum)[kChannels][kRows]) {
    Vec<T> x[kRows + 2];
#pragma GCC unroll 16
    for (int y = 0; y < kRows + 2; ++y) {
      const T* at = rows.at[y];
      x[y] = load_between(at, rows.begin[0], rows.end[0]);
      if constexpr (kColumn > 0) {
        x[y] = shifted<T, kColumn>(x[y], load_between(at + kLanes<T>, rows.begin[1], rows.end[1]), at);
      }
      in_register<T>(x[y]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < 3; ++t, weight += 3 * kFewRows) {
#pragma GCC unroll 4
      for (int c = 0; c < kChannels; ++c) {
        Vec<T> factor = broadcast<T>(weight[c]);
        in_register<T>(factor);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[c][r] = fma<T>(x[r + t], factor, sum[c][r]);
      }
    }
  }

  template <int kRows, int kVectors>
  FASTNETS_INLINE void finish_tile(const Vec<T> (&sum)[kRows][kVectors], const Pixels* pixels, int64_t first,
                                   int channels, bool plain, bool stream) const {
    const ConvGather& p = finish.phase.p;
    const int64_t channel = finish.phase.result.channel;
    if (plain) {
      S* to = static_cast<S*>(p.result) + first * channel;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r, to += channel) {
        if (r >= channels) break;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          if (pixels[v].lanes < kLanes<T>) {
            store_partial<S>(to + pixels[v].to, sum[r][v], pixels[v].lanes);
            continue;
          }
          put(to + pixels[v].to, sum[r][v], stream);
        }
      }
      return;
    }
    T sums[kRows][kVectors][kLanes<T>];
    std::memcpy(sums, sum, sizeof sums);
    for (int r = 0; r < channels; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        finish.write(load(sums[r][v]), pixels[v].to + (first + r) * channel, pixels[v].lanes, step);
      }
    }
  }
};

// Results that PlanesTile::square computes, so many rows at a time; else 0.
int square_rows(const Phase& phase) {
  const int rows = phase.channels <= 2 ? kFewSquareRows : kSquareRows;
  return kManyRegisters && phase.channels <= kFewRows && three_neighbours(phase.axes[1]) &&
                 three_neighbours(phase.axes[2])
             ? rows
             : 0;
}

// The rows of results from `row`, a vector of them from `column`.
template <class T>
SquareRows<T> staged_rows(const Plane<T>& plane, const T* staged, int64_t row, int64_t column, int count) {
  SquareRows<T> rows{{}, {}, 0, {0, 0}, {kLanes<T>, kLanes<T>}};
  for (int y = 0; y < count + 2; ++y) {
    rows.at[y] = staged + (row + y) * plane.line() + column, rows.step[y] = plane.height * plane.line();
  }
  return rows;
}
template <class T, class S>
SquareRows<T> rows_in_place(const Phase& block, const S* source, const Strides& strides, int64_t row, int64_t column,
                            int count) {
  static constexpr T zeros[2 * kLanes<T>] = {};
  SquareRows<T> rows{};
  if constexpr (std::is_same_v<S, T>) {
    const Axis* axes = block.axes;
    const int64_t z = low(axes[0], 0), x = low(axes[2], column);
    const auto lane = [](int64_t at) { return static_cast<int>(at < 0 ? 0 : at_most(at, kLanes<T>)); };
    for (int v = 0; v < 2; ++v) {
      rows.begin[v] = lane(-x - v * kLanes<T>), rows.end[v] = lane(axes[2].extent - x - v * kLanes<T>);
    }
    for (int i = 0; i < count + 2; ++i) {
      const int64_t y = low(axes[1], row) + i;
      const bool there = inside(axes[0], z) && inside(axes[1], y);
      rows.at[i] = there ? source + z * strides.at[0] + y * strides.at[1] + x : zeros;
      rows.step[i] = there ? strides.channel : 0;
    }
  }
  return rows;
}

// Where every tap is alone and reads what lies at its result, a plane is one row.
bool one_row(const Phase& phase) {
  for (const Axis& axis : phase.axes) {
    if (axis.taps != 1 || axis.pull != 1 || axis.step != 1 || axis.offset != 0 || axis.count != axis.extent) {
      return false;
    }
  }
  return true;
}
Phase joined(Phase phase) {
  for (int d = 0; d < 2; ++d) {
    phase.axes[2].count *= phase.axes[d].count, phase.axes[2].extent = phase.axes[2].count;
    phase.axes[d].count = phase.axes[d].extent = 1;
  }
  return phase;
}

// `count` results of the axis, from `begin`.
Axis part(Axis axis, int64_t begin, int64_t count) {
  axis.offset += begin * axis.pull, axis.first += begin * axis.step, axis.count = count;
  return axis;
}

// packed[panel][source channel][tap][panel_rows]
template <class T, class S>
void pack_rows_of(const Phase& phase, const S* weight, T* packed) {
  const int64_t *strides = phase.p.shape.weight_strides + 2, panel = panel_rows(phase.channels);
  for (int64_t first = 0; first < phase.channels; first += panel) {
    const int64_t rows = at_most(panel, phase.channels - first);
    for (int64_t c = 0; c < phase.source_channels; ++c) {
      for (int64_t d = 0; d < phase.axes[0].taps; ++d) {
        for (int64_t h = 0; h < phase.axes[1].taps; ++h) {
          for (int64_t w = 0; w < phase.axes[2].taps; ++w, packed += panel) {
            const int64_t at[3] = {d, h, w};
            const S* from = weight + first * phase.result_stride + c * phase.source_stride;
            for (int i = 0; i < 3; ++i) from += (phase.axes[i].tap + at[i] * phase.axes[i].tap_step) * strides[i];
            for (int64_t r = 0; r < panel; ++r)
              packed[r] = r < rows ? T(to_float(from[r * phase.result_stride])) : T(0);
          }
        }
      }
    }
  }
}

// The block [h, h + height) x [w, w + width) of the results at depth d, and what it takes of the source.
struct PlanesCut {
  const Phase& phase;
  int64_t height, width;

  int64_t count(int axis) const {
    return axis == 0   ? phase.axes[0].count
           : axis == 1 ? (phase.axes[1].count + height - 1) / height
                       : (phase.axes[2].count + width - 1) / width;
  }
  int64_t count() const { return count(0) * count(1) * count(2); }
  Phase block(int64_t index) const {
    Phase block = phase;
    const int64_t w = index % count(2) * width, h = index / count(2) % count(1) * height;
    block.axes[0] = part(phase.axes[0], index / count(2) / count(1), 1);
    block.axes[1] = part(phase.axes[1], h, at_most(height, phase.axes[1].count - h));
    block.axes[2] = part(phase.axes[2], w, at_most(width, phase.axes[2].count - w));
    return block;
  }
};

// Bytes of the staged source of a block's channels.
template <class T>
int64_t staged_bytes(const PlanesCut& cut) {
  const Phase block = cut.block(0);
  return Plane<T>(block.axes, cut.height).size() * block.source_channels * static_cast<int64_t>(sizeof(T));
}

template <class T>
constexpr int64_t kLeastWidth = kPixelVectors * kLanes<T>;

// Heights of `square` rows, if they are computed together; what is read in place may lie far.
template <class T>
PlanesCut cut_planes(const Phase& phase, int square, bool in_place) {
  PlanesCut cut{phase, phase.axes[1].count, phase.axes[2].count};
  const int64_t outer = phase.p.shape.batch * phase.p.shape.groups, least = square > 0 ? square : 1;
  const auto large = [&] {
    return (!in_place && staged_bytes<T>(cut) > kStageBytes) || outer * cut.count() < wanted_pieces();
  };
  while (cut.height > least && large()) cut.height = round_up((cut.height + 1) / 2, least);
  while (cut.width > kLeastWidth<T> && large()) cut.width = round_up((cut.width + 1) / 2, kLeastWidth<T>);
  return cut;
}

template <class T, class S>
void gather_rows(const Phase& whole) {
  const bool row = one_row(whole);
  const Phase phase = row ? joined(whole) : whole;
  const ConvShape& s = phase.p.shape;
  const int64_t depth = phase.depth(), rows = panel_rows(phase.channels), panels = (phase.channels + rows - 1) / rows;
  const int64_t packed_size = panels * rows * depth;
  const int vectors = rows == kTileRows ? kPixelVectors : kFewVectors;
  T* packed = static_cast<T*>(scratch(kWeightSlot, (s.groups * packed_size + 1) * sizeof(T)));
  for (int64_t g = 0; g < s.groups; ++g) {
    pack_rows_of<T>(phase, static_cast<const S*>(phase.p.weight) + g * phase.group_stride, packed + g * packed_size);
  }
  const int square = square_rows(phase);
  const bool squares_in_place =
      square > 0 && std::is_same_v<S, T> && phase.source.at[2] == 1 && phase.axes[0].taps == 1;
  const PlanesCut cut = cut_planes<T>(phase, square, squares_in_place);
  const int64_t outer = s.batch * s.groups, work = cut.height * cut.width * (depth + 1) * phase.channels;
  const int64_t source_pixels = phase.axes[0].extent * phase.axes[1].extent * phase.axes[2].extent;
  const int64_t result_pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  [[maybe_unused]] const int64_t next_image = s.groups * phase.source_channels * source_pixels;
  bool padded = false;
  for (const Axis& axis : phase.axes)
    padded |= !inside(axis, low(axis, 0)) || !inside(axis, low(axis, axis.count - 1) + axis.span());
  parallel(cut.count() * outer, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    int64_t* offsets = static_cast<int64_t*>(scratch(kRunSlot, (depth + 1) * sizeof(int64_t)));
    int64_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t piece = i % cut.count(), image = i / cut.count() / s.groups, group = i / cut.count() % s.groups;
      const Phase block = cut.block(piece);
      const int64_t height = block.axes[1].count, width = block.axes[2].count;
      const Plane<T> plane(block.axes, height);
      const S* source = static_cast<const S*>(phase.p.source) +
                        (image * s.groups * source_pixels) * phase.source_channels +
                        group * phase.source_channels * phase.source.channel;
      const T* from = nullptr;
      int64_t channel = plane.size();
      const bool squares = square > 0 && height >= square;
      const bool in_place =
          squares ? squares_in_place : std::is_same_v<S, T> && row && phase.source.at[2] == 1 && width >= kLanes<T>;
      if constexpr (std::is_same_v<S, T>) {
        if (in_place && squares) {
          from = source;
        } else if (in_place) {
          from = source + low(block.axes[2], 0), channel = phase.source.channel;
        }
      }
      if (!in_place) {
        const int64_t size = phase.source_channels * plane.size();
        T* staged = static_cast<T*>(scratch(kStageSlot, (size + kLanes<T>)*sizeof(T)));
        if (padded && piece != last) std::memset(staged, 0, static_cast<size_t>(size) * sizeof(T));
        const bool turned = phase.source.channel == 1 && phase.source.at[2] > 1 && block.axes[2].pull == 1;
        if (turned) plane.stage_turned(source, phase.source, phase.source_channels, staged);
        for (int64_t c = 0; c < phase.source_channels && !turned; ++c) {
          plane.stage(source + c * phase.source.channel, phase.source, 0, 0, staged + c * plane.size());
        }
        from = staged, last = piece;
      }
      for (int64_t c = 0; c < phase.source_channels; ++c) {
        plane.taps(offsets + c * phase.taps());
        for (int64_t t = c * phase.taps(); t < (c + 1) * phase.taps(); ++t) offsets[t] += c * channel;
      }
      const Block all{{staged_axis(block.axes[0], 0, 1), staged_axis(block.axes[1], 0, height),
                       staged_axis(block.axes[2], 0, width)},
                      1};
      const Finish<T, S> finish{
          block, all, image * s.groups * phase.channels * result_pixels + group * phase.channels * phase.result.channel,
          group * phase.channels};
      const int64_t origin = finish.offset(0, 0), step = block.axes[2].step * phase.result.at[2];
      const bool plain = step == 1 && finish.plain();
      // Every vector begins whole vectors after the result itself.
      const bool stream = plain && finish.streams(phase.axes[2].count);
      const int64_t next_row = block.axes[1].step * phase.result.at[1];
      const PlanesTile<T, S> tile{finish, from, offsets, in_place, depth, step};
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = panel * rows;
        const int channels = static_cast<int>(at_most(rows, phase.channels - first));
        const T* weight = packed + group * packed_size + first * depth;
        if constexpr (kManyRegisters) {
          if (squares) {
            for (int64_t h = 0; h < height; h += square) {
              const int64_t row = at_most(h, height - square);  // the last overlap those before
              for (int64_t column = 0; column < width; column += kLanes<T>) {
                SquareRows<T> rows;
                if (in_place) {
                  rows = rows_in_place<T>(block, source, phase.source, row, column, square);
                  rows.ahead =
                      h + square < height ? square * phase.source.at[1] : next_image - row * phase.source.at[1];
                } else {
                  rows = staged_rows(plane, from, row, column, square);
                }
                Pixels pixels[kFewSquareRows];
                for (int r = 0; r < square; ++r) {
                  pixels[r] = {0, origin + (row + r) * next_row + column * step,
                               static_cast<int>(at_most(kLanes<T>, width - column))};
                }
                with_count<kFewRows>(channels, [&](auto n) {
                  tile.template square<n.value, (n.value <= 2 ? kFewSquareRows : kSquareRows)>(weight, rows, pixels,
                                                                                               plain, stream);
                });
              }
            }
            continue;
          }
        }
        for (Vectors<T> vector(plane); vector.row < height;) {
          Pixels pixels[kMostVectors];
          for (int v = 0; v < vectors; ++v) {
            Pixels& now = pixels[v];
            if (vector.row == height) {  // the first once more, computed and dropped
              now = {pixels[0].from, 0, 0};
              continue;
            }
            // In place nothing is read past a row: its last vector overlaps the one before.
            if (in_place) vector.column = at_most(vector.column, width - kLanes<T>);
            now = {vector.at(), origin + vector.row * next_row + vector.column * step, vector.lanes()};
            vector.next();
          }
          if (rows == kTileRows) {
            with_count<kTileRows, 2>((channels + 1) / 2 * 2, [&](auto n) {
              tile.template run<n.value, kPixelVectors>(weight, pixels, first, channels, plain, stream);
            });
          } else {
            with_count<kFewRows>(channels, [&](auto n) {
              tile.template run<n.value, kFewVectors>(weight, pixels, first, channels, plain, stream);
            });
          }
        }
      }
    }
    streamed();
  });
}

}  // namespace

// By cycles for a result pixel, all channels: products, and elements that are transposed on their way.
bool planes_pay(const Phase& phase) {
  if (phase.depth() == 0) return false;
  const Phase plane = one_row(phase) ? joined(phase) : phase;
  const int64_t lanes = kLanes<float>, width = plane.axes[2].count, turned = phase.source_channels + phase.channels;
  if (staged_bytes<float>({plane, 1, at_most(width, kLeastWidth<float>)}) > 4 * kStageBytes) return false;
  const auto products = [&](int64_t of) { return static_cast<double>(phase.depth() * of) / lanes; };
  const double by_pixels = products(phase.channels) * round_up(width, lanes) / width;
  const double by_channels = products(round_up(phase.channels, lanes));
  return phase.p.shape.channels_last ? by_pixels + 2 * turned < by_channels : by_pixels < by_channels + turned;
}

void planes_gather(const Phase& phase) {
  with_storage(phase.p.shape.dtype, [&](auto kind) { gather_rows<Compute<decltype(kind)>, decltype(kind)>(phase); });
}

}  // namespace fastnets::FASTNETS_ISA

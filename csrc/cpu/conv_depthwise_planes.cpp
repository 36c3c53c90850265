// Depthwise convolution whose lanes are pixels of a row: a plane's rows are copied once, with their padding, where a
// stride would part the lanes apart by their remainder, so that every tap is a load. Where results lie below each other
// as their taps do, a row of the source is loaded once for all the rows of results that take it.
#include "conv_bias.h"
#include "planes.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kResults = kVectorBytes == 16 ? 4 : 6;  // vectors of results in registers, wherever they lie
constexpr int kMostRows = 8, kFewRows = 4;            // or below each other
constexpr int kTapsDown = 3;                          // of a column of the kernel, in registers at once
constexpr int kTapsTogether = 9;                      // of the weight's gradient, in registers at once
constexpr int64_t kPlaneBytes = 64 << 10;             // of a staged plane

// Rows of a plane: as many as stay near.
template <class T>
int64_t plane_rows(const Axis* axes, int64_t planes) {
  int64_t rows = axes[1].count;
  while (rows > 1 && Plane<T>(axes, rows).size() * planes * static_cast<int64_t>(sizeof(T)) > kPlaneBytes) {
    rows = (rows + 1) / 2;
  }
  return rows;
}

// Whether a row of the source is the next tap of the row of results above it.
bool taps_follow(const Axis& rows) { return rows.pull == 1 && rows.offset_step == 1 && rows.taps > 1; }
// Whether taps beside each other are, staged, the vectors one element on.
bool columns_follow(const Axis& columns) { return columns.offset_step == columns.pull; }

// The first position inside the source that results from j may take.
int64_t first_inside(const Axis& axis, int64_t j) { return low(axis, j) > 0 ? low(axis, j) : 0; }

// The rows of the next channels, a part of them after every vector of results. `source` is that channel's plane, `row`
// the first of its rows that the results take.
template <class S>
Ahead next_rows(const S* source, const Strides& strides, int64_t row, const int64_t* sizes, int64_t channels,
                const Axis* axes) {
  const int64_t lanes = kLanes<Compute<S>>, vectors = axes[1].count * ((axes[2].count + lanes - 1) / lanes);
  const int64_t bytes = channels * sizes[1] * sizes[2] * static_cast<int64_t>(sizeof(S));
  const bool known = strides.channel > 1 && vectors > 0;  // else the channels lie beside each other
  return {reinterpret_cast<const char*>(source + channels * strides.channel + row * strides.at[1]),
          known ? bytes / vectors : 0};
}

// The sums of a plane's results, to result[row][width]; past the last there is room for a vector.
template <class T>
struct PlaneSums {
  const Plane<T>& plane;
  int64_t passes;  // of the kernel's planes
  const T* staged;
  const int64_t* offsets;
  const T* factors;
  Vec<T> bias;
  T* result;
  Ahead ahead;

  // Calls finished(rows) whenever so many, from the first, have come to stay.
  template <class Finished>
  void run(const Finished& finished) {
    const int64_t count = plane.count;
    if (!taps_follow(plane.axes[1]) || count < kFewRows) {
      anywhere();
      return finished(count);
    }
    for (int64_t row = 0; row < count;) {
      const int64_t now = count - row > kFewRows && count >= kMostRows ? kMostRows : kFewRows;
      row = at_most(row, count - now);  // the last overlap those before
      finished(row);
      now == kMostRows ? rows<kMostRows>(row) : rows<kFewRows>(row);
      row += now;
    }
    finished(count);
  }

 private:
  // Taps below each other, `across` factors apart: every row is loaded once.
  template <int kRows, int kTaps>
  FASTNETS_INLINE static void add(const T* at, int64_t line, const T* factor, int64_t across, Vec<T>* sum) {
    Vec<T> factors[kTaps];
#pragma GCC unroll 4
    for (int t = 0; t < kTaps; ++t) factors[t] = broadcast<T>(factor[t * across]);
#pragma GCC unroll 16
    for (int y = 0; y < kRows + kTaps - 1; ++y) {
      const Vec<T> x = load(at + y * line);
#pragma GCC unroll 4
      for (int t = 0; t < kTaps; ++t) {
        if (y >= t && y - t < kRows) sum[y - t] = fma<T>(x, factors[t], sum[y - t]);
      }
    }
  }

  // Three times three taps: the columns' vectors are made from two in registers, as each of theirs in memory would lie
  // on two lines of the cache.
  template <int kRows>
  FASTNETS_INLINE static void add_square(const T* at, int64_t line, const T* factor, Vec<T>* sum) {
    Vec<T> factors[9];
#pragma GCC unroll 16
    for (int t = 0; t < 9; ++t) factors[t] = broadcast<T>(factor[t]);
#pragma GCC unroll 16
    for (int y = 0; y < kRows + 2; ++y, at += line) {
      const Vec<T> x = load(at), next = load(at + kLanes<T>);
      const Vec<T> values[3] = {x, shifted<T, 1>(x, next, at), shifted<T, 2>(x, next, at)};
#pragma GCC unroll 4
      for (int column = 0; column < 3; ++column) {
#pragma GCC unroll 4
        for (int t = 0; t < 3; ++t) {
          if (y >= t && y - t < kRows) sum[y - t] = fma<T>(values[column], factors[3 * t + column], sum[y - t]);
        }
      }
    }
  }

  template <int kRows>
  void rows(int64_t row) {
    const int64_t line = plane.line(), width = plane.axes[2].count;
    const int64_t down = plane.axes[1].taps, across = plane.axes[2].taps;
    [[maybe_unused]] const bool square = across == 3 && columns_follow(plane.axes[2]);
    // A vector past the row's end reaches into the next row, which is stored after it.
    for (int64_t column = round_up(width, kLanes<T>) - kLanes<T>; column >= 0; column -= kLanes<T>) {
      ahead.fetch(kRows);
      Vec<T> sum[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r] = bias;
      const T *from = staged + row * line + column, *factor = factors;
      const int64_t* offset = offsets;
      for (int64_t pass = 0; pass < passes; ++pass) {
        for (int64_t y = 0; y < down; y += kTapsDown) {
          const int64_t taps = at_most(kTapsDown, down - y);
          if constexpr (kManyRegisters) {
            if (square && taps == 3) {
              add_square<kRows>(from + offset[0], line, factor, sum);
              offset += 9, factor += 9;
              continue;
            }
          }
          for (int64_t x = 0; x < across; ++x) {
            if (taps == 3) {
              add<kRows, 3>(from + offset[x], line, factor + x, across, sum);
            } else if (taps == 2) {
              add<kRows, 2>(from + offset[x], line, factor + x, across, sum);
            } else {
              add<kRows, 1>(from + offset[x], line, factor + x, across, sum);
            }
          }
          offset += taps * across, factor += taps * across;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) store(result + (row + r) * width + column, sum[r]);
    }
  }

  void anywhere() {
    const int64_t width = plane.axes[2].count, taps = passes * plane.axes[1].taps * plane.axes[2].taps;
    for (Vectors<T> vector(plane); vector.row < plane.count;) {
      const T* at[kResults];
      int64_t to[kResults];
      int n = 0;
      for (; n < kResults && vector.row < plane.count; ++n, vector.next()) {
        at[n] = staged + vector.at(), to[n] = vector.row * width + vector.column;
      }
      for (int r = n; r < kResults; ++r) at[r] = at[0];  // computed and dropped
      ahead.fetch(n);
      Vec<T> sum[kResults];
#pragma GCC unroll 8
      for (int r = 0; r < kResults; ++r) sum[r] = bias;
      for (int64_t t = 0; t < taps; ++t) {
        const Vec<T> factor = broadcast<T>(factors[t]);
#pragma GCC unroll 8
        for (int r = 0; r < kResults; ++r) sum[r] = fma<T>(load(at[r] + offsets[t]), factor, sum[r]);
      }
      for (int r = 0; r < n; ++r) store(result + to[r], sum[r]);
    }
  }
};

// Channel k of the result takes the sources k / repeat * passes, the next, ... : `passes` of them.
template <class T, class S>
void gather(const Phase& phase, int64_t repeat, int64_t passes) {
  const ConvShape& s = phase.p.shape;
  const Axis* axes = phase.axes;
  const int64_t taps = phase.taps(), rows = plane_rows<T>(axes, passes), width = axes[2].count;
  const int64_t cuts = (axes[1].count + rows - 1) / rows;
  const int64_t source_pixels = axes[0].extent * axes[1].extent * axes[2].extent;
  const int64_t result_pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  const int64_t step = axes[2].step * phase.result.at[2], next_row = axes[1].step * phase.result.at[1];
  const bool joined = step == 1 && next_row == width;  // the rows of results are one line
  const int64_t work = rows * width * passes * (taps + 1);
  const S* given = static_cast<const S*>(phase.p.bias);
  const int64_t source_sizes[3] = {axes[0].extent, axes[1].extent, axes[2].extent};
  parallel(s.batch * phase.channels * axes[0].count * cuts, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    T* factors = static_cast<T*>(scratch(kGradSlot, (passes * taps + 1) * sizeof(T)));
    int64_t* offsets = static_cast<int64_t*>(scratch(kRunSlot, (passes * taps + 1) * sizeof(int64_t)));
    T* staged = static_cast<T*>(scratch(kStageSlot, (passes * Plane<T>(axes, rows).size() + 1) * sizeof(T)));
    T* sums = static_cast<T*>(scratch(kSumSlot, (rows * width + kLanes<T>)*sizeof(T)));
    int64_t last = -1;
    for (int64_t i = begin; i < end; ++i) {
      // The rows of all channels and images one after the other: they are zero in the same places.
      const int64_t piece = i / (s.batch * phase.channels), h = piece % cuts * rows, d = piece / cuts;
      const int64_t image = i / phase.channels % s.batch, channel = i % phase.channels;
      const Plane<T> plane(axes, at_most(rows, axes[1].count - h));
      if (piece != last) {
        std::memset(staged, 0, static_cast<size_t>(passes * plane.size()) * sizeof(T));
        for (int64_t pass = 0; pass < passes; ++pass) {
          plane.taps(offsets + pass * taps);
          for (int64_t tap = 0; tap < taps; ++tap) offsets[pass * taps + tap] += pass * plane.size();
        }
        last = piece;
      }
      const S* source = static_cast<const S*>(phase.p.source) + image * phase.source_channels * source_pixels +
                        channel / repeat * passes * phase.source.channel;
      T* factor = factors;
      for (int64_t pass = 0; pass < passes; ++pass) {
        plane.stage(source + pass * phase.source.channel, phase.source, d, h, staged + pass * plane.size());
        const S* weight = static_cast<const S*>(phase.p.weight) + (channel * passes + pass) * s.weight_strides[0];
        for (int a = 0; a < 3; ++a) weight += axes[a].tap * s.weight_strides[2 + a];
        for (int64_t z = 0; z < axes[0].taps; ++z) {
          for (int64_t y = 0; y < axes[1].taps; ++y) {
            for (int64_t x = 0; x < axes[2].taps; ++x) {
              *factor++ = to_float(
                  weight[z * axes[0].tap_step * s.weight_strides[2] + y * axes[1].tap_step * s.weight_strides[3] +
                         x * axes[2].tap_step * s.weight_strides[4]]);
            }
          }
        }
      }
      const Vec<T> bias = broadcast<T>(given ? T(to_float(given[channel])) : T(0));
      const Block block{
          {staged_axis(axes[0], d, 1), staged_axis(axes[1], h, plane.count), staged_axis(axes[2], 0, width)}, 1};
      const Finish<T, S> finish{phase, block, image * phase.channels * result_pixels + channel * phase.result.channel,
                                0};
      const int64_t origin = finish.offset(0, 0);
      const bool plain = step == 1 && finish.plain();
      const bool streams = plain && origin % kLanes<T> == 0 && finish.streams(joined ? kLanes<T> : next_row);
      const auto write = [&](const T* from, int64_t to, int64_t count) {
        int64_t j = 0;
        if (plain) {
          S* result = static_cast<S*>(phase.p.result) + to;
          for (; j + kLanes<T> <= count; j += kLanes<T>) put(result + j, load(from + j), streams);
        }
        for (; j < count; j += kLanes<T>) {
          finish.write(load(from + j), to + j * step, static_cast<int>(at_most(kLanes<T>, count - j)), step);
        }
      };
      int64_t written = 0;  // rows, or elements where they are joined
      const auto finished = [&](int64_t rows) {
        if (joined) {
          const int64_t end = rows < plane.count ? rows * width / kLanes<T> * kLanes<T> : rows * width;
          write(sums + written, origin + written, end - written);
          written = end;
          return;
        }
        for (; written < rows; ++written) write(sums + written * width, origin + written * next_row, width);
      };
      const Ahead ahead = next_rows(source, phase.source, first_inside(axes[1], h), source_sizes, passes, axes);
      PlaneSums<T>{plane, passes * axes[0].taps, staged, offsets, factors, bias, sums, ahead}.run(finished);
    }
    streamed();
  });
}

// Sums over a plane, for its taps from `offsets`: the source at each times the gradient.
template <class T, class S>
struct PlaneWeight {
  const Plane<T>& plane;
  const T* staged;
  const S* grad;
  const Strides& g;
  Ahead source_ahead, grad_ahead;

  // Any kTapsTogether taps.
  void taps(const int64_t* offsets, T* sums) {
    Vec<T> sum[kTapsTogether];
    read(sums, sum);
    for (Vectors<T> vector(plane); vector.row < plane.count; vector.next()) {
      const int n = vector.lanes();
      const T* at = staged + vector.at();
      const Vec<T> factor = load_apart(grad + vector.row * g.at[1] + vector.column * g.at[2], n, g.at[2]);
      if (n == kLanes<T>) {
#pragma GCC unroll 16
        for (int t = 0; t < kTapsTogether; ++t) sum[t] = fma<T>(load(at + offsets[t]), factor, sum[t]);
      } else {  // past the row's end lies what other taps take, infinite perhaps
#pragma GCC unroll 16
        for (int t = 0; t < kTapsTogether; ++t) sum[t] = fma<T>(load_partial(at + offsets[t], n), factor, sum[t]);
      }
    }
    write(sum, sums);
  }

  // Three times three taps, rows that follow each other: a row of the source is loaded once for the rows that take it.
  void square(const int64_t* offsets, T* sums) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t width = plane.axes[2].count, whole = g.at[2] == 1 ? width - width % lanes : 0;
    Vec<T> sum[kTapsTogether];
    read(sums, sum);
    int64_t row = 0;
    for (; row + kFewRows <= plane.count; row += kFewRows) {
      for (int64_t column = 0; column < width; column += lanes) {
        source_ahead.fetch(kFewRows), grad_ahead.fetch(kFewRows);
        if (column < whole) {
          add<kFewRows, true>(offsets, row, column, lanes, sum);
        } else {
          add<kFewRows, false>(offsets, row, column, at_most(lanes, width - column), sum);
        }
      }
    }
    for (; row < plane.count; ++row) {
      for (int64_t column = 0; column < width; column += lanes) {
        add<1, false>(offsets, row, column, at_most(lanes, width - column), sum);
      }
    }
    write(sum, sums);
  }

 private:
  FASTNETS_INLINE static void read(const T* sums, Vec<T>* sum) {
#pragma GCC unroll 16
    for (int t = 0; t < kTapsTogether; ++t) sum[t] = load(sums + t * kLanes<T>);
  }
  FASTNETS_INLINE static void write(const Vec<T>* sum, T* sums) {
#pragma GCC unroll 16
    for (int t = 0; t < kTapsTogether; ++t) store(sums + t * kLanes<T>, sum[t]);
  }

  template <int kRows, bool kWhole>
  FASTNETS_INLINE void add(const int64_t* offsets, int64_t row, int64_t column, int64_t n, Vec<T>* sum) const {
    Vec<T> factor[kRows];
    const S* from = grad + row * g.at[1] + column * g.at[2];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r, from += g.at[1]) {
      factor[r] = kWhole ? load(from) : load_apart(from, static_cast<int>(n), g.at[2]);
    }
    const T* at = staged + offsets[0] + row * plane.line() + column;
#pragma GCC unroll 8
    for (int y = 0; y < kRows + 2; ++y, at += plane.line()) {
      const Vec<T> x = load(at), next = load(at + kLanes<T>);
      Vec<T> values[3] = {x, shifted<T, 1>(x, next, at), shifted<T, 2>(x, next, at)};
#pragma GCC unroll 4
      for (int column = 0; column < 3; ++column) {
        if (!kWhole) values[column] = keep_first<T>(values[column], static_cast<int>(n), T(0));  // as above
#pragma GCC unroll 4
        for (int t = 0; t < 3; ++t) {
          Vec<T>& to = sum[3 * t + column];
          if (y >= t && y - t < kRows) to = fma<T>(values[column], factor[y - t], to);
        }
      }
    }
  }
};

template <class T, class S>
void grad_weight(const ConvGradWeight& p) {
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const int64_t channels = s.groups * s.out_channels, taps = axes[0].taps * axes[1].taps * axes[2].taps;
  const int64_t rows = plane_rows<T>(axes, 1);
  const Strides x = strides_of(s.channels_last, s.groups, s.in), g = strides_of(s.channels_last, channels, s.out);
  const int64_t room = round_up(taps, kTapsTogether), size = room * kLanes<T>;
  const bool square = taps_follow(axes[1]) && axes[1].taps == 3 && axes[2].taps == 3 && columns_follow(axes[2]);
  T* all = static_cast<T*>(scratch(kWeightSlot, channels * size * sizeof(T)));
  const BiasSums<T> bias(p, 1);
  const BiasLine<T> line = bias.piece(0);
  const int64_t work = s.batch * axes[0].count * axes[1].count * axes[2].count * taps;
  parallel(channels, kGrain / (work + 1) + 1, [&](int64_t begin, int64_t end) {
    int64_t* offsets = static_cast<int64_t*>(scratch(kRunSlot, (room + 1) * sizeof(int64_t)));
    T* staged = static_cast<T*>(scratch(kStageSlot, (Plane<T>(axes, rows).size() + 1) * sizeof(T)));
    std::memset(all + begin * size, 0, static_cast<size_t>((end - begin) * size) * sizeof(T));
    for (int64_t d = 0; d < axes[0].count; ++d) {
      for (int64_t h = 0; h < axes[1].count && s.batch > 0; h += rows) {
        const Plane<T> plane(axes, at_most(rows, axes[1].count - h));
        std::memset(staged, 0, static_cast<size_t>(plane.size()) * sizeof(T));
        plane.taps(offsets);
        for (int64_t tap = taps; tap < room; ++tap) offsets[tap] = offsets[0];  // computed and dropped
        for (int64_t i = 0; i < (end - begin) * s.batch; ++i) {                 // in the order of memory
          const int64_t channel = begin + i % (end - begin), image = i / (end - begin);
          const S* source = static_cast<const S*>(p.x) + image * s.groups * s.in[0] * s.in[1] * s.in[2] +
                            channel / s.out_channels * x.channel;
          plane.stage(source, x, d, h, staged);
          const S* grad = static_cast<const S*>(p.grad) + image * channels * s.out[0] * s.out[1] * s.out[2] +
                          channel * g.channel + d * g.at[0] + h * g.at[1];
          const Ahead after_x = next_rows(source, x, first_inside(axes[1], h), s.in, 1, axes);
          const Ahead after_g = next_rows(grad, g, 0, s.out, 1, axes);
          PlaneWeight<T, S> of{plane, staged, grad, g, after_x, after_g};
          for (int64_t tap = 0; tap < taps; tap += kTapsTogether) {
            T* sums = all + channel * size + tap * kLanes<T>;
            square ? of.square(offsets + tap, sums) : of.taps(offsets + tap, sums);
          }
          if (line) add_rows<T>(grad, g, plane.count, axes[2].count, line, channel);
        }
      }
    }
    for (int64_t channel = begin; channel < end; ++channel) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        S* to = static_cast<S*>(p.grad_weight) + channel * s.weight_strides[0] +
                tap % s.kernel[2] * s.weight_strides[4] + tap / s.kernel[2] % s.kernel[1] * s.weight_strides[3] +
                tap / s.kernel[2] / s.kernel[1] * s.weight_strides[2];
        *to = from_float<S>(reduce_add<T>(load(all + channel * size + tap * kLanes<T>)));
      }
    }
  });
  bias.template write<S>();
}

}  // namespace

void depthwise_planes_gather(const Phase& phase, int64_t repeat, int64_t passes) {
  with_storage(phase.p.shape.dtype, [&](auto kind) {
    using S = decltype(kind);
    gather<Compute<S>, S>(phase, repeat, passes);
  });
}

void depthwise_planes_grad_weight(const ConvGradWeight& p) {
  with_storage(p.shape.dtype, [&](auto kind) {
    using S = decltype(kind);
    grad_weight<Compute<S>, S>(p);
  });
}

}  // namespace fastnets::FASTNETS_ISA

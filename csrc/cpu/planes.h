// Rows of a convolution's source, staged for lanes that are pixels of a row: one channel after the other, with their
// padding, so that every tap of a vector of results is one load. Where a stride would part the lanes they are parted by
// their remainder.
#pragma once

#include "conv.h"

namespace fastnets::FASTNETS_ISA {

inline int64_t positive_ceil(int64_t a, int64_t b) { return a <= 0 ? 0 : (a + b - 1) / b; }

// The source position that the axis' result j takes at its first tap.
inline int64_t low(const Axis& axis, int64_t j) { return j * axis.pull + axis.offset; }

inline bool inside(const Axis& axis, int64_t position) { return position >= 0 && position < axis.extent; }

// Three taps beside each other for results beside each other.
inline bool three_neighbours(const Axis& axis) { return axis.taps == 3 && axis.pull == 1 && axis.offset_step == 1; }

constexpr bool kManyRegisters = kVectorBytes == 64;  // for the nine taps of a kernel of three times three, or its sums

// Rows of results of one channel, and what they take of its source: staged [tap d][row][remainder][column], where a
// column is `pull` positions of the source from the next.
template <class T>
struct Plane {
  const Axis* axes;
  int64_t count;  // rows of results
  int64_t height, columns;

  Plane(const Axis* axes, int64_t count)
      : axes(axes),
        count(count),
        height(axes[1].taps > 0 ? (count - 1) * axes[1].pull + axes[1].span() + 1 : 0),
        columns(
            round_up(round_up(axes[2].count, kLanes<T>) + (axes[2].taps > 0 ? axes[2].span() / axes[2].pull : 0) + 1,
                     kLanes<T>)) {}

  int64_t line() const { return axes[2].pull * columns; }
  int64_t size() const { return axes[0].taps * height * line(); }

  // The taps' offsets, in their order.
  void taps(int64_t* offsets) const {
    for (int64_t d = 0; d < axes[0].taps; ++d) {
      for (int64_t h = 0; h < axes[1].taps; ++h) {
        for (int64_t w = 0; w < axes[2].taps; ++w) {
          const int64_t at = w * axes[2].offset_step;
          *offsets++ =
              (d * height + h * axes[1].offset_step) * line() + at % axes[2].pull * columns + at / axes[2].pull;
        }
      }
    }
  }

  // Stages the rows from h of the results at depth d: the source's part of them, or else the zeros around it.
  template <class S>
  void stage(const S* source, const Strides& strides, int64_t d, int64_t h, T* to) const {
    const int64_t pull = axes[2].pull, step = pull * strides.at[2];
    int64_t remainder = 0, begin, end;
    part(0, &begin, &end);
    for (int64_t i = 0; i < axes[0].taps; ++i) {
      const int64_t z = low(axes[0], d) + i * axes[0].offset_step;
      for (int64_t j = 0; j < height; ++j) {
        const int64_t y = low(axes[1], h) + j;
        if (!inside(axes[0], z) || !inside(axes[1], y)) {
          to += line();
          continue;
        }
        const S* row = source + z * strides.at[0] + y * strides.at[1];
        do {
          if (begin < end) {
            copy(row + (axes[2].offset + remainder + begin * pull) * strides.at[2], step, end - begin, to + begin);
          }
          to += columns;
          if (pull > 1) part(remainder = (remainder + 1) % pull, &begin, &end);
        } while (remainder != 0);
      }
    }
  }

  // The same of `channels` that lie beside each other, from one plane to the next: squares of pixels and channels are
  // turned.
  template <class S>
  void stage_turned(const S* source, const Strides& strides, int64_t channels, T* to) const {
    int64_t begin, end;
    part(0, &begin, &end);
    for (int64_t i = 0; i < axes[0].taps; ++i) {
      const int64_t z = low(axes[0], 0) + i * axes[0].offset_step;
      for (int64_t j = 0; j < height; ++j, to += columns) {
        const int64_t y = low(axes[1], 0) + j;
        if (!inside(axes[0], z) || !inside(axes[1], y)) continue;
        const S* from = source + z * strides.at[0] + y * strides.at[1] + (axes[2].offset + begin) * strides.at[2];
        int64_t x = begin;
        for (; x + kLanes<T> <= end; x += kLanes<T>, from += kLanes<T> * strides.at[2]) {
          for (int64_t c = 0; c < channels; c += kLanes<T>) {
            const int given = static_cast<int>(at_most(kLanes<T>, channels - c));
            turn_square(from + c, strides.at[2], given, to + x + c * size());
          }
        }
        for (; x + 4 <= end; x += 4, from += 4 * strides.at[2]) {
          pack_quad<T>(from, strides.at[2], channels, to + x, size());
        }
        for (; x < end; ++x, from += strides.at[2]) {
          for (int64_t c = 0; c < channels; ++c) to[x + c * size()] = to_float(from[c]);
        }
      }
    }
  }

 private:
  // A vector of pixels, `step` apart, of `given` channels.
  template <class S>
  FASTNETS_INLINE void turn_square(const S* from, int64_t step, int given, T* to) const {
    Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      square[i] = given == kLanes<T> ? load(from + i * step) : load_partial(from + i * step, given);
    }
    turn<T>(square);
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<T>; ++k) {
      if (k < given) store(to + k * size(), square[k]);
    }
  }

  // n elements, `step` apart.
  template <class S>
  static void copy(const S* from, int64_t step, int64_t n, T* to) {
    if (step == 1) return copy_converted<T>(from, n, to);
    int64_t c = 0;
    if (step == 2) {  // two vectors hold one, and an element after it that has to be there
      for (; c + kLanes<T> < n; c += kLanes<T>, from += 2 * kLanes<T>) {
        store(to + c, every_second<T>(load(from), load(from + kLanes<T>)));
      }
    }
    for (; c < n; ++c, from += step) to[c] = to_float(*from);
  }

  // Column c of a row's `remainder` is position offset + remainder + c * pull: [begin, end) lie in the source.
  void part(int64_t remainder, int64_t* begin, int64_t* end) const {
    const Axis& w = axes[2];
    const int64_t start = w.offset + remainder;
    *begin = at_most(positive_ceil(-start, w.pull), columns);
    *end = at_most(positive_ceil(w.extent - start, w.pull), columns);
  }
};

// Vectors of results, through the rows of a plane.
template <class T>
class Vectors {
 public:
  explicit Vectors(const Plane<T>& plane) : width_(plane.axes[2].count), line_(plane.axes[1].pull * plane.line()) {}

  int64_t row = 0, column = 0;

  int64_t at() const { return row * line_ + column; }
  int lanes() const { return static_cast<int>(at_most(kLanes<T>, width_ - column)); }
  void next() {
    column += kLanes<T>;
    if (column >= width_) ++row, column = 0;
  }

 private:
  int64_t width_, line_;
};

}  // namespace fastnets::FASTNETS_ISA

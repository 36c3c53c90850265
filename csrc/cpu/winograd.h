// Winograd's F(4x4, 3x3): 36 products a channel pair for 16 results of a 3x3 convolution of stride 1, in place of 144;
// and F(3x3, 4x4), of the same points: 36 for 9 results of 16 taps.
//
// The points are 0, +-3/4, +-3/2 and infinity (Lavin and Gray, https://arxiv.org/abs/1509.09308, have 0, +-1, +-2): the
// transforms cost the same and lose two to four times less accuracy (Barabasz et al.,
// https://arxiv.org/abs/1803.10986). Results come in tiles; a strip is a row of tiles of one image.
#pragma once

#include "conv.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kIn = 6, kPoints = kIn * kIn;  // a tile takes kIn x kIn elements
constexpr int kTaps = 3, kOut = kIn - kTaps + 1;
constexpr int64_t kPad = 16;  // elements between planes, so that they do not meet in the same sets of the cache

constexpr double kP = 0.75, kQ = 1.5, kP2 = kP * kP, kQ2 = kQ * kQ;
constexpr double kAtP = 1 / (2 * kP2 * (kP2 - kQ2)), kAtQ = 1 / (2 * kQ2 * (kQ2 - kP2));

// [6] -> [6]: the polynomial d modulo each factor of x (x^2 - p^2) (x^2 - q^2), and its highest coefficient.
template <class T>
FASTNETS_INLINE void source_transform(const Vec<T> (&d)[kIn], Vec<T> (&t)[kIn]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> even_p = fma<T>(c(-kQ2), d[2], d[4]), odd_p = fma<T>(c(-kQ2), d[1], d[3]);
  const Vec<T> even_q = fma<T>(c(-kP2), d[2], d[4]), odd_q = fma<T>(c(-kP2), d[1], d[3]);
  t[0] = fma<T>(c(kP2 * kQ2), d[0], fma<T>(c(-kP2 - kQ2), d[2], d[4]));
  t[1] = fma<T>(c(kP), odd_p, even_p);
  t[2] = fma<T>(c(-kP), odd_p, even_p);
  t[3] = fma<T>(c(kQ), odd_q, even_q);
  t[4] = fma<T>(c(-kQ), odd_q, even_q);
  t[5] = fma<T>(c(kP2 * kQ2), d[1], fma<T>(c(-kP2 - kQ2), d[3], d[5]));
}

// Both directions of a tile: to[a][b] from at(i, j), one-dimensional transform `apply`.
template <class T, int kFrom, int kTo, class At, class Apply, class Put>
FASTNETS_INLINE void transform(const At& at, const Apply& apply, const Put& put) {
  Vec<T> half[kTo][kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    Vec<T> column[kFrom], turned[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = at(i, j);
    apply(column, turned);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = turned[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) {
    Vec<T> turned[kTo];
    apply(half[i], turned);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) put(i, j, turned[j]);
  }
}

// Tiles [column, column + tiles) of row `row` of tiles, of one image's plane.
struct Strip {
  int64_t image, plane, row, column, tiles;
};

// Results along the axes, of a source of `channels`, cut into strips of at most `longest` tiles of out x out.
struct Strips {
  const Axis* axes;
  int64_t batch, channels, longest, out = kOut;
  int64_t rows = (axes[1].count + out - 1) / out, columns = (axes[2].count + out - 1) / out;
  int64_t pieces = (columns + longest - 1) / longest, most = (columns + pieces - 1) / pieces;

  int64_t count() const { return batch * axes[0].count * rows * pieces; }
  int64_t tiles() const { return batch * axes[0].count * rows * columns; }
  Strip operator()(int64_t index) const {
    const int64_t column = index % pieces * most, plane = index / pieces / rows;
    return {plane / axes[0].count, plane % axes[0].count, index / pieces % rows, column,
            at_most(most, columns - column)};
  }
  // The strip's results.
  Block results(const Strip& strip) const {
    return block(axes, strip, at_most(out, axes[1].count - strip.row * out),
                 at_most(strip.tiles * out, axes[2].count - strip.column * out), channels);
  }
  // All that its tiles take along the axes, zero past the border; whole vectors of channels.
  Block whole(const Axis* along, const Strip& strip, int64_t channels) const {
    return block(along, strip, out, strip.tiles * out, round_up(channels, kLanes<float>));
  }

 private:
  Block block(const Axis* along, const Strip& strip, int64_t height, int64_t width, int64_t channels) const {
    return {{staged_axis(along[0], strip.plane, 1), staged_axis(along[1], strip.row * out, height),
             staged_axis(along[2], strip.column * out, width)},
            channels};
  }
};

// Whether a convolution along these axes is one, and its tiles waste little and are enough for the transforms to pay.
bool winograd_fits(const ConvShape& shape, const Axis* axes);

}  // namespace fastnets::FASTNETS_ISA

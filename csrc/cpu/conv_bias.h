// The bias's gradient: the gradient of y, summed over images and pixels by the kernels of the weight's gradient while
// what they read of it lies in the caches.
#pragma once

#include "conv.h"

namespace fastnets::FASTNETS_ISA {

constexpr int64_t kBiasPixels = 64;  // of one sum, lest its rounding grow

// A line of sums of many terms, and what rounding took from each (Knuth's two-sum): PyTorch's sums are as exact. Or
// none.
template <class T>
struct BiasLine {
  T *sums, *rests;

  explicit operator bool() const { return sums != nullptr; }
  BiasLine from(int64_t channel) const { return sums ? BiasLine{sums + channel, rests + channel} : *this; }
  FASTNETS_INLINE void add(int64_t channel, Vec<T> value, int n) const {
    const Vec<T> old = load_partial(sums + channel, n), sum = old + value, taken = sum - old;
    store_partial(sums + channel, sum, n);
    store_partial(rests + channel, load_partial(rests + channel, n) + ((old - (sum - taken)) + (value - taken)), n);
  }
};

// line[channel] += over pixels `step` apart, whose channels lie beside each other.
template <class T, class S>
void add_pixels(const S* from, int64_t step, int64_t pixels, int64_t channels, BiasLine<T> line) {
  constexpr int kVectors = 4;
  constexpr int64_t lanes = kLanes<T>;
  for (; pixels > kBiasPixels; pixels -= kBiasPixels, from += kBiasPixels * step) {
    add_pixels(from, step, kBiasPixels, channels, line);
  }
  int64_t c = 0;
  for (; c + kVectors * lanes <= channels; c += kVectors * lanes) {
    Vec<T> sum[kVectors] = {};
    const S* at = from + c;
    for (int64_t i = 0; i < pixels; ++i, at += step) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load(at + v * lanes);
    }
    for (int v = 0; v < kVectors; ++v) line.add(c + v * lanes, sum[v], lanes);
  }
  for (; c < channels; c += lanes) {
    const int n = static_cast<int>(at_most(lanes, channels - c));
    Vec<T> even{}, odd{};
    const S* at = from + c;
    int64_t i = 0;
    const auto read = [n](const S* at) { return n == lanes ? load(at) : load_partial(at, n); };
    for (; i + 2 <= pixels; i += 2, at += 2 * step) even += read(at), odd += read(at + step);
    if (i < pixels) even += read(at);
    line.add(c, even + odd, n);
  }
}

// line[channel] += over rows of its plane.
template <class T, class S>
void add_rows(const S* from, const Strides& strides, int64_t rows, int64_t width, BiasLine<T> line, int64_t channel) {
  constexpr int kVectors = 4;
  constexpr int64_t lanes = kLanes<T>;
  if (strides.at[2] == 1 && strides.at[1] == width) width *= rows, rows = 1;
  if (constexpr int64_t most = kBiasPixels * kVectors * lanes; rows == 1 && width > most) {
    for (int64_t w = 0; w < width; w += most) {
      add_rows<T>(from + w * strides.at[2], strides, 1, at_most(most, width - w), line, channel);
    }
    return;
  }
  Vec<T> sum[kVectors] = {};
  for (int64_t h = 0; h < rows; ++h, from += strides.at[1]) {
    int64_t w = 0;
    for (; strides.at[2] == 1 && w + kVectors * lanes <= width; w += kVectors * lanes) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load(from + w + v * lanes);
    }
    for (; w < width; w += lanes) {
      sum[0] += load_apart(from + w * strides.at[2], static_cast<int>(at_most(lanes, width - w)), strides.at[2]);
    }
  }
  line.add(channel, broadcast<T>(reduce_add<T>((sum[0] + sum[1]) + (sum[2] + sum[3]))), 1);
}

// The lines of pieces of the work, which are added in their order; nothing where nobody asks for the gradient.
template <class T>
class BiasSums {
 public:
  BiasSums(const ConvGradWeight& p, int64_t pieces)
      : to_(p.grad_bias), channels_(p.shape.groups * p.shape.out_channels), pieces_(pieces) {
    if (!to_) return;
    const size_t bytes = static_cast<size_t>(2 * pieces * channels_) * sizeof(T);
    sums_ = static_cast<T*>(scratch(kSumSlot, bytes));
    std::memset(sums_, 0, bytes);
  }

  BiasLine<T> piece(int64_t index) const {
    return BiasLine<T>{sums_, sums_ ? sums_ + channels_ : nullptr}.from(2 * index * channels_);
  }

  template <class S>
  void write() const {
    for (int64_t c = 0; to_ && c < channels_; ++c) {
      T total = 0, rest = 0;
      for (int64_t i = 0; i < pieces_; ++i) total += piece(i).sums[c], rest += piece(i).rests[c];
      static_cast<S*>(to_)[c] = from_float<S>(rest == rest ? total + rest : total);  // infinite sums leave no rest
    }
  }

 private:
  void* to_;
  int64_t channels_, pieces_;
  T* sums_ = nullptr;
};

}  // namespace fastnets::FASTNETS_ISA

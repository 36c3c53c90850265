// The weight's gradient where the lanes of a vector are pixels of a row, for tensors of planes with few channels in x:
// nothing is transposed. A register tile is some output channels by some elements of the sum, each a vector of partial
// sums, which are added up once a block. Pieces of the work are added in their order, as in conv_weight.cpp.
#include "conv_bias.h"
#include "planes.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kOuts = kTileRows < 12 ? 2 : 4, kElements = kTileRows < 12 ? 4 : 6;
constexpr int64_t kMostElements = 100;    // of a sum's 147 the transposed way is as fast, of 256 faster
constexpr int64_t kGradBytes = 16 << 10;  // of a tile's rows of the gradient: half of the nearest cache
constexpr int64_t kTerms = 64;            // of a lane's sum, lest its rounding grow

template <class T, class S>
struct PlanesWeight {
  const ConvGradWeight& p;
  const Axis (&axes)[3];
  const ConvShape& s = p.shape;
  const Strides x = strides_of(false, s.groups* s.in_channels, s.in);
  const Strides grad = strides_of(false, s.groups* s.out_channels, s.out);
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], depth = taps * s.in_channels;
  const int64_t rows = at_most(s.out[1], at_most(kGradBytes / (kOuts * s.out[2] * static_cast<int64_t>(sizeof(T))),
                                                 kTerms / ((s.out[2] + kLanes<T> - 1) / kLanes<T>)) +
                                             1);

  int64_t cuts() const { return (s.out[1] + rows - 1) / rows; }
  int64_t blocks() const { return s.batch * s.out[0] * cuts(); }

  // sums[out channel][element] += the products of one block of rows, bias[out channel], if any, its gradient.
  void accumulate(int64_t block, int64_t group, T* sums, BiasLine<T> bias) const {
    const int64_t h = block % cuts() * rows, d = block / cuts() % s.out[0], image = block / cuts() / s.out[0];
    const Plane<T> plane(axes, at_most(rows, s.out[1] - h));
    const int64_t size = s.in_channels * plane.size();
    T* staged = static_cast<T*>(scratch(kStageSlot, (size + kLanes<T>)*sizeof(T)));
    std::memset(staged, 0, static_cast<size_t>(size) * sizeof(T));
    int64_t* offsets = static_cast<int64_t*>(scratch(kRunSlot, depth * sizeof(int64_t)));
    const S* source = static_cast<const S*>(p.x) + (image * s.groups + group) * s.in_channels * x.channel;
    for (int64_t c = 0; c < s.in_channels; ++c) {
      plane.stage(source + c * x.channel, x, d, h, staged + c * plane.size());
      plane.taps(offsets + c * taps);
      for (int64_t t = c * taps; t < (c + 1) * taps; ++t) offsets[t] += c * plane.size();
    }
    const S* from = static_cast<const S*>(p.grad) + (image * s.groups + group) * s.out_channels * grad.channel +
                    d * grad.at[0] + h * grad.at[1];
    for (int64_t k = 0; k < s.out_channels; k += kOuts) {
      const int outs = static_cast<int>(at_most(kOuts, s.out_channels - k));
      for (int64_t e = 0; e < depth; e += kElements) {
        const int elements = static_cast<int>(at_most(kElements, depth - e));
        with_count<kElements>(elements, [&](auto n) {
          tile<n.value>(plane, from + k * grad.channel, outs, staged, offsets + e, sums + k * depth + e);
        });
      }
      for (int64_t c = k; bias && c < k + outs; ++c) {
        add_rows<T>(from + c * grad.channel, grad, plane.count, s.out[2], bias, c);
      }
    }
  }

  template <int kCount>
  void tile(const Plane<T>& plane, const S* from, int outs, const T* staged, const int64_t* offsets, T* to) const {
    constexpr int lanes = kLanes<T>;
    Vec<T> sum[kOuts][kCount] = {};
    const int64_t width = s.out[2], line = axes[1].pull * plane.line();
    const S* row[kOuts];
    const T* element[kCount];
    for (int k = 0; k < kOuts; ++k) row[k] = from + at_most(k, outs - 1) * grad.channel;
    for (int e = 0; e < kCount; ++e) element[e] = staged + offsets[e];
    const auto add = [&](int64_t at, auto vector) {
      Vec<T> left[kOuts];
#pragma GCC unroll 4
      for (int k = 0; k < kOuts; ++k) left[k] = vector(row[k] + at);
#pragma GCC unroll 8
      for (int e = 0; e < kCount; ++e) {
        Vec<T> right = vector(element[e] + at);
        in_register<T>(right);
#pragma GCC unroll 4
        for (int k = 0; k < kOuts; ++k) sum[k][e] = fma<T>(left[k], right, sum[k][e]);
      }
    };
    for (int64_t h = 0; h < plane.count; ++h) {
      int64_t w = 0;
      for (; w + lanes <= width; w += lanes) add(w, [](const auto* at) { return load(at); });
      // Past the row x may be infinite.
      if (w < width) add(w, [n = static_cast<int>(width - w)](const auto* at) { return load_partial(at, n); });
      for (int k = 0; k < kOuts; ++k) row[k] += grad.at[1];
      for (int e = 0; e < kCount; ++e) element[e] += line;
    }
#pragma GCC unroll 4
    for (int k = 0; k < kOuts; ++k) {
      if (k >= outs) break;
#pragma GCC unroll 8
      for (int e = 0; e < kCount; ++e) to[k * depth + e] += reduce_add<T>(sum[k][e]);
    }
  }
};

template <class T, class S>
void grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]) {
  const PlanesWeight<T, S> of{p, axes};
  const ConvShape& s = p.shape;
  const int64_t size = s.groups * s.out_channels * of.depth, blocks = of.blocks();
  const int64_t chunks = at_most((thread_count() + s.groups - 1) / s.groups, blocks), pieces = chunks * s.groups;
  T* sums = static_cast<T*>(scratch(kWeightSlot, chunks * size * sizeof(T)));
  const BiasSums<T> bias(p, chunks);
  const int64_t work = blocks * of.rows * s.out[2] * s.out_channels * of.depth / chunks + 1;
  parallel(pieces, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i % s.groups, chunk = i / s.groups;
      T* to = sums + chunk * size + group * s.out_channels * of.depth;
      std::memset(to, 0, static_cast<size_t>(s.out_channels * of.depth) * sizeof(T));
      const BiasLine<T> line = bias.piece(chunk).from(group * s.out_channels);
      for (int64_t b = blocks * chunk / chunks; b < blocks * (chunk + 1) / chunks; ++b) {
        of.accumulate(b, group, to, line);
      }
    }
  });
  bias.template write<S>();
  const int64_t* strides = s.weight_strides;
  const T* from = sums;
  for (int64_t k = 0; k < s.groups * s.out_channels; ++k) {
    for (int64_t c = 0; c < s.in_channels; ++c) {
      for (int64_t t = 0; t < of.taps; ++t, ++from) {
        T total = *from;
        for (int64_t chunk = 1; chunk < chunks; ++chunk) total += from[chunk * size];
        static_cast<S*>(p.grad_weight)[k * strides[0] + c * strides[1] + t / s.kernel[2] / s.kernel[1] * strides[2] +
                                       t / s.kernel[2] % s.kernel[1] * strides[3] + t % s.kernel[2] * strides[4]] =
            from_float<S>(total);
      }
    }
  }
}

}  // namespace

// A row's last vector may hold few pixels; a long row's sums would be long too, and its gradient in no cache.
bool planes_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]) {
  const ConvShape& s = p.shape;
  const int64_t depth = s.kernel[0] * s.kernel[1] * s.kernel[2] * s.in_channels, width = s.out[2];
  if (s.channels_last || s.batch * s.out[0] * s.out[1] * width == 0 || width > kTerms * kLanes<double>) return false;
  if (depth * round_up(width, kLanes<float>) > kMostElements * width) return false;
  with_storage(s.dtype, [&](auto kind) { grad_weight<Compute<decltype(kind)>, decltype(kind)>(p, axes); });
  return true;
}

}  // namespace fastnets::FASTNETS_ISA

// Pointwise convolutions, which linear layers are too, as matrix products: every result takes one position of the
// source, so that both are matrices where they lie.

#include "conv_bias.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kLeastRows = 2 * kTileRows;  // of pixels, to be worth packing a weight
constexpr int64_t kWeightElements = 8;         // a pixel: from so many on, its gradient's sums are better not added up
constexpr int64_t kLeastWork = 1 << 20;        // multiply-adds for each thread, of one image of planes
constexpr int64_t kPlanarChannels = 64;        // so many products hide the turning of planes

// Whether gemm has a share of an [m, n] product for every thread.
bool feeds_threads(int64_t m, int64_t n) {
  const int64_t threads = thread_count(), units = m >= n ? m / kTileRows : n / kTileCols<float>;
  return threads == 1 || units >= 2 * threads;
}

bool is_pointwise(const Axis (&axes)[3]) {
  for (const Axis& axis : axes) {
    if (axis.taps != 1 || axis.offset != 0 || axis.pull != 1 || axis.step != 1 || axis.count != axis.extent) {
      return false;
    }
  }
  return true;
}

// Whether arithmetic runs in the stored type: sums then lie where the results do.
bool computes_as_stored(Dtype dtype) { return dtype == Dtype::kFloat32 || dtype == Dtype::kFloat64; }
template <class Body>
void with_computed(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
}

// Ends a block of sums [pixel][channel], `row` apart, that lie in the result already: adds bias and residual,
// activates.
template <class T>
void end_sums(const ConvGather& p, const T* bias, T* sums, int64_t row, int64_t pixels, int64_t channels) {
  for (int64_t i = 0; i < pixels; ++i, sums += row) {
    const int64_t at = sums - static_cast<T*>(p.result);
    for (int64_t j = 0; j < channels; j += kLanes<T>) {
      const int n = static_cast<int>(at_most(kLanes<T>, channels - j));
      Vec<T> value = load_partial(sums + j, n);
      if (bias) value += load_partial(bias + j, n);
      if (p.residual) value += load_partial(static_cast<const T*>(p.residual) + at + j, n);
      if (p.kept) store_partial<T>(static_cast<T*>(p.kept) + at + j, value, n);
      store_partial<T>(sums + j, activate<T>(p.activation, value), n);
    }
  }
}

// The bias's gradient by itself: nothing but the products' packing reads the gradient.
template <class T>
void add_bias(const ConvGradWeight& p, int64_t pixels) {
  const ConvShape& s = p.shape;
  const int64_t channels = s.groups * s.out_channels, images = s.batch;
  if (s.channels_last) {
    const int64_t all = images * pixels, pieces = at_most(all, thread_count());
    const BiasSums<T> bias(p, pieces);
    parallel(pieces, kGrain * pieces / (all * channels) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = all * i / pieces, past = all * (i + 1) / pieces;
        add_pixels(static_cast<const T*>(p.grad) + first * channels, channels, past - first, channels, bias.piece(i));
      }
    });
    return bias.template write<T>();
  }
  const BiasSums<T> bias(p, 1);
  const Strides plane = strides_of(false, channels, s.out);
  parallel(channels, kGrain / (images * pixels) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t c = begin; c < end; ++c) {
        add_rows<T>(static_cast<const T*>(p.grad) + (i * channels + c) * pixels, plane, 1, pixels, bias.piece(0), c);
      }
    }
  });
  bias.template write<T>();
}

}  // namespace

// Only where the packed weight outgrows the second-level cache: in it, the pixels are better read in place.
bool product_pays(const Phase& phase) {
  const ConvShape& s = phase.p.shape;
  const int64_t bytes = phase.depth() * phase.channels * static_cast<int64_t>(sizeof(float));
  return s.channels_last && computes_as_stored(s.dtype) && is_pointwise(phase.axes) && bytes > kHeavyBytes &&
         s.batch * phase.positions() >= kLeastRows && feeds_threads(s.batch * phase.positions(), phase.channels);
}

void product_gather(const Phase& phase) {
  const ConvGather& p = phase.p;
  const int64_t pixels = p.shape.batch * phase.positions(), groups = p.shape.groups;
  const bool ends = p.bias || p.residual || p.kept || p.activation != Activation::kNone;
  with_computed(p.shape.dtype, [&](auto kind) {
    using T = decltype(kind);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t channel = g * phase.channels, row = groups * phase.channels;
      const View<T> source{static_cast<const T*>(p.source) + g * phase.source_channels, groups * phase.source_channels,
                           1};
      const View<T> weight{static_cast<const T*>(p.weight) + g * phase.group_stride, phase.source_stride,
                           phase.result_stride};
      const T* bias = p.bias ? static_cast<const T*>(p.bias) + channel : nullptr;
      T* result = static_cast<T*>(p.result) + channel;
      gemm<T>(pixels, phase.channels, phase.source_channels, source, weight, result, row, false,
              [&](int64_t i, int64_t rows, int64_t j, int64_t columns) {
                if (ends) end_sums<T>(p, bias ? bias + j : nullptr, result + i * row + j, row, rows, columns);
              });
    }
  });
}

bool product_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]) {
  const ConvShape& s = p.shape;
  const int64_t *strides = s.weight_strides, plane = axes[0].count * axes[1].count * axes[2].count;
  if (!is_pointwise(axes) || !computes_as_stored(s.dtype) || (strides[0] != 1 && strides[1] != 1)) return false;
  const bool last = s.channels_last;
  // Channels last the images are one; else their products are added, one after the other.
  const int64_t images = last ? 1 : s.batch, pixels = last ? s.batch * plane : plane;
  const int64_t elements = s.in_channels * s.out_channels, fewer = at_most(s.in_channels, s.out_channels);
  const bool pays = last ? elements > kWeightElements * pixels
                         : fewer >= kPlanarChannels && plane > kTileCols<float> &&
                               (thread_count() == 1 || elements * plane >= thread_count() * kLeastWork);
  if (!pays || !feeds_threads(s.out_channels, s.in_channels)) return false;
  with_computed(s.dtype, [&](auto kind) {
    using T = decltype(kind);
    const int64_t outs = s.groups * s.out_channels, ins = s.groups * s.in_channels, apart = last ? 1 : pixels;
    for (int64_t g = 0; g < s.groups; ++g) {
      T* to = static_cast<T*>(p.grad_weight) + g * s.out_channels * strides[0];
      for (int64_t image = 0; image < images; ++image) {
        const T* grad_at = static_cast<const T*>(p.grad) + image * outs * pixels + g * s.out_channels * apart;
        const T* x_at = static_cast<const T*>(p.x) + image * ins * pixels + g * s.in_channels * apart;
        const View<T> grad{grad_at, apart, last ? outs : 1}, x{x_at, apart, last ? ins : 1};  // [channel][pixel]
        const auto turned = [](View<T> of) { return View<T>{of.data, of.col, of.row}; };
        if (strides[1] == 1) {
          gemm<T>(s.out_channels, s.in_channels, pixels, grad, turned(x), to, strides[0], image > 0);
        } else {
          gemm<T>(s.in_channels, s.out_channels, pixels, x, turned(grad), to, strides[1], image > 0);
        }
      }
    }
    if (p.grad_bias) add_bias<T>(p, plane);
  });
  return true;
}

}  // namespace fastnets::FASTNETS_ISA

// Convolution: every way to bring the source and every kind of tile, with and without shares of the depth, both memory
// formats, stride, padding, dilation, groups, each epilogue; depthwise in every layout; forwards and both gradients.
#include <cmath>

#include "driver.h"

namespace sanitize {
namespace {

using fastnets::Activation;
using fastnets::ConvShape;

struct Shape {
  const char* name;
  unsigned multiprocessors;  // tiles are large where these are one, the depth is shared out where they are many
  bool channels_last;
  int64_t batch, groups, channels, results;  // of a group
  int64_t in[3], kernel[3], stride[3], padding[3], dilation[3];
};

constexpr Shape kShapes[] = {
    {"held small", 16, true, 2, 1, 16, 12, {1, 6, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
    {"1 x 1, planes", 16, false, 2, 1, 20, 10, {1, 4, 3}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {"held small, planes", 16, false, 2, 1, 20, 10, {1, 6, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
    {"held wide", 1, true, 1, 1, 72, 66, {1, 4, 12}, {1, 5, 1}, {1, 1, 1}, {0, 2, 0}, {1, 1, 1}},
    {"held tall", 1, true, 1, 1, 16, 9, {1, 9, 29}, {1, 2, 1}, {1, 1, 1}, {0, 1, 0}, {1, 1, 1}},
    {"held middle", 1, true, 1, 1, 72, 9, {1, 4, 12}, {1, 5, 1}, {1, 1, 1}, {0, 2, 0}, {1, 1, 1}},
    {"held tall, two fillings", 1, true, 1, 1, 72, 9, {1, 4, 8}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}},
    {"two groups of taps", 16, true, 3, 1, 32, 10, {1, 8, 9}, {1, 3, 4}, {1, 2, 1}, {0, 1, 2}, {1, 1, 1}},
    {"taps of every other pixel", 16, true, 2, 1, 32, 10, {1, 9, 10}, {1, 3, 3}, {1, 2, 2}, {0, 1, 1}, {1, 1, 1}},
    {"groups, stride, dilation", 16, true, 1, 2, 9, 7, {1, 9, 8}, {1, 3, 2}, {1, 2, 3}, {0, 2, 1}, {1, 2, 1}},
    {"3d", 16, false, 1, 1, 5, 6, {4, 5, 3}, {2, 3, 2}, {2, 1, 1}, {1, 1, 0}, {1, 1, 2}},
    {"3d, held in two planes", 16, true, 1, 1, 8, 6, {3, 4, 3}, {2, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}},
    {"3d, held from image to image", 16, true, 2, 1, 2, 18, {6, 7, 8}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}},
    {"shares of the depth", 16, true, 1, 1, 72, 6, {1, 4, 4}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
    {"1 x 1, shares", 16, false, 1, 1, 520, 6, {1, 2, 4}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {"1 x 1, wide", 1, true, 1, 1, 72, 66, {1, 1, 19}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {"1 x 1, planes, wide", 1, false, 1, 1, 9, 66, {1, 2, 16}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {"1 x 1, tall", 1, true, 1, 1, 40, 6, {1, 1, 13}, {1, 1, 1}, {1, 1, 2}, {0, 0, 0}, {1, 1, 1}},
    {"few channels", 1, false, 1, 1, 2, 10, {1, 9, 21}, {1, 3, 3}, {1, 1, 2}, {0, 1, 1}, {1, 1, 1}},
    {"few channels, wide, deep", 1, true, 2, 1, 3, 34, {1, 6, 7}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {1, 1, 1}},
    {"few terms", 16, true, 1, 2, 3, 5, {1, 2, 3}, {1, 2, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}},
    {"depthwise", 16, false, 2, 5, 1, 1, {1, 7, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
    {"depthwise, channels last", 16, true, 2, 16, 1, 1, {1, 7, 6}, {1, 3, 4}, {1, 2, 1}, {0, 1, 1}, {1, 1, 2}},
    {"depthwise, odd channels last", 16, true, 1, 5, 1, 1, {2, 3, 6}, {2, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}},
    {"depthwise times 2", 16, true, 1, 4, 1, 2, {1, 5, 6}, {1, 3, 3}, {1, 2, 1}, {0, 1, 1}, {1, 1, 1}},
    {"depthwise times 3", 16, false, 1, 4, 1, 3, {1, 5, 6}, {1, 2, 3}, {1, 1, 2}, {0, 1, 1}, {1, 1, 1}},
};

int64_t volume(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

ConvShape shape_of(const Shape& of, Dtype dtype, bool tf32) {
  ConvShape s{};
  s.dtype = dtype, s.channels_last = of.channels_last, s.tf32 = tf32;
  s.batch = of.batch, s.groups = of.groups, s.in_channels = of.channels, s.out_channels = of.results;
  int64_t step = of.channels_last ? of.channels : 1;
  for (int d = 2; d >= 0; --d) {
    s.in[d] = of.in[d], s.kernel[d] = of.kernel[d], s.stride[d] = of.stride[d];
    s.padding[d] = of.padding[d], s.dilation[d] = of.dilation[d];
    s.out[d] = (of.in[d] + 2 * of.padding[d] - of.dilation[d] * (of.kernel[d] - 1) - 1) / of.stride[d] + 1;
    s.weight_strides[2 + d] = step;
    step *= of.kernel[d];
  }
  s.weight_strides[0] = of.channels * volume(of.kernel);
  s.weight_strides[1] = of.channels_last ? 1 : volume(of.kernel);
  return s;
}

// Where an element lies in a tensor [batch, channels, *sizes].
int64_t place(const ConvShape& s, int64_t image, int64_t channels, int64_t channel, const int64_t* sizes,
              const int64_t* at) {
  const int64_t pixel = (at[0] * sizes[1] + at[1]) * sizes[2] + at[2], pixels = volume(sizes);
  return s.channels_last ? (image * pixels + pixel) * channels + channel
                         : (image * channels + channel) * pixels + pixel;
}

// Calls f(element of x, of the weight, of y) for every product of the convolution.
template <class F>
void for_products(const ConvShape& s, F&& f) {
  const int64_t taps = volume(s.kernel), positions = volume(s.out);
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t k = 0; k < s.groups * s.out_channels; ++k) {
      for (int64_t o = 0; o < positions; ++o) {
        const int64_t to[3] = {o / s.out[2] / s.out[1], o / s.out[2] % s.out[1], o % s.out[2]};
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t tap[3] = {t / s.kernel[2] / s.kernel[1], t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
          int64_t from[3], weight = k * s.weight_strides[0];
          bool inside = true;
          for (int d = 0; d < 3; ++d) {
            from[d] = to[d] * s.stride[d] - s.padding[d] + tap[d] * s.dilation[d];
            inside = inside && 0 <= from[d] && from[d] < s.in[d];
            weight += tap[d] * s.weight_strides[2 + d];
          }
          for (int64_t c = 0; inside && c < s.in_channels; ++c) {
            const int64_t channel = k / s.out_channels * s.in_channels + c;
            f(place(s, n, s.groups * s.in_channels, channel, s.in, from), weight + c * s.weight_strides[1],
              place(s, n, s.groups * s.out_channels, k, s.out, to));
          }
        }
      }
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu: return std::fmax(x, 0);
    case Activation::kGelu: return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kSilu: return x / (1 + std::exp(-x));
    case Activation::kSigmoid: return 1 / (1 + std::exp(-x));
    case Activation::kTanh: return std::tanh(x);
    default: return x;
  }
}

double tolerance(const ConvShape& s, const std::vector<double>& truth) {
  double largest = 1;
  for (const double value : truth) largest = std::fmax(largest, std::fabs(value));
  return (s.tf32 ? 4e-3 : 8 * epsilon(Dtype::kFloat32) + epsilon(s.dtype)) * largest;
}

struct Tensors {
  ConvShape s;
  Random random;
  int64_t x_count, y_count, weight_count;
  Tensor x, weight, y;

  Tensors(const Shape& of, Dtype dtype, bool tf32)
      : s((simt::set_multiprocessors(of.multiprocessors), shape_of(of, dtype, tf32))),
        x_count(s.batch * s.groups * s.in_channels * volume(s.in)),
        y_count(s.batch * s.groups * s.out_channels * volume(s.out)),
        weight_count(s.groups * s.out_channels * s.in_channels * volume(s.kernel)),
        x(random.tensor(dtype, x_count, -1, 1)),
        weight(random.tensor(dtype, weight_count, -1, 1)),
        y(random.tensor(dtype, y_count, -1, 1)) {}
};

Tensor memory(size_t bytes) { return Tensor(Dtype::kFloat32, static_cast<int64_t>(bytes / 4)); }

// Forwards or backwards to x, with everything an epilogue can have where `rich`.
void gather(const Shape& of, Dtype dtype, bool tf32, bool forwards, Activation activation, bool rich) {
  Tensors t(of, dtype, tf32);
  const ConvShape& s = t.s;
  const int64_t count = forwards ? t.y_count : t.x_count;
  const int64_t channels = s.groups * (forwards ? s.out_channels : s.in_channels),
                pixels = volume(forwards ? s.out : s.in);
  const Tensor bias = t.random.tensor(dtype, channels, -1, 1), residual = t.random.tensor(dtype, count, -1, 1);
  const Tensor result(dtype, count), kept(dtype, count);
  const Tensor& source = forwards ? t.x : t.y;
  const fastnets::ConvGather p{s,
                               source.data(),
                               t.weight.data(),
                               rich ? bias.data() : nullptr,
                               rich ? residual.data() : nullptr,
                               result.data(),
                               rich ? kept.data() : nullptr,
                               activation};
  std::vector<double> truth(count);
  if (forwards) {
    const Tensor workspace = memory(fastnets::cuda::conv_forward_workspace(p));
    fastnets::cuda::conv_forward(p, workspace.data(), nullptr);
    for_products(s, [&](int64_t x, int64_t w, int64_t y) { truth[y] += t.x[x] * t.weight[w]; });
  } else {
    const Tensor workspace = memory(fastnets::cuda::conv_grad_input_workspace(p));
    fastnets::cuda::conv_grad_input(p, workspace.data(), nullptr);
    for_products(s, [&](int64_t x, int64_t w, int64_t y) { truth[x] += t.y[y] * t.weight[w]; });
  }
  for (int64_t i = 0; rich && i < count; ++i) {
    truth[i] += residual[i] + bias[s.channels_last ? i % channels : i / pixels % channels];
  }
  if (rich) expect_close("kept", kept, truth, tolerance(s, truth));
  const double largest = tolerance(s, truth);
  for (double& value : truth) value = activated(activation, value);
  expect_close("result", result, truth, 1.2 * largest);
}

void grad_weight(const Shape& of, Dtype dtype, bool tf32) {
  const Tensors t(of, dtype, tf32);
  const Tensor result(dtype, t.weight_count);
  const fastnets::ConvGradWeight p{t.s, t.y.data(), t.x.data(), result.data(), nullptr};
  const Tensor workspace = memory(fastnets::cuda::conv_grad_weight_workspace(p));
  fastnets::cuda::conv_grad_weight(p, workspace.data(), nullptr);
  std::vector<double> truth(t.weight_count);
  for_products(t.s, [&](int64_t x, int64_t w, int64_t y) { truth[w] += t.x[x] * t.y[y]; });
  expect_close("grad_weight", result, truth, tolerance(t.s, truth));
}

void grad_epilogue(Dtype dtype, int64_t count, int64_t skipped, Activation activation) {
  Random random;
  const Tensor grad = random.tensor(dtype, count, -1, 1, skipped), saved = random.tensor(dtype, count, -1, 1, skipped);
  const Tensor result(dtype, count, skipped);
  fastnets::cuda::conv_grad_epilogue({dtype, activation, grad.data(), saved.data(), result.data(), count}, nullptr);
  std::vector<double> truth(count);
  for (int64_t i = 0; i < count; ++i) {
    const double v = saved[i], s = 1 / (1 + std::exp(-v));
    double slope = 1;
    switch (activation) {
      case Activation::kRelu: slope = v > 0; break;
      case Activation::kGelu:
        slope = (1 + std::erf(v / std::sqrt(2.0))) / 2 + v * std::exp(-v * v / 2) / std::sqrt(8 * std::atan(1.0));
        break;
      case Activation::kSilu: slope = s * (1 + v * (1 - s)); break;
      case Activation::kSigmoid: slope = v * (1 - v); break;
      case Activation::kTanh: slope = 1 - v * v; break;
      default: break;
    }
    truth[i] = grad[i] * slope;
  }
  expect_close("result", result, truth, 8 * epsilon(Dtype::kFloat32) + 2 * epsilon(dtype));
}

}  // namespace

// Every shape in float32 and bfloat16, with another activation in each; the first ones in float16, whose kernels differ
// in the product alone, and in TF32.
void add_cases(Cases& cases) {
  constexpr int kActivations = 6, kFirst = 2;
  struct Arithmetic {
    const char* name;
    Dtype dtype;
    bool tf32;
    size_t shapes;
  };
  constexpr Arithmetic kArithmetic[] = {{"float32", Dtype::kFloat32, false, std::size(kShapes)},
                                        {"bfloat16", Dtype::kBFloat16, false, std::size(kShapes)},
                                        {"float16", Dtype::kFloat16, false, kFirst},
                                        {"tf32", Dtype::kFloat32, true, kFirst}};
  simt::set_grid_limit(2);  // blocks that stride have several pieces of work
  for (size_t d = 0; d < std::size(kArithmetic); ++d) {
    const auto [type, dtype, tf32, shapes] = kArithmetic[d];
    for (size_t i = 0; i < shapes; ++i) {
      const Shape& shape = kShapes[i];
      const auto activation = static_cast<Activation>((i + d) % kActivations);
      const std::string of = std::string(shape.name) + " " + type;
      cases.add("forward, " + of,
                [=, &shape, dtype = dtype, tf32 = tf32] { gather(shape, dtype, tf32, true, activation, true); });
      cases.add("grad_input, " + of,
                [=, &shape, dtype = dtype, tf32 = tf32] { gather(shape, dtype, tf32, false, activation, i % 2 == 0); });
      cases.add("grad_weight, " + of, [&shape, dtype = dtype, tf32 = tf32] { grad_weight(shape, dtype, tf32); });
    }
  }
  for (const Dtype dtype : kDtypes) {
    for (int a = 0; a < kActivations; ++a) {
      const auto activation = static_cast<Activation>(a);
      const int64_t count = a % 2 == 0 ? 1024 : 517, skipped = a == 2;
      cases.add("grad_epilogue " + std::to_string(a) + " " + name_of(dtype),
                [=] { grad_epilogue(dtype, count, skipped, activation); });
    }
  }
}

}  // namespace sanitize

// Softmax: rows held by a warp, by a block, read twice, and columns; 16 bytes at a time and one element at a time;
// every mask, broadcast and not, with rows that it empties.
#include <cmath>

#include "driver.h"

namespace sanitize {
namespace {

using fastnets::MaskKind;

struct Shape {
  const char* kernel;
  int64_t outer, size, inner;
  int64_t skipped = 0;  // elements by which the tensors miss their alignment
};

constexpr Shape kShapes[] = {
    {"warp", 13, 1, 1},         {"warp", 14, 203, 1},  {"warp wide", 13, 40, 1},  {"warp wide", 14, 256, 1},
    {"warp", 13, 40, 1, 1},     {"block", 5, 257, 1},  {"block", 4, 1003, 1},     {"block wide", 5, 264, 1},
    {"block wide", 4, 2048, 1}, {"long", 4, 2049, 1},  {"long wide", 5, 2056, 1}, {"long", 4, 4104, 1, 1},
    {"columns", 3, 11, 33},     {"columns", 2, 70, 3},
};

struct Mask {
  const char* name;
  MaskKind kind;
  bool broadcast;  // over `outer`
};

constexpr Mask kMasks[] = {
    {"no mask", MaskKind::kNone, false},
    {"boolean mask", MaskKind::kBool, false},
    {"broadcast boolean mask", MaskKind::kBool, true},
    {"additive mask", MaskKind::kAdditive, false},
};

constexpr double kScale = 0.7;

double eps(Dtype dtype, double largest) { return (8 * epsilon(Dtype::kFloat32) + epsilon(dtype)) * largest; }

void forward(const Shape& shape, const Mask& mask, Dtype dtype) {
  const auto [kernel, outer, size, inner, skipped] = shape;
  const int64_t count = outer * size * inner, mask_outer = mask.broadcast ? 1 : outer;
  Random random;
  const Tensor x = random.tensor(dtype, count, -6, 6, skipped), y(dtype, count, skipped);
  Tensor added = random.tensor(dtype, mask_outer * size * inner, -3, 3);
  std::vector<uint8_t> seen = random.booleans(mask_outer * size * inner, 0.7);
  for (int64_t i = 0; i < size; ++i) {  // the first row is empty
    seen[i * inner] = 0;
    added.set(i * inner, -INFINITY);
  }
  fastnets::SoftmaxForward p{};
  p.dtype = dtype;
  p.x = x.data();
  p.y = y.data();
  p.outer = outer, p.size = size, p.inner = inner;
  p.scale = kScale;
  p.mask_kind = mask.kind;
  if (mask.kind != MaskKind::kNone) {
    p.mask = mask.kind == MaskKind::kBool ? static_cast<const void*>(seen.data()) : added.data();
    p.outer_dims = p.inner_dims = 1;
    p.outer_sizes[0] = outer;
    p.outer_strides[0] = mask.broadcast ? 0 : size * inner;
    p.inner_sizes[0] = inner;
    p.inner_strides[0] = 1;
    p.mask_stride = inner;
  }
  fastnets::cuda::softmax_forward(p, nullptr);

  std::vector<double> truth(count), scores(size);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t c = 0; c < inner; ++c) {
      double max = -INFINITY, sum = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = ((mask.broadcast ? 0 : o) * size + i) * inner + c;
        scores[i] = x[(o * size + i) * inner + c] * kScale;
        if (mask.kind == MaskKind::kBool && !seen[at]) scores[i] = -INFINITY;
        if (mask.kind == MaskKind::kAdditive) scores[i] += added[at];
        max = std::fmax(max, scores[i]);
      }
      if (max == -INFINITY) continue;  // an empty row gives zeros
      for (int64_t i = 0; i < size; ++i) sum += std::exp(scores[i] - max);
      for (int64_t i = 0; i < size; ++i) truth[(o * size + i) * inner + c] = std::exp(scores[i] - max) / sum;
    }
  }
  expect_close("y", y, truth, eps(dtype, 1));
}

void backward(const Shape& shape, Dtype dtype) {
  const auto [kernel, outer, size, inner, skipped] = shape;
  const int64_t count = outer * size * inner;
  Random random;
  const Tensor grad = random.tensor(dtype, count, -2, 2, skipped), y = random.tensor(dtype, count, 0, 1, skipped);
  const Tensor grad_x(dtype, count, skipped);
  fastnets::cuda::softmax_backward({dtype, grad.data(), y.data(), grad_x.data(), outer, size, inner, kScale}, nullptr);

  std::vector<double> truth(count);
  double largest = 0, weight = 0;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t c = 0; c < inner; ++c) {
      double dot = 0;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = (o * size + i) * inner + c;
        dot += grad[at] * y[at];
        weight = std::fmax(weight, std::fabs(dot));
      }
      for (int64_t i = 0; i < size; ++i) {
        const int64_t at = (o * size + i) * inner + c;
        truth[at] = kScale * y[at] * (grad[at] - dot);
        largest = std::fmax(largest, std::fabs(truth[at]));
      }
    }
  }
  expect_close("grad_x", grad_x, truth, eps(dtype, std::fmax(largest, weight)));
}

}  // namespace

// Every shape in every dtype, with another mask in each. Grids stride over the rows: one block has several.
void add_cases(Cases& cases) {
  simt::set_grid_limit(2);
  for (size_t d = 0; d < std::size(kDtypes); ++d) {
    const Dtype dtype = kDtypes[d];
    for (size_t s = 0; s < std::size(kShapes); ++s) {
      const Shape& shape = kShapes[s];
      const Mask& mask = kMasks[(s + d) % std::size(kMasks)];
      const std::string of = std::string(shape.kernel) + " " + std::to_string(shape.outer) + "x" +
                             std::to_string(shape.size) + "x" + std::to_string(shape.inner) + " " + name_of(dtype);
      cases.add("forward, " + of + ", " + mask.name, [=] { forward(shape, mask, dtype); });
      cases.add("backward, " + of, [=] { backward(shape, dtype); });
    }
  }
}

}  // namespace sanitize

// softmax(x * scale + mask) over the middle of [outer, size, inner], forward and backward. A row that the mask leaves
// empty (all False, or all -inf) gives zeros and zero gradient.

#include "simd.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements a thread should get at least: below, waking it costs more

template <class T>
constexpr T kMinusInfinity = sizeof(T) == 8 ? T(-__builtin_inf()) : T(-__builtin_inff());

// Where, in elements of the mask, entry `index` of the collapsed dimensions begins.
int64_t mask_offset(int64_t index, int dims, const int64_t* sizes, const int64_t* strides) {
  int64_t offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    offset += index % sizes[d] * strides[d];
    index /= sizes[d];
  }
  return offset;
}

// scores[i] = x[i * x_stride] * scale + mask[i * mask_stride], i < size.
template <class S>
void gather_scores(const SoftmaxForward& p, const S* x, int64_t x_stride, int64_t mask_base, Compute<S>* scores) {
  using T = Compute<S>;
  const T scale = static_cast<T>(p.scale);
  const int64_t n = p.size;
  for (int64_t i = 0; i < n; ++i) scores[i] = to_float(x[i * x_stride]) * scale;
  if (p.mask_kind == MaskKind::kBool) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + mask_base;
    for (int64_t i = 0; i < n; ++i) scores[i] = mask[i * p.mask_stride] ? scores[i] : kMinusInfinity<T>;
  } else if (p.mask_kind == MaskKind::kAdditive) {
    const S* mask = static_cast<const S*>(p.mask) + mask_base;
    for (int64_t i = 0; i < n; ++i) scores[i] += to_float(mask[i * p.mask_stride]);
  }
}

// Whether a result of so many elements is written past the caches. (33 MB of float: backward 1.3 times as fast.)
template <class S>
bool streams_result(int64_t count) {
  const int64_t bytes = count * static_cast<int64_t>(sizeof(S));
  return std::is_same_v<S, Compute<S>> && passes_caches(bytes, 2 * bytes);
}

// y[i] = value(i, lanes) for i < n, in whole vectors but for the ends.
template <class Y, class Value>
FASTNETS_INLINE void write_row(Y* y, int64_t n, bool streams, const Value& value) {
  using T = Compute<Y>;
  int64_t i = 0;
  if constexpr (std::is_same_v<Y, T>) {
    const int64_t ahead = (-reinterpret_cast<intptr_t>(y) & (kVectorBytes - 1)) / static_cast<int64_t>(sizeof(Y));
    if (streams && n > ahead) {
      if (ahead > 0) store_partial<Y>(y, value(0, static_cast<int>(ahead)), static_cast<int>(ahead));
      for (i = ahead; i + kLanes<T> <= n; i += kLanes<T>) stream(y + i, value(i, kLanes<T>));
    }
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(y + i, value(i, kLanes<T>));
  if (i < n) store_partial<Y>(y + i, value(i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

template <class S>
FASTNETS_INLINE Vec<Compute<S>> load_lanes(const S* p, int n) {
  return n == kLanes<Compute<S>> ? load(p) : load_partial(p, n);
}

// y = softmax(x * scale) of one row; the exponentials wait in `buffer`, which may be x or y itself.
template <class T, class X, class Y>
void softmax_row(const X* x, T scale, int64_t n, T* buffer, Y* y, bool streams) {
  constexpr int lanes = kLanes<T>;
  const int64_t whole = n - n % lanes;
  const int rest = static_cast<int>(n - whole);
  Vec<T> largest = broadcast<T>(kMinusInfinity<T>), other = largest;
  int64_t i = 0;
  for (; i + 2 * lanes <= whole; i += 2 * lanes) {
    largest = maximum<T>(load(x + i) * scale, largest);
    other = maximum<T>(load(x + i + lanes) * scale, other);
  }
  if (i < whole) largest = maximum<T>(load(x + i) * scale, largest);
  if (rest) {
    const Vec<T> last = keep_first<T>(load_partial(x + whole, rest) * scale, rest, kMinusInfinity<T>);
    largest = maximum<T>(last, largest);
  }
  const T max = reduce_max<T>(maximum<T>(other, largest));
  const T shift = max == kMinusInfinity<T> ? T(0) : max;  // an empty row: exp(-inf) = 0 everywhere
  Vec<T> total{};
  for (i = 0; i < whole; i += lanes) {
    const Vec<T> e = exp_nonpositive<T>(load(x + i) * scale - shift);
    store(buffer + i, e);
    total += e;
  }
  if (rest) {
    const Vec<T> e = keep_first<T>(exp_nonpositive<T>(load_partial(x + whole, rest) * scale - shift), rest, T(0));
    store_partial<T>(buffer + whole, e, rest);
    total += e;
  }
  const T sum = reduce_add<T>(total), inverse = sum == T(0) ? T(0) : T(1) / sum;
  write_row(y, n, streams, [&](int64_t at, int count) { return load_lanes(buffer + at, count) * inverse; });
}

}  // namespace

void softmax_forward(const SoftmaxForward& p) {
  with_storage(p.dtype, [&](auto kind) {
    using S = decltype(kind);
    using T = Compute<S>;
    const int64_t grain = kGrain / (p.size + 1) + 1;
    const bool streams = streams_result<S>(p.outer * p.size);
    parallel(p.outer * p.inner, grain, [&](int64_t begin, int64_t end) {
      T* scores = static_cast<T*>(scratch(0, p.size * sizeof(T)));
      for (int64_t row = begin; row < end; ++row) {
        const int64_t outer = row / p.inner, inner = row % p.inner, base = outer * p.size * p.inner + inner;
        const S* x = static_cast<const S*>(p.x) + base;
        S* y = static_cast<S*>(p.y) + base;
        if (p.inner == 1 && p.mask_kind == MaskKind::kNone) {
          softmax_row<T>(x, static_cast<T>(p.scale), p.size, scores, y, streams);
          continue;
        }
        const int64_t mask_base = p.mask_kind == MaskKind::kNone
                                      ? 0
                                      : mask_offset(outer, p.outer_dims, p.outer_sizes, p.outer_strides) +
                                            mask_offset(inner, p.inner_dims, p.inner_sizes, p.inner_strides);
        gather_scores<S>(p, x, p.inner, mask_base, scores);
        if (p.inner == 1) {
          softmax_row<T>(scores, T(1), p.size, scores, y, streams);
        } else {
          softmax_row<T>(scores, T(1), p.size, scores, scores, false);
          for (int64_t i = 0; i < p.size; ++i) y[i * p.inner] = from_float<S>(scores[i]);
        }
      }
      if (streams) streamed();
    });
  });
}

// grad_x = scale * y * (grad - sum(grad * y))
void softmax_backward(const SoftmaxBackward& p) {
  with_storage(p.dtype, [&](auto kind) {
    using S = decltype(kind);
    using T = Compute<S>;
    const int64_t grain = kGrain / (p.size + 1) + 1;
    const bool streams = streams_result<S>(p.outer * p.size);
    parallel(p.outer * p.inner, grain, [&](int64_t begin, int64_t end) {
      const int64_t n = p.size;
      const T scale = static_cast<T>(p.scale);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t base = row / p.inner * n * p.inner + row % p.inner;
        const S* grad = static_cast<const S*>(p.grad) + base;
        const S* y = static_cast<const S*>(p.y) + base;
        S* grad_x = static_cast<S*>(p.grad_x) + base;
        if (p.inner != 1) {
          T dot = 0;
          for (int64_t i = 0; i < n; ++i) dot += to_float(grad[i * p.inner]) * to_float(y[i * p.inner]);
          for (int64_t i = 0; i < n; ++i) {
            const int64_t at = i * p.inner;
            grad_x[at] = from_float<S>(scale * to_float(y[at]) * (to_float(grad[at]) - dot));
          }
          continue;
        }
        Vec<T> dots{};
        int64_t i = 0;
        for (; i + kLanes<T> <= n; i += kLanes<T>) dots = fma<T>(load(grad + i), load(y + i), dots);
        if (i < n) dots = fma<T>(load_partial(grad + i, n - i), load_partial(y + i, n - i), dots);
        const T dot = reduce_add<T>(dots);
        write_row(grad_x, n, streams, [&](int64_t at, int count) {
          return load_lanes(y + at, count) * scale * (load_lanes(grad + at, count) - dot);
        });
      }
      if (streams) streamed();
    });
  });
}

}  // namespace fastnets::FASTNETS_ISA

// The SIMD layer: vectors of float and double as wide as the instruction set, on GCC's vector extensions. The same
// text is compiled once an instruction set, in a namespace of its own (FASTNETS_ISA); intrinsics only where the
// compiler cannot find the instruction by itself.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels.h"
#include "runtime.h"

#if defined(__AVX512F__)
#define FASTNETS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTNETS_VECTOR_BYTES 32
#else
#define FASTNETS_VECTOR_BYTES 16
#endif

#define FASTNETS_INLINE inline __attribute__((always_inline))

namespace fastnets::FASTNETS_ISA {

constexpr int kVectorBytes = FASTNETS_VECTOR_BYTES;

// Storage types of the two 16-bit formats; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // the integer of T's size: comparisons give these
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The type that arithmetic on stored S runs in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// ---- one element -----------------------------------------------------------------------------------------------

FASTNETS_INLINE float to_float(float x) { return x; }
FASTNETS_INLINE double to_float(double x) { return x; }
FASTNETS_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
FASTNETS_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
FASTNETS_INLINE float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
FASTNETS_INLINE float to_float(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // A multiplication by 2^112 rebiases the exponent, subnormal numbers included.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

template <class S>
FASTNETS_INLINE S from_float(Compute<S> x) {
  return x;
}
template <>
FASTNETS_INLINE BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};  // a NaN stays one
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};                  // ties to even
}
template <>
FASTNETS_INLINE Float16 from_float<Float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, 0))};
#else
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the hardware round at the right bit
    return {static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude + 0xc8000fffu + (magnitude >> 13 & 1u)) >> 13))};
#endif
}

// ---- vectors: load, store, select ------------------------------------------------------------------------------

template <class T>
FASTNETS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

FASTNETS_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTNETS_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FASTNETS_INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
FASTNETS_INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

// Past the caches, for results too large to stay in them: what a store would read first is not read. p is aligned to
// the vector; streamed() makes the stores visible to other threads.
FASTNETS_INLINE void stream(float* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(p, __m256(v));
#else
  store(p, v);
#endif
}
FASTNETS_INLINE void stream(double* p, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(p, __m512d(v));
#elif defined(__AVX2__)
  _mm256_stream_pd(p, __m256d(v));
#else
  store(p, v);
#endif
}
inline void streamed() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
constexpr int64_t kStreamBytes = 4 << 20;  // of a result: about a core's share of the last-level cache

FASTNETS_INLINE Vec<float> load(const BFloat16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Half half;
  std::memcpy(&half, p, sizeof half);
  const Word word = __builtin_convertvector(half, Word) << 16;
  Vec<float> v;
  std::memcpy(&v, &word, sizeof v);
  return v;
}
FASTNETS_INLINE void store(BFloat16* p, Vec<float> v) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Word __attribute__((vector_size(kVectorBytes)));
  Word bits;
  std::memcpy(&bits, &v, sizeof v);
  const Word rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
  const Half half = __builtin_convertvector(v == v ? rounded : quiet, Half);
  std::memcpy(p, &half, sizeof half);
}
FASTNETS_INLINE Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(half));
#elif defined(__F16C__)
  __m128i half;
  std::memcpy(&half, p, sizeof half);
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(half));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
FASTNETS_INLINE void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0);
  std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0);
  std::memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float<Float16>(v[i]);
#endif
}

// The first n lanes (0 <= n <= lanes); the others read as zero and are not touched in memory.
template <class S>
FASTNETS_INLINE Vec<Compute<S>> load_partial(const S* p, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) return Vec<float>(_mm512_maskz_loadu_ps((1u << n) - 1u, p));
  if constexpr (std::is_same_v<S, double>) return Vec<double>(_mm512_maskz_loadu_pd((1u << n) - 1u, p));
#endif
  alignas(kVectorBytes) S buffer[kLanes<Compute<S>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(S));
  return load(buffer);
}
// The lanes to p[0], p[2], p[4], ...; what lies between them is not touched.
template <class S>
FASTNETS_INLINE void store_every_second(S* p, Vec<Compute<S>> v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    const __m512 low = __m512(__builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7));
    const __m512 high =
        __m512(__builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15));
    _mm512_mask_storeu_ps(p, 0x5555, low);
    return _mm512_mask_storeu_ps(p + kLanes<float>, 0x5555, high);
  }
#endif
  for (int i = 0; i < kLanes<Compute<S>>; ++i) p[2 * i] = from_float<S>(v[i]);
}
template <class S>
FASTNETS_INLINE void store_partial(S* p, Vec<Compute<S>> v, int n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(p, (1u << n) - 1u, __m512(v));
  if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(p, (1u << n) - 1u, __m512d(v));
#endif
  alignas(kVectorBytes) S buffer[kLanes<Compute<S>>];
  store(buffer, v);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(S));
}

// A lane-wise choice: comparisons of vectors (a < b, v == v) give the condition.
// Lanes 0, 2, 4, ... of a, then of b.
template <class T, int... kIndex>
FASTNETS_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex)...);
}
template <class T>
FASTNETS_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
  return every_second<T>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T>
FASTNETS_INLINE Vec<T> select(Vec<Int<T>> condition, Vec<T> yes, Vec<T> no) {
  return condition ? yes : no;
}
// Lanes numbered 0, 1, 2, ...
template <class T>
FASTNETS_INLINE Vec<T> lane_index() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}
// v in the first n lanes, `fill` in the rest.
template <class T>
FASTNETS_INLINE Vec<T> keep_first(Vec<T> v, int n, T fill) {
  return select<T>(lane_index<T>() < broadcast<T>(static_cast<T>(n)), v, broadcast<T>(fill));
}

// ---- arithmetic ------------------------------------------------------------------------------------------------

template <class T>
FASTNETS_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;  // contracted: built with -ffp-contract=fast
}
template <class T>
FASTNETS_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return select<T>(a > b, a, b);
}
template <class T>
FASTNETS_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return select<T>(a < b, a, b);
}
template <class T>
FASTNETS_INLINE Vec<T> absolute(Vec<T> a) {
  return maximum<T>(a, -a);
}

template <class T>
FASTNETS_INLINE T reduce_add(Vec<T> v) {
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(__m512(v));
#endif
  }
  T parts[kLanes<T>];
  store(parts, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  }
  return parts[0];
}
template <class T>
FASTNETS_INLINE T reduce_max(Vec<T> v) {
  if constexpr (std::is_same_v<T, float>) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(__m512(v));
#endif
  }
  T parts[kLanes<T>];
  store(parts, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
  }
  return parts[0];
}

// ---- elementary functions --------------------------------------------------------------------------------------

// 2^n for integer-valued n within the exponent range.
template <class T>
FASTNETS_INLINE Vec<T> power_of_two(Vec<T> n) {
  using I = Int<T>;
  constexpr int mantissa = sizeof(T) == 8 ? 52 : 23, bias = sizeof(T) == 8 ? 1023 : 127;
  const Vec<I> bits = (__builtin_convertvector(n, Vec<I>) + bias) << mantissa;
  return reinterpret_cast<Vec<T>>(bits);
}

template <class T>
FASTNETS_INLINE Vec<T> round_nearest(Vec<T> x) {
  // Adding and subtracting 1.5 * 2^mantissa rounds to the nearest integer, ties to even, for |x| < 2^(mantissa - 1).
  const T magic = sizeof(T) == 8 ? static_cast<T>(0x1.8p52) : static_cast<T>(0x1.8p23);
  Vec<T> shifted = x + magic;
  asm("" : "+x"(shifted));  // the sum must be rounded: no algebra across it
  return shifted - magic;
}

// x = n ln 2 + r with an integer n and |r| <= ln 2 / 2 (Cody and Waite's reduction); returns e^r - 1 by its Taylor
// series, whose terms fall below half an ulp. |x| must stay within the exponent range.
template <class T>
FASTNETS_INLINE Vec<T> reduced_expm1(Vec<T> x, Vec<T>& n) {
  constexpr bool is_double = sizeof(T) == 8;
  n = round_nearest<T>(x * T(1.4426950408889634074));
  Vec<T> r = fma<T>(n, broadcast<T>(is_double ? T(-0x1.62e42feep-1) : T(-0x1.62e4p-1)), x);
  r = fma<T>(n, broadcast<T>(is_double ? T(-0x1.a39ef35793c76p-33) : T(-0x1.7f7d1cp-20)), r);
  Vec<T> p;
  if constexpr (is_double) {
    p = broadcast<T>(T(1.0 / 6227020800));
    for (const double factorial : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0}) {
      p = fma<T>(p, r, broadcast<T>(T(1.0 / factorial)));
    }
  } else {
    p = broadcast<T>(T(1.0 / 5040));
    for (const double factorial : {720.0, 120.0}) p = fma<T>(p, r, broadcast<T>(T(1.0 / factorial)));
  }
  for (const double factorial : {24.0, 6.0, 2.0}) p = fma<T>(p, r, broadcast<T>(T(1.0 / factorial)));
  return fma<T>(p * r, r, r);
}

// e^x to about 1 ulp; 0 below the normal range, infinity above, NaN stays.
template <class T>
FASTNETS_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  const T lowest = is_double ? T(-708.39) : T(-87.336), highest = is_double ? T(709.78) : T(88.7228);
  Vec<T> n;
  const Vec<T> q = reduced_expm1<T>(minimum<T>(maximum<T>(x, broadcast<T>(lowest)), broadcast<T>(highest)), n);
  // 2^n in two factors: n reaches one past the largest exponent.
  const Vec<T> half = round_nearest<T>(n * T(0.5));
  Vec<T> y = (q + T(1)) * power_of_two<T>(half) * power_of_two<T>(n - half);
  y = select<T>(x < broadcast<T>(lowest), Vec<T>{}, y);
  y = select<T>(x > broadcast<T>(highest), broadcast<T>(is_double ? T(__builtin_inf()) : T(__builtin_inff())), y);
  return select<T>(x == x, y, x);
}

// e^x for x <= 0, cheaper: 0 below the normal range (-inf included), NaN stays.
template <class T>
FASTNETS_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  // The least n that is let through has an exponent field of 0, so 2^n comes out as 0.
  const Vec<T> lowest =
      broadcast<T>(sizeof(T) == 8 ? T(-1023 * 0.69314718055994530942) : T(-127 * 0.69314718055994530942));
  Vec<T> n;
  const Vec<T> q = reduced_expm1<T>(select<T>(x < lowest, lowest, x), n);
  return (q + T(1)) * power_of_two<T>(n);
}

template <class T>
FASTNETS_INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}

// tanh |x| = e / (e + 2) with e = expm1(2 |x|): one division, and no cancellation near zero. Past 20 it is 1.
template <class T>
FASTNETS_INLINE Vec<T> tanh(Vec<T> x) {
  Vec<T> n;
  const Vec<T> magnitude = minimum<T>(absolute<T>(x), broadcast<T>(T(20)));
  const Vec<T> q = reduced_expm1<T>(magnitude + magnitude, n), power = power_of_two<T>(n);
  const Vec<T> e = fma<T>(q, power, power - T(1)), y = e / (e + T(2));
  return select<T>(x == x, select<T>(x < Vec<T>{}, -y, y), x);
}

// Calls body(S{}) with the storage type of dtype.
template <class Body>
FASTNETS_INLINE void with_storage(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kFloat64: return body(double{});
    case Dtype::kBFloat16: return body(BFloat16{});
    case Dtype::kFloat16: return body(Float16{});
  }
  __builtin_trap();  // the operators admit no other dtype
}

// Calls body(std::integral_constant<int, count>{}); count is one of kMost, kMost - kStep, ... above zero.
template <int kMost, int kStep = 1, class Body>
FASTNETS_INLINE void with_count(int count, Body&& body) {
  if (count == kMost) return body(std::integral_constant<int, kMost>{});
  if constexpr (kMost > kStep) return with_count<kMost - kStep, kStep>(count, body);
  __builtin_trap();  // callers clamp
}

// Calls body(begin, end) on pieces of [0, count) on torch's threads.
template <class Body>
FASTNETS_INLINE void parallel(int64_t count, int64_t grain, const Body& body) {
  parallel_pieces(
      count, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastnets::FASTNETS_ISA

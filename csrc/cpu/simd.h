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
// Whether a result of so many bytes goes past the caches. Where all that a call touches fits the last-level cache the
// result's reader finds it there, and so does the next call its memory.
constexpr int64_t kCoreBytes = 4 << 20, kCacheBytes = 16 << 20;  // about a core's share of that cache; what it holds
constexpr bool passes_caches(int64_t result, int64_t touched) { return result > kCoreBytes && touched > kCacheBytes; }

// Memory that is read next, fetched into the caches a little after every piece of the work before it: what comes all at
// once has to be waited for.
struct Ahead {
  const char* at;
  int64_t each;  // bytes a piece
  int64_t due = 0;

  FASTNETS_INLINE void fetch(int pieces = 1) {
    for (due += pieces * each; due > 0; due -= 64, at += 64) __builtin_prefetch(at);
  }
};

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
// Lanes [begin, end); the others read as zero and are not touched in memory.
template <class T>
FASTNETS_INLINE Vec<T> load_between(const T* p, int begin, int end) {
#if defined(__AVX512F__)
  const unsigned lanes = end > begin ? ((1u << end) - 1u) & ~((1u << begin) - 1u) : 0u;
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm512_maskz_loadu_ps(lanes, p));
  if constexpr (sizeof(T) == 8) return Vec<T>(_mm512_maskz_loadu_pd(lanes, p));
#endif
  Vec<T> v = {};
  for (int i = begin; i < end; ++i) v[i] = p[i];
  return v;
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

// The compiler has to have the vector in a register here, and does not know its value: one that many products take is
// not loaded again for each of them, as g++ would.
template <class T>
FASTNETS_INLINE void in_register(Vec<T>& v) {
#if defined(__aarch64__)
  asm volatile("" : "+w"(v));
#else
  asm volatile("" : "+v"(v));
#endif
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
// Of two rows of a square of blocks kStep wide, the blocks that lie across from each other change places.
template <class T, int kStep, int... kIndex>
FASTNETS_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kIndex...>) {
  const Vec<T> low = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes<T> + kIndex - kStep : kIndex)...);
  b = __builtin_shufflevector(a, b, (kIndex & kStep ? kLanes<T> + kIndex : kIndex + kStep)...);
  a = low;
}
// Transposes: lane k of row i becomes lane i of row k.
template <class T, int kStep = 1>
FASTNETS_INLINE void turn(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (!(i & kStep)) exchange<T, kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<T>>{});
  }
  if constexpr (2 * kStep < kLanes<T>) turn<T, 2 * kStep>(rows);
}
// The vector that begins at lane n of a, where b lies behind a. (Without AVX-512, from memory.)
template <class T, int n>
FASTNETS_INLINE Vec<T> shifted([[maybe_unused]] Vec<T> a, [[maybe_unused]] Vec<T> b, [[maybe_unused]] const T* memory) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return Vec<T>(_mm512_alignr_epi32(__m512i(b), __m512i(a), n));
  if constexpr (sizeof(T) == 8) return Vec<T>(_mm512_alignr_epi64(__m512i(b), __m512i(a), n));
#endif
  return load(memory + n);
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
// Where one is NaN, b: as the instructions have it.
template <class T>
FASTNETS_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return Vec<T>(_mm512_max_ps(__m512(a), __m512(b)));
  if constexpr (std::is_same_v<T, double>) return Vec<T>(_mm512_max_pd(__m512d(a), __m512d(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return Vec<T>(_mm256_max_ps(__m256(a), __m256(b)));
  if constexpr (std::is_same_v<T, double>) return Vec<T>(_mm256_max_pd(__m256d(a), __m256d(b)));
#else
  return select<T>(a > b, a, b);
#endif
}
template <class T>
FASTNETS_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return Vec<T>(_mm512_min_ps(__m512(a), __m512(b)));
  if constexpr (std::is_same_v<T, double>) return Vec<T>(_mm512_min_pd(__m512d(a), __m512d(b)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return Vec<T>(_mm256_min_ps(__m256(a), __m256(b)));
  if constexpr (std::is_same_v<T, double>) return Vec<T>(_mm256_min_pd(__m256d(a), __m256d(b)));
#else
  return select<T>(a < b, a, b);
#endif
}
template <class T>
FASTNETS_INLINE Vec<T> absolute(Vec<T> a) {
  return maximum<T>(a, -a);
}

// Whether a > b in any lane.
template <class T>
FASTNETS_INLINE bool any_greater(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ) != 0;
  if constexpr (std::is_same_v<T, double>) return _mm512_cmp_pd_mask(__m512d(a), __m512d(b), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>)
    return _mm256_movemask_ps(_mm256_cmp_ps(__m256(a), __m256(b), _CMP_GT_OQ)) != 0;
  if constexpr (std::is_same_v<T, double>) {
    return _mm256_movemask_pd(_mm256_cmp_pd(__m256d(a), __m256d(b), _CMP_GT_OQ)) != 0;
  }
#else
  bool any = false;
  for (int i = 0; i < kLanes<T>; ++i) any |= a[i] > b[i];
  return any;
#endif
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

// Of the format of T: bits of the mantissa, the exponent's bias, and what, added to a number of less than half its
// size, rounds it to an integer (ties to even) that stands in the sum's low bits.
template <class T>
constexpr int kMantissa = sizeof(T) == 8 ? 52 : 23;
template <class T>
constexpr T kBias = sizeof(T) == 8 ? T(1023) : T(127);
template <class T>
constexpr T kRounding = sizeof(T) == 8 ? T(0x1.8p52) : T(0x1.8p23);

// e^x = 2^n (1 + less) with an integer n.
template <class T>
struct SplitExp {
  Vec<T> less;
  Vec<T> shifted;  // n + kBias + kRounding

  // For -kBias <= n <= kBias + 1; 0 at the one end, infinity at the other.
  FASTNETS_INLINE Vec<T> power() const {
    return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Int<T>>>(shifted) << kMantissa<T>);
  }
  FASTNETS_INLINE Vec<T> value() const { return (less + T(1)) * power(); }
};

// (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2, the lowest power first: fitted to least relative error of e^r (4e-9) for
// float, Taylor's for double.
inline constexpr float kExpFloat[] = {0.4999999341f, 0.1666652011f, 0.04166839429f, 0.008368780379f, 0.001381446332f};
inline constexpr double kExpDouble[] = {1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                                        1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                        1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

// x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's reduction). |x| must stay within the exponent range; NaN stays,
// in `less`.
template <class T>
FASTNETS_INLINE SplitExp<T> split_exp(Vec<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  Vec<T> shifted = fma<T>(x, broadcast<T>(T(1.4426950408889634074)), broadcast<T>(kRounding<T> + kBias<T>));
  asm("" : "+x"(shifted));  // the sum must be rounded: no algebra across it
  const Vec<T> n = shifted - (kRounding<T> + kBias<T>);
  Vec<T> r = fma<T>(n, broadcast<T>(is_double ? T(-0x1.62e42feep-1) : T(-0x1.62e4p-1)), x);
  r = fma<T>(n, broadcast<T>(is_double ? T(-0x1.a39ef35793c76p-33) : T(-0x1.7f7d1cp-20)), r);
  constexpr int last = is_double ? 11 : 4;
  const auto term = [](int i) { return broadcast<T>(is_double ? T(kExpDouble[i]) : T(kExpFloat[i % 5])); };
  Vec<T> p = term(last);
#pragma GCC unroll 16
  for (int i = last - 1; i >= 0; --i) p = fma<T>(p, r, term(i));
  return {fma<T>(p * r, r, r), shifted};
}

// e^x to about 1 ulp; 0 below about twice the least normal number, infinity above, NaN stays.
template <class T>
FASTNETS_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  const T lowest = is_double ? T(-708.7) : T(-87.6), highest = is_double ? T(709.78) : T(88.7228);
  SplitExp<T> e = split_exp<T>(minimum<T>(broadcast<T>(highest), maximum<T>(broadcast<T>(lowest), x)));
  e.shifted -= T(1);  // n reaches one past the largest exponent: the other factor of two comes last
  const Vec<T> y = e.value() + e.value();
  return select<T>(x > broadcast<T>(highest), broadcast<T>(is_double ? T(__builtin_inf()) : T(__builtin_inff())), y);
}

// e^x for x <= 0, cheaper: 0 below the normal range (-inf included), NaN stays.
template <class T>
FASTNETS_INLINE Vec<T> exp_nonpositive(Vec<T> x) {
  return split_exp<T>(maximum<T>(broadcast<T>(-kBias<T> * T(0.69314718055994530942)), x)).value();
}

template <class T>
FASTNETS_INLINE Vec<T> sigmoid(Vec<T> x) {
  // At the bounds e^-x has an n of kBias + 1 and of -kBias: it is infinity and 0.
  const Vec<T> lowest = broadcast<T>(sizeof(T) == 8 ? T(-709.7) : T(-88.6));
  const Vec<T> highest = broadcast<T>(sizeof(T) == 8 ? T(709) : T(88));
  const SplitExp<T> e = split_exp<T>(-minimum<T>(highest, maximum<T>(lowest, x)));
  return T(1) / fma<T>(e.less + T(1), e.power(), broadcast<T>(T(1)));
}

// tanh |x| = e / (e + 2) with e = expm1(2 |x|): one division, and no cancellation near zero. Past 20 it is 1.
template <class T>
FASTNETS_INLINE Vec<T> tanh(Vec<T> x) {
  using I = Int<T>;
  const Vec<I> bits = reinterpret_cast<Vec<I>>(x), sign = bits & (I(1) << (8 * sizeof(T) - 1));
  const Vec<T> magnitude = minimum<T>(broadcast<T>(T(20)), reinterpret_cast<Vec<T>>(bits ^ sign));
  const SplitExp<T> of_twice = split_exp<T>(magnitude + magnitude);
  const Vec<T> power = of_twice.power(), e = fma<T>(of_twice.less, power, power - T(1)), y = e / (e + T(2));
  return reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<I>>(y) | sign);
}

// ---- pairs of bfloat16 -----------------------------------------------------------------------------------------
//
// Where the processor has vdpbf16ps, operands of bfloat16 stay what they are in memory: a word (a float by its size
// only: no arithmetic touches it) holds two neighbours in depth, and one instruction multiplies and adds both.

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// a b + c; of pairs, both products.
template <class T, bool kPairs>
FASTNETS_INLINE Vec<T> multiply_add(T a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    int32_t word;
    std::memcpy(&word, &a, sizeof word);
    return Vec<T>(_mm512_dpbf16_ps(__m512(c), __m512bh(_mm512_set1_epi32(word)), __m512bh(b)));
  }
#endif
  return fma<T>(broadcast<T>(a), b, c);
}

// ---- what kernels are called with ------------------------------------------------------------------------------

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

// Calls body(phase, piece) for every piece of every phase, as parallel_phases says.
template <class Body>
FASTNETS_INLINE void in_phases(int64_t phases, int64_t pieces, const Body& body) {
  parallel_phases(
      phases, pieces,
      [](void* context, int64_t phase, int64_t piece) { (*static_cast<const Body*>(context))(phase, piece); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastnets::FASTNETS_ISA

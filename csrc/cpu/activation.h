// The activations of fused epilogues and their derivatives, on vectors.
#pragma once

#include "simd.h"

namespace fastnets::FASTNETS_ISA {

// Fits by Chebyshev interpolation, highest power first. Error function: erf(x) / x in x^2 for |x| <= 1; beyond,
// exp(x^2) erfc(x) in t = (x - 2) / (x + 2), up to where erf rounds to one.
inline constexpr float kErfFloat[] = {7.875875063e-5f, -0.0008016864287f, 0.005189087423f, -0.02685421201f,
                                      0.1128359472f,   -0.3761262667f,    1.128379166f};
inline constexpr float kErfcxFloat[] = {-0.0009366758146f, -0.0008351922479f, 0.006993588641f, 0.00373193418f,
                                        -0.07897846495f,   0.2416582185f,     -0.4271858482f,  0.2553956762f};
inline constexpr double kErfDouble[] = {
    -7.7958988270021422416e-10,  1.3720064546777685604e-8,  -1.6208483801871705902e-7,  1.644742470331736241e-6,
    -0.000014924736907419660338, 0.00012055294904839707917, -0.00085483259753896920806, 0.0052239776071164227321,
    -0.02686617064323777036,     0.11283791670945006266,    -0.37612638903183540438,    1.1283791670955125665};
inline constexpr double kErfcxDouble[] = {
    -4.0090054967287789204e-7, -5.5728451014697529687e-7,   1.1773910731353311727e-6,    3.7999787611880949071e-6,
    1.3905100477643051943e-6,  -0.000013969958220584673871, -0.000027579344583696215307, 0.000027525654448151829408,
    0.00017436111120880154425, 0.000043555593029038031893,  -0.00098197702368997593227,  -0.00084714325064302488138,
    0.0069974617391237737291,  0.003732892404323264847,     -0.078978581015731239715,    0.24165819424246649477,
    -0.42718584741395839941,   0.25539567631050574371};

template <class T, int kTerms>
FASTNETS_INLINE Vec<T> polynomial(const T (&coefficients)[kTerms], Vec<T> x) {
  Vec<T> sum = broadcast<T>(coefficients[0]);
#pragma GCC unroll 32
  for (int i = 1; i < kTerms; ++i) sum = fma<T>(sum, x, broadcast<T>(coefficients[i]));
  return sum;
}

template <class T>
FASTNETS_INLINE Vec<T> erf(Vec<T> x) {
  constexpr bool is_double = sizeof(T) == 8;
  const Vec<T> magnitude = absolute<T>(x), square = x * x;
  const Vec<T> bounded = minimum<T>(magnitude, broadcast<T>(is_double ? T(6.2) : T(4.2)));
  const Vec<T> t = (bounded - T(2)) / (bounded + T(2));
  Vec<T> small, tail;
  if constexpr (is_double) {
    small = x * polynomial(kErfDouble, square), tail = polynomial(kErfcxDouble, t);
  } else {
    small = x * polynomial(kErfFloat, square), tail = polynomial(kErfcxFloat, t);
  }
  const Vec<T> large = T(1) - exp<T>(-bounded * bounded) * tail;
  const Vec<T> y = select<T>(magnitude < broadcast<T>(T(1)), small, select<T>(x < Vec<T>{}, -large, large));
  return select<T>(x == x, y, x);
}

template <class T>
FASTNETS_INLINE Vec<T> relu(Vec<T> x) {
  return select<T>(x < Vec<T>{}, Vec<T>{}, x);  // NaN stays
}

// x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415).
template <class T>
FASTNETS_INLINE Vec<T> gelu(Vec<T> x) {
  return x * T(0.5) * (T(1) + erf<T>(x * T(0.70710678118654752440)));
}

template <class T>
FASTNETS_INLINE Vec<T> activate(Activation activation, Vec<T> x) {
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return relu<T>(x);
    case Activation::kGelu: return gelu<T>(x);
    case Activation::kSilu: return x * sigmoid<T>(x);
    case Activation::kSigmoid: return sigmoid<T>(x);
    case Activation::kTanh: return tanh<T>(x);
  }
  __builtin_trap();  // the operators admit no other
}

// The derivative, from the activation's input (gelu, silu) or its output (relu, sigmoid, tanh).
template <class T>
FASTNETS_INLINE Vec<T> derivative(Activation activation, Vec<T> saved) {
  const Vec<T> one = broadcast<T>(T(1));
  switch (activation) {
    case Activation::kNone: return one;
    case Activation::kRelu: return select<T>(saved <= Vec<T>{}, Vec<T>{}, one);
    case Activation::kGelu: {
      const Vec<T> density = exp<T>(saved * saved * T(-0.5)) * T(0.39894228040143267794);
      return T(0.5) * (one + erf<T>(saved * T(0.70710678118654752440))) + saved * density;
    }
    case Activation::kSilu: {
      const Vec<T> s = sigmoid<T>(saved);
      return s * (one + saved * (one - s));
    }
    case Activation::kSigmoid: return saved * (one - saved);
    case Activation::kTanh: return one - saved * saved;
  }
  __builtin_trap();
}

}  // namespace fastnets::FASTNETS_ISA

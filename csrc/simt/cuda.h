// CUDA C++ for a host compiler: what kernels may use of the language, on the SIMT device. Included by ../cuda/device.h
// where nvcc is not the compiler. `__shared__` is left out on purpose: see SHARED_ARRAY there.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

using dim3 = simt::Dim3;

#define threadIdx (simt::current->index)
#define blockIdx (simt::current->block)
#define blockDim (simt::active.block)
#define gridDim (simt::active.grid)
constexpr int warpSize = 32;

inline void __syncthreads(simt::Where at = simt::Where::current()) { simt::barrier("__syncthreads", 0, 0, at); }

inline void __syncwarp(uint32_t mask = ~0u, simt::Where at = simt::Where::current()) {
  simt::collective("__syncwarp", mask, nullptr, nullptr, at, true);
}

namespace simt {

template <class T>
T shuffle_value(const char* what, uint32_t mask, T value, unsigned source, Where at) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(what, mask, bits, source, at);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned first_lane(int width) { return current->lane & ~(width - 1u); }

template <class T, class Change>
T atomic_update(T* p, Change change, Where at) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  Bits* const word = reinterpret_cast<Bits*>(p);
  Bits old = __atomic_load_n(word, __ATOMIC_RELAXED);
  const Bits next = std::bit_cast<Bits>(static_cast<T>(change(std::bit_cast<T>(old))));
  __atomic_store_n(word, next, __ATOMIC_RELAXED);  // nobody else runs between the two
  atomic_done(p, sizeof(T), next != old, at);
  return std::bit_cast<T>(old);
}

}  // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, simt::Where at = simt::Where::current()) {
  return simt::shuffle_value("__shfl_sync", mask, value, simt::first_lane(width) + (lane & (width - 1)), at);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, simt::Where at = simt::Where::current()) {
  const unsigned source = simt::current->lane ^ bits;
  const bool inside = source < simt::first_lane(width) + width;
  return simt::shuffle_value("__shfl_xor_sync", mask, value, inside ? source : simt::current->lane, at);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, simt::Where at = simt::Where::current()) {
  const unsigned source = simt::current->lane + delta;
  const bool inside = source < simt::first_lane(width) + width;
  return simt::shuffle_value("__shfl_down_sync", mask, value, inside ? source : simt::current->lane, at);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, simt::Where at = simt::Where::current()) {
  const bool inside = simt::current->lane >= simt::first_lane(width) + delta;
  return simt::shuffle_value("__shfl_up_sync", mask, value, simt::current->lane - (inside ? delta : 0), at);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, simt::Where at = simt::Where::current()) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, at);
}
inline int __any_sync(uint32_t mask, int predicate, simt::Where at = simt::Where::current()) {
  return simt::ballot("__any_sync", mask, predicate != 0, at) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, simt::Where at = simt::Where::current()) {
  return simt::ballot("__all_sync", mask, predicate != 0, at) == mask;
}

#define FASTNETS_SIMT_REDUCTION(name, how)                                                                 \
  template <class T>                                                                                       \
  T __reduce_##name##_sync(uint32_t mask, T value, simt::Where at = simt::Where::current()) {              \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                                                \
    return static_cast<T>(simt::reduce("__reduce_" #name "_sync", mask, value, simt::Reduction::how, at)); \
  }
FASTNETS_SIMT_REDUCTION(add, kAdd)
FASTNETS_SIMT_REDUCTION(min, kMin)
FASTNETS_SIMT_REDUCTION(max, kMax)
FASTNETS_SIMT_REDUCTION(and, kAnd)
FASTNETS_SIMT_REDUCTION(or, kOr)
FASTNETS_SIMT_REDUCTION(xor, kXor)
#undef FASTNETS_SIMT_REDUCTION

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value, simt::Where at = simt::Where::current()) {
  return simt::atomic_update(p, [&](T old) { return old + value; }, at);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value, simt::Where at = simt::Where::current()) {
  return simt::atomic_update(p, [&](T old) { return old < value ? value : old; }, at);
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value, simt::Where at = simt::Where::current()) {
  return simt::atomic_update(p, [&](T old) { return value < old ? value : old; }, at);
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value, simt::Where at = simt::Where::current()) {
  return simt::atomic_update(p, [&](T) { return value; }, at);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value,
            simt::Where at = simt::Where::current()) {
  return simt::atomic_update(p, [&](T old) { return old == expected ? value : old; }, at);
}

inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline int __popc(uint32_t x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }

// What every kernel includes: CUDA C++ from nvcc or, for the SIMT device, from a host compiler; shared memory, 16-bit
// types, and the accessors through which all memory traffic goes, so that the SIMT device can count it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FASTNETS_SIMT 0
#define FASTNETS_HERE     // a parameter: where the call is
#define FASTNETS_AT       // the same after others
#define FASTNETS_PASS_AT  // hands it on

// One array of the block's own; read and write it after its SHARED_ARRAY alone.
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(name)                                          \
  extern __shared__ __align__(128) unsigned char fastnets_dynamic_[]; \
  unsigned char* const name = fastnets_dynamic_

#else

#include "../simt/cuda.h"

#define FASTNETS_SIMT 1
#define FASTNETS_HERE simt::Where at = simt::Where::current()
#define FASTNETS_AT , FASTNETS_HERE
#define FASTNETS_PASS_AT , at

#define SHARED_ARRAY(T, name, count) \
  static const char name##_tag_ = 0; \
  T(&name)                           \
  [count] = *static_cast<T(*)[count]>(simt::static_shared(&name##_tag_, sizeof(T[count]), simt::Where::current()))
#define DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(simt::dynamic_shared())

#endif

namespace fastnets {

#if FASTNETS_SIMT

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

inline float to_float(float x) { return x; }
inline float to_float(Float16 x) { return x; }
inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

template <class T>
T from_float(float x) {
  return static_cast<T>(x);
}
// To nearest, ties to even.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

#else

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}

#endif

// N elements that one instruction moves: 1, 2, 4, 8 or 16 bytes, aligned to their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0);
  T values[N];
  __device__ __forceinline__ T& operator[](int i) { return values[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return values[i]; }
};

namespace detail {

#if FASTNETS_SIMT
template <class V>
void note(simt::Access access, const void* p, simt::Where at) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V) != 0) {
    simt::fail("an access of " + std::to_string(sizeof(V)) + " bytes is not aligned", at);
  }
  simt::note(access, p, sizeof(V), at);
}
#define FASTNETS_NOTE(access, V, p) detail::note<V>(simt::Access::access, p, at)
#else
#define FASTNETS_NOTE(access, V, p)
#endif

// The unsigned integer (or vector of them) of so many bytes: what nvcc surely moves in one instruction.
template <int Bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
#if FASTNETS_SIMT
struct alignas(8) Word8 {
  uint32_t words[2];
};
struct alignas(16) Word16 {
  uint32_t words[4];
};
#else
using Word8 = uint2;
using Word16 = uint4;
#endif
template <>
struct WordOf<8> {
  using type = Word8;
};
template <>
struct WordOf<16> {
  using type = Word16;
};

template <class V>
__device__ __forceinline__ V load(const void* p) {
  const auto word = *static_cast<const typename WordOf<sizeof(V)>::type*>(p);
  V value;
  __builtin_memcpy(static_cast<void*>(&value), &word, sizeof(V));
  return value;
}

template <class V>
__device__ __forceinline__ void store(void* p, const V& value) {
  typename WordOf<sizeof(V)>::type word;
  __builtin_memcpy(&word, &value, sizeof(V));
  *static_cast<typename WordOf<sizeof(V)>::type*>(p) = word;
}

}  // namespace detail

// Accessors: one instruction each. The lanes of a warp that execute one in the same turn of a loop count as one
// request; a line that only some lanes reach, inside a loop without collectives, takes the `_if` form, which counts the
// others' turns too and returns zeros to them.
template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_global(const T* p FASTNETS_AT) {
  using V = Vector<T, N>;
  FASTNETS_NOTE(kGlobalLoad, V, p);
  return detail::load<V>(p);
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_global_if(bool active, const T* p FASTNETS_AT) {
  if (active) return load_global<N>(p FASTNETS_PASS_AT);
#if FASTNETS_SIMT
  simt::note(simt::Access::kGlobalLoad, p, 0, at);
#endif
  return {};
}

template <int N, class T>
__device__ __forceinline__ void store_global(T* p, const Vector<T, N>& value FASTNETS_AT) {
  using V = Vector<T, N>;
  FASTNETS_NOTE(kGlobalStore, V, p);
  detail::store(p, value);
}

template <int N, class T>
__device__ __forceinline__ Vector<T, N> load_shared(const T* p FASTNETS_AT) {
  using V = Vector<T, N>;
  FASTNETS_NOTE(kSharedLoad, V, p);
  return detail::load<V>(p);
}

template <int N, class T>
__device__ __forceinline__ void store_shared(T* p, const Vector<T, N>& value FASTNETS_AT) {
  using V = Vector<T, N>;
  FASTNETS_NOTE(kSharedStore, V, p);
  detail::store(p, value);
}

// One element.
template <class T>
__device__ __forceinline__ T load_global(const T* p FASTNETS_AT) {
  return load_global<1>(p FASTNETS_PASS_AT)[0];
}
template <class T>
__device__ __forceinline__ void store_global(T* p, T value FASTNETS_AT) {
  store_global<1>(
      p, Vector<T, 1> {
        {
          value
        }
      } FASTNETS_PASS_AT);
}
template <class T>
__device__ __forceinline__ T load_shared(const T* p FASTNETS_AT) {
  return load_shared<1>(p FASTNETS_PASS_AT)[0];
}
template <class T>
__device__ __forceinline__ void store_shared(T* p, T value FASTNETS_AT) {
  store_shared<1>(
      p, Vector<T, 1> {
        {
          value
        }
      } FASTNETS_PASS_AT);
}

}  // namespace fastnets

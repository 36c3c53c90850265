// Tensor cores, matrix loads, asynchronous copies, barriers and fences: the only inline PTX. Every wrapper has a body
// for the SIMT device beside it; tests/test_tensor_core.py holds the two against each other by running the PTX itself.
//
// Fragments are those of NVIDIA's PTX manual (9.7.14.5, mma.m16n8k16 and m16n8k8). Lane l has group g = l / 4 and place
// t = l % 4. Of A [16, K] its registers hold rows g and g + 8, of B [K, 8] column g, of C and D [16, 8] rows g and g +
// 8 at columns 2t and 2t + 1. A 32-bit register holds two 16-bit elements, the lower index in its lower half.
#pragma once

#include <type_traits>

#include "device.h"

namespace fastnets {

#if FASTNETS_SIMT

namespace detail {

struct MmaOperands {
  uint32_t a[4], b[2];
  float d[4];
};

template <class T>
FASTNETS_SIMT_UNTRACED inline float half_of(uint32_t pair, int which) {
  const uint16_t bits = pair >> (16 * which);
  if constexpr (std::is_same_v<T, BFloat16>) return std::bit_cast<float>(uint32_t{bits} << 16);
  return static_cast<float>(std::bit_cast<Float16>(bits));
}

FASTNETS_SIMT_UNTRACED inline float as_tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

typedef float Row8 __attribute__((vector_size(32)));

// D += A B, given A by columns.
template <int K>
FASTNETS_SIMT_UNTRACED inline void accumulate(void* const* lanes, const float (&a)[K][16], const Row8 (&b)[K]) {
  for (int group = 0; group < 8; ++group) {
    for (int half = 0; half < 2; ++half) {
      Row8 sum{};
      for (int k = 0; k < K; ++k) sum += a[k][group + 8 * half] * b[k];
      for (int t = 0; t < 4; ++t) {
        float* const d = static_cast<MmaOperands*>(lanes[4 * group + t])->d + 2 * half;
        d[0] += sum[2 * t];
        d[1] += sum[2 * t + 1];
      }
    }
  }
  simt::note_mma();
}

template <class T>
FASTNETS_SIMT_UNTRACED inline void multiply_16(void* const* lanes, uint32_t) {
  float a[16][16];
  Row8 b[16];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      for (int k = 0; k < 2; ++k) {
        a[2 * t + i][g + 8 * k] = half_of<T>(own.a[k], i);
        a[2 * t + i + 8][g + 8 * k] = half_of<T>(own.a[k + 2], i);
        b[2 * t + i + 8 * k][g] = half_of<T>(own.b[k], i);
      }
    }
  }
  accumulate(lanes, a, b);
}

FASTNETS_SIMT_UNTRACED inline void multiply_tf32(void* const* lanes, uint32_t) {
  float a[8][16];
  Row8 b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < 2; ++k) {
      a[t][g + 8 * k] = as_tf32(own.a[k]);
      a[t + 4][g + 8 * k] = as_tf32(own.a[k + 2]);
      b[t + 4 * k][g] = as_tf32(own.b[k]);
    }
  }
  accumulate(lanes, a, b);
}

FASTNETS_SIMT_UNTRACED inline void mma(const char* what, simt::Combine multiply, float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2], simt::Where at) {
  MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
  simt::collective(what, ~0u, &operands, multiply, at);
  for (int i = 0; i < 4; ++i) d[i] = operands.d[i];
}

struct MatrixOperands {
  const uint16_t* row;  // of 8 elements, this lane's to provide
  uint32_t result[4];
};

template <int Count, bool Transposed>
FASTNETS_SIMT_UNTRACED inline void load_matrices(void* const* lanes, uint32_t) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < Count; ++m) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = Transposed ? lane % 4 * 2 + i : lane / 4, column = Transposed ? lane / 4 : lane % 4 * 2 + i;
        pair |= uint32_t{static_cast<const MatrixOperands*>(lanes[8 * m + row])->row[column]} << (16 * i);
      }
      static_cast<MatrixOperands*>(lanes[lane])->result[m] = pair;
    }
  }
}

FASTNETS_SIMT_UNTRACED inline void matrices(const char* what, simt::Combine load, uint32_t* r, int count,
                                            const void* row, simt::Where at) {
  MatrixOperands operands{static_cast<const uint16_t*>(row), {}};
  simt::matrix_row(row, simt::current->lane < 8u * count, at);
  simt::collective(what, ~0u, &operands, load, at);
  for (int m = 0; m < count; ++m) r[m] = operands.result[m];
}

}  // namespace detail

#endif

namespace detail {
#if !FASTNETS_SIMT
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif
}  // namespace detail

// D += A B on 16-bit floats, K = 16.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTNETS_AT) {
#if FASTNETS_SIMT
  detail::mma("mma.m16n8k16.bf16", detail::multiply_16<BFloat16>, d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTNETS_AT) {
#if FASTNETS_SIMT
  detail::mma("mma.m16n8k16.f16", detail::multiply_16<Float16>, d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// The same on TF32, K = 8; of the operands' floats the upper 19 bits count (to_tf32 rounds to them).
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FASTNETS_AT) {
#if FASTNETS_SIMT
  detail::mma("mma.m16n8k8.tf32", detail::multiply_tf32, d, a, b, at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Loads Count (1, 2 or 4) matrices of 8 x 8 16-bit elements from shared memory: lanes 8 m to 8 m + 7 give the rows of
// matrix m, 16 bytes each and so aligned. Lane l receives of each the elements [l / 4][2 (l % 4)] and the next, or of
// its transpose.
template <bool Transposed = false, int Count>
__device__ __forceinline__ void load_matrix(uint32_t (&r)[Count], const void* row FASTNETS_AT) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
#if FASTNETS_SIMT
  detail::matrices("ldmatrix", detail::load_matrices<Count, Transposed>, r, Count, row, at);
#else
  const uint32_t address = detail::shared_address(row);
  if constexpr (Count == 1 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (Count == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (Count == 2 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (Count == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// Copies Bytes (4, 8 or 16) from global to shared memory, both aligned to as many, without waiting. Of the source only
// the first `valid` bytes are read; zeros follow. Bytes = 16 goes past the L1 cache.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid = Bytes FASTNETS_AT) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if FASTNETS_SIMT
  simt::copy_async(shared, global, Bytes, valid, at);
#else
  const uint32_t to = detail::shared_address(shared);
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else if constexpr (Bytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid) : "memory");
  }
#endif
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void copy_async_commit() {
#if FASTNETS_SIMT
  simt::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most Pending of this thread's groups, the latest, are under way. Other threads see what they brought
// after a barrier.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
#if FASTNETS_SIMT
  simt::copy_async_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

__device__ __forceinline__ void copy_async_wait_all() {
#if FASTNETS_SIMT
  simt::copy_async_wait_all();
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Barrier `id` (1 to 15) of `threads` threads, whole warps, of the block.
__device__ __forceinline__ void named_barrier(int id, int threads FASTNETS_AT) {
#if FASTNETS_SIMT
  simt::barrier("named_barrier", id, threads, at);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// A flag in global memory: what the writer stored before `store_release` is there for who reads the flag's new value
// with `load_acquire`. Threads that poll must all be resident: a cooperative launch.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag FASTNETS_AT) {
  uint32_t value;
#if FASTNETS_SIMT
  value = __atomic_load_n(flag, __ATOMIC_ACQUIRE);
  simt::atomic_done(flag, sizeof(value), false, at);
#else
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
#endif
  return value;
}

__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value FASTNETS_AT) {
#if FASTNETS_SIMT
  __atomic_store_n(flag, value, __ATOMIC_RELEASE);
  simt::atomic_done(flag, sizeof(value), true, at);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
#endif
}

// Rounded to TF32's 10 bits of mantissa, to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#if FASTNETS_SIMT
  return x != x ? 0x7fffffffu : (std::bit_cast<uint32_t>(x) + 0x1000u) & 0xffffe000u;
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
#endif
}

// Two elements of type T in a register, `low` in its lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if FASTNETS_SIMT
  const Vector<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  return std::bit_cast<uint32_t>(pair);
#else
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, Float16>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#endif
}

// 2^x to about 2 ulp, subnormals flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
#if FASTNETS_SIMT
  const float result = std::exp2(x);
  return result < 1.17549435e-38f ? 0.0f : result;
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace fastnets

// Reductions over a warp and over a block.
#pragma once

#include "device.h"

namespace fastnets {

constexpr uint32_t kWholeWarp = 0xffffffffu;
constexpr float kMinusInfinity = -__builtin_inff();

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, step));
  return value;
}

// The maximum of some scores and the sum of exp(score - maximum): softmax's denominator, found in one pass.
struct MaxSum {
  float max = kMinusInfinity, sum = 0.0f;
};

// What to subtract before exp: a row of -inf alone has no maximum, and every term is exp(-inf) = 0.
__device__ __forceinline__ float shift(float max) { return max == kMinusInfinity ? 0.0f : max; }

__device__ __forceinline__ MaxSum operator+(MaxSum a, MaxSum b) {
  const float max = fmaxf(a.max, b.max), by = shift(max);
  return {max, a.sum * expf(a.max - by) + b.sum * expf(b.max - by)};
}

__device__ __forceinline__ void include(MaxSum& total, float score) {
  if (score > total.max) {
    total.sum *= expf(total.max - score);
    total.max = score;
  }
  total.sum += expf(score - shift(total.max));
}

__device__ __forceinline__ float shuffle_xor(float value, int step) { return __shfl_xor_sync(kWholeWarp, value, step); }
__device__ __forceinline__ MaxSum shuffle_xor(MaxSum value, int step) {
  return {shuffle_xor(value.max, step), shuffle_xor(value.sum, step)};
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value = value + shuffle_xor(value, step);
  return value;
}

// The same sum in every thread of the block (at most 32 warps); T is 4 or 8 bytes and has a +, T{} is its zero.
template <class T>
__device__ T block_sum(T value) {
  SHARED_ARRAY(T, partial, 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  value = warp_sum(value);
  if (lane == 0) store_shared(&partial[warp], value);
  __syncthreads();
  value = warp_sum(lane < warps ? load_shared(&partial[lane]) : T{});
  __syncthreads();  // before the next call writes
  return value;
}

}  // namespace fastnets

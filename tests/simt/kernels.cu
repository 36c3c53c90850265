// Kernels that tests/test_simt.py runs on the SIMT device: some right, some wrong on purpose. Compiled as a library for
// the tests and, with FASTNETS_STANDALONE, as a program `kernels NAME` for the sanitizers.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/reduce.h"
#include "../../csrc/cuda/tensor_core.h"

using namespace fastnets;

namespace {

__global__ void row_sums(const float* x, float* y, int n) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += load_global(x + int64_t{blockIdx.x} * n + i);
  sum = block_sum(sum);
  if (threadIdx.x == 0) store_global(y + blockIdx.x, sum);
}

// What to leave out of a kernel.
enum Bug { kNone, kNoWait, kNoLoadBarrier, kNoLoopBarrier, kNoGridBarrier };

// c[M, N] = a[M, K] b[K, N], bf16 to float: tiles of 64 x 32 by four warps, K in steps of 32 through two stages.
constexpr int kTileM = 64, kTileN = 32, kTileK = 32, kPitchA = kTileK + 8, kPitchB = kTileN + 8;
constexpr int kStage = kTileM * kPitchA + kTileK * kPitchB;

template <Bug bug>
__global__ void __launch_bounds__(128) product(const BFloat16* a, const BFloat16* b, float* c, int m, int n, int k) {
  DYNAMIC_SHARED(memory);
  BFloat16* const stages = reinterpret_cast<BFloat16*>(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_row = blockIdx.y * kTileM, first_column = blockIdx.x * kTileN;
  const auto fetch = [&](int stage, int from) {
    BFloat16* const to = stages + stage * kStage;
    for (int i = thread; i < kTileM * kTileK / 8; i += 128) {
      const int row = i / (kTileK / 8), column = i % (kTileK / 8) * 8;
      const bool inside = first_row + row < m && from + column < k;
      const int64_t at = inside ? int64_t{first_row + row} * k + from + column : 0;
      copy_async<16>(to + row * kPitchA + column, a + at, inside ? 16 : 0);
    }
    for (int i = thread; i < kTileK * kTileN / 8; i += 128) {
      const int row = i / (kTileN / 8), column = i % (kTileN / 8) * 8;
      const bool inside = from + row < k && first_column + column < n;
      const int64_t at = inside ? int64_t{from + row} * n + first_column + column : 0;
      copy_async<16>(to + kTileM * kPitchA + row * kPitchB + column, b + at, inside ? 16 : 0);
    }
    copy_async_commit();
  };
  float sums[4][4] = {};
  fetch(0, 0);
  for (int from = 0, stage = 0; from < k; from += kTileK, stage ^= 1) {
    if (from + kTileK < k) {
      fetch(stage ^ 1, from + kTileK);
      if (bug != kNoWait) copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    if (bug != kNoLoadBarrier) __syncthreads();
    const BFloat16* const ta = stages + stage * kStage;
    const BFloat16* const tb = ta + kTileM * kPitchA;
    for (int kk = 0; kk < kTileK; kk += 16) {
      uint32_t fa[4];
      load_matrix(fa, ta + (warp * 16 + lane % 16) * kPitchA + kk + lane / 16 * 8);
      for (int j = 0; j < 4; ++j) {
        uint32_t fb[2];
        load_matrix<true>(fb, tb + (kk + lane % 16) * kPitchB + j * 8);
        mma_bf16(sums[j], fa, fb);
      }
    }
    if (bug != kNoLoopBarrier) __syncthreads();
  }
  for (int j = 0; j < 4; ++j) {
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp * 16 + lane / 4 + 8 * half, column = first_column + j * 8 + lane % 4 * 2;
      if (row < m && column < n) {
        store_global(c + int64_t{row} * n + column, Vector<float, 2>{{sums[j][2 * half], sums[j][2 * half + 1]}});
      }
    }
  }
}

// h[t + 1] = w h[t], `steps` times, eight rows of w [size, size] a block, kept in shared memory; h [2, size].
template <Bug bug>
__global__ void recurrence(const float* w, float* h, int size, int steps) {
  DYNAMIC_SHARED(memory);
  float* const rows = reinterpret_cast<float*>(memory);
  const int first = blockIdx.x * 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < 8 * size; i += blockDim.x) store_shared(rows + i, load_global(w + first * size + i));
  __syncthreads();
  for (int t = 0; t < steps; ++t) {
    const float* const from = h + t % 2 * size;
    float sum = 0.0f;
    for (int k = lane; k < size; k += 32) sum += load_shared(rows + warp * size + k) * load_global(from + k);
    sum = warp_sum(sum);
    if (lane == 0) store_global(h + (t + 1) % 2 * size + first + warp, sum);
    if (bug == kNoGridBarrier) {
      __syncthreads();
    } else {
      grid_barrier();
    }
  }
}

__global__ void deadlock() {
  if (threadIdx.x < 32) {
    named_barrier(1, 64);
  } else {
    __syncthreads();
  }
}

__global__ void two_barriers() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void two_masks(float* y) {
  const float value = __shfl_xor_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1.0f, 1);
  store_global(y + threadIdx.x, value);
}

__global__ void foreign_lane(float* y) {
  if (threadIdx.x < 16) store_global(y + threadIdx.x, __shfl_sync(0xffffu, 1.0f, 20));
}

__global__ void early_return() {
  if (threadIdx.x == 5) return;
  __syncwarp(0xffffffffu);
}

__global__ void poll(const uint32_t* flag) {
  while (load_acquire(flag) == 0) {
  }
}

__global__ void misaligned(const float* x, float* y) { store_global(y, load_global<4>(x + 1)[0]); }

__global__ void reads_unset(float* y) {
  SHARED_ARRAY(float, values, 32);
  store_global(y + threadIdx.x, load_shared(&values[threadIdx.x]));
}

__global__ void leaves_early(const float* x) {
  SHARED_ARRAY(float, values, 128);
  copy_async<16>(&values[threadIdx.x * 4], x + threadIdx.x * 4);
  copy_async_commit();
}

// Each thread takes a ticket: their order is the schedule.
__global__ void tickets(int* counter, int* order) { store_global(order + threadIdx.x, atomicAdd(counter, 1)); }

// Block 0 hands a value to the others through memory.
__global__ void hand_over(float* value, uint32_t* flag, float* y) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    store_global(value, 42.0f);
    store_release(flag, 1u);
  }
  while (load_acquire(flag) == 0) {
  }
  store_global(y + blockIdx.x, load_global(value));
}

// A warp loads N floats a lane, `stride` apart, from global memory or from shared.
template <int N, bool shared>
__global__ void strided(const float* x, float* y, int stride) {
  const float* const p = x + threadIdx.x * stride;
  float sum = 0.0f;
  if constexpr (shared) {
    DYNAMIC_SHARED(memory);
    const auto v = load_shared<N>(reinterpret_cast<float*>(memory) + threadIdx.x * stride);
    for (int i = 0; i < N; ++i) sum += v[i];
  } else {
    const auto v = load_global<N>(p);
    for (int i = 0; i < N; ++i) sum += v[i];
  }
  store_global(y + threadIdx.x, sum);
}

// Loads an 8 x 8 matrix whose rows lie `pitch` 16-byte steps apart.
__global__ void matrix_rows(uint32_t* y, int pitch) {
  DYNAMIC_SHARED(memory);
  uint32_t r[1];
  load_matrix(r, memory + threadIdx.x % 8 * pitch * 16);
  store_global(y + threadIdx.x, r[0]);
}

// A row that does not fill the warp's last turn.
__global__ void ragged(const float* x, float* y, int n) {
  for (int i = threadIdx.x; i < n; i += 32) store_global(y + i, load_global(x + i));
}

std::string message;

template <class F>
const char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const simt::Failure& failure) {
    message = failure.what();
    return message.c_str();
  }
}

template <Bug bug>
void run_product(const BFloat16* a, const BFloat16* b, float* c, int m, int n, int k) {
  launch({"product", dim3((n + kTileN - 1) / kTileN, (m + kTileM - 1) / kTileM), 128, nullptr, 2 * kStage * 2},
         product<bug>, a, b, c, m, n, k);
}

template <Bug bug>
void run_recurrence(const float* w, float* h, int size, int steps) {
  launch({"recurrence", size / 8, 256, nullptr, 8 * size * sizeof(float), true}, recurrence<bug>, w, h, size, steps);
}

// Kernels that take no arguments but memory to write to.
const std::map<std::string, std::function<void(float*)>> kNamed = {
    {"deadlock", [](float*) { launch({"deadlock", 1, 64, nullptr}, deadlock); }},
    {"two_barriers", [](float*) { launch({"two_barriers", 1, 64, nullptr}, two_barriers); }},
    {"two_masks", [](float* y) { launch({"two_masks", 1, 32, nullptr}, two_masks, y); }},
    {"foreign_lane", [](float* y) { launch({"foreign_lane", 1, 32, nullptr}, foreign_lane, y); }},
    {"early_return", [](float*) { launch({"early_return", 1, 32, nullptr}, early_return); }},
    {"poll", [](float* y) { launch({"poll", 1, 32, nullptr}, poll, reinterpret_cast<uint32_t*>(y)); }},
    {"misaligned", [](float* y) { launch({"misaligned", 1, 1, nullptr}, misaligned, y, y); }},
    {"leaves_early", [](float* y) { launch({"leaves_early", 1, 32, nullptr}, leaves_early, y); }},
    {"reads_unset", [](float* y) { launch({"reads_unset", 1, 32, nullptr}, reads_unset, y); }},
    {"not_cooperative", [](float* y) { launch({"r", 1, 256, nullptr, 256}, recurrence<kNone>, y, y, 8, 1); }},
    {"too_much_shared", [](float* y) { launch({"reads_unset", 1, 32, nullptr, 100 << 10}, reads_unset, y); }},
    {"too_many_threads", [](float* y) { launch({"reads_unset", 1, 2048, nullptr}, reads_unset, y); }},
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* run_named(const char* name, float* y) {
  return guarded([&] { kNamed.at(name)(y); });
}
EXPORT const char* run_row_sums(const float* x, float* y, int rows, int n) {
  return guarded([&] { launch({"row_sums", rows, 256, nullptr}, row_sums, x, y, n); });
}
EXPORT const char* run_product(const BFloat16* a, const BFloat16* b, float* c, int m, int n, int k, int bug) {
  return guarded([&] {
    bug == kNoWait          ? run_product<kNoWait>(a, b, c, m, n, k)
    : bug == kNoLoadBarrier ? run_product<kNoLoadBarrier>(a, b, c, m, n, k)
    : bug == kNoLoopBarrier ? run_product<kNoLoopBarrier>(a, b, c, m, n, k)
                            : run_product<kNone>(a, b, c, m, n, k);
  });
}
EXPORT const char* run_recurrence(const float* w, float* h, int size, int steps, int bug) {
  return guarded([&] {
    bug == kNoGridBarrier ? run_recurrence<kNoGridBarrier>(w, h, size, steps)
                          : run_recurrence<kNone>(w, h, size, steps);
  });
}
EXPORT const char* run_tickets(int* counter, int* order, int threads) {
  return guarded([&] { launch({"tickets", 1, threads, nullptr}, tickets, counter, order); });
}
EXPORT const char* run_hand_over(float* value, uint32_t* flag, float* y, int blocks) {
  return guarded([&] { launch({"hand_over", blocks, 32, nullptr, 0, true}, hand_over, value, flag, y); });
}
EXPORT const char* run_strided(const float* x, float* y, int stride, int width, int shared) {
  return guarded([&] {
    const auto kernel = shared ? (width == 4   ? strided<4, true>
                                  : width == 2 ? strided<2, true>
                                               : strided<1, true>)
                               : (width == 4   ? strided<4, false>
                                  : width == 2 ? strided<2, false>
                                               : strided<1, false>);
    launch({"strided", 1, 32, nullptr, 64 << 10}, kernel, x, y, stride);
  });
}
EXPORT const char* run_matrix_rows(uint32_t* y, int pitch) {
  return guarded([&] { launch({"matrix_rows", 1, 32, nullptr, 64 << 10}, matrix_rows, y, pitch); });
}
EXPORT const char* run_ragged(const float* x, float* y, int n) {
  return guarded([&] { launch({"ragged", 1, 32, nullptr}, ragged, x, y, n); });
}
EXPORT void set_seed(uint64_t seed) { simt::set_seed(seed); }
EXPORT void set_shared_limit(uint64_t bytes) { simt::set_shared_limit(bytes); }
EXPORT void set_counting(bool on) {
  simt::set_counting(on);
  simt::reset_counters();
}
EXPORT uint64_t counter(const char* kernel, const char* name) {
  const simt::Counters& counters = simt::counters().at(kernel);
#define RETURN_IF_NAMED(field) \
  if (std::strcmp(name, #field) == 0) return counters.field;
  FASTNETS_SIMT_COUNTERS(RETURN_IF_NAMED)
#undef RETURN_IF_NAMED
  throw std::out_of_range(name);
}

#if defined(FASTNETS_STANDALONE)

namespace {

__global__ void global_overflow(float* y, int n) { store_global(y + n + threadIdx.x, 1.0f); }
__global__ void shared_overflow(float* y) {
  SHARED_ARRAY(float, values, 32);
  store_shared(&values[0] + threadIdx.x + 1, 1.0f);
  __syncwarp();
  store_global(y + threadIdx.x, load_shared(&values[threadIdx.x]));
}
// Blocks that are `apart` write the same.
__global__ void blocks_meet(float* y, int apart) {
  __syncthreads();
  if (threadIdx.x == 0) store_global(y + blockIdx.x % apart, 1.0f);
  __syncthreads();
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 2) simt::set_seed(std::stoull(arguments[2]));
  std::vector<float> x(1 << 14, 1.0f), y(1 << 14, 0.0f);
  const std::vector<BFloat16> ones(1 << 14, from_float<BFloat16>(1.0f));
  const auto product = [&](Bug bug) { return run_product(ones.data(), ones.data(), y.data(), 96, 64, 96, bug); };
  const auto recurrence = [&](Bug bug) { return run_recurrence(x.data(), y.data(), 64, 5, bug); };
  const std::map<std::string, std::function<const char*()>> programs = {
      {"row_sums", [&] { return run_row_sums(x.data(), y.data(), 4, 1000); }},
      {"product", [&] { return product(kNone); }},
      {"product_no_wait", [&] { return product(kNoWait); }},
      {"product_no_load_barrier", [&] { return product(kNoLoadBarrier); }},
      {"product_no_loop_barrier", [&] { return product(kNoLoopBarrier); }},
      {"recurrence", [&] { return recurrence(kNone); }},
      {"recurrence_no_grid_barrier", [&] { return recurrence(kNoGridBarrier); }},
      {"hand_over", [&] { return run_hand_over(x.data(), reinterpret_cast<uint32_t*>(y.data()), y.data() + 64, 4); }},
      {"global_overflow",
       [&] { return guarded([&] { launch({"o", 1, 32, nullptr}, global_overflow, y.data(), 1 << 14); }); }},
      {"blocks_meet", [&] { return guarded([&] { launch({"o", 64, 64, nullptr}, blocks_meet, y.data(), 16); }); }},
      {"shared_overflow", [&] { return guarded([&] { launch({"o", 1, 32, nullptr}, shared_overflow, y.data()); }); }},
  };
  const auto program = programs.find(arguments[1]);
  const char* const failure = program == programs.end() ? run_named(arguments[1], y.data()) : program->second();
  std::puts(failure == nullptr ? "done" : failure);
  return failure == nullptr ? 0 : 3;
}

#endif

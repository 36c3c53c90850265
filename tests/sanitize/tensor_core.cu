// The wrappers of tensor_core.h, each in a kernel that needs it: a matrix product through a pipeline of asynchronous
// copies, copies that end short, named barriers between warps, flags and grid barriers between blocks, conversions.
#include "cuda/tensor_core.h"

#include <array>
#include <cmath>
#include <cstring>

#include "driver.h"

using namespace fastnets;

namespace sanitize {
namespace {

// c[M, N] = a[M, K] b[K, N] in tiles of 32 x 16 by two warps, K in steps of 16 through two stages, 16-bit operands.
constexpr int kM = 32, kN = 16, kK = 16, kPitchA = kK + 8, kPitchB = kN + 8, kStage = kM * kPitchA + kK * kPitchB;

template <class T>
__global__ void __launch_bounds__(64) product(const T* a, const T* b, float* c, int m, int n, int k) {
  DYNAMIC_SHARED(memory);
  T* const stages = reinterpret_cast<T*>(memory);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_row = blockIdx.y * kM, first_column = blockIdx.x * kN;
  const auto fetch = [&](int stage, int from) {  // k and n are multiples of 8
    T* const to = stages + stage * kStage;
    const int row = thread / 2, column = thread % 2 * 8;
    const bool in_a = first_row + row < m && from + column < k;
    copy_async<16>(to + row * kPitchA + column, in_a ? a + (first_row + row) * k + from + column : a, in_a ? 16 : 0);
    if (row < kK) {
      const bool in_b = from + row < k && first_column + column < n;
      copy_async<16>(to + kM * kPitchA + row * kPitchB + column,
                     in_b ? b + (from + row) * n + first_column + column : b, in_b ? 16 : 0);
    }
    copy_async_commit();
  };
  float sums[2][4] = {};
  fetch(0, 0);
  for (int from = 0, stage = 0; from < k; from += kK, stage ^= 1) {
    if (from + kK < k) {
      fetch(stage ^ 1, from + kK);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const T* const ta = stages + stage * kStage;
    const T* const tb = ta + kM * kPitchA;
    uint32_t fa[4], fb[2];
    load_matrix(fa, ta + (warp * 16 + lane % 16) * kPitchA + lane / 16 * 8);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      load_matrix<true>(fb, tb + lane % 16 * kPitchB + j * 8);
      if constexpr (std::is_same_v<T, BFloat16>) {
        mma_bf16(sums[j], fa, fb);
      } else {
        mma_fp16(sums[j], fa, fb);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + warp * 16 + lane / 4 + 8 * half, column = first_column + j * 8 + lane % 4 * 2;
      if (row < m && column < n) {
        store_global(c + row * n + column, Vector<float, 2>{{sums[j][2 * half], sums[j][2 * half + 1]}});
      }
    }
  }
}

// The same on TF32 by one warp, straight from memory: m = 16, n = 8, k a multiple of 8.
__global__ void product_tf32(const float* a, const float* b, float* c, int k) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sums[4] = {};
  for (int from = 0; from < k; from += 8) {
    uint32_t fa[4], fb[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) fa[i] = to_tf32(load_global(a + (g + i % 2 * 8) * k + from + t + i / 2 * 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) fb[i] = to_tf32(load_global(b + (from + t + i * 4) * 8 + g));
    mma_tf32(sums, fa, fb);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) store_global(c + (g + i / 2 * 8) * 8 + 2 * t + i % 2, sums[i]);
}

// y[i] = x[i], but 0 from `valid[i / count]` on: one asynchronous copy of `count` floats a thread.
template <int Bytes>
__global__ void copies(const float* x, const int* valid, float* y) {
  constexpr int kCount = Bytes / 4;
  SHARED_ARRAY(float, values, 64 * kCount);
  float* const own = &values[threadIdx.x * kCount];
  copy_async<Bytes>(own, x + threadIdx.x * kCount, 4 * load_global(valid + threadIdx.x));
  copy_async_wait_all();
  __syncwarp();
  const int other = (threadIdx.x ^ 1) * kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) store_global(y + other + i, load_shared(&values[other + i]));
}

// Two pairs of warps exchange rows of 32, a pair at a barrier of its own.
__global__ void exchange(const float* x, float* y) {
  SHARED_ARRAY(float, values, 128);
  const int pair = threadIdx.x / 64;
  store_shared(&values[threadIdx.x], load_global(x + threadIdx.x));
  named_barrier(1 + pair, 64);
  store_global(y + threadIdx.x, load_shared(&values[threadIdx.x ^ 32]));
}

// y[b] = the sum of x over blocks 0 to b: a flag hands it on. Then every block reads the last sum.
__global__ void chain(const float* x, float* y, float* last, uint32_t* flags) {
  if (threadIdx.x == 0) {
    float sum = load_global(x + blockIdx.x);
    if (blockIdx.x > 0) {
      while (load_acquire(flags + blockIdx.x - 1) == 0) {
      }
      sum += load_global(y + blockIdx.x - 1);
    }
    store_global(y + blockIdx.x, sum);
    store_release(flags + blockIdx.x, 1u);
  }
  grid_barrier();
  if (threadIdx.x == 1) store_global(last + blockIdx.x, load_global(y + gridDim.x - 1));
}

__global__ void convert(const float* x, float* y) {
  const float value = load_global(x + threadIdx.x);
  const uint32_t bf16 = pack<BFloat16>(value, 2 * value), fp16 = pack<Float16>(value, 2 * value);
  BFloat16 low, high;
  Float16 low16, high16;
  const uint16_t parts[4] = {uint16_t(bf16), uint16_t(bf16 >> 16), uint16_t(fp16), uint16_t(fp16 >> 16)};
  std::memcpy(&low, &parts[0], 2), std::memcpy(&high, &parts[1], 2);
  std::memcpy(&low16, &parts[2], 2), std::memcpy(&high16, &parts[3], 2);
  const float results[6] = {to_float(low),    to_float(high),     to_float(low16),
                            to_float(high16), exp2_approx(value), __uint_as_float(to_tf32(value))};
#pragma unroll
  for (int i = 0; i < 6; ++i) store_global(y + threadIdx.x * 6 + i, results[i]);
}

template <class T>
void check_product(Dtype dtype, int m, int n, int k) {
  Random random;
  const Tensor a = random.tensor(dtype, m * k, -1, 1), b = random.tensor(dtype, k * n, -1, 1);
  const Tensor c(Dtype::kFloat32, m * n);
  const dim3 grid((n + kN - 1) / kN, (m + kM - 1) / kM);
  launch({"product", grid, 64, nullptr, 2 * kStage * sizeof(T)}, product<T>, static_cast<const T*>(a.data()),
         static_cast<const T*>(b.data()), static_cast<float*>(c.data()), m, n, k);
  std::vector<double> truth(m * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) truth[i * n + j] += a[i * k + l] * b[l * n + j];
    }
  }
  expect_close("c", c, truth, k * epsilon(Dtype::kFloat32));
}

void check_product_tf32() {
  constexpr int k = 24;
  Random random;  // values that TF32 holds
  const Tensor a = random.tensor(Dtype::kBFloat16, 16 * k, -1, 1), b = random.tensor(Dtype::kBFloat16, k * 8, -1, 1);
  Tensor a32(Dtype::kFloat32, a.size()), b32(Dtype::kFloat32, b.size());
  for (int64_t i = 0; i < a.size(); ++i) a32.set(i, a[i]);
  for (int64_t i = 0; i < b.size(); ++i) b32.set(i, b[i]);
  const Tensor c(Dtype::kFloat32, 16 * 8);
  launch({"product_tf32", 1, 32, nullptr}, product_tf32, static_cast<const float*>(a32.data()),
         static_cast<const float*>(b32.data()), static_cast<float*>(c.data()), k);
  std::vector<double> truth(16 * 8);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int l = 0; l < k; ++l) truth[i * 8 + j] += a[i * k + l] * b[l * 8 + j];
    }
  }
  expect_close("c", c, truth, k * epsilon(Dtype::kFloat32));
}

template <int Bytes>
void check_copies() {
  constexpr int kCount = Bytes / 4;
  Random random;
  const Tensor x = random.tensor(Dtype::kFloat32, 64 * kCount, -1, 1), y(Dtype::kFloat32, 64 * kCount);
  std::vector<int> valid(64);
  std::vector<double> truth(64 * kCount);
  for (int t = 0; t < 64; ++t) {
    valid[t] = static_cast<int>(random.integer(0, kCount));
    for (int i = 0; i < valid[t]; ++i) truth[t * kCount + i] = x[t * kCount + i];
  }
  launch({"copies", 1, 64, nullptr}, copies<Bytes>, static_cast<const float*>(x.data()), valid.data(),
         static_cast<float*>(y.data()));
  expect_close("y", y, truth, 0);
}

void check_exchange() {
  Random random;
  const Tensor x = random.tensor(Dtype::kFloat32, 128, -1, 1), y(Dtype::kFloat32, 128);
  launch({"exchange", 1, 128, nullptr}, exchange, static_cast<const float*>(x.data()), static_cast<float*>(y.data()));
  std::vector<double> truth(128);
  for (int i = 0; i < 128; ++i) truth[i] = x[i ^ 32];
  expect_close("y", y, truth, 0);
}

void check_chain() {
  constexpr int kBlocks = 5;
  Random random;
  const Tensor x = random.tensor(Dtype::kFloat32, kBlocks, -1, 1);
  const Tensor y(Dtype::kFloat32, kBlocks), last(Dtype::kFloat32, kBlocks);
  std::vector<uint32_t> flags(kBlocks);
  launch({"chain", kBlocks, 32, nullptr, 0, true}, chain, static_cast<const float*>(x.data()),
         static_cast<float*>(y.data()), static_cast<float*>(last.data()), flags.data());
  std::vector<double> sums(kBlocks);
  for (int b = 0; b < kBlocks; ++b) sums[b] = x[b] + (b > 0 ? sums[b - 1] : 0);
  expect_close("y", y, sums, 4e-7);
  expect_close("last", last, std::vector<double>(kBlocks, sums.back()), 4e-7);
}

void check_convert() {
  Random random;
  const Tensor x = random.tensor(Dtype::kFloat32, 32, -4, 4), y(Dtype::kFloat32, 32 * 6);
  launch({"convert", 1, 32, nullptr}, convert, static_cast<const float*>(x.data()), static_cast<float*>(y.data()));
  for (int i = 0; i < 32; ++i) {
    const double truth[6] = {x[i], 2 * x[i], x[i], 2 * x[i], std::exp2(x[i]), x[i]};
    constexpr double kErrors[6] = {0x1p-8, 0x1p-8, 0x1p-11, 0x1p-11, 0x1p-22, 0x1p-11};
    for (int j = 0; j < 6; ++j) {
      expect(std::fabs(y[i * 6 + j] - truth[j]) <= kErrors[j] * std::fabs(truth[j]),
             "conversion " + std::to_string(j) + " of " + std::to_string(x[i]));
    }
  }
}

}  // namespace

void add_cases(Cases& cases) {
  for (const auto& [m, n, k] : {std::array{32, 16, 16}, std::array{64, 32, 64}, std::array{45, 24, 40}}) {
    const std::string of = std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
    cases.add("product bfloat16 " + of, [=] { check_product<BFloat16>(Dtype::kBFloat16, m, n, k); });
    cases.add("product float16 " + of, [=] { check_product<Float16>(Dtype::kFloat16, m, n, k); });
  }
  cases.add("product tf32", check_product_tf32);
  cases.add("copies of 4 bytes", check_copies<4>);
  cases.add("copies of 8 bytes", check_copies<8>);
  cases.add("copies of 16 bytes", check_copies<16>);
  cases.add("named barriers", check_exchange);
  cases.add("flags and grid barriers", check_chain);
  cases.add("conversions", check_convert);
}

}  // namespace sanitize

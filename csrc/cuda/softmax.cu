// softmax(x * scale + mask) over the middle of [outer, size, inner], forward and backward, computed in float. A row
// that the mask leaves empty (all False, or all -inf) gives zeros and zero gradient.
//
// Rows of up to kPerThread elements a thread stay in registers, of a warp or of a block, and x is read once. Longer
// rows are read twice. Where inner > 1, neighbouring threads take neighbouring columns, so that every load is
// coalesced.
#include "launch.h"
#include "reduce.h"

namespace fastnets::cuda {
namespace {

constexpr int kPerThread = 8;      // elements of a row that a thread holds; 32 would spill on sm_100 and sm_120
constexpr int kRows = 4;           // of a block whose warps have a row each
constexpr int kBlock = 256;        // threads of a block that has one row
constexpr int kLongThreads = 512;  // of a block that reads its row twice
constexpr int kColumns = 32;       // of a block where inner > 1
constexpr int kSlices = 8;         // threads that share a column

// The threads of a row are a warp or a block.
template <int Threads>
constexpr int kThreads = Threads == 32 ? 32 * kRows : Threads;

template <int Threads>
__device__ __forceinline__ int64_t first_row() {
  return Threads == 32 ? int64_t{blockIdx.x} * kRows + threadIdx.x / 32 : blockIdx.x;
}

template <int Threads>
__device__ __forceinline__ int64_t row_stride() {
  return int64_t{gridDim.x} * (Threads == 32 ? kRows : 1);
}

template <int Threads, class T>
__device__ __forceinline__ T row_sum(T value) {
  if constexpr (Threads == 32) {
    return warp_sum(value);
  } else {
    return block_sum(value);
  }
}

// Where, in elements of the mask, entry `index` of the collapsed dimensions begins.
__device__ int64_t mask_offset(int64_t index, int dims, const int64_t* sizes, const int64_t* strides) {
  int64_t offset = 0;
  for (int d = dims - 1; d >= 0; --d) {
    offset += index % sizes[d] * strides[d];
    index /= sizes[d];
  }
  return offset;
}

// The scores of one row.
template <class T>
struct Row {
  const SoftmaxForward& p;
  int64_t begin, mask_begin;

  __device__ Row(const SoftmaxForward& p, int64_t outer, int64_t inner) : p(p), mask_begin(0) {
    begin = outer * p.size * p.inner + inner;
    if (p.mask_kind != MaskKind::kNone) {
      mask_begin = mask_offset(outer, p.outer_dims, p.outer_sizes, p.outer_strides) +
                   mask_offset(inner, p.inner_dims, p.inner_sizes, p.inner_strides);
    }
  }

  __device__ __forceinline__ float score(float x, int64_t i) const {
    const float scaled = x * static_cast<float>(p.scale);
    const int64_t at = mask_begin + i * p.mask_stride;
    if (p.mask_kind == MaskKind::kBool) {
      return load_global(static_cast<const uint8_t*>(p.mask) + at) != 0 ? scaled : kMinusInfinity;
    }
    if (p.mask_kind == MaskKind::kAdditive) return scaled + to_float(load_global(static_cast<const T*>(p.mask) + at));
    return scaled;
  }
};

__device__ __forceinline__ float inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }

// Rows of at most kPerThread * Threads elements, N at a time.
template <class T, int N, int Threads>
__global__ void __launch_bounds__(kThreads<Threads>) forward_held(SoftmaxForward p) {
  const int place = threadIdx.x % Threads, size = static_cast<int>(p.size);
  const T* const x = static_cast<const T*>(p.x);
  for (int64_t r = first_row<Threads>(); r < p.outer; r += row_stride<Threads>()) {
    const Row<T> row(p, r, 0);
    float scores[kPerThread];
    MaxSum own;
#pragma unroll
    for (int c = 0; c < kPerThread / N; ++c) {
      const int i = (c * Threads + place) * N;
      const Vector<T, N> loaded = load_global_if<N>(i < size, x + row.begin + i);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        scores[c * N + e] = i < size ? row.score(to_float(loaded[e]), i + e) : kMinusInfinity;
        own.max = fmaxf(own.max, scores[c * N + e]);
      }
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) own.sum += scores[k] = expf(scores[k] - shift(own.max));
    const MaxSum total = row_sum<Threads>(own);
    const float factor = expf(own.max - shift(total.max)) * inverse(total.sum);
    T* const y = static_cast<T*>(p.y);
#pragma unroll
    for (int c = 0; c < kPerThread / N; ++c) {
      const int i = (c * Threads + place) * N;
      Vector<T, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e) result[e] = from_float<T>(scores[c * N + e] * factor);
      if (i < size) store_global(y + row.begin + i, result);
    }
  }
}

// One block a row.
template <class T, int N>
__global__ void __launch_bounds__(kLongThreads, 2) forward_long(SoftmaxForward p) {
  const T* const x = static_cast<const T*>(p.x);
  for (int64_t r = blockIdx.x; r < p.outer; r += gridDim.x) {
    const Row<T> row(p, r, 0);
    MaxSum total;
    for (int64_t i = int64_t{threadIdx.x} * N; i < p.size; i += int64_t{kLongThreads} * N) {
      const Vector<T, N> loaded = load_global<N>(x + row.begin + i);
#pragma unroll
      for (int e = 0; e < N; ++e) include(total, row.score(to_float(loaded[e]), i + e));
    }
    total = block_sum(total);
    const float by = shift(total.max), factor = inverse(total.sum);
    for (int64_t i = int64_t{threadIdx.x} * N; i < p.size; i += int64_t{kLongThreads} * N) {
      const Vector<T, N> loaded = load_global<N>(x + row.begin + i);
      Vector<T, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        result[e] = from_float<T>(expf(row.score(to_float(loaded[e]), i + e) - by) * factor);
      }
      store_global(static_cast<T*>(p.y) + row.begin + i, result);
    }
  }
}

// The sum over the kSlices threads of a column, the same in each; threadIdx = (column, slice).
template <class T>
__device__ T column_sum(T value) {
  SHARED_ARRAY(T, partial, kSlices * kColumns);
  store_shared(&partial[threadIdx.y * kColumns + threadIdx.x], value);
  __syncthreads();
  T total{};
#pragma unroll
  for (int s = 0; s < kSlices; ++s) total = total + load_shared(&partial[s * kColumns + threadIdx.x]);
  __syncthreads();  // before the next call writes
  return total;
}

// Calls f(outer, inner, whether inner exists) for every column of this thread; all threads of a block as often.
template <class F>
__device__ __forceinline__ void for_columns(int64_t outer, int64_t inner, F&& f) {
  const int64_t tiles = (inner + kColumns - 1) / kColumns;
  for (int64_t t = blockIdx.x; t < outer * tiles; t += gridDim.x) {
    const int64_t column = t % tiles * kColumns + threadIdx.x;
    f(t / tiles, column, column < inner);
  }
}

template <class T>
__global__ void __launch_bounds__(kColumns* kSlices, 4) forward_columns(SoftmaxForward p) {
  const T* const x = static_cast<const T*>(p.x);
  for_columns(p.outer, p.inner, [&](int64_t outer, int64_t inner, bool exists) {
    const Row<T> row(p, outer, exists ? inner : 0);
    MaxSum total;
    for (int64_t i = threadIdx.y; i < p.size && exists; i += kSlices) {
      include(total, row.score(to_float(load_global(x + row.begin + i * p.inner)), i));
    }
    total = column_sum(total);
    const float by = shift(total.max), factor = inverse(total.sum);
    for (int64_t i = threadIdx.y; i < p.size && exists; i += kSlices) {
      const int64_t at = row.begin + i * p.inner;
      store_global(static_cast<T*>(p.y) + at,
                   from_float<T>(expf(row.score(to_float(load_global(x + at)), i) - by) * factor));
    }
  });
}

// grad_x = scale * y * (grad - sum(grad * y))
__device__ __forceinline__ float gradient(float grad, float y, float dot, const SoftmaxBackward& p) {
  return static_cast<float>(p.scale) * y * (grad - dot);
}

template <class T, int N, int Threads>
__global__ void __launch_bounds__(kThreads<Threads>) backward_held(SoftmaxBackward p) {
  const int place = threadIdx.x % Threads, size = static_cast<int>(p.size);
  for (int64_t r = first_row<Threads>(); r < p.outer; r += row_stride<Threads>()) {
    const int64_t begin = r * size;
    Vector<T, N> grads[kPerThread / N], ys[kPerThread / N];
    float dot = 0.0f;
#pragma unroll
    for (int c = 0; c < kPerThread / N; ++c) {
      const int i = (c * Threads + place) * N;
      grads[c] = load_global_if<N>(i < size, static_cast<const T*>(p.grad) + begin + i);
      ys[c] = load_global_if<N>(i < size, static_cast<const T*>(p.y) + begin + i);
#pragma unroll
      for (int e = 0; e < N; ++e) dot += to_float(grads[c][e]) * to_float(ys[c][e]);
    }
    dot = row_sum<Threads>(dot);
#pragma unroll
    for (int c = 0; c < kPerThread / N; ++c) {
      const int i = (c * Threads + place) * N;
      Vector<T, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e)
        result[e] = from_float<T>(gradient(to_float(grads[c][e]), to_float(ys[c][e]), dot, p));
      if (i < size) store_global(static_cast<T*>(p.grad_x) + begin + i, result);
    }
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kLongThreads, 2) backward_long(SoftmaxBackward p) {
  for (int64_t r = blockIdx.x; r < p.outer; r += gridDim.x) {
    const T* const grad = static_cast<const T*>(p.grad) + r * p.size;
    const T* const y = static_cast<const T*>(p.y) + r * p.size;
    float dot = 0.0f;
    for (int64_t i = int64_t{threadIdx.x} * N; i < p.size; i += int64_t{kLongThreads} * N) {
      const Vector<T, N> g = load_global<N>(grad + i), v = load_global<N>(y + i);
#pragma unroll
      for (int e = 0; e < N; ++e) dot += to_float(g[e]) * to_float(v[e]);
    }
    dot = block_sum(dot);
    for (int64_t i = int64_t{threadIdx.x} * N; i < p.size; i += int64_t{kLongThreads} * N) {
      const Vector<T, N> g = load_global<N>(grad + i), v = load_global<N>(y + i);
      Vector<T, N> result;
#pragma unroll
      for (int e = 0; e < N; ++e) result[e] = from_float<T>(gradient(to_float(g[e]), to_float(v[e]), dot, p));
      store_global(static_cast<T*>(p.grad_x) + r * p.size + i, result);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kColumns* kSlices, 4) backward_columns(SoftmaxBackward p) {
  for_columns(p.outer, p.inner, [&](int64_t outer, int64_t inner, bool exists) {
    const int64_t begin = outer * p.size * p.inner + inner;
    const T* const grad = static_cast<const T*>(p.grad) + begin;
    const T* const y = static_cast<const T*>(p.y) + begin;
    float dot = 0.0f;
    for (int64_t i = threadIdx.y; i < p.size && exists; i += kSlices) {
      dot += to_float(load_global(grad + i * p.inner)) * to_float(load_global(y + i * p.inner));
    }
    dot = column_sum(dot);
    for (int64_t i = threadIdx.y; i < p.size && exists; i += kSlices) {
      const int64_t at = i * p.inner;
      const float result = gradient(to_float(load_global(grad + at)), to_float(load_global(y + at)), dot, p);
      store_global(static_cast<T*>(p.grad_x) + begin + at, from_float<T>(result));
    }
  });
}

template <class T>
constexpr int kVector = 16 / sizeof(T);

// Whether rows can be read 16 bytes at a time.
template <class T>
bool aligned(int64_t size, std::initializer_list<const void*> tensors) {
  return size % kVector<T> == 0 && std::all_of(tensors.begin(), tensors.end(),
                                               [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// The kernels of one direction for storage type T; each is called with the direction's parameters alone.
template <class P>
struct Kernels {
  using Kernel = void (*)(P);
  const char* name;
  Kernel warp_rows[2], block_rows[2], long_rows[2], columns;  // [whether 16 bytes at a time]
};

template <class P>
void run(const Kernels<P>& kernels, const P& p, bool wide, Stream stream) {
  if (p.inner > 1) {
    const int64_t tiles = (p.inner + kColumns - 1) / kColumns;
    launch({kernels.name, blocks_for(p.outer * tiles), dim3(kColumns, kSlices), stream}, kernels.columns, p);
  } else if (p.size <= 32 * kPerThread) {
    launch({kernels.name, blocks_for((p.outer + kRows - 1) / kRows), kThreads<32>, stream}, kernels.warp_rows[wide], p);
  } else if (p.size <= kBlock * kPerThread) {
    launch({kernels.name, blocks_for(p.outer), kBlock, stream}, kernels.block_rows[wide], p);
  } else {
    launch({kernels.name, blocks_for(p.outer), kLongThreads, stream}, kernels.long_rows[wide], p);
  }
}

}  // namespace

void softmax_forward(const SoftmaxForward& p, Stream stream) {
  with_storage(p.dtype, [&](auto kind) {
    using T = decltype(kind);
    constexpr int N = kVector<T>;
    const Kernels<SoftmaxForward> kernels{"softmax_forward",
                                          {forward_held<T, 1, 32>, forward_held<T, N, 32>},
                                          {forward_held<T, 1, kBlock>, forward_held<T, N, kBlock>},
                                          {forward_long<T, 1>, forward_long<T, N>},
                                          forward_columns<T>};
    run(kernels, p, aligned<T>(p.size, {p.x, p.y}), stream);
  });
}

void softmax_backward(const SoftmaxBackward& p, Stream stream) {
  with_storage(p.dtype, [&](auto kind) {
    using T = decltype(kind);
    constexpr int N = kVector<T>;
    const Kernels<SoftmaxBackward> kernels{"softmax_backward",
                                           {backward_held<T, 1, 32>, backward_held<T, N, 32>},
                                           {backward_held<T, 1, kBlock>, backward_held<T, N, kBlock>},
                                           {backward_long<T, 1>, backward_long<T, N>},
                                           backward_columns<T>};
    run(kernels, p, aligned<T>(p.size, {p.grad, p.y, p.grad_x}), stream);
  });
}

}  // namespace fastnets::cuda

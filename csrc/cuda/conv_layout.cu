// What surrounds the products of a convolution: operands rearranged with their channels innermost, and the backward of
// a fused epilogue. Both are bound by memory.
#include "conv.h"

namespace fastnets::cuda {
namespace {

constexpr int kTile = 32, kThreads = 256;
template <class T>
constexpr int kEach = 4 / static_cast<int>(sizeof(T));  // elements of a word
template <class T>
constexpr int kLine = 32 * kEach<T>;  // of a tile's rows

// Of the power of two that is not less.
__device__ __forceinline__ int bits_of(int n) { return 32 - __clz(n - 1); }

// Rows of a tile that lies channel by channel, V elements at a time.
template <int V, class T>
__device__ __forceinline__ void write_rows(const T* tile, int pitch, int height, int width, int given, T* to,
                                           const auto& place_of) {
  const int bits = bits_of(width / V), x = (threadIdx.x & ((1 << bits) - 1)) * V;
  if (x >= width) return;
  for (int y = threadIdx.x >> bits; y < height; y += kThreads >> bits) {
    Vector<T, V> values;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const T value = load_shared(&tile[min(x + e, given - 1) * pitch + y]);
      values[e] = x + e < given ? value : from_float<T>(0.0f);
    }
    store_global(to + place_of(y) + x, values);
  }
}

// A tile of kTile pixels by kLine channels a turn. Neighbouring threads read what lies side by side, also where a tile
// holds few of the faster dimension, and write what will.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_arrange(Layout p, int64_t tiles) {
  SHARED_ARRAY(T, tile, kLine<T> * (kTile + 1));
  const int across = (p.padded + kLine<T> - 1) / kLine<T>, down = (p.pixels + kTile - 1) / kTile;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int channel = static_cast<int>(t % across) * kLine<T>, pixel = static_cast<int>(t / across % down) * kTile;
    const int64_t matrix = t / across / down, outer = matrix / p.inner, inner = matrix % p.inner;
    const T* const from =
        static_cast<const T*>(p.from) + outer * p.from_outer + inner * p.from_inner + channel * p.from_channel;
    T* const to = static_cast<T*>(p.to) + outer * p.to_outer + inner * p.to_inner + channel;
    const int height = min(kTile, p.pixels - pixel), width = min(kLine<T>, p.padded - channel);
    const int given = min(kLine<T>, p.channels - channel);
    const auto place_of = [&](int y, const int64_t (&strides)[3]) {
      int at[3];
      p.at(pixel + y, at);
      return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
    };
    if (p.channels_first) {
      for (int i = threadIdx.x; i < height * width; i += kThreads) {
        const int y = i / width, x = i % width;
        store_global(to + place_of(y, p.to_pixel) + x,
                     load_global_if<1>(x < given, from + place_of(y, p.from_pixel) + x * p.from_channel)[0]);
      }
      continue;
    }
    // A warp reads words of `rows` rows at once; those of neighbouring channels are as many banks apart as that takes.
    const int rows = 32 >> bits_of((width + kEach<T> - 1) / kEach<T>);
    const int apart = rows == 1 ? 1 : max(rows / kEach<T>, kEach<T>);
    const int pitch = ((height + apart - 1) / apart | 1) * apart;
    for (int i = threadIdx.x; i < height * given; i += kThreads) {
      const int y = i % height, x = i / height;
      store_shared(&tile[x * pitch + y], load_global(from + place_of(y, p.from_pixel) + x * p.from_channel));
    }
    __syncthreads();
    const auto to_place = [&](int y) { return place_of(y, p.to_pixel); };
    if (p.pairs) {
      write_rows<kEach<T>>(tile, pitch, height, width, given, to, to_place);
    } else {
      write_rows<1>(tile, pitch, height, width, given, to, to_place);
    }
    __syncthreads();  // before the next turn writes
  }
}

// result = grad * activation'
template <class T, int N>
__global__ void __launch_bounds__(kThreads) conv_grad_epilogue_kernel(ConvGradEpilogue p) {
  const T *const grad = static_cast<const T*>(p.grad), *const saved = static_cast<const T*>(p.saved);
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N; i < p.count;
       i += int64_t{gridDim.x} * kThreads * N) {
    const Vector<T, N> g = load_global<N>(grad + i), s = load_global<N>(saved + i);
    Vector<T, N> values;
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = from_float<T>(to_float(g[e]) * derivative(p.activation, to_float(s[e])));
    store_global(static_cast<T*>(p.result) + i, values);
  }
}

}  // namespace

void arrange(Dtype dtype, Layout p, Stream stream) {
  with_storage(dtype, [&](auto kind) {
    using T = decltype(kind);
    const int64_t across = (p.padded + kLine<T> - 1) / kLine<T>, down = (int64_t{p.pixels} + kTile - 1) / kTile;
    const int64_t tiles = int64_t{p.outer} * p.inner * across * down;
    if (tiles == 0) return;
    const int64_t outer = p.outer > 1 ? p.to_outer : 0, inner = p.inner > 1 ? p.to_inner : 0;
    p.pairs = copy_width<T>(p.to, {p.padded, outer, inner, p.to_pixel[0], p.to_pixel[1], p.to_pixel[2]}) > 0;
    launch({"conv_arrange", blocks_for(tiles), kThreads, stream}, conv_arrange<T>, p, tiles);
  });
}

void conv_grad_epilogue(const ConvGradEpilogue& p, Stream stream) {
  with_storage(p.dtype, [&](auto kind) {
    using T = decltype(kind);
    const auto start = [&](auto elements) {
      constexpr int N = decltype(elements)::value;
      launch({"conv_grad_epilogue", blocks_for((p.count / N + kThreads - 1) / kThreads), kThreads, stream},
             conv_grad_epilogue_kernel<T, N>, p);
    };
    if (copy_width<T>(p.grad, {p.count}) == 16 && copy_width<T>(p.saved, {}) == 16 &&
        copy_width<T>(p.result, {}) == 16) {
      start(std::integral_constant<int, kChunk<T>>{});
    } else {
      start(std::integral_constant<int, 1>{});
    }
  });
}

}  // namespace fastnets::cuda

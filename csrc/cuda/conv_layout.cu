// What surrounds the products of a convolution: operands rearranged with their channels innermost, and the backward of
// a fused epilogue. Both are bound by memory.
#include "conv.h"

namespace fastnets::cuda {
namespace {

constexpr int kTile = 32, kThreads = 256;

// A tile of kTile pixels by kTile channels a turn.
template <class T>
__global__ void __launch_bounds__(kThreads) conv_arrange(Layout p, int64_t tiles) {
  constexpr int kPitch = kTile + 4 / static_cast<int>(sizeof(T));  // an odd number of banks
  SHARED_ARRAY(T, tile, kTile * kPitch);
  const int across = (p.padded + kTile - 1) / kTile, down = (p.pixels + kTile - 1) / kTile;
  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int channel = static_cast<int>(t % across) * kTile, pixel = static_cast<int>(t / across % down) * kTile;
    const int64_t matrix = t / across / down, outer = matrix / p.inner, inner = matrix % p.inner;
    const T* const from = static_cast<const T*>(p.from) + outer * p.from_outer + inner * p.from_inner;
    T* const to = static_cast<T*>(p.to) + outer * p.to_outer + inner * p.to_inner;
    const int height = min(kTile, p.pixels - pixel), width = min(kTile, p.padded - channel);
    const int given = min(kTile, p.channels - channel);
    // Neighbouring threads take what lies side by side, also where a tile holds few of the faster dimension.
    for (int i = threadIdx.x; i < height * given; i += kThreads) {
      const int y = p.channels_first ? i / given : i % height, x = p.channels_first ? i % given : i / height;
      int at[3];
      p.at(pixel + y, at);
      const int64_t place =
          at[0] * p.from_pixel[0] + at[1] * p.from_pixel[1] + at[2] * p.from_pixel[2] + (channel + x) * p.from_channel;
      store_shared(&tile[y * kPitch + x], load_global(from + place));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < height * width; i += kThreads) {
      const int y = i / width, x = i % width;
      const T value = x < given ? load_shared(&tile[y * kPitch + x]) : from_float<T>(0.0f);
      store_global(to + (pixel + y) * p.to_pixel + channel + x, value);
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

void arrange(Dtype dtype, const Layout& p, Stream stream) {
  const int64_t across = (p.padded + kTile - 1) / kTile, down = (int64_t{p.pixels} + kTile - 1) / kTile;
  const int64_t tiles = int64_t{p.outer} * p.inner * across * down;
  if (tiles == 0) return;
  with_storage(dtype, [&](auto kind) {
    launch({"conv_arrange", blocks_for(tiles), kThreads, stream}, conv_arrange<decltype(kind)>, p, tiles);
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

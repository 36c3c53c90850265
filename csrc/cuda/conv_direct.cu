// Convolution without products of matrices. Depthwise: a group is one channel of the source (forwards) or of the result
// (backwards to it), so a product has nothing to share and memory is the bound. And float32 sums of so few terms that
// those of three TF32 products would be worse than their rounding. A thread holds the sums of a few pixels; what
// neighbouring taps read again comes from the L1 cache. With channels innermost a thread has 16 bytes of channels, else
// a warp has pixels of one plane.
#include "conv_output.h"
#include "reduce.h"

namespace fastnets::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 4;  // of a thread, which share the loads of the weight

struct Direct {
  const void* source;
  const void* weight;  // [passes, taps, channels of the result]
  Window window;
  int tap_count[3];
  int64_t source_channel;  // stride
  Output output;           // columns: all channels
  // Result channel c takes source channels c / repeat * passes and following.
  Divisor repeat;
  int passes;
  int chunks, tiles;  // of the channels, of the pixels
};

// The pixels and channels of a thread in piece `piece` of the work.
template <int V, bool Innermost>
struct Place {
  int channel, first, step;  // rows first + j * step, j < kPixels

  __device__ __forceinline__ Place(const Direct& p, int64_t piece) {
    if constexpr (Innermost) {  // neighbouring threads: neighbouring channels
      channel = static_cast<int>(piece % p.chunks) * V;
      first = static_cast<int>(piece / p.chunks) * kPixels;
      step = 1;
    } else {  // warps: pixels of a plane
      const int64_t warp = piece / 32;
      const int tile = static_cast<int>(warp % p.tiles), plane = static_cast<int>(warp / p.tiles);
      const int image = plane / p.output.columns, lane = static_cast<int>(piece % 32);
      channel = plane - image * p.output.columns;
      const int pixel = tile * 32 * kPixels + lane;
      first = image * p.window.positions.by + pixel;
      step = 32;
      left = p.window.positions.by - pixel;
    }
  }
  __device__ __forceinline__ bool exists(const Direct& p, int j) const {
    return Innermost ? first + j < p.output.rows : j * 32 < left;
  }

 private:
  int left = 0;  // pixels of the plane
};

// Three blocks a multiprocessor, two where vectors are held: the bound that ptxas sets itself on sm_100 spills.
template <class T, int V, bool Innermost>
__global__ void __launch_bounds__(kThreads, V == 1 ? 3 : 2) conv_direct(Direct p, int64_t pieces) {
  for (int64_t piece = int64_t{blockIdx.x} * kThreads + threadIdx.x; piece < pieces;
       piece += int64_t{gridDim.x} * kThreads) {
    const Place<V, Innermost> place(p, piece);
    int at[kPixels][3];
    int64_t begin[kPixels];
    bool exists[kPixels];
    float sums[kPixels][V] = {};
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      exists[j] = place.exists(p, j);
      begin[j] = p.window.begin(exists[j] ? place.first + j * place.step : 0, at[j]);
    }
    const T* weight = static_cast<const T*>(p.weight) + place.channel;
    for (int pass = 0; pass < p.passes; ++pass) {
      const int channel = p.repeat.quotient(place.channel) * p.passes + pass;
      const T* const source = static_cast<const T*>(p.source) + channel * p.source_channel;
      int by[3];
      for (int d = 0; d < p.tap_count[0]; ++d) {
        by[0] = d * p.window.tap_step[0];
        for (int h = 0; h < p.tap_count[1]; ++h) {
          by[1] = h * p.window.tap_step[1];
          for (int w = 0; w < p.tap_count[2]; ++w, weight += p.output.columns) {
            by[2] = w * p.window.tap_step[2];
            const Vector<T, V> factor = load_global<V>(weight);
            const int64_t moved = p.window.moved(by);
#pragma unroll
            for (int j = 0; j < kPixels; ++j) {
              const bool inside = exists[j] && p.window.inside(at[j], by);
              const Vector<T, V> value = load_global_if<V>(inside, source + begin[j] + moved);
#pragma unroll
              for (int e = 0; e < V; ++e) sums[j][e] += inside ? to_float(value[e]) * to_float(factor[e]) : 0.0f;
            }
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kPixels; ++j) {
      if (exists[j]) {
        const int64_t to = p.output.offset(place.first + j * place.step) + place.channel * p.output.channel;
        finish<T>(p.output, to, place.channel, true, sums[j]);
      }
    }
  }
}

// ---- the weight's gradient -----------------------------------------------------------------------------------------

constexpr int kTaps = 9;  // of a thread: a filter of 3 x 3 reads each tensor once

struct DepthwiseWeight {
  const void *grad, *x;
  float* partial;  // [splits, taps, channels]
  Window window;   // of x
  int64_t grad_image, grad_pixel, grad_channel, x_channel;
  int rows, channels, taps, first_split, splits, chunks, tap_groups;
  Divisor repeat;  // result channels of a channel of x
};

// Lanes: threads that have channels beside each other.
template <class T, int V, int Lanes>
__global__ void __launch_bounds__(kThreads) conv_depthwise_weight(DepthwiseWeight p) {
  constexpr int kSlots = kThreads / Lanes, kWarps = kThreads / 32;
  SHARED_ARRAY(float, partial, kWarps * Lanes * V * kTaps);
  int rest = blockIdx.x;
  const int first_tap = rest % p.tap_groups * kTaps;
  rest /= p.tap_groups;
  const int lane = threadIdx.x % Lanes, channel = (rest % p.chunks * Lanes + lane) * V, split = rest / p.chunks;
  const int end = share(p.rows, split + 1, p.splits);
  const bool has = channel < p.channels;
  const T* const grad = static_cast<const T*>(p.grad) + channel * p.grad_channel;
  const T* const x = static_cast<const T*>(p.x) + p.repeat.quotient(channel) * p.x_channel;
  float sums[kTaps][V] = {};
  int by[kTaps][3];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) p.window.tap(min(first_tap + t, p.taps - 1), by[t]);
  for (int row = share(p.rows, split, p.splits) + threadIdx.x / Lanes; row < end && has; row += kSlots) {
    int at[3], pixel = row;
    const int64_t begin = p.window.begin(row, at);
    const int64_t image = p.window.positions.divide(pixel);
    const Vector<T, V> g = load_global<V>(grad + image * p.grad_image + pixel * p.grad_pixel);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      if (first_tap + t >= p.taps) break;
      const bool inside = p.window.inside(at, by[t]);
      const Vector<T, V> value = load_global_if<V>(inside, x + begin + p.window.moved(by[t]));
#pragma unroll
      for (int e = 0; e < V; ++e) sums[t][e] += inside ? to_float(g[e]) * to_float(value[e]) : 0.0f;
    }
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      float sum = sums[t][e];
#pragma unroll
      for (int step = 16; step >= Lanes; step /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, step);
      if (threadIdx.x % 32 < Lanes) {
        store_shared(&partial[((threadIdx.x / 32 * kTaps + t) * V + e) * Lanes + lane], sum);
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTaps * V * Lanes; i += kThreads) {
    const int t = first_tap + i / (V * Lanes), c = (rest % p.chunks * Lanes + i % Lanes) * V + i / Lanes % V;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += load_shared(&partial[warp * kTaps * V * Lanes + i]);
    if (t < p.taps && c < p.channels) {
      store_global(p.partial + (int64_t{p.first_split + split} * p.taps + t) * p.channels + c, sum);
    }
  }
}

// Adds the shares in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_depthwise_shares(const float* partial, int splits, int taps, int channels, T* to, int64_t channel_stride,
                          Coordinates at, int64_t stride_d, int64_t stride_h, int64_t stride_w) {
  const int64_t count = int64_t{taps} * channels;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    float total = 0.0f;
    for (int split = 0; split < splits; ++split) total += load_global(partial + split * count + i);
    int tap[3];
    at(static_cast<int>(i / channels), tap);
    store_global(to + i % channels * channel_stride + tap[0] * stride_d + tap[1] * stride_h + tap[2] * stride_w,
                 from_float<T>(total));
  }
}

// The weight as [source channels of a group, taps of the phase, channels of the result].
template <class T>
const void* weight_of(const Phase& phase, const ConvGather& p, int channels, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  void* const memory = workspace.take(phase.source_channels * phase.taps() * channels * sizeof(T));
  if (workspace.counts()) return memory;
  const int64_t group = s.out_channels * s.weight_strides[0];
  Layout q{};
  q.from = p.weight, q.to = memory;
  q.outer = static_cast<int>(phase.source_channels), q.inner = static_cast<int>(s.groups);
  q.channels = static_cast<int>(phase.channels);
  q.from_outer = phase.source_stride, q.from_inner = group, q.from_channel = phase.result_stride;
  q.to_outer = phase.taps() * channels, q.to_inner = phase.channels;
  if (phase.channels == 1 || group == phase.channels * phase.result_stride) {  // all groups are one line
    q.inner = 1, q.channels = channels;
    if (phase.channels == 1) q.from_channel = group;
  }
  q.padded = q.channels;
  fill_taps(q, phase, s, channels, sizeof(T));
  arrange(s.dtype, q, stream);
  return memory;
}

template <class T>
void gather(const Phase& one, const ConvGather& p, const char* name, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  const int channels = to_int(s.groups * one.channels, "channels");
  const void* const weight = weight_of<T>(one, p, channels, workspace, stream);
  if (workspace.counts()) return;
  Phase phase = one;  // all groups at once
  phase.source_channels *= s.groups, phase.channels *= s.groups;
  ConvGather all = p;
  all.shape.groups = 1;
  Direct d{};
  d.weight = weight, d.source = p.source;
  const Strides strides = strides_of(s.channels_last, phase.source_channels, phase.source_sizes);
  const int64_t pixels = phase.source_sizes[0] * phase.source_sizes[1] * phase.source_sizes[2];
  d.window = window_of(phase.axes, strides.at, phase.source_channels * pixels);
  d.source_channel = strides.channel;
  for (int i = 0; i < 3; ++i) d.tap_count[i] = static_cast<int>(phase.axes[i].taps);
  d.output = output_of(phase, all, sizeof(T));
  d.repeat = Divisor(static_cast<int>(one.channels)), d.passes = static_cast<int>(one.source_channels);
  const uint64_t bits = reinterpret_cast<uintptr_t>(p.source) | reinterpret_cast<uintptr_t>(p.result) |
                        reinterpret_cast<uintptr_t>(p.residual) | reinterpret_cast<uintptr_t>(p.kept);
  const bool vectors =
      s.channels_last && one.channels == 1 && d.passes == 1 && channels % kChunk<T> == 0 && bits % 16 == 0;

  const int64_t together = images_together(phase, s.batch);
  for (int64_t image = 0; image < s.batch; image += together) {
    const int64_t images = std::min(together, s.batch - image), rows = images * phase.positions();
    d.output.rows = static_cast<int>(rows);
    const auto start = [&](auto* kernel, int64_t count) {
      launch({name, blocks_for((count + kThreads - 1) / kThreads), kThreads, stream}, kernel, d, count);
    };
    if (s.channels_last) {
      d.chunks = d.output.columns / (vectors ? kChunk<T> : 1);
      const int64_t count = (rows + kPixels - 1) / kPixels * d.chunks;
      if (vectors) {
        start(conv_direct<T, kChunk<T>, true>, count);
      } else {
        start(conv_direct<T, 1, true>, count);
      }
    } else {
      d.tiles = static_cast<int>((phase.positions() + 32 * kPixels - 1) / (32 * kPixels));
      to_int(images * d.output.columns, "planes");
      start(conv_direct<T, 1, false>, images * d.output.columns * d.tiles * 32);
    }
    d.source = static_cast<const T*>(d.source) + together * d.window.image;
    d.output.first += together * d.output.image;
  }
}

template <class T>
void grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  const ConvShape& s = p.shape;
  const Axis axes[3] = {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)};
  const int64_t positions = s.out[0] * s.out[1] * s.out[2], pixels = s.in[0] * s.in[1] * s.in[2];
  const int channels = to_int(s.groups * s.out_channels, "channels");
  const Strides of_x = strides_of(s.channels_last, s.groups, s.in);
  const Strides of_grad = strides_of(s.channels_last, channels, s.out);
  DepthwiseWeight w{};
  w.grad = p.grad, w.x = p.x;
  w.window = window_of(axes, of_x.at, s.groups * pixels);
  w.grad_image = channels * positions, w.grad_pixel = of_grad.at[2];
  w.grad_channel = of_grad.channel, w.x_channel = of_x.channel;
  w.channels = channels, w.taps = to_int(s.kernel[0] * s.kernel[1] * s.kernel[2], "taps");
  w.tap_groups = (w.taps + kTaps - 1) / kTaps;
  w.repeat = Divisor(static_cast<int>(s.out_channels));
  const uint64_t bits = reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.x);
  const bool vectors = s.channels_last && s.out_channels == 1 && channels % kChunk<T> == 0 && bits % 16 == 0;

  const auto start = [&](auto* kernel, int together_channels, int slots) {
    const int64_t together = std::min(s.batch, (kLimit - 1) / std::max<int64_t>(positions, 1));
    const int64_t launches = together == 0 ? 1 : (s.batch + together - 1) / together;
    w.chunks = (channels + together_channels - 1) / together_channels;
    const int64_t blocks = int64_t{w.chunks} * w.tap_groups;
    w.splits = splits_for(blocks, together * positions / (2 * slots));
    w.partial = static_cast<float*>(workspace.take(int64_t{4} * launches * w.splits * w.taps * channels));
    if (workspace.counts()) return;
    for (int64_t i = 0; i < launches; ++i) {
      w.rows = static_cast<int>(std::min(together, s.batch - i * together) * positions);
      w.first_split = static_cast<int>(i * w.splits);
      launch(
          {"conv_depthwise_grad_weight", static_cast<unsigned>(to_int(blocks * w.splits, "blocks")), kThreads, stream},
          kernel, w);
      w.grad = static_cast<const T*>(w.grad) + together * w.grad_image;
      w.x = static_cast<const T*>(w.x) + together * w.window.image;
    }
    const int64_t count = int64_t{w.taps} * channels;
    launch({"conv_depthwise_shares", blocks_for((count + kThreads - 1) / kThreads), kThreads, stream},
           conv_depthwise_shares<T>, w.partial, static_cast<int>(launches * w.splits), w.taps, channels,
           static_cast<T*>(p.grad_weight), s.weight_strides[0],
           Coordinates(static_cast<int>(s.kernel[1]), static_cast<int>(s.kernel[2])), s.weight_strides[2],
           s.weight_strides[3], s.weight_strides[4]);
  };
  constexpr int kLanes = 8;
  if (vectors) {
    start(conv_depthwise_weight<T, kChunk<T>, kLanes>, kLanes * kChunk<T>, kThreads / kLanes);
  } else if (s.channels_last) {
    start(conv_depthwise_weight<T, 1, kLanes>, kLanes, kThreads / kLanes);
  } else {
    start(conv_depthwise_weight<T, 1, 1>, 1, kThreads);
  }
}

}  // namespace

void direct_gather(const Phase& phase, const ConvGather& p, const char* name, Workspace& workspace, Stream stream) {
  with_storage(p.shape.dtype, [&](auto kind) { gather<decltype(kind)>(phase, p, name, workspace, stream); });
}

void depthwise_grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream) {
  with_storage(p.shape.dtype, [&](auto kind) { grad_weight<decltype(kind)>(p, workspace, stream); });
}

}  // namespace fastnets::cuda

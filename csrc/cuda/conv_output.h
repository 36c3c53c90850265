// From sums to the result: a tile of them in shared memory, laid out as the result is, through the epilogue.
#pragma once

#include "conv_product.h"

namespace fastnets::cuda {

// Where the rows (pixels, batch after batch) and columns (channels of a group) of a product lie in the result.
struct Output {
  void* result;
  void* kept;
  const void* residual;
  const void* bias;
  Activation activation;
  int rows, columns;
  bool innermost;  // the channels
  bool wide;       // four neighbours at a time
  Divisor positions;
  Coordinates at;
  int64_t first, image, step[3], group, channel;

  __device__ __forceinline__ int64_t offset(int row) const {
    int c[3];
    const int64_t in_image = positions.divide(row) * image;
    at(row, c);
    return first + in_image + c[0] * step[0] + c[1] * step[1] + c[2] * step[2];
  }
};

// The epilogue of V neighbours in the result, from element `at` and, counted over all groups, from `channel` on.
template <class T, int V>
__device__ __forceinline__ void finish(const Output& p, int64_t at, int64_t channel, bool exists, float (&sum)[V]) {
  if (p.bias != nullptr) {
    const T* const bias = static_cast<const T*>(p.bias) + channel;
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += to_float(load_global_if<1>(exists, bias + (p.innermost ? e : 0))[0]);
  }
  if (p.residual != nullptr) {
    const Vector<T, V> more = load_global_if<V>(exists, static_cast<const T*>(p.residual) + at);
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += to_float(more[e]);
  }
  Vector<T, V> values;
  if (p.kept != nullptr) {
#pragma unroll
    for (int e = 0; e < V; ++e) values[e] = from_float<T>(sum[e]);
    if (exists) store_global(static_cast<T*>(p.kept) + at, values);
  }
#pragma unroll
  for (int e = 0; e < V; ++e) values[e] = from_float<T>(activate(p.activation, sum[e]));
  if (exists) store_global(static_cast<T*>(p.result) + at, values);
}

// A block's tile of sums on its way through the epilogue.
template <class T, class S>
class Finish {
  static constexpr int kN = S::kN, kM = S::kM;
  // Lines of the result's innermost dimension, set apart so that the accumulators' rows and columns, and reads of four
  // along a line, lie in different banks.
  static constexpr int kChannelPitch = kN + 8, kPixelPitch = kM + 4;
  static constexpr int kFloats = kM * kChannelPitch > kN* kPixelPitch ? kM* kChannelPitch : kN* kPixelPitch;
  static constexpr int kPlaces = kM + 16;
  static constexpr int64_t kNone = -1;

 public:
  static constexpr int kBytes = kPlaces * static_cast<int>(sizeof(int64_t)) + kFloats * static_cast<int>(sizeof(float));

  // The block's tile begins at that column of the group; result(r) is the number of its row r, -1 where it has none.
  template <class ResultOf>
  __device__ __forceinline__ Finish(const Output& p, void* shared, int column, int group, const ResultOf& result)
      : p_(p),
        offsets_(static_cast<int64_t*>(shared)),
        sums_(reinterpret_cast<float*>(offsets_ + kPlaces)),
        columns_(p.columns - column),
        begin_(group * p.group + column * p.channel),
        channel_(static_cast<int64_t>(group) * p.columns + column) {
    for (int r = threadIdx.x; r < kM; r += S::kThreads) {
      const int row = result(r);
      store_shared(offsets_ + place(r), row < 0 ? kNone : p.offset(row));
    }
  }

  // Two or four neighbours in a row.
  template <int V>
  __device__ __forceinline__ void put(int row, int column, const Vector<float, V>& values) const {
    if (p_.innermost) {
      store_shared(sums_ + row * kChannelPitch + column, values);
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) store_shared(sums_ + (column + e) * kPixelPitch + row, values[e]);
    }
  }

  // Writes what all threads have put.
  __device__ __forceinline__ void operator()() const {
    __syncthreads();
    if (p_.wide) {
      write<4>();
    } else {
      write<1>();
    }
  }

 private:
  // Of a row's offset: neither rows that follow each other nor every fourth share a bank.
  static __device__ __forceinline__ int place(int row) { return row % 4 * (kM / 4 + 4) + row / 4; }

  template <int V>
  __device__ __forceinline__ void write() const {
#pragma unroll 1
    for (int i = threadIdx.x * V; i < kM * kN; i += S::kThreads * V) {
      const int row = p_.innermost ? i / kN : i % kM, column = p_.innermost ? i % kN : i / kM;
      const int64_t offset = load_shared(offsets_ + place(row)), at = begin_ + column * p_.channel + offset;
      const bool exists = offset != kNone && column < columns_;
      Vector<float, V> sum =
          load_shared<V>(sums_ + (p_.innermost ? row * kChannelPitch + column : column * kPixelPitch + row));
      finish<T>(p_, at, channel_ + column, exists, sum.values);
    }
  }

  const Output& p_;
  int64_t* offsets_;
  float* sums_;
  int columns_;
  int64_t begin_, channel_;
};

// The tile of a product whose rows are results in a row.
template <class T, class S>
__device__ __forceinline__ Finish<T, S> finish_of(const Output& p, void* shared, const Place& at) {
  return {p, shared, at.column, at.group, [&](int r) { return at.row + r < p.rows ? at.row + r : -1; }};
}

// A phase as the host sees it.
struct Phase {
  Axis axes[3];
  int64_t source_channels, channels;     // of one group, of the source and of the result
  int64_t source_stride, result_stride;  // of the weight
  const int64_t *source_sizes, *result_sizes;
  bool forwards;

  int64_t taps() const { return axes[0].taps * axes[1].taps * axes[2].taps; }
  int64_t positions() const { return axes[0].count * axes[1].count * axes[2].count; }
};

// As many images a launch as 32 bits can number the results and the pixels of.
inline int64_t images_together(const Phase& phase, int64_t batch) {
  const int64_t pixels = phase.source_sizes[0] * phase.source_sizes[1] * phase.source_sizes[2];
  return std::min(batch, (kLimit - 1) / std::max(phase.positions(), pixels));
}

// A layout [.., taps of the phase, ..], `to_tap` elements apart: q.from, the weight's first element, gives way to that
// of the first tap.
inline void fill_taps(Layout& q, const Phase& phase, const ConvShape& s, int64_t to_tap, size_t size) {
  const int64_t* const strides = s.weight_strides + 2;
  int64_t first = 0;
  for (int d = 2; d >= 0; --d) {
    first += phase.axes[d].tap * strides[d];
    q.from_pixel[d] = phase.axes[d].tap_step * strides[d], q.to_pixel[d] = to_tap;
    to_tap *= phase.axes[d].taps;
  }
  q.from = static_cast<const char*>(q.from) + first * static_cast<int64_t>(size);
  q.pixels = to_int(phase.taps(), "taps");
  q.at = Coordinates(static_cast<int>(phase.axes[1].taps), static_cast<int>(phase.axes[2].taps));
  q.channels_first = q.from_channel <= strides[2];
}

inline Output output_of(const Phase& phase, const ConvGather& p, size_t size) {
  const ConvShape& s = p.shape;
  const Strides strides = strides_of(s.channels_last, s.groups * phase.channels, phase.result_sizes);
  const int64_t pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
  Output o{};
  o.result = p.result, o.kept = p.kept, o.residual = p.residual, o.bias = p.bias, o.activation = p.activation;
  o.columns = static_cast<int>(phase.channels);
  o.innermost = s.channels_last || pixels == 1;
  o.positions = Divisor(to_int(phase.positions(), "positions in an image"));
  o.at = Coordinates(static_cast<int>(phase.axes[1].count), static_cast<int>(phase.axes[2].count));
  o.image = s.groups * phase.channels * pixels;
  o.group = phase.channels * strides.channel, o.channel = strides.channel;
  for (int d = 0; d < 3; ++d) {
    o.first += phase.axes[d].first * strides.at[d];
    o.step[d] = phase.axes[d].step * strides.at[d];
  }
  uint64_t bits = 0;
  for (const void* tensor : {static_cast<const void*>(p.result), static_cast<const void*>(p.kept), p.residual}) {
    bits |= reinterpret_cast<uintptr_t>(tensor);
  }
  const bool dense = phase.positions() == pixels;
  o.wide = bits % (4 * size) == 0 && (o.innermost ? phase.channels % 4 == 0 : dense && pixels % 4 == 0);
  return o;
}

// Without products of matrices (conv_direct.cu): where every group has one channel of x, and float32 sums of so few
// terms that three TF32 products, off by up to 6 eps each, would lie further from the truth than their rounding.
constexpr int64_t kFewTerms = 16;
inline bool is_depthwise(const ConvShape& s) { return s.groups > 1 && s.in_channels == 1; }
inline bool is_direct(const Phase& phase, const ConvShape& s) {
  return is_depthwise(s) || (s.dtype == Dtype::kFloat32 && phase.taps() * phase.source_channels < kFewTerms);
}
void direct_gather(const Phase& phase, const ConvGather& p, const char* name, Workspace& workspace, Stream stream);
void depthwise_grad_weight(const ConvGradWeight& p, Workspace& workspace, Stream stream);

}  // namespace fastnets::cuda

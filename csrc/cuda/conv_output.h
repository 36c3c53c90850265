// From sums to the result: a tile of them in shared memory, laid out as the result is, through the epilogue.
#pragma once

#include "conv.h"

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

template <class T, class S>
class Finish {
  static constexpr int kN = S::kN, kM = S::kM;
  // Lines of the result's innermost dimension, set apart so that the accumulators' rows and columns, and reads of four
  // along a line, lie in different banks.
  static constexpr int kChannelPitch = kN + 8, kPixelPitch = kM + 4;
  static constexpr int kFloats = kM * kChannelPitch > kN* kPixelPitch ? kM * kChannelPitch : kN * kPixelPitch;
  static constexpr int kPlaces = kM + 16;

 public:
  static constexpr int kBytes = kPlaces * static_cast<int>(sizeof(int64_t)) + kFloats * static_cast<int>(sizeof(float));

  // The block's tile begins at those rows and columns of the group.
  __device__ __forceinline__ Finish(const Output& p, void* shared, int row, int column, int group)
      : p_(p),
        offsets_(static_cast<int64_t*>(shared)),
        sums_(reinterpret_cast<float*>(offsets_ + kPlaces)),
        rows_(p.rows - row),
        columns_(p.columns - column),
        begin_(group * p.group + column * p.channel),
        channel_(static_cast<int64_t>(group) * p.columns + column) {
    for (int r = threadIdx.x; r < kM; r += S::kThreads)
      store_shared(offsets_ + place(r), r < rows_ ? p.offset(row + r) : 0);
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
      const bool exists = row < rows_ && column < columns_;
      const int64_t at = begin_ + column * p_.channel + load_shared(offsets_ + place(row));
      Vector<float, V> sum =
          load_shared<V>(sums_ + (p_.innermost ? row * kChannelPitch + column : column * kPixelPitch + row));
      if (p_.bias != nullptr) {
        const T* const bias = static_cast<const T*>(p_.bias) + channel_ + column;
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += to_float(load_global_if<1>(exists, bias + (p_.innermost ? e : 0))[0]);
      }
      if (p_.residual != nullptr) {
        const Vector<T, V> more = load_global_if<V>(exists, static_cast<const T*>(p_.residual) + at);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += to_float(more[e]);
      }
      Vector<T, V> values;
      if (p_.kept != nullptr) {
#pragma unroll
        for (int e = 0; e < V; ++e) values[e] = from_float<T>(sum[e]);
        if (exists) store_global(static_cast<T*>(p_.kept) + at, values);
      }
#pragma unroll
      for (int e = 0; e < V; ++e) values[e] = from_float<T>(activate(p_.activation, sum[e]));
      if (exists) store_global(static_cast<T*>(p_.result) + at, values);
    }
  }

  const Output& p_;
  int64_t* offsets_;
  float* sums_;
  int rows_, columns_;
  int64_t begin_, channel_;
};

}  // namespace fastnets::cuda

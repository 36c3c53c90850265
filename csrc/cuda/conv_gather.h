// Forwards, and backwards to the input: what the kernels share that sum a result up from its taps.
#pragma once

#include "conv_output.h"

namespace fastnets::cuda {

// One phase: results whose taps are the same (see conv_axis.h), in images of one launch.
struct Gather {
  const void* source;  // Operand
  const void* weight;  // [groups, columns, chunks], zeros where channels end
  Output output;
  Partial partial;  // where splits > 1
  int chunks, steps, tiles_m, tiles_n;
  Divisor tap_chunks;  // chunks of a tap
  Window window;
  int64_t group;  // stride of the source
  // Of a source read in planes:
  int channels;   // of a group
  int64_t plane;  // pixels
  bool whole;     // planes are whole chunks

  // The tiles of `shape` and, where their depth is shared out, memory for the sums; returns how many blocks that takes.
  template <class S>
  int64_t divide(Workspace& workspace, int groups) {
    tiles_m = (output.rows + S::kM - 1) / S::kM, tiles_n = (output.columns + S::kN - 1) / S::kN;
    const int64_t tiles = int64_t{tiles_m} * tiles_n * groups;
    partial = {nullptr, splits_for(tiles, steps), groups, output.rows, output.columns, 0};
    if (partial.splits > 1) partial = Partial::take(workspace, partial.splits, groups, output.rows, output.columns);
    return to_int(tiles * partial.splits, "blocks");
  }
};

// Brings a tile's part of the weight. A thread has one chunk of the depth for several channels of the result.
template <class T, class S>
class FilterCopy {
 public:
  static constexpr int kChunks = kStageBytes / 16, kStep = S::kThreads / kChunks;
  static_assert(S::kN % kStep == 0);

  __device__ __forceinline__ FilterCopy(const Gather& p, const Place& at) : p_(p), column_(at.column + line()) {
    from_ = static_cast<const T*>(p.weight) +
            (static_cast<int64_t>(at.group) * p.output.columns + column_) * p.chunks * kChunk<T>;
  }
  static __device__ __forceinline__ int line() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ __forceinline__ int place() { return static_cast<int>(threadIdx.x) % kChunks; }

  // Starts to copy that chunk, zeros unless `within`.
  template <class B>
  __device__ __forceinline__ void operator()(B b, int chunk, bool within) const {
#pragma unroll
    for (int i = 0; i < S::kN / kStep; ++i) {
      const bool inside = within && column_ + i * kStep < p_.output.columns;
      const int64_t by_rows = (static_cast<int64_t>(i) * kStep * p_.chunks + chunk) * kChunk<T>;
      copy_async<16>(b.at(line() + i * kStep, place() * kChunk<T>),
                     inside ? from_ + by_rows : static_cast<const T*>(p_.weight), inside ? 16 : 0);
    }
  }

 private:
  const Gather& p_;
  int column_;
  const T* from_;
};

// What follows the product: a share of the sums, or the epilogue.
template <class T, class S>
__device__ __forceinline__ void finish_gather(const Gather& p, const auto& sums, unsigned char* shared,
                                              const Place& at) {
  if (p.partial.splits > 1) return sums.store(p.partial, at.split, at.group, at.row, at.column);
  __syncthreads();  // the stages' memory becomes the tile's
  const auto finish = finish_of<T, S>(p.output, shared, at);
  sums.pairs([&](int r, int c, const Vector<float, 2>& pair) { finish.put(r, c, pair); });
  finish();
}

// Adds the shares and finishes.
void gather_shares(Dtype dtype, Gather p, Stream stream);

// Results that meet neighbouring pixels: keeps the source's pixels on chip while all taps pass (conv_held.cu). False
// where they do not fit: nothing was launched.
bool gather_held(const Phase& phase, Gather p, Dtype dtype, bool tf32, const char* name, Workspace& workspace,
                 Stream stream);

// Few source channels (conv_few.cu). False where there are more, or where they do not fit: nothing was launched.
bool gather_few(const Phase& phase, const ConvGather& p, const char* name, bool counts, Stream stream);

}  // namespace fastnets::cuda

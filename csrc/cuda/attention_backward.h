// What the backward kernels of attention share: tiles of queries and keys side by side, and from their products the
// weights and the gradient of the scores, recomputed from the rows' log-sum-exp (FlashAttention-2,
// https://arxiv.org/abs/2307.08691, algorithm 2).
//
// A block owns a tile of rows, 16 of them a warp's, of queries or of keys; tiles of the other side stream by. A lane
// holds scores[block][2 half + pair] of own row lane / 4 + 8 half and streamed row 8 block + 2 (lane % 4) + pair.
#pragma once

#include "attention.h"

namespace fastnets::cuda {

enum class Own { kQueries, kKeys };

// By the bytes of a row in shared memory. At most kMostRows own rows; with 128, own and streamed tiles, two of each
// kind, take at most 64, 96, 96 and 96 KB: within the 99 KB that a block may have on 8.6, 8.9 and 12.0. Where registers
// are short, `Tight`, half as many rows stream by at a time.
template <class C, int kWidth, int kMostRows, bool Tight = false>
struct BackwardShape {
  using T = typename C::Storage;
  static constexpr int kRowBytes = kWidth * sizeof(T), kColumns = kWidth;
  static constexpr int kRows = std::min(kMostRows, kRowBytes <= 256 ? 128 : kRowBytes <= 512 ? 64 : 32);
  static constexpr int kStreamed = (kRowBytes <= 128   ? 64
                                    : kRowBytes <= 256 ? 32
                                                       : 16) /
                                   (Tight && kRowBytes <= 256 ? 2 : 1);
  static constexpr int kSlots = kRowBytes <= 512 ? 2 : 1;
  static constexpr int kBlocks = kStreamed / 8;
  using OwnTile = Tile<T, kRows, kWidth>;
  using StreamedTile = Tile<T, kStreamed, kWidth>;
};

// What the softmax's gradient needs of every row [batch, heads, lq]: {log-sum-exp in log2, what is subtracted}. A row
// that sees nothing has inf, of which every weight is 2^-inf = 0.
struct RowTerms {
  float lse, subtract;
};

__device__ __forceinline__ RowTerms load_terms(const RowTerms* at) {
  const Vector<float, 2> pair = load_global<2>(reinterpret_cast<const float*>(at));
  return {pair[0], pair[1]};
}

__device__ __forceinline__ void store_terms(RowTerms* at, RowTerms terms) {
  store_global(reinterpret_cast<float*>(at), Vector<float, 2>{{terms.lse, terms.subtract}});
}

struct TwoRows {
  RowTerms terms[2];
};

// Which queries and keys this lane's scores belong to.
template <Own own>
struct Places {
  int row, streamed;  // the first of each

  __device__ __forceinline__ Places(int first_row, int first_streamed)
      : row(first_row + threadIdx.x % 32 / 4), streamed(first_streamed + threadIdx.x % 4 * 2) {}

  __device__ __forceinline__ int query(int block, int e) const {
    return own == Own::kQueries ? row + e / 2 * 8 : streamed + 8 * block + e % 2;
  }
  __device__ __forceinline__ int key(int block, int e) const {
    return own == Own::kKeys ? row + e / 2 * 8 : streamed + 8 * block + e % 2;
  }

  // Calls f(query, key, x) for every x of this lane's.
  template <int Blocks, class F>
  __device__ __forceinline__ void each(float (&x)[Blocks][4], F&& f) const {
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(query(block, e), key(block, e), x[block][e]);
    }
  }

  // What a query does not see, and what belongs to no query or key, becomes -inf.
  template <int Blocks>
  __device__ __forceinline__ void hide(const Sequence& s, float (&x)[Blocks][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = row + 8 * half;
      if constexpr (own == Own::kQueries) {
        hide_row(streamed, half, s.first(at), at < s.lq ? s.last(at) : 0, x);
      } else {
        hide_row(streamed, half, s.first_query(at), at < s.lk ? s.last_query(at) : 0, x);
      }
    }
  }
};

// Whether some of queries [i, i + queries) sees some of keys [j, j + keys), and whether all of them see all.
__device__ __forceinline__ bool sees_any(const Sequence& s, int i, int queries, int j, int keys) {
  return i < s.lq && j < s.lk && j + keys - 1 - i >= s.lower && j - (i + queries - 1) < s.upper;
}
__device__ __forceinline__ bool sees_all(const Sequence& s, int i, int queries, int j, int keys) {
  return i + queries <= s.lq && j + keys <= s.lk && j - (i + queries - 1) >= s.lower && j + keys - 1 - i < s.upper;
}

// to[16, streamed] += own rows' tile times the streamed one's transpose, of `columns` columns.
template <class C, class S>
__device__ __forceinline__ void multiply_tiles(float (&to)[S::kBlocks][4], typename S::OwnTile own, int row,
                                               typename S::StreamedTile streamed, int64_t columns) {
  const Reader<C, typename S::OwnTile, Side::kA> read_own;
  const Reader<C, typename S::StreamedTile, Side::kB> read_streamed;
#pragma unroll
  for (int column = 0; column < S::kColumns; column += kColumnStep) {
    if (column >= columns) break;
#pragma unroll
    for (int k = column; k < column + kColumnStep; k += kDepth<C>) {
      const Fragment<C> a = read_own(own, row, k);
#pragma unroll
      for (int block = 0; block < S::kBlocks; block += 2) {
        multiply(to[block], to[block + 1], a, read_streamed(streamed, block * 8, k));
      }
    }
  }
}

// One head's scores and weights of a tile: everything but the products.
template <class C, class S, Own own, bool General>
class Weights {
  using T = typename C::Storage;
  static constexpr int kBlocks = S::kBlocks;

 public:
  // From products q k: the scores in log2, yet to be multiplied by plan.factor if not General; -inf where a query does
  // not see a key.
  __device__ __forceinline__ void finish(const AttentionBackward& p, const Plan& plan, const Sequence& s, int head,
                                         const Places<own>& at, bool whole, float (&scores)[kBlocks][4]) {
    if constexpr (General) {
      at.each(scores, [&](int, int, float& score) { score *= plan.factor; });
      if (plan.cap != 0.0f) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            squashed_[block][e] = tanhf(scores[block][e]);
            scores[block][e] = plan.cap * squashed_[block][e];
          }
        }
      }
      if (p.mask_kind == MaskKind::kBool) {
        each_entry<uint8_t>(p, s, head, at, scores, [](uint8_t entry, float& score) {
          if (entry == 0) score = kMinusInfinity;
        });
      } else if (p.mask_kind == MaskKind::kAdditive) {
        const auto add = [](auto entry, float& score) { score += to_float(entry) * kLog2E; };
        if (p.mask_dtype == Dtype::kFloat32) {
          each_entry<float>(p, s, head, at, scores, add);
        } else {
          each_entry<T>(p, s, head, at, scores, add);
        }
      }
      if (p.slopes != nullptr) {
        const float* const slopes = static_cast<const float*>(p.slopes);
        const float slope = load_global(slopes + s.batch * p.slope_strides[0] + head * p.slope_strides[1]) * kLog2E;
        at.each(scores,
                [&](int i, int j, float& score) { score -= slope * fabsf(s.offset + static_cast<float>(i - j)); });
      }
    }
    if (!whole) at.hide(s, scores);
  }

  // Scores become weights, and grads, of the weights after dropout, those of the weights before it. terms_of(block): of
  // the two queries there, own ones of both halves or streamed ones side by side.
  template <class TermsOf>
  __device__ __forceinline__ void weigh(const AttentionBackward& p, const Plan& plan, Seed seed, const Sequence& s,
                                        int head, const Places<own>& at, float (&scores)[kBlocks][4],
                                        float (&grads)[kBlocks][4], TermsOf&& terms_of) {
    if constexpr (General) {
      if (p.grad_weights != nullptr) {
        const T* const rows = static_cast<const T*>(p.grad_weights) + (s.batch * p.heads + head) * p.lq * p.lk;
        at.each(grads, [&](int i, int j, float& grad) {
          grad += to_float(load_global_if<1>(i < s.lq && j < s.lk, rows + i * p.lk + j)[0]);
        });
      }
      stay_[0] = stay_[1] = ~0u;
      if (p.dropout != 0) draw(plan, seed, s.batch, head, at);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const TwoRows rows = terms_of(block);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float lse = rows.terms[which(e)].lse;
        scores[block][e] = exp2_approx(General ? scores[block][e] - lse : fmaf(scores[block][e], plan.factor, -lse));
        if constexpr (General) grads[block][e] *= factor(plan, block, e);
      }
    }
  }

  // Gradients of the weights become those of the scores; the weights, those after dropout.
  template <class TermsOf>
  __device__ __forceinline__ void differentiate(const Plan& plan, float (&weights)[kBlocks][4],
                                                float (&grads)[kBlocks][4], TermsOf&& terms_of) const {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const TwoRows rows = terms_of(block);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        grads[block][e] = weights[block][e] * (grads[block][e] - rows.terms[which(e)].subtract);
        if constexpr (General) weights[block][e] *= factor(plan, block, e);
      }
    }
  }

  // From the gradients of the scores to those of the products, less the scale.
  __device__ __forceinline__ void uncap(const Plan& plan, float (&grads)[kBlocks][4]) const {
    if constexpr (General) {
      if (plan.cap == 0.0f) return;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 4; ++e) grads[block][e] *= 1.0f - squashed_[block][e] * squashed_[block][e];
      }
    }
  }

 private:
  template <class M, class F>
  static __device__ __forceinline__ void each_entry(const AttentionBackward& p, const Sequence& s, int head,
                                                    const Places<own>& at, float (&scores)[kBlocks][4], F&& f) {
    const M* const mask = static_cast<const M*>(p.mask) + s.batch * p.mask_strides[0] + head * p.mask_strides[1];
    at.each(scores, [&](int i, int j, float& score) {
      const bool inside = i < s.lq && j < s.lk;
      f(load_global_if<1>(inside, mask + i * p.mask_strides[2] + j * p.mask_strides[3])[0], score);
    });
  }

  static __device__ __forceinline__ int which(int e) { return own == Own::kQueries ? e / 2 : e % 2; }

  // What dropout multiplies a weight with.
  __device__ __forceinline__ float factor(const Plan& plan, int block, int e) const {
    return (stay_[e / 2] >> (2 * block + e % 2) & 1) != 0 ? plan.kept : 0.0f;
  }

  // Which weights dropout leaves: of each half bit 2 block + pair.
  __device__ __forceinline__ void draw(const Plan& plan, Seed seed, int batch, int head, const Places<own>& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (own == Own::kQueries) {
        stay_[half] = kept_weights<kBlocks>(plan, seed, batch, {at.query(0, 2 * half), head, 0, 0.0f},
                                            at.streamed - static_cast<int>(threadIdx.x) % 4 * 2);
      } else {
        // Of four keys that share a random number this warp has one: each is found four times.
        const uint32_t j = at.key(0, 2 * half), word = j % 64 / 16;
        uint32_t bits = 0;
#pragma unroll 1
        for (int n = 0; n < 2 * kBlocks; ++n) {
          const Words words = philox(j / 64 * 16 + j % 16, at.query(n / 2, n % 2), head, batch, seed);
          const uint64_t two = word < 2 ? uint64_t{words.w[1]} << 32 | words.w[0]  // an array in memory would be slower
                                        : uint64_t{words.w[3]} << 32 | words.w[2];
          if (static_cast<uint32_t>(two >> word % 2 * 32) >> 8 >= plan.threshold) bits |= 1u << n;
        }
        stay_[half] = bits;
      }
    }
  }

  float squashed_[General ? kBlocks : 1][4] = {};  // tanh of capped scores
  uint32_t stay_[2];
};

// Starts to copy rows [first, first + the tile's) of one head of a sequence, which begins at `row` in memory and has
// `length`.
template <int Threads, class TileType>
__device__ __forceinline__ void fetch_rows(TileType tile, const AttentionArray& x, int width, int64_t columns,
                                           int64_t memory, int head, int64_t row, int first, int length) {
  using T = typename TileType::Element;
  const T* const data = static_cast<const T*>(x.data);
  const T* const base = data + memory * x.batch + head * x.head + (row + first) * x.row;
  copy_rows<Threads>(tile, threadIdx.x, width, static_cast<int>(columns), data, base, x.row, length - first);
}

// Sums for q's gradient to which the blocks of keys add their shares: of every 16 queries of a sequence and head
// `blocks` times a warp's accumulators of 8 columns.
struct QuerySums {
  static constexpr int kFloats = 128;  // of accumulators
  float* data;                         // [memory, heads, tiles, blocks, kFloats]; null: no block of keys adds anything
  int64_t tiles;                       // of 16 queries, of all sequences
  int64_t blocks;

  __device__ __forceinline__ float* at(const AttentionBackward& p, const Sequence& s, int head, int i,
                                       int block) const {
    const int64_t first = p.starts_q != nullptr ? s.row_q / 16 + s.batch : 0;  // no sequence's reach into the next's
    return data + (((s.memory * p.heads + head) * tiles + first + i / 16) * blocks + block) * kFloats;
  }
};

// Adds a warp's accumulators to a block of such sums; where a lane's lie is chosen so that every instruction covers
// whole sectors.
__device__ __forceinline__ void add_accumulators(float* to, const float (&x)[4]) {
  const int lane = threadIdx.x % 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  atomicAdd(reinterpret_cast<float4*>(to) + lane, make_float4(x[0], x[1], x[2], x[3]));
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) atomicAdd(to + 32 * e + lane, x[e]);
#endif
}

__device__ __forceinline__ void load_accumulators(const float* from, float (&x)[4]) {
  const int lane = threadIdx.x % 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const Vector<float, 4> four = load_global<4>(from + 4 * lane);
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = four[e];
#else
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = load_global(from + 32 * e + lane);
#endif
}

// What a backward call's copies and stores may be, and how it finds q's gradient.
struct BackwardPlan : Plan {
  int width_grad;               // of grad_out's copies
  bool wide_q, wide_k, wide_v;  // whether the gradients take stores of 8 bytes
  int whole_keys;               // sequences of at most so many keys: sees_whole_rows; -1 for none
  QuerySums sums;

  // Whether one tile holds all of a row's weights. Then what the softmax's gradient subtracts comes from them instead
  // of `out`, whose rounding would show where few keys leave little else. (With grad_weights, grad_lse has their part.)
  __device__ __forceinline__ bool sees_whole_rows(const Sequence& s) const { return s.lk <= whole_keys; }
  // Whether q's gradient is what blocks of keys add up.
  __device__ __forceinline__ bool adds_queries(const Sequence& s) const {
    return sums.data != nullptr && !sees_whole_rows(s);
  }
};

template <class T>
BackwardPlan backward_plan_of(const AttentionBackward& p) {
  BackwardPlan plan{};
  static_cast<Plan&>(plan) = plan_of(p);
  const int64_t memory = p.starts_q != nullptr ? 1 : p.batch, kv_heads = p.heads / p.groups;
  plan.width_grad = copy_width_of(p.grad_out, p.dtype, memory, p.heads);
  const auto wide = [&](const AttentionArray& x, int64_t heads, int64_t columns) {
    return copy_width_of(x, p.dtype, memory, heads) >= 8 && columns * sizeof(T) % 8 == 0;
  };
  plan.wide_q = wide(p.grad_q, p.heads, p.d);
  plan.wide_k = wide(p.grad_k, kv_heads, p.d);
  plan.wide_v = wide(p.grad_v, kv_heads, p.dv);
  return plan;
}

// The mask's gradient, a pass of its own; `partial` holds attention_mask_partial(p) floats.
int64_t attention_mask_partial(const AttentionBackward& p);
void attention_mask_gradient(const AttentionBackward& p, const RowTerms* terms, float* partial, Stream stream);

}  // namespace fastnets::cuda

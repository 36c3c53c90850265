// The gradient of attention's additive mask: of each of its elements the sum over all scores that it was added to. A
// block owns a tile of 64 queries' indices by some keys', goes through the batches, heads, queries and keys that the
// mask broadcasts over, in a fixed order, and finds their scores' gradients anew. Where that leaves too few blocks,
// several share the work, and what they found is added up afterwards, in order.
#include "attention_backward.h"

namespace fastnets::cuda {
namespace {

constexpr int kSumThreads = 256;

template <class C, int kWidth>
struct MaskShape : BackwardShape<C, kWidth, 64> {
  using S = BackwardShape<C, kWidth, 64>;
  static constexpr int kThreads = 32 * (S::kRows / 16);
  static constexpr int kPitch =
      (S::kStreamed + 31) / 32 * 32 + 8;  // of the tile's sums: stores and sums along rows meet no conflict
  static constexpr size_t kTiles = 2 * (S::OwnTile::kBytes + S::StreamedTile::kBytes);
  static constexpr size_t kShared = std::max(kTiles, S::kRows * kPitch * sizeof(float));
};

// A dimension of the mask: its own indices, in tiles, and what each stands for.
struct Extent {
  int64_t tiles;  // of the mask's own indices
  int64_t turns;  // tiles of the whole that one of them goes through

  Extent() = default;
  Extent(int64_t own, int64_t full, int tile) {
    const int64_t all = (full + tile - 1) / tile;
    tiles = own == 1 ? 1 : all;
    turns = own == 1 ? all : 1;
  }
};

struct MaskDeal {
  Extent extents[4];  // batch, heads, queries, keys
  int64_t turns;      // of a block's tile, all together
  int splits;         // blocks that share them
  int64_t elements;   // of the mask
  float* partial;     // [splits, elements]; null where there is one
};

template <class M>
__device__ __forceinline__ void store_element(const AttentionBackward& p, int64_t at, float value) {
  store_global(static_cast<M*>(p.grad_mask) + at, from_float<M>(value));
}

template <class C, int kWidth>
__global__ void __launch_bounds__(MaskShape<C, kWidth>::kThreads, 1)
    mask_gradient(AttentionBackward p, BackwardPlan plan, const RowTerms* terms, MaskDeal deal) {
  using S = MaskShape<C, kWidth>;
  using T = typename C::Storage;
  using OwnTile = typename S::OwnTile;
  using StreamedTile = typename S::StreamedTile;
  DYNAMIC_SHARED(memory);
  const int row = threadIdx.x / 32 * 16;

  // Which tile of the mask, and which of its turns.
  int64_t unit = blockIdx.x, own[4];
  const int split = static_cast<int>(unit % deal.splits);
  unit /= deal.splits;
#pragma unroll
  for (int d = 3; d >= 0; --d) {
    own[d] = unit % deal.extents[d].tiles;
    unit /= deal.extents[d].tiles;
  }
  const int64_t first_turn = deal.turns * split / deal.splits, end_turn = deal.turns * (split + 1) / deal.splits;

  const OwnTile queries(memory), grads_out(memory + OwnTile::kBytes);
  const StreamedTile keys(memory + 2 * OwnTile::kBytes);
  const StreamedTile values(memory + 2 * OwnTile::kBytes + StreamedTile::kBytes);
  const Seed seed = seed_of(p);
  float sum[S::kBlocks][4] = {};
#pragma unroll 1
  for (int64_t turn = first_turn; turn < end_turn; ++turn) {
    int64_t rest = turn, index[4];
#pragma unroll
    for (int d = 3; d >= 0; --d) {
      index[d] = own[d] + rest % deal.extents[d].turns;
      rest /= deal.extents[d].turns;
    }
    const Sequence s = sequence_of(p, index[0]);
    const int head = static_cast<int>(index[1]), kv_head = head / static_cast<int>(p.groups);
    const int i = static_cast<int>(index[2]) * S::kRows, j = static_cast<int>(index[3]) * S::kStreamed;
    if (!sees_any(s, i, S::kRows, j, S::kStreamed)) continue;
    __syncthreads();  // nobody reads the former tiles
    fetch_rows<S::kThreads>(queries, p.q, plan.width_q, p.d, s.memory, head, 0, i, s.lq);
    fetch_rows<S::kThreads>(grads_out, p.grad_out, plan.width_grad, p.dv, s.memory, head, 0, i, s.lq);
    fetch_rows<S::kThreads>(keys, p.k, plan.width_k, p.d, s.memory, kv_head, 0, j, s.lk);
    fetch_rows<S::kThreads>(values, p.v, plan.width_v, p.dv, s.memory, kv_head, 0, j, s.lk);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (!sees_any(s, i + row, 16, j, S::kStreamed)) continue;

    const Places<Own::kQueries> at(i + row, j);
    TwoRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = (index[0] * p.heads + head) * p.lq;
      rows.terms[half] = load_terms(terms + first + min(at.row + 8 * half, s.lq - 1));
    }
    const auto terms_of = [&](int) { return rows; };
    float scores[S::kBlocks][4] = {}, grads[S::kBlocks][4] = {};
    Weights<C, S, Own::kQueries, true> weights;
    multiply_tiles<C, S>(scores, queries, row, keys, p.d);
    weights.finish(p, plan, s, head, at, sees_all(s, i + row, 16, j, S::kStreamed), scores);
    multiply_tiles<C, S>(grads, grads_out, row, values, p.dv);
    weights.weigh(p, plan, seed, s, head, at, scores, grads, terms_of);
    weights.differentiate(plan, scores, grads, terms_of);
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[block][e] += grads[block][e];
    }
  }
  __syncthreads();

  // Rows or keys that the mask broadcasts over are added up in shared memory.
  float* const sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + threadIdx.x % 32 / 4 + 8 * half, c = block * 8 + threadIdx.x % 4 * 2;
      store_shared(sums + r * S::kPitch + c, Vector<float, 2>{{sum[block][2 * half], sum[block][2 * half + 1]}});
    }
  }
  __syncthreads();
  const bool one_row = p.mask_sizes[2] == 1, one_key = p.mask_sizes[3] == 1;
  const int height = one_row ? 1 : S::kRows, across = one_key ? 1 : S::kStreamed;
  for (int n = threadIdx.x; n < height * across; n += S::kThreads) {
    int r = n / across, c = n % across;
    // Where a warp reads two rows of 16, they are two apart: in different banks.
    if (S::kStreamed == 16 && !one_key) r = (r & ~3) | (r & 1) << 1 | (r >> 1 & 1);
    const int64_t i = own[2] * S::kRows + r, j = own[3] * S::kStreamed + c;
    if (i >= p.mask_sizes[2] || j >= p.mask_sizes[3]) continue;
    float total = 0.0f;
    for (int a = 0; a < (one_row ? S::kRows : 1); ++a) {
      for (int b = 0; b < (one_key ? S::kStreamed : 1); ++b) {
        // Along rows every thread begins elsewhere: in a bank of its own.
        total += load_shared(sums + (r + a) * S::kPitch + (one_key ? (b + r / 4) % S::kStreamed : c));
      }
    }
    const int64_t element = ((own[0] * p.mask_sizes[1] + own[1]) * p.mask_sizes[2] + i) * p.mask_sizes[3] + j;
    if (deal.partial != nullptr) {
      store_global(deal.partial + split * deal.elements + element, total);
    } else if (p.mask_dtype == Dtype::kFloat32) {
      store_element<float>(p, element, total);
    } else {
      store_element<T>(p, element, total);
    }
  }
}

template <class M>
__global__ void __launch_bounds__(kSumThreads) sum_splits(AttentionBackward p, MaskDeal deal) {
  const int64_t element = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (element >= deal.elements) return;
  float total = 0.0f;
  for (int split = 0; split < deal.splits; ++split)
    total += load_global(deal.partial + split * deal.elements + element);
  store_element<M>(p, element, total);
}

// Calls f with the arithmetic, the tiles' width and how the mask is dealt out.
template <class F>
void with_mask_deal(const AttentionBackward& p, F&& f) {
  with_arithmetic(p, [&](auto arithmetic) {
    with_width(std::max(p.d, p.dv), [&](auto width) {
      using S = MaskShape<decltype(arithmetic), decltype(width)::value>;
      const int64_t* const own = p.mask_sizes;
      const int64_t full[] = {p.batch, p.heads, p.lq, p.lk};
      const int tile[] = {1, 1, S::kRows, S::kStreamed};
      MaskDeal deal{};
      int64_t tiles = 1;
      deal.turns = deal.elements = 1;
      for (int d = 0; d < 4; ++d) {
        deal.extents[d] = Extent(own[d], full[d], tile[d]);
        tiles *= deal.extents[d].tiles;
        deal.turns *= deal.extents[d].turns;
        deal.elements *= own[d];
      }
      const int64_t wanted = 2 * multiprocessors() / tiles;
      deal.splits = static_cast<int>(std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, deal.turns)));
      f(arithmetic, width, deal, tiles * deal.splits);
    });
  });
}

}  // namespace

int64_t attention_mask_partial(const AttentionBackward& p) {
  int64_t count = 0;
  with_mask_deal(
      p, [&](auto, auto, const MaskDeal& deal, int64_t) { count = deal.splits > 1 ? deal.splits * deal.elements : 0; });
  return count;
}

void attention_mask_gradient(const AttentionBackward& p, const RowTerms* terms, float* partial, Stream stream) {
  with_mask_deal(p, [&](auto arithmetic, auto width, MaskDeal deal, int64_t blocks) {
    using C = decltype(arithmetic);
    using T = typename C::Storage;
    using S = MaskShape<C, decltype(width)::value>;
    if (deal.splits > 1) deal.partial = partial;
    launch({"attention_grad_mask", blocks_of(blocks), S::kThreads, stream, S::kShared},
           mask_gradient<C, decltype(width)::value>, p, backward_plan_of<T>(p), terms, deal);
    if (deal.splits == 1) return;
    const Grid grid{"attention_grad_mask_sum", blocks_of((deal.elements + kSumThreads - 1) / kSumThreads), kSumThreads,
                    stream};
    if (p.mask_dtype == Dtype::kFloat32) {
      launch(grid, sum_splits<float>, p, deal);
    } else {
      launch(grid, sum_splits<T>, p, deal);
    }
  });
}

}  // namespace fastnets::cuda

// Attention forward: tiles of keys stream through shared memory while every warp keeps 16 queries, their running
// maximum and sum, and their output in registers (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867;
// FlashAttention-2, https://arxiv.org/abs/2307.08691). Few queries: the keys are divided among blocks, whose results
// are put together afterwards (https://pytorch.org/blog/flash-decoding/). Also the softmax weights.
#include "attention.h"

namespace fastnets::cuda {
namespace {

struct TileShape {
  int warps, keys, slots;  // a slot is one tile of keys or of values
};

// By the bytes of a row in shared memory: queries and slots take 48, 96, 96, 96 KB, within the 99 KB that a block may
// have on 8.6, 8.9 and 12.0.
constexpr TileShape tile_shape(int row_bytes, bool few) {
  const TileShape many = row_bytes <= 256   ? TileShape{8, 64, 4}
                         : row_bytes <= 512 ? TileShape{8, 32, 2}
                                            : TileShape{4, 16, 2};
  return few ? TileShape{1, many.keys, row_bytes <= 512 ? 4 : 2} : many;
}

template <class C, int kWidth, bool few>
struct Shape {
  using T = typename C::Storage;
  static constexpr TileShape kShape = tile_shape(kWidth * sizeof(T), few);
  static constexpr int kWarps = kShape.warps, kKeys = kShape.keys, kSlots = kShape.slots;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kColumns = kWidth, kKeyBlocks = kKeys / 8, kColumnBlocks = kWidth / 8;  // accumulators' 8
  static constexpr int kSteps = kWidth / kDepth<C>;                                            // of the depth
  static constexpr bool kHoldsQueries = kWidth * sizeof(T) <= 256;                             // in registers
  using Queries = Tile<T, kRows, kWidth>;
  using Keys = Tile<T, kKeys, kWidth>;
  static constexpr size_t kShared = Queries::kBytes + kSlots * Keys::kBytes;
};

constexpr int kCombineThreads = 128;

// How the work is dealt out to the blocks of the grid.
struct Deal {
  int pack;    // query heads that share keys and values and a tile: its row r is query r / pack of head r % pack
  int splits;  // blocks that share a tile's keys
  int64_t tiles;
  float* partial;      // [splits, rows of lse, dv]: each split's output; null where there is one
  float* partial_lse;  // [splits, rows of lse]
};

// The rows of one tile of queries.
struct QueryTile {
  const Attention& p;
  Sequence s;
  int pack, head, first, rows;  // head: the first of the packed ones; rows: of the whole sequence, packed

  __device__ __forceinline__ bool exists(int r) const { return first + r < rows; }
  __device__ __forceinline__ int query(int r) const { return (first + r) / pack; }
  __device__ __forceinline__ int head_of(int r) const { return head + (first + r) % pack; }
  __device__ __forceinline__ int64_t at(const AttentionArray& x, int r) const {
    return s.memory * x.batch + head_of(r) * x.head + (s.row_q + query(r)) * x.row;
  }
  __device__ __forceinline__ int64_t at_lse(int r) const {
    return (s.memory * p.heads + head_of(r)) * p.lq + s.row_q + query(r);
  }
  // The keys that rows [r, r + count) see: [first, last).
  __device__ __forceinline__ int first_key(int r) const { return exists(r) ? s.first(query(r)) : 0; }
  __device__ __forceinline__ int last_key(int r, int count) const {
    return exists(r) ? s.last(min(query(r + count - 1), s.lq - 1)) : 0;
  }
  // Whether all of them see all of keys [j0, j0 + keys).
  __device__ __forceinline__ bool sees_all(int r, int count, int j0, int keys) const {
    return j0 - query(r + count - 1) >= s.lower && j0 + keys - 1 - query(r) < s.upper && j0 + keys <= s.lk;
  }
};

// One warp's 16 queries, in registers where there is room for them, and their products with a tile of keys.
template <class C, class S>
class Held {
 public:
  __device__ __forceinline__ Held(typename S::Queries tile, int row) : tile_(tile), row_(row) {}

  // Once the tile is there.
  __device__ __forceinline__ void load() {
    if constexpr (S::kHoldsQueries) {
#pragma unroll
      for (int k = 0; k < S::kSteps; ++k) read_q_.load(held_[k], tile_, row_, k * kDepth<C>);
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[S::kKeyBlocks][4], typename S::Keys keys, int64_t d) {
#pragma unroll
    for (int column = 0; column < S::kColumns; column += kColumnStep) {
      if (column >= d) break;
#pragma unroll
      for (int k = column / kDepth<C>; k < (column + kColumnStep) / kDepth<C>; ++k) {
        if constexpr (!S::kHoldsQueries) read_q_.load(held_[0], tile_, row_, k * kDepth<C>);
        const Fragment<C> a = to_fragment<C>(held_[S::kHoldsQueries ? k : 0]);
#pragma unroll
        for (int block = 0; block < S::kKeyBlocks; block += 2) {
          multiply(scores[block], scores[block + 1], a, read_k_(keys, block * 8, k * kDepth<C>));
        }
      }
    }
  }

 private:
  typename S::Queries tile_;
  int row_;
  const Reader<C, typename S::Queries, Side::kA> read_q_;
  const Reader<C, typename S::Keys, Side::kB> read_k_;
  uint32_t held_[S::kHoldsQueries ? S::kSteps : 1][4];
};

// Weights that dropout takes become zero; those that stay are not multiplied yet.
template <int Blocks>
__device__ __forceinline__ void drop(const Plan& plan, Seed seed, int batch, const Query (&query)[2], int j0,
                                     float (&weights)[Blocks][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t stay = kept_weights<Blocks>(plan, seed, batch, query[half], j0);
#pragma unroll
    for (int e = 0; e < 2 * Blocks; ++e) {
      if ((stay >> e & 1) == 0) weights[e / 2][2 * half + e % 2] = 0.0f;
    }
  }
}

// Scores become weights relative to the running maximum; the output and sum so far shrink to match.
template <int Blocks, int Columns>
__device__ __forceinline__ void absorb(float factor, float (&scores)[Blocks][4], float (&largest)[2], float (&sum)[2],
                                       float (&out)[Columns][4]) {
  float shift[2], shrink[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = largest[half];
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      top = fmaxf(top, fmaxf(scores[block][2 * half], scores[block][2 * half + 1]));
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(top, shuffle_xor(top, 2));
    shift[half] = fastnets::shift(top);
    shrink[half] = exp2_approx((largest[half] - shift[half]) * factor);
    largest[half] = top;
    sum[half] *= shrink[half];
  }
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[block][e] = exp2_approx((scores[block][e] - shift[e / 2]) * factor);
      sum[e / 2] += scores[block][e];
    }
  }
  if (__any_sync(kWholeWarp, shrink[0] != 1.0f || shrink[1] != 1.0f)) {  // rare once the largest scores were seen
#pragma unroll
    for (int block = 0; block < Columns; ++block) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[block][e] *= shrink[e / 2];
    }
  }
}

template <class C, int kWidth, bool General, bool few>
__global__ void __launch_bounds__(Shape<C, kWidth, few>::kThreads) forward(AttentionForward p, Plan plan, Deal deal) {
  using S = Shape<C, kWidth, few>;
  using T = typename C::Storage;
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, warp = thread / 32, own = warp * 16;

  // Which tile: the splits of a tile side by side, then the tiles of a head, whose keys and values stay in the cache.
  int64_t unit = blockIdx.x;
  const int split = static_cast<int>(unit % deal.splits);
  unit /= deal.splits;
  const int head = static_cast<int>(unit / deal.tiles) * deal.pack;
  const Piece piece = piece_of(p.starts_q, p.lq * deal.pack, p.batch, S::kRows, unit % deal.tiles);
  if (piece.batch < 0) return;
  QueryTile tile{p, sequence_of(p, piece.batch), deal.pack, head, 0, 0};
  tile.rows = tile.s.lq * deal.pack;
  // The last tile first: of causal queries it sees the most keys.
  tile.first = ((tile.rows + S::kRows - 1) / S::kRows - 1 - piece.tile) * S::kRows;
  const Sequence& s = tile.s;

  // Which keys.
  const int first_block = tile.first_key(0) / S::kKeys;
  const int blocks = max((tile.last_key(0, S::kRows) + S::kKeys - 1) / S::kKeys - first_block, 0);
  const int begin = first_block + static_cast<int>(int64_t{blocks} * split / deal.splits);
  const int count = first_block + static_cast<int>(int64_t{blocks} * (split + 1) / deal.splits) - begin;

  const Queries queries(memory);
  const auto slot = [&](int step) { return Keys(memory + Queries::kBytes + step % S::kSlots * Keys::kBytes); };
  const auto fetch = [&](const AttentionArray& x, int width, int64_t columns, int step) {
    if (step < 2 * count) {
      const int j0 = (begin + step / 2) * S::kKeys;
      const T* const data = static_cast<const T*>(x.data);
      const T* const base = data + s.memory * x.batch + head / p.groups * x.head + (s.row_k + j0) * x.row;
      copy_tile<S::kThreads>(slot(step), thread, width, static_cast<int>(columns), data,
                             [&](int r) { return j0 + r < s.lk ? base + r * x.row : nullptr; });
    }
    copy_async_commit();
  };
  {
    const T* const data = static_cast<const T*>(p.q.data);
    copy_tile<S::kThreads>(queries, thread, plan.width_q, static_cast<int>(p.d), data,
                           [&](int r) { return tile.exists(r) ? data + tile.at(p.q, r) : nullptr; });
  }
  // Steps alternate between keys and values; step s finds its tile in slot s % kSlots.
  static_assert(S::kSlots % 2 == 0);
  fetch(p.k, plan.width_k, p.d, 0);
#pragma unroll
  for (int step = 1; step < S::kSlots - 1; ++step) {
    if (step % 2 == 1) {
      fetch(p.v, plan.width_v, p.dv, step);
    } else {
      fetch(p.k, plan.width_k, p.d, step);
    }
  }

  const Reader<C, Keys, Side::kB, true, Order::kPaired> read_v;
  const int first_key = tile.first_key(own), last_key = tile.last_key(own, 16);
  const int rows[2] = {own + thread % 32 / 4, own + thread % 32 / 4 + 8};
  const int i[2] = {tile.query(rows[0]), tile.query(rows[1])};
  Query query[2] = {};
  Seed seed = {};
  if constexpr (General) {
#pragma unroll
    for (int half = 0; half < 2; ++half) query[half] = query_of(p, s, tile.head_of(rows[half]), i[half]);
    seed = seed_of(p);
  }
  const float factor = General ? 1.0f : plan.factor;

  Held<C, S> held(queries, own);
  float out[S::kColumnBlocks][4] = {};
  float largest[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {};
  for (int n = 0; n < count; ++n) {
    const int j0 = (begin + n) * S::kKeys;
    const bool needed = j0 < last_key && j0 + S::kKeys > first_key;  // by this warp
    copy_async_wait<S::kSlots - 2>();
    __syncthreads();
    fetch(p.v, plan.width_v, p.dv, 2 * n + S::kSlots - 1);
    if (n == 0) held.load();
    float scores[S::kKeyBlocks][4] = {};
    if (needed) {
      held.multiply_keys(scores, slot(2 * n), p.d);
      if constexpr (General) finish_scores<T>(p, plan, s, query, j0, scores);
      if (!tile.sees_all(own, 16, j0, S::kKeys)) hide(s, i, j0, scores);
      absorb(factor, scores, largest, sum, out);
      if constexpr (General) {
        if (p.dropout != 0) drop(plan, seed, s.batch, query, j0, scores);
      }
    }
    copy_async_wait<S::kSlots - 2>();
    __syncthreads();
    fetch(p.k, plan.width_k, p.d, 2 * n + S::kSlots);
    if (needed) {
      const Keys values = slot(2 * n + 1);
#pragma unroll
      for (int column = 0; column < kWidth; column += kColumnStep) {
        if (column >= p.dv) break;
#pragma unroll
        for (int k = 0; k < S::kKeys; k += kDepth<C>) {
          const Fragment<C> a = accumulators_as_a<C>(scores + k / 8);
#pragma unroll
          for (int c = column; c < column + kColumnStep; c += 16) {
            multiply(out[c / 8], out[c / 8 + 1], a, read_v(values, k, c));
          }
        }
      }
    }
  }
  copy_async_wait_all();  // none may arrive after the block's end

  T* const result = static_cast<T*>(p.out.data);
  const bool wide = plan.wide_out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half] + shuffle_xor(sum[half], 1);
    total += shuffle_xor(total, 2);
    const bool exists = tile.exists(rows[half]);
    const int row = exists ? rows[half] : 0;  // whose address can be computed
    const int64_t at = tile.at_lse(row);
    // In log2, as the scores are: the backward pass finds a weight of 1 again.
    const float lse = total == 0.0f ? kMinusInfinity : largest[half] * factor + log2f(total);
    const float inverse = total == 0.0f ? 0.0f : (General ? plan.kept : 1.0f) / total;
#pragma unroll
    for (int block = 0; block < S::kColumnBlocks; ++block) {
      out[block][2 * half] *= inverse;
      out[block][2 * half + 1] *= inverse;
    }
    const int64_t partial = split * (p.starts_q == nullptr ? p.batch : 1) * p.heads * p.lq + at;
    if (thread % 4 == 0 && exists) {
      store_global(deal.partial != nullptr ? deal.partial_lse + partial : static_cast<float*>(p.lse) + at, lse);
    }
#pragma unroll
    for (int block = 0; block < S::kColumnBlocks; block += 2) {
      if (block * 8 >= p.dv) break;
      const float *left = &out[block][2 * half], *right = &out[block + 1][2 * half];
      if (deal.partial != nullptr) {
        store_pair(deal.partial + partial * p.dv, block * 8, static_cast<int>(p.dv), exists, p.dv % 2 == 0, left,
                   right);
      } else {
        store_pair(result + tile.at(p.out, row), block * 8, static_cast<int>(p.dv), exists, wide, left, right);
      }
    }
  }
}

// Puts the splits' results together: a warp a row.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine(AttentionForward p, Deal deal) {
  const int64_t rows = p.batch * p.heads * p.lq;
  const int64_t row = int64_t{blockIdx.x} * (kCombineThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  float largest = kMinusInfinity, sum = 0.0f;
  for (int split = 0; split < deal.splits; ++split) {
    largest = fmaxf(largest, load_global(deal.partial_lse + split * rows + row));
  }
  const float by = shift(largest);
  for (int split = 0; split < deal.splits; ++split) {
    sum += exp2_approx(load_global(deal.partial_lse + split * rows + row) - by);
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  if (lane == 0) store_global(static_cast<float*>(p.lse) + row, sum == 0.0f ? kMinusInfinity : largest + log2f(sum));
  const int64_t i = row % p.lq, head = row / p.lq % p.heads, batch = row / p.lq / p.heads;
  T* const out = static_cast<T*>(p.out.data) + batch * p.out.batch + head * p.out.head + i * p.out.row;
  for (int column = lane; column < p.dv; column += 32) {
    float total = 0.0f;
    for (int split = 0; split < deal.splits; ++split) {
      const int64_t at = split * rows + row;
      const float weight = exp2_approx(load_global(deal.partial_lse + at) - by);
      total += weight * load_global(deal.partial + at * p.dv + column);
    }
    store_global(out + column, from_float<T>(total * inverse));
  }
}

// The softmax weights of a tile of queries and a share of the keys, from the rows' log-sum-exp.
template <class C, int kWidth>
__global__ void __launch_bounds__(Shape<C, kWidth, false>::kThreads) weights(AttentionWeights p, Plan plan, Deal deal) {
  using S = Shape<C, kWidth, false>;
  using T = typename C::Storage;
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, warp = thread / 32, own = warp * 16;
  int64_t unit = blockIdx.x;
  const int split = static_cast<int>(unit % deal.splits);
  unit /= deal.splits;
  const int head = static_cast<int>(unit / deal.tiles);
  const Piece piece = piece_of(nullptr, p.lq, p.batch, S::kRows, unit % deal.tiles);
  const QueryTile tile{p, sequence_of(p, piece.batch), 1, head, piece.tile * S::kRows, static_cast<int>(p.lq)};
  const Sequence& s = tile.s;
  const int blocks = (s.lk + S::kKeys - 1) / S::kKeys;
  const int begin = static_cast<int>(int64_t{blocks} * split / deal.splits);
  const int count = static_cast<int>(int64_t{blocks} * (split + 1) / deal.splits) - begin;

  const Queries queries(memory);
  const auto slot = [&](int n) { return Keys(memory + Queries::kBytes + n % S::kSlots * Keys::kBytes); };
  const auto fetch = [&](int n) {
    if (n < count) {
      const int j0 = (begin + n) * S::kKeys;
      const T* const data = static_cast<const T*>(p.k.data);
      const T* const base = data + s.memory * p.k.batch + head / p.groups * p.k.head + j0 * p.k.row;
      copy_tile<S::kThreads>(slot(n), thread, plan.width_k, static_cast<int>(p.d), data,
                             [&](int r) { return j0 + r < s.lk ? base + r * p.k.row : nullptr; });
    }
    copy_async_commit();
  };
  {
    const T* const data = static_cast<const T*>(p.q.data);
    copy_tile<S::kThreads>(queries, thread, plan.width_q, static_cast<int>(p.d), data,
                           [&](int r) { return tile.exists(r) ? data + tile.at(p.q, r) : nullptr; });
  }
#pragma unroll
  for (int n = 0; n < S::kSlots - 1; ++n) fetch(n);

  const int rows[2] = {own + thread % 32 / 4, own + thread % 32 / 4 + 8};
  const int i[2] = {tile.query(rows[0]), tile.query(rows[1])};
  const int first_key = tile.first_key(own), last_key = tile.last_key(own, 16);
  Query query[2];
  float by[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    query[half] = query_of(p, s, head, i[half]);
    const float* const lse = static_cast<const float*>(p.lse) + tile.at_lse(tile.exists(rows[half]) ? rows[half] : 0);
    by[half] = shift(load_global(lse));
  }
  const Seed seed = seed_of(p);
  Held<C, S> held(queries, own);
  for (int n = 0; n < count; ++n) {
    const int j0 = (begin + n) * S::kKeys;
    copy_async_wait<S::kSlots - 2>();
    __syncthreads();
    fetch(n + S::kSlots - 1);
    if (n == 0) held.load();
    float scores[S::kKeyBlocks][4] = {};
    if (j0 < last_key && j0 + S::kKeys > first_key) {
      held.multiply_keys(scores, slot(n), p.d);
      finish_scores<T>(p, plan, s, query, j0, scores);
      if (!tile.sees_all(own, 16, j0, S::kKeys)) hide(s, i, j0, scores);
#pragma unroll
      for (int block = 0; block < S::kKeyBlocks; ++block) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scores[block][e] = exp2_approx(scores[block][e] - by[e / 2]) * plan.kept;
      }
      if (p.dropout != 0) drop(plan, seed, s.batch, query, j0, scores);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool exists = tile.exists(rows[half]);
      T* const row = static_cast<T*>(p.weights) + tile.at_lse(exists ? rows[half] : 0) * p.lk + j0;
#pragma unroll
      for (int block = 0; block < S::kKeyBlocks; block += 2) {
        store_pair(row, block * 8, s.lk - j0, exists, plan.wide_out, &scores[block][2 * half],
                   &scores[block + 1][2 * half]);
      }
    }
  }
  copy_async_wait_all();
}

// ---- launching -------------------------------------------------------------------------------------------------

// Blocks that share a tile's keys, so that every multiprocessor gets one.
int splits_of(int64_t tiles, int64_t lk, int keys) {
  constexpr int64_t kLeastBlocks = 4;  // of keys, for a split: what the combining costs
  return static_cast<int>(
      std::clamp<int64_t>(multiprocessors() / tiles, 1, std::max<int64_t>(1, lk / (keys * kLeastBlocks))));
}

// How a call is dealt out. Queries that do not fill a tile share it with the other heads of their keys.
template <class C, int kWidth>
struct Dealing {
  bool few;
  Deal deal{};
  int64_t blocks;

  explicit Dealing(const AttentionForward& p) {
    using Many = Shape<C, kWidth, false>;
    using Few = Shape<C, kWidth, true>;
    deal.pack = p.starts_q == nullptr && p.lq < Many::kRows / 2 ? static_cast<int>(p.groups) : 1;
    few = p.starts_q == nullptr && p.lq * deal.pack <= Few::kRows;
    const int size = few ? Few::kRows : Many::kRows;
    deal.tiles = tiles_of(p.starts_q, p.lq * deal.pack, p.batch, size);
    blocks = deal.tiles * (p.heads / deal.pack);
    deal.splits = p.starts_q == nullptr ? splits_of(blocks, p.lk, Many::kKeys) : 1;
    blocks *= deal.splits;
  }

  int64_t partial_rows(const AttentionForward& p) const {
    return deal.splits > 1 ? deal.splits * p.batch * p.heads * p.lq : 0;
  }
};

template <class T>
bool is_wide(const AttentionArray& x, Dtype dtype, const Attention& p, int64_t columns) {
  return copy_width_of(x, dtype, p.starts_q != nullptr ? 1 : p.batch, p.heads) >= 8 && columns * sizeof(T) % 8 == 0;
}

template <class F>
void with_dealing(const AttentionForward& p, F&& f) {
  with_arithmetic(p, [&](auto arithmetic) {
    with_width(std::max(p.d, p.dv), [&](auto width) {
      using C = decltype(arithmetic);
      f(arithmetic, width, Dealing<C, decltype(width)::value>(p));
    });
  });
}

template <class C, int kWidth, bool General, bool few, class Parameters>
void launch_forward(const Parameters& p, const Plan& plan, const Deal& deal, int64_t blocks, Stream stream) {
  using S = Shape<C, kWidth, few>;
  launch({"attention_forward", blocks_of(blocks), S::kThreads, stream, S::kShared}, forward<C, kWidth, General, few>, p,
         plan, deal);
}

}  // namespace

size_t attention_workspace(const AttentionForward& p) {
  size_t bytes = 0;
  with_dealing(p,
               [&](auto, auto, const auto& dealing) { bytes = dealing.partial_rows(p) * (p.dv + 1) * sizeof(float); });
  return bytes;
}

void attention_forward(const AttentionForward& p, void* workspace, Stream stream) {
  with_dealing(p, [&](auto arithmetic, auto width, auto dealing) {
    using C = decltype(arithmetic);
    constexpr int kWidth = decltype(width)::value;
    Plan plan = plan_of(p);
    plan.wide_out = is_wide<typename C::Storage>(p.out, p.dtype, p, p.dv);
    Deal& deal = dealing.deal;
    if (deal.splits > 1) {
      deal.partial = static_cast<float*>(workspace);
      deal.partial_lse = deal.partial + dealing.partial_rows(p) * p.dv;
    }
    if (dealing.few) {
      launch_forward<C, kWidth, true, true>(p, plan, deal, dealing.blocks, stream);
    } else if (is_plain(p)) {
      launch_forward<C, kWidth, false, false>(p, plan, deal, dealing.blocks, stream);
    } else {
      launch_forward<C, kWidth, true, false>(p, plan, deal, dealing.blocks, stream);
    }
    if (deal.splits > 1) {
      constexpr int kRows = kCombineThreads / 32;
      const int64_t rows = p.batch * p.heads * p.lq;
      launch({"attention_combine", blocks_of((rows + kRows - 1) / kRows), kCombineThreads, stream},
             combine<typename C::Storage>, p, deal);
    }
  });
}

void attention_weights(const AttentionWeights& p, Stream stream) {
  with_arithmetic(p, [&](auto arithmetic) {
    with_width(p.d, [&](auto width) {
      using C = decltype(arithmetic);
      constexpr int kWidth = decltype(width)::value;
      using S = Shape<C, kWidth, false>;
      Plan plan = plan_of(p);
      plan.wide_out = p.lk * sizeof(typename C::Storage) % 8 == 0;
      Deal deal{};
      deal.tiles = tiles_of(nullptr, p.lq, p.batch, S::kRows);
      deal.splits = splits_of(deal.tiles * p.heads, p.lk, S::kKeys);
      launch({"attention_weights", blocks_of(deal.tiles * p.heads * deal.splits), S::kThreads, stream, S::kShared},
             weights<C, kWidth>, p, plan, deal);
    });
  });
}

}  // namespace fastnets::cuda

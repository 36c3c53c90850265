// Attention forward: tiles of keys stream through shared memory while every warp keeps 16 queries, their running
// maximum and sum, and their output in registers (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867;
// FlashAttention-2, https://arxiv.org/abs/2307.08691). Few queries: the keys are divided among blocks, whose results
// are put together afterwards (https://pytorch.org/blog/flash-decoding/). Also the softmax weights.
#include "attention.h"

namespace fastnets::cuda {
namespace {

// What a kernel is for: scores that are the products alone; with every option; of so few queries that memory bounds the
// time, with every option; the softmax weights.
enum class Use { kPlain, kGeneral, kFew, kWeights };

struct TileShape {
  int warps, row_tiles, parts;  // 16 row_tiles queries a warp; `parts` warps share them and divide the output's columns
  int keys, slots;              // a slot is one tile of keys or of values
};

// Queries and slots take 48 KB of shared memory where two blocks share a multiprocessor with 100 KB (8.6, 8.9, 12.0),
// at most 96 KB elsewhere. Warps of 32 queries read every fragment of keys and values for four products instead of two;
// other arithmetic and options leave no registers for it. 256 columns of output and the options would spill.
constexpr TileShape tile_shape(int width, int size, Use use) {
  const int row_bytes = width * size;
  const int keys = row_bytes <= 128 ? 64 : row_bytes <= 512 ? 32 : 16;
  if (use == Use::kFew) return {1, 1, 1, keys, row_bytes <= 512 ? 4 : 2};
  if (use == Use::kPlain && row_bytes == 128) return {4, 2, 1, 64, 4};
  if (use == Use::kPlain && row_bytes == 256 && size == 2) return {4, 2, 1, 32, 2};
  if (use == Use::kGeneral && width == 256) return {8, 1, 2, keys, 2};
  return {row_bytes <= 512 ? 8 : 4, 1, 1, keys, row_bytes <= 256 ? 4 : 2};
}

template <class C, int kWidth, Use use>
struct Shape {
  using T = typename C::Storage;
  static constexpr TileShape kShape = tile_shape(kWidth, sizeof(T), use);
  static constexpr int kWarps = kShape.warps, kRowTiles = kShape.row_tiles, kParts = kShape.parts;
  static constexpr int kKeys = kShape.keys, kSlots = kShape.slots;
  static constexpr int kThreads = 32 * kWarps, kWarpRows = 16 * kRowTiles, kRows = kWarpRows * kWarps / kParts;
  static constexpr int kColumns = kWidth, kKeyBlocks = kKeys / 8;                                   // accumulators' 8
  static constexpr int kSteps = kWidth / kDepth<C>;                                                 // of the depth
  static constexpr bool kHoldsQueries = use != Use::kFew && kWidth * sizeof(T) * kRowTiles <= 256;  // in registers
  using Queries = Tile<T, kRows, kWidth>;
  using Keys = Tile<T, kKeys, kWidth>;
  static constexpr size_t kShared = Queries::kBytes + kSlots * Keys::kBytes;
};

constexpr int kCombineThreads = 128;

// How the work is dealt out to the blocks of the grid.
struct Deal {
  int pack;    // query heads that share keys and values and a tile: its row r is query r / pack of head r % pack
  int splits;  // blocks that share a tile's keys: the grid's y
  int64_t tiles;
  float* partial;      // [splits, rows of lse, dv]: each split's output; null where there is one
  float* partial_lse;  // [splits, rows of lse]
};

struct Span {
  int begin, end;
  __device__ __forceinline__ bool has(int j) const { return j >= begin && j < end; }
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
  // Where a block of `keys` keys has to begin for all of them to see all of it.
  __device__ __forceinline__ Span sees_all(int r, int count, int keys) const {
    return {query(r + count - 1) + s.lower, min(query(r) + s.upper, s.lk) - keys + 1};
  }
};

// One warp's queries, in registers where there is room for them, and their products with a tile of keys.
template <class C, class S>
class Held {
 public:
  __device__ __forceinline__ Held(typename S::Queries tile, int row) : tile_(tile), row_(row) {}

  // Once the tile is there.
  __device__ __forceinline__ void load() {
    if constexpr (S::kHoldsQueries) {
#pragma unroll
      for (int k = 0; k < S::kSteps; ++k) load(held_[k], k);
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[S::kRowTiles][S::kKeyBlocks][4], typename S::Keys keys,
                                                int64_t d) {
#pragma unroll
    for (int column = 0; column < S::kColumns; column += kColumnStep) {
      if (column >= d) break;
#pragma unroll
      for (int k = column / kDepth<C>; k < (column + kColumnStep) / kDepth<C>; ++k) {
        if constexpr (!S::kHoldsQueries) load(held_[0], k);
        Fragment<C> a[S::kRowTiles];
#pragma unroll
        for (int r = 0; r < S::kRowTiles; ++r) a[r] = to_fragment<C>(held_[S::kHoldsQueries ? k : 0][r]);
#pragma unroll
        for (int block = 0; block < S::kKeyBlocks; block += 2) {
          const Fragment<C> b = read_k_(keys, block * 8, k * kDepth<C>);
#pragma unroll
          for (int r = 0; r < S::kRowTiles; ++r) multiply(scores[r][block], scores[r][block + 1], a[r], b);
        }
      }
    }
  }

 private:
  __device__ __forceinline__ void load(uint32_t (&registers)[S::kRowTiles][4], int k) {
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) read_q_.load(registers[r], tile_, row_ + 16 * r, k * kDepth<C>);
  }

  typename S::Queries tile_;
  int row_;
  const Reader<C, typename S::Queries, Side::kA> read_q_;
  const Reader<C, typename S::Keys, Side::kB> read_k_;
  uint32_t held_[S::kHoldsQueries ? S::kSteps : 1][S::kRowTiles][4];
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

// Scores become weights relative to the running maximum, both in log2 after multiplying with `factor`; the output and
// sum so far shrink to match.
template <int Blocks, int Columns>
__device__ __forceinline__ void absorb(float factor, float (&scores)[Blocks][4], float (&largest)[2], float (&sum)[2],
                                       float (&out)[Columns][4]) {
  float by[2], shrink[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = kMinusInfinity;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
      top = fmaxf(top, fmaxf(scores[block][2 * half], scores[block][2 * half + 1]));
    }
    top = fmaxf(top, shuffle_xor(top, 1));
    top = fmaxf(largest[half], fmaxf(top, shuffle_xor(top, 2)) * factor);
    by[half] = shift(top);
    shrink[half] = exp2_approx(largest[half] - by[half]);
    largest[half] = top;
    sum[half] *= shrink[half];
  }
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      scores[block][e] = exp2_approx(fmaf(scores[block][e], factor, -by[e / 2]));
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

template <class C, int kWidth, Use use>
__global__ void __launch_bounds__(Shape<C, kWidth, use>::kThreads, 1)
    forward(AttentionForward p, Plan plan, Deal deal) {
  constexpr bool General = use != Use::kPlain;
  using S = Shape<C, kWidth, use>;
  constexpr int kPartColumns = kWidth / S::kParts, kColumnBlocks = kPartColumns / 8;  // of the output, a warp's
  using T = typename C::Storage;
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, warp = thread / 32;
  const int own = warp / S::kParts * S::kWarpRows, first_column = warp % S::kParts * kPartColumns;

  // Which tile: those of a head side by side, since its keys and values stay in the cache.
  const int head = static_cast<int>(blockIdx.x / deal.tiles) * deal.pack, kv_head = head / static_cast<int>(p.groups);
  const Piece piece = piece_of(p.starts_q, p.lq * deal.pack, p.batch, S::kRows, blockIdx.x % deal.tiles);
  if (piece.batch < 0) return;
  QueryTile tile{p, sequence_of(p, piece.batch), deal.pack, head, 0, 0};
  tile.rows = tile.s.lq * deal.pack;
  // The last tile first: of causal queries it sees the most keys.
  tile.first = ((tile.rows + S::kRows - 1) / S::kRows - 1 - piece.tile) * S::kRows;
  const Sequence& s = tile.s;

  // Which keys.
  const int first_block = tile.first_key(0) / S::kKeys;
  const int blocks = max((tile.last_key(0, S::kRows) + S::kKeys - 1) / S::kKeys - first_block, 0);
  const int begin = first_block + static_cast<int>(int64_t{blocks} * blockIdx.y / gridDim.y);
  const int count = first_block + static_cast<int>(int64_t{blocks} * (blockIdx.y + 1) / gridDim.y) - begin;

  const Queries queries(memory);
  const auto slot = [&](int step) { return Keys(memory + Queries::kBytes + step % S::kSlots * Keys::kBytes); };
  const auto fetch = [&](const AttentionArray& x, int width, int64_t columns, int step) {
    if (step < 2 * count) {
      const int j0 = (begin + step / 2) * S::kKeys;
      const T* const data = static_cast<const T*>(x.data);
      const T* const base = data + s.memory * x.batch + kv_head * x.head + (s.row_k + j0) * x.row;
      copy_rows<S::kThreads>(slot(step), thread, width, static_cast<int>(columns), data, base, x.row, s.lk - j0);
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
  const int first_key = tile.first_key(own), last_key = tile.last_key(own, S::kWarpRows);
  const Span whole = tile.sees_all(own, S::kWarpRows, S::kKeys);
  int rows[S::kRowTiles][2], i[S::kRowTiles][2];
  Query query[S::kRowTiles][2] = {};
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[r][half] = own + 16 * r + thread % 32 / 4 + 8 * half;
      i[r][half] = tile.query(rows[r][half]);
      if constexpr (General) query[r][half] = query_of(p, s, tile.head_of(rows[r][half]), i[r][half]);
    }
  }
  const Seed seed = General ? seed_of(p) : Seed{};
  const float factor = General ? 1.0f : plan.factor;

  Held<C, S> held(queries, own);
  float out[S::kRowTiles][kColumnBlocks][4] = {}, largest[S::kRowTiles][2], sum[S::kRowTiles][2] = {};
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) largest[r][0] = largest[r][1] = kMinusInfinity;
  for (int n = 0; n < count; ++n) {
    const int j0 = (begin + n) * S::kKeys;
    const bool needed = j0 < last_key && j0 + S::kKeys > first_key;  // by this warp
    copy_async_wait<S::kSlots - 2>();
    __syncthreads();
    fetch(p.v, plan.width_v, p.dv, 2 * n + S::kSlots - 1);
    if (n == 0) held.load();
    float scores[S::kRowTiles][S::kKeyBlocks][4];
    if (needed) {
#pragma unroll
      for (int x = 0; x < S::kRowTiles * S::kKeyBlocks * 4; ++x)
        scores[x / 4 / S::kKeyBlocks][x / 4 % S::kKeyBlocks][x % 4] = 0.0f;
      held.multiply_keys(scores, slot(2 * n), p.d);
      const bool hidden = !whole.has(j0);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
        if constexpr (General) finish_scores<T>(p, plan, s, query[r], j0, scores[r]);
        if (hidden) hide(s, i[r], j0, scores[r]);
        absorb(factor, scores[r], largest[r], sum[r], out[r]);
        if constexpr (General) {
          if (p.dropout != 0) drop(plan, seed, s.batch, query[r], j0, scores[r]);
        }
      }
    }
    copy_async_wait<S::kSlots - 2>();
    __syncthreads();
    fetch(p.k, plan.width_k, p.d, 2 * n + S::kSlots);
    if (needed) {
      // Whole multiples of 128 bytes, within which chunks change places.
      static_assert(S::kParts == 1 || kPartColumns * sizeof(T) % 128 == 0);
      const Keys values(slot(2 * n + 1).data + first_column * sizeof(T));
#pragma unroll
      for (int column = 0; column < kPartColumns; column += kColumnStep) {
        if (first_column + column >= p.dv) break;
#pragma unroll
        for (int k = 0; k < S::kKeys; k += kDepth<C>) {
          Fragment<C> a[S::kRowTiles];
#pragma unroll
          for (int r = 0; r < S::kRowTiles; ++r) a[r] = accumulators_as_a<C>(scores[r] + k / 8);
#pragma unroll
          for (int c = column; c < column + kColumnStep; c += 16) {
            const Fragment<C> b = read_v(values, k, c);
#pragma unroll
            for (int r = 0; r < S::kRowTiles; ++r) multiply(out[r][c / 8], out[r][c / 8 + 1], a[r], b);
          }
        }
      }
    }
  }
  copy_async_wait_all();  // none may arrive after the block's end

  T* const result = static_cast<T*>(p.out.data);
  const int columns = static_cast<int>(p.dv);
#pragma unroll
  for (int x = 0; x < 2 * S::kRowTiles; ++x) {
    const int r = x / 2, half = x % 2;
    float total = sum[r][half] + shuffle_xor(sum[r][half], 1);
    total += shuffle_xor(total, 2);
    const bool exists = tile.exists(rows[r][half]);
    const int row = exists ? rows[r][half] : 0;  // whose address can be computed
    // In log2, as the scores are: the backward pass finds a weight of 1 again.
    const float lse = total == 0.0f ? kMinusInfinity : largest[r][half] + log2f(total);
    const float inverse = total == 0.0f ? 0.0f : (General ? plan.kept : 1.0f) / total;
#pragma unroll
    for (int block = 0; block < kColumnBlocks; ++block) {
      out[r][block][2 * half] *= inverse;
      out[r][block][2 * half + 1] *= inverse;
    }
    const int64_t at = tile.at_lse(row), partial = int64_t{blockIdx.y} * p.batch * p.heads * p.lq + at;
    if (thread % 4 == 0 && exists && first_column == 0) {
      store_global(deal.partial != nullptr ? deal.partial_lse + partial : static_cast<float*>(p.lse) + at, lse);
    }
#pragma unroll
    for (int block = 0; block < kColumnBlocks; block += 2) {
      const int column = first_column + block * 8;
      if (column >= columns) break;
      const float *left = &out[r][block][2 * half], *right = &out[r][block + 1][2 * half];
      if (deal.partial != nullptr) {
        store_pair(deal.partial + partial * columns, column, columns, exists, columns % 2 == 0, left, right);
      } else {
        store_pair(result + tile.at(p.out, row), column, columns, exists, plan.wide_out, left, right);
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
__global__ void __launch_bounds__(Shape<C, kWidth, Use::kWeights>::kThreads, 1)
    weights(AttentionWeights p, Plan plan, Deal deal) {
  using S = Shape<C, kWidth, Use::kWeights>;
  using T = typename C::Storage;
  using Queries = typename S::Queries;
  using Keys = typename S::Keys;
  DYNAMIC_SHARED(memory);
  const int thread = threadIdx.x, warp = thread / 32, own = warp * 16;
  const int head = static_cast<int>(blockIdx.x / deal.tiles), kv_head = head / static_cast<int>(p.groups);
  const Piece piece = piece_of(nullptr, p.lq, p.batch, S::kRows, blockIdx.x % deal.tiles);
  const QueryTile tile{p, sequence_of(p, piece.batch), 1, head, piece.tile * S::kRows, static_cast<int>(p.lq)};
  const Sequence& s = tile.s;
  const int blocks = (s.lk + S::kKeys - 1) / S::kKeys;
  const int begin = static_cast<int>(int64_t{blocks} * blockIdx.y / gridDim.y);
  const int count = static_cast<int>(int64_t{blocks} * (blockIdx.y + 1) / gridDim.y) - begin;

  const Queries queries(memory);
  const auto slot = [&](int n) { return Keys(memory + Queries::kBytes + n % S::kSlots * Keys::kBytes); };
  const auto fetch = [&](int n) {
    if (n < count) {
      const int j0 = (begin + n) * S::kKeys;
      const T* const data = static_cast<const T*>(p.k.data);
      const T* const base = data + s.memory * p.k.batch + kv_head * p.k.head + j0 * p.k.row;
      copy_rows<S::kThreads>(slot(n), thread, plan.width_k, static_cast<int>(p.d), data, base, p.k.row, s.lk - j0);
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
  const Span whole = tile.sees_all(own, 16, S::kKeys);
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
    float products[1][S::kKeyBlocks][4] = {};
    float (&scores)[S::kKeyBlocks][4] = products[0];
    if (j0 < last_key && j0 + S::kKeys > first_key) {
      held.multiply_keys(products, slot(n), p.d);
      finish_scores<T>(p, plan, s, query, j0, scores);
      if (!whole.has(j0)) hide(s, i, j0, scores);
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

// Where memory bounds the time, TF32 gains nothing.
template <class C>
using Exact = std::conditional_t<std::is_same_v<C, Tf32>, Fp32, C>;

// How a call is dealt out. Queries that do not fill a tile share it with the other heads of their keys.
template <class C, int kWidth>
struct Dealing {
  Use use;
  Deal deal{};
  int64_t blocks;  // the grid's x

  explicit Dealing(const AttentionForward& p) {
    using Plain = Shape<C, kWidth, Use::kPlain>;
    using General = Shape<C, kWidth, Use::kGeneral>;
    using Few = Shape<Exact<C>, kWidth, Use::kFew>;
    const bool plain = is_plain(p);
    int rows = plain ? Plain::kRows : General::kRows;
    deal.pack = p.starts_q == nullptr && p.lq < rows / 2 ? static_cast<int>(p.groups) : 1;
    const bool few = p.starts_q == nullptr && p.lq * deal.pack <= Few::kRows;
    use = few ? Use::kFew : plain ? Use::kPlain : Use::kGeneral;
    if (few) rows = Few::kRows;
    deal.tiles = tiles_of(p.starts_q, p.lq * deal.pack, p.batch, rows);
    blocks = deal.tiles * (p.heads / deal.pack);
    deal.splits = p.starts_q == nullptr ? splits_of(blocks, p.lk, General::kKeys) : 1;
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

template <class C, int kWidth, Use use>
void launch_forward(const AttentionForward& p, const Plan& plan, const Deal& deal, int64_t blocks, Stream stream) {
  using S = Shape<C, kWidth, use>;
  const dim3 grid(blocks_of(blocks), deal.splits);
  launch({"attention_forward", grid, S::kThreads, stream, S::kShared}, forward<C, kWidth, use>, p, plan, deal);
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
    switch (dealing.use) {
      case Use::kPlain: launch_forward<C, kWidth, Use::kPlain>(p, plan, deal, dealing.blocks, stream); break;
      case Use::kGeneral: launch_forward<C, kWidth, Use::kGeneral>(p, plan, deal, dealing.blocks, stream); break;
      default: launch_forward<Exact<C>, kWidth, Use::kFew>(p, plan, deal, dealing.blocks, stream);
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
      using C = Exact<decltype(arithmetic)>;
      constexpr int kWidth = decltype(width)::value;
      using S = Shape<C, kWidth, Use::kWeights>;
      Plan plan = plan_of(p);
      plan.wide_out = p.lk * sizeof(typename C::Storage) % 8 == 0;
      Deal deal{};
      deal.tiles = tiles_of(nullptr, p.lq, p.batch, S::kRows);
      deal.splits = splits_of(deal.tiles * p.heads, p.lk, S::kKeys);
      const dim3 grid(blocks_of(deal.tiles * p.heads), deal.splits);
      launch({"attention_weights", grid, S::kThreads, stream, S::kShared}, weights<C, kWidth>, p, plan, deal);
    });
  });
}

}  // namespace fastnets::cuda

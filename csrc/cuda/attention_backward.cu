// Attention backward: the gradients of q, k and v. Each is summed up by the block that owns its rows, in a fixed order,
// while the other side's tiles stream by through asynchronous copies. Where the bits may differ from run to run, blocks
// of keys add to q's gradient as well, with atomics: five products of tiles instead of seven.
#include "attention_backward.h"

namespace fastnets::cuda {
namespace {

constexpr int kTermsThreads = 128;

// Dealing out a side's rows: tiles of all sequences times the heads. Blocks of keys are `Tight`: with twice as many
// queries at a time their kernels without options spill on 12.0.
template <class C, int kWidth, bool General, Own own>
struct GradShape : BackwardShape<C, kWidth, 128, own == Own::kKeys> {
  using S = BackwardShape<C, kWidth, 128, own == Own::kKeys>;
  // 128 columns of two gradients are as many accumulators as a thread has registers for: more are divided between
  // warps, who then find the same weights.
  static constexpr int kParts = own == Own::kKeys && kWidth > 128 ? 2 : 1;
  static constexpr int kWarps = S::kRows / 16 * kParts, kThreads = 32 * kWarps;
  static constexpr int kPartColumns = kWidth / kParts;
  static constexpr int kSlotBytes = 2 * S::StreamedTile::kBytes;
  static constexpr int kTermsBytes = own == Own::kKeys ? S::kStreamed * sizeof(RowTerms) : 0;
  static constexpr size_t kShared = 2 * S::OwnTile::kBytes + S::kSlots * (kSlotBytes + kTermsBytes);
};

// sum[16, columns] += weights[16, streamed] times a streamed tile.
template <class C, class S>
__device__ __forceinline__ void accumulate(float (&sum)[S::kPartColumns / 8][4], const float (&weights)[S::kBlocks][4],
                                           typename S::StreamedTile streamed, int64_t columns) {
  const Reader<C, typename S::StreamedTile, Side::kB, true, Order::kPaired> read;
#pragma unroll
  for (int column = 0; column < S::kPartColumns; column += kColumnStep) {
    if (column >= columns) break;
#pragma unroll
    for (int k = 0; k < S::kStreamed; k += kDepth<C>) {
      const Fragment<C> a = accumulators_as_a<C>(weights + k / 8);
#pragma unroll
      for (int c = column; c < column + kColumnStep; c += 16) {
        multiply(sum[c / 8], sum[c / 8 + 1], a, read(streamed, k, c));
      }
    }
  }
}

// Stores a warp's sums times `factor` to the rows that exist.
template <class T, int Columns>
__device__ __forceinline__ void store_sums(T* data, int64_t row_stride, const bool (&exists)[2], int columns, bool wide,
                                           float factor, float (&sum)[Columns / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* const row = data + (exists[half] ? threadIdx.x % 32 / 4 + 8 * half : 0) * row_stride;
#pragma unroll
    for (int block = 0; block < Columns / 8; block += 2) {
      if (block * 8 >= columns) break;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[block][2 * half + e] *= factor;
        sum[block + 1][2 * half + e] *= factor;
      }
      store_pair(row, block * 8, columns, exists[half], wide, &sum[block][2 * half], &sum[block + 1][2 * half]);
    }
  }
}

// The gradients of a tile's scores, handed from warps that own keys to warps that sum up queries: they take the place
// of the streamed tiles. Of 16 bits [keys, queries], for ldmatrix to transpose; of 32 bits, which it cannot,
// [queries, keys].
template <class C, class S>
struct SharedGrads {
  using T = typename C::Storage;
  static constexpr bool kTransposed = sizeof(T) == 2;
  using TileType = Tile<T, kTransposed ? S::kRows : S::kStreamed, kTransposed ? S::kStreamed : S::kRows>;
  static_assert(TileType::kBytes <= S::kSlotBytes);

  static __device__ __forceinline__ void store(TileType tile, int row, const float (&grads)[S::kBlocks][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < S::kBlocks; ++block) {
      if constexpr (kTransposed) {
        store_accumulators(tile, row, block * 8, grads[block]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          store_shared(tile.at(block * 8 + lane % 4 * 2 + e % 2, row + lane / 4 + e / 2 * 8), grads[block][e]);
        }
      }
    }
  }
};

// Adds to q's gradient what a tile of keys gives the streamed queries [from, from + the tile's): a warp computes 16
// queries and a share of the columns.
template <class C, class S>
__device__ __forceinline__ void add_queries(const AttentionBackward& p, const QuerySums& sums, const Sequence& s,
                                            int head, int from, typename SharedGrads<C, S>::TileType grads,
                                            typename S::OwnTile keys) {
  using G = SharedGrads<C, S>;
  constexpr int kGroups = S::kStreamed / 16, kEven = S::kColumns * kGroups / S::kWarps;
  constexpr int kShare = kEven < 16 ? 16 : kEven;  // too many warps: the last have no columns
  constexpr int kStep = kShare < kColumnStep ? kShare : kColumnStep;
  const Reader<C, typename G::TileType, Side::kA, G::kTransposed> read_grads;
  const Reader<C, typename S::OwnTile, Side::kB, true> read_keys;
  const int warp = threadIdx.x / 32, row = warp % kGroups * 16, share = warp / kGroups * kShare;
  if (from + row >= s.lq) return;
  float* const to = sums.at(p, s, head, from + row, share / 8);
#pragma unroll
  for (int column = 0; column < kShare; column += kStep) {
    if (share + column >= p.d) break;
    float sum[kStep / 8][4] = {};
#pragma unroll(sizeof(typename C::Storage) == 2 ? 8 : 1)
    for (int k = 0; k < S::kRows; k += kDepth<C>) {
      const Fragment<C> a = read_grads(grads, G::kTransposed ? k : row, G::kTransposed ? row : k);
#pragma unroll
      for (int c = 0; c < kStep; c += 16) {
        multiply(sum[c / 8], sum[c / 8 + 1], a, read_keys(keys, k, share + column + c));
      }
    }
#pragma unroll
    for (int block = 0; block < kStep / 8; ++block) {
      add_accumulators(to + (column / 8 + block) * QuerySums::kFloats, sum[block]);
    }
  }
}

// Finds what the softmax's gradient subtracts from a tile that sees whole rows, and leaves it at `at`, of the
// sequence's first row, for the kernels that follow.
template <int Blocks>
__device__ __forceinline__ void subtract_own(const AttentionBackward& p, const float (&weights)[Blocks][4],
                                             const float (&grads)[Blocks][4], RowTerms* terms, int64_t at, int row,
                                             int last, TwoRows& own) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f, dot = 0.0f;
#pragma unroll
    for (int block = 0; block < Blocks; ++block) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        sum += weights[block][e];
        dot += weights[block][e] * grads[block][e];
      }
    }
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      sum += shuffle_xor(sum, step);
      dot += shuffle_xor(dot, step);
    }
    const int i = row + 8 * half;
    RowTerms& found = own.terms[half];
    found.subtract = sum == 0.0f ? 0.0f : dot / sum;
    if (p.grad_lse != nullptr) {
      found.subtract -= load_global(static_cast<const float*>(p.grad_lse) + at + min(i, last));
    }
    if (threadIdx.x % 4 == 0 && i <= last) store_terms(terms + at + i, found);
  }
}

template <class C, int kWidth, bool General, Own own>
__global__ void __launch_bounds__(GradShape<C, kWidth, General, own>::kThreads, 1)
    gradients(AttentionBackward p, BackwardPlan plan, RowTerms* terms, int64_t tiles) {
  using S = GradShape<C, kWidth, General, own>;
  using T = typename C::Storage;
  using OwnTile = typename S::OwnTile;
  using StreamedTile = typename S::StreamedTile;
  constexpr bool kOwnsKeys = own == Own::kKeys;
  DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / 32, row = warp % (S::kRows / 16) * 16, part = warp / (S::kRows / 16);

  // Which rows.
  const int64_t* const starts = kOwnsKeys ? p.starts_k : p.starts_q;
  const int own_head = static_cast<int>(blockIdx.x / tiles);
  const Piece piece = piece_of(starts, kOwnsKeys ? p.lk : p.lq, p.batch, S::kRows, blockIdx.x % tiles);
  if (piece.batch < 0) return;
  const Sequence s = sequence_of(p, piece.batch);
  const bool adds = plan.adds_queries(s);
  if (!kOwnsKeys && adds) return;
  const int own_length = kOwnsKeys ? s.lk : s.lq;
  // Of causal queries the last see the most keys, of keys the first are seen the most.
  const int own_tile = kOwnsKeys ? piece.tile : (own_length + S::kRows - 1) / S::kRows - 1 - piece.tile;
  const int first = own_tile * S::kRows, last = min(first + S::kRows, own_length) - 1;

  // Which of the other side's rows, of every head that shares this one's keys.
  int begin, end;
  if constexpr (kOwnsKeys) {
    begin = s.first_query(first);
    end = s.last_query(last);
  } else {
    begin = s.first(first);
    end = s.last(last);
  }
  begin = begin / S::kStreamed * S::kStreamed;
  const int each = max((end - begin + S::kStreamed - 1) / S::kStreamed, 0), groups = static_cast<int>(p.groups);
  const int count = kOwnsKeys ? each * groups : each;
  struct Streamed {
    int head, from;
  };
  const Streamed first_streamed{kOwnsKeys ? own_head * groups : own_head / groups, begin};
  const auto advance = [&](Streamed& at) {
    at.from += S::kStreamed;
    if (kOwnsKeys && at.from >= end) at = {at.head + 1, begin};
  };

  const OwnTile own_1(memory), own_2(memory + OwnTile::kBytes);
  unsigned char* const slots = memory + 2 * OwnTile::kBytes;
  const auto slot = [&](int n) { return slots + n % S::kSlots * S::kSlotBytes; };
  const auto terms_slot = [&](int n) {
    return reinterpret_cast<RowTerms*>(slots + S::kSlots * S::kSlotBytes) + n % S::kSlots * S::kStreamed;
  };
  Streamed fetched = first_streamed, at = first_streamed;
  const auto fetch = [&](int n) {
    if (n < count) {
      const auto [head, from] = fetched;
      const StreamedTile tile_1(slot(n)), tile_2(slot(n) + StreamedTile::kBytes);
      if constexpr (kOwnsKeys) {
        fetch_rows<S::kThreads>(tile_1, p.q, plan.width_q, p.d, s.memory, head, s.row_q, from, s.lq);
        fetch_rows<S::kThreads>(tile_2, p.grad_out, plan.width_grad, p.dv, s.memory, head, s.row_q, from, s.lq);
        const int r = threadIdx.x;
        if (r < S::kStreamed) {
          const bool exists = from + r < s.lq;
          const RowTerms* const at = terms + (s.memory * p.heads + head) * p.lq + s.row_q + from + r;
          copy_async<sizeof(RowTerms)>(terms_slot(n) + r, exists ? at : terms, exists ? sizeof(RowTerms) : 0);
        }
      } else {
        fetch_rows<S::kThreads>(tile_1, p.k, plan.width_k, p.d, s.memory, head, s.row_k, from, s.lk);
        fetch_rows<S::kThreads>(tile_2, p.v, plan.width_v, p.dv, s.memory, head, s.row_k, from, s.lk);
      }
      advance(fetched);
    }
    copy_async_commit();
  };
  if constexpr (kOwnsKeys) {
    fetch_rows<S::kThreads>(own_1, p.k, plan.width_k, p.d, s.memory, own_head, s.row_k, first, s.lk);
    fetch_rows<S::kThreads>(own_2, p.v, plan.width_v, p.dv, s.memory, own_head, s.row_k, first, s.lk);
  } else {
    fetch_rows<S::kThreads>(own_1, p.q, plan.width_q, p.d, s.memory, own_head, s.row_q, first, s.lq);
    fetch_rows<S::kThreads>(own_2, p.grad_out, plan.width_grad, p.dv, s.memory, own_head, s.row_q, first, s.lq);
  }

  const int lane_row = first + row + threadIdx.x % 32 / 4;                  // and 8 further
  const int64_t own_at = (s.memory * p.heads + own_head) * p.lq + s.row_q;  // of the sequence's first row
  TwoRows own_terms = {};
  if constexpr (!kOwnsKeys) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own_terms.terms[half] = load_terms(terms + own_at + min(lane_row + 8 * half, last));
    }
  }
  const Seed seed = General ? seed_of(p) : Seed{};

  float sum_1[S::kPartColumns / 8][4] = {};                  // of k's gradient, or q's
  float sum_2[kOwnsKeys ? S::kPartColumns / 8 : 1][4] = {};  // of v's
  const int offset = part * S::kPartColumns;                 // the first column of this warp's
#pragma unroll 1
  for (int n = 1 - S::kSlots; n < count; ++n) {
    if constexpr (S::kSlots == 1) {
      __syncthreads();  // nobody reads the former tiles
      fetch(n);
      copy_async_wait<0>();
      __syncthreads();
    } else {
      if (n >= 0) {
        copy_async_wait<S::kSlots - 2>();
        __syncthreads();
      }
      fetch(n + S::kSlots - 1);
      if (n < 0) continue;
    }
    const int head = kOwnsKeys ? at.head : own_head, from = at.from;
    advance(at);
    const int i = kOwnsKeys ? from : first + row, j = kOwnsKeys ? first + row : from;
    constexpr int kQueries = kOwnsKeys ? S::kStreamed : 16, kKeys = kOwnsKeys ? 16 : S::kStreamed;
    const bool needed = sees_any(s, i, kQueries, j, kKeys);  // by this warp
    if (!needed && !(kOwnsKeys && adds)) continue;

    const StreamedTile tile_1(slot(n)), tile_2(slot(n) + StreamedTile::kBytes);
    const Places<own> places(first + row, from);
    float scores[S::kBlocks][4] = {}, grads[S::kBlocks][4] = {};
    if (needed) {
      Weights<C, S, own, General> weights;
      multiply_tiles<C, S>(scores, own_1, row, tile_1, p.d);
      weights.finish(p, plan, s, head, places, sees_all(s, i, kQueries, j, kKeys), scores);
      multiply_tiles<C, S>(grads, own_2, row, tile_2, p.dv);
      const auto terms_of = [&](int block) -> TwoRows {
        if constexpr (!kOwnsKeys) return own_terms;
        const RowTerms* const two = terms_slot(n) + block * 8 + threadIdx.x % 4 * 2;
        const Vector<float, 4> four = load_shared<4>(reinterpret_cast<const float*>(two));
        return {{{four[0], four[1]}, {four[2], four[3]}}};
      };
      weights.weigh(p, plan, seed, s, head, places, scores, grads, terms_of);
      if constexpr (!kOwnsKeys) {
        if (plan.sees_whole_rows(s)) {
          subtract_own(p, scores, grads, terms, own_at, lane_row, last, own_terms);
        }
      }
      weights.differentiate(plan, scores, grads, terms_of);
      weights.uncap(plan, grads);
      if constexpr (kOwnsKeys) {
        accumulate<C, S>(sum_2, scores, StreamedTile(tile_2.data + offset * sizeof(T)), p.dv - offset);
      }
      accumulate<C, S>(sum_1, grads, StreamedTile(tile_1.data + offset * sizeof(T)), p.d - offset);
    }
    if constexpr (kOwnsKeys) {
      if (!adds) continue;
      using Grads = SharedGrads<C, S>;
      const typename Grads::TileType tile(slot(n));
      __syncthreads();  // nobody reads what was streamed
      if (part == 0) Grads::store(tile, row, grads);
      __syncthreads();
      add_queries<C, S>(p, plan.sums, s, head, from, tile, own_1);
    }
  }
  copy_async_wait_all();

  const bool exists[2] = {lane_row <= last, lane_row + 8 <= last};
  const float scale = static_cast<float>(p.scale);
  const auto store = [&](const AttentionArray& x, int64_t row_0, int64_t columns, bool wide, float factor, auto& sum) {
    T* const data = static_cast<T*>(x.data) + s.memory * x.batch + own_head * x.head +
                    (row_0 + min(first + row, last)) * x.row + offset;
    store_sums<T, S::kPartColumns>(data, x.row, exists, static_cast<int>(columns) - offset, wide, factor, sum);
  };
  if constexpr (kOwnsKeys) {
    store(p.grad_k, s.row_k, p.d, plan.wide_k, scale, sum_1);
    store(p.grad_v, s.row_k, p.dv, plan.wide_v, 1.0f, sum_2);
  } else {
    store(p.grad_q, s.row_q, p.d, plan.wide_q, scale, sum_1);
  }
}

// The rows' terms, a warp a row; it clears its share of the sums, too.
template <class T>
__global__ void __launch_bounds__(kTermsThreads)
    row_terms(AttentionBackward p, RowTerms* terms, int64_t rows, float* sums, int64_t blocks) {
  const int64_t row = int64_t{blockIdx.x} * (kTermsThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
  for (int64_t block = row; block < blocks; block += rows) {
    store_global(sums + block * QuerySums::kFloats + 4 * lane, Vector<float, 4>{});
  }
  const int64_t i = row % p.lq, head = row / p.lq % p.heads, batch = row / p.lq / p.heads;
  const auto start = [&](const AttentionArray& x) {
    return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + i * x.row;
  };
  const T *const grad_out = start(p.grad_out), *const out = start(p.out);
  float sum = 0.0f;
  for (int64_t column = lane; column - lane < p.dv; column += 32) {
    const bool inside = column < p.dv;
    sum += to_float(load_global_if<1>(inside, grad_out + column)[0]) *
           to_float(load_global_if<1>(inside, out + column)[0]);
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const float lse = load_global(static_cast<const float*>(p.lse) + row);
  if (p.grad_lse != nullptr) sum -= load_global(static_cast<const float*>(p.grad_lse) + row);
  store_terms(terms + row, {lse == kMinusInfinity ? -lse : lse, sum});
}

// q's gradient from what the blocks of keys added up: a warp 16 queries and 16 columns.
template <class T>
__global__ void __launch_bounds__(kTermsThreads) round_queries(AttentionBackward p, BackwardPlan plan, int64_t tiles) {
  int64_t unit = int64_t{blockIdx.x} * (kTermsThreads / 32) + threadIdx.x / 32;
  const int64_t pairs = plan.sums.blocks / 2;
  const int block = static_cast<int>(unit % pairs) * 2;
  unit /= pairs;
  const int head = static_cast<int>(unit / tiles);
  if (head >= p.heads) return;
  const Piece piece = piece_of(p.starts_q, p.lq, p.batch, 16, unit % tiles);
  if (piece.batch < 0) return;
  const Sequence s = sequence_of(p, piece.batch);
  if (!plan.adds_queries(s)) return;
  const int first = piece.tile * 16, row = first + threadIdx.x % 32 / 4;
  const float* const from = plan.sums.at(p, s, head, first, block);
  float sum[2][4];
  load_accumulators(from, sum[0]);
  load_accumulators(from + QuerySums::kFloats, sum[1]);
  const bool exists[2] = {row < s.lq, row + 8 < s.lq};
  T* const data = static_cast<T*>(p.grad_q.data) + s.memory * p.grad_q.batch + head * p.grad_q.head +
                  (s.row_q + first) * p.grad_q.row + block * 8;
  store_sums<T, 16>(data, p.grad_q.row, exists, static_cast<int>(p.d) - block * 8, plan.wide_q,
                    static_cast<float>(p.scale), sum);
}

int64_t rows_of(const AttentionBackward& p) { return (p.starts_q != nullptr ? 1 : p.batch) * p.heads * p.lq; }

// The workspace: the rows' terms, after them the sums for q's gradient and then the mask's part.
size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }
size_t terms_bytes(const AttentionBackward& p) { return aligned(rows_of(p) * sizeof(RowTerms)); }
int64_t sum_blocks(const AttentionBackward& p, const QuerySums& sums) {
  return (p.starts_q != nullptr ? 1 : p.batch) * p.heads * sums.tiles * sums.blocks;
}
size_t sums_bytes(const AttentionBackward& p, const QuerySums& sums) {
  return aligned(sum_blocks(p, sums) * QuerySums::kFloats * sizeof(float));
}

template <class C, int kWidth>
int whole_keys(const AttentionBackward& p) {
  return p.grad_weights == nullptr ? BackwardShape<C, kWidth, 128>::kStreamed : -1;
}

// The sums that the call needs, nowhere yet: of no tiles where a kernel of its own finds q's gradient.
template <class C, int kWidth>
QuerySums sums_of(const AttentionBackward& p) {
  constexpr int kRows = BackwardShape<C, kWidth, 128>::kRows;
  if (p.deterministic || (p.starts_k == nullptr && p.lk <= whole_keys<C, kWidth>(p))) return {};
  // Adding is 5 products of tiles in as many blocks as there are of keys; not adding, 4 in as many and 3 in blocks of
  // queries. Where keys are so few that they leave multiprocessors idle, the latter takes less time.
  const int64_t most = multiprocessors();
  const int64_t keys = std::min(most, tiles_of(p.starts_k, p.lk, p.batch, kRows) * (p.heads / p.groups));
  const int64_t queries = std::min(most, tiles_of(p.starts_q, p.lq, p.batch, kRows) * p.heads);
  if (queries > 3 * keys) return {};
  return {nullptr, tiles_of(p.starts_q, p.lq, 1, 16) + (p.starts_q != nullptr ? p.batch - 1 : 0), (p.d + 31) / 32 * 4};
}

template <class F>
void with_shape(const AttentionBackward& p, F&& f) {
  with_arithmetic(p,
                  [&](auto arithmetic) { with_width(std::max(p.d, p.dv), [&](auto width) { f(arithmetic, width); }); });
}

template <class C, int kWidth, bool General, Own own>
void launch_gradients(const AttentionBackward& p, const BackwardPlan& plan, RowTerms* terms, Stream stream) {
  using S = GradShape<C, kWidth, General, own>;
  constexpr bool kOwnsKeys = own == Own::kKeys;
  const int64_t tiles =
      kOwnsKeys ? tiles_of(p.starts_k, p.lk, p.batch, S::kRows) : tiles_of(p.starts_q, p.lq, p.batch, S::kRows);
  const int64_t blocks = tiles * (kOwnsKeys ? p.heads / p.groups : p.heads);
  if (blocks == 0) return;
  launch({kOwnsKeys ? "attention_grad_kv" : "attention_grad_q", blocks_of(blocks), S::kThreads, stream, S::kShared},
         gradients<C, kWidth, General, own>, p, plan, terms, tiles);
}

}  // namespace

size_t attention_workspace(const AttentionBackward& p) {
  size_t bytes = terms_bytes(p) + (p.grad_mask != nullptr ? attention_mask_partial(p) * sizeof(float) : 0);
  with_shape(p, [&](auto arithmetic, auto width) {
    bytes += sums_bytes(p, sums_of<decltype(arithmetic), decltype(width)::value>(p));
  });
  return bytes;
}

void attention_backward(const AttentionBackward& p, void* workspace, Stream stream) {
  char* const memory = static_cast<char*>(workspace);
  RowTerms* const terms = reinterpret_cast<RowTerms*>(memory);
  size_t used = terms_bytes(p);
  with_shape(p, [&](auto arithmetic, auto width) {
    using C = decltype(arithmetic);
    using T = typename C::Storage;
    constexpr int kWidth = decltype(width)::value, kWarps = kTermsThreads / 32;
    BackwardPlan plan = backward_plan_of<T>(p);
    plan.whole_keys = whole_keys<C, kWidth>(p);
    plan.sums = sums_of<C, kWidth>(p);
    const int64_t sums = sum_blocks(p, plan.sums);
    if (sums > 0) plan.sums.data = reinterpret_cast<float*>(memory + used);
    used += sums_bytes(p, plan.sums);
    if (const int64_t rows = rows_of(p); rows > 0) {
      launch({"attention_row_terms", blocks_of((rows + kWarps - 1) / kWarps), kTermsThreads, stream}, row_terms<T>, p,
             terms, rows, plan.sums.data, sums);
    }
    const auto run = [&](auto general) {
      // It completes terms, too.
      if (sums == 0 || p.starts_k != nullptr)
        launch_gradients<C, kWidth, general.value, Own::kQueries>(p, plan, terms, stream);
      launch_gradients<C, kWidth, general.value, Own::kKeys>(p, plan, terms, stream);
    };
    // Options cost 32-bit products, three or four times as dear, next to nothing: one kernel less to compile.
    if constexpr (sizeof(T) == 2) {
      if (is_plain(p) && p.grad_weights == nullptr) {
        run(std::false_type{});
      } else {
        run(std::true_type{});
      }
    } else {
      run(std::true_type{});
    }
    if (sums > 0) {
      const int64_t tiles = tiles_of(p.starts_q, p.lq, p.batch, 16), units = tiles * p.heads * plan.sums.blocks / 2;
      launch({"attention_round_q", blocks_of((units + kWarps - 1) / kWarps), kTermsThreads, stream}, round_queries<T>,
             p, plan, tiles);
    }
  });
  if (p.grad_mask != nullptr) attention_mask_gradient(p, terms, reinterpret_cast<float*>(memory + used), stream);
}

}  // namespace fastnets::cuda

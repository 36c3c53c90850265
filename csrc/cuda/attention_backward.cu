// Attention backward: the gradients of q, k and v. Each is summed up by the block that owns its rows, in a fixed order,
// while the other side's tiles stream by through asynchronous copies: the same bits in every run, and no atomics.
#include "attention_backward.h"

namespace fastnets::cuda {
namespace {

constexpr int kTermsThreads = 128;

// Dealing out a side's rows: tiles of all sequences times the heads.
template <class C, int kWidth, bool General, Own own>
struct GradShape : BackwardShape<C, kWidth, General && own == Own::kKeys> {
  using S = BackwardShape<C, kWidth, General && own == Own::kKeys>;
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

// Whether one tile holds all of a row's weights. Then what the softmax's gradient subtracts comes from them instead of
// `out`, whose rounding would show where few keys leave little else. (With grad_weights, grad_lse has their part.)
template <class S>
__device__ __forceinline__ bool sees_whole_rows(const AttentionBackward& p, const Sequence& s) {
  return s.lk <= S::kStreamed && p.grad_weights == nullptr;
}

// Finds it, and leaves it at `at`, of the sequence's first row, for the kernels that follow.
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
  const int own_length = kOwnsKeys ? s.lk : s.lq;
  // Of causal queries the last see the most keys, of keys the first are seen the most.
  const int own_tile = kOwnsKeys ? piece.tile : (own_length + S::kRows - 1) / S::kRows - 1 - piece.tile;
  const int first = own_tile * S::kRows, last = min(first + S::kRows, own_length) - 1;

  // Which of the other side's rows, of every head that shares this one's keys.
  int begin, end;
  if constexpr (kOwnsKeys) {
    begin = static_cast<int>(clamped(int64_t{first} - s.upper + 1, 0, s.lq));
    end = static_cast<int>(clamped(int64_t{last} - s.lower + 1, 0, s.lq));
  } else {
    begin = s.first(first);
    end = s.last(last);
  }
  begin = begin / S::kStreamed;
  const int each = max((end + S::kStreamed - 1) / S::kStreamed - begin, 0);
  const int count = kOwnsKeys ? each * static_cast<int>(p.groups) : each;
  const auto streamed_head = [&](int n) {
    return kOwnsKeys ? own_head * static_cast<int>(p.groups) + n / each : own_head / static_cast<int>(p.groups);
  };
  const auto streamed_row = [&](int n) { return (begin + n % each) * S::kStreamed; };

  const OwnTile own_1(memory), own_2(memory + OwnTile::kBytes);
  unsigned char* const slots = memory + 2 * OwnTile::kBytes;
  const auto slot = [&](int n) { return slots + n % S::kSlots * S::kSlotBytes; };
  const auto terms_slot = [&](int n) {
    return reinterpret_cast<RowTerms*>(slots + S::kSlots * S::kSlotBytes) + n % S::kSlots * S::kStreamed;
  };
  const auto fetch = [&](int n) {
    if (n < count) {
      const int head = streamed_head(n), from = streamed_row(n);
      const StreamedTile tile_1(slot(n)), tile_2(slot(n) + StreamedTile::kBytes);
      if constexpr (kOwnsKeys) {
        copy_rows<S::kThreads>(tile_1, p.q, plan.width_q, p.d, s.memory, head, s.row_q, from, s.lq);
        copy_rows<S::kThreads>(tile_2, p.grad_out, plan.width_grad, p.dv, s.memory, head, s.row_q, from, s.lq);
        const int r = threadIdx.x;
        if (r < S::kStreamed) {
          const bool exists = from + r < s.lq;
          const RowTerms* const at = terms + (s.memory * p.heads + head) * p.lq + s.row_q + from + r;
          copy_async<sizeof(RowTerms)>(terms_slot(n) + r, exists ? at : terms, exists ? sizeof(RowTerms) : 0);
        }
      } else {
        copy_rows<S::kThreads>(tile_1, p.k, plan.width_k, p.d, s.memory, head, s.row_k, from, s.lk);
        copy_rows<S::kThreads>(tile_2, p.v, plan.width_v, p.dv, s.memory, head, s.row_k, from, s.lk);
      }
    }
    copy_async_commit();
  };
  if constexpr (kOwnsKeys) {
    copy_rows<S::kThreads>(own_1, p.k, plan.width_k, p.d, s.memory, own_head, s.row_k, first, s.lk);
    copy_rows<S::kThreads>(own_2, p.v, plan.width_v, p.dv, s.memory, own_head, s.row_k, first, s.lk);
  } else {
    copy_rows<S::kThreads>(own_1, p.q, plan.width_q, p.d, s.memory, own_head, s.row_q, first, s.lq);
    copy_rows<S::kThreads>(own_2, p.grad_out, plan.width_grad, p.dv, s.memory, own_head, s.row_q, first, s.lq);
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
    const int head = kOwnsKeys ? streamed_head(n) : own_head, from = streamed_row(n);
    const int i = kOwnsKeys ? from : first + row, j = kOwnsKeys ? first + row : from;
    constexpr int kQueries = kOwnsKeys ? S::kStreamed : 16, kKeys = kOwnsKeys ? 16 : S::kStreamed;
    if (!sees_any(s, i, kQueries, j, kKeys)) continue;

    const StreamedTile tile_1(slot(n)), tile_2(slot(n) + StreamedTile::kBytes);
    const Places<own> at(first + row, from);
    float scores[S::kBlocks][4] = {}, grads[S::kBlocks][4] = {};
    Weights<C, S, own, General> weights;
    multiply_tiles<C, S>(scores, own_1, row, tile_1, p.d);
    weights.finish(p, plan, s, head, at, sees_all(s, i, kQueries, j, kKeys), scores);
    multiply_tiles<C, S>(grads, own_2, row, tile_2, p.dv);
    const auto terms_of = [&](int block) -> TwoRows {
      if constexpr (!kOwnsKeys) return own_terms;
      const RowTerms* const two = terms_slot(n) + block * 8 + threadIdx.x % 4 * 2;
      const Vector<float, 4> four = load_shared<4>(reinterpret_cast<const float*>(two));
      return {{{four[0], four[1]}, {four[2], four[3]}}};
    };
    weights.weigh(p, plan, seed, s, head, at, scores, grads, terms_of);
    if constexpr (!kOwnsKeys) {
      if (sees_whole_rows<S>(p, s)) {
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

// The rows' terms, a warp a row.
template <class T>
__global__ void __launch_bounds__(kTermsThreads) row_terms(AttentionBackward p, RowTerms* terms, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * (kTermsThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int lane = threadIdx.x % 32;
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

int64_t rows_of(const AttentionBackward& p) { return (p.starts_q != nullptr ? 1 : p.batch) * p.heads * p.lq; }

// The workspace: the rows' terms, and after them the mask's part.
size_t terms_bytes(const AttentionBackward& p) { return (rows_of(p) * sizeof(RowTerms) + 255) / 256 * 256; }

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
  return terms_bytes(p) + (p.grad_mask != nullptr ? attention_mask_partial(p) * sizeof(float) : 0);
}

void attention_backward(const AttentionBackward& p, void* workspace, Stream stream) {
  RowTerms* const terms = static_cast<RowTerms*>(workspace);
  with_arithmetic(p, [&](auto arithmetic) {
    using C = decltype(arithmetic);
    using T = typename C::Storage;
    const BackwardPlan plan = backward_plan_of<T>(p);
    if (const int64_t rows = rows_of(p); rows > 0) {
      constexpr int kRows = kTermsThreads / 32;
      launch({"attention_row_terms", blocks_of((rows + kRows - 1) / kRows), kTermsThreads, stream}, row_terms<T>, p,
             terms, rows);
    }
    with_width(std::max(p.d, p.dv), [&](auto width) {
      const auto run = [&](auto general) {
        constexpr int kWidth = decltype(width)::value;
        launch_gradients<C, kWidth, general.value, Own::kQueries>(p, plan, terms, stream);  // completes terms
        launch_gradients<C, kWidth, general.value, Own::kKeys>(p, plan, terms, stream);
      };
      // Options cost 32-bit products, three or four times as dear, next to nothing: one kernel less to compile.
      if constexpr (sizeof(T) == 2) {
        if (is_plain(p) && p.grad_weights == nullptr) return run(std::false_type{});
      }
      run(std::true_type{});
    });
  });
  if (p.grad_mask != nullptr) {
    attention_mask_gradient(p, terms, reinterpret_cast<float*>(static_cast<char*>(workspace) + terms_bytes(p)), stream);
  }
}

}  // namespace fastnets::cuda

// What the attention kernels of both directions share: which keys a query sees, where the rows of a sequence lie, the
// scores of a warp's accumulators with every option, and dropout.
//
// Scores are in units of log2, exp(s) = 2^(s log2 e), and a lane holds them as tensor_core.h says: of a block of 8 keys
// scores[block][2 half + pair] belongs to query row lane / 4 + 8 half and key 2 (lane % 4) + pair.
#pragma once

#include <cmath>
#include <stdexcept>

#include "launch.h"
#include "reduce.h"
#include "tile.h"

namespace fastnets::cuda {

constexpr float kLog2E = 1.44269504f;
constexpr int kFar = 1 << 29;    // more than any length
constexpr int kColumnStep = 32;  // products leave out a tile's columns beyond the heads' in steps of so many

// What the host finds out once.
struct Plan {
  float factor;                   // of q k^T: to log2, or to the soft cap's argument
  float cap;                      // the soft cap in log2, or 0
  float kept;                     // what dropout multiplies a weight that stays with
  uint32_t threshold;             // a weight stays if its random number's upper 24 bits reach it
  int width_q, width_k, width_v;  // of copies: copy_width
  bool wide_out;                  // whether the result takes stores of 8 bytes
};

inline int copy_width_of(const AttentionArray& x, Dtype dtype, int64_t batch, int64_t heads) {
  const auto relevant = [](int64_t stride, int64_t size) { return size > 1 ? stride : 0; };
  const std::initializer_list<int64_t> strides = {relevant(x.batch, batch), relevant(x.head, heads), x.row};
  return dtype == Dtype::kFloat32 ? copy_width<float>(x.data, strides) : copy_width<uint16_t>(x.data, strides);
}

inline Plan plan_of(const Attention& p) {
  if (p.lq >= kFar || p.lk >= kFar) throw std::invalid_argument("attention takes sequences of less than 2^29");
  constexpr double kExactLog2E = 1.4426950408889634074;
  Plan plan{};
  plan.factor = static_cast<float>(p.softcap != 0 ? p.scale / p.softcap : p.scale * kExactLog2E);
  plan.cap = static_cast<float>(p.softcap * kExactLog2E);
  plan.kept = p.dropout == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - p.dropout));
  plan.threshold = static_cast<uint32_t>(std::rint(p.dropout * 0x1p24));
  const int64_t memory = p.starts_q != nullptr ? 1 : p.batch;
  plan.width_q = copy_width_of(p.q, p.dtype, memory, p.heads);
  plan.width_k = copy_width_of(p.k, p.dtype, memory, p.heads / p.groups);
  plan.width_v = copy_width_of(p.v, p.dtype, memory, p.heads / p.groups);
  return plan;
}

// Whether the scores are q k^T * scale and nothing else, bounds aside; the rows' largest score is then the scale times
// the row's largest product.
inline bool is_plain(const Attention& p) {
  return p.mask_kind == MaskKind::kNone && p.slopes == nullptr && p.softcap == 0 && p.dropout == 0 && p.scale > 0;
}

// ---- sequences -------------------------------------------------------------------------------------------------

// One sequence: its lengths, its rows in memory, and what its queries see. Query i sees key j where
// i + lower <= j < i + upper.
struct Sequence {
  int batch;  // as counted by mask, slopes and dropout
  int lq, lk;
  int lower, upper;
  int64_t memory;        // its entry in memory
  int64_t row_q, row_k;  // its first rows there
  float offset;          // of ALiBi's distance

  __device__ __forceinline__ int first(int i) const { return min(max(i + lower, 0), lk); }
  __device__ __forceinline__ int last(int i) const { return min(max(i + upper, 0), lk); }
  // The keys that query i sees are those from first(i) up to last(i); and the other way round.
  __device__ __forceinline__ int first_query(int j) const;
  __device__ __forceinline__ int last_query(int j) const;
};

__device__ __forceinline__ int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ int Sequence::first_query(int j) const {
  return static_cast<int>(clamped(int64_t{j} - upper + 1, 0, lq));
}
__device__ __forceinline__ int Sequence::last_query(int j) const {
  return static_cast<int>(clamped(int64_t{j} - lower + 1, 0, lq));
}

struct Range {
  int64_t begin, end;
};

// A sequence's rows; whatever `starts` holds, they lie within [0, rows).
__device__ __forceinline__ Range rows_of(const int64_t* starts, int64_t rows, int64_t sequence) {
  if (starts == nullptr) return {0, rows};
  const int64_t begin = clamped(load_global(starts + sequence), 0, rows);
  return {begin, clamped(load_global(starts + sequence + 1), begin, rows)};
}

__device__ __forceinline__ Sequence sequence_of(const Attention& p, int64_t batch) {
  const Range q = rows_of(p.starts_q, p.lq, batch), k = rows_of(p.starts_k, p.lk, batch);
  Sequence s;
  s.batch = static_cast<int>(batch);
  s.lq = static_cast<int>(q.end - q.begin);
  s.lk = static_cast<int>(k.end - k.begin);
  s.memory = p.starts_q != nullptr ? 0 : batch;
  s.row_q = q.begin;
  s.row_k = k.begin;
  const int64_t offset = p.bottom_right ? s.lk - s.lq : p.offset;
  s.lower = static_cast<int>(clamped(offset - p.left, -kFar, kFar));
  s.upper = static_cast<int>(clamped(offset + p.right + 1, -kFar, kFar));
  s.offset = static_cast<float>(offset);
  return s;
}

// A tile of `size` rows of a sequence.
struct Piece {
  int64_t batch;  // -1: there is no such tile
  int tile;
};

// How many tiles there can be of `rows` rows in `batch` sequences.
inline int64_t tiles_of(const int64_t* starts, int64_t rows, int64_t batch, int size) {
  return starts == nullptr ? batch * ((rows + size - 1) / size) : rows / size + batch;
}

// The number'th tile, of the sequences' in order. The whole warp calls it.
__device__ inline Piece piece_of(const int64_t* starts, int64_t rows, int64_t batch, int size, int64_t number) {
  if (starts == nullptr) {
    const int64_t each = (rows + size - 1) / size;
    return {number / each, static_cast<int>(number % each)};
  }
  const int lane = threadIdx.x % 32;
  for (int64_t base = 0; base < batch; base += 32) {  // 32 sequences at a time
    int64_t own = 0;
    if (base + lane < batch) {
      const Range r = rows_of(starts, rows, base + lane);
      own = (r.end - r.begin + size - 1) / size;
    }
    int64_t upto = own;
    for (int step = 1; step < 32; step *= 2) {
      const int64_t before = __shfl_up_sync(kWholeWarp, upto, step);
      if (lane >= step) upto += before;
    }
    const uint32_t beyond = __ballot_sync(kWholeWarp, number < upto);
    if (beyond != 0) {
      const int owner = __ffs(static_cast<int>(beyond)) - 1;
      const int64_t begin = __shfl_sync(kWholeWarp, upto - own, owner);
      return {base + owner, static_cast<int>(number - begin)};
    }
    number -= __shfl_sync(kWholeWarp, upto, 31);
  }
  return {-1, 0};
}

// ---- scores ----------------------------------------------------------------------------------------------------

// A query's row, as far as its scores depend on it.
struct Query {
  int i, head;
  int64_t mask;  // where the mask's row begins
  float slope;   // ALiBi's, in log2
};

__device__ __forceinline__ Query query_of(const Attention& p, const Sequence& s, int head, int i) {
  Query q{i, head, 0, 0.0f};
  if (p.mask_kind != MaskKind::kNone) {
    q.mask = s.batch * p.mask_strides[0] + head * p.mask_strides[1] + i * p.mask_strides[2];
  }
  if (p.slopes != nullptr) {
    const float* const slopes = static_cast<const float*>(p.slopes);
    q.slope = load_global(slopes + s.batch * p.slope_strides[0] + head * p.slope_strides[1]) * kLog2E;
  }
  return q;
}

namespace detail {

// Calls f(half, key, score) for every score of this lane; j0 is the first block's first key.
template <int Blocks, class F>
__device__ __forceinline__ void for_scores(int j0, float (&scores)[Blocks][4], F&& f) {
  const int own = j0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int block = 0; block < Blocks; ++block) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(e / 2, own + block * 8 + e % 2, scores[block][e]);
  }
}

// The mask's entries of this lane. Rows and keys outside the tensor are not read.
template <class M, int Blocks, class F>
__device__ __forceinline__ void for_mask(const Attention& p, const Sequence& s, const Query (&queries)[2], int j0,
                                         float (&scores)[Blocks][4], F&& f) {
  for_scores(j0, scores, [&](int half, int j, float& score) {
    const bool inside = queries[half].i < s.lq && j < s.lk;
    const M* const at = static_cast<const M*>(p.mask) + queries[half].mask + j * p.mask_strides[3];
    f(load_global_if<1>(inside, at)[0], score);
  });
}

}  // namespace detail

// Products become scores: scale, soft cap, mask, ALiBi; each option is asked for once. Bounds come after (hide).
template <class T, int Blocks>
__device__ __forceinline__ void finish_scores(const Attention& p, const Plan& plan, const Sequence& s,
                                              const Query (&queries)[2], int j0, float (&scores)[Blocks][4]) {
  using detail::for_mask;
  using detail::for_scores;
  for_scores(j0, scores, [&](int, int, float& score) { score *= plan.factor; });
  if (plan.cap != 0.0f) {
    for_scores(j0, scores, [&](int, int, float& score) { score = plan.cap * tanhf(score); });
  }
  if (p.mask_kind == MaskKind::kBool) {
    for_mask<uint8_t>(p, s, queries, j0, scores, [](uint8_t entry, float& score) {
      if (entry == 0) score = kMinusInfinity;
    });
  } else if (p.mask_kind == MaskKind::kAdditive) {
    const auto add = [](auto entry, float& score) { score += to_float(entry) * kLog2E; };
    if (p.mask_dtype == Dtype::kFloat32) {
      for_mask<float>(p, s, queries, j0, scores, add);
    } else {
      for_mask<T>(p, s, queries, j0, scores, add);
    }
  }
  if (p.slopes != nullptr) {
    for_scores(j0, scores, [&](int half, int j, float& score) {
      score -= queries[half].slope * fabsf(s.offset + static_cast<float>(queries[half].i - j));
    });
  }
}

// Of a lane's scores in one row, x[.][2 half] and x[.][2 half + 1], those outside [begin, end) become -inf; the first
// is at `own`, the others at their distances from it.
template <int Blocks>
__device__ __forceinline__ void hide_row(int own, int half, int begin, int end, float (&x)[Blocks][4]) {
  const int first = begin - own;
  const unsigned seen = max(end - begin, 0);
#pragma unroll
  for (int n = 0; n < 2 * Blocks; ++n) {
    if (static_cast<unsigned>(n / 2 * 8 + n % 2 - first) >= seen) x[n / 2][2 * half + n % 2] = kMinusInfinity;
  }
}

// What the queries of rows i[half] do not see becomes -inf.
template <int Blocks>
__device__ __forceinline__ void hide(const Sequence& s, const int (&i)[2], int j0, float (&scores)[Blocks][4]) {
  const int own = j0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) hide_row(own, half, s.first(i[half]), s.last(i[half]), scores);
}

// ---- dropout ---------------------------------------------------------------------------------------------------

// Philox 4x32-10 as fastnets/reference/philox.py.
struct Words {
  uint32_t w[4];
};

struct Seed {
  uint32_t key[2];
};

__device__ __forceinline__ Seed seed_of(const Attention& p) {
  if (p.dropout == 0) return {};
  return {{static_cast<uint32_t>(load_global(p.seed)), static_cast<uint32_t>(load_global(p.seed + 1))}};
}

__device__ __forceinline__ Words philox(uint32_t a, uint32_t b, uint32_t c, uint32_t d, Seed seed) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high_a = __umulhi(a, 0xD2511F53u), low_a = a * 0xD2511F53u;
    const uint32_t high_c = __umulhi(c, 0xCD9E8D57u), low_c = c * 0xCD9E8D57u;
    a = high_c ^ b ^ seed.key[0], b = low_c, c = high_a ^ d ^ seed.key[1], d = low_a;
    seed.key[0] += 0x9E3779B9u, seed.key[1] += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// Which weights of a query stay, of this lane's in `Blocks` blocks of keys from j0, a multiple of 8 Blocks: bit
// 2 block + pair. As fastnets/reference/attention.py: the random numbers of counter (j / 64 * 16 + j % 16, i, head,
// batch) serve the keys j, j + 16, j + 32 and j + 48 of 64.
template <int Blocks>
__device__ __forceinline__ uint32_t kept_weights(const Plan& plan, Seed seed, int batch, const Query& query, int j0) {
  static_assert(Blocks == 2 || Blocks == 4 || Blocks == 8);
  uint32_t bits = 0;
#pragma unroll 1  // bits, unlike registers, can be told apart by a variable: a quarter of the code
  for (int place = 0; place < 4; ++place) {
    const int block = place / 2, pair = place % 2;
    const uint32_t key = block * 8 + threadIdx.x % 4 * 2 + pair;
    const Words words = philox(static_cast<uint32_t>(j0) / 64 * 16 + key, static_cast<uint32_t>(query.i),
                               static_cast<uint32_t>(query.head), static_cast<uint32_t>(batch), seed);
    const int first = j0 % 64 / 16;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const bool stays = words.w[w] >> 8 >= plan.threshold;
      const int at = w - first;
      if (stays && at >= 0 && at < Blocks / 2) bits |= 1u << (2 * (2 * at + block) + pair);
    }
  }
  return bits;
}

// ---- results ---------------------------------------------------------------------------------------------------

// Stores a row's accumulators of two neighbouring blocks, 16 columns from `column`: in whole sectors of 32 bytes where
// `wide` (4 elements aligned), else one by one.
template <class T>
__device__ __forceinline__ void store_pair(T* row, int column, int columns, bool exists, bool wide, const float* left,
                                           const float* right) {
  const int t = threadIdx.x % 4;
  if constexpr (sizeof(T) == 2) {
    // Even lanes take the left block, odd lanes the right one, of themselves and of their neighbour.
    const bool odd = t % 2 != 0;
    float own[2], other[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      own[e] = odd ? right[e] : left[e];
      other[e] = __shfl_xor_sync(kWholeWarp, odd ? left[e] : right[e], 1);
    }
    const int first = column + (odd ? 8 : 0) + t / 2 * 4;
    Vector<T, 4> four;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      four[e] = from_float<T>(odd ? other[e] : own[e]);
      four[e + 2] = from_float<T>(odd ? own[e] : other[e]);
    }
    if (wide) {
      if (exists && first < columns) store_global(row + first, four);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (exists && first + e < columns) store_global(row + first + e, four[e]);
      }
    }
  } else {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const float* const pair = block == 0 ? left : right;
      const int first = column + block * 8 + t * 2;
      if (wide) {
        if (exists && first < columns) store_global(row + first, Vector<float, 2>{{pair[0], pair[1]}});
      } else {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (exists && first + e < columns) store_global(row + first + e, pair[e]);
        }
      }
    }
  }
}

// ---- launching -------------------------------------------------------------------------------------------------

// Calls f with the arithmetic of the call's products.
template <class F>
void with_arithmetic(const Attention& p, F&& f) {
  switch (p.dtype) {
    case Dtype::kFloat32: return p.tf32 ? f(Tf32{}) : f(Fp32{});
    case Dtype::kBFloat16: return f(Bf16{});
    case Dtype::kFloat16: return f(Fp16{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

// Calls f with the least width of tiles that holds so many columns.
template <class F>
void with_width(int64_t columns, F&& f) {
  if (columns <= 64) return f(std::integral_constant<int, 64>{});
  if (columns <= 128) return f(std::integral_constant<int, 128>{});
  if (columns <= 256) return f(std::integral_constant<int, 256>{});
  throw std::invalid_argument("the CUDA attention kernels take head dimensions up to 256");
}

inline unsigned blocks_of(int64_t blocks) {
  if (blocks > grid_limit()) throw std::invalid_argument("attention of more tiles than a grid has blocks");
  return static_cast<unsigned>(blocks);
}

}  // namespace fastnets::cuda

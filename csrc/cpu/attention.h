// What the attention kernels share: one (sequence, head) and its visible keys, blocks brought into compute type, the
// register tile, the scores of a row and dropout's multipliers.
//
// Scores are kept in units of log2: exp(s) = 2^(s log2 e), the factor being part of that of the products q k.
#pragma once

#include "attention_dropout.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kKeys = 64;      // keys in a block
constexpr int kGroupRows = 6;  // rows in a register tile
constexpr int kTileVecs = kVectorBytes == 64 ? 4 : 2;
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kMinusInfinity = sizeof(T) == 8 ? T(-__builtin_inf()) : T(-__builtin_inff());
template <class T>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Pieces of one slot of scratch memory, each aligned to a vector.
class Arena {
 public:
  template <class T>
  static size_t bytes(int64_t count) {
    return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  }
  Arena(int slot, size_t bytes) : at_(static_cast<char*>(scratch(slot, bytes))) {}
  template <class T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return p;
  }

 private:
  char* at_;
};

// ---- one sequence, one query head ------------------------------------------------------------------------------

struct Head {
  int64_t batch, head;      // as counted by mask, slopes and dropout
  int64_t lq, lk, offset;   // this sequence's own
  int64_t row_q, row_k;     // its first rows
  int64_t memory, kv_head;  // its entry in memory, its head of k and v

  Head(const Attention& p, int64_t b, int64_t h)
      : batch(b),
        head(h),
        lq(p.starts_q ? p.starts_q[b + 1] - p.starts_q[b] : p.lq),
        lk(p.starts_k ? p.starts_k[b + 1] - p.starts_k[b] : p.lk),
        offset(p.bottom_right ? lk - lq : p.offset),
        row_q(p.starts_q ? p.starts_q[b] : 0),
        row_k(p.starts_k ? p.starts_k[b] : 0),
        memory(p.starts_q ? 0 : b),
        kv_head(h / p.groups) {}

  int64_t at_q(const AttentionArray& x, int64_t i) const {
    return memory * x.batch + head * x.head + (row_q + i) * x.row;
  }
  int64_t at_k(const AttentionArray& x, int64_t j) const {
    return memory * x.batch + kv_head * x.head + (row_k + j) * x.row;
  }
  int64_t at_lse(const Attention& p, int64_t i) const { return (memory * p.heads + head) * p.lq + row_q + i; }
  // The keys that query i sees: [first, last).
  int64_t first(const Attention& p, int64_t i) const { return larger(0, smaller(lk, i + offset - p.left)); }
  int64_t last(const Attention& p, int64_t i) const { return larger(0, smaller(lk, i + offset + p.right + 1)); }
};

// ---- between memory and compute type ---------------------------------------------------------------------------

// Calls body(S{}) with the stored type, one of those that arithmetic in T serves.
template <class T, class Body>
FASTNETS_INLINE void with_stored(Dtype dtype, Body&& body) {
  if constexpr (std::is_same_v<T, double>) {
    body(double{});
  } else if (dtype == Dtype::kFloat32) {
    body(float{});
  } else if (dtype == Dtype::kBFloat16) {
    body(BFloat16{});
  } else {
    body(Float16{});
  }
}

// A few queries, as a model that generates asks with, meet keys and values as they lie: transposed, or laid out in
// pairs, these would cost more than they gain.
inline bool few_queries(const Attention& p) { return p.lq <= 4; }

// Calls body(T{}, pairs) with the type that p's arithmetic runs in, and whether it is done in pairs.
template <class Body>
FASTNETS_INLINE void with_compute(const Attention& p, Body&& body) {
  const Dtype dtype = p.dtype;
  if (kHasPairs && dtype == Dtype::kBFloat16 && !few_queries(p)) {
    body(float{}, std::bool_constant<kHasPairs>{});
  } else if (dtype == Dtype::kFloat64) {
    body(double{}, std::false_type{});
  } else {
    body(float{}, std::false_type{});
  }
}

// to[r][c] = from[r][c]; columns up to the next full vector are zero.
template <class T>
void load_rows(Dtype dtype, const void* data, int64_t at, int64_t row, int64_t rows, int64_t cols, T* to) {
  with_stored<T>(dtype, [&](auto kind) {
    using S = decltype(kind);
    const S* from = static_cast<const S*>(data) + at;
    for (int64_t r = 0; r < rows; ++r, from += row, to += padded<T>(cols)) {
      int64_t c = 0;
      for (; c + kLanes<T> <= cols; c += kLanes<T>) store(to + c, load(from + c));
      if (c < cols) store(to + c, load_partial(from + c, static_cast<int>(cols - c)));
    }
  });
}

// Rows as arithmetic reads them: element (r, c) is data[r * row + c].
template <class T>
struct Rows {
  const T* data;
  int64_t row;
};

// Whether products read and write x's rows where they are: whole vectors of T, close together or few.
template <class T>
bool in_place(const Attention& p, const AttentionArray& x, int64_t cols) {
  constexpr Dtype own = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  return p.dtype == own && cols == padded<T>(cols) && (x.row == cols || few_queries(p));
}

// x's rows from `at` on, where they are or in `to`.
template <class T>
Rows<T> rows_of(const Attention& p, const AttentionArray& x, int64_t at, int64_t rows, int64_t cols, T* to) {
  if (in_place<T>(p, x, cols)) return {static_cast<const T*>(x.data) + at, x.row};
  load_rows<T>(p.dtype, x.data, at, x.row, rows, cols, to);
  return {to, padded<T>(cols)};
}

// Lanes from kFirst on of a and b in turn.
template <class T, int kFirst, int... kIndex>
FASTNETS_INLINE Vec<T> zip(Vec<T> a, Vec<T> b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (kFirst + kIndex / 2 + kIndex % 2 * kLanes<T>)...);
}

template <class T, int kStep>
FASTNETS_INLINE void zip_halves(Vec<T>* v) {
  constexpr int n = kLanes<T>;
  constexpr std::make_integer_sequence<int, n> lanes;
  Vec<T> zipped[n];
#pragma GCC unroll 16
  for (int i = 0; i < n / 2; ++i) {
    zipped[2 * i] = zip<T, 0>(v[i], v[i + n / 2], lanes);
    zipped[2 * i + 1] = zip<T, n / 2>(v[i], v[i + n / 2], lanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) v[i] = zipped[i];
  if constexpr (kStep * 2 < n) zip_halves<T, kStep * 2>(v);
}

// to[c][r] = from[r][c] with kKeys columns a row of `to`; rows up to the next full vector are zero.
template <class T>
void load_transposed(Dtype dtype, const void* data, int64_t at, int64_t row, int64_t rows, int64_t cols, T* to) {
  constexpr int n = kLanes<T>;
  with_stored<T>(dtype, [&](auto kind) {
    using S = decltype(kind);
    const S* from = static_cast<const S*>(data) + at;
    for (int64_t r = 0; r < rows; r += n) {
      const int64_t lines = smaller(n, rows - r);
      for (int64_t c = 0; c < cols; c += n) {
        const int64_t width = smaller(n, cols - c);
        Vec<T> v[n];
        if (lines == n && width == n) {
#pragma GCC unroll 16
          for (int i = 0; i < n; ++i) v[i] = load(from + (r + i) * row + c);
        } else {
          for (int i = 0; i < n; ++i) {
            v[i] = i < lines ? load_partial(from + (r + i) * row + c, static_cast<int>(width)) : Vec<T>{};
          }
        }
        zip_halves<T, 1>(v);
        T* column = to + c * kKeys + r;
        for (int64_t i = 0; i < width; ++i) store(column + i * kKeys, v[i]);
      }
    }
  });
}

// to[r][c] = from[r][c] * factors[r * factor_step].
template <class T>
void store_rows(Dtype dtype, void* data, int64_t at, int64_t row, int64_t rows, int64_t cols, const T* from,
                int64_t from_row, const T* factors, int64_t factor_step) {
  with_stored<T>(dtype, [&](auto kind) {
    using S = decltype(kind);
    S* to = static_cast<S*>(data) + at;
    for (int64_t r = 0; r < rows; ++r, from += from_row, to += row) {
      const T factor = factors[r * factor_step];
      int64_t c = 0;
      for (; c + kLanes<T> <= cols; c += kLanes<T>) store(to + c, load(from + c) * factor);
      if (c < cols) store_partial<S>(to + c, load(from + c) * factor, static_cast<int>(cols - c));
    }
  });
}

// ---- the register tile -----------------------------------------------------------------------------------------

// Left operand: element (r, k) is data[r * row + k * col]. Passed by reference: read back from a copy on the stack, it
// costs a tile of 64 steps 7% on a Zen 5.
template <class T>
struct Left {
  const T* data;
  int64_t row, col;
};

// c[r][:] = factors[r] * c[r][:] + a b, for kRows rows and kVecs vectors; scale * a b where factors is null.
// kPairs: a and b hold pairs, and depth counts them.
template <class T, bool kPairs, int kRows, int kVecs>
void register_tile(int64_t depth, const Left<T>& left, const T* b, int64_t b_row, T* c, int64_t c_row, const T* factors,
                   T scale) {
  Vec<T> sums[kRows][kVecs] = {};
  const T* a = left.data;
  for (int64_t k = 0; k < depth; ++k, a += left.col, b += b_row) {
    Vec<T> right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      right[v] = load(b + v * kLanes<T>);
      // Keeps the vector in a register: with few rows g++ would load it again for every row.
      if constexpr (kRows <= 4) asm("" : "+x"(right[v]));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T one = a[r * left.row];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add<T, kPairs>(one, right[v], sums[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      T* at = c + r * c_row + v * kLanes<T>;
      // What was there joins last: sums of blocks round less than one long sum.
      store(at, factors ? fma<T>(load(at), broadcast<T>(factors[r]), sums[r][v]) : sums[r][v] * scale);
    }
  }
}

template <class T, bool kPairs, int kRows>
FASTNETS_INLINE void tile_row(int vecs, int64_t depth, const Left<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row,
                              const T* factors, T scale) {
  if (vecs == 1) return register_tile<T, kPairs, kRows, 1>(depth, a, b, b_row, c, c_row, factors, scale);
  if (vecs == 2) return register_tile<T, kPairs, kRows, 2>(depth, a, b, b_row, c, c_row, factors, scale);
  if constexpr (kTileVecs == 4) {
    if (vecs == 3) return register_tile<T, kPairs, kRows, 3>(depth, a, b, b_row, c, c_row, factors, scale);
    return register_tile<T, kPairs, kRows, 4>(depth, a, b, b_row, c, c_row, factors, scale);
  }
}

// c[rows, cols] = factors * c + a b, or scale * a b, for at most kGroupRows rows; whole vectors of c are written.
template <class T, bool kPairs>
void group_product(int64_t rows, int64_t cols, int64_t depth, const Left<T>& a, const T* b, int64_t b_row, T* c,
                   int64_t c_row, const T* factors, T scale = T(1)) {
  for (int64_t at = 0; at < cols; at += kTileVecs * kLanes<T>) {
    const int vecs = static_cast<int>(smaller(kTileVecs, (cols - at + kLanes<T> - 1) / kLanes<T>));
    switch (rows) {
      case 1: tile_row<T, kPairs, 1>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale); break;
      case 2: tile_row<T, kPairs, 2>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale); break;
      case 3: tile_row<T, kPairs, 3>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale); break;
      case 4: tile_row<T, kPairs, 4>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale); break;
      case 5: tile_row<T, kPairs, 5>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale); break;
      default: tile_row<T, kPairs, kGroupRows>(vecs, depth, a, b + at, b_row, c + at, c_row, factors, scale);
    }
  }
}

// Calls body(begin, end) for groups of at most kGroupRows rows, of nearly equal size.
template <class Body>
FASTNETS_INLINE void in_groups(int64_t rows, const Body& body) {
  const int64_t count = (rows + kGroupRows - 1) / kGroupRows;
  for (int64_t g = 0; g < count; ++g) body(g * rows / count, (g + 1) * rows / count);
}

// c[rows, cols] = scale * a b, or c + a b.
template <class T, bool kPairs>
void product(int64_t rows, int64_t cols, int64_t depth, const Left<T>& a, const T* b, int64_t b_row, T* c,
             int64_t c_row, bool accumulate, T scale = T(1)) {
  static constexpr T ones[kGroupRows] = {1, 1, 1, 1, 1, 1};
  in_groups(rows, [&](int64_t begin, int64_t end) {
    group_product<T, kPairs>(end - begin, cols, depth, {a.data + begin * a.row, a.row, a.col}, b, b_row,
                             c + begin * c_row, c_row, accumulate ? ones : nullptr, scale);
  });
}

// ---- few rows ---------------------------------------------------------------------------------------------------

// The sum of each of a vector's worth of vectors, in their order: halves are zipped and added.
template <class T, int kCount = kLanes<T>>
FASTNETS_INLINE Vec<T> sums_of(Vec<T>* v) {
  constexpr std::make_integer_sequence<int, kLanes<T>> lanes;
  if constexpr (kCount > 1) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount / 2; ++i) {
      v[i] = zip<T, 0>(v[i], v[i + kCount / 2], lanes) + zip<T, kLanes<T> / 2>(v[i], v[i + kCount / 2], lanes);
    }
    return sums_of<T, kCount / 2>(v);
  }
  return v[0];
}

// scores[j] = scale times the product of q with key j, for j < keys; zeros up to the next full vector.
template <class T, class S>
void dot_keys(const T* q, const S* from, int64_t row, int64_t keys, int64_t depth, T scale, T* scores) {
  constexpr int n = kLanes<T>;
  for (int64_t j = 0; j < keys; j += n, from += n * row) {
    const int64_t lines = smaller(n, keys - j), whole = lines == n ? depth / n * n : 0;
    Vec<T> sums[n] = {};
    for (int64_t c = 0; c < whole; c += n) {
      const Vec<T> factor = load(q + c);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        __builtin_prefetch(from + (n + i) * row + c);
        sums[i] = fma<T>(load(from + i * row + c), factor, sums[i]);
      }
    }
    for (int64_t c = whole; c < depth; c += n) {
      const int width = static_cast<int>(smaller(n, depth - c));
      for (int i = 0; i < lines; ++i) {
        sums[i] = fma<T>(load_partial(from + i * row + c, width), load(q + c), sums[i]);
      }
    }
    store(scores + j, sums_of<T>(sums) * scale);
  }
}

// The same of `count` rows, kKeys scores each, with x's keys from `at` on.
template <class T>
void dot_rows(Dtype dtype, const AttentionArray& x, int64_t at, int64_t keys, int64_t depth, const Rows<T>& q,
              int64_t count, T scale, T* scores) {
  with_stored<T>(dtype, [&](auto kind) {
    using S = decltype(kind);
    const S* from = static_cast<const S*>(x.data) + at;
    for (int64_t r = 0; r < count; ++r) {
      dot_keys(q.data + r * q.row, from, x.row, keys, depth, scale, scores + r * kKeys);
    }
  });
}

// ---- scores ----------------------------------------------------------------------------------------------------

// (2^r - 1) / r for |r| <= 1/2, the lowest power first: fitted to least relative error of 2^r (1e-7; 3e-6 with one term
// less, which bfloat16 does not see) for float, Taylor's for double.
inline constexpr float kExp2Float[] = {0.6931470037f, 0.2402224243f, 0.05550733581f, 0.009671512991f, 0.001326472731f};
inline constexpr float kExp2Coarse[] = {0.6931241751f, 0.2402409911f, 0.05590642616f, 0.009582852945f};
struct Exp2Series {
  double terms[13];
  constexpr Exp2Series() : terms{} {
    double term = 1;
    for (int i = 0; i < 13; ++i) terms[i] = term *= kLn2 / (i + 1);
  }
};
constexpr Exp2Series kExp2Double;

// 2^r for |r| <= 1/2.
template <class T, bool coarse>
FASTNETS_INLINE Vec<T> exp2_fraction(Vec<T> r) {
  constexpr bool is_double = sizeof(T) == 8;
  constexpr int terms = is_double ? 13 : coarse ? 4 : 5;
  const auto term = [](int i) {
    return broadcast<T>(is_double ? T(kExp2Double.terms[i]) : T(coarse ? kExp2Coarse[i % 4] : kExp2Float[i % 5]));
  };
  Vec<T> y = term(terms - 1);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) y = fma<T>(y, r, term(i));
  return fma<T>(y, r, broadcast<T>(T(1)));
}

// 2^x for x <= 127, to about 1 ulp or with `coarse` to 3e-6; below the normal range it loses bits or is 0, NaN stays.
template <class T, bool coarse = false>
FASTNETS_INLINE Vec<T> exp2(Vec<T> x) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> r = Vec<T>(_mm512_reduce_ps(__m512(x), 0));  // to the nearest integer; of an infinity it is 0
    return Vec<T>(_mm512_scalef_ps(__m512(exp2_fraction<T, coarse>(r)), __m512(x - r)));
  }
#endif
  x = maximum<T>(broadcast<T>(-kBias<T>), x);
  Vec<T> shifted = x + (kRounding<T> + kBias<T>);  // its low bits are the exponent field of 2^n, whole
  asm("" : "+x"(shifted));
  const Vec<T> r = x - (shifted - (kRounding<T> + kBias<T>));
  return exp2_fraction<T, coarse>(r) * reinterpret_cast<Vec<T>>(reinterpret_cast<Vec<Int<T>>>(shifted) << kMantissa<T>);
}

// The largest of a row's scores, lane by lane.
template <class T>
FASTNETS_INLINE Vec<T> tops_of(const T* s, int64_t n) {
  Vec<T> top = load(s);
  for (int64_t c = kLanes<T>; c < n; c += kLanes<T>) top = maximum<T>(load(s + c), top);
  return top;
}

template <class T>
struct Scoring {
  const Attention& p;
  T unit;  // what products of q and k are multiplied with: scores come out in units of log2, or of the soft cap
  T cap;   // the soft cap in units of log2, or 0

  explicit Scoring(const Attention& params)
      : p(params),
        unit(static_cast<T>(p.softcap != 0 ? p.scale / p.softcap : p.scale * kLog2E)),
        cap(static_cast<T>(p.softcap * kLog2E)) {}

  // Whether finish() would leave the scores of queries i0 ... i1 against keys j0 ... j0 + n as they are.
  bool finished(const Head& h, int64_t i0, int64_t i1, int64_t j0, int64_t n) const {
    return cap == T(0) && p.mask_kind == MaskKind::kNone && !p.slopes && n == padded<T>(n) &&
           h.first(p, i1 - 1) <= j0 && h.last(p, i0) >= j0 + n;
  }

  // Finishes the scores of query i against keys j0 ... j0 + n: cap, bias, mask, bounds. Whole vectors; what lies
  // outside is -inf. Of capped ones `squashed` receives the tanh.
  FASTNETS_INLINE void finish(const Head& h, int64_t i, int64_t j0, int64_t n, T* s, T* squashed = nullptr) const {
    if (cap != T(0)) {
      for (int64_t c = 0; c < n; c += kLanes<T>) {
        const Vec<T> t = tanh<T>(load(s + c));
        if (squashed) store(squashed + c, t);
        store(s + c, t * cap);
      }
    }
    if (p.mask_kind != MaskKind::kNone) add_mask(h, i, j0, n, s);
    if (p.slopes) {
      const T slope = static_cast<const T*>(p.slopes)[h.batch * p.slope_strides[0] + h.head * p.slope_strides[1]];
      const Vec<T> own = broadcast<T>(static_cast<T>(i + h.offset - j0));
      for (int64_t c = 0; c < n; c += kLanes<T>) {
        const Vec<T> distance = absolute<T>(own - T(c) - lane_index<T>());
        store(s + c, load(s + c) - distance * (slope * T(kLog2E)));
      }
    }
    const int64_t first = h.first(p, i) - j0, last = smaller(h.last(p, i) - j0, n);
    if (first <= 0 && last == padded<T>(n)) return;
    const Vec<T> low = broadcast<T>(static_cast<T>(larger(first, 0))), high = broadcast<T>(static_cast<T>(last));
    for (int64_t c = 0; c < n; c += kLanes<T>) {
      const Vec<T> at = lane_index<T>() + T(c);
      Vec<T> x = load(s + c);
      x = select<T>(at < high, x, broadcast<T>(kMinusInfinity<T>));
      store(s + c, select<T>(at < low, broadcast<T>(kMinusInfinity<T>), x));
    }
  }

  // What dropout multiplies the weights of query i and keys j0 ... j0 + n with, n <= 64; j0 is a multiple of 64. As
  // fastnets/reference/attention.py: the block of random numbers of lane l serves keys l, l + 16, l + 32 and l + 48.
  void keep(const Head& h, int64_t i, int64_t j0, int64_t n, T* factors) const {
    constexpr int lanes = 16;
    const Dropout<T> dropout(p.dropout);
    const uint32_t head = static_cast<uint32_t>(h.head), batch = static_cast<uint32_t>(h.batch);
    const RandomWords query = RandomWords{} + static_cast<uint32_t>(i);
    const RandomWords block = random_lanes() + static_cast<uint32_t>(j0 / kKeys * lanes);
    for (int l = 0; l < lanes; l += kRandomLanes) {
      if (l >= n) {  // no keys: their weights are zero, and must remain so
        std::memset(factors + l, 0, kRandomLanes * sizeof(T));
        continue;
      }
      const RandomBlocks drawn(p.seed, block + static_cast<uint32_t>(l), query, head, batch);
      for (int w = 0; w * lanes < n; ++w) dropout.factors(drawn.words[w], factors + w * lanes + l);
    }
  }

 private:
  void add_mask(const Head& h, int64_t i, int64_t j0, int64_t n, T* s) const {
    const int64_t* strides = p.mask_strides;
    const int64_t step = strides[3];
    const int64_t at = h.batch * strides[0] + h.head * strides[1] + i * strides[2] + j0 * step;
    if (p.mask_kind == MaskKind::kBool) {
      const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
      for (int64_t c = 0; c < n; ++c) s[c] = mask[c * step] ? s[c] : kMinusInfinity<T>;
      return;
    }
    with_storage(p.mask_dtype, [&](auto kind) {
      using S = decltype(kind);
      const S* mask = static_cast<const S*>(p.mask) + at;
      if (step == 1) {
        for (int64_t c = 0; c < n; ++c) s[c] += static_cast<T>(to_float(mask[c])) * T(kLog2E);
      } else {
        for (int64_t c = 0; c < n; ++c) s[c] += static_cast<T>(to_float(mask[c * step])) * T(kLog2E);
      }
    });
  }
};

// The block of rows begin ... end of head h sees keys in [first, last) at most.
struct Span {
  int64_t first, last;
};
inline Span visible(const Attention& p, const Head& h, int64_t begin, int64_t end) {
  return {h.first(p, begin), h.last(p, end - 1)};
}

}  // namespace fastnets::FASTNETS_ISA

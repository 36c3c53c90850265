// Attention forward: blocks of keys, softmax by running maximum and sum (Milakov and Gimelshein,
// https://arxiv.org/abs/1805.02867; FlashAttention, https://arxiv.org/abs/2205.14135), so memory is linear in the
// lengths. Also the softmax weights, recomputed from the log-sum-exp.

#include "attention_pairs.h"
#include "attention_short.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kQueries = 256;  // queries in a block: they share every transposed block of keys
constexpr double kSqrt2 = 1.4142135623730950488;
constexpr double kLeastWork = 1 << 17;  // multiply-adds worth waking a thread for

// A row's weights are relative to a score that only one larger by this (a factor of 2^8) replaces: after the first
// block hardly any does, and what came before keeps its scale. Of pairs every larger one does: the largest weight is 1,
// which rounding to bfloat16 leaves as it is.
template <class T, bool kPairs>
constexpr T kSlack = kPairs ? 0 : 8;

// Scratch memory of one block of queries.
template <class T>
struct Block {
  T *q, *out, *keys, *values, *scores, *largest, *sums, *keep;
  T* staged;  // keys before they are transposed

  Block(const Attention& p, int64_t rows) {
    const int64_t counts[] = {rows * padded<T>(p.d),
                              rows * padded<T>(p.dv),
                              p.d * kKeys,
                              kKeys * padded<T>(p.dv),
                              2 * kGroupRows * kKeys,
                              padded<T>(rows),
                              padded<T>(rows) * kLanes<T>,
                              kKeys,
                              kKeys * padded<T>(p.d)};
    T** const pieces[] = {&q, &out, &keys, &values, &scores, &largest, &sums, &keep, &staged};
    size_t bytes = 0;
    for (const int64_t count : counts) bytes += Arena::bytes<T>(count);
    Arena arena(0, bytes);
    for (int i = 0; i < 9; ++i) *pieces[i] = arena.take<T>(counts[i]);
  }
};

// Rows of q, and their scores with a block of keys.
template <class T, bool kPairs>
struct Queries {
  const Attention& p;
  const Scoring<T>& scoring;
  const Block<T>& at;
  const int64_t depth;
  Rows<T> q{};

  Queries(const Attention& params, const Scoring<T>& how, const Block<T>& scratch)
      : p(params), scoring(how), at(scratch), depth(kPairs ? words(p.d) : p.d) {}

  void load(const Head& h, int64_t begin, int64_t rows) {
    const int64_t first = h.at_q(p.q, begin);
    if constexpr (kPairs) {
      q = words_of(p.q, first, rows, p.d, at.q);
    } else {
      q = rows_of<T>(p, p.q, first, rows, p.d, at.q);
    }
  }
  void load_keys(const Head& h, int64_t j0, int64_t keys) const {
    if (few_queries(p)) return;
    if constexpr (kPairs) return load_words_across(p.k, h.at_k(p.k, j0), keys, p.d, at.staged, at.keys);
    load_transposed<T>(p.dtype, p.k.data, h.at_k(p.k, j0), p.k.row, keys, p.d, at.keys);
  }
  // Of rows from ... from + count against n of the keys, which begin at j0; kKeys a row.
  FASTNETS_INLINE void score(const Head& h, int64_t j0, int64_t from, int64_t count, int64_t n, T* scores) const {
    const T* rows = q.data + from * q.row;
    if (few_queries(p)) {
      return dot_rows<T>(p.dtype, p.k, h.at_k(p.k, j0), n, p.d, {rows, q.row}, count, scoring.unit, scores);
    }
    group_product<T, kPairs>(count, n, depth, {rows, q.row, 1}, at.keys, kKeys, scores, kKeys, nullptr, scoring.unit);
  }
};

// a + log2(x) for normal x > 0, rounded once; NaN stays.
template <class T>
FASTNETS_INLINE Vec<T> plus_log2(Vec<T> a, Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < kLanes<T>; ++i) a[i] += __builtin_log2(x[i]);
    return a;
  } else {
    typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
    Half of_a[2], of_x[2];
    std::memcpy(of_a, &a, sizeof a);
    std::memcpy(of_x, &x, sizeof x);
    for (int i = 0; i < 2; ++i) {
      const Vec<double> wide = __builtin_convertvector(of_x[i], Vec<double>);
      const Vec<int64_t> bits = reinterpret_cast<Vec<int64_t>>(wide);
      // x = m 2^n with m in [1, 2), and log2 m = 2 / ln 2 artanh((m - 1) / (m + 1)) = 1/2 + the same of m / sqrt(2).
      const Vec<double> m = reinterpret_cast<Vec<double>>((bits & 0xfffffffffffff) | 0x3ff0000000000000);
      const Vec<double> t = (m - kSqrt2) / (m + kSqrt2), square = t * t;
      Vec<double> series = Vec<double>{} + 1.0 / 11;
      for (int odd = 9; odd > 0; odd -= 2) series = series * square + 1.0 / odd;
      const Vec<double> n = __builtin_convertvector((bits >> 52) - 1023, Vec<double>);
      const Vec<double> sum = __builtin_convertvector(of_a[i], Vec<double>) + (n + 0.5 + 2 / kLn2 * t * series);
      of_a[i] = __builtin_convertvector(sum + (wide - wide), Half);
    }
    std::memcpy(&a, of_a, sizeof a);
    return a;
  }
}

// The log-sum-exp of scores of which `top` is the largest or nearly, in log2 as they are: the backward pass finds a
// weight of 1 again to the last bit. -inf where nothing was seen.
template <class T>
FASTNETS_INLINE Vec<T> log_sum(Vec<T> top, Vec<T> sum) {
  return select<T>(sum == Vec<T>{}, broadcast<T>(kMinusInfinity<T>), plus_log2<T>(top, sum));
}

// A group of rows that meets a block of keys.
template <class T>
struct Group {
  T* scores;  // [count, kKeys], then their weights
  int64_t from, count, n;
  alignas(64) T shrink[16];  // what the rows' former sums are multiplied with
};

// Rows begin ... begin + rows of one head.
template <class T, bool kPairs>
class Forward {
 public:
  Forward(const AttentionForward& params, const Head& head, int64_t first, int64_t end)
      : p(params),
        h(head),
        begin(first),
        rows(end - first),
        width(padded<T>(params.dv)),
        scoring(params),
        at(params, rows),
        queries(params, scoring, at) {}

  void run() {
    queries.load(h, begin, rows);
    for (int64_t r = 0; r < padded<T>(rows); ++r) {
      at.largest[r] = kMinusInfinity<T>;
      store(at.sums + r * kLanes<T>, Vec<T>{});
    }
    for (int64_t x = 0; x < rows * width; x += kLanes<T>) store(at.out + x, Vec<T>{});
    const Span span = visible(p, h, begin, begin + rows);
    for (int64_t j0 = span.first / kKeys * kKeys; j0 < span.last; j0 += kKeys) {
      meet(j0, smaller(kKeys, span.last - j0));
    }
    finish();
  }

 private:
  const AttentionForward& p;
  const Head& h;
  const int64_t begin, rows, width;
  const Scoring<T> scoring;
  const Block<T> at;
  Queries<T, kPairs> queries;
  Rows<T> values{};

  // A group's scores, weights and sums wait for one another. Between them stands the neighbour's work.
  void meet(int64_t j0, int64_t keys) {
    queries.load_keys(h, j0, keys);
    load_values(j0, keys);
    Group<T> groups[2];
    groups[0].scores = at.scores, groups[1].scores = at.scores + kGroupRows * kKeys;
    int met = 0;
    in_groups(rows, [&](int64_t from, int64_t to) {
      const Span seen = visible(p, h, begin + from, begin + to);
      const int64_t n = smaller(keys, seen.last - j0);
      if (n <= 0 || seen.first >= j0 + keys) return;
      Group<T>& group = groups[met % 2];
      group.from = from, group.count = to - from, group.n = n;
      queries.score(h, j0, from, group.count, n, group.scores);
      if (met > 0) add_values(groups[(met - 1) % 2]);
      weigh(j0, group);
      ++met;
    });
    if (met > 0) add_values(groups[(met - 1) % 2]);
  }

  void load_values(int64_t j0, int64_t keys) {
    const int64_t first = h.at_k(p.v, j0);
    if constexpr (kPairs) {
      load_row_pairs(p.v.data, first, p.v.row, keys, p.dv, at.values);
      values = {at.values, width};
    } else {
      values = rows_of<T>(p, p.v, first, keys, p.dv, at.values);
    }
  }

  void weigh(int64_t j0, Group<T>& g) const {
    const int64_t i = begin + g.from;
    const bool plain = g.n == kKeys && p.dropout == 0 && scoring.finished(h, i, i + g.count, j0, kKeys);
    plain ? weigh<true>(j0, g) : weigh<false>(j0, g);
  }

  // kPlain: a whole block whose scores are finished, without dropout.
  template <bool kPlain>
  FASTNETS_INLINE void weigh(int64_t j0, Group<T>& g) const {
    T* const largest = at.largest + g.from;
    const int64_t n = kPlain ? kKeys : g.n;
    bool replaced = false;
    for (int64_t r = 0; r < g.count; ++r) {
      T* s = g.scores + r * kKeys;
      if (!kPlain) scoring.finish(h, begin + g.from + r, j0, n, s);
      const Vec<T> tops = tops_of<T>(s, n);
      g.shrink[r] = T(1);
      if (!any_greater<T>(tops, broadcast<T>(largest[r] + kSlack<T, kPairs>))) continue;
      const T top = reduce_max<T>(tops);
      g.shrink[r] = exp2<T>(broadcast<T>(largest[r] - top))[0];
      largest[r] = top;
      replaced = true;
    }
    for (int64_t r = 0; r < g.count; ++r) {
      T* s = g.scores + r * kKeys;
      // A row that has seen nothing: every weight is 2^-inf = 0.
      const T shift = largest[r] == kMinusInfinity<T> ? T(0) : largest[r];
      const bool dropped = !kPlain && p.dropout != 0;
      if (dropped) scoring.keep(h, begin + g.from + r, j0, n, at.keep);
      T* const sums = at.sums + (g.from + r) * kLanes<T>;
      Vec<T> sum = load(sums);
      if (replaced) sum *= g.shrink[r];
      const auto weight = [&](int64_t c) __attribute__((always_inline)) {
        const Vec<T> e = exp2<T, kPairs>(load(s + c) - shift);
        sum += e;
        return dropped ? e * load(at.keep + c) : e;
      };
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < n; c += 2 * kLanes<T>) {
          const Vec<T> first = weight(c);
          store(s + c / 2, round_pairs(first, c + kLanes<T> < n ? weight(c + kLanes<T>) : Vec<T>{}));
        }
      }
#endif
      if constexpr (!kPairs) {
#pragma GCC unroll 4
        for (int64_t c = 0; c < n; c += kLanes<T>) store(s + c, weight(c));
      }
      store(sums, sum);
    }
  }

  void add_values(const Group<T>& g) const {
    group_product<T, kPairs>(g.count, p.dv, kPairs ? words(g.n) : g.n, {g.scores, kKeys, 1}, values.data, values.row,
                             at.out + g.from * width, width, g.shrink);
  }

  void finish() const {
    T* lse = static_cast<T*>(p.lse) + h.at_lse(p, begin);
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      Vec<T> sums[kLanes<T>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<T>; ++i) sums[i] = load(at.sums + (r + i) * kLanes<T>);
      const Vec<T> sum = sums_of<T>(sums), none{};
      store_partial<T>(lse + r, log_sum<T>(load(at.largest + r), sum), static_cast<int>(smaller(kLanes<T>, rows - r)));
      store(at.largest + r, select<T>(sum == none, none, T(1) / sum));
    }
    store_rows<T>(p.dtype, p.out.data, h.at_q(p.out, begin), p.out.row, rows, p.dv, at.out, width, at.largest, 1);
  }
};

void short_forward(const AttentionForward& p, const Head& h, int64_t begin, int64_t end) {
  const int64_t tile = kShortKeys * kShortQueries;
  Arena arena(0, Arena::bytes<float>(p.d * kKeys) + 2 * Arena::bytes<float>(tile));
  float* const across = arena.take<float>(p.d * kKeys);
  float *const weights = arena.take<float>(tile), *const factors = arena.take<float>(tile);
  const Rows<float> values = rows_at(p.v, h.at_k(p.v, 0));
  for (int64_t i0 = begin; i0 < end; i0 += kShortQueries) {
    const int64_t rows = smaller(kShortQueries, end - i0);
    load_transposed<float>(p.dtype, p.q.data, h.at_q(p.q, i0), p.q.row, rows, p.d, across);
    Vec<float> top, sum;
    const ShortBlock block{p, h, i0, rows};
    block.weigh(across, weights, top, sum);
    store_partial<float>(static_cast<float*>(p.lse) + h.at_lse(p, i0), log_sum<float>(top, sum),
                         static_cast<int>(rows));
    if (p.dropout != 0) block.draw(factors), block.drop(factors, weights);
    product<float, false>(rows, p.dv, h.lk, {weights, 1, kShortQueries}, values.data, values.row,
                          static_cast<float*>(p.out.data) + h.at_q(p.out, i0), p.out.row, false);
  }
}

// Rows begin ... end of one head's weights.
template <class T, bool kPairs>
void weights_rows(const AttentionWeights& p, const Head& h, int64_t begin, int64_t end) {
  const Scoring<T> scoring(p);
  const int64_t rows = end - begin;
  const Block<T> at(p, rows);
  Queries<T, kPairs> queries(p, scoring, at);
  queries.load(h, begin, rows);
  const T* lse = static_cast<const T*>(p.lse) + h.at_lse(p, begin);
  for (int64_t j0 = 0; j0 < h.lk; j0 += kKeys) {
    const int64_t n = smaller(kKeys, h.lk - j0);
    queries.load_keys(h, j0, n);
    in_groups(rows, [&](int64_t from, int64_t to) {
      queries.score(h, j0, from, to - from, n, at.scores);
      for (int64_t r = from; r < to; ++r) {
        T* s = at.scores + (r - from) * kKeys;
        scoring.finish(h, begin + r, j0, n, s);
        const T shift = lse[r] == kMinusInfinity<T> ? T(0) : lse[r];
        if (p.dropout != 0) scoring.keep(h, begin + r, j0, n, at.keep);
        for (int64_t c = 0; c < n; c += kLanes<T>) {
          const Vec<T> weight = exp2<T>(load(s + c) - shift);
          store(s + c, p.dropout != 0 ? weight * load(at.keep + c) : weight);
        }
      }
      static constexpr T one = 1;
      const int64_t first = ((h.batch * p.heads + h.head) * p.lq + begin + from) * p.lk + j0;
      store_rows<T>(p.dtype, p.weights, first, p.lk, to - from, n, at.scores, kKeys, &one, 0);
    });
  }
}

// Calls body(head, begin, end) for every block of queries of every head, on all threads.
template <class Body>
void over_blocks(const Attention& p, const Body& body) {
  const int64_t heads = p.batch * p.heads;
  int64_t blocks = p.starts_q ? 1 : (p.lq + kQueries - 1) / kQueries;
  if (!p.starts_q) {
    while (heads * blocks < 2 * thread_count() && p.lq > blocks * 2 * kKeys) blocks *= 2;
  }
  const double work = static_cast<double>(p.lq) * p.lk * (p.d + p.dv + 1) / (p.starts_q ? p.batch : blocks);
  const int64_t grain = static_cast<int64_t>(kLeastWork / (work + 1)) + 1;
  parallel(heads * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const Head h(p, unit / blocks / p.heads, unit / blocks % p.heads);
      // A causal head's later blocks are the longer ones: deal them out from both ends.
      const int64_t turn = unit % blocks, block = turn % 2 ? blocks - 1 - turn / 2 : turn / 2;
      const int64_t end = (block + 1) * h.lq / blocks;
      for (int64_t begin = block * h.lq / blocks; begin < end; begin += kQueries) {
        body(h, begin, smaller(end, begin + kQueries));
      }
    }
  });
}

}  // namespace

void attention_forward(const AttentionForward& p) {
  with_compute(p, [&](auto kind, auto pairs) {
    over_blocks(p, [&](const Head& h, int64_t begin, int64_t end) {
      if (is_short(p, h)) return short_forward(p, h, begin, end);
      Forward<decltype(kind), pairs.value>(p, h, begin, end).run();
    });
  });
}

void attention_weights(const AttentionWeights& p) {
  with_compute(p, [&](auto kind, auto pairs) {
    over_blocks(p, [&](const Head& h, int64_t begin, int64_t end) {
      weights_rows<decltype(kind), pairs.value>(p, h, begin, end);
    });
  });
}

}  // namespace fastnets::FASTNETS_ISA

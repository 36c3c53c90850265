// Attention forward: blocks of keys, softmax by running maximum and sum (Milakov and Gimelshein,
// https://arxiv.org/abs/1805.02867; FlashAttention, https://arxiv.org/abs/2205.14135), so memory is linear in the
// lengths. Also the softmax weights, recomputed from the log-sum-exp.

#include "attention.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kQueries = 256;       // queries in a block: they share every transposed block of keys
constexpr double kLeastWork = 1 << 17;  // multiply-adds worth waking a thread for

// Scratch memory of one block of queries.
template <class T>
struct Block {
  T *q, *out, *keys, *values, *scores, *largest, *sum, *keep;
  T *rounded, *staged;  // of pairs: a group's weights, keys before they are transposed

  Block(const Attention& p, int64_t rows) {
    const int64_t counts[] = {rows * padded<T>(p.d), rows * padded<T>(p.dv), p.d * kKeys,     kKeys * padded<T>(p.dv),
                              kGroupRows * kKeys,    padded<T>(rows),        padded<T>(rows), kKeys,
                              kGroupRows * kKeys,    kKeys * padded<T>(p.d)};
    T** const pieces[] = {&q, &out, &keys, &values, &scores, &largest, &sum, &keep, &rounded, &staged};
    size_t bytes = 0;
    for (const int64_t count : counts) bytes += Arena::bytes<T>(count);
    Arena arena(0, bytes);
    for (int i = 0; i < 10; ++i) *pieces[i] = arena.take<T>(counts[i]);
  }
};

// q, and its scores with a block of keys: of pairs, unscaled until then.
template <class T, bool kPairs>
struct Queries {
  const Attention& p;
  const Scoring<T>& scoring;
  const Block<T>& at;
  const int64_t depth, width;

  Queries(const Attention& params, const Scoring<T>& how, const Block<T>& scratch)
      : p(params), scoring(how), at(scratch), depth(kPairs ? words(p.d) : p.d), width(padded<T>(depth)) {}

  void load(const Head& h, int64_t begin, int64_t rows) const {
    if constexpr (kPairs) return load_words(p.q.data, h.at_q(p.q, begin), p.q.row, rows, p.d, at.q);
    load_rows<T>(p.dtype, p.q.data, h.at_q(p.q, begin), p.q.row, rows, p.d, scoring.q_factor, at.q);
  }
  void load_keys(const Head& h, int64_t j0, int64_t keys) const {
    if (few_queries(p)) return;
    if constexpr (kPairs) {
      load_words(p.k.data, h.at_k(p.k, j0), p.k.row, keys, p.d, at.staged);
      return load_transposed<T>(Dtype::kFloat32, at.staged, 0, width, keys, depth, at.keys);
    }
    load_transposed<T>(p.dtype, p.k.data, h.at_k(p.k, j0), p.k.row, keys, p.d, at.keys);
  }
  // Of rows from ... from + count against n of the keys, which begin at j0.
  FASTNETS_INLINE void score(const Head& h, int64_t j0, int64_t from, int64_t count, int64_t n) const {
    if (few_queries(p)) {
      return dot_rows(p.dtype, p.k, h.at_k(p.k, j0), n, p.d, at.q + from * width, width, count, at.scores);
    }
    group_product<T, kPairs>(count, n, depth, {at.q + from * width, width, 1}, at.keys, kKeys, at.scores, kKeys,
                             nullptr, kPairs ? scoring.q_factor : T(1));
  }
};

// Rows begin ... end of one head.
template <class T, bool kPairs>
void forward_rows(const AttentionForward& p, const Head& h, int64_t begin, int64_t end) {
  const Scoring<T> scoring(p);
  const int64_t rows = end - begin, out_width = padded<T>(p.dv);
  const Block<T> at(p, rows);
  const Queries<T, kPairs> queries(p, scoring, at);
  queries.load(h, begin, rows);
  for (int64_t r = 0; r < rows; ++r) at.largest[r] = kMinusInfinity<T>, at.sum[r] = T(0);
  for (int64_t x = 0; x < rows * out_width; x += kLanes<T>) store(at.out + x, Vec<T>{});

  const Dtype own = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  const bool values_in_place = few_queries(p) && p.dtype == own && p.dv == out_width;
  const Span span = visible(p, h, begin, end);
  for (int64_t j0 = span.first / kKeys * kKeys; j0 < span.last; j0 += kKeys) {
    const int64_t keys = smaller(kKeys, span.last - j0);
    queries.load_keys(h, j0, keys);
    const T* values = at.values;
    int64_t values_row = out_width;
    if constexpr (kPairs) {
      load_row_pairs(p.v.data, h.at_k(p.v, j0), p.v.row, keys, p.dv, at.values);
    } else if (values_in_place) {
      values = static_cast<const T*>(p.v.data) + h.at_k(p.v, j0), values_row = p.v.row;
    } else {
      load_rows<T>(p.dtype, p.v.data, h.at_k(p.v, j0), p.v.row, keys, p.dv, T(1), at.values);
    }
    in_groups(rows, [&](int64_t from, int64_t to) {
      const Span seen = visible(p, h, begin + from, begin + to);
      const int64_t n = smaller(keys, seen.last - j0), count = to - from;
      if (n <= 0 || seen.first >= j0 + keys) return;
      queries.score(h, j0, from, count, n);
      alignas(64) T shrink[16] = {}, sums[kGroupRows], tops[kGroupRows];
      for (int64_t r = 0; r < count; ++r) {  // apart from what follows: the rows' latencies overlap
        T* s = at.scores + r * kKeys;
        if (scoring.cap != T(0)) scoring.squash(s, n);
        scoring.finish(h, begin + from + r, j0, n, s);
        tops[r] = largest_of<T>(s, n);
      }
      for (int64_t r = 0; r < count; ++r) {
        T* s = at.scores + r * kKeys;
        shrink[r] = absorb<T, kPairs>(s, n, tops[r], at.largest + from + r, sums + r);
        if (p.dropout != 0) {
          scoring.keep(h, begin + from + r, j0, at.keep);
          for (int64_t c = 0; c < n; c += kLanes<T>) store(s + c, load(s + c) * load(at.keep + c));
        }
      }
      for (int64_t r = 0; r < count; r += kLanes<T>) store(shrink + r, exp2<T>(load(shrink + r)));
      for (int64_t r = 0; r < count; ++r) at.sum[from + r] = at.sum[from + r] * shrink[r] + sums[r];
      const T* weights = at.scores;
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        for (int64_t r = 0; r < count; ++r) round_words(at.scores + r * kKeys, n, at.rounded + r * kKeys);
        weights = at.rounded;
      }
#endif
      group_product<T, kPairs>(count, p.dv, kPairs ? words(n) : n, {weights, kKeys, 1}, values, values_row,
                               at.out + from * out_width, out_width, shrink);
    });
  }

  T* lse = static_cast<T*>(p.lse) + h.at_lse(p, begin);
  for (int64_t r = 0; r < rows; ++r) {
    const T sum = at.sum[r];
    // In log2, as the scores are: the backward pass finds a weight of 1 again to the last bit. Rounded once.
    const double log_sum = static_cast<double>(at.largest[r]) + __builtin_log2(static_cast<double>(sum));
    lse[r] = sum == T(0) ? kMinusInfinity<T> : static_cast<T>(log_sum);
    at.sum[r] = sum == T(0) ? T(0) : T(1) / sum;
  }
  store_rows<T>(p.dtype, p.out.data, h.at_q(p.out, begin), p.out.row, rows, p.dv, at.out, out_width, at.sum, 1);
}

// Rows begin ... end of one head's weights.
template <class T, bool kPairs>
void weights_rows(const AttentionWeights& p, const Head& h, int64_t begin, int64_t end) {
  const Scoring<T> scoring(p);
  const int64_t rows = end - begin;
  const Block<T> at(p, rows);
  const Queries<T, kPairs> queries(p, scoring, at);
  queries.load(h, begin, rows);
  const T* lse = static_cast<const T*>(p.lse) + h.at_lse(p, begin);
  for (int64_t j0 = 0; j0 < h.lk; j0 += kKeys) {
    const int64_t n = smaller(kKeys, h.lk - j0);
    queries.load_keys(h, j0, n);
    in_groups(rows, [&](int64_t from, int64_t to) {
      queries.score(h, j0, from, to - from, n);
      for (int64_t r = from; r < to; ++r) {
        T* s = at.scores + (r - from) * kKeys;
        if (scoring.cap != T(0)) scoring.squash(s, n);
        scoring.finish(h, begin + r, j0, n, s);
        const T shift = lse[r] == kMinusInfinity<T> ? T(0) : lse[r];
        if (p.dropout != 0) scoring.keep(h, begin + r, j0, at.keep);
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
      forward_rows<decltype(kind), pairs.value>(p, h, begin, end);
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

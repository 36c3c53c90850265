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

  Block(const Attention& p, int64_t rows) {
    const int64_t counts[] = {rows * padded<T>(p.d), rows * padded<T>(p.dv), p.d * kKeys,     kKeys * padded<T>(p.dv),
                              kGroupRows * kKeys,    padded<T>(rows),        padded<T>(rows), kKeys};
    T** const pieces[] = {&q, &out, &keys, &values, &scores, &largest, &sum, &keep};
    size_t bytes = 0;
    for (const int64_t count : counts) bytes += Arena::bytes<T>(count);
    Arena arena(0, bytes);
    for (int i = 0; i < 8; ++i) *pieces[i] = arena.take<T>(counts[i]);
  }
};

// Rows begin ... end of one head.
template <class T>
void forward_rows(const AttentionForward& p, const Head& h, int64_t begin, int64_t end) {
  const Scoring<T> scoring(p);
  const int64_t rows = end - begin, width = padded<T>(p.d), out_width = padded<T>(p.dv);
  const Block<T> at(p, rows);
  load_rows<T>(p.dtype, p.q.data, h.at_q(p.q, begin), p.q.row, rows, p.d, scoring.q_factor, at.q);
  for (int64_t r = 0; r < rows; ++r) at.largest[r] = kMinusInfinity<T>, at.sum[r] = T(0);
  for (int64_t x = 0; x < rows * out_width; x += kLanes<T>) store(at.out + x, Vec<T>{});

  const Span span = visible(p, h, begin, end);
  for (int64_t j0 = span.first / kKeys * kKeys; j0 < span.last; j0 += kKeys) {
    const int64_t keys = smaller(kKeys, span.last - j0);
    load_transposed<T>(p.dtype, p.k.data, h.at_k(p.k, j0), p.k.row, keys, p.d, at.keys);
    load_rows<T>(p.dtype, p.v.data, h.at_k(p.v, j0), p.v.row, keys, p.dv, T(1), at.values);
    in_groups(rows, [&](int64_t from, int64_t to) {
      const Span seen = visible(p, h, begin + from, begin + to);
      const int64_t n = smaller(keys, seen.last - j0), count = to - from;
      if (n <= 0 || seen.first >= j0 + keys) return;
      group_product<T>(count, n, p.d, {at.q + from * width, width, 1}, at.keys, kKeys, at.scores, kKeys, nullptr);
      alignas(64) T shrink[16] = {}, sums[kGroupRows];
      for (int64_t r = 0; r < count; ++r) {
        T* s = at.scores + r * kKeys;
        if (scoring.cap != T(0)) scoring.squash(s, n);
        scoring.finish(h, begin + from + r, j0, n, s);
        shrink[r] = absorb<T>(s, n, at.largest + from + r, sums + r);
        if (p.dropout != 0) {
          scoring.keep(h, begin + from + r, j0, at.keep);
          for (int64_t c = 0; c < n; c += kLanes<T>) store(s + c, load(s + c) * load(at.keep + c));
        }
      }
      for (int64_t r = 0; r < count; r += kLanes<T>) store(shrink + r, exp2<T>(load(shrink + r)));
      for (int64_t r = 0; r < count; ++r) at.sum[from + r] = at.sum[from + r] * shrink[r] + sums[r];
      group_product<T>(count, p.dv, n, {at.scores, kKeys, 1}, at.values, out_width, at.out + from * out_width,
                       out_width, shrink);
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
template <class T>
void weights_rows(const AttentionWeights& p, const Head& h, int64_t begin, int64_t end) {
  const Scoring<T> scoring(p);
  const int64_t rows = end - begin, width = padded<T>(p.d);
  const Block<T> at(p, rows);
  load_rows<T>(p.dtype, p.q.data, h.at_q(p.q, begin), p.q.row, rows, p.d, scoring.q_factor, at.q);
  const T* lse = static_cast<const T*>(p.lse) + h.at_lse(p, begin);
  for (int64_t j0 = 0; j0 < h.lk; j0 += kKeys) {
    const int64_t n = smaller(kKeys, h.lk - j0);
    load_transposed<T>(p.dtype, p.k.data, h.at_k(p.k, j0), p.k.row, n, p.d, at.keys);
    in_groups(rows, [&](int64_t from, int64_t to) {
      group_product<T>(to - from, n, p.d, {at.q + from * width, width, 1}, at.keys, kKeys, at.scores, kKeys, nullptr);
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
  with_compute(p.dtype, [&](auto kind) {
    over_blocks(p, [&](const Head& h, int64_t begin, int64_t end) { forward_rows<decltype(kind)>(p, h, begin, end); });
  });
}

void attention_weights(const AttentionWeights& p) {
  with_compute(p.dtype, [&](auto kind) {
    over_blocks(p, [&](const Head& h, int64_t begin, int64_t end) { weights_rows<decltype(kind)>(p, h, begin, end); });
  });
}

}  // namespace fastnets::FASTNETS_ISA

// Attention backward: tiles of 64 queries by 64 keys whose weights are recomputed from the log-sum-exp
// (FlashAttention, https://arxiv.org/abs/2205.14135, algorithm 4). One unit of work owns a head of k and v, so that
// every sum is in a fixed order; the mask's gradient, whose sums run across heads, is a pass of its own.

#include "attention_pairs.h"
#include "attention_short.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kRows = 64;  // queries in a tile

// A gradient's rows: x's own, or scratch memory that finish() stores to them; so is a sum that is not the whole.
template <class T>
struct Sum {
  const AttentionBackward& p;
  const AttentionArray& x;
  const int64_t at, cols;
  const bool own;
  T* const data;
  const int64_t row;

  Sum(const AttentionBackward& params, const AttentionArray& array, int64_t first, int64_t columns, T* scratch,
      bool whole = true)
      : p(params),
        x(array),
        at(first),
        cols(columns),
        own(whole && in_place<T>(params, array, columns)),
        data(own ? static_cast<T*>(array.data) + first : scratch),
        row(own ? array.row : padded<T>(columns)) {}

  void clear(int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) std::memset(data + r * row, 0, static_cast<size_t>(padded<T>(cols)) * sizeof(T));
  }
  void finish(int64_t rows) const {
    static constexpr T one = 1;
    if (!own) store_rows<T>(p.dtype, x.data, at, x.row, rows, cols, data, row, &one, 0);
  }
};

// A tile's operands. Of pairs, q, grad_out and the keys are there twice: with pairs along their rows, and of rows.
template <class T, bool kPairs>
struct Tile {
  const AttentionBackward& p;
  const Scoring<T> scoring;
  const int64_t width, out_width;  // of a row of q or k, of v
  const int64_t depth, out_depth;  // of products along them
  Rows<T> q, grad_out;             // [kRows, depth], [kRows, out_depth]
  Rows<T> q_rows, grad_out_rows;   // [kRows, d], [kRows, dv]: q and grad_out themselves if not of pairs
  Rows<T> keys;                    // [kKeys, d]
  T *for_q, *for_grad_out, *for_q_rows, *for_grad_out_rows, *for_out, *for_keys;  // room for copies
  T* keys_across;                                                                 // [depth, kKeys]
  T* values_across;                                                               // [out_depth, kKeys]
  T *weights, *grad_scores, *squashed;                                            // [kRows, kKeys]
  T *for_grad_k, *for_grad_v;                                                     // [kKeys, d], [kKeys, dv]
  T* keep;                                                                        // [kKeys]

  explicit Tile(const AttentionBackward& params)
      : p(params),
        scoring(params),
        width(padded<T>(params.d)),
        out_width(padded<T>(params.dv)),
        depth(kPairs ? words(params.d) : params.d),
        out_depth(kPairs ? words(params.dv) : params.dv) {
    const int64_t tile = kRows * kKeys, twice = kPairs;
    const int64_t counts[] = {kRows * width,
                              kRows * out_width,
                              twice * kRows * width,
                              twice * kRows * out_width,
                              kRows * out_width,
                              kKeys * width,
                              depth * kKeys,
                              out_depth * kKeys,
                              tile,
                              tile,
                              tile,
                              kKeys * width,
                              kKeys * out_width,
                              kKeys};
    T** const pieces[] = {&for_q,       &for_grad_out,  &for_q_rows, &for_grad_out_rows, &for_out,  &for_keys,
                          &keys_across, &values_across, &weights,    &grad_scores,       &squashed, &for_grad_k,
                          &for_grad_v,  &keep};
    size_t bytes = 0;
    for (const int64_t count : counts) bytes += Arena::bytes<T>(count);
    Arena arena(0, bytes);
    for (int i = 0; i < 14; ++i) *pieces[i] = arena.take<T>(counts[i]);
  }

  void load_queries(const Head& h, int64_t i0, int64_t rows) {
    const int64_t at_q = h.at_q(p.q, i0), at_grad = h.at_q(p.grad_out, i0);
    if constexpr (kPairs) {
      q = words_of(p.q, at_q, rows, p.d, for_q);
      grad_out = words_of(p.grad_out, at_grad, rows, p.dv, for_grad_out);
      load_row_pairs(p.q.data, at_q, p.q.row, rows, p.d, for_q_rows);
      load_row_pairs(p.grad_out.data, at_grad, p.grad_out.row, rows, p.dv, for_grad_out_rows);
      q_rows = {for_q_rows, width}, grad_out_rows = {for_grad_out_rows, out_width};
    } else {
      q_rows = q = rows_of<T>(p, p.q, at_q, rows, p.d, for_q);
      grad_out_rows = grad_out = rows_of<T>(p, p.grad_out, at_grad, rows, p.dv, for_grad_out);
    }
  }
  void load_keys(const Head& h, int64_t j0, int64_t n) {
    if (few_queries(p)) return;
    load_across(p.k, h.at_k(p.k, j0), n, p.d, for_grad_k, keys_across);
    load_across(p.v, h.at_k(p.v, j0), n, p.dv, for_grad_v, values_across);
  }
  void load_key_rows(const Head& h, int64_t j0, int64_t n) {
    const int64_t first = h.at_k(p.k, j0);
    if constexpr (kPairs) {
      load_row_pairs(p.k.data, first, p.k.row, n, p.d, for_keys);
      keys = {for_keys, width};
    } else {
      keys = rows_of<T>(p, p.k, first, n, p.d, for_keys);
    }
  }

  // For rows i0 ...: what the softmax subtracts, sum(grad_out * out) - grad_lse, and the log-sum-exp, with which an
  // empty row's weights are 2^-inf. Of the former only -grad_lse where a tile sees the whole row: it needs neither out
  // nor lse, whose rounding tells where scores are large.
  void row_terms(const Head& h, int64_t i0, int64_t rows, T* subtract, T* shift) {
    const int64_t at = h.at_lse(p, i0), cols = whole(h) ? 0 : out_width;
    Rows<T> out{}, grad{};
    if (cols != 0) {
      out = rows_of<T>(p, p.out, h.at_q(p.out, i0), rows, p.dv, for_out);
      grad = rows_of<T>(p, p.grad_out, h.at_q(p.grad_out, i0), rows, p.dv, kPairs ? for_grad_out_rows : for_grad_out);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> dots{};
      for (int64_t c = 0; c < cols; c += kLanes<T>) {
        dots = fma<T>(load(grad.data + r * grad.row + c), load(out.data + r * out.row + c), dots);
      }
      subtract[r] = reduce_add<T>(dots) - (p.grad_lse ? static_cast<const T*>(p.grad_lse)[at + r] : T(0));
      const T lse = static_cast<const T*>(p.lse)[at + r];
      shift[r] = lse == kMinusInfinity<T> ? -kMinusInfinity<T> : lse;
    }
  }

  // Of the loaded queries and keys: the weights (after dropout), and `scale` times the gradient of the scores as the
  // mask meets them.
  void run(const Head& h, int64_t i0, int64_t rows, int64_t j0, int64_t n, const T* subtract, const T* shift, T scale) {
    if (few_queries(p)) {
      dot_rows<T>(p.dtype, p.k, h.at_k(p.k, j0), n, p.d, q, rows, scoring.unit, weights);
      dot_rows<T>(p.dtype, p.v, h.at_k(p.v, j0), n, p.dv, grad_out, rows, T(1), grad_scores);
    } else {
      product<T, kPairs>(rows, n, depth, {q.data, q.row, 1}, keys_across, kKeys, weights, kKeys, false, scoring.unit);
      product<T, kPairs>(rows, n, out_depth, {grad_out.data, grad_out.row, 1}, values_across, kKeys, grad_scores, kKeys,
                         false);
    }
    if (n == kKeys && !whole(h) && p.dropout == 0 && !p.grad_weights && scoring.finished(h, i0, i0 + rows, j0, n)) {
      for (int64_t r = 0; r < rows; ++r) {
        T *s = weights + r * kKeys, *grad = grad_scores + r * kKeys;
#pragma GCC unroll 4
        for (int64_t c = 0; c < kKeys; c += kLanes<T>) {
          const Vec<T> weight = exp2<T, kPairs>(load(s + c) - shift[r]);
          store(s + c, weight);
          store(grad + c, weight * scale * (load(grad + c) - subtract[r]));
        }
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      T *s = weights + r * kKeys, *grad = grad_scores + r * kKeys;
      scoring.finish(h, i0 + r, j0, n, s, squashed + r * kKeys);
      if (p.grad_weights) add_grad_weights(((h.batch * p.heads + h.head) * p.lq + i0 + r) * p.lk + j0, n, grad);
      if (p.dropout != 0) scoring.keep(h, i0 + r, j0, n, keep);
      T less = subtract[r], inverse = 1;
      if (whole(h)) {
        const T top = reduce_max<T>(tops_of<T>(s, n)), relative = top == kMinusInfinity<T> ? T(0) : top;
        Vec<T> sums{}, dots{};
        for (int64_t c = 0; c < n; c += kLanes<T>) {
          const Vec<T> weight = exp2<T>(load(s + c) - relative);
          store(s + c, weight);
          sums += weight;
          dots = fma<T>(weight * factors(c), load(grad + c), dots);
        }
        const T sum = reduce_add<T>(sums);
        inverse = sum == T(0) ? T(0) : T(1) / sum;
        less += reduce_add<T>(dots) * inverse;
      }
      for (int64_t c = 0; c < n; c += kLanes<T>) {
        const Vec<T> weight = whole(h) ? load(s + c) * inverse : exp2<T>(load(s + c) - shift[r]), factor = factors(c);
        store(s + c, weight * factor);
        store(grad + c, weight * scale * (load(grad + c) * factor - less));
      }
    }
  }

  // From the gradient of the capped scores to that of the product q k.
  void uncap(int64_t rows, int64_t n) {
    if (scoring.cap == T(0)) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = r * kKeys; c < r * kKeys + n; c += kLanes<T>) {
        const Vec<T> t = load(squashed + c);
        store(grad_scores + c, load(grad_scores + c) * (T(1) - t * t));
      }
    }
  }

  // Adds the tile's share to the gradient of q in its rows and to those of k and v, which the first one sets. Uses up
  // weights, grad_scores and squashed.
  void add_gradients(int64_t rows, int64_t n, bool first, const Sum<T>& grad_k, const Sum<T>& grad_v, T* grad_q,
                     int64_t grad_q_row) {
    const T *across = weights, *grad_across = grad_scores, *grad_along = grad_scores;  // q across, along k
    const int64_t row_depth = kPairs ? words(rows) : rows, key_depth = kPairs ? words(n) : n;
#if defined(__AVX512BF16__)
    if constexpr (kPairs) {
      T* const half = squashed + kRows / 2 * kKeys;
      round_row_pairs(weights, rows, n, squashed);
      round_row_pairs(grad_scores, rows, n, half);
      for (int64_t r = 0; r < rows; ++r) round_words(grad_scores + r * kKeys, n, weights + r * kKeys);
      across = squashed, grad_across = half, grad_along = weights;
    }
#endif
    product<T, kPairs>(n, p.dv, row_depth, {across, 1, kKeys}, grad_out_rows.data, grad_out_rows.row, grad_v.data,
                       grad_v.row, !first);
    product<T, kPairs>(n, p.d, row_depth, {grad_across, 1, kKeys}, q_rows.data, q_rows.row, grad_k.data, grad_k.row,
                       !first);
    product<T, kPairs>(rows, p.d, key_depth, {grad_along, kKeys, 1}, keys.data, keys.row, grad_q, grad_q_row, true);
  }

 private:
  // to[c][r] of k's or v's rows; `staged` has room for the rows.
  void load_across(const AttentionArray& x, int64_t at, int64_t n, int64_t cols, T* staged, T* to) {
    if constexpr (kPairs) return load_words_across(x, at, n, cols, staged, to);
    load_transposed<T>(p.dtype, x.data, at, x.row, n, cols, to);
  }

  // One tile sees all of a row's keys. (With grad_weights, their part in what is subtracted is in grad_lse.)
  bool whole(const Head& h) const { return h.lk <= kKeys && !p.grad_weights; }

  FASTNETS_INLINE Vec<T> factors(int64_t c) const { return p.dropout != 0 ? load(keep + c) : broadcast<T>(T(1)); }

  void add_grad_weights(int64_t at, int64_t n, T* grad) const {
    with_stored<T>(p.dtype, [&](auto kind) {
      using S = decltype(kind);
      const S* from = static_cast<const S*>(p.grad_weights) + at;
      for (int64_t c = 0; c < n; ++c) grad[c] += to_float(from[c]);
    });
  }
};

// One head of k and v, whose group's heads are all short.
void short_backward(const AttentionBackward& p, const Head& group, int64_t batch) {
  const int64_t tile = kShortKeys * kShortQueries;
  Arena arena(0, Arena::bytes<float>(p.d * kKeys) + Arena::bytes<float>(p.dv * kKeys) + 3 * Arena::bytes<float>(tile));
  float* const across = arena.take<float>(p.d * kKeys);
  float* const grad_across = arena.take<float>(p.dv * kKeys);
  float *const weights = arena.take<float>(tile), *const grad_scores = arena.take<float>(tile);
  float* const factors = p.dropout != 0 ? arena.take<float>(tile) : nullptr;
  const Rows<float> keys = rows_at(p.k, group.at_k(p.k, 0));
  float* const grad_k = static_cast<float*>(p.grad_k.data) + group.at_k(p.grad_k, 0);
  float* const grad_v = static_cast<float*>(p.grad_v.data) + group.at_k(p.grad_v, 0);
  bool accumulate = false;
  for (int64_t g = 0; g < p.groups; ++g) {
    const Head h(p, batch, group.kv_head * p.groups + g);
    for (int64_t i0 = 0; i0 < h.lq; i0 += kShortQueries) {
      const int64_t rows = smaller(kShortQueries, h.lq - i0);
      const ShortBlock block{p, h, i0, rows};
      const Rows<float> q = rows_at(p.q, h.at_q(p.q, i0)), grad_out = rows_at(p.grad_out, h.at_q(p.grad_out, i0));
      load_transposed<float>(p.dtype, q.data, 0, q.row, rows, p.d, across);
      load_transposed<float>(p.dtype, grad_out.data, 0, grad_out.row, rows, p.dv, grad_across);
      Vec<float> top, sum, less{};
      block.weigh(across, weights, top, sum);
      if (p.grad_lse) {
        less = -load_partial(static_cast<const float*>(p.grad_lse) + h.at_lse(p, i0), static_cast<int>(rows));
      }
      if (factors) block.draw(factors);
      block.grad_scores(grad_across, weights, less, factors, grad_scores);
      if (factors) block.drop(factors, weights);
      product<float, false>(h.lk, p.dv, rows, {weights, kShortQueries, 1}, grad_out.data, grad_out.row, grad_v,
                            p.grad_v.row, accumulate);
      product<float, false>(h.lk, p.d, rows, {grad_scores, kShortQueries, 1}, q.data, q.row, grad_k, p.grad_k.row,
                            accumulate);
      product<float, false>(rows, p.d, h.lk, {grad_scores, 1, kShortQueries}, keys.data, keys.row,
                            static_cast<float*>(p.grad_q.data) + h.at_q(p.grad_q, i0), p.grad_q.row, false);
      accumulate = true;
    }
  }
}

// Keys' blocks split, split + splits, ... of one head of k and v.
template <class T, bool kPairs>
void backward_unit(const AttentionBackward& p, int64_t batch, int64_t kv_head, int64_t split) {
  const Head group(p, batch, kv_head * p.groups);
  if (p.splits == 1 && !p.grad_weights && is_short(p, group)) return short_backward(p, group, batch);
  Tile<T, kPairs> tile(p);
  const int64_t width = tile.width;
  const int64_t per_head = group.lq * width, rows_in_all = p.groups * group.lq;
  const int64_t room = p.splits == 1 && !in_place<T>(p, p.grad_q, p.d) ? p.groups * per_head : 0;
  Arena arena(1, Arena::bytes<T>(room) + 2 * Arena::bytes<T>(rows_in_all));
  T* subtract = arena.take<T>(rows_in_all);
  T* shift = arena.take<T>(rows_in_all);
  T* for_grad_q = p.splits == 1 ? arena.take<T>(room)
                                : static_cast<T*>(p.partial_grad_q) +
                                      ((batch * p.heads / p.groups + kv_head) * p.splits + split) * p.groups * per_head;
  const auto sum_of_q = [&](int64_t g) {
    return Sum<T>(p, p.grad_q, Head(p, batch, kv_head * p.groups + g).at_q(p.grad_q, 0), p.d, for_grad_q + g * per_head,
                  p.splits == 1);
  };
  for (int64_t g = 0; g < p.groups; ++g) {
    const Head h(p, batch, kv_head * p.groups + g);
    sum_of_q(g).clear(h.lq);
    for (int64_t i0 = 0; i0 < h.lq; i0 += kRows) {
      const int64_t rows = smaller(kRows, h.lq - i0);
      tile.row_terms(h, i0, rows, subtract + g * h.lq + i0, shift + g * h.lq + i0);
    }
  }

  for (int64_t j0 = split * kKeys; j0 < group.lk; j0 += p.splits * kKeys) {
    const int64_t n = smaller(kKeys, group.lk - j0);
    const Sum<T> grad_k(p, p.grad_k, group.at_k(p.grad_k, j0), p.d, tile.for_grad_k);
    const Sum<T> grad_v(p, p.grad_v, group.at_k(p.grad_v, j0), p.dv, tile.for_grad_v);
    tile.load_keys(group, j0, n);
    tile.load_key_rows(group, j0, n);
    bool first = true;
    for (int64_t g = 0; g < p.groups; ++g) {
      const Head h(p, batch, kv_head * p.groups + g);
      const Sum<T> grad_q = sum_of_q(g);
      for (int64_t i0 = 0; i0 < h.lq; i0 += kRows) {
        const int64_t rows = smaller(kRows, h.lq - i0), row = g * h.lq + i0;
        const Span span = visible(p, h, i0, i0 + rows);
        if (span.first >= j0 + n || span.last <= j0) continue;
        tile.load_queries(h, i0, rows);
        tile.run(h, i0, rows, j0, n, subtract + row, shift + row, static_cast<T>(p.scale));
        tile.uncap(rows, n);
        tile.add_gradients(rows, n, first, grad_k, grad_v, grad_q.data + i0 * grad_q.row, grad_q.row);
        first = false;
      }
    }
    if (first) grad_k.clear(n), grad_v.clear(n);
    grad_k.finish(n), grad_v.finish(n);
  }
  if (p.splits != 1) return;
  for (int64_t g = 0; g < p.groups; ++g) sum_of_q(g).finish(group.lq);
}

// Adds the splits' sums for one query head.
template <class T>
void join_splits(const AttentionBackward& p, int64_t batch, int64_t head) {
  const Head h(p, batch, head);
  const int64_t size = h.lq * padded<T>(p.d), step = p.groups * size;
  T* sum = static_cast<T*>(p.partial_grad_q) +
           ((batch * p.heads / p.groups + h.kv_head) * p.splits * p.groups + head % p.groups) * size;
  for (int64_t split = 1; split < p.splits; ++split) {
    for (int64_t x = 0; x < size; x += kLanes<T>) store(sum + x, load(sum + x) + load(sum + split * step + x));
  }
  static constexpr T one = 1;
  store_rows<T>(p.dtype, p.grad_q.data, h.at_q(p.grad_q, 0), p.grad_q.row, h.lq, p.d, sum, padded<T>(p.d), &one, 0);
}

// ---- the mask's gradient ---------------------------------------------------------------------------------------

// The range that a dimension of the mask stands for: one index, or all of them where the mask has size 1.
struct Range {
  int64_t begin, end;
};

// sum += tile, its rows, its columns or both added up first.
template <class T>
void add_tile(int64_t rows, int64_t cols, const T* tile, bool one_row, bool one_col, T* sum) {
  for (int64_t c = 0; c < cols; c += kLanes<T>) {
    Vec<T> column{};
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> x = keep_first<T>(load(tile + r * kKeys + c), static_cast<int>(smaller(kLanes<T>, cols - c)), T(0));
      if (one_row) {
        column += x;
      } else if (one_col) {
        sum[r * kKeys] += reduce_add<T>(x);
      } else {
        store(sum + r * kKeys + c, load(sum + r * kKeys + c) + x);
      }
    }
    if (one_row && one_col) {
      sum[0] += reduce_add<T>(column);
    } else if (one_row) {
      store(sum + c, load(sum + c) + column);
    }
  }
}

// The part of the mask's gradient at (b, h, rows from i0, columns from j0), in the mask's own indices.
template <class T, bool kPairs>
void mask_unit(const AttentionBackward& p, int64_t b, int64_t h, int64_t i0, int64_t j0) {
  Tile<T, kPairs> tile(p);
  const auto range = [](int64_t size, int64_t full, int64_t at, int64_t step) {
    return size == 1 ? Range{0, full} : Range{at, smaller(full, at + step)};
  };
  const int64_t* sizes = p.mask_sizes;
  const Range batches = range(sizes[0], p.batch, b, 1), heads = range(sizes[1], p.heads, h, 1);
  const Range rows = range(sizes[2], p.lq, i0, kRows), keys = range(sizes[3], p.lk, j0, kKeys);
  Arena arena(1, Arena::bytes<T>(kRows * kKeys) + 2 * Arena::bytes<T>(kRows));
  T* sum = arena.take<T>(kRows * kKeys);
  T *subtract = arena.take<T>(kRows), *shift = arena.take<T>(kRows);
  for (int64_t x = 0; x < kRows * kKeys; x += kLanes<T>) store(sum + x, Vec<T>{});

  for (int64_t batch = batches.begin; batch < batches.end; ++batch) {
    for (int64_t head = heads.begin; head < heads.end; ++head) {
      const Head at(p, batch, head);
      for (int64_t i = rows.begin; i < rows.end; i += kRows) {
        const int64_t ni = smaller(kRows, rows.end - i);
        const Span span = visible(p, at, i, i + ni);
        tile.load_queries(at, i, ni);
        tile.row_terms(at, i, ni, subtract, shift);
        for (int64_t j = keys.begin; j < keys.end; j += kKeys) {
          const int64_t nj = smaller(kKeys, keys.end - j);
          if (span.first >= j + nj || span.last <= j) continue;
          tile.load_keys(at, j, nj);
          tile.run(at, i, ni, j, nj, subtract, shift, T(1));
          add_tile(ni, nj, tile.grad_scores, sizes[2] == 1, sizes[3] == 1, sum);
        }
      }
    }
  }

  const int64_t height = sizes[2] == 1 ? 1 : rows.end - rows.begin, across = sizes[3] == 1 ? 1 : keys.end - keys.begin;
  with_storage(p.mask_dtype, [&](auto kind) {
    using S = decltype(kind);
    S* to = static_cast<S*>(p.grad_mask) + ((b * sizes[1] + h) * sizes[2] + i0) * sizes[3] + j0;
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t c = 0; c < across; ++c) {
        to[r * sizes[3] + c] = from_float<S>(static_cast<Compute<S>>(sum[r * kKeys + c]));
      }
    }
  });
}

template <class T, bool kPairs>
void mask_gradient(const AttentionBackward& p) {
  const int64_t* sizes = p.mask_sizes;
  const int64_t row_blocks = (sizes[2] + kRows - 1) / kRows, key_blocks = (sizes[3] + kKeys - 1) / kKeys;
  parallel(sizes[0] * sizes[1] * row_blocks * key_blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit / key_blocks, head = row / row_blocks;
      mask_unit<T, kPairs>(p, head / sizes[1], head % sizes[1], row % row_blocks * kRows, unit % key_blocks * kKeys);
    }
  });
}

}  // namespace

void attention_backward(const AttentionBackward& p) {
  constexpr double least_work = 1 << 16;  // multiply-adds worth waking a thread for
  with_compute(p, [&](auto kind, auto pairs) {
    using T = decltype(kind);
    const int64_t kv_heads = p.heads / p.groups;
    const double work = 3.0 * p.lq * p.lk * p.groups * (p.d + p.dv + 1) / (p.starts_q ? p.batch : p.splits);
    const int64_t grain = static_cast<int64_t>(least_work / (work + 1)) + 1;
    parallel(p.batch * kv_heads * p.splits, grain, [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t head = unit / p.splits;
        backward_unit<T, pairs.value>(p, head / kv_heads, head % kv_heads, unit % p.splits);
      }
    });
    if (p.splits != 1) {
      parallel(p.batch * p.heads, 1, [&](int64_t first, int64_t last) {
        for (int64_t unit = first; unit < last; ++unit) join_splits<T>(p, unit / p.heads, unit % p.heads);
      });
    }
    if (p.grad_mask) mask_gradient<T, pairs.value>(p);
  });
}

}  // namespace fastnets::FASTNETS_ISA

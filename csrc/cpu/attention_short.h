// Attention to at most 16 keys: lanes are queries and a score's keys are registers, so that the softmax runs over
// registers and no sum crosses lanes. float32 without ALiBi or cap, with masks of keys alone; wide vectors alone have
// the registers.
#pragma once

#include "attention.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kShortKeys = kVectorBytes == 64 ? 16 : 0;
constexpr int kShortQueries = kLanes<float>;

inline bool is_short(const Attention& p, const Head& h) {
  return h.lk > 0 && h.lk <= kShortKeys && h.lq > 0 && p.dtype == Dtype::kFloat32 && !few_queries(p) &&
         p.d % kLanes<float> == 0 && p.dv % kLanes<float> == 0 && !p.slopes && p.softcap == 0 &&
         (p.mask_kind == MaskKind::kNone || p.mask_strides[2] == 0);
}

inline Rows<float> rows_at(const AttentionArray& x, int64_t at) {
  return {static_cast<const float*>(x.data) + at, x.row};
}

// sums[j] = row j of x times the lanes' vectors, the columns of `across`.
template <int kCount>
FASTNETS_INLINE void products_across(const Rows<float>& x, const float* across, int64_t depth, Vec<float>* sums) {
  Vec<float> local[kCount] = {};
  for (int64_t c = 0; c < depth; ++c) {
    const Vec<float> lanes = load(across + c * kKeys);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) local[j] = fma<float>(broadcast(x.data[j * x.row + c]), lanes, local[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < kCount; ++j) sums[j] = local[j];
}

// Queries i0 ... i0 + count of one head, at most a vector of them.
struct ShortBlock {
  const Attention& p;
  const Head& h;
  const int64_t i0, count;

  // The lanes' weights of the keys, [keys][lanes]; `across` has q's columns. Also the largest scores, in log2, and the
  // sums of the weights relative to them, 0 where a lane sees no key.
  void weigh(const float* across, float* weights, Vec<float>& top, Vec<float>& sum) const {
    with_keys([&](auto keys) {
      constexpr int n = keys.value;
      const Vec<float> unit = broadcast(Scoring<float>(p).unit), none{};
      const Vec<float> empty = broadcast(kMinusInfinity<float>);
      Vec<float> scores[n];
      products_across<n>(rows_at(p.k, h.at_k(p.k, 0)), across, p.d, scores);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) scores[j] *= unit;
      if (p.mask_kind != MaskKind::kNone) {
        float mask[n];
        load_mask(n, mask);
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) scores[j] += mask[j];
      }
      if (h.first(p, i0 + count - 1) > 0 || h.last(p, i0) < n) {
        Vec<float> first{}, last{};
        for (int64_t i = 0; i < count; ++i) {
          first[i] = static_cast<float>(h.first(p, i0 + i));
          last[i] = static_cast<float>(h.last(p, i0 + i));
        }
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) {
          const Vec<float> key = broadcast(static_cast<float>(j));
          scores[j] = select<float>(key < last, select<float>(key < first, empty, scores[j]), empty);
        }
      }
      top = scores[0];
#pragma GCC unroll 16
      for (int j = 1; j < n; ++j) top = maximum<float>(scores[j], top);
      const Vec<float> shift = select<float>(top == empty, none, top);
      sum = none;
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) sum += scores[j] = exp2<float>(scores[j] - shift);
      const Vec<float> inverse = select<float>(sum == none, none, 1.0f / sum);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) store(weights + j * kShortQueries, scores[j] * inverse);
    });
  }

  // What dropout multiplies the weights with, as they lie.
  void draw(float* factors) const {
    const Dropout<float> dropout(p.dropout);
    const uint32_t head = static_cast<uint32_t>(h.head), batch = static_cast<uint32_t>(h.batch);
    for (int64_t l = 0; l < count; l += kRandomLanes) {
      const RandomWords queries = random_lanes() + static_cast<uint32_t>(i0 + l);
      for (int64_t j = 0; j < h.lk; ++j) {
        const RandomWords key = RandomWords{} + static_cast<uint32_t>(j);
        const RandomBlocks drawn(p.seed, key, queries, head, batch);
        dropout.factors(drawn.words[0], factors + j * kShortQueries + l);
      }
    }
  }
  void drop(const float* factors, float* weights) const {
    for (int64_t at = 0; at < h.lk * kShortQueries; at += kShortQueries) {
      store(weights + at, load(weights + at) * load(factors + at));
    }
  }

  // p.scale times the gradients of the scores, as the weights lie; `across` has grad_out's columns, `less` is added to
  // what the softmax subtracts, `factors` are dropout's or null.
  void grad_scores(const float* across, const float* weights, Vec<float> less, const float* factors,
                   float* grad_scores) const {
    with_keys([&](auto keys) {
      constexpr int n = keys.value;
      Vec<float> grad[n];
      products_across<n>(rows_at(p.v, h.at_k(p.v, 0)), across, p.dv, grad);
      if (factors) {
#pragma GCC unroll 16
        for (int j = 0; j < n; ++j) grad[j] *= load(factors + j * kShortQueries);
      }
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) less = fma<float>(load(weights + j * kShortQueries), grad[j], less);
      const Vec<float> scale = broadcast(static_cast<float>(p.scale));
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) {
        store(grad_scores + j * kShortQueries, load(weights + j * kShortQueries) * scale * (grad[j] - less));
      }
    });
  }

 private:
  // What is added to the scores of every query.
  void load_mask(int64_t n, float* to) const {
    const int64_t *strides = p.mask_strides, at = h.batch * strides[0] + h.head * strides[1];
    if (p.mask_kind == MaskKind::kBool) {
      const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
      for (int64_t j = 0; j < n; ++j) to[j] = mask[j * strides[3]] ? 0.0f : kMinusInfinity<float>;
      return;
    }
    with_storage(p.mask_dtype, [&](auto kind) {
      using S = decltype(kind);
      const S* mask = static_cast<const S*>(p.mask) + at;
      for (int64_t j = 0; j < n; ++j) to[j] = static_cast<float>(to_float(mask[j * strides[3]]) * kLog2E);
    });
  }

  template <class Body>
  FASTNETS_INLINE void with_keys(const Body& body) const {
    if constexpr (kShortKeys > 0) with_count<kShortKeys>(static_cast<int>(h.lk), body);
  }
};

}  // namespace fastnets::FASTNETS_ISA

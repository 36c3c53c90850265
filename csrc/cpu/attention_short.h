// Attention to at most 16 keys: lanes are queries and a score's keys are registers, so that the softmax runs over
// registers and no sum crosses lanes. float32 without mask, bias, cap or dropout; wide vectors alone have the
// registers.
#pragma once

#include "attention.h"

namespace fastnets::FASTNETS_ISA {

constexpr int kShortKeys = kVectorBytes == 64 ? 16 : 0;
constexpr int kShortQueries = kLanes<float>;

inline bool is_short(const Attention& p, const Head& h) {
  return h.lk > 0 && h.lk <= kShortKeys && h.lq > 0 && p.dtype == Dtype::kFloat32 && !few_queries(p) &&
         p.d % kLanes<float> == 0 && p.dv % kLanes<float> == 0 && p.mask_kind == MaskKind::kNone && !p.slopes &&
         p.softcap == 0 && p.dropout == 0;
}

inline Rows<float> rows_at(const AttentionArray& x, int64_t at) {
  return {static_cast<const float*>(x.data) + at, x.row};
}

// Queries i0 ... i0 + count of one head, at most a vector of them.
template <int kCount>
struct ShortBlock {
  const Attention& p;
  const Head& h;
  const int64_t i0, count;

  // sums[j] = row j of x times the lanes' vectors, the columns of `across`.
  FASTNETS_INLINE void products(const Rows<float>& x, const float* across, int64_t depth, Vec<float>* sums) const {
    Vec<float> local[kCount] = {};
    for (int64_t c = 0; c < depth; ++c) {
      const Vec<float> lanes = load(across + c * kKeys);
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) local[j] = fma<float>(broadcast(x.data[j * x.row + c]), lanes, local[j]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) sums[j] = local[j];
  }

  // The lanes' weights of the kCount keys; `across` has q's columns. Also the largest scores, in log2, and the sums of
  // the weights relative to them; all are 0 where a lane sees no key.
  FASTNETS_INLINE void weigh(const float* across, Vec<float>* weights, Vec<float>& top, Vec<float>& sum) const {
    products(rows_at(p.k, h.at_k(p.k, 0)), across, p.d, weights);
    const Vec<float> unit = broadcast(static_cast<float>(p.scale * kLog2E)), none{};
    const Vec<float> empty = broadcast(kMinusInfinity<float>);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) weights[j] *= unit;
    if (h.first(p, i0 + count - 1) > 0 || h.last(p, i0) < kCount) {
      Vec<float> first{}, last{};
      for (int64_t i = 0; i < count; ++i) {
        first[i] = static_cast<float>(h.first(p, i0 + i));
        last[i] = static_cast<float>(h.last(p, i0 + i));
      }
#pragma GCC unroll 16
      for (int j = 0; j < kCount; ++j) {
        const Vec<float> key = broadcast(static_cast<float>(j));
        weights[j] = select<float>(key < last, select<float>(key < first, empty, weights[j]), empty);
      }
    }
    top = weights[0];
#pragma GCC unroll 16
    for (int j = 1; j < kCount; ++j) top = maximum<float>(weights[j], top);
    const Vec<float> shift = select<float>(top == empty, none, top);
    sum = none;
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) sum += weights[j] = exp2<float>(weights[j] - shift);
    const Vec<float> inverse = select<float>(sum == none, none, 1.0f / sum);
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j) weights[j] *= inverse;
  }
};

// Calls body(block, keys) with the blocks of queries begin ... end; keys is the constant h.lk.
template <class Body>
FASTNETS_INLINE void in_short_blocks(const Attention& p, const Head& h, int64_t begin, int64_t end, const Body& body) {
  if constexpr (kShortKeys > 0) {
    with_count<kShortKeys>(static_cast<int>(h.lk), [&](auto keys) {
      for (int64_t i = begin; i < end; i += kShortQueries) {
        body(ShortBlock<keys.value>{p, h, i, smaller(kShortQueries, end - i)}, keys);
      }
    });
  }
}

}  // namespace fastnets::FASTNETS_ISA

// The collectives that CUDA C++ offers as functions; those of the tensor cores are in ../cuda/tensor_core.h.
#include <algorithm>

#include "runtime.h"

namespace simt {
namespace {

struct Shuffled {
  uint64_t bits, result;
  unsigned source;
};

void shuffle_lanes(void* const* operands, uint32_t mask) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    Shuffled& mine = *static_cast<Shuffled*>(operands[lane]);
    mine.result = static_cast<const Shuffled*>(operands[mine.source])->bits;
  }
}

struct Vote {
  bool predicate;
  uint32_t result;
};

void count_votes(void* const* operands, uint32_t mask) {
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && static_cast<const Vote*>(operands[lane])->predicate) votes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<Vote*>(operands[lane])->result = votes;
  }
}

struct Reduced {
  int64_t value;
  Reduction how;
};

int64_t combine_two(Reduction how, int64_t a, int64_t b) {
  switch (how) {
    case Reduction::kAdd: return a + b;
    case Reduction::kMin: return std::min(a, b);
    case Reduction::kMax: return std::max(a, b);
    case Reduction::kAnd: return a & b;
    case Reduction::kOr: return a | b;
    case Reduction::kXor: return a ^ b;
  }
  __builtin_unreachable();
}

void reduce_lanes(void* const* operands, uint32_t mask) {
  const Reduced* first = nullptr;
  int64_t result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Reduced* const mine = static_cast<const Reduced*>(operands[lane]);
    result = first == nullptr ? mine->value : combine_two(mine->how, result, mine->value);
    if (first == nullptr) first = mine;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0) static_cast<Reduced*>(operands[lane])->value = result;
  }
}

}  // namespace

uint64_t shuffle(const char* what, uint32_t mask, uint64_t bits, unsigned source, Where at) {
  if ((mask >> source & 1) == 0) {
    fail(std::string(what) + " reads lane " + std::to_string(source) + ", which is not in its mask", at);
  }
  Shuffled operands{bits, 0, source};
  collective(what, mask, &operands, shuffle_lanes, at);
  return operands.result;
}

uint32_t ballot(const char* what, uint32_t mask, bool predicate, Where at) {
  Vote operands{predicate, 0};
  collective(what, mask, &operands, count_votes, at);
  return operands.result;
}

int64_t reduce(const char* what, uint32_t mask, int64_t value, Reduction how, Where at) {
  Reduced operands{value, how};
  collective(what, mask, &operands, reduce_lanes, at);
  return operands.value;
}

}  // namespace simt

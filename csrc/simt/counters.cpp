// Counts what warps do to memory. The lanes of a warp run one after the other; `watch` puts their accesses together
// into the instructions that a GPU would issue, by line and turn.
#include <algorithm>
#include <bit>

#include "device.h"

namespace simt {

Counters* counting = nullptr;

namespace {

constexpr uint64_t kSector = 32;
constexpr unsigned kBanks = 32, kBankBytes = 4;

uint64_t sectors(const Request& request) {
  std::vector<uint64_t> touched;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((request.active >> lane & 1) == 0) continue;
    const uint64_t begin = request.addresses[lane];
    for (uint64_t s = begin / kSector; s <= (begin + request.bytes - 1) / kSector; ++s) touched.push_back(s);
  }
  std::sort(touched.begin(), touched.end());
  return std::unique(touched.begin(), touched.end()) - touched.begin();
}

// A pass serves one 4-byte word of every bank, to any number of lanes. Wider accesses are served in groups of lanes
// that together ask for at most 128 bytes.
struct Passes {
  uint64_t taken = 0, needed = 0;
};

Passes passes(const Request& request) {
  const unsigned group = std::min(32u, kBanks * kBankBytes / std::max(request.bytes, kBankBytes));
  Passes result;
  for (unsigned first = 0; first < 32; first += group) {
    std::vector<uint64_t> words[kBanks];
    for (unsigned lane = first; lane < first + group; ++lane) {
      if ((request.active >> lane & 1) == 0) continue;
      const uint64_t begin = request.addresses[lane];
      for (uint64_t w = begin / kBankBytes; w <= (begin + request.bytes - 1) / kBankBytes; ++w) {
        std::vector<uint64_t>& bank = words[w % kBanks];
        if (std::find(bank.begin(), bank.end(), w) == bank.end()) bank.push_back(w);
      }
    }
    size_t most = 0;
    for (const auto& bank : words) most = std::max(most, bank.size());
    result.taken += most;
    result.needed += most > 0;
  }
  return result;
}

void settle(const Request& request) {
  if (request.active == 0) return;
  const uint64_t bytes = uint64_t(std::popcount(request.active)) * request.bytes;
  switch (request.access) {
    case Access::kGlobalLoad:
      counting->global_load_requests += 1;
      counting->global_load_sectors += sectors(request);
      counting->global_load_bytes += bytes;
      return;
    case Access::kGlobalStore:
      counting->global_store_requests += 1;
      counting->global_store_sectors += sectors(request);
      counting->global_store_bytes += bytes;
      return;
    case Access::kAtomic:
      counting->atomic_requests += 1;
      counting->atomic_sectors += sectors(request);
      counting->atomic_bytes += bytes;
      return;
    case Access::kSharedStore: {
      const Passes p = passes(request);
      counting->shared_store_requests += 1;
      counting->shared_store_wavefronts += p.taken;
      counting->shared_store_conflicts += p.taken - p.needed;
      return;
    }
    case Access::kSharedLoad:
    case Access::kMatrixLoad: {
      const Passes p = passes(request);
      counting->shared_load_requests += 1;
      counting->shared_load_wavefronts += p.taken;
      counting->shared_load_conflicts += p.taken - p.needed;
      return;
    }
  }
}

}  // namespace

void record(Fiber& fiber, Access access, const void* address, unsigned bytes, Where at) {
  Warp& warp = *fiber.warp;
  Site site{at.file_name(), at.line(), at.column(), static_cast<unsigned>(access), fiber.lane};
  site.lane_or_turn = warp.turns[site]++;
  Request& request = warp.requests[site];
  request.access = access;
  request.arrived |= 1u << fiber.lane;
  if (bytes > 0) {
    request.bytes = bytes;
    request.active |= 1u << fiber.lane;
    request.addresses[fiber.lane] = reinterpret_cast<uint64_t>(address);
  }
  if ((warp.live & ~request.arrived) == 0) {
    settle(request);
    warp.requests.erase(site);
  }
}

void converge(Warp& warp) {
  if (counting == nullptr) return;
  for (const auto& [site, request] : warp.requests) settle(request);
  warp.requests.clear();
  warp.turns.clear();
}

void note_mma() {
  if (counting != nullptr) counting->mma += 1;
}

void note_barrier() {
  if (counting != nullptr) counting->barriers += 1;
}

}  // namespace simt

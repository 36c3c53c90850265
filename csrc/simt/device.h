// The device's own view of a grid: fibers, warps, blocks.
#pragma once

#include <memory>
#include <unordered_map>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace simt {

struct Block;
struct Warp;

struct Copy {
  void* target;
  const void* source;
  unsigned bytes, valid;
  unsigned group;
  Where at;
};

struct Fiber : Thread {
  Context context;
  Block* in_block = nullptr;
  Warp* warp = nullptr;
  unsigned linear = 0;         // the thread's number in its block
  const char* what = nullptr;  // waits for, or null
  uint32_t mask = 0;           // of the collective it waits for
  Where at;                    // where it waits, or polled last
  bool done = false;
  std::vector<Copy> copies;  // under way, oldest first
  unsigned open_group = 0;   // that the next copies belong to
};

// A collective that some lanes have reached.
struct Meeting {
  const char* what;
  uint32_t mask, arrived;
  Where at;
  void* clock;  // ThreadSanitizer's, or null where memory is not ordered
};

// One instruction of a warp, as far as its lanes have come to it.
struct Request {
  Access access;
  unsigned bytes = 0;
  uint32_t arrived = 0, active = 0;
  uint64_t addresses[32];
};

struct Site {
  const char* file;
  unsigned line, column, access, lane_or_turn;
  bool operator==(const Site&) const = default;
};
struct SiteHash {
  size_t operator()(const Site& s) const {
    size_t hash = reinterpret_cast<size_t>(s.file);
    for (const unsigned part : {s.line, s.column, s.access, s.lane_or_turn}) hash = (hash ^ part) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 29;
  }
};

struct Warp {
  Fiber* lanes[32] = {};
  uint32_t live = 0;
  void* operands[32] = {};
  std::vector<Meeting> meetings;
  unsigned next_clock = 0;
  char clocks[8];
  std::unordered_map<Site, unsigned, SiteHash> turns;    // by lane: how often it executed the line
  std::unordered_map<Site, Request, SiteHash> requests;  // by turn: not yet executed by every live lane
};

struct Barrier {
  const char* what = nullptr;
  unsigned threads = 0;  // expected; 0 means all that live
  Where at;              // of the first to arrive
  std::vector<Fiber*> waiting;
  unsigned generation = 0;
  char clocks[2];
};

struct FreeMemory {
  void operator()(void* p) const;
};
using Memory = std::unique_ptr<void, FreeMemory>;

constexpr unsigned kBarriers = 16;  // __syncthreads() is number 0

struct Block {
  Dim3 index;
  unsigned live = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  Memory dynamic_memory;
  struct Array {
    const void* tag;
    size_t bytes;
    Memory memory;
  };
  std::vector<Array> arrays;
  size_t array_bytes = 0;
};

extern Counters* counting;     // the running grid's counters, or null
extern uint64_t largest_grid;  // blocks, of the grids counted since the last reset
void record(Fiber& fiber, Access access, const void* address, unsigned bytes, Where at);
void note_barrier();

// The warp's live lanes have all met: what they do next is a new instruction.
void converge(Warp& warp);

}  // namespace simt

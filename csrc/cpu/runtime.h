// Threads and scratch memory for the kernels: plain functions, so that the kernels need no header of torch's.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastnets {

// Calls body(context, begin, end) on pieces of [0, count), at least `grain` long, on torch's threads. In a process that
// was forked from one that had used threads it runs serially: the OpenMP pool does not survive a fork.
void parallel_pieces(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context);

// Calls run(context, phase, piece) for every piece of every phase, a phase when the one before is done, on at most
// `pieces` of torch's threads. Between phases they meet at a counter. A thread has a piece of its own, whose data stay
// in its caches; one that comes late, or that the system stops before its piece has begun, finds it done by another.
// So no phase waits for a thread that is not running, unless it is stopped amid a piece. What run throws is thrown.
void parallel_phases(int64_t phases, int64_t pieces, void (*run)(void*, int64_t, int64_t), void* context);

// How many threads parallel_pieces may use.
int64_t thread_count();

// Memory of this thread's own, 64-byte aligned, kept between calls (no page faults, no allocation on the hot path).
// A larger request for the same slot invalidates the former. Contents are undefined. Throws std::bad_alloc.
constexpr int kScratchSlots = 8;
void* scratch(int slot, size_t bytes);

}  // namespace fastnets

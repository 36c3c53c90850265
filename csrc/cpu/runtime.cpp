#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace fastnets {
namespace {

std::atomic<bool> used_threads{false};
std::atomic<bool> forked_after_threads{false};

void after_fork() {
  if (used_threads.load()) forked_after_threads.store(true);
}

struct ScratchSlots {
  void* data[kScratchSlots] = {};
  size_t bytes[kScratchSlots] = {};
  ~ScratchSlots() {
    for (void* p : data) std::free(p);
  }
};

}  // namespace

void parallel_pieces(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  if (count <= grain || forked_after_threads.load(std::memory_order_relaxed)) {
    body(context, 0, count);
    return;
  }
  if (!used_threads.load(std::memory_order_relaxed)) {
    static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
    (void)registered;
    used_threads.store(true);
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t thread_count() {
  return forked_after_threads.load(std::memory_order_relaxed) ? 1 : torch::stable::get_num_threads();
}

void* scratch(int slot, size_t bytes) {
  thread_local ScratchSlots slots;
  if (slots.bytes[slot] < bytes) {
    std::free(slots.data[slot]);
    slots.data[slot] = nullptr;
    slots.bytes[slot] = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    void* p = nullptr;
    if (posix_memalign(&p, 64, rounded) != 0) throw std::bad_alloc();
    slots.data[slot] = p;
    slots.bytes[slot] = rounded;
  }
  return slots.data[slot];
}

}  // namespace fastnets

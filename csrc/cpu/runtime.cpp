#include "runtime.h"

#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

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

// Tells the processor that this is a wait.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A piece of every phase.
struct alignas(64) Piece {          // a cache line each
  std::atomic<int64_t> begun{0};    // phases of it that a thread has taken
  std::atomic<bool> absent{false};  // its thread did not come for it last time
};

struct Phases {
  static constexpr int kPatience = 1000, kYields = 4000;  // turns of a wait, of some ten nanoseconds

  int64_t phases, count;
  void (*run)(void*, int64_t, int64_t);
  void* context;
  std::unique_ptr<Piece[]> pieces{new Piece[static_cast<size_t>(count)]};
  alignas(64) std::atomic<int64_t> done{0};  // pieces
  std::atomic<bool> failed{false};

  bool take(int64_t phase, int64_t piece) {
    if (pieces[piece].begun.load(std::memory_order_relaxed) != phase) return false;
    if (!pieces[piece].begun.compare_exchange_strong(phase, phase + 1, std::memory_order_relaxed)) return false;
    try {
      run(context, phase, piece);
    } catch (...) {
      failed.store(true);
      throw;
    }
    done.fetch_add(1, std::memory_order_release);
    return true;
  }

  // What one thread does; `own`: its piece.
  void work(int64_t own) {
    int64_t waited = 0, former = -1;
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t phase = done.load(std::memory_order_acquire) / count;
      if (phase == phases) return;
      if (phase != former) former = phase, waited = 0;
      if (take(phase, own)) {
        pieces[own].absent.store(false, std::memory_order_relaxed);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        const bool absent = pieces[i].absent.load(std::memory_order_relaxed);
        if ((absent || waited > kPatience) && take(phase, i)) pieces[i].absent.store(true, std::memory_order_relaxed);
      }
      ++waited > kYields ? std::this_thread::yield() : pause();
    }
  }
};

}  // namespace

void parallel_phases(int64_t phases, int64_t pieces, void (*run)(void*, int64_t, int64_t), void* context) {
  Phases all{phases, pieces, run, context};
  parallel_pieces(pieces, 1, [](void* to, int64_t begin, int64_t) { static_cast<Phases*>(to)->work(begin); }, &all);
}

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

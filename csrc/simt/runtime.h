// The SIMT device: runs a grid of CUDA threads on the CPU, one fiber a thread, and says what a kernel does wrong.
//
// One grid runs at a time in a process, on the thread that launches it. Blocks run one after the other (those of a
// cooperative launch together); a fiber runs until it waits. What a kernel must not rely on is made hostile: shared
// memory starts full of NaN, asynchronous copies arrive at the last moment, and a seed shuffles who runs next.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <source_location>
#include <stdexcept>
#include <string>

// For host code that touches other fibers' operands: ThreadSanitizer should watch the kernels only.
#define FASTNETS_SIMT_UNTRACED __attribute__((no_sanitize("thread")))

namespace simt {

using Where = std::source_location;

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr uint64_t volume() const { return uint64_t{x} * y * z; }
};

// A kernel did what CUDA forbids, or waits for ever. The message names the kernel, the threads and the source lines.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Launch {
  const char* name;  // in messages and counters
  Dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  bool cooperative = false;
  const void* kernel = nullptr;  // its function
};

// Runs the grid; body(context) is one thread's work.
void run(const Launch& launch, void (*body)(void*), void* context);

// The running thread, as its kernel sees it.
struct Thread {
  Dim3 index, block;  // threadIdx, blockIdx
  unsigned lane = 0;
};
extern Thread* current;
extern Launch active;  // the grid's

// 0 runs threads in order; any other seed shuffles blocks, threads and, at every counted access, whether to go on.
void set_seed(uint64_t seed);

// The dynamic and static shared memory that a block may have together.
size_t shared_limit();
void set_shared_limit(size_t bytes);

// The blocks of a grid whose blocks take their work in strides: CUDA's limit, or fewer, so that one block takes several
// pieces.
unsigned grid_limit();
void set_grid_limit(unsigned blocks);

// What kernels choose their tiles and shares by.
unsigned multiprocessors();
void set_multiprocessors(unsigned count);

// The blocks that a cooperative launch may have: those that run together.
unsigned resident_limit();
void set_resident_limit(unsigned blocks);

void* dynamic_shared();
// The block's array of that name: `tag` is an address of the declaration's own.
void* static_shared(const void* tag, size_t bytes, Where at);

// Waits until every live thread of the block has come, or, with `threads`, that many.
void barrier(const char* what, unsigned id, unsigned threads, Where at);
void grid_barrier(Where at);

// A warp's collective: each lane of `mask` brings its operands; the last to come calls combine(lanes' operands, mask).
using Combine = void (*)(void* const* operands, uint32_t mask);
void collective(const char* what, uint32_t mask, void* operands, Combine combine, Where at, bool orders_memory = false);

uint64_t shuffle(const char* what, uint32_t mask, uint64_t bits, unsigned source_lane, Where at);
uint32_t ballot(const char* what, uint32_t mask, bool predicate, Where at);
enum class Reduction { kAdd, kMin, kMax, kAnd, kOr, kXor };
int64_t reduce(const char* what, uint32_t mask, int64_t value, Reduction how, Where at);

// cp.async: `valid` bytes from `source` and zeros up to `bytes` reach `target` when the thread waits for their group;
// until then `target` holds NaN. A thread must not return before.
void copy_async(void* target, const void* source, unsigned bytes, unsigned valid, Where at);
void copy_async_commit();
void copy_async_wait(unsigned pending);  // until at most so many of the committed groups are under way
void copy_async_wait_all();

// Called at every atomic: another thread may run. Threads that only ever poll are reported.
void atomic_done(const void* address, unsigned bytes, bool changed, Where at);
void fence();

[[noreturn]] void fail(const std::string& message, Where at);

// What the launches of one kernel did since the last reset. A request is one instruction of one warp: its lanes' n-th
// executions of one line since the warp's lanes last met all together are taken to be one instruction.
#define FASTNETS_SIMT_COUNTERS(X)                                                            \
  X(launches)                                                                                \
  X(barriers)                                                                                \
  X(mma)                                                                                     \
  X(global_load_requests)                                                                    \
  X(global_load_sectors) /* of 32 bytes */                                                   \
  X(global_load_bytes)   /* that lanes asked for */                                          \
  X(global_store_requests)                                                                   \
  X(global_store_sectors)                                                                    \
  X(global_store_bytes)                                                                      \
  X(atomic_requests)                                                                         \
  X(atomic_sectors)                                                                          \
  X(atomic_bytes)                                                                            \
  X(shared_load_requests)                                                                    \
  X(shared_load_wavefronts) /* passes over the 32 banks */                                   \
  X(shared_load_conflicts)  /* wavefronts beyond those that the width of the access needs */ \
  X(shared_store_requests)                                                                   \
  X(shared_store_wavefronts)                                                                 \
  X(shared_store_conflicts)

struct Counters {
#define FASTNETS_SIMT_FIELD(name) uint64_t name = 0;
  FASTNETS_SIMT_COUNTERS(FASTNETS_SIMT_FIELD)
#undef FASTNETS_SIMT_FIELD
};

void set_counting(bool on);
const std::map<std::string, Counters>& counters();  // by the launch's name
void reset_counters();

// The launches counted since the last reset, one of each kernel, block size and shared memory.
struct Launched {
  const void* kernel;
  uint64_t threads;  // in a block
  size_t shared;
  auto operator<=>(const Launched&) const = default;
};
const std::set<Launched>& launched();

enum class Access { kGlobalLoad, kGlobalStore, kAtomic, kSharedLoad, kSharedStore, kMatrixLoad };
extern bool watching;  // someone counts, or a seed wants chances to switch
void watch(Access access, const void* address, unsigned bytes, Where at);

// Every access of an accessor passes here; one that its predicate turned off with 0 bytes.
inline void note(Access access, const void* address, unsigned bytes, Where at) {
  if (watching) [[unlikely]]
    watch(access, address, bytes, at);
}
void note_mma();  // once a warp
// A lane's part in ldmatrix: the address of 16 bytes, if the instruction uses it.
void matrix_row(const void* row, bool used, Where at);

}  // namespace simt

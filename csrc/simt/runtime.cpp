// The scheduler: who runs, who waits, and what it means when nobody can go on.
#include "runtime.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <random>
#include <sstream>
#include <utility>

#include "device.h"
#include "sanitizer.h"

namespace simt {

Thread* current = nullptr;
Launch active{};
bool watching = false;
uint64_t largest_grid = 0;

void FreeMemory::operator()(void* p) const { std::free(p); }

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(FASTNETS_SIMT_TSAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
// The fibers that blocks which run one after the other are dealt out to. ThreadSanitizer takes what a fiber does in two
// blocks for ordered: it gets more than a block's, those of a block chosen at random. A fiber of its takes 1 MB and 1
// ms to make, so they last from one grid to the next.
#if defined(FASTNETS_SIMT_TSAN)
constexpr uint64_t kFibers = 1024;
#else
constexpr uint64_t kFibers = 1;
#endif
constexpr unsigned kMaxThreads = 1024;    // in a block
constexpr uint64_t kPollLimit = 1 << 22;  // atomics in a row, of all threads, without any progress

// Who can go on, in the order in which they will. Its size is fixed before the fibers run: memory that one fiber took
// and another gave back would look like a race to ThreadSanitizer.
class Queue {
 public:
  void reserve(size_t count) {
    slots_.assign(std::bit_ceil(count + 1), nullptr);
    head_ = size_ = 0;
  }
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  void push_back(Fiber* f) { at(size_++) = f; }
  void push_front(Fiber* f) {
    head_ -= 1;
    size_ += 1;
    at(0) = f;
  }
  // Takes the one at `position`; the first takes its place.
  Fiber* take(size_t position) {
    Fiber* const taken = std::exchange(at(position), at(0));
    head_ += 1;
    size_ -= 1;
    return taken;
  }

 private:
  Fiber*& at(size_t position) { return slots_[(head_ + position) & (slots_.size() - 1)]; }
  std::vector<Fiber*> slots_;
  size_t head_ = 0, size_ = 0;
};

struct Device {
  std::mutex one_grid;
  Context host;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::unique_ptr<Block>> blocks;
  Queue ready;
  Barrier grid_barrier;
  unsigned live = 0;
  uint64_t polls = 0;
  std::exception_ptr failure;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  char start, end;  // ThreadSanitizer's clocks: host to fibers, fibers to host

  uint64_t seed = 0;
  std::mt19937_64 random;
  size_t shared_limit = 99 << 10;  // the least of the architectures that the kernels are for
  unsigned grid_limit = 0x7fffffff;
  unsigned multiprocessors = 16;
  unsigned resident_limit = 32;  // a few are enough to see several at work, and some with more than one share
  bool count = false;
  std::map<std::string, Counters> counters;
  std::set<Launched> launched;
} device;

Fiber& running() { return *static_cast<Fiber*>(current); }

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

bool same_place(Where a, Where b) {
  return a.line() == b.line() && a.column() == b.column() && same(a.file_name(), b.file_name());
}

std::string place(Where at) { return std::string(at.file_name()) + ":" + std::to_string(at.line()); }

std::string text(Dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string hexadecimal(uint32_t mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

// "3", "0-31, 40"
std::string ranges(const std::vector<unsigned>& sorted) {
  std::string out;
  for (size_t i = 0; i < sorted.size();) {
    size_t end = i + 1;
    while (end < sorted.size() && sorted[end] == sorted[end - 1] + 1) ++end;
    if (!out.empty()) out += ", ";
    out += std::to_string(sorted[i]);
    if (end - i > 1) out += "-" + std::to_string(sorted[end - 1]);
    i = end;
  }
  return out;
}

// Which threads are where, block by block.
std::string whereabouts() {
  std::string out;
  for (const auto& block : device.blocks) {
    if (block->live == 0) continue;
    std::map<std::string, std::vector<unsigned>> groups;
    for (const Fiber* f : block->fibers) {
      std::string state = "have returned";
      if (!f->done && f->what != nullptr) {
        state = std::string("wait at ") + f->what;
        if (f->mask != 0) state += ", mask " + hexadecimal(f->mask);
        state += " (" + place(f->at) + ")";
      } else if (!f->done) {
        state = "poll at " + place(f->at);
      }
      groups[state].push_back(f->linear);
    }
    out += "\n  block " + text(block->index) + ":";
    for (const auto& [state, threads] : groups) out += " threads " + ranges(threads) + " " + state + ";";
    out.back() = '.';
  }
  return out;
}

Fiber* take_ready() {
  if (device.ready.empty()) return nullptr;
  return device.ready.take(device.seed == 0 ? 0 : device.random() % device.ready.size());
}

// Goes on with another fiber, or with the host when none is ready or one has failed.
void suspend() {
  Fiber& self = running();
  release(&device.end);  // should the grid end in a failure
  Fiber* const next = device.failure ? nullptr : take_ready();
  if (next == &self) return;
  current = next;
  switch_context(self.context, next == nullptr ? device.host : next->context);
}

void yield() {
  device.ready.push_back(&running());
  suspend();
}

void wait(const char* what, uint32_t mask, Where at) {
  Fiber& self = running();
  self.what = what;
  self.mask = mask;
  self.at = at;
  suspend();
}

void open(Barrier& barrier) {
  for (Fiber* f : barrier.waiting) {
    if (f != current) device.ready.push_back(f);
    f->what = nullptr;
    converge(*f->warp);
  }
  barrier.waiting.clear();
  barrier.generation += 1;
  device.polls = 0;
  note_barrier();
}

void arrive(Barrier& barrier, unsigned expected, const char* what, Where at) {
  void* const clock = &barrier.clocks[barrier.generation % 2];
  release(clock);
  barrier.waiting.push_back(&running());
  if (barrier.waiting.size() == expected) {
    open(barrier);
  } else {
    wait(what, 0, at);
  }
  acquire(clock);
}

void finish() {
  Fiber& self = running();
  Block& block = *self.in_block;
  Warp& warp = *self.warp;
  for (const Meeting& m : warp.meetings) {
    if (m.mask >> self.lane & 1) {
      fail("divergence: thread " + std::to_string(self.linear) + " returned while lanes of its warp wait for it at " +
               m.what + ", mask " + hexadecimal(m.mask),
           m.at);
    }
  }
  if (!self.copies.empty()) fail("the thread returns before its copies to shared memory have come", self.copies[0].at);
  self.done = true;
  warp.live &= ~(1u << self.lane);
  if (warp.live == 0) converge(warp);
  block.live -= 1;
  device.live -= 1;
  device.polls = 0;
  for (Barrier& barrier : block.barriers) {
    if (barrier.threads == 0 && block.live > 0 && barrier.waiting.size() == block.live) open(barrier);
  }
  if (device.live > 0 && device.grid_barrier.waiting.size() == device.live) open(device.grid_barrier);
}

void fiber_main() {
  entered();
  for (;;) {
    acquire(&device.start);
    try {
      device.body(device.argument);
      finish();
    } catch (...) {
      device.failure = std::current_exception();  // travels to the thread that launched
    }
    suspend();
  }
}

void drop_fibers() {
  for (auto& f : device.fibers) {
    discard(f->context);
    munmap(static_cast<char*>(f->context.stack) - getpagesize(), kStack + getpagesize());
  }
  device.fibers.clear();
}

void provide_fibers(size_t count) {
  const size_t page = getpagesize();
  while (device.fibers.size() < count) {
    void* const p =
        mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, page, PROT_NONE);  // a stack that overflows faults
    // Stacks begin at different lines of a page: were they alike, a warp's would share a few sets of the cache.
    const size_t skipped = device.fibers.size() * 1088 % 4096;
    device.fibers.push_back(std::make_unique<Fiber>());
    prepare(device.fibers.back()->context, static_cast<char*>(p) + page, kStack - skipped, fiber_main);
  }
}

// Memory of exactly that size, so that AddressSanitizer sees its end, full of NaN.
Memory poisoned(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);
  return Memory(p);
}

Dim3 unravel(uint64_t i, Dim3 sizes) {
  return Dim3(i % sizes.x, i / sizes.x % sizes.y, i / (uint64_t{sizes.x} * sizes.y));
}

void start_block(uint64_t number, size_t first_fiber) {
  device.blocks.push_back(std::make_unique<Block>());
  Block& block = *device.blocks.back();
  const unsigned threads = active.block.volume();
  block.index = unravel(number, active.grid);
  block.live = threads;
  block.warps.resize((threads + 31) / 32);
  block.arrays.reserve(64);
  for (Barrier& barrier : block.barriers) barrier.waiting.reserve(threads);
  block.barriers[0].waiting.reserve(threads);
  if (active.shared > 0) block.dynamic_memory = poisoned(active.shared);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = *device.fibers[first_fiber + i];
    f.index = unravel(i, active.block);
    f.block = block.index;
    f.lane = i % 32;
    f.in_block = &block;
    f.warp = &block.warps[i / 32];
    f.linear = i;
    f.what = nullptr;
    f.done = false;
    f.copies.clear();
    f.open_group = 0;
    f.warp->lanes[f.lane] = &f;
    f.warp->live |= 1u << f.lane;
    f.warp->meetings.reserve(32);
    block.fibers.push_back(&f);
    device.ready.push_back(&f);
  }
  device.live += threads;
  release(&device.start);
}

void run_started() {
  while (Fiber* const f = take_ready()) {
    current = f;
    switch_context(device.host, f->context);
    if (device.failure) std::rethrow_exception(std::exchange(device.failure, nullptr));
  }
  if (device.live > 0) throw Failure(std::string(active.name) + ": deadlock, nobody can go on:" + whereabouts());
}

void check(const Launch& launch) {
  const uint64_t threads = launch.block.volume();
  const auto refuse = [&](const std::string& why) { throw Failure(std::string(launch.name) + ": " + why); };
  if (threads == 0 || threads > kMaxThreads) refuse("a block has 1 to 1024 threads, not " + std::to_string(threads));
  if (launch.grid.volume() == 0) refuse("the grid is empty");
  if (launch.grid.y > 65535 || launch.grid.z > 65535) refuse("a grid's y and z go up to 65535");
  if (launch.cooperative && launch.grid.volume() > device.resident_limit) {
    refuse("a cooperative launch of " + std::to_string(launch.grid.volume()) + " blocks, of which only " +
           std::to_string(device.resident_limit) + " run together");
  }
  if (launch.shared > device.shared_limit) {
    refuse("asks for " + std::to_string(launch.shared) + " bytes of shared memory, more than the " +
           std::to_string(device.shared_limit) + " of a block");
  }
}

void run_grid() {
  const uint64_t count = active.grid.volume();
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  device.random.seed(device.seed);
  if (device.seed != 0) std::shuffle(order.begin(), order.end(), device.random);
  const uint64_t threads = active.block.volume(), together = active.cooperative ? count : 1;
  device.ready.reserve(together * threads);
  device.grid_barrier.waiting.reserve(together * threads);
  std::vector<uint64_t> sets(active.cooperative ? count : std::min(count, std::max<uint64_t>(kFibers / threads, 1)));
  for (uint64_t i = 0; i < sets.size(); ++i) sets[i] = i;
  provide_fibers(sets.size() * threads);
  std::mt19937_64 deal;
  for (uint64_t i = 0; i < count; ++i) {
    if (i % sets.size() == 0) std::shuffle(sets.begin(), sets.end(), deal);
    start_block(order[i], sets[i % sets.size()] * threads);
    if ((i + 1) % together != 0) continue;
    run_started();
#if !defined(FASTNETS_SIMT_TSAN)
    device.blocks.clear();
#endif
  }
}

}  // namespace

void run(const Launch& launch, void (*body)(void*), void* argument) {
  const std::lock_guard lock(device.one_grid);
  check(launch);
  active = launch;
  device.body = body;
  device.argument = argument;
  device.live = 0;
  device.polls = 0;
  counting = device.count ? &device.counters[launch.name] : nullptr;
  if (counting != nullptr) {
    counting->launches += 1;
    device.launched.insert({launch.kernel, launch.block.volume(), launch.shared});
    largest_grid = std::max(largest_grid, launch.grid.volume());
  }
  watching = device.count || device.seed != 0;
  adopt(device.host);
  struct Cleanup {
    ~Cleanup() {
      acquire(&device.end);
      current = nullptr;
      device.blocks.clear();
      device.grid_barrier.waiting.clear();
      if (device.live > 0) drop_fibers();  // some stopped half-way
    }
  } cleanup;
  run_grid();
}

void set_seed(uint64_t seed) { device.seed = seed; }
size_t shared_limit() { return device.shared_limit; }
void set_shared_limit(size_t bytes) { device.shared_limit = bytes; }
unsigned grid_limit() { return device.grid_limit; }
void set_grid_limit(unsigned blocks) { device.grid_limit = blocks; }
unsigned multiprocessors() { return device.multiprocessors; }
void set_multiprocessors(unsigned count) { device.multiprocessors = count; }
unsigned resident_limit() { return device.resident_limit; }
void set_resident_limit(unsigned blocks) { device.resident_limit = blocks; }
void set_counting(bool on) { device.count = on; }
const std::map<std::string, Counters>& counters() { return device.counters; }
const std::set<Launched>& launched() { return device.launched; }
void reset_counters() {
  device.counters.clear();
  device.launched.clear();
  largest_grid = 0;
}

void fail(const std::string& message, Where at) {
  throw Failure(std::string(active.name) + ": " + message + " (" + place(at) + "), block " + text(running().block) +
                ", thread " + std::to_string(running().linear));
}

void* dynamic_shared() { return running().in_block->dynamic_memory.get(); }

void* static_shared(const void* tag, size_t bytes, Where at) {
  Block& block = *running().in_block;
  for (Block::Array& array : block.arrays) {
    if (array.tag != tag) continue;
    acquire(&array);
    return array.memory.get();
  }
  block.array_bytes += bytes;
  if (active.shared + block.array_bytes > device.shared_limit) {
    fail("the block's shared memory grows to " + std::to_string(active.shared + block.array_bytes) +
             " bytes, beyond the limit of " + std::to_string(device.shared_limit),
         at);
  }
  if (block.arrays.size() == block.arrays.capacity()) fail("more than 64 static shared arrays", at);
  block.arrays.push_back({tag, bytes, poisoned(bytes)});
  release(&block.arrays.back());
  return block.arrays.back().memory.get();
}

void barrier(const char* what, unsigned id, unsigned threads, Where at) {
  Block& block = *running().in_block;
  if (id >= kBarriers) fail("a block has barriers 0 to 15, not " + std::to_string(id), at);
  if (threads % 32 != 0) fail("a barrier counts whole warps, not " + std::to_string(threads) + " threads", at);
  Barrier& b = block.barriers[id];
  if (b.waiting.empty()) {
    b.what = what;
    b.threads = threads;
    b.at = at;
  } else if (b.threads != threads || (threads == 0 && !same_place(b.at, at))) {
    fail("divergence: thread " + std::to_string(running().linear) + " is at " + what + " while thread " +
             std::to_string(b.waiting.front()->linear) + " waits at " + b.what + " (" + place(b.at) + ")",
         at);
  }
  arrive(b, threads == 0 ? block.live : threads, what, at);
}

void grid_barrier(Where at) {
  if (!active.cooperative) fail("a grid barrier needs a cooperative launch", at);
  Barrier& b = device.grid_barrier;
  if (!b.waiting.empty() && !same_place(b.at, at)) {
    fail("divergence: another thread waits at the grid barrier of " + place(b.at), at);
  }
  b.at = at;
  arrive(b, device.live, "grid barrier", at);
}

void collective(const char* what, uint32_t mask, void* operands, Combine combine, Where at, bool orders_memory) {
  Fiber& self = running();
  Warp& warp = *self.warp;
  const uint32_t me = 1u << self.lane;
  if ((mask & me) == 0) fail("the mask of " + std::string(what) + ", " + hexadecimal(mask) + ", lacks its lane", at);
  if ((mask & ~warp.live) != 0) {
    fail("the mask of " + std::string(what) + ", " + hexadecimal(mask) + ", names lanes that do not exist or returned",
         at);
  }
  Meeting* meeting = nullptr;
  for (Meeting& m : warp.meetings) {
    // Of two lanes that are each in the other's mask, one has come to m: both must have, or neither goes on.
    if ((m.mask & me) == 0 || (mask & m.arrived) == 0) continue;
    if (m.mask == mask && same_place(m.at, at) && same(m.what, what)) {
      meeting = &m;
      break;
    }
    fail("divergence: lane " + std::to_string(self.lane) + " is at " + what + ", mask " + hexadecimal(mask) +
             ", while lane " + std::to_string(std::countr_zero(m.arrived)) + " waits at " + m.what + ", mask " +
             hexadecimal(m.mask) + " (" + place(m.at) + ")",
         at);
  }
  if (meeting == nullptr) {
    void* const clock = orders_memory ? &warp.clocks[warp.next_clock++ % sizeof(warp.clocks)] : nullptr;
    warp.meetings.push_back({what, mask, 0, at, clock});
    meeting = &warp.meetings.back();
  }
  warp.operands[self.lane] = operands;
  meeting->arrived |= me;
  void* const clock = meeting->clock;
  if (clock != nullptr) release(clock);
  if (meeting->arrived != mask) {
    wait(what, mask, at);
  } else {
    warp.meetings.erase(warp.meetings.begin() + (meeting - warp.meetings.data()));
    if (combine != nullptr) combine(warp.operands, mask);
    if (mask == warp.live) converge(warp);
    device.polls = 0;
    for (uint32_t others = mask & ~me; others != 0;) {  // the lowest lane goes first
      const int lane = 31 - std::countl_zero(others);
      others &= ~(1u << lane);
      warp.lanes[lane]->what = nullptr;
      device.ready.push_front(warp.lanes[lane]);
    }
  }
  if (clock != nullptr) acquire(clock);
}

void copy_async(void* target, const void* source, unsigned bytes, unsigned valid, Where at) {
  const auto misaligned = [bytes](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(target) || misaligned(source)) {
    fail("cp.async of " + std::to_string(bytes) + " bytes is not aligned", at);
  }
  Fiber& self = running();
  note(Access::kGlobalLoad, source, valid, at);
  note(Access::kSharedStore, target, bytes, at);
  wrote(target, bytes);
  std::memset(target, 0xff, bytes);
  self.copies.push_back({target, source, bytes, valid, self.open_group, at});
}

void copy_async_commit() { running().open_group += 1; }

void copy_async_wait(unsigned pending) {
  Fiber& self = running();
  size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group + pending < self.open_group; ++done) {
    const Copy& copy = self.copies[done];
    read(copy.source, copy.valid);
    wrote(copy.target, copy.bytes);
    std::memcpy(copy.target, copy.source, copy.valid);
    std::memset(static_cast<char*>(copy.target) + copy.valid, 0, copy.bytes - copy.valid);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + done);
}

void copy_async_wait_all() {
  copy_async_commit();
  copy_async_wait(0);
}

void atomic_done(const void* address, unsigned bytes, bool changed, Where at) {
  note(Access::kAtomic, address, bytes, at);
  device.polls = changed ? 0 : device.polls + 1;
  running().at = at;
  if (device.polls > kPollLimit) {
    throw Failure(std::string(active.name) + ": livelock, threads poll what nobody changes:" + whereabouts());
  }
  yield();
}

void matrix_row(const void* row, bool used, Where at) {
  note(Access::kMatrixLoad, row, used ? 16 : 0, at);
  if (!used) return;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("ldmatrix's row is not aligned to 16 bytes", at);
  read(row, 16);
}

// Any two fences are taken to order their threads, which can hide a race but never invents one.
void fence() {
  static char clock;
  acquire(&clock);
  release(&clock);
}

void watch(Access access, const void* address, unsigned bytes, Where at) {
  if (counting != nullptr) record(running(), access, address, bytes, at);
  if (device.seed != 0 && device.random() % 8 == 0) {
    running().at = at;
    yield();
  }
}

}  // namespace simt

#include "fiber.h"

#if defined(FASTNETS_SIMT_BOOST)
#include <boost/context/detail/fcontext.hpp>
#else
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(FASTNETS_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace simt {
namespace {

Context* leaving = nullptr;  // the two sides of the switch under way
Context* arriving = nullptr;

#if defined(FASTNETS_SIMT_BOOST)

namespace boost_context = boost::context::detail;

void enter(boost_context::transfer_t transfer) {
  leaving->suspended[0] = transfer.fctx;
  arriving->entry();
}

void exchange(Context&, Context& to) {
  const boost_context::transfer_t transfer = boost_context::jump_fcontext(to.suspended[0], nullptr);
  leaving->suspended[0] = transfer.fctx;
}

#else

// ucontext's switches make system calls: it only enters a new stack, and __builtin_setjmp does everything after.
[[noreturn]] __attribute__((noinline, no_sanitize_address)) void enter(Context& context) {
  static ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = context.stack;
  fresh.uc_stack.ss_size = context.stack_size;
  fresh.uc_link = nullptr;
  makecontext(&fresh, context.entry, 0);
  setcontext(&fresh);
  __builtin_unreachable();
}

[[noreturn]] __attribute__((noinline, no_sanitize_address)) void resume(Context& context) {
  __builtin_longjmp(context.suspended, 1);
}

__attribute__((noinline, no_sanitize_address)) void exchange(Context& from, Context& to) {
  if (__builtin_setjmp(from.suspended) != 0) return;
  if (to.entry != nullptr) enter(to);
  resume(to);
}

#endif

void complete_switch() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(arriving->fake_stack, &stack, &size);
  leaving->stack = const_cast<void*>(stack);
  leaving->stack_size = size;
#endif
}

}  // namespace

void prepare(Context& context, void* stack, size_t stack_size, void (*entry)()) {
  context = Context{};
  context.entry = entry;
  context.stack = stack;
  context.stack_size = stack_size;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, stack_size);
#endif
#if defined(FASTNETS_SIMT_TSAN)
  context.thread = __tsan_create_fiber(0);
#endif
#if defined(FASTNETS_SIMT_BOOST)
  context.suspended[0] = boost_context::make_fcontext(static_cast<char*>(stack) + stack_size, stack_size, enter);
#endif
}

void adopt([[maybe_unused]] Context& context) {
#if defined(FASTNETS_SIMT_TSAN)
  context.thread = __tsan_get_current_fiber();
#endif
}

void discard([[maybe_unused]] Context& context) {
#if defined(FASTNETS_SIMT_TSAN)
  __tsan_destroy_fiber(context.thread);
#endif
}

void switch_context(Context& from, Context& to) {
  leaving = &from;
  arriving = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
#if defined(FASTNETS_SIMT_TSAN)
  // No order between fibers but what synchronisation makes: a race must not hide behind the schedule.
  __tsan_switch_to_fiber(to.thread, __tsan_switch_to_fiber_no_sync);
#endif
  exchange(from, to);
  complete_switch();
}

void entered() {
  arriving->entry = nullptr;
  complete_switch();
}

}  // namespace simt

// Contexts that one thread switches between, and what the sanitizers must be told of each switch.
#pragma once

#include <cstddef>

namespace simt {

struct Context {
  void* suspended[5] = {};    // where it goes on; meaningless while it runs
  void (*entry)() = nullptr;  // where it begins, until it has
  void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* thread = nullptr;      // ThreadSanitizer's
};

// Makes `context` one that calls `entry` when it is first switched to. `entry` calls entered() before anything else and
// never returns.
void prepare(Context& context, void* stack, size_t stack_size, void (*entry)());

// Makes `context` the one that runs now.
void adopt(Context& context);

// Gives up what `prepare` took besides the stack. The context, which must not be running, is not entered again.
void discard(Context& context);

// Suspends `from`, the running context, and goes on with `to`.
void switch_context(Context& from, Context& to);

void entered();

}  // namespace simt

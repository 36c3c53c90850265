// What ThreadSanitizer must be told of order and of accesses that the uninstrumented device makes for a kernel.
#pragma once

#if defined(FASTNETS_SIMT_TSAN)

#include <sanitizer/tsan_interface.h>

extern "C" void __tsan_read_range(void* address, unsigned long size);
extern "C" void __tsan_write_range(void* address, unsigned long size);

namespace simt {
inline void acquire(void* clock) { __tsan_acquire(clock); }
inline void release(void* clock) { __tsan_release(clock); }
inline void read(const void* p, unsigned long bytes) { __tsan_read_range(const_cast<void*>(p), bytes); }
inline void wrote(void* p, unsigned long bytes) { __tsan_write_range(p, bytes); }
}  // namespace simt

#else

namespace simt {
inline void acquire(void*) {}
inline void release(void*) {}
inline void read(const void*, unsigned long) {}
inline void wrote(void*, unsigned long) {}
}  // namespace simt

#endif

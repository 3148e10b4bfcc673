// `-fsanitize=thread` makes the compiler call these before every access of a kernel. They are not
// ThreadSanitizer's: linked in its place, they tell the machine.
//
// Hidden, so that no other library of the process finds them.

#include "machine.h"

namespace {

using cuda_emulation::Access;

void trace(const void* address, size_t bytes, Access access) {
  auto& machine = cuda_emulation::Machine::instance();
  // Not for the launcher, which is instrumented too.
  if (machine.is_running()) {
    machine.access(reinterpret_cast<uintptr_t>(address), bytes, access);
  }
}

}  // namespace

#define TRACE(name, bytes)                                                    \
  void __tsan_read##name(void* address) { trace(address, bytes, Access::kRead); } \
  void __tsan_write##name(void* address) { trace(address, bytes, Access::kWrite); }

extern "C" {

TRACE(1, 1)
TRACE(2, 2)
TRACE(4, 4)
TRACE(8, 8)
TRACE(16, 16)

#undef TRACE
#define TRACE(bytes)                                                                          \
  void __tsan_unaligned_read##bytes(void* address) { trace(address, bytes, Access::kRead); }  \
  void __tsan_unaligned_write##bytes(void* address) { trace(address, bytes, Access::kWrite); }

TRACE(2)
TRACE(4)
TRACE(8)
TRACE(16)

void __tsan_read_range(void* address, size_t bytes) { trace(address, bytes, Access::kRead); }
void __tsan_write_range(void* address, size_t bytes) { trace(address, bytes, Access::kWrite); }

void __tsan_init() {}
}

// `-fsanitize=thread` makes the compiler call these before every access of a kernel. They are not
// ThreadSanitizer's: linked in its place, they tell the machine. The same for what
// `-fsanitize=alignment,bounds` calls when it has found something.
//
// Hidden, so that no other library of the process finds them.

#include <cstring>

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

// How the compiler describes what it has found: this comes first.
struct Found {
  const char* file;
  uint32_t line;
  uint32_t column;
};

void fail_at(const Found* found, const char* what) {
  const char* slash = std::strrchr(found->file, '/');
  cuda_emulation::Machine::instance().fail(std::string(what) + " in " +
                                           (slash ? slash + 1 : found->file) + ":" +
                                           std::to_string(found->line));
}

}  // namespace

#define TRACE(name, bytes)                                                        \
  void __tsan_read##name(void* address) { trace(address, bytes, Access::kRead); } \
  void __tsan_write##name(void* address) { trace(address, bytes, Access::kWrite); }

extern "C" {

TRACE(1, 1)
TRACE(2, 2)
TRACE(4, 4)
TRACE(8, 8)
TRACE(16, 16)

#undef TRACE
#define TRACE(bytes)                                                                         \
  void __tsan_unaligned_read##bytes(void* address) { trace(address, bytes, Access::kRead); } \
  void __tsan_unaligned_write##bytes(void* address) { trace(address, bytes, Access::kWrite); }

TRACE(2)
TRACE(4)
TRACE(8)
TRACE(16)

void __tsan_read_range(void* address, size_t bytes) { trace(address, bytes, Access::kRead); }
void __tsan_write_range(void* address, size_t bytes) { trace(address, bytes, Access::kWrite); }

void __tsan_init() {}

void __ubsan_handle_type_mismatch_v1(Found* found, uintptr_t) {
  fail_at(found, "misaligned access");
}
void __ubsan_handle_out_of_bounds(Found* found, uintptr_t) {
  fail_at(found, "index outside an array");
}
}

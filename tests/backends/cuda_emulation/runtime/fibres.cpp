#include "fibres.h"

#include <sys/mman.h>

#include <new>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {
namespace {

constexpr size_t kGuardBytes = 4096;

// AddressSanitizer must know which stack is in use.
void leave_stack([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* to,
                 [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, to, bytes);
#endif
}

void reach_stack([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** from,
                 [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
#endif
}

}  // namespace

Fibres::~Fibres() {
  for (Fibre& fibre : fibres_) munmap(fibre.stack - kGuardBytes, kGuardBytes + kStackBytes);
}

void Fibres::provide(size_t count) {
  while (fibres_.size() < count) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    fibres_.push_back({static_cast<char*>(memory) + kGuardBytes, {}, false, nullptr});
  }
}

void Fibres::enter(unsigned high, unsigned low) {
  auto* self = reinterpret_cast<Fibres*>(uintptr_t(high) << 32 | low);
  reach_stack(nullptr, &self->scheduler_stack_, &self->scheduler_stack_bytes_);
  for (;;) {
    self->body_();
    self->suspend();
  }
}

void Fibres::start(Fibre& fibre) {
  fibre.started = true;
  getcontext(&start_);
  start_.uc_stack.ss_sp = fibre.stack;
  start_.uc_stack.ss_size = kStackBytes;
  start_.uc_link = nullptr;
  const auto self = reinterpret_cast<uintptr_t>(this);
  makecontext(&start_, reinterpret_cast<void (*)()>(&Fibres::enter), 2, unsigned(self >> 32),
              unsigned(self));
  setcontext(&start_);
}

void Fibres::resume(size_t index) {
  current_ = index;
  Fibre& fibre = fibres_[index];
  leave_stack(&scheduler_fake_stack_, fibre.stack, kStackBytes);
  if (_setjmp(scheduler_) == 0) {
    if (!fibre.started) start(fibre);
    _longjmp(fibre.context, 1);
  }
  reach_stack(scheduler_fake_stack_, nullptr, nullptr);
}

void Fibres::suspend() {
  Fibre& fibre = fibres_[current_];
  leave_stack(&fibre.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
  if (_setjmp(fibre.context) == 0) _longjmp(scheduler_, 1);
  reach_stack(fibre.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
}

void Fibres::abandon() {
  leave_stack(nullptr, scheduler_stack_, scheduler_stack_bytes_);
  _longjmp(scheduler_, 1);
}

void Fibres::discard() {
  for (Fibre& fibre : fibres_) {
    fibre.started = false;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fibre.stack, kStackBytes);
#endif
  }
}

}  // namespace cuda_emulation

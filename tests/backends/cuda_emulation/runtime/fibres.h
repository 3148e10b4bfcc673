// One stack per thread of a block, and the switch between them.
//
// ucontext starts a fibre; after that _setjmp and _longjmp switch, which unlike swapcontext make no
// system call.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <deque>

namespace cuda_emulation {

class Fibres {
 public:
  explicit Fibres(void (*body)()) : body_(body) {}
  Fibres(const Fibres&) = delete;
  Fibres& operator=(const Fibres&) = delete;
  ~Fibres();

  // Makes sure that there are `count`; a fibre runs the body again and again, once per `resume`
  // after the body has returned.
  void provide(size_t count);

  // Until it suspends itself or the body returns.
  void resume(size_t fibre);
  void suspend();
  [[noreturn]] void abandon();  // like suspend, for good: see `discard`

  // Forgets what suspended fibres were doing; they start anew.
  void discard();

  bool on_stack_of(size_t fibre, uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(fibres_[fibre].stack) < kStackBytes;
  }
  size_t current() const { return current_; }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;

  struct Fibre {
    char* stack;  // above a page that must not be touched
    jmp_buf context;
    bool started;
    void* fake_stack;
  };

  static void enter(unsigned high, unsigned low);
  void start(Fibre& fibre);

  void (*body_)();
  std::deque<Fibre> fibres_;  // suspended ones hold references to themselves
  size_t current_ = 0;
  jmp_buf scheduler_;
  ucontext_t start_;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
};

}  // namespace cuda_emulation

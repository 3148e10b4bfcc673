// Atomics. Threads are only interrupted where they meet, so a plain update is one; not traced as
// one.

#pragma once

#include "machine.h"

namespace cuda_emulation {

template <typename T, typename Update>
__attribute__((noinline, no_sanitize("thread"))) T update_atomically(T* address, Update update) {
  note_atomic(address, sizeof(T));
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cuda_emulation

#define CUDA_EMULATION_ATOMIC(name, expression)                                             \
  template <typename T>                                                                     \
  T name(T* address, std::common_type_t<T> value) {                                         \
    return cuda_emulation::update_atomically(                                               \
        address,                                                                            \
        [value](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; }); \
  }

CUDA_EMULATION_ATOMIC(atomicAdd, old + value)
CUDA_EMULATION_ATOMIC(atomicSub, old - value)
CUDA_EMULATION_ATOMIC(atomicMax, old < value ? value : old)
CUDA_EMULATION_ATOMIC(atomicMin, value < old ? value : old)
CUDA_EMULATION_ATOMIC(atomicExch, (static_cast<void>(old), value))
CUDA_EMULATION_ATOMIC(atomicOr, old | value)
CUDA_EMULATION_ATOMIC(atomicAnd, old& value)
CUDA_EMULATION_ATOMIC(atomicInc, old >= value ? T(0) : old + 1)

#undef CUDA_EMULATION_ATOMIC

template <typename T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return cuda_emulation::update_atomically(
      address, [compare, value](T old) __attribute__((no_sanitize("thread"))) -> T {
        return old == compare ? value : old;
      });
}

// The machine that runs a kernel: where a thread is, where threads meet, and the launch.

#pragma once

#include <cstddef>
#include <tuple>
#include <type_traits>

#include "../cuda_runtime_api.h"
#include "vector_types.h"

namespace cuda_emulation {

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();

// Where in the source threads meet; threads that wait at different sites have diverged.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const char* what);

// Returns for how many threads of the block `predicate` holds, once all of them have arrived.
int meet_block(bool predicate, Site site);

// Runs once the lanes of a mask have arrived; data[lane] is null for a lane outside the mask.
using Combine = void (*)(void* const data[32], unsigned mask);

// `orders_memory`: writes before it are visible after it, as __syncwarp promises and shuffles
// don't.
void meet_warp(unsigned mask, void* data, Combine combine, bool orders_memory, Site site);

unsigned lane();

// An atomic access, in place of the plain one that the compiler would report.
void note_atomic(const void* address, size_t bytes);
void note_fence();

struct Launch {
  const void* kernel;
  dim3 grid;
  dim3 block;
  size_t dynamic_shared;  // bytes
  void (*run_thread)(const void* call);
  const void* call;  // the kernel and its arguments: readable by its threads
  size_t argument_bytes;
  size_t call_bytes;
};

// Throws std::runtime_error for a launch that a device would refuse, and for what a thread did
// wrong.
void run(const Launch& launch);

// kernel<<<grid, block, dynamic_shared, stream>>>(arguments...), which ends before this returns.
template <typename... Params, typename... Arguments>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t,
            const Arguments&... arguments) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "arguments are copied as bytes");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  };
  const Call call{kernel, std::tuple<Params...>(arguments...)};
  const auto run_thread = [](const void* opaque) {
    const auto& call = *static_cast<const Call*>(opaque);
    std::apply(call.kernel, call.arguments);
  };
  run({reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared, run_thread, &call,
       (sizeof(Params) + ... + 0), sizeof(call)});
}

}  // namespace cuda_emulation

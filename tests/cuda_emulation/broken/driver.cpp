#include <string_view>

#include "broken.cuh"

#include <emulation/driver.h>

using cuda_emulation::guarded;
using cuda_emulation::launch;

namespace {

template <bool kMended>
const char* run(const char* name, const float* x, float* y, int n) {
  using namespace broken;
  const std::string_view which(name);
  return guarded([&] {
    if (which == "out_of_bounds") launch(name, out_of_bounds_kernel<kMended>, 2, 32, 0, x, y, n);
    if (which == "out_of_shared") launch(name, out_of_shared_kernel<kMended>, 1, 32, 128, x, y);
    if (which == "missing_barrier") launch(name, missing_barrier_kernel<kMended>, 1, 128, 0, x, y);
    if (which == "missing_warp_barrier") {
      launch(name, missing_warp_barrier_kernel<kMended>, 1, 32, 0, x, y);
    }
    if (which == "missing_second_barrier") {
      launch(name, missing_second_barrier_kernel<kMended>, 1, 128, 0, x, y);
    }
    if (which == "divergent_barrier") {
      launch(name, divergent_barrier_kernel<kMended>, 1, 128, 0, x, y, n);
    }
    if (which == "two_barriers") launch(name, two_barriers_kernel<kMended>, 1, 64, 0, x, y);
    if (which == "divergent_shuffle") {
      launch(name, divergent_shuffle_kernel<kMended>, 1, 32, 0, x, y);
    }
    if (which == "racing_blocks") launch(name, racing_blocks_kernel<kMended>, 2, 32, 0, x, y);
    if (which == "misaligned") launch(name, misaligned_kernel<kMended>, 1, 1, 0, x, y);
  });
}

}  // namespace

EMULATED run_kernel(const char* name, bool mended, const float* x, float* y, int n) {
  return mended ? run<true>(name, x, y, n) : run<false>(name, x, y, n);
}

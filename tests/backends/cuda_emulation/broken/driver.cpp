#include <emulation/driver.h>

#include <string_view>

#include "broken.cuh"

using cuda_emulation::guarded;

namespace {

template <bool kMended>
const char* run(std::string_view name, const float* x, float* y, int n) {
  using namespace broken;
  return guarded([&] {
    if (name == "out_of_bounds") out_of_bounds_kernel<kMended><<<2, 32, 0, nullptr>>>(x, y, n);
    if (name == "out_of_shared") out_of_shared_kernel<kMended><<<1, 32, 128, nullptr>>>(x, y);
    if (name == "out_of_array") out_of_array_kernel<kMended><<<1, 32, 0, nullptr>>>(x, y);
    if (name == "missing_barrier") missing_barrier_kernel<kMended><<<1, 128, 0, nullptr>>>(x, y);
    if (name == "missing_warp_barrier") {
      missing_warp_barrier_kernel<kMended><<<1, 32, 0, nullptr>>>(x, y);
    }
    if (name == "missing_second_barrier") {
      missing_second_barrier_kernel<kMended><<<1, 128, 0, nullptr>>>(x, y);
    }
    if (name == "early_write") early_write_kernel<kMended><<<1, 128, 0, nullptr>>>(x, y);
    if (name == "early_write_for_all") {
      early_write_for_all_kernel<kMended><<<1, 128, 0, nullptr>>>(x, y);
    }
    if (name == "divergent_barrier") {
      divergent_barrier_kernel<kMended><<<1, 128, 0, nullptr>>>(x, y, n);
    }
    if (name == "two_barriers") two_barriers_kernel<kMended><<<1, 64, 0, nullptr>>>(x, y);
    if (name == "divergent_shuffle") {
      divergent_shuffle_kernel<kMended><<<1, 32, 0, nullptr>>>(x, y);
    }
    if (name == "racing_blocks") racing_blocks_kernel<kMended><<<2, 32, 0, nullptr>>>(x, y);
    if (name == "overwriting_blocks") {
      overwriting_blocks_kernel<kMended><<<2, 32, 0, nullptr>>>(x, y);
    }
    if (name == "misaligned") misaligned_kernel<kMended><<<1, 1, 0, nullptr>>>(x, y);
  });
}

}  // namespace

EMULATED run_kernel(const char* name, bool mended, const float* x, float* y, int n) {
  return mended ? run<true>(name, x, y, n) : run<false>(name, x, y, n);
}

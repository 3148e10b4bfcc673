// invert_cores by the launcher of core_kernels.cu: layers are added one by one, then inverted
// together.

#include <emulation/driver.h>

#include <stdexcept>

#include "../../../../csrc/cuda/plan.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

CorePlan plan(0);

}  // namespace

EMULATED start_cores(double damping) {
  return guarded([&] { plan = CorePlan(damping); });
}

EMULATED add_core(const void* core, const void* trace, void* core_inverse, void* shift,
                  const void* samples, int64_t dim, int rank) {
  return guarded([&] { plan.add({core, trace, core_inverse, shift, samples, dim, rank}); });
}

EMULATED invert_cores(bool is_double, int quarters) {
  return guarded([&] {
    if (plan.launch(is_double, quarters, nullptr) != cudaSuccess) {
      throw std::runtime_error("launch_invert_cores: too much shared memory");
    }
  });
}

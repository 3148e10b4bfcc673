// refresh_subspaces by the launcher of subspace_kernels.cu: layers are added one by one, then moved
// together.

#include <emulation/driver.h>

#include "../../../../csrc/cuda/plan.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

MovePlan plan;

}  // namespace

EMULATED start_moves() {
  return guarded([] { plan = {}; });
}

EMULATED add_move(const float* sketch, const float* core, float* rough, float* basis,
                  float* core_out, double* parts, double* triangles, int64_t dim, int rank) {
  return guarded([&] {
    plan.add({sketch, core, rough, basis, core_out, parts, triangles, dim, rank, 0, 0});
  });
}

EMULATED move() {
  return guarded([] { plan.launch(nullptr); });
}

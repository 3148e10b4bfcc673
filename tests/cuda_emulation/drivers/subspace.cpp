// refresh_subspaces by the launcher of subspace_kernels.cu: layers are added one by one, then moved
// together.

#include "../../../csrc/cuda/subspace.h"

#include <emulation/driver.h>

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

MoveTable table{};

}  // namespace

EMULATED start_moves() {
  return guarded([] { table = {}; });
}

EMULATED add_move(const float* sketch, const float* core, float* rough, float* basis,
                  float* core_out, double* parts, double* triangles, int64_t dim, int rank) {
  return guarded([&] {
    const uint32_t blocks = move_blocks(dim);
    table.entries[table.count++] = {sketch,    core, rough, basis,  core_out,    parts,
                                    triangles, dim,  rank,  blocks, table.blocks};
    table.blocks += blocks;
  });
}

EMULATED move() {
  return guarded([] { launch_moves(table, nullptr); });
}

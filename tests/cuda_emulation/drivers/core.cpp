// invert_cores by the launcher of core_kernels.cu: layers are added one by one, then inverted
// together.

#include "../../../csrc/cuda/core.h"

#include <emulation/driver.h>

#include <stdexcept>

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

CoreTable table{};

}  // namespace

EMULATED start_cores() {
  return guarded([] { table = {}; });
}

EMULATED add_core(const void* core, const void* trace, void* core_inverse, void* shift, int64_t dim,
                  double share, int rank) {
  return guarded([&] {
    table.entries[table.count++] = {core, trace, core_inverse, shift, dim, share, rank};
    if (rank > table.most_rank) table.most_rank = rank;
  });
}

EMULATED invert_cores(bool is_double) {
  return guarded([&] {
    if (launch_invert_cores(table, is_double, nullptr) != cudaSuccess) {
      throw std::runtime_error("launch_invert_cores: too much shared memory");
    }
  });
}

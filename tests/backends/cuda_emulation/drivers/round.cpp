// round_params_ by the launcher of round_kernels.cu: parameters are added one by one, then rounded
// together.

#include <emulation/driver.h>

#include "../../../../csrc/cuda/plan.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

std::deque<RoundTable> tables;

}  // namespace

EMULATED start_rounding() {
  return guarded([&] { tables.clear(); });
}

EMULATED add_rounded(void* param, const float* values, const void* step, int64_t numel,
                     int64_t seed, bool double_step) {
  return guarded([&] {
    const Rounded entry{param, values, step, numel, uint32_t(seed), 0, double_step};
    append(tables, entry, divide_up(numel, kRoundElements));
  });
}

EMULATED round_params(Dtype dtype) {
  return guarded([&] {
    for (const RoundTable& table : tables) launch_round(table, dtype, nullptr);
  });
}

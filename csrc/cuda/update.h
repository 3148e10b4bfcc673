// What the update's kernels are told.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"
#include "table.h"

namespace gls_fused::cuda {

constexpr int kUpdateThreads = 256;
// 64 bytes of each stream per thread: four independent 16-byte accesses in flight.
constexpr int kChunkBytes = kUpdateThreads * 64;
// Elements of a chunk, of this many bytes each; the state beside 16-bit parameters has 4 bytes. Of
// float64 one access to a thread: its square roots and quotients are calls, which spill the rest.
constexpr int chunk_elements(int bytes) { return bytes > 4 ? kChunkBytes / 32 : kChunkBytes / 4; }

// Of one layer, in device memory, by finish_layers_kernel or blend_axes_kernel.
struct LayerStep {
  double decayed;     // 1 - lr weight_decay
  double rate;        // lr, grown and bounded, times the layer's scale over the bias correction
  double correction;  // 1 / (1 - beta2^step)
  double scale;       // of the gradients: 1 / grad_scale
  double taken;       // 0 where found_inf says that the step is not taken
};

// What does not depend on the layer.
struct Decays {
  double momentum;
  double beta2;
  double eps;
};

struct FlatTensor {
  void* param;
  const void* direction;  // D, of the parameter's dtype
  const void* gradient;   // D0, read where its norm is asked for
  void* exp_avg;          // null when momentum is 0
  void* exp_avg_sq;       // per element for "adam", else null
  int64_t numel;
  uint32_t layer;
  uint32_t first;  // its first block in this launch
};

using FlatTable = Table<FlatTensor>;

struct LayerSums {
  void* step;            // float or double, 0-d
  void* exp_avg_sq;      // of the state's dtype, 0-d, for "rms"
  const void* rates;     // bound and growth; null where there are none
  int64_t first;         // of its sums of squares
  int64_t count;
  int64_t numel;
};

using LayerTable = Table<LayerSums>;

// What a layer's step is scaled with; of each row, or row and column, for the last two.
enum class Scale { kNone, kRootMeanSquare, kGradientNorm, kRow, kFactored };

// lr, grad_scale and found_inf where they are in device memory; null where they are not.
struct FinishOptions {
  Scale scale;
  bool double_steps;
  bool double_state;
  bool double_lr;
  bool double_rates;
  bool double_grad_scale;
  bool double_found_inf;
  double lr;
  double weight_decay;
  Decays decays;
  const void* lr_address;
  const void* grad_scale;
  const void* found_inf;
};

void launch_square_flat(const FlatTable& table, Dtype dtype, bool both, double2* squares,
                        cudaStream_t stream);
void launch_finish_layers(const LayerTable& table, const FinishOptions& options,
                          const double2* squares, LayerStep* steps, cudaStream_t stream);
void launch_update_flat(const FlatTable& table, Dtype dtype, const LayerStep* steps,
                        const Decays& decays, cudaStream_t stream);

}  // namespace gls_fused::cuda

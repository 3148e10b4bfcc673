// Launches of axis_update.cuh.

#include "axis_update.cuh"

#include <type_traits>

#include "launch.cuh"

namespace gls_fused::cuda {

static_assert(tile_rows(8) == kTileRows<double> && tile_columns(8) == kTileColumns<double>);

namespace {

// What D is formed of is float32; where D is given, every dtype has a kernel.
template <typename T, typename Function>
void visit_kind(const AxisTable& table, const Function& function) {
  if constexpr (sizeof(T) < 8) {
    if (table.formed) return function(std::true_type());
  }
  return function(std::false_type());
}

}  // namespace

void launch_square_axes(const AxisTable& table, Dtype dtype, void* sums, cudaStream_t stream) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    visit_kind<T>(table, [&](auto formed) {
      const auto kernel = square_axes_kernel<T, formed()>;
      kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, static_cast<Wide<T>*>(sums));
    });
  });
}

void launch_blend_axes(const BlendTable& table, const FinishOptions& options, void* sums,
                       LayerStep* steps, cudaStream_t stream) {
  if (options.double_state) {
    double* own = static_cast<double*>(sums);
    blend_axes_kernel<double><<<table.blocks, kBlendThreads, 0, stream>>>(table, options, own, steps);
  } else {
    float* own = static_cast<float*>(sums);
    blend_axes_kernel<float><<<table.blocks, kBlendThreads, 0, stream>>>(table, options, own, steps);
  }
}

void launch_update_axes(const AxisTable& table, Dtype dtype, const void* sums,
                        const LayerStep* steps, const Decays& decays, cudaStream_t stream) {
  const bool momentum = table.entries[0].weight.exp_avg;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    visit_kind<T>(table, [&](auto formed) {
      const auto kernel = momentum ? update_axes_kernel<T, formed(), true>
                                   : update_axes_kernel<T, formed(), false>;
      kernel<<<table.blocks, kProductThreads, 0, stream>>>(
          table, static_cast<const Wide<T>*>(sums), steps, decays);
    });
  });
}

}  // namespace gls_fused::cuda

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
  using True = std::true_type;
  using False = std::false_type;
  if constexpr (sizeof(T) < 8) {
    if (table.formed) {
      return table.wide ? function(True(), True()) : function(False(), True());
    }
  }
  return table.wide ? function(True(), False()) : function(False(), False());
}

}  // namespace

void launch_square_axes(const AxisTable& table, Dtype dtype, void* sums, cudaStream_t stream) {
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    visit_kind<T>(table, [&](auto wide, auto formed) {
      const auto kernel = square_axes_kernel<T, wide(), formed()>;
      kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, static_cast<Wide<T>*>(sums));
    });
  });
}

void launch_blend_axes(const BlendTable& table, const FinishOptions& options, const void* sums,
                       cudaStream_t stream) {
  if (options.double_state) {
    const double* from = static_cast<const double*>(sums);
    blend_axes_kernel<double><<<table.blocks, kBlendThreads, 0, stream>>>(table, options, from);
  } else {
    const float* from = static_cast<const float*>(sums);
    blend_axes_kernel<float><<<table.blocks, kBlendThreads, 0, stream>>>(table, options, from);
  }
}

void launch_update_axes(const AxisTable& table, Dtype dtype, const LayerStep* steps,
                        const Decays& decays, cudaStream_t stream) {
  const bool momentum = table.entries[0].weight.exp_avg;
  visit(dtype, [&](auto element) {
    using T = decltype(element);
    visit_kind<T>(table, [&](auto wide, auto formed) {
      const auto kernel = momentum ? update_axes_kernel<T, wide(), formed(), true>
                                   : update_axes_kernel<T, wide(), formed(), false>;
      kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, steps, decays);
    });
  });
}

}  // namespace gls_fused::cuda

// Launches of tile_update.cuh.

#include "tile_update.cuh"

#include "launch.cuh"

namespace gls_fused::cuda {

static_assert(tile_rows(4) == kTileRows<float> && tile_columns(4) == kTileColumns<float>);
static_assert(tile_rows(2) == kTileRows<__half> && tile_columns(2) == kTileColumns<__half>);

void launch_square_tiles(const TileTable& table, Dtype dtype, double2* squares,
                         cudaStream_t stream) {
  visit_single(dtype, [&](auto element) {
    using T = decltype(element);
    square_tiles_kernel<T><<<table.blocks, kProductThreads, 0, stream>>>(table, squares);
  });
}

void launch_update_tiles(const TileTable& table, Dtype dtype, const LayerStep* steps,
                         const Decays& decays, cudaStream_t stream) {
  const TileArrays& weight = table.entries[0].weight;
  const bool momentum = weight.exp_avg, elementwise = weight.exp_avg_sq;
  visit_single(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = momentum ? (elementwise ? update_tiles_kernel<T, true, true>
                                                : update_tiles_kernel<T, true, false>)
                                 : (elementwise ? update_tiles_kernel<T, false, true>
                                                : update_tiles_kernel<T, false, false>);
    kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, steps, decays);
  });
}

}  // namespace gls_fused::cuda

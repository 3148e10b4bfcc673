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
    const auto kernel = table.wide ? square_tiles_kernel<T, true> : square_tiles_kernel<T, false>;
    kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, squares);
  });
}

namespace {

template <typename T, bool kWide>
auto choose_update(bool momentum, bool elementwise) {
  return momentum ? (elementwise ? update_tiles_kernel<T, kWide, true, true>
                                 : update_tiles_kernel<T, kWide, true, false>)
                  : (elementwise ? update_tiles_kernel<T, kWide, false, true>
                                 : update_tiles_kernel<T, kWide, false, false>);
}

}  // namespace

void launch_update_tiles(const TileTable& table, Dtype dtype, const LayerStep* steps,
                         const Decays& decays, cudaStream_t stream) {
  const TileArrays& weight = table.entries[0].weight;
  const bool momentum = weight.exp_avg, elementwise = weight.exp_avg_sq;
  visit_single(dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = table.wide ? choose_update<T, true>(momentum, elementwise)
                                   : choose_update<T, false>(momentum, elementwise);
    kernel<<<table.blocks, kProductThreads, 0, stream>>>(table, steps, decays);
  });
}

}  // namespace gls_fused::cuda

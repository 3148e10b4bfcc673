// update_layers_ by the launchers of update_kernels.cu, rows_kernels.cu and tile_update_kernels.cu:
// layers are added one by one, then updated together.

#include "../../../csrc/cuda/update.h"

#include <emulation/driver.h>

#include <memory>
#include <vector>

#include "../../../csrc/cuda/tile_update.h"
#include "products.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

struct Update {
  FlatTable flat{};
  // Whose rows are no multiple of 16 bytes, and whose are.
  TileTable tiled[2]{};
  ProductTable products[2]{};
  LayerTable layers{};
};

std::unique_ptr<Update> update = std::make_unique<Update>();

int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

}  // namespace

EMULATED start_update() {
  return guarded([] { update = std::make_unique<Update>(); });
}

EMULATED add_layer(void* step, void* exp_avg_sq, int64_t numel) {
  return guarded(
      [&] { update->layers.entries[update->layers.count++] = {step, exp_avg_sq, 0, 0, numel}; });
}

// A parameter of the last layer, whose direction is given.
EMULATED add_flat(Dtype dtype, void* param, const void* direction, const void* gradient,
                  void* exp_avg, void* exp_avg_sq, int64_t numel) {
  return guarded([&] {
    FlatTable& table = update->flat;
    const int64_t chunk = chunk_elements(static_cast<int>(element_bytes(dtype)));
    const auto blocks = static_cast<uint32_t>((numel + chunk - 1) / chunk);
    LayerSums& layer = update->layers.entries[update->layers.count - 1];
    if (layer.count == 0) layer.first = table.blocks;
    layer.count += blocks;
    table.entries[table.count++] = {param,
                                    direction,
                                    gradient,
                                    exp_avg,
                                    exp_avg_sq,
                                    numel,
                                    uint32_t(update->layers.count - 1),
                                    table.blocks};
    table.blocks += blocks;
  });
}

// Weight and bias of the last layer, whose inverse is given.
EMULATED add_tiled(Dtype dtype, void* weight, const void* weight_gradient, void* weight_exp_avg,
                   void* weight_exp_avg_sq, void* bias, const void* bias_gradient,
                   void* bias_exp_avg, void* bias_exp_avg_sq, const float* basis,
                   const float* core_inverse, const float* shift, float* parts, float* turned,
                   int64_t n, int64_t size, int rank) {
  return guarded([&] {
    const bool narrow = element_bytes(dtype) == 2;
    const int64_t across = (size + tile_columns(narrow) - 1) / tile_columns(narrow);
    const int64_t down = (n + tile_rows(narrow) - 1) / tile_rows(narrow);
    const Last kind = bias ? Last::kColumn : Last::kAbsent;
    const Product product = make_product(weight_gradient, kind, bias_gradient, basis, core_inverse,
                                         parts, turned, nullptr, n, size, size, rank);
    append(update->products, product, element_bytes(dtype));
    const bool wide = is_wide(product, element_bytes(dtype)) && is_aligned16(weight) &&
                      is_aligned16(weight_exp_avg) && is_aligned16(weight_exp_avg_sq);
    TileTable& table = update->tiled[wide];
    table.wide = wide;
    TileLayer layer{};
    layer.weight = {weight, weight_gradient, weight_exp_avg, weight_exp_avg_sq};
    layer.bias = {bias, bias_gradient, bias_exp_avg, bias_exp_avg_sq};
    layer.basis = basis;
    layer.turned = turned;
    layer.shift = shift;
    layer.n = n;
    layer.size = size;
    layer.basis_row = product.basis_row;
    layer.rank = rank;
    layer.across = static_cast<uint32_t>(across);
    layer.layer = update->layers.count - 1;
    layer.first = table.blocks;
    table.entries[table.count++] = layer;
    table.blocks += static_cast<uint32_t>(across * down);
  });
}

EMULATED run_update(Dtype dtype, Scale scale, double lr, const void* lr_address, bool double_lr,
                    const float* grad_scale, const float* found_inf, double momentum, double beta2,
                    double eps, double weight_decay, double* squares, LayerStep* steps) {
  return guarded([&] {
    const Decays decays{momentum, beta2, eps};
    FinishOptions options{};
    options.scale = scale;
    options.double_state = dtype == Dtype::kDouble;
    options.double_lr = double_lr;
    options.lr = lr;
    options.weight_decay = weight_decay;
    options.decays = decays;
    options.lr_address = lr_address;
    options.grad_scale = grad_scale;
    options.found_inf = found_inf;
    auto* pairs = reinterpret_cast<double2*>(squares);
    const bool norms = scale != Scale::kNone;
    for (const ProductTable& table : update->products) {
      if (table.count == 0) continue;
      launch_project(table, dtype, nullptr);
      launch_turn(table, dtype, nullptr);
    }
    if (norms && update->flat.count > 0) {
      launch_square_flat(update->flat, dtype, scale == Scale::kGradientNorm, pairs, nullptr);
    }
    uint32_t first = update->flat.blocks;
    for (const TileTable& table : update->tiled) {
      for (int i = 0; i < table.count; ++i) {
        const TileLayer& x = table.entries[i];
        LayerSums& sums = update->layers.entries[x.layer];
        sums.first = first + x.first;
        sums.count = (i + 1 < table.count ? table.entries[i + 1].first : table.blocks) - x.first;
      }
      if (norms && table.count > 0) launch_square_tiles(table, dtype, pairs + first, nullptr);
      first += table.blocks;
    }
    launch_finish_layers(update->layers, options, pairs, steps, nullptr);
    if (update->flat.count > 0) launch_update_flat(update->flat, dtype, steps, decays, nullptr);
    for (const TileTable& table : update->tiled) {
      if (table.count > 0) launch_update_tiles(table, dtype, steps, decays, nullptr);
    }
  });
}

// update_layers_ by the launchers of update_kernels.cu, rows_kernels.cu, tile_update_kernels.cu and
// axis_update_kernels.cu: layers are added one by one, then updated together.

#include <emulation/driver.h>

#include <algorithm>
#include <iterator>

#include "products.h"

using namespace gls_fused::cuda;
using cuda_emulation::guarded;

namespace {

UpdatePlan plan(Dtype::kFloat);

}  // namespace

// Bytes of an entry of each table.
EMULATED entry_bytes(int64_t* bytes) {
  return guarded([&] {
    const int64_t found[] = {sizeof(FlatTensor), sizeof(LayerSums), sizeof(Product),
                             sizeof(TileLayer),  sizeof(AxisLayer), sizeof(AxisBlend),
                             sizeof(Move),       sizeof(CoreLayer)};
    std::copy(std::begin(found), std::end(found), bytes);
  });
}

EMULATED start_update(Dtype dtype) {
  return guarded([&] { plan = UpdatePlan(dtype); });
}

EMULATED add_layer(void* step, void* exp_avg_sq, const void* rates) {
  return guarded([&] { plan.add_layer(step, exp_avg_sq, rates); });
}

// A parameter of the last layer, whose direction is given.
EMULATED add_flat(void* param, const void* direction, const void* gradient, void* exp_avg,
                  void* exp_avg_sq, int64_t numel) {
  return guarded(
      [&] { plan.add_flat({param, direction, gradient, exp_avg, exp_avg_sq, numel, 0, 0}); });
}

// Weight and bias of the last layer, whose inverse is given.
EMULATED add_tiles(void* weight, const void* weight_gradient, void* weight_exp_avg,
                   void* weight_exp_avg_sq, void* bias, const void* bias_gradient,
                   void* bias_exp_avg, void* bias_exp_avg_sq, const float* basis,
                   const float* core_inverse, const float* shift, float* parts, int64_t n,
                   int64_t size, int rank) {
  return guarded([&] {
    const Last kind = bias ? Last::kColumn : Last::kAbsent;
    plan.add_tiles(make_product(weight_gradient, kind, bias_gradient, basis, core_inverse, parts,
                                nullptr, n, size, size, rank),
                   {weight, weight_gradient, weight_exp_avg, weight_exp_avg_sq},
                   {bias, bias_gradient, bias_exp_avg, bias_exp_avg_sq}, shift);
  });
}

// Weight and bias of the last layer, scaled by row and column; without a basis D is given.
EMULATED add_axes(void* weight, const void* weight_gradient, void* weight_exp_avg, void* bias,
                  const void* bias_gradient, void* bias_exp_avg, void* rows, void* columns,
                  const float* basis, const float* core_inverse, const float* shift, float* parts,
                  int64_t n, int64_t size, int rank) {
  return guarded([&] {
    AxisLayer x{};
    x.weight = {weight, weight_gradient, weight_exp_avg};
    x.bias = {bias, bias_gradient, bias_exp_avg};
    x.rows = rows;
    x.columns = columns;
    x.n = n;
    x.size = size;
    if (!basis) {
      plan.add_axes(x, nullptr, nullptr);
      return;
    }
    const Last kind = bias ? Last::kColumn : Last::kAbsent;
    const Product product = make_product(weight_gradient, kind, bias_gradient, basis, core_inverse,
                                         parts, nullptr, n, size, size, rank);
    plan.add_axes(x, &product, shift);
  });
}

// Pairs of sums of squares, and sums of rows and columns.
EMULATED count_sums(int64_t* squares, int64_t* axis_sums) {
  return guarded([&] {
    *squares = plan.count_squares();
    *axis_sums = plan.count_axis_sums();
  });
}

EMULATED run_update(Scale scale, double lr, const void* lr_address, bool double_lr,
                    bool double_rates, bool double_state, const float* grad_scale,
                    const float* found_inf, double momentum, double beta2, double eps,
                    double weight_decay, double* squares, void* axis_sums, LayerStep* steps) {
  return guarded([&] {
    FinishOptions options{};
    options.scale = scale;
    options.double_state = double_state;
    options.double_lr = double_lr;
    options.double_rates = double_rates;
    options.lr = lr;
    options.weight_decay = weight_decay;
    options.decays = {momentum, beta2, eps};
    options.lr_address = lr_address;
    options.grad_scale = grad_scale;
    options.found_inf = found_inf;
    plan.launch(options, reinterpret_cast<double2*>(squares), axis_sums, steps,
                nullptr);
  });
}

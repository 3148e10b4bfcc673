// What of the launches needs no tensor: into which table an entry goes, which blocks and sums are
// its own, and in which order tables are launched. The emulator's drivers plan with it too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>

#include "axis_update.h"
#include "core.h"
#include "product.h"
#include "round.h"
#include "sketch.h"
#include "subspace.h"
#include "tile_update.h"
#include "update.h"

namespace gls_fused::cuda {

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

inline bool is_aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// ---- tables -------------------------------------------------------------------------------------

// To the last table, or to a new one where that is full.
template <typename Table, typename Entry>
Table& append(std::deque<Table>& tables, const Entry& entry) {
  if (tables.empty() || tables.back().count == Table::kMost) tables.emplace_back();
  Table& table = tables.back();
  table.entries[table.count++] = entry;
  return table;
}

// The same, where the entry has `blocks` of the launch to itself.
template <typename Table, typename Entry>
Table& append(std::deque<Table>& tables, Entry entry, int64_t blocks) {
  Table& table = append(tables, entry);
  table.entries[table.count - 1].first = table.blocks;
  table.blocks += uint32_t(blocks);
  return table;
}

// ---- products -----------------------------------------------------------------------------------

// Parts of the columns; a function of the shape alone, so that sums repeat to the last bit. 132 SMs
// want some hundred blocks. A part of 512 columns writes 4 rank bytes per row, 6% of what it reads, but
// each tile of 128 columns reads all parts of its rows of T.
inline void split_columns(Product& p) {
  const int64_t rows = std::max<int64_t>(divide_up(p.n, kProjectRows), 1);
  const int64_t wanted = std::min(divide_up(p.size, 512), divide_up(128, rows));
  p.splits = int32_t(std::clamp<int64_t>(wanted, 1, 64));
  p.columns = divide_up(divide_up(p.size, p.splits), kProjectColumns) * kProjectColumns;
}

inline int64_t project_blocks(const Product& p) { return divide_up(p.n, kProjectRows) * p.splits; }

// Whether every row of X begins at 16 bytes and ends there.
inline bool is_wide(const Product& p, Dtype dtype) {
  const int64_t width = 16 / element_bytes(dtype);
  return is_aligned16(p.x) && p.x_row % width == 0 && p.size % width == 0;
}

// T of matrices of one dtype.
class ProductPlan {
 public:
  explicit ProductPlan(Dtype dtype) : dtype_(dtype) {}

  void add(Product p) {
    if (p.n == 0) return;
    p.wide = is_wide(p, dtype_);
    append(tables_, p, project_blocks(p));
  }

  void launch(cudaStream_t stream) const {
    for (const ProductTable& table : tables_) launch_project(table, dtype_, stream);
  }

 private:
  Dtype dtype_;
  std::deque<ProductTable> tables_;
};

// X P.
inline void launch_combination(Combination x, Dtype dtype, cudaStream_t stream) {
  if (x.product.n == 0) return;
  ProductPlan plan(dtype);
  plan.add(x.product);
  plan.launch(stream);
  x.wide = is_wide(x.product, dtype) && is_aligned16(x.output);
  launch_combine(x, dtype, stream);
}

// Of Y and the squares of X; where its sums, and Y, go is left to the caller.
inline Gram make_gram(const Product& p) {
  Gram gram{};
  gram.turned = turned_of(p);
  gram.squares = p.squares;
  gram.blocks = project_blocks(p);
  gram.n = p.n;
  gram.rank = p.rank;
  // At most 128 parts.
  gram.rows = kGramRows * std::max<int64_t>(divide_up(p.n, kGramRows * 128), 1);
  gram.splits = int32_t(divide_up(p.n, gram.rows));
  return gram;
}

// ---- the update ---------------------------------------------------------------------------------

// Layers in their order, each followed by its parameters, all of one dtype. Sums of squares lie in
// the order of the blocks, so that those of a layer are neighbours.
class UpdatePlan {
 public:
  explicit UpdatePlan(Dtype dtype) : dtype_(dtype), products_(dtype) {}

  void add_layer(void* step, void* exp_avg_sq, const void* rates) {
    LayerSums layer{};
    layer.step = step;
    layer.exp_avg_sq = exp_avg_sq;
    layer.rates = rates;
    append(layers_, layer);
    ++count_;
  }

  // A parameter of the last layer, whose D is given.
  void add_flat(FlatTensor tensor) {
    sums_of(count_ - 1).numel += tensor.numel;
    if (tensor.numel == 0) return;
    tensor.layer = count_ - 1;
    append(flat_, tensor, divide_up(tensor.numel, chunk_elements(element_bytes(dtype_))));
  }

  // Weight and bias of the last layer, whose D is formed from the product's T.
  void add_tiles(const Product& p, const TileArrays& weight, const TileArrays& bias,
                 const float* shift) {
    products_.add(p);
    const int bytes = element_bytes(dtype_);
    const int64_t down = divide_up(p.n, tile_rows(bytes));
    const int64_t across = divide_up(p.size, tile_columns(bytes));
    const bool wide = is_wide(p, dtype_) && is_aligned16(weight.param) &&
                      is_aligned16(weight.exp_avg) && is_aligned16(weight.exp_avg_sq);
    const TileLayer tile{weight, bias,        p.basis,          shift,      turned_of(p), p.n,
                         p.size, p.basis_row, uint32_t(across), count_ - 1, 0,            wide};
    append(tiled_, tile, down * across);
    sums_of(count_ - 1).numel += p.n * (p.size + (bias.param ? 1 : 0));
  }

  // Weight and bias of the last layer, for "row" and "factored"; D is formed from the product's T
  // where there is one, and given as the gradients where not.
  void add_axes(AxisLayer x, const Product* product, const float* shift) {
    const int bytes = element_bytes(dtype_);
    const int64_t dim = x.size + (x.bias.param ? 1 : 0);
    const int64_t down = divide_up(x.n, tile_rows(bytes));
    // A layer without columns may have a bias.
    const int64_t across = std::max<int64_t>(divide_up(x.size, tile_columns(bytes)), 1);
    x.across = uint32_t(across);
    x.layer = count_ - 1;
    x.row_sums = axis_sums_;
    x.column_sums = x.row_sums + across * x.n;
    axis_sums_ = x.column_sums + (x.columns ? down * dim : 0);
    const LayerSums& layer = sums_of(count_ - 1);
    // And one block that counts the step.
    const int64_t blends =
        divide_up(x.n, kBlendThreads) + (x.columns ? divide_up(dim, kBlendThreads) : 0) + 1;
    const AxisBlend blend{layer.step,    layer.rates, x.rows, x.columns, x.row_sums,
                          x.column_sums, x.n,         dim,    x.across,  uint32_t(down),
                          x.layer,       0};
    append(blends_, blend, blends);
    if (x.n == 0) return;
    if (product) {
      products_.add(*product);
      x.basis = product->basis;
      x.turned = turned_of(*product);
      x.shift = shift;
      x.basis_row = product->basis_row;
    }
    x.wide = x.size % (16 / bytes) == 0 && is_aligned16(x.weight.gradient) &&
                      is_aligned16(x.weight.param) && is_aligned16(x.weight.exp_avg) &&
                      is_aligned16(x.columns);
    append(axes_[product != nullptr], x, down * across).formed = product != nullptr;
  }

  // Pairs of sums that `launch` wants room for.
  int64_t count_squares() const {
    int64_t total = 0;
    for (const FlatTable& table : flat_) total += table.blocks;
    for (const TileTable& table : tiled_) total += table.blocks;
    return total;
  }

  // Sums of rows and columns, of the state's dtype, that it wants room for.
  int64_t count_axis_sums() const { return axis_sums_; }

  // Once.
  void launch(const FinishOptions& options, double2* squares, void* axis_sums, LayerStep* steps,
              cudaStream_t stream) {
    const bool norms =
        options.scale == Scale::kRootMeanSquare || options.scale == Scale::kGradientNorm;
    products_.launch(stream);
    int64_t first = 0;
    for (const FlatTable& table : flat_) {
      const bool both = options.scale == Scale::kGradientNorm;
      if (norms) launch_square_flat(table, dtype_, both, squares + first, stream);
      first = give_sums(table, first);
    }
    for (const TileTable& table : tiled_) {
      if (norms) launch_square_tiles(table, dtype_, squares + first, stream);
      first = give_sums(table, first);
    }
    for_axes([&](const AxisTable& table) {
      launch_square_axes(table, dtype_, axis_sums, stream);
    });
    for (const BlendTable& table : blends_) {
      launch_blend_axes(table, options, axis_sums, steps, stream);
    }
    // The blending has counted its layers' steps.
    LayerStep* next = steps;
    for (const LayerTable& table : layers_) {
      if (blends_.empty()) launch_finish_layers(table, options, squares, next, stream);
      next += table.count;
    }
    for (const FlatTable& table : flat_) {
      launch_update_flat(table, dtype_, steps, options.decays, stream);
    }
    for (const TileTable& table : tiled_) {
      launch_update_tiles(table, dtype_, steps, options.decays, stream);
    }
    for_axes([&](const AxisTable& table) {
      launch_update_axes(table, dtype_, axis_sums, steps, options.decays, stream);
    });
  }

 private:
  template <typename Function>
  void for_axes(const Function& function) const {
    for (const auto& tables : axes_) {
      for (const AxisTable& table : tables) function(table);
    }
  }

  LayerSums& sums_of(uint32_t layer) {
    return layers_[layer / LayerTable::kMost].entries[layer % LayerTable::kMost];
  }

  // Tells the layers of a table, whose sums begin at `first`, which are theirs; where its end.
  template <typename Table>
  int64_t give_sums(const Table& table, int64_t first) {
    for (int i = 0; i < table.count; ++i) {
      const auto& entry = table.entries[i];
      const uint32_t end = i + 1 < table.count ? table.entries[i + 1].first : table.blocks;
      LayerSums& sums = sums_of(entry.layer);
      if (sums.count == 0) sums.first = first + entry.first;
      sums.count += end - entry.first;
    }
    return first + table.blocks;
  }

  Dtype dtype_;
  uint32_t count_ = 0;
  std::deque<LayerTable> layers_;
  ProductPlan products_;
  std::deque<FlatTable> flat_;
  std::deque<TileTable> tiled_;
  // Those whose D is given, and those that form it.
  std::deque<AxisTable> axes_[2];
  std::deque<BlendTable> blends_;
  int64_t axis_sums_ = 0;
};

// ---- cores and bases ----------------------------------------------------------------------------

class CorePlan {
 public:
  explicit CorePlan(double damping) : damping_(damping) {}

  void add(const CoreLayer& layer) {
    CoreTable& table = append(tables_, layer);
    table.damping = damping_;
    table.most_rank = std::max(table.most_rank, layer.rank);
  }

  // `quarters`: 4 p.
  cudaError_t launch(bool is_double, int quarters, cudaStream_t stream) const {
    for (const CoreTable& table : tables_) {
      const cudaError_t status = launch_invert_cores(table, is_double, quarters, stream);
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  }

 private:
  std::deque<CoreTable> tables_;
  double damping_;
};

inline uint32_t move_blocks(int64_t dim) { return uint32_t(divide_up(dim, kMoveColumns)); }

class MovePlan {
 public:
  void add(Move move) {
    move.blocks = move_blocks(move.dim);
    append(tables_, move, move.blocks);
  }

  void launch(cudaStream_t stream) const {
    for (const MoveTable& table : tables_) launch_moves(table, stream);
  }

 private:
  std::deque<MoveTable> tables_;
};

}  // namespace gls_fused::cuda

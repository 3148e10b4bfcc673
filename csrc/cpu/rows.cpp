// Rows times P, on the CPU:
//
//   X P = X / lambda' + ((X U) C) U'
//
// A block of rows goes through all three products while it is in the second-level cache, so X is
// read and X P written once: 8 bytes per float32 element, 4 r flops. A column of ones, or a bias's
// gradient, is carried as numbers beside the rows. Of an X that lies by columns, as the gradient of a
// weight [k, m] does, a block of rows is one of columns in memory, and takes the transposed products.

#include "rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <atomic>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../check.h"
#include "products.h"
#include "threads.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::Tensor;

namespace {

// Columns in memory of one block of a turned X, and of what of it the second-level cache holds.
constexpr int64_t kMostColumns = 256, kLeastColumns = 64, kBlockElements = 1 << 18;

template <typename T>
struct Columns {
  const T* data;  // null: ones
  int64_t stride;

  T operator()(int64_t i) const { return data ? data[i * stride] : T(1); }
};

// Fewer rows than one for so many of U's leave a copy of U in the other order unpaid: sums along
// memory end in a sum across a register, for each row as much as packing so many of U's.
constexpr int64_t kPackedRows = 12;
// Elements of copies worth a second thread.
constexpr int64_t kParallelPacks = 1 << 18;

// X [n, k] times P = I / shift + U C U', into `product` [n, k] and `last` [n], all of the basis'
// dtype. `last` is contiguous, and so is the product, or its transpose where X's is. X has one more
// column where U has one more row than X columns: `extra` [n], or ones where that is not given.
struct InverseProduct {
  Tensor x;
  std::optional<Tensor> extra;
  Tensor basis, core_inverse, shift;
  Tensor product, last;
};

template <typename T>
struct Product {
  const T* x;
  const T* u;
  const T* packed;  // U, where it is
  const T* c;
  T* to;
  T* last;
  int64_t n, size, rank, x_row, u_row, c_row;
  bool extended, turned;
  Columns<T> extra;
  T reciprocal;

  int64_t block() const {
    if (!turned) return kBlockRows;
    const int64_t fitting = kBlockElements / std::max<int64_t>(size, 1) / kLeastColumns;
    return std::clamp(fitting * kLeastColumns, kLeastColumns, kMostColumns);
  }

  // Numbers that `run` needs memory for.
  int64_t memory() const {
    if (!turned) return 2 * kBlockRows * width();
    return (2 * rank + size + 1) * row_of<T>(std::min(block(), n));
  }

  void run(int64_t first, T* memory) const {
    if (turned) run_columns(first, memory);
    else run_rows(first, memory, memory + kBlockRows * width());
  }

  int64_t width() const { return packed_width<T>(rank); }

  // Rows from `first` on, at most kBlockRows, with memory for as many rows of U and of C.
  void run_rows(int64_t first, T* y, T* yc) const {
    const int64_t rows = std::min(kBlockRows, n - first);
    const T* from = x + first * x_row;
    if (packed) {
      sum_terms<T>({from, x_row, 1}, rows, packed, width(), size, width(), y, width());
    } else {
      dot_rows<T>(from, x_row, rows, u, u_row, rank, size, y, width());
    }
    for (int64_t i = 0; extended && i < rows; ++i) {
      const T value = extra(first + i);
      for (int64_t j = 0; j < rank; ++j) y[i * width() + j] += value * u[j * u_row + size];
    }
    sum_rows<T>(nullptr, 0, 0, {y, width(), 1}, rows, c, c_row, rank, rank, yc, width());
    const Strided<T> weights{yc, width(), 1};
    sum_rows<T>(from, x_row, reciprocal, weights, rows, u, u_row, rank, size, to + first * size,
                size);
    if (!extended) return;
    for (int64_t i = 0; i < rows; ++i) {
      T total = extra(first + i) * reciprocal;
      for (int64_t j = 0; j < rank; ++j) total += weights(i, j) * u[j * u_row + size];
      last[first + i] = total;
    }
  }

  // The same of X', whose rows x_row apart are X's columns: Y' = U' X', then X' / shift + U (C' Y').
  void run_columns(int64_t first, T* memory) const {
    const int64_t columns = std::min(block(), n - first), row = row_of<T>(std::min(block(), n));
    T *y = memory, *yc = y + rank * row, *extras = yc + rank * row, *copy = extras + row;
    const auto add = [&](Strided<T> weights, const T* from, int64_t count, bool begun) {
      sum_rows<T>(y, row, begun, weights, rank, from, row, count, columns, y, row);
    };
    for (int64_t k = 0; k < size; k += kTerms) {
      const int64_t count = std::min(kTerms, size - k);
      for (int64_t j = k; j < k + count; ++j) {
        std::copy_n(x + j * x_row + first, columns, copy + j * row);
      }
      add({packed + k * width(), 1, width()}, copy + k * row, count, k > 0);
    }
    if (extended) {
      for (int64_t i = 0; i < columns; ++i) extras[i] = extra(first + i);
      add({u + size, u_row, 1}, extras, 1, size > 0);
    }
    sum_rows<T>(nullptr, 0, 0, {c, 1, c_row}, rank, y, row, rank, columns, yc, row);
    // A few rows at a time, so that memory is read and written in runs of all columns.
    for (int64_t k = 0; k < size; k += kBlockRows) {
      sum_rows<T>(copy + k * row, row, reciprocal, {packed + k * width(), width(), 1},
                  std::min(kBlockRows, size - k), yc, row, rank, columns, to + k * n + first, n);
    }
    if (!extended) return;
    sum_rows<T>(extras, row, reciprocal, {u + size, 0, u_row}, 1, yc, row, rank, columns,
                last + first, n);
  }
};

// All of one dtype.
void multiply_inverses(const std::vector<InverseProduct>& products) {
  if (products.empty()) return;
  AT_DISPATCH_FLOATING_TYPES(products[0].basis.scalar_type(), "multiply_inverses", [&] {
    std::vector<Tensor> held;  // what a layout needs copies of
    std::vector<Product<scalar_t>> plans;
    std::vector<size_t> packed_plans;
    std::vector<std::pair<size_t, int64_t>> blocks;  // product, first row
    int64_t flops = 0, most = 0, packs = 0;
    for (const InverseProduct& p : products) {
      const bool turned = is_turned(p.product);
      const Tensor inputs = turned ? p.x.t() : in_rows(p.x), transposed = in_rows(p.basis.t());
      const Tensor core = in_rows(p.core_inverse);
      held.insert(held.end(), {inputs, transposed, core});
      const int64_t n = p.x.size(0), size = p.x.size(1), rank = p.basis.size(1);
      const bool extended = p.basis.size(0) > size;
      const Columns<scalar_t> extra{p.extra ? p.extra->const_data_ptr<scalar_t>() : nullptr,
                                    p.extra ? p.extra->stride(0) : 0};
      plans.push_back({inputs.const_data_ptr<scalar_t>(), transposed.const_data_ptr<scalar_t>(),
                       nullptr, core.const_data_ptr<scalar_t>(), p.product.data_ptr<scalar_t>(),
                       extended ? p.last.data_ptr<scalar_t>() : nullptr, n, size, rank,
                       inputs.stride(0), transposed.stride(0), core.stride(0), extended,
                       turned, extra, scalar_t(1) / *p.shift.const_data_ptr<scalar_t>()});
      for (int64_t first = 0; first < n; first += plans.back().block()) {
        blocks.push_back({plans.size() - 1, first});
      }
      flops += 4 * n * size * rank;
      most = std::max(most, plans.back().memory());
      if (!turned && n * kPackedRows < size) continue;
      packs += size * plans.back().width();
      packed_plans.push_back(plans.size() - 1);
    }
    const Tensor packed = at::empty({packs}, products[0].basis.options());
    scalar_t* next_packed = packed.data_ptr<scalar_t>();
    for (const size_t i : packed_plans) {
      plans[i].packed = next_packed;
      next_packed += plans[i].size * plans[i].width();
    }
    const int64_t copies = packed_plans.size();
    const int64_t each = packs < kParallelPacks ? std::max<int64_t>(copies, 1) : 1;
    at::parallel_for(0, copies, each, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto& plan = plans[packed_plans[i]];
        pack(plan.u, plan.u_row, plan.rank, 0, plan.size, plan.width(),
             const_cast<scalar_t*>(plan.packed));
      }
    });
    // Blocks differ in size, so each thread takes the next one.
    const int64_t count = blocks.size();
    const int64_t threads =
        flops < kSerialFlops ? 1 : std::min<int64_t>(at::get_num_threads(), count);
    std::atomic<int64_t> next{0};
    share(0, threads, 1, [&](int64_t, int64_t) {
      std::vector<scalar_t> memory(most);
      for (int64_t i = next++; i < count; i = next++) {
        plans[blocks[i].first].run(blocks[i].second, memory.data());
      }
    });
  });
}

// Of the shape of a gradient, and of its order in memory where that is contiguous or turned.
Tensor empty_beside(const Tensor& gradient, const Tensor& basis) {
  if (is_turned(gradient)) return at::empty(gradient.t().sizes(), basis.options()).t();
  return at::empty(gradient.sizes(), basis.options());
}

}  // namespace

void precondition_layers(std::vector<Tensor>& gradients, at::IntArrayRef layer_sizes,
                         const OptionalTensors& bases, const OptionalTensors& core_inverses,
                         const OptionalTensors& shifts) {
  std::vector<InverseProduct> products;
  std::vector<size_t> firsts;
  size_t first = 0;
  for (size_t layer = 0; layer < layer_sizes.size(); first += layer_sizes[layer++]) {
    const std::optional<Tensor> basis = bases[layer];
    if (!basis) continue;
    const bool has_bias = layer_sizes[layer] == 2;
    const Tensor weight = gradients[first].flatten(1);
    const at::ScalarType wide = basis->scalar_type();
    std::optional<Tensor> bias;
    if (has_bias) bias = gradients[first + 1].to(wide);
    firsts.push_back(first);
    products.push_back({weight.to(wide), bias, *basis, *core_inverses.get(layer),
                        *shifts.get(layer), empty_beside(weight, *basis),
                        at::empty({has_bias ? weight.size(0) : 0}, basis->options())});
  }
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    std::vector<InverseProduct> alike;
    for (const InverseProduct& product : products) {
      if (product.basis.scalar_type() == type) alike.push_back(product);
    }
    multiply_inverses(alike);
  }
  for (size_t i = 0; i < products.size(); ++i) {
    Tensor& weight = gradients[firsts[i]];
    const at::ScalarType type = weight.scalar_type();
    if (products[i].extra) {
      gradients[firsts[i] + 1] = products[i].last.to(type);
    }
    weight = products[i].product.to(type).view(weight.sizes());
  }
}

namespace {

std::tuple<Tensor, Tensor> precondition(const Tensor& x, const std::optional<Tensor>& extra,
                                        bool extended, const Tensor& basis,
                                        const Tensor& core_inverse, const Tensor& shift,
                                        const Tensor& product) {
  const at::ScalarType type = x.scalar_type(), wide = basis.scalar_type();
  Tensor last = at::empty({extended ? x.size(0) : 0}, basis.options());
  std::optional<Tensor> column;
  if (extra) column = extra->to(wide);
  multiply_inverses({{x.to(wide), column, basis, core_inverse, shift, product, last}});
  return {product.to(type), last.to(type)};
}

std::tuple<Tensor, Tensor> precondition_rows(const Tensor& rows, const Tensor& basis,
                                             const Tensor& core_inverse, const Tensor& shift,
                                             bool ones) {
  check_matrix("precondition_rows", "rows [n, k]", rows);
  check_inverse("precondition_rows", rows, rows.size(1) + ones, basis, core_inverse, shift);
  return precondition(rows, std::nullopt, ones, basis, core_inverse, shift,
                      at::empty(rows.sizes(), basis.options()));
}

std::tuple<Tensor, Tensor> precondition_gradient(const Tensor& weight_gradient,
                                                 const std::optional<Tensor>& bias_gradient,
                                                 const Tensor& basis, const Tensor& core_inverse,
                                                 const Tensor& shift) {
  check_gradient(weight_gradient, bias_gradient, basis, core_inverse, shift);
  const bool extended = bias_gradient.has_value();
  return precondition(weight_gradient, bias_gradient, extended, basis, core_inverse, shift,
                      empty_beside(weight_gradient, basis));
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) {
  m.impl("precondition_rows", &precondition_rows);
  m.impl("precondition_gradient", &precondition_gradient);
}

}  // namespace gls_fused

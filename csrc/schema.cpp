// The one schema of every native op; kernels register themselves per device in files of their own.
// gls_fused/backends/native.py gives them the names and signatures of gls_fused.reference.

#include <torch/library.h>

TORCH_LIBRARY(gls_fused, m) {
  // Without a column of ones the second result is empty.
  m.def(
      "precondition_rows(Tensor rows, Tensor basis, Tensor core_inverse, Tensor shift, bool ones)"
      " -> (Tensor, Tensor)");
  m.def(
      "precondition_gradient(Tensor weight_gradient, Tensor? bias_gradient, Tensor basis,"
      " Tensor core_inverse, Tensor shift) -> (Tensor, Tensor)");
  m.def("sketch_rows(Tensor rows, Tensor basis, bool ones) -> (Tensor, Tensor, Tensor)");
  m.def("refresh_subspace(Tensor core, Tensor sketch) -> (Tensor, Tensor)");
  m.def("invert_core(Tensor core, Tensor trace, int dim, float damping) -> (Tensor, Tensor)");
  // [n, ||A||_F^2, Y'Y, (A'Y)'] of some rows, added to the sums of a step where they are usable.
  m.def("add_sketch_(Tensor rows, Tensor basis, bool ones, Tensor(a!) sums) -> ()");
  // layer_sizes[i] consecutive params, gradients and exp_avgs belong to layer i, whose inverse is
  // the i-th of bases, core_inverses and shifts; None where gradients holds the directions.
  m.def(
      "update_layers_(Tensor(a!)[] params, Tensor[] gradients, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor?[] bases, Tensor?[] core_inverses,"
      " Tensor?[] shifts, int[] layer_sizes, str normalize, float lr, float momentum, float beta2,"
      " float eps, float weight_decay) -> ()");
}

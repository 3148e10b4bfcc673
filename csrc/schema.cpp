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
  m.def("refresh_subspace(Tensor core, Tensor sketch) -> (Tensor, Tensor, Tensor)");
  m.def("invert_core(Tensor core, Tensor trace, int dim, float damping) -> (Tensor, Tensor)");
  // layer_sizes[i] consecutive params, directions and exp_avgs belong to layer i.
  m.def(
      "update_layers_(Tensor(a!)[] params, Tensor[] directions, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor[] gradient_norms, int[] layer_sizes,"
      " str normalize, float lr, float momentum, float beta2, float eps, float weight_decay)"
      " -> ()");
}

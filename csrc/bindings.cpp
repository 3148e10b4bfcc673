// The Python module gls_fused._C: what is no tensor op. Operators register themselves with torch.

#include <ATen/autocast_mode.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capture.h"
#include "host.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["flags"] = GLS_FUSED_CXX_FLAGS;
  info["cpu_capabilities"] = std::vector<std::string>{GLS_FUSED_CPU_CAPABILITIES};
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using gls_fused::LinearCapture;
  m.doc() = "Native kernels of gls_fused.";
  m.def("build_info", &build_info, "How this module was built; see _C.pyi.");
  m.def("captured_linear", &gls_fused::captured_linear, py::call_guard<py::gil_scoped_release>(),
        "torch.nn.functional.linear whose backward applies P to the rows.");
  m.def(
      "cast_by_autocast",
      [](const at::Tensor& tensor) {
        const auto device = tensor.device().type();
        return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
      },
      "A tensor as an op takes it in whose device autocast is on; the cast that it keeps of a parameter.");
  m.def("holds", &gls_fused::holds, "Whether a dict of dicts holds these very objects.");
  m.def("has_sparse_gradient", &gls_fused::has_sparse_gradient,
        "Whether one of the gradients is sparse.");
  m.def("has_frozen_gradient", &gls_fused::has_frozen_gradient,
        "Whether a parameter that does not train has a gradient.");
  m.def("match_all", &gls_fused::match_all,
        "Whether the gradient of each weight is what the backward has left there.");
  py::class_<LinearCapture, c10::intrusive_ptr<LinearCapture>>(m, "LinearCapture")
      .def(py::init([](std::string name, bool ones, bool promised, std::vector<int64_t> places,
                       std::vector<int64_t> bias_places, py::function leave) {
        auto capture = c10::make_intrusive<LinearCapture>();
        capture->name = std::move(name);
        capture->ones = ones;
        capture->promised = promised;
        capture->places = std::move(places);
        capture->bias_places = std::move(bias_places);
        // The backward runs without the interpreter's lock, and what ends last may end without it.
        auto held = std::shared_ptr<py::function>(
            new py::function(std::move(leave)), [](py::function* function) {
              const py::gil_scoped_acquire lock;
              delete function;
            });
        capture->leave = [held]() {
          const py::gil_scoped_acquire lock;
          (*held)();
        };
        return capture;
      }))
      .def("expect", &LinearCapture::expect, py::arg("basis"), py::arg("core_inverse"),
           py::arg("shift"))
      .def("let_through", &gls_fused::let_through, py::arg("weight"), py::arg("bias"))
      .def("call", &gls_fused::call_captured, py::arg("params"), py::arg("inputs"))
      .def_property_readonly("has_marks", &LinearCapture::has_marks)
      .def("clear_marks", &LinearCapture::clear_marks)
      .def("add_marks", &LinearCapture::add_marks, py::arg("part"), py::arg("bias_part"))
      .def("match", &LinearCapture::match, py::arg("gradient"), py::arg("bias_gradient"))
      .def("are_gone_from", &LinearCapture::are_gone_from);
}

// The Python module gls_fused._C: what is no tensor op. Operators register themselves with torch.

#include <torch/extension.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "capture.h"

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
  m.def("captured_linear", &gls_fused::captured_linear,
        "torch.nn.functional.linear whose backward shows the capture its rows.");
  py::class_<LinearCapture, c10::intrusive_ptr<LinearCapture>>(m, "LinearCapture")
      .def(py::init([](std::string name, bool ones, int64_t most_rows) {
        auto capture = c10::make_intrusive<LinearCapture>();
        capture->name = std::move(name);
        capture->ones = ones;
        capture->most_rows = most_rows;
        return capture;
      }))
      .def("expect", &LinearCapture::expect, py::arg("basis"), py::arg("core_inverse"),
           py::arg("shift"), py::arg("gathers"), py::arg("at_backward"))
      .def("take_sums", &LinearCapture::take_sums);
}

// The Python module gls_fused._C. Operators register themselves with torch in files of their own;
// this one only says what was built.

#include <pybind11/pybind11.h>
#include <torch/version.h>

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
  info["cuda"] = py::none();
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Native kernels of gls_fused.";
  m.def("build_info", &build_info, "How this module was built: torch, compiler, flags and cuda.");
}

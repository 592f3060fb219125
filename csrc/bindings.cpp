// ckd._C: the native half of ckd. It is compiled without torch headers, so that one build serves
// every torch version: functions take raw pointers, sizes and a stream, never tensors.

#include "cpu/bindings.h"
#if CKD_HAS_CUDA
#include "cuda/bindings.h"
#endif

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

std::string architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = CKD_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["architecture"] = architecture();
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["cuda"] = CKD_CUDA_ABOUT;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of ckd; see csrc/.";
  m.def("build_info", &build_info, "What this module was compiled from and with, as a dict.");
  ckd::cpu::bind(m);
#if CKD_HAS_CUDA
  ckd::cuda::bind(m);
#endif
}

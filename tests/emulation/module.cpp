// The CUDA kernels on the CPU as a Python module, for tests of the cuda backend
// (docs/emulation.md).

#include <pybind11/pybind11.h>

#include "cuda/bindings.h"

PYBIND11_MODULE(ckd_emulated, m) { ckd::cuda::bind(m); }

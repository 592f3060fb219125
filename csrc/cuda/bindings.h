#pragma once

#include <pybind11/pybind11.h>

namespace ckd::cuda {

// Adds the functions cuda_* to the module.
void bind(pybind11::module_& m);

}  // namespace ckd::cuda

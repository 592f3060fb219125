#pragma once

#include <pybind11/pybind11.h>

namespace ckd::cpu {

// Adds the functions cpu_* to the module.
void bind(pybind11::module_& m);

}  // namespace ckd::cpu

// Which instruction sets this build has kernels for, and which of them this processor runs.

#pragma once

#include <string>
#include <vector>

#include "arguments.h"

namespace ckd::cpu {

struct Tier {
  std::string name;
  const Kernels* kernels;
};

// The tiers that run here, best first; "portable" always does.
const std::vector<Tier>& tiers();

// The tier (instruction set) of that name. Throws std::invalid_argument if it is unknown or this
// CPU cannot run it.
const Tier& tier(const std::string& name);

}  // namespace ckd::cpu

// Who runs next: the same in every run with the same schedule and seed.

#pragma once

#include <vector>

#include "fiber.h"

namespace ckd::emulation {

// Takes CKD_EMULATION_SCHEDULE and CKD_EMULATION_SEED from the environment.
void read_schedule();

std::vector<unsigned> block_order(unsigned blocks);

// Runs fibers of a block, each as far as its next waits; false if none could go on.
bool run_some(std::vector<Fiber>& fibers);

}  // namespace ckd::emulation

// The order in which fibers run: the same in every run with the same schedule and seed.

#pragma once

#include <vector>

#include "fiber.h"

namespace ckd::emulation {

// Reads CKD_EMULATION_SCHEDULE and CKD_EMULATION_SEED from the environment.
void read_schedule();

std::vector<unsigned> block_order(unsigned blocks);

// Runs fibers of a block for one or more waits each; false if all were waiting.
bool run_some(std::vector<Fiber>& fibers);

}  // namespace ckd::emulation

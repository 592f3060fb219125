// What the files of the emulation share.

#pragma once

#include <string>

#include "fiber.h"

namespace ckd::emulation {

// The fiber that runs; null in the scheduler.
Fiber* running();

constexpr Site LAUNCH = {"the launch", 0};  // stands for a line where there is none

// Ends the process: says what is wrong, in which kernel, where, in which block and thread.
[[noreturn]] void fail(const std::string& what, Site site);

std::string place(Site site);  // file:line

// Makes the shared memory of a block, all NaN.
void begin_shared(int bytes);
// After a block: whether something was written just past the end.
bool shared_overrun();

}  // namespace ckd::emulation

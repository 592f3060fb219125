// Functions that the files of the emulation share.

#pragma once

#include <string>

#include "fiber.h"

namespace ckd::emulation {

// The fiber that runs; null in the scheduler.
Fiber* running();

constexpr Site LAUNCH = {"the launch", 0};  // in place of a line

// Prints what is wrong, in which kernel, at which line, in which block and thread, and aborts.
[[noreturn]] void fail(const std::string& what, Site site);

std::string place(Site site);  // file:line

// Fills a block's shared memory with NaN.
void begin_shared(int bytes);
// After a block: whether it wrote just past the end.
bool shared_overrun();

}  // namespace ckd::emulation

// Fibers: a stack for each thread of a block, and switches between them and the scheduler.

#pragma once

#include <cstddef>
#include <vector>

#include "emulation.h"

namespace ckd::emulation {

enum class State { ready, at_block_barrier, in_collective, returned };

struct Copy {
  void* shared;
  const void* global;
  int bytes;
};

// A thread of the running block.
struct Fiber : Thread {
  State state = State::ready;
  Site site = {"", 0};    // of the last wait
  const char* wait = "";  // its name
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;  // committed, oldest first

  unsigned char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* address_sanitizer = nullptr;  // its state of this fiber while suspended
  void* thread_sanitizer = nullptr;
};

// Makes the fibers begin `entry` on empty stacks; `entry` does not return.
void prepare(std::vector<Fiber>& fibers, void (*entry)());

// `entry` must call this first.
void entered();

// Runs a fiber until it suspends. Called by the scheduler.
void resume(Fiber& fiber);

// Returns to the scheduler until it resumes this fiber; `forever`: it never will.
void suspend(Fiber& fiber, bool forever = false);

}  // namespace ckd::emulation

// Stacks of their own for the threads of a block, and switching between them and the scheduler.

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
  void* address_sanitizer = nullptr;  // its state of this fiber while it does not run
  void* thread_sanitizer = nullptr;
};

// Makes the fibers begin `entry` on empty stacks; `entry` does not return.
void prepare(std::vector<Fiber>& fibers, void (*entry)());

// To be called once by `entry`, first thing.
void entered();

// Runs a fiber until it suspends. Called by the scheduler.
void resume(Fiber& fiber);

// Goes back to the scheduler until it resumes this fiber; `forever` if it will not.
void suspend(Fiber& fiber, bool forever = false);

}  // namespace ckd::emulation

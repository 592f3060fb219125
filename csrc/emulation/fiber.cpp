#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <deque>

#include "sanitizers.h"

namespace ckd::emulation {
namespace {

constexpr std::size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4096;

// Saves the callee-saved registers on this stack, switches stacks and restores those of the other.
[[gnu::naked, gnu::noinline]] void switch_stacks(void** /*leave*/, void* /*enter*/) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "ret");
}
constexpr int SAVED_REGISTERS = 6;

void* scheduler_stack_pointer;

unsigned char* map_stacks(unsigned char* where, std::size_t count) {
  const int fixed = where == nullptr ? 0 : MAP_FIXED;
  void* mapped = mmap(where, count * STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  if (mapped == MAP_FAILED) {
    std::perror("ckd emulation: stacks of fibers");
    std::abort();
  }
  return static_cast<unsigned char*>(mapped);
}

// Stacks for at least `count` fibers, which later blocks use again.
unsigned char* take_stacks(std::size_t count) {
  static unsigned char* stacks = nullptr;
  static std::size_t mapped = 0;
  if (count > mapped) {
    if (stacks != nullptr) munmap(stacks, mapped * STACK_BYTES);
    stacks = map_stacks(nullptr, count);
    mapped = count;
    for (std::size_t i = 0; i < count && !FINDS_RACES; ++i) {
      mprotect(stacks + i * STACK_BYTES, GUARD_BYTES, PROT_NONE);
    }
  } else if (FINDS_RACES) {
    // Blocks are not ordered, so accesses of the last one to the stacks would race with those of
    // this one. ThreadSanitizer forgets accesses to memory that is mapped anew.
    map_stacks(stacks, mapped);
  }
  return stacks;
}

#ifdef __SANITIZE_ADDRESS__
void* scheduler_state;
const void* scheduler_stack;
std::size_t scheduler_stack_bytes;

void leave_scheduler(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler_state, fiber.stack, STACK_BYTES);
}
void back_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_state, nullptr, nullptr); }
void leave_fiber(Fiber& fiber, bool forever) {
  __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.address_sanitizer, scheduler_stack,
                                 scheduler_stack_bytes);
}
void back_in_fiber(Fiber& fiber) {
  __sanitizer_finish_switch_fiber(fiber.address_sanitizer, nullptr, nullptr);
}
void first_in_fiber() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}
void announce(Fiber&) {}
#elif defined(CKD_EMULATION_TSAN)
constexpr unsigned NO_ORDER = 1;  // a switch orders nothing: only barriers do
void* scheduler_state;

void leave_scheduler(Fiber& fiber) {
  scheduler_state = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(fiber.thread_sanitizer, NO_ORDER);
}
void back_in_scheduler() {}
void leave_fiber(Fiber&, bool) { __tsan_switch_to_fiber(scheduler_state, NO_ORDER); }
void back_in_fiber(Fiber&) {}
void first_in_fiber() {}

// ThreadSanitizer reuses the numbers of destroyed fibers, and accesses with equal numbers never
// race: so fibers of past blocks are kept, as many as it has room for.
void announce(Fiber& fiber) {
  constexpr std::size_t KEPT = 4096;
  static std::deque<void*> past;
  if (past.size() >= KEPT) {
    __tsan_destroy_fiber(past.front());
    past.pop_front();
  }
  fiber.thread_sanitizer = __tsan_create_fiber(0);
  past.push_back(fiber.thread_sanitizer);
}
#else
void leave_scheduler(Fiber&) {}
void back_in_scheduler() {}
void leave_fiber(Fiber&, bool) {}
void back_in_fiber(Fiber&) {}
void first_in_fiber() {}
void announce(Fiber&) {}
#endif

}  // namespace

void prepare(std::vector<Fiber>& fibers, void (*entry)()) {
  unsigned char* stacks = take_stacks(fibers.size());
  for (std::size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack = stacks + i * STACK_BYTES;
    // A fiber that suspended forever has not left its frames, whose red zones are still marked.
    allow(fiber.stack + GUARD_BYTES, STACK_BYTES - GUARD_BYTES);
    // The layout in which switch_stacks leaves a stack, below a null return address, which ends
    // stack traces. By the ABI a function begins 8 bytes below a multiple of 16.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int r = 0; r < SAVED_REGISTERS; ++r) *--top = nullptr;
    fiber.stack_pointer = top;
    announce(fiber);
  }
}

void entered() { first_in_fiber(); }

void resume(Fiber& fiber) {
  leave_scheduler(fiber);
  switch_stacks(&scheduler_stack_pointer, fiber.stack_pointer);
  back_in_scheduler();
}

void suspend(Fiber& fiber, bool forever) {
  leave_fiber(fiber, forever);
  switch_stacks(&fiber.stack_pointer, scheduler_stack_pointer);
  back_in_fiber(fiber);
}

}  // namespace ckd::emulation

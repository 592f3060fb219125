// Annotations for AddressSanitizer and ThreadSanitizer: fibers, and accesses that the emulation
// makes for a kernel. They do nothing where neither is in use.
//
// For ThreadSanitizer the kernel is compiled with -fsanitize=thread, and the emulation without it
// but with -DCKD_EMULATION_TSAN: accesses of the scheduler to its own memory are not the kernel's.

#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#error "compile csrc/emulation with -DCKD_EMULATION_TSAN in place of -fsanitize=thread"
#endif

#ifdef CKD_EMULATION_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_read_range(void* address, unsigned long size);
void __tsan_write_range(void* address, unsigned long size);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace ckd::emulation {

#ifdef CKD_EMULATION_TSAN
constexpr bool FINDS_RACES = true;

// During its lifetime ThreadSanitizer ignores this fiber's memcpy, memset and malloc. The state
// belongs to the fiber, so it may last across a switch.
class Unseen {
 public:
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

inline void note_read(const void* address, std::size_t bytes) {
  if (bytes > 0) __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void note_write(void* address, std::size_t bytes) {
  if (bytes > 0) __tsan_write_range(address, bytes);
}
// What happened before a release at an address happens before what follows its acquire.
inline void release(char& address) { __tsan_release(&address); }
inline void acquire(char& address) { __tsan_acquire(&address); }
#else
constexpr bool FINDS_RACES = false;

class Unseen {
 public:
  Unseen() {}
  ~Unseen() {}
};

inline void note_read(const void*, std::size_t) {}
inline void note_write(void*, std::size_t) {}
inline void release(char&) {}
inline void acquire(char&) {}
#endif

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t RED_ZONE = 128;  // between pieces of shared memory

inline void forbid(void* address, std::size_t bytes) {
  __asan_poison_memory_region(address, bytes);
}
inline void allow(void* address, std::size_t bytes) {
  __asan_unpoison_memory_region(address, bytes);
}
inline bool is_forbidden(const void* address, std::size_t bytes) {
  return __asan_region_is_poisoned(const_cast<void*>(address), bytes) != nullptr;
}
inline void print_stack() { __sanitizer_print_stack_trace(); }
#else
constexpr std::size_t RED_ZONE = 0;

inline void forbid(void*, std::size_t) {}
inline void allow(void*, std::size_t) {}
inline bool is_forbidden(const void*, std::size_t) { return false; }
inline void print_stack() {}
#endif

}  // namespace ckd::emulation

// Uninitialised arrays of a kernel call, returned to the pool of memory.h at the end of the scope.

#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "memory.h"

namespace ckd::cpu::CKD_TIER {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t n)
      : used_(static_cast<std::size_t>(n) * sizeof(T)), memory_(take_memory(used_)) {}
  ~Buffer() {
    if (memory_.data != nullptr) give_memory(memory_);
  }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }

  void zero() { std::memset(memory_.data, 0, used_); }
  operator T*() const { return static_cast<T*>(memory_.data); }

 private:
  void swap(Buffer& other) {
    const std::size_t used = used_;
    const Memory memory = memory_;
    used_ = other.used_;
    memory_ = other.memory_;
    other.used_ = used;
    other.memory_ = memory;
  }

  std::size_t used_ = 0;
  Memory memory_;
};

// One T for each thread, made before the threads start, so that the caller can catch bad_alloc.
template <class T, class... Arguments>
std::vector<T> per_thread(int threads, const Arguments&... arguments) {
  std::vector<T> all;
  all.reserve(static_cast<std::size_t>(threads));
  for (int i = 0; i < threads; ++i) all.emplace_back(arguments...);
  return all;
}

}  // namespace ckd::cpu::CKD_TIER

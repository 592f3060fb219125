// Memory of the kernels. Fresh pages cost more than a small problem does, so what is given back is
// kept for calls to come, up to MAX_KEPT_BYTES in all.

#pragma once

#include <cstddef>

namespace ckd::cpu {

constexpr std::size_t MAX_KEPT_BYTES = std::size_t{192} << 20;

struct Memory {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// At least so many bytes, aligned to cache lines. Throws std::bad_alloc.
Memory take_memory(std::size_t bytes);
void give_memory(Memory memory) noexcept;

}  // namespace ckd::cpu

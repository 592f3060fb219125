// Memory pool of the kernels. Page faults of fresh memory take longer than a small problem, so
// freed blocks are kept for later calls, up to MAX_KEPT_BYTES in all.

#pragma once

#include <cstddef>

namespace ckd::cpu {

constexpr std::size_t MAX_KEPT_BYTES = std::size_t{192} << 20;

struct Memory {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// At least `bytes` bytes, aligned to cache lines. Throws std::bad_alloc.
Memory take_memory(std::size_t bytes);
void give_memory(Memory memory) noexcept;

}  // namespace ckd::cpu

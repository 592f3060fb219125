#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>

namespace ckd::cpu {
namespace {

// Not under AddressSanitizer, which finds overruns only in blocks as long as requested.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool KEEP = false;
#else
constexpr bool KEEP = true;
#endif
constexpr int SLOTS = 64;
// Smaller blocks are left to malloc, which reuses them faster than a search here.
constexpr std::size_t LEAST_KEPT_BYTES = 32 << 10;

bool is_kept(std::size_t bytes) {
  return KEEP && bytes >= LEAST_KEPT_BYTES && bytes <= MAX_KEPT_BYTES;
}

class Pool {
 public:
  // The smallest kept block of `bytes` to 2 x `bytes` bytes; empty if there is none.
  Memory take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int best = -1;
    for (int i = 0; i < SLOTS; ++i) {
      const std::size_t size = slots_[i].memory.bytes;
      if (size < bytes || size / 2 > bytes) continue;
      if (best < 0 || size < slots_[best].memory.bytes) best = i;
    }
    return best < 0 ? Memory{} : remove(best);
  }

  // Keeps the block; frees the least recently given ones until there is room.
  void give(Memory memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (true) {
      int free = -1, oldest = -1;
      for (int i = 0; i < SLOTS; ++i) {
        if (slots_[i].memory.data == nullptr) {
          free = i;
        } else if (oldest < 0 || slots_[i].since < slots_[oldest].since) {
          oldest = i;
        }
      }
      if (free >= 0 && total_ + memory.bytes <= MAX_KEPT_BYTES) {
        slots_[free] = {memory, ++clock_};
        total_ += memory.bytes;
        return;
      }
      std::free(remove(oldest).data);
    }
  }

 private:
  struct Slot {
    Memory memory;
    unsigned long long since = 0;
  };

  Memory remove(int slot) {
    const Memory memory = slots_[slot].memory;
    slots_[slot].memory = {};
    total_ -= memory.bytes;
    return memory;
  }

  std::mutex mutex_;
  Slot slots_[SLOTS];
  std::size_t total_ = 0;
  unsigned long long clock_ = 0;
};

// Never destroyed: threads may still compute while the process ends.
Pool& pool() {
  static Pool* const only = new Pool;
  return *only;
}

}  // namespace

Memory take_memory(std::size_t bytes) {
  if (bytes == 0) bytes = 1;
  if (is_kept(bytes)) {
    const Memory kept = pool().take(bytes);
    if (kept.data != nullptr) return kept;
  }
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) throw std::bad_alloc();
  return {data, bytes};
}

void give_memory(Memory memory) noexcept {
  if (is_kept(memory.bytes)) {
    pool().give(memory);
  } else {
    std::free(memory.data);
  }
}

}  // namespace ckd::cpu

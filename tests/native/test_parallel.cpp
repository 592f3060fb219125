// `each` of csrc/cpu/parallel.h: every index runs once, a loop ends before the next begins, and
// members steal work. Exits with 1 and says what is wrong.

#include <cstdio>
#include <vector>

#define CKD_TIER portable
#include "cpu/parallel.h"

namespace {

using namespace ckd::cpu::portable;

// Loops of all lengths up to MOST in one team: each must read what the one before wrote. An index
// writes only its own data, without atomics, so that ThreadSanitizer finds one that is taken twice.
bool loops_are_whole(int threads) {
  constexpr int MOST = 40;
  std::vector<int> seen(MOST, 0);
  std::vector<std::vector<int>> before(MOST + 1, std::vector<int>(MOST, 0));
  parallel(threads, [&](int) {
    for (int n = 0; n <= MOST; ++n) {
      std::vector<int>& found = before[static_cast<std::size_t>(n)];
      each(n, [&](std::int64_t i) {
        const std::size_t other = static_cast<std::size_t>(n - 1 - i);
        found[static_cast<std::size_t>(i)] = seen[other];
      });
      each(n, [&](std::int64_t i) { ++seen[static_cast<std::size_t>(i)]; });
    }
  });
  for (int n = 0; n <= MOST; ++n) {
    for (int i = 0; i < n; ++i) {
      // It read index n - 1 - i, which was counted in the loops of length n - i to n - 1.
      const int got = before[static_cast<std::size_t>(n)][static_cast<std::size_t>(i)];
      if (got == i) continue;
      std::printf("threads %d, length %d, index %d: %d\n", threads, n, i, got);
      return false;
    }
  }
  return true;
}

// The first index waits for all others, of which those in its own member's share must be stolen.
bool others_help(int threads) {
  constexpr int LENGTH = 64;
  int done = 0;
  bool waited = true;
  parallel(threads, [&](int) {
    each(LENGTH, [&](std::int64_t i) {
      if (i > 0) {
        __atomic_fetch_add(&done, 1, __ATOMIC_RELAXED);
        return;
      }
      for (long spins = 0; __atomic_load_n(&done, __ATOMIC_RELAXED) < LENGTH - 1; ++spins) {
        if (spins == 4'000'000'000) {
          waited = false;
          return;
        }
      }
    });
  });
  if (!waited) std::printf("threads %d: %d of %d indices\n", threads, done, LENGTH - 1);
  return waited;
}

}  // namespace

int main() {
  bool right = true;
  for (const int threads : {1, 2, 3, 5, 8}) right = loops_are_whole(threads) && right;
#if defined(_OPENMP) || defined(CKD_STD_THREADS)
  for (const int threads : {2, 3}) right = others_help(threads) && right;
#endif
  return right ? 0 : 1;
}

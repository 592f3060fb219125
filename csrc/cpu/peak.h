// The speed of gemm with operands in the CPU's cache, the upper bound that benchmarks compare with.

#pragma once

#include <chrono>

#include "rows.h"

namespace ckd::cpu::CKD_TIER {

// GFLOP/s of `threads` threads together, measured for about `seconds`.
template <class Type>
double gemm_peak(int threads, double seconds) {
  using Word = typename Type::Word;
  constexpr std::int64_t M = 256, K = 256;
  struct Operand {
    Operand() : a(M * K), b(K * PANEL), c(M * PANEL) {
      a.zero();
      b.zero();
      c.zero();
    }
    Buffer<Word> a, b;
    Buffer<float> c;
    double rate = 0;
  };
  std::vector<Operand> operands = per_thread<Operand>(threads);
  parallel(threads, [&](int thread) {
    Operand& mine = operands[static_cast<std::size_t>(thread)];
    const auto start = std::chrono::steady_clock::now();
    double elapsed = 0, done = 0;
    while (elapsed < seconds) {
      for (int i = 0; i < 16; ++i) {
        gemm(M, PANEL, K, Operands<Type>{mine.a, K, mine.b, PANEL, mine.c, PANEL}, true);
      }
      done += 16 * 2.0 * M * PANEL * K * Type::PER_WORD;
      elapsed = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    mine.rate = done / elapsed / 1e9;
  });
  double sum = 0;
  for (const Operand& mine : operands) sum += mine.rate;
  return sum;
}

}  // namespace ckd::cpu::CKD_TIER

// The matrix product of every kernel: C [m, cols] (+)= A [m, k] B [k, cols] for operands that fit
// the CPU's caches.
//
// All matrices are row-major. `cols` is a multiple of GRAIN and at most PANEL; m is arbitrary. k
// counts words: a word is 32 bits, one float32 or two bfloat16 elements that are neighbours along
// k. Accumulation is float32, in the order of k, with partial sums of SUM words, so that C does not
// depend on how the caller splits m and cols.
//
// A may be split along k into runs, each a matrix [m, run]: panels are then multiplied where they
// are in memory, and the rows of a block are contiguous.

#pragma once

#include "simd.h"

namespace ckd::cpu::CKD_TIER {

constexpr int PANEL = 64;  // columns of a panel of B, which is also its leading dimension

// `cols` may end with half a vector: it takes half the time on processors that execute a 512-bit
// vector in two halves (AMD Zen 4), and no longer than a whole one on others. AMX needs whole ones.
#if defined(__AVX512F__) && !defined(CKD_AMX)
constexpr int GRAIN = LANES / 2;
#else
constexpr int GRAIN = LANES;
#endif

// The register block is MR rows by NR vectors. On AVX-512 it takes 24 + 4 + 1 of 32 registers (C, B
// and A), and 6 x 64 beats 8 x 48, 12 x 32 and 14 x 32 (Intel Sapphire Rapids, 2026-11: 205, 188,
// 178, 188 GF/s a core); with 16 registers it takes 12 + 2 + 1.
#if defined(__AVX512F__)
constexpr int MR = 6, NR = 4;
#else
constexpr int MR = 6, NR = 2;
#endif

struct Float32 {
  using Word = float;
  static constexpr int PER_WORD = 1;
  static constexpr int PAD = 1;  // k is padded with zeros to a multiple of PAD words
  // Words of a partial sum, which is then added to C: rounding in longer ones would dominate.
  static constexpr std::int64_t SUM = 128;

  template <class V>
  static V mac(V c, V a, V b) {
    return a * b + c;
  }
};

#if defined(CKD_BFLOAT16)
struct BFloat16 {
  using Word = std::uint32_t;
  static constexpr int PER_WORD = 2;
#if defined(CKD_AMX)
  static constexpr int PAD = 16;  // a row of an AMX tile
#else
  static constexpr int PAD = 1;
#endif
  static constexpr std::int64_t SUM = INT64_MAX;  // rounding the operands adds a far larger error
  static Vec mac(Vec c, WordVec a, WordVec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }

  using Half = Vector<float, LANES / 2>;
  using HalfWords = Vector<Word, LANES / 2>;
  static Half mac(Half c, HalfWords a, HalfWords b) {
    return (Half)_mm256_dpbf16_ps((__m256)c, (__m256bh)a, (__m256bh)b);
  }
};
#endif

// Words of n elements along k, including padding.
template <class Type>
constexpr std::int64_t words(std::int64_t n) {
  const std::int64_t used = (n + Type::PER_WORD - 1) / Type::PER_WORD;
  return (used + Type::PAD - 1) / Type::PAD * Type::PAD;
}

template <class Type>
struct Operands {
  using Word = typename Type::Word;
  const Word* a;
  std::int64_t lda;
  const Word* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc;
  // Words of a row in a run of A, and words from the start of a run to the start of the next.
  std::int64_t run = INT64_MAX, next_run = 0;

  Operands from_row(std::int64_t row) const {
    Operands rest = *this;
    rest.a += row * lda;
    rest.c += row * ldc;
    return rest;
  }

  // If A is split into runs, `word` must be a multiple of `run`.
  Operands from_word(std::int64_t word) const {
    Operands rest = *this;
    rest.a += word / run * next_run + word % run;
    rest.b += word * ldb;
    return rest;
  }
};

// Words of a panel's row if its 64 elements are neighbours along k.
template <class Type>
constexpr std::int64_t PANEL_WORDS = PANEL / Type::PER_WORD;

// Operands whose A [m, k] is stored as panels [ceil(k / PANEL_WORDS), rows, PANEL_WORDS].
template <class Type>
Operands<Type> from_panels(const typename Type::Word* a, std::int64_t rows,
                           const typename Type::Word* b, float* c, std::int64_t ldc) {
  constexpr std::int64_t RUN = PANEL_WORDS<Type>;
  return {a, RUN, b, PANEL, c, ldc, RUN, rows * RUN};
}

// A block of C: ROWS rows by VECTORS vectors, and half a vector more with HALF.
template <class Type, int ROWS, int VECTORS, bool HALF>
inline __attribute__((always_inline)) void gemm_block(std::int64_t k, const Operands<Type>& at,
                                                      bool accumulate) {
  using Word = typename Type::Word;
  using HalfSum = Vector<float, GRAIN>;
  constexpr int WHOLE = VECTORS * LANES;
  Vec sum[ROWS][VECTORS > 0 ? VECTORS : 1];
  HalfSum half_sum[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    half_sum[i] = HalfSum{};
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sum[i][j] = Vec{};
  }
  const Word *a = at.a, *b = at.b;
  for (std::int64_t left = k; left > 0; left -= at.run, a += at.next_run) {
    const std::int64_t run = left < at.run ? left : at.run;
#pragma GCC unroll 4
    for (std::int64_t p = 0; p < run; ++p, b += at.ldb) {
      Vector<Word> row[VECTORS > 0 ? VECTORS : 1];
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * LANES);
      Vector<Word, GRAIN> half_row = {};
      if (HALF) half_row = load_as<Vector<Word, GRAIN>>(b + WHOLE);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Word x = a[i * at.lda + p];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = Type::mac(sum[i][j], broadcast(x), row[j]);
        if (HALF) half_sum[i] = Type::mac(half_sum[i], broadcast<GRAIN>(x), half_row);
      }
    }
  }
  // C is added last and not the sum's initial value: the rounding then grows with k, not with |C|.
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    float* c = at.c + i * at.ldc;
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j, c += LANES) {
      store(c, accumulate ? load(c) + sum[i][j] : sum[i][j]);
    }
    if (HALF) store(c, accumulate ? load_as<HalfSum>(c) + half_sum[i] : half_sum[i]);
  }
}

template <class Type, int VECTORS, bool HALF>
void gemm_strip(std::int64_t m, std::int64_t k, Operands<Type> at, bool accumulate) {
  const auto skip = [&at, &m](int rows) {
    at = at.from_row(rows);
    m -= rows;
  };
  for (; m >= MR; skip(MR)) gemm_block<Type, MR, VECTORS, HALF>(k, at, accumulate);
  // At most five rows are left.
  if (m >= 4) gemm_block<Type, 4, VECTORS, HALF>(k, at, accumulate), skip(4);
  if (m >= 2) gemm_block<Type, 2, VECTORS, HALF>(k, at, accumulate), skip(2);
  if (m >= 1) gemm_block<Type, 1, VECTORS, HALF>(k, at, accumulate);
}

// The columns after the last whole register block.
template <class Type, bool HALF>
void gemm_rest(std::int64_t m, int vectors, std::int64_t k, const Operands<Type>& at,
               bool accumulate) {
  if (NR > 3 && vectors == 3) gemm_strip<Type, 3, HALF>(m, k, at, accumulate);
  if (NR > 2 && vectors == 2) gemm_strip<Type, 2, HALF>(m, k, at, accumulate);
  if (vectors == 1) gemm_strip<Type, 1, HALF>(m, k, at, accumulate);
  if (HALF && vectors == 0) gemm_strip<Type, 0, HALF>(m, k, at, accumulate);
}

#if defined(CKD_AMX)

// GCC's tile loads do not declare that they read memory: this makes it do earlier stores first.
inline void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 hold C (32 x 32), 4 and 5 A, 6 and 7 B, each of those 16 words long along k.
inline void configure_tiles(int rows) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<std::uint8_t>(rows);
  config.rows[6] = config.rows[7] = 16;
  memory_barrier();
  _tile_loadconfig(&config);
}

// A block of C with one or two (TWO_A) tiles of rows and one or two (TWO_B) of 16 columns; tiles of
// A and C have as many rows as configure_tiles was told.
template <bool TWO_A, bool TWO_B>
inline void tile_block(std::int64_t k, Operands<BFloat16> at, bool accumulate) {
  const std::int64_t lda = at.lda * 4, ldb = at.ldb * 4, ldc = at.ldc * 4;
  const std::uint32_t* b = at.b;
  float* lower = at.c + 16 * at.ldc;
  if (accumulate) {
    _tile_loadd(0, at.c, ldc);
    if (TWO_B) _tile_loadd(1, at.c + 16, ldc);
    if (TWO_A) _tile_loadd(2, lower, ldc);
    if (TWO_A && TWO_B) _tile_loadd(3, lower + 16, ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const std::uint32_t* a = at.a;
  for (std::int64_t left = k; left > 0; left -= at.run, a += at.next_run) {
    const std::int64_t run = left < at.run ? left : at.run;
    for (std::int64_t p = 0; p < run; p += 16, b += 16 * at.ldb) {
      _tile_loadd(4, a + p, lda);
      _tile_loadd(6, b, ldb);
      _tile_dpbf16ps(0, 4, 6);
      if (TWO_B) {
        _tile_loadd(7, b + 16, ldb);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (TWO_A) {
        _tile_loadd(5, a + p + 16 * at.lda, lda);
        _tile_dpbf16ps(2, 5, 6);
        if (TWO_B) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, at.c, ldc);
  if (TWO_B) _tile_stored(1, at.c + 16, ldc);
  if (TWO_A) _tile_stored(2, lower, ldc);
  if (TWO_A && TWO_B) _tile_stored(3, lower + 16, ldc);
}

template <bool TWO_A>
inline void tile_row(int cols, std::int64_t k, Operands<BFloat16> at, bool accumulate) {
  for (; cols >= 32; cols -= 32, at.b += 32, at.c += 32) {
    tile_block<TWO_A, true>(k, at, accumulate);
  }
  if (cols > 0) tile_block<TWO_A, false>(k, at, accumulate);
}

// Releases the tile state: it slows down the thread's context switches, and other libraries
// configure tiles differently.
inline void gemm(std::int64_t m, int cols, std::int64_t k, Operands<BFloat16> at, bool accumulate) {
  configure_tiles(16);
  std::int64_t i = 0;
  for (; i + 32 <= m; i += 32) tile_row<true>(cols, k, at.from_row(i), accumulate);
  if (i + 16 <= m) tile_row<false>(cols, k, at.from_row(i), accumulate), i += 16;
  if (i < m) {
    configure_tiles(static_cast<int>(m - i));
    tile_row<false>(cols, k, at.from_row(i), accumulate);
  }
  _tile_release();
}

#endif

template <class Type>
void gemm_sum(std::int64_t m, int cols, std::int64_t k, Operands<Type> at, bool accumulate) {
  for (; cols >= NR * LANES; cols -= NR * LANES, at.b += NR * LANES, at.c += NR * LANES) {
    gemm_strip<Type, NR, false>(m, k, at, accumulate);
  }
  const int vectors = cols / LANES;
  if constexpr (GRAIN < LANES) {
    if (cols % LANES > 0) return gemm_rest<Type, true>(m, vectors, k, at, accumulate);
  }
  gemm_rest<Type, false>(m, vectors, k, at, accumulate);
}

template <class Type>
void gemm(std::int64_t m, int cols, std::int64_t k, Operands<Type> at, bool accumulate) {
  for (; k > Type::SUM; k -= Type::SUM, at = at.from_word(Type::SUM), accumulate = true) {
    gemm_sum(m, cols, Type::SUM, at, accumulate);
  }
  gemm_sum(m, cols, k, at, accumulate);
}

}  // namespace ckd::cpu::CKD_TIER

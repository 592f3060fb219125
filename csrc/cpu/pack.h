// From rows of numbers to the words that gemm multiplies: widening, narrowing, pairing,
// transposing.

#pragma once

#include "arguments.h"
#include "gemm.h"

namespace ckd::cpu::CKD_TIER {

// Elements [from, from + n) of a row as float32.
inline void widen(const void* row, Element element, std::int64_t from, std::int64_t n, float* out) {
  if (element == Element::float32) {
    std::memcpy(out, static_cast<const float*>(row) + from, static_cast<std::size_t>(n) * 4);
    return;
  }
  const std::uint16_t* half = static_cast<const std::uint16_t*>(row) + from;
  const bool is_float16 = element == Element::float16;
  std::int64_t i = 0;
  if (is_float16) {
    for (; i + LANES <= n; i += LANES) store(out + i, widen_float16(half + i));
  } else {
    for (; i + LANES <= n; i += LANES) store(out + i, widen_bfloat16(half + i));
  }
  if (i == n) return;
  std::uint16_t rest[LANES] = {};
  float wide[LANES];
  std::memcpy(rest, half + i, static_cast<std::size_t>(n - i) * 2);
  store(wide, is_float16 ? widen_float16(rest) : widen_bfloat16(rest));
  std::memcpy(out + i, wide, static_cast<std::size_t>(n - i) * 4);
}

// n numbers as words<Type>(n) words, neighbours sharing a word.
inline void to_words(const float* x, std::int64_t n, float* out) {
  std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
}

// Words of rows 0 and 1 of x; rows are `ld` apart, n columns.
inline void pair_rows(const float* x, std::int64_t, std::int64_t n, float* out) {
  std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
}

// Two rows of numbers as one row of words, or as two.
inline void store_pair(Vec row, Vec next, float* out) {
  store(out, row);
  store(out + PANEL, next);
}

// The numbers of a word row, by columns: its first and second element.
inline void split_word(const float* words, Vec out[1]) { out[0] = load(words); }

// Word i of a row, back as float32 numbers along the row.
inline void from_words(const float* words, std::int64_t n, float* out) {
  std::memcpy(out, words, static_cast<std::size_t>(n) * 4);
}

#if defined(CKD_BFLOAT16)

inline void to_words(const float* x, std::int64_t n, std::uint32_t* out) {
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32, out += 16) {
    store(out, (WordVec)_mm512_cvtne2ps_pbh((__m512)load(x + i + 16), (__m512)load(x + i)));
  }
  if (i == n) return;
  float rest[32] = {};
  std::memcpy(rest, x + i, static_cast<std::size_t>(n - i) * 4);
  store(out, (WordVec)_mm512_cvtne2ps_pbh((__m512)load(rest + 16), (__m512)load(rest)));
}

inline WordVec pair(Vec low, Vec high) {
  const auto narrow = [](Vec v) {
    return __builtin_convertvector((HalfVec)_mm512_cvtneps_pbh((__m512)v), WordVec);
  };
  return narrow(low) | (narrow(high) << 16);
}

inline void pair_rows(const float* x, std::int64_t ld, std::int64_t n, std::uint32_t* out) {
  std::int64_t j = 0;
  for (; j + LANES <= n; j += LANES) store(out + j, pair(load(x + j), load(x + ld + j)));
  if (j == n) return;
  float low[LANES] = {}, high[LANES] = {};
  std::uint32_t both[LANES];
  const std::size_t bytes = static_cast<std::size_t>(n - j) * 4;
  std::memcpy(low, x + j, bytes);
  std::memcpy(high, x + ld + j, bytes);
  store(both, pair(load(low), load(high)));
  std::memcpy(out + j, both, bytes);
}

inline void store_pair(Vec row, Vec next, std::uint32_t* out) { store(out, pair(row, next)); }

inline void split_word(const std::uint32_t* words, Vec out[2]) {
  const WordVec both = load(words);
  out[0] = (Vec)(both << 16);
  out[1] = (Vec)(both & 0xffff0000u);
}

inline void from_words(const std::uint32_t* words, std::int64_t n, float* out) {
  widen(words, Element::bfloat16, 0, n, out);
}

#endif

// A block of `count` rows, 64 apart, as words along the rows: the block itself, or pairs of its
// rows (made up with zeros to whole padded words) in `out`.
template <class Type>
const typename Type::Word* block_words(float* block, std::int64_t count, typename Type::Word* out) {
  if constexpr (Type::PER_WORD == 1) {
    return block;
  } else {
    const std::int64_t k = words<Type>(count);
    std::memset(block + count * PANEL, 0,
                static_cast<std::size_t>((k * Type::PER_WORD - count) * PANEL) * sizeof(float));
    for (std::int64_t p = 0; p < k; ++p) {
      pair_rows(block + p * Type::PER_WORD * PANEL, PANEL, PANEL, out + p * PANEL);
    }
    return out;
  }
}

// Every second of the lanes of a and b: a0 b0 a1 b1 ..., from the lower or the upper half.
template <class V>
inline V interleave_low(V a, V b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

template <class V>
inline V interleave_high(V a, V b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#elif defined(__AVX2__)
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// log2(LANES) perfect shuffles transpose a square.
template <class Word>
inline void transpose_square(const Word* x, std::int64_t ldx, Word* out, std::int64_t ldo) {
  using V = decltype(load(x));
  V v[LANES], w[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) v[i] = load(x + i * ldx);
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      w[2 * i] = interleave_low(v[i], v[i + LANES / 2]);
      w[2 * i + 1] = interleave_high(v[i], v[i + LANES / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = w[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(out + i * ldo, v[i]);
}

// out [cols, rows] = x [rows, cols] transposed, word by word.
template <class Word>
void transpose(const Word* x, std::int64_t ldx, std::int64_t rows, std::int64_t cols, Word* out,
               std::int64_t ldo) {
  const std::int64_t whole_rows = rows / LANES * LANES, whole_cols = cols / LANES * LANES;
  for (std::int64_t j = 0; j < whole_cols; j += LANES) {
    for (std::int64_t i = 0; i < whole_rows; i += LANES) {
      transpose_square(x + i * ldx + j, ldx, out + j * ldo + i, ldo);
    }
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) {
      out[j * ldo + i] = x[i * ldx + j];
    }
  }
}

}  // namespace ckd::cpu::CKD_TIER

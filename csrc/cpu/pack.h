// Packs rows of elements into the words of gemm.h: widening, narrowing, pairing, transposing.

#pragma once

#include "arguments.h"
#include "gemm.h"

namespace ckd::cpu::CKD_TIER {

// Elements of a word.
template <class Word>
constexpr std::int64_t words_hold = 1;
template <>
constexpr std::int64_t words_hold<std::uint32_t> = 2;

// The dtypes of a stored bank.
struct StoredFloat16 {
  static constexpr std::int64_t SIZE = 2;
  static Vec widen(const char* at) {
    return widen_float16(reinterpret_cast<const std::uint16_t*>(at));
  }
};
struct StoredBFloat16 {
  static constexpr std::int64_t SIZE = 2;
  static Vec widen(const char* at) {
    return widen_bfloat16(reinterpret_cast<const std::uint16_t*>(at));
  }
};
struct StoredFloat32 {
  static constexpr std::int64_t SIZE = 4;
  static Vec widen(const char* at) { return load_as<Vec>(at); }
};

// Calls f with the Stored... type of `element`.
template <class F>
void with_stored(Element element, const F& f) {
  switch (element) {
    case Element::float16:
      return f(StoredFloat16{});
    case Element::bfloat16:
      return f(StoredBFloat16{});
    case Element::float32:
      return f(StoredFloat32{});
  }
}

// Elements [from, from + LANES) of a row, as float32; zeros from `end` on.
template <class Stored>
inline Vec widen(const char* row, std::int64_t from, std::int64_t end) {
  if (from + LANES <= end) return Stored::widen(row + from * Stored::SIZE);
  char rest[LANES * 4] = {};
  if (from < end) {
    std::memcpy(rest, row + from * Stored::SIZE,
                static_cast<std::size_t>((end - from) * Stored::SIZE));
  }
  return Stored::widen(rest);
}

// The same for LANES words, packed along the row.
template <class Stored>
inline void widen_words(const char* row, std::int64_t from, std::int64_t end, Vec* out) {
  *out = widen<Stored>(row, from, end);
}

// Packs n elements along the row, into words<Type>(n) words.
inline void to_words(const float* x, std::int64_t n, float* out) {
  std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
}

// Packs rows 0 and 1 of x, `ld` apart, into one row of n words; float32 words hold row 0 alone.
inline void pair_rows(const float* x, std::int64_t, std::int64_t n, float* out) {
  std::memcpy(out, x, static_cast<std::size_t>(n) * 4);
}

// The same for rows in vectors, as many as a word has elements.
inline void store_words(const Vec* rows, float* out) { store(out, rows[0]); }

// Stores two rows as one row of words (bfloat16) or as two (float32).
inline void store_pair(Vec row, Vec next, float* out) {
  store(out, row);
  store(out + PANEL, next);
}

// Unpacks LANES words: out[e] holds element e of each word.
inline void split_word(const float* words, Vec out[1]) { out[0] = load(words); }

// Unpacks what to_words packed, as float32; n is a multiple of LANES.
inline void from_words(const float* words, std::int64_t n, float* out) {
  std::memcpy(out, words, static_cast<std::size_t>(n) * 4);
}

#if defined(CKD_BFLOAT16)

inline WordVec narrow(Vec low, Vec high) {
  return (WordVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

inline void to_words(const float* x, std::int64_t n, std::uint32_t* out) {
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32, out += 16) store(out, narrow(load(x + i), load(x + i + 16)));
  if (i == n) return;
  float rest[32] = {};
  std::uint32_t last[16];
  std::memcpy(rest, x + i, static_cast<std::size_t>(n - i) * 4);
  store(last, narrow(load(rest), load(rest + 16)));
  std::memcpy(out, last, static_cast<std::size_t>(words<BFloat16>(n - i)) * 4);
}

inline WordVec pair(Vec low, Vec high) {
  typedef std::uint16_t Halves __attribute__((vector_size(64)));
  const Halves both = (Halves)narrow(low, high);
  return (WordVec)__builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                          22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                          14, 30, 15, 31);
}

inline void store_words(const Vec* rows, std::uint32_t* out) { store(out, pair(rows[0], rows[1])); }

template <class Stored>
inline void widen_words(const char* row, std::int64_t from, std::int64_t end, WordVec* out) {
  *out = narrow(widen<Stored>(row, from, end), widen<Stored>(row, from + LANES, end));
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
  const char* row = reinterpret_cast<const char*>(words);
  for (std::int64_t i = 0; i < n; i += LANES) store(out + i, StoredBFloat16::widen(row + 2 * i));
}

#endif

// Packs `count` rows, 64 elements apart, by columns: returns the block itself in float32, and in
// bfloat16 `out` with pairs of rows, after padding the block with zero rows to words(count).
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

// a0 b0 a1 b1 ... from the lower or from the upper half of the lanes.
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
template <class V>
inline void transpose_square(V v[LANES]) {
  V w[LANES];
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
}

template <class Word>
inline void transpose_square(const Word* x, std::int64_t ldx, Word* out, std::int64_t ldo) {
  decltype(load(x)) v[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) v[i] = load(x + i * ldx);
  transpose_square(v);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) store(out + i * ldo, v[i]);
}

// Packs elements [from, end) of `rows` stored rows along the row and transposes them: stored row i
// becomes column i of out [words, LANES]. Stored rows are `stride` bytes apart and at most LANES,
// none if `rows` < 1; all else is zero.
template <class Stored, class Word>
inline void transpose_stored(const char* row, std::int64_t stride, int rows, std::int64_t from,
                             std::int64_t end, std::int64_t words, Word* out, std::int64_t ldo) {
  constexpr std::int64_t PER_SQUARE = LANES * words_hold<Word>;
  decltype(load(out)) v[LANES];
  for (; words >= LANES && rows == LANES && from + PER_SQUARE <= end; words -= LANES) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) widen_words<Stored>(row + i * stride, from, INT64_MAX, &v[i]);
    transpose_square(v);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) store(out + i * ldo, v[i]);
    from += PER_SQUARE;
    out += LANES * ldo;
  }
  for (; words > 0; words -= LANES) {
    for (int i = 0; i < LANES; ++i) {
      widen_words<Stored>(row + i * stride, from, i < rows ? end : from, &v[i]);
    }
    transpose_square(v);
    for (int i = 0; i < LANES && i < words; ++i) store(out + i * ldo, v[i]);
    from += PER_SQUARE;
    out += LANES * ldo;
  }
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

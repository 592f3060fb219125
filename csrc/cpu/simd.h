// Vectors of float32 for the instruction set that this translation unit is compiled for.
//
// Arithmetic is written with the compilers' vector operators (a * b + c becomes one FMA where the
// instruction set has it: -ffp-contract=fast); only conversions need intrinsics. Code compiled per
// tier is in a namespace named after the tier: the linker keeps one copy of an inline function, and
// without the namespace it could be one for another instruction set. For the same reason nothing
// here calls inline functions of the C++ library.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef CKD_TIER
#error "compile through a tier_*.cpp file, which defines CKD_TIER"
#endif

namespace ckd::cpu::CKD_TIER {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N = LANES>
using Vector = typename VectorOf<T, N>::type;

using Vec = Vector<float>;
using IntVec = Vector<std::int32_t>;
using WordVec = Vector<std::uint32_t>;
using HalfVec = Vector<std::uint16_t>;

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const float* p) { return load_as<Vec>(p); }
inline WordVec load(const std::uint32_t* p) { return load_as<WordVec>(p); }
template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// x - 0 is x for every x, -0 included, so compilers fold these into one broadcast.
template <int N = LANES, class T>
inline Vector<T, N> broadcast(T x) {
  return x - Vector<T, N>{};
}

// Elementwise maximum; NaN in `b` stays NaN.
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// The lanes of v, rotated by BY.
template <int BY, int... I>
inline Vec rotate_lanes(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, ((I + BY) % LANES)...);
}

template <int HALF = LANES / 2>
inline float sum_lanes(Vec v) {
  // An explicit binary tree: the order of the sum does not depend on the compiler.
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    return sum_lanes<HALF / 2>(v + rotate_lanes<HALF>(v, std::make_integer_sequence<int, LANES>{}));
  }
}

inline bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  std::int32_t x[LANES];
  std::memcpy(x, &mask, sizeof x);
  std::int32_t all = 0;
  for (int i = 0; i < LANES; ++i) all |= x[i];
  return all != 0;
#endif
}

// 2^r for r in [-1/2, 1/2]: minimax polynomial with constant term 1, error 2e-9 before rounding.
inline Vec exp2_fraction(Vec r) {
  Vec p = broadcast(1.5353361e-4f);
  p = p * r + 1.3398875e-3f;
  p = p * r + 9.6184369e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314718e-1f;
  return p * r + 1.0f;
}

// scale log2(e), which converts natural exponents to base 2, as the sum of two float32 numbers.
struct Log2Factor {
  explicit Log2Factor(double scale) {
    const double factor = scale * 1.4426950408889634074;
    high = broadcast(static_cast<float>(factor));
    low = broadcast(static_cast<float>(factor - static_cast<double>(static_cast<float>(factor))));
  }
  Vec high, low;
};

// 2^(x factor - shift) for a result below 2^127 and an integral shift. The relative error stays
// near 1e-7 for any x factor and shift, since FMAs reduce their difference without rounding x
// factor first. Results below 2^-126 are exactly 0, since subnormals are slow on some processors;
// NaN stays NaN.
inline Vec exp2(Vec x, const Log2Factor& factor, Vec shift) {
  const Vec y = x * factor.high - shift;
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)y, (__m512)broadcast(-126.0f), _CMP_NLT_UQ);
  const Vec n = (Vec)_mm512_maskz_roundscale_ps(keep, (__m512)y, 0);
  const Vec r = (x * factor.high - (n + shift)) + x * factor.low;
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)exp2_fraction(r), (__m512)n);
#else
  const IntVec tiny = y < -126.0f;
  // Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  const Vec shifted = (tiny ? broadcast(-126.0f) : y) + 12582912.0f;
  const Vec n = shifted - 12582912.0f;
  const Vec p = exp2_fraction((x * factor.high - (n + shift)) + x * factor.low);
  const Vec scaled = (Vec)((WordVec)p + ((WordVec)shifted << 23));
  return tiny ? Vec{} : x == x ? scaled : x;
#endif
}

// 2^x for an integral x <= 127, 0 below -126.
inline Vec exp2_integral(Vec x) {
  const IntVec tiny = x < -126.0f;
  const Vec shifted = (tiny ? broadcast(-126.0f) : x) + 12582912.0f + 127.0f;
  return tiny ? Vec{} : (Vec)((WordVec)shifted << 23);
}

inline Vec nearest_integer(Vec x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22

// float16 to float32, exactly; subnormals, infinities and NaN included.
inline Vec widen_float16(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__AVX2__)  // whose flags in tiers.json include F16C
  return (Vec)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const WordVec h = __builtin_convertvector(load_as<HalfVec>(p), WordVec);
  const WordVec magnitude = (h & 0x7fffu) << 13;
  // 2^112 moves the exponent from float16's bias to float32's and normalises subnormals.
  const Vec finite = (Vec)magnitude * 5.192296858534828e33f;
  const WordVec value = magnitude < 0x0f800000u ? (WordVec)finite : (magnitude | 0x7f800000u);
  return (Vec)(value | ((h & 0x8000u) << 16));
#endif
}

inline Vec widen_bfloat16(const std::uint16_t* p) {
  return (Vec)(__builtin_convertvector(load_as<HalfVec>(p), WordVec) << 16);
}

}  // namespace ckd::cpu::CKD_TIER

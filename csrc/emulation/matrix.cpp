// The results of collectives, by the fragment layouts of the PTX manual ("ldmatrix" and "Matrix
// fragments for mma.m16n8k16 with floating point type").

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "emulation.h"
#include "runtime.h"

namespace ckd::emulation {
namespace {

constexpr int ROWS = 16, COLUMNS = 8, INNER = 16;

float half_to_float(std::uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (std::size_t i = 0; i < all.size(); ++i) {
      __half_raw raw;
      raw.x = static_cast<unsigned short>(i);
      all[i] = __half2float(__half(raw));
    }
    return all;
  }();
  return table[bits];
}

float bfloat16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

std::uint16_t element(const std::uint32_t* words, int i) {
  return static_cast<std::uint16_t>(words[i / 2] >> (16 * (i % 2)));
}

struct Operands {
  float a[ROWS][INNER], b[INNER][COLUMNS], c[ROWS][COLUMNS];
};

// c += a b with every sum rounded to float32, in the order of k.
void add_rounded(Operands& x) {
  for (int row = 0; row < ROWS; ++row) {
    for (int k = 0; k < INNER; ++k) {
      for (int column = 0; column < COLUMNS; ++column) {
        x.c[row][column] += x.a[row][k] * x.b[k][column];
      }
    }
  }
}

constexpr int MANTISSA = 52, FLOAT_MANTISSA = 23;  // stored bits
constexpr std::uint64_t BIAS = 1023;

std::uint64_t bits_of(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
double from_bits(std::uint64_t bits) {
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// x rounded towards zero to float32.
float truncated(double x) {
  if (std::fabs(x) < static_cast<double>(FLT_MIN)) {
    constexpr double SMALLEST = 0x1p-149;
    return static_cast<float>(std::trunc(x / SMALLEST) * SMALLEST);
  }
  const std::uint64_t dropped = (std::uint64_t{1} << (MANTISSA - FLOAT_MANTISSA)) - 1;
  return static_cast<float>(from_bits(bits_of(x) & ~dropped));
}

// The exponent of x; `least`, that of the smallest normal number of the operand's type, for a
// subnormal number, which the units do not normalise. For 0 so low that it never counts.
int exponent_of(float x, int least) {
  constexpr int NEVER = -10000, FLOAT_BIAS = 127;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x == 0 ? NEVER : std::max(static_cast<int>(bits << 1 >> 24) - FLOAT_BIAS, least);
}

// c += a b by a model of an H100's tensor cores (all 1,029 sums in tests/emulation/wrappers.cu
// have its bits): the 16 products are exact, and the exponent of a product is the sum of its
// operands' exponents; they and c are aligned to the largest exponent and truncated KEPT bits below
// it; their sum is exact, and truncated to float32. Earlier GPUs keep fewer bits (Fasi et al. 2021,
// "Numerical behavior of NVIDIA tensor cores").
void add_truncated(Operands& x, int least) {
  constexpr int EXTRA_BITS = 2, TERMS = INNER + 1, KEPT = FLOAT_MANTISSA + EXTRA_BITS;
  constexpr int FLOAT_LEAST = -126;
  int exponent_b[INNER][COLUMNS];
  for (int k = 0; k < INNER; ++k) {
    for (int column = 0; column < COLUMNS; ++column) {
      exponent_b[k][column] = exponent_of(x.b[k][column], least);
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    int exponent_a[INNER];
    for (int k = 0; k < INNER; ++k) exponent_a[k] = exponent_of(x.a[row][k], least);
    for (int column = 0; column < COLUMNS; ++column) {
      float& c = x.c[row][column];
      double terms[TERMS], plain = 0;
      int exponent = exponent_of(c, FLOAT_LEAST);
      for (int k = 0; k < TERMS; ++k) {
        terms[k] =
            k < INNER ? static_cast<double>(x.a[row][k]) * x.b[k][column] : static_cast<double>(c);
        plain += terms[k];
        if (k < INNER) exponent = std::max(exponent, exponent_a[k] + exponent_b[k][column]);
      }
      if (!std::isfinite(plain) || exponent < -1000) {  // NaN, infinity or zeros
        c = static_cast<float>(plain);
        continue;
      }
      const double to_units = from_bits((BIAS + KEPT - exponent) << MANTISSA);
      const double unit = from_bits((BIAS + exponent - KEPT) << MANTISSA);
      std::int32_t sum = 0;  // of 17 numbers below 2^27
      for (double term : terms) sum += static_cast<std::int32_t>(term * to_units);
      c = truncated(sum * unit);
    }
  }
}

bool truncates() {
  const char* name = std::getenv("CKD_EMULATION_SUMS");
  const std::string wanted = name == nullptr ? "truncated" : name;
  if (wanted != "truncated" && wanted != "rounded") {
    fail("CKD_EMULATION_SUMS must be truncated or rounded, got " + wanted, LAUNCH);
  }
  return wanted == "truncated";
}

template <float (*to_float)(std::uint16_t), int LEAST>
void multiply_add(Exchange& warp) {
  static const bool truncate = truncates();
  Operands x;
  for (int lane = 0; lane < LANES; ++lane) {
    Fragments given;
    std::memcpy(&given, warp.in[lane], sizeof given);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 8; ++i) {
      x.a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = to_float(element(given.a, i));
    }
    for (int i = 0; i < 4; ++i) {
      x.b[pair + i % 2 + 8 * (i / 2)][group] = to_float(element(given.b, i));
      x.c[group + 8 * (i / 2)][pair + i % 2] = given.c[i];
    }
  }
  if (truncate) {
    add_truncated(x, LEAST);
  } else {
    add_rounded(x);
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = x.c[group + 8 * (i / 2)][pair + i % 2];
    std::memcpy(warp.out[lane], sums, sizeof sums);
  }
}

}  // namespace

void compute_nothing(Exchange&, int) {}

void compute_shuffle_xor(Exchange& warp, int mask) {
  for (int lane = 0; lane < LANES; ++lane) {
    std::memcpy(warp.out[lane], warp.in[(lane ^ mask) % LANES], 4);
  }
}

void compute_any(Exchange& warp, int) {
  bool any = false;
  for (const auto& in : warp.in) any |= in[0] != 0;
  for (auto& out : warp.out) std::memcpy(out, &any, sizeof any);
}

void compute_load_matrix(Exchange& warp, int transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < LANES; ++lane) {
      for (int i = 0; i < 2; ++i) {
        int row = lane / 4, column = 2 * (lane % 4) + i;
        if (transposed) std::swap(row, column);
        std::memcpy(warp.out[lane] + 4 * matrix + 2 * i, warp.in[8 * matrix + row] + 2 * column, 2);
      }
    }
  }
}

void compute_multiply_add_half(Exchange& warp, int) { multiply_add<half_to_float, -14>(warp); }

void compute_multiply_add_bfloat16(Exchange& warp, int) {
  multiply_add<bfloat16_to_float, -126>(warp);
}

}  // namespace ckd::emulation

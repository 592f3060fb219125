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
constexpr std::uint64_t EXPONENT = 0x7ff, BIAS = 1023;

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

// c += a b by a model of an H100's tensor cores (82 % of the sums in tests/emulation/wrappers.cu
// have equal bits): the 16 products are exact; they and c are aligned to the largest of the 17 and
// truncated two bits below its last bit as a float32; their sum is exact, and truncated to float32.
// Earlier GPUs keep fewer bits (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores").
void add_truncated(Operands& x) {
  constexpr int EXTRA_BITS = 2, TERMS = INNER + 1;
  constexpr std::uint64_t KEPT = FLOAT_MANTISSA + EXTRA_BITS;
  for (int row = 0; row < ROWS; ++row) {
    double terms[TERMS][COLUMNS];
    std::uint64_t largest[COLUMNS] = {};  // bits of |term|, which are ordered as the numbers are
    for (int k = 0; k < TERMS; ++k) {
      for (int column = 0; column < COLUMNS; ++column) {
        const double term = k < INNER ? static_cast<double>(x.a[row][k]) * x.b[k][column]
                                      : static_cast<double>(x.c[row][column]);
        terms[k][column] = term;
        largest[column] = std::max(largest[column], bits_of(term) & ~(std::uint64_t{1} << 63));
      }
    }
    for (int column = 0; column < COLUMNS; ++column) {
      const std::uint64_t exponent = largest[column] >> MANTISSA;
      float& c = x.c[row][column];
      if (exponent == EXPONENT) {  // NaN or infinity
        double sum = 0;
        for (int k = 0; k < TERMS; ++k) sum += terms[k][column];
        c = static_cast<float>(sum);
        continue;
      }
      if (largest[column] == 0) {
        c = 0;
        continue;
      }
      // Both are normal numbers: no term is below 2^-298.
      const double to_units = from_bits((2 * BIAS + KEPT - exponent) << MANTISSA);
      const double unit = from_bits((exponent - KEPT) << MANTISSA);
      std::int32_t sum = 0;  // of 17 numbers below 2^26
      for (int k = 0; k < TERMS; ++k) {
        sum += static_cast<std::int32_t>(terms[k][column] * to_units);
      }
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

template <float (*to_float)(std::uint16_t)>
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
    add_truncated(x);
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

void compute_multiply_add_half(Exchange& warp, int) { multiply_add<half_to_float>(warp); }

void compute_multiply_add_bfloat16(Exchange& warp, int) { multiply_add<bfloat16_to_float>(warp); }

}  // namespace ckd::emulation

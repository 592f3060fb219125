// What the collectives compute, by the fragment layouts of the PTX manual ("ldmatrix" and "Matrix
// fragments for mma.m16n8k16 with floating point type").

#include <cstring>
#include <utility>
#include <vector>

#include "emulation.h"

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

// Sums in float32 in the order of k. A tensor core rounds otherwise.
template <float (*to_float)(std::uint16_t)>
void multiply_add(Exchange& warp) {
  float a[ROWS][INNER], b[INNER][COLUMNS], c[ROWS][COLUMNS];
  for (int lane = 0; lane < LANES; ++lane) {
    Fragments given;
    std::memcpy(&given, warp.in[lane], sizeof given);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 8; ++i) {
      a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = to_float(element(given.a, i));
    }
    for (int i = 0; i < 4; ++i) {
      b[pair + i % 2 + 8 * (i / 2)][group] = to_float(element(given.b, i));
      c[group + 8 * (i / 2)][pair + i % 2] = given.c[i];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    for (int k = 0; k < INNER; ++k) {
      for (int column = 0; column < COLUMNS; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < LANES; ++lane) {
    const int group = lane / 4, pair = 2 * (lane % 4);
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[group + 8 * (i / 2)][pair + i % 2];
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

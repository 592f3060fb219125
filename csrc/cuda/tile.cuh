// Tiles of 16-bit numbers in shared memory, and products of tiles in the registers of a block.
//
// Exact arithmetic multiplies float32 numbers as sums of pieces: float16 ones where numbers are at
// most 1 (x = high + low keeps 22 bits, and misses at most 2^-25), bfloat16 ones, with float32's
// range, in products with the bank. Products of two small pieces are left out.
//
// Tensor cores truncate sums towards zero (csrc/emulation/matrix.cpp): a sum of n products of 16
// terms loses about n 2^-23 of itself. So exact arithmetic accumulates no more than one tile in
// them, and adds the products of tiles with ordinary float32 additions, which round to nearest.
//
// A block is four warps. A product has 64 rows, of which each warp owns 16; its sums are float32
// in the register layout of m16n8k16: sums[n][e] of a lane is at row 16 warp + lane / 4 + 8 (e / 2)
// and column 8 n + 2 (lane % 4) + e % 2.

#pragma once

#include "arguments.h"
#include "device.cuh"

namespace ckd::cuda {

constexpr int TILE = 64;
constexpr int THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f;

CKD_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
CKD_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
// The row, in the tile, of this lane's sums with e < 2; those with e >= 2 are 8 rows below.
CKD_DEVICE int own_row() { return 16 * warp_index() + lane_index() / 4; }
CKD_DEVICE int own_column(int n) { return 8 * n + 2 * (lane_index() % 4); }

CKD_DEVICE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

CKD_DEVICE bool in_tile(int row, int rows) { return row >= 0 && row < rows; }

// Reductions over the four lanes that hold a row.
CKD_DEVICE float sum_of_row(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
CKD_DEVICE float max_of_row(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

CKD_DEVICE float widen(__half x) { return __half2float(x); }
CKD_DEVICE float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
CKD_DEVICE float widen(float x) { return x; }
template <class T>
CKD_DEVICE T narrow(float x) {
  if constexpr (std::is_same<T, __half>::value) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same<T, __nv_bfloat16>::value) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Piece `index` of x: x minus the pieces before it, rounded.
template <class T>
CKD_DEVICE T piece_of(float x, int index) {
  T piece = narrow<T>(x);
  for (int i = 0; i < index; ++i) {
    x -= widen(piece);
    piece = narrow<T>(x);
  }
  return piece;
}

CKD_DEVICE std::uint32_t half_pair(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  std::uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

constexpr int ROW_BYTES = TILE * 2;  // of a panel

// The address of a lane's 16 bytes in a tile of ROWS rows: the fields depend on the lane, and the
// arguments of `at` are constants where loops are unrolled.
template <int ROWS>
struct LanePiece {
  SharedAddress row;
  int offset;  // in the row, in bytes

  // The address `rows`, a multiple of 8, below and `columns`, a multiple of 16, to the right.
  CKD_DEVICE SharedAddress at(int rows, int columns) const {
    return row + (offset ^ (columns % TILE * 2)) + (rows + columns / TILE * ROWS) * ROW_BYTES;
  }
};

// ROWS rows of COLUMNS elements, in panels of 64 columns. A row of a panel is 8 pieces of 16 bytes,
// swizzled: piece p of row r is stored at p ^ (r % 8), so that ldmatrix reads the eight rows of a
// matrix from different memory banks.
template <class T, int COLUMNS, int ROWS = TILE>
struct Tile {
  static constexpr int SIZE = ROWS * COLUMNS;
  T* data;

  // The address of 8 elements from `column` on, a multiple of 8.
  CKD_DEVICE T* piece(int row, int column) const {
    return data + column / TILE * (ROWS * TILE) + row * TILE + ((column / 8 % 8) ^ (row % 8)) * 8;
  }
  CKD_DEVICE T& at(int row, int column) const { return piece(row, column)[column % 8]; }
  // The same address as a LanePiece.
  CKD_DEVICE LanePiece<ROWS> lane_piece(int row, int column) const {
    return {shared_address(data) + (column / TILE * ROWS + row) * ROW_BYTES,
            ((column / 8 % 8) ^ (row % 8)) * 16};
  }

  // Copies rows first_row.. and columns first_column.. of a matrix [rows, columns] whose rows are
  // `stride` apart and aligned to 16 bytes; zeros beyond its edges. Asynchronous: see wait_copies.
  CKD_DEVICE void copy(const T* matrix, std::int64_t stride, int first_row, int rows,
                       int first_column, int columns) const {
    constexpr int PER_ROW = COLUMNS / 8, STEP = THREADS / PER_ROW;  // rows copied at once
    static_assert(STEP % 8 == 0 || 8 % STEP == 0, "a thread's rows differ in few bits");
    const int thread = static_cast<int>(threadIdx.x);
    const int row = thread / PER_ROW, column = thread % PER_ROW * 8;
    const int bytes = max(min(columns - first_column - column, 8), 0) * 2;
    const int rest = rows - first_row - row;
    const LanePiece<ROWS> to = lane_piece(row, column);
    const T* from = matrix + (first_row + row) * stride + first_column + column;
#pragma unroll
    for (int i = 0; i < ROWS / STEP; ++i) {
      // A copy of 0 bytes reads nothing, so that addresses beyond the edge do no harm.
      copy_async(to.row + i * STEP * ROW_BYTES + (to.offset ^ (i * STEP % 8 * 16)), from,
                 i * STEP < rest ? bytes : 0);
      from += STEP * stride;
    }
  }

  // The same for any dtype and alignment: stores piece `index` of the elements times factor(column
  // of the tile). Not asynchronous: the next barrier makes it visible.
  template <class S, class Factor>
  CKD_DEVICE void convert(const S* matrix, std::int64_t stride, int first_row, int rows,
                          int first_column, int columns, int index, const Factor& factor,
                          std::int64_t column_stride = 1) const {
    for (int p = static_cast<int>(threadIdx.x); p < SIZE; p += THREADS) {
      const int row = p / COLUMNS, column = p % COLUMNS;
      const bool inside = first_row + row < rows && first_column + column < columns;
      const S* from = matrix + (first_row + row) * stride + (first_column + column) * column_stride;
      at(row, column) = piece_of<T>(inside ? widen(*from) * factor(column) : 0.0f, index);
    }
  }
};

struct AsItIs {
  CKD_DEVICE float operator()(int) const { return 1; }
};

// A double buffer: one tile is copied while the other is used.
template <class T, int COLUMNS, int ROWS = TILE>
struct Buffers {
  T* data;
  CKD_DEVICE Tile<T, COLUMNS, ROWS> tile(int step) const {
    return {data + step % 2 * Tile<T, COLUMNS, ROWS>::SIZE};
  }
};

template <int N>
struct Sums {
  float at[N][4];
  CKD_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < N; ++n) at[n][0] = at[n][1] = at[n][2] = at[n][3] = 0;
  }
  CKD_DEVICE void add(const Sums& other) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) at[n][e] += other.at[n][e];
    }
  }
};

// sums [64, ROWS] += left right^T over the COLUMNS of both, accumulated in tensor cores.
template <class T, int COLUMNS, int ROWS>
CKD_DEVICE void add_product_of_rows(Sums<ROWS / 8>& sums, Tile<T, COLUMNS> left,
                                    Tile<T, COLUMNS, ROWS> right) {
  const int lane = lane_index();
  const LanePiece<TILE> of_left = left.lane_piece(16 * warp_index() + lane % 16, lane / 16 * 8);
  const LanePiece<ROWS> of_right = right.lane_piece(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
#pragma unroll
  for (int k = 0; k < COLUMNS; k += 16) {
    std::uint32_t a[4];
    load_matrix(a, of_left.at(0, k));
#pragma unroll
    for (int n = 0; n < ROWS / 16; ++n) {
      std::uint32_t b[4];
      load_matrix(b, of_right.at(16 * n, k));
      multiply_add<T>(sums.at[2 * n], a, b[0], b[1]);
      multiply_add<T>(sums.at[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// The same, but the product is accumulated from zero and then added with rounding to nearest.
template <class T, int COLUMNS, int ROWS>
CKD_DEVICE void add_rounded_product_of_rows(Sums<ROWS / 8>& sums, Tile<T, COLUMNS> left,
                                            Tile<T, COLUMNS, ROWS> right) {
  Sums<ROWS / 8> part;
  part.clear();
  add_product_of_rows(part, left, right);
  sums.add(part);
}

// Replaces elements by their rounding errors in float16.
template <int N>
CKD_DEVICE void keep_rest(Sums<N>& x) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) x.at[n][e] -= widen(__float2half_rn(x.at[n][e]));
  }
}

// sums [64, COLUMNS] += left right, where left [64, ROWS] is in registers, as the sums of a product
// are, and is rounded to float16. With ROUNDED the tile's product is accumulated from zero and then
// added with rounding to nearest; without, in tensor cores, which takes fewer registers.
template <bool ROUNDED, int COLUMNS, int ROWS>
CKD_DEVICE void add_product(Sums<COLUMNS / 8>& sums, const Sums<ROWS / 8>& left,
                            Tile<__half, COLUMNS, ROWS> right) {
  const int lane = lane_index();
  const LanePiece<ROWS> of_right = right.lane_piece(lane % 16, lane / 16 * 8);
  std::uint32_t a[ROWS / 16][4];
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) {
    const auto &x = left.at[2 * k], &y = left.at[2 * k + 1];
    a[k][0] = half_pair(x[0], x[1]), a[k][1] = half_pair(x[2], x[3]);
    a[k][2] = half_pair(y[0], y[1]), a[k][3] = half_pair(y[2], y[3]);
  }
#pragma unroll
  for (int n = 0; n < COLUMNS / 16; ++n) {
    float part[2][4] = {};
    float (&low_sums)[4] = ROUNDED ? part[0] : sums.at[2 * n];
    float (&high_sums)[4] = ROUNDED ? part[1] : sums.at[2 * n + 1];
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
      std::uint32_t b[4];
      load_matrix_transposed(b, of_right.at(16 * k, 16 * n));
      multiply_add<__half>(low_sums, a[k], b[0], b[1]);
      multiply_add<__half>(high_sums, a[k], b[2], b[3]);
    }
    if constexpr (ROUNDED) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sums.at[2 * n][e] += part[0][e];
        sums.at[2 * n + 1][e] += part[1][e];
      }
    }
  }
}

// sums [64, 64] += left^T right over the rows of both, accumulated from zero, then added rounded.
template <class T>
CKD_DEVICE void add_rounded_product_of_columns(Sums<8>& sums, Tile<T, TILE> left,
                                               Tile<T, TILE> right) {
  const int lane = lane_index();
  const auto of_left =
      left.lane_piece(lane % 8 + lane / 16 * 8, 16 * warp_index() + lane / 8 % 2 * 8);
  const auto of_right = right.lane_piece(lane % 16, lane / 16 * 8);
  Sums<8> part;
  part.clear();
#pragma unroll
  for (int k = 0; k < TILE; k += 16) {
    std::uint32_t a[4];
    load_matrix_transposed(a, of_left.at(k, 0));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t b[4];
      load_matrix_transposed(b, of_right.at(k, 16 * n));
      multiply_add<T>(part.at[2 * n], a, b[0], b[1]);
      multiply_add<T>(part.at[2 * n + 1], a, b[2], b[3]);
    }
  }
  sums.add(part);
}

// Whether an even column of a matrix and the next one can be stored as one float2.
CKD_DEVICE bool has_aligned_pairs(const float* matrix, std::int64_t stride) {
  return stride % 2 == 0 && reinterpret_cast<std::uintptr_t>(matrix) % sizeof(float2) == 0;
}

// row[column], row[column + 1] (+)= values for an even column, but only columns below `width`.
CKD_DEVICE void store_columns(float* row, int column, int width, bool aligned, bool add,
                              float2 values) {
  if (aligned && column + 1 < width) {
    float2& at = *reinterpret_cast<float2*>(row + column);
    if (add) values.x += at.x, values.y += at.y;
    at = values;
    return;
  }
  if (column < width) row[column] = values.x + (add ? row[column] : 0.0f);
  if (column + 1 < width) row[column + 1] = values.y + (add ? row[column + 1] : 0.0f);
}

// The scale, or NaN for one that the op refuses: this reports it without a synchronisation.
CKD_DEVICE float positive(const float* scale) {
  constexpr float MAX_LOGIT_SCALE = 1.2676506e30f;  // 2^100
  return *scale > 0 && *scale <= MAX_LOGIT_SCALE ? *scale : nanf("");
}

// logit_scale log2(e), at least the smallest normal number: times -inf it is not NaN.
CKD_DEVICE float scale_to_base_2(const float* scale, float factor) {
  constexpr float MIN_NORMAL = 1.1754943508e-38f;
  const float to_base_2 = positive(scale) * LOG2E * factor;
  return to_base_2 < MIN_NORMAL ? MIN_NORMAL : to_base_2;
}

// A power of 2, since multiplying and dividing by it does not round.
CKD_DEVICE float power_of_2_above(float x) {
  int exponent;
  frexpf(x, &exponent);
  return ldexpf(1, exponent);
}

// The target's row of the bank; -1 where it is ignored or out of range.
CKD_DEVICE std::int64_t load_target(const Targets& targets, std::int64_t i,
                                    std::int64_t bank_rows) {
  const std::int64_t y = targets.target[i];
  return y != targets.ignore_index && y >= 0 && y < bank_rows ? y : -1;
}

}  // namespace ckd::cuda

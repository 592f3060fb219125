// Matrix products with the bank: its projection, and the projection's gradient.

#pragma once

#include "tile.cuh"

namespace ckd::cuda {

CKD_DEVICE void store_projection(const Sums<8>& sums, int first, int rows, int column, int width,
                                 float factor, const float* bias, float* z, std::int64_t ld) {
  const bool aligned = has_aligned_pairs(z, ld);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = first + own_row() + 8 * h;
    if (row >= rows) continue;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int w = column + own_column(n);
      const float low = bias != nullptr && w < width ? bias[w] : 0;
      const float high = bias != nullptr && w + 1 < width ? bias[w + 1] : 0;
      store_columns(z + row * ld, w, width, aligned, false,
                    {sums.at[n][2 * h] * factor + low, sums.at[n][2 * h + 1] * factor + high});
    }
  }
}

// z [rows, ld] = scale_factor scale t P^T + b, for t [rows, D] of type S and P of type T. ld >= W;
// columns from W on are not written. With a null scale both factors are 1.
//
// A block computes 64 x 64 elements in steps of 64 along D, and copies the next step while it
// multiplies. ALIGNED requires S = T and aligned rows: cp.async copies t; otherwise each element is
// converted. Traffic: t ceil(W / 64) times (from L2), P ceil(rows / 64) times, z once. Sums in
// float32; with EXACT those of tiles are added with rounding to nearest.
template <class T, class S, bool ALIGNED, bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS)
    project(const S* t, std::int64_t stride, int rows, int dim, const T* weight,
            std::int64_t weight_stride, const float* bias, int width, const float* scale,
            float scale_factor, float* z, std::int64_t ld) {
  CKD_SHARED(memory);
  Carve carve(memory);
  const Buffers<T, TILE> left = {carve.take<T>(2 * TILE * TILE)};
  const Buffers<T, TILE> right = {carve.take<T>(2 * TILE * TILE)};
  const int first = static_cast<int>(blockIdx.x) * TILE;
  const int column = static_cast<int>(blockIdx.y) * TILE;
  const auto load = [&](int step) {
    const int d = step * TILE, to = step;
    if constexpr (ALIGNED) {
      left.tile(to).copy(t, stride, first, rows, d, dim);
    } else {
      left.tile(to).convert(t, stride, first, rows, d, dim, 0, AsItIs());
    }
    right.tile(to).copy(weight, weight_stride, column, width, d, dim);
    commit_copies();
  };
  Sums<8> sums;
  sums.clear();
  load(0);
  for (int step = 0; step * TILE < dim; ++step) {
    wait_copies<0>();
    sync_block();  // this step has arrived, and the other buffers are free
    if ((step + 1) * TILE < dim) load(step + 1);
    if constexpr (EXACT) {
      add_rounded_product_of_rows(sums, left.tile(step), right.tile(step));
    } else {
      add_product_of_rows(sums, left.tile(step), right.tile(step));
    }
  }
  const float factor = scale == nullptr ? 1 : positive(scale) * scale_factor;
  store_projection(sums, first, rows, column, width, factor, bias, z, ld);
}

// The number of bfloat16 pieces of an S.
template <class S>
constexpr int PIECES = std::is_same<S, __nv_bfloat16>::value ? 1
                       : std::is_same<S, __half>::value      ? 2
                                                             : 3;

// As `project`, with the accuracy of float32: sums products of bfloat16 pieces of t and of the
// float32 weight.
template <class S>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    project_exactly(const S* t, std::int64_t stride, int rows, int dim, const float* weight,
                    std::int64_t weight_stride, const float* bias, int width, float* z,
                    std::int64_t ld) {
  using T = __nv_bfloat16;
  CKD_SHARED(memory);
  Carve carve(memory);
  const Tile<T, TILE> left = {carve.take<T>(TILE * TILE)};
  const Tile<T, TILE> right = {carve.take<T>(TILE * TILE)};
  const int first = static_cast<int>(blockIdx.x) * TILE;
  const int column = static_cast<int>(blockIdx.y) * TILE;
  Sums<8> sums;
  sums.clear();
  for (int d = 0; d < dim; d += TILE) {
    for (int i = 0; i < PIECES<S>; ++i) {
      for (int j = 0; i + j < 3; ++j) {
        sync_block();  // no warp still reads the tiles
        if (j == 0) left.convert(t, stride, first, rows, d, dim, i, AsItIs());
        right.convert(weight, weight_stride, column, width, d, dim, j, AsItIs());
        sync_block();
        add_rounded_product_of_rows(sums, left, right);
      }
    }
  }
  store_projection(sums, first, rows, column, width, 1, bias, z, ld);
}

constexpr int PRODUCT_BYTES = 4 * carve_bytes<__half>(TILE * TILE) + carve_bytes<float>(TILE);

// parts [splits, A, B] (+)= left^T right and, unless null, column_parts [splits, A] (+)= the sums
// of the columns of left, for left [rows, A] float32 of any strides and right [rows, B]. Before it
// is rounded to T, left is scaled so that its largest element (with largest_stride 1, that of each
// column) is between 2^10 and 2^11. Computes, for example, d_weight = dZ^T t and d_bias.
//
// A block owns 64 columns of left, 64 of right and one split of the rows.
template <class T, class S, bool ALIGNED>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    sum_of_products(const float* left_rows, std::int64_t left_stride,
                    std::int64_t left_column_stride, int left_columns, const S* right_rows,
                    std::int64_t right_stride, int right_columns, int rows, const float* largest,
                    int largest_stride, bool exact, float* parts, float* column_parts, bool add) {
  constexpr float TOP = 2048, SMALLEST = 1e-30f;
  CKD_SHARED(memory);
  Carve carve(memory);
  const Buffers<T, TILE> left = {carve.take<T>(2 * TILE * TILE)};
  const Buffers<T, TILE> right = {carve.take<T>(2 * TILE * TILE)};
  float* tops = carve.take<float>(TILE);  // the power of 2 above each column's largest element
  const int a0 = static_cast<int>(blockIdx.x) * TILE, b0 = static_cast<int>(blockIdx.y) * TILE;
  for (int a = static_cast<int>(threadIdx.x); a < TILE; a += THREADS) {
    tops[a] = a0 + a < left_columns
                  ? power_of_2_above(fmaxf(largest[(a0 + a) * largest_stride], SMALLEST))
                  : 1;
  }
  sync_block();
  const int split = static_cast<int>(blockIdx.z), splits = static_cast<int>(gridDim.z);
  const int each = ((rows + splits - 1) / splits + TILE - 1) / TILE * TILE;
  const int begin = split * each, end = min(begin + each, rows);
  // Exact arithmetic multiplies every tile once for each pair of pieces.
  constexpr int RIGHT_PIECES = std::is_same<S, T>::value ? 1 : PIECES<S>;
  constexpr int LEFT_PIECES = std::is_same<T, __half>::value ? 2 : 3;
  const auto load = [&](int k, int to, int i, int j) {
    left.tile(to).convert(
        left_rows, left_stride, k, end, a0, left_columns, i,
        [&](int column) { return TOP / tops[column]; }, left_column_stride);
    if constexpr (ALIGNED) {
      right.tile(to).copy(right_rows, right_stride, k, end, b0, right_columns);
    } else {
      right.tile(to).convert(right_rows, right_stride, k, end, b0, right_columns, j, AsItIs());
    }
    commit_copies();
  };
  Sums<8> sums;
  sums.clear();
  // Threads 0 to 63 each sum a column of left in float32.
  const int own_column_of_left = a0 + static_cast<int>(threadIdx.x);
  const bool sums_columns = column_parts != nullptr && blockIdx.y == 0 && threadIdx.x < TILE &&
                            own_column_of_left < left_columns;
  float of_column = 0;
  int k = begin;
  int i = 0, j = 0, step = 0;
  if (k < end) load(k, 0, 0, 0);
  while (k < end) {
    const bool is_first = i == 0 && j == 0;
    int next = k;
    if (exact && i + j + 1 < LEFT_PIECES && j + 1 < RIGHT_PIECES) {
      ++j;
    } else if (exact && i + 1 < LEFT_PIECES) {
      ++i, j = 0;
    } else {
      i = j = 0, next = k + TILE;
    }
    wait_copies<0>();
    sync_block();  // this step has arrived, and the other buffers are free
    if (next < end) load(next, step + 1, i, j);
    add_rounded_product_of_columns(sums, left.tile(step), right.tile(step));
    if (sums_columns && is_first) {
      const float* at = left_rows + own_column_of_left * left_column_stride;
      float of_tile = 0;  // a partial sum, since errors of long sums grow with their length
      for (std::int64_t row = k; row < min(k + TILE, end); ++row) {
        of_tile += at[row * left_stride];
      }
      of_column += of_tile;
    }
    k = next;
    ++step;
  }
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const std::int64_t a = a0 + own_row() + e / 2 * 8, b = b0 + own_column(n) + e % 2;
      if (a >= left_columns || b >= right_columns) continue;
      float& out = parts[(static_cast<std::int64_t>(split) * left_columns + a) * right_columns + b];
      out = sums.at[n][e] * (tops[a - a0] / TOP) + (add ? out : 0.0f);
    }
  }
  if (sums_columns) {
    float& out = column_parts[static_cast<std::int64_t>(split) * left_columns + own_column_of_left];
    out = of_column + (add ? out : 0.0f);
  }
}

}  // namespace ckd::cuda

// The projection's gradient in half precision: d_weight = dZ^T T and d_bias, the sums of the
// columns of dZ. dZ is stored in 16 bits with one scale, a power of 2, for each tile of 64 rows. A
// tile's product is scaled back when it is added to the sums.

#pragma once

#include "rows.cuh"

namespace ckd::cuda {

// dZ of a chunk as it is stored.
struct ScaledGradient {
  void* rows;          // [rows, ld] of float16 or bfloat16
  bool is_bfloat16;    // the bank is multiplied in the same dtype
  float* scales;       // [tiles of 64 rows] by which to multiply the rows
  float* column_sums;  // [tiles of 64 rows, ld] of dZ itself, as float32; null: not computed

  CKD_DEVICE void store_pair(std::int64_t at, float low, float high) const {
    if (is_bfloat16) {
      static_cast<__nv_bfloat162*>(rows)[at / 2] = __floats2bfloat162_rn(low, high);
    } else {
      static_cast<__half2*>(rows)[at / 2] = __floats2half2_rn(low, high);
    }
  }
};

// Scales a tile's largest element to between 2^14 and 2^15: underflow starts at 2^-39 of it.
CKD_DEVICE float scale_to_store(float largest) {
  constexpr float TOP = 32768, SMALLEST = 1e-30f;
  return TOP / power_of_2_above(fmaxf(largest, SMALLEST));
}

// The maximum of x >= 0 over the block's threads. `of_warps` is shared memory, one float for each
// warp, that no thread still uses.
CKD_DEVICE float max_of_block(float x, float* of_warps) {
  x = max_of_warp(x);
  if (lane_index() == 0) of_warps[warp_index()] = x;
  sync_block();
  for (int warp = 0; warp < THREADS / 32; ++warp) x = fmaxf(x, of_warps[warp]);
  return x;
}

// Writes dZ = factor (dN - (dN . n) n) / |z| of at most 64 rows to tile blockIdx.x of `out`, and
// overwrites dN, whose rows are `stride` apart; `tops` is shared memory of a float for each warp.
CKD_DEVICE void through_norm_of_tile(float* gradient, int stride, const __half* n,
                                     const float* inverse, int rows, int ld, float factor,
                                     float* tops, const ScaledGradient& out) {
  float top = 0;
  for (int r = warp_index(); r < rows; r += THREADS / 32) {
    auto* d = reinterpret_cast<float2*>(gradient + static_cast<std::int64_t>(r) * stride);
    const auto* unit = reinterpret_cast<const __half2*>(n + static_cast<std::int64_t>(r) * ld);
    float along = 0, squares = 0;
    for (int w = lane_index(); w < ld / 2; w += 32) {
      const float2 x = d[w], y = __half22float2(unit[w]);
      along += x.x * y.x + x.y * y.y;
      squares += y.x * y.x + y.y * y.y;
    }
    along = coefficient(sum_of_warp(along), sum_of_warp(squares));
    const float of_row = inverse[r] * factor;
    for (int w = lane_index(); w < ld / 2; w += 32) {
      float2 x = d[w];
      const float2 y = __half22float2(unit[w]);
      x.x = (x.x - along * y.x) * of_row;
      x.y = (x.y - along * y.y) * of_row;
      top = fmaxf(top, fmaxf(fabsf(x.x), fabsf(x.y)));
      d[w] = x;
    }
  }
  // The barrier in max_of_block also makes all rows of dZ visible.
  const float to_store = scale_to_store(max_of_block(top, tops));
  if (threadIdx.x == 0) out.scales[blockIdx.x] = 1 / to_store;
  const std::int64_t tile = blockIdx.x;
  for (int w = 2 * static_cast<int>(threadIdx.x); w < ld; w += 2 * THREADS) {
    float2 sum = {0, 0};
    for (int r = 0; r < rows; ++r) {
      const auto* d =
          reinterpret_cast<const float2*>(gradient + static_cast<std::int64_t>(r) * stride + w);
      const float2 x = *d;
      sum.x += x.x;
      sum.y += x.y;
      out.store_pair((tile * TILE + r) * ld + w, x.x * to_store, x.y * to_store);
    }
    if (out.column_sums != nullptr) {
      *reinterpret_cast<float2*>(out.column_sums + tile * ld + w) = sum;
    }
  }
}

// The same for all rows of dN [rows, ld], where the factor is the scale, or 1 if null.
static CKD_KERNEL void __launch_bounds__(THREADS)
    through_norm_scaled(float* gradient, const __half* n, const float* inverse, int rows, int ld,
                        const float* scale, ScaledGradient out) {
  CKD_SHARED(memory);
  Carve carve(memory);
  float* tops = carve.take<float>(THREADS / 32);
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * TILE;
  through_norm_of_tile(gradient + first * ld, ld, n + first * ld, inverse + first,
                       min(rows - static_cast<int>(first), TILE), ld,
                       scale == nullptr ? 1 : positive(scale), tops, out);
}

constexpr int GRADIENT_COLUMNS = 128, GRADIENT_STAGES = 3;
constexpr int GRADIENT_BYTES =
    GRADIENT_STAGES * carve_bytes<__half>(TILE * (TILE + GRADIENT_COLUMNS));

// parts [splits, W, D] (+)= dZ^T t and, unless null, column_parts [splits, W] (+)= the sums of the
// columns of dZ, for t [rows, D] of type S.
//
// A block owns 64 columns of dZ, 128 of t and one split of the rows, in steps of 64 rows: two are
// being copied while one is multiplied. A warp owns 32 x 64 of the sums. Traffic: t ceil(W / 64)
// times and dZ ceil(D / 128) times (from L2).
template <class T, class S, bool ALIGNED>
CKD_KERNEL void __launch_bounds__(THREADS, 2)
    weight_gradient(ScaledGradient left, int ld, int width, const S* right, std::int64_t stride,
                    int dim, int rows, float* parts, float* column_parts, bool add) {
  CKD_SHARED(memory);
  Carve carve(memory);
  T* left_data = carve.take<T>(GRADIENT_STAGES * TILE * TILE);
  T* right_data = carve.take<T>(GRADIENT_STAGES * TILE * GRADIENT_COLUMNS);
  const auto left_tile = [&](int step) {
    return Tile<T, TILE>{left_data + step % GRADIENT_STAGES * (TILE * TILE)};
  };
  const auto right_tile = [&](int step) {
    return Tile<T, GRADIENT_COLUMNS>{right_data +
                                     step % GRADIENT_STAGES * (TILE * GRADIENT_COLUMNS)};
  };
  const int a0 = static_cast<int>(blockIdx.x) * TILE;
  const int b0 = static_cast<int>(blockIdx.y) * GRADIENT_COLUMNS;
  const int split = static_cast<int>(blockIdx.z), splits = static_cast<int>(gridDim.z);
  const int tiles = (rows + TILE - 1) / TILE, each = (tiles + splits - 1) / splits;
  const int begin = split * each, end = min(begin + each, tiles);
  const auto load = [&](int tile) {
    if (tile < end) {
      left_tile(tile).copy(static_cast<const T*>(left.rows), ld, tile * TILE, rows, a0, ld);
      if constexpr (ALIGNED) {
        right_tile(tile).copy(right, stride, tile * TILE, rows, b0, dim);
      } else {
        right_tile(tile).convert(right, stride, tile * TILE, rows, b0, dim, 0, AsItIs());
      }
    }
    commit_copies();  // also an empty group: wait_copies counts groups
  };
  const int warp = warp_index(), lane = lane_index();
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 64;
  Sums<8> total[2];
  total[0].clear();
  total[1].clear();
  for (int i = 0; i < GRADIENT_STAGES - 1; ++i) load(begin + i);
  for (int tile = begin; tile < end; ++tile) {
    wait_copies<GRADIENT_STAGES - 2>();
    sync_block();  // this step has arrived, and the buffer of the one before is free
    load(tile + GRADIENT_STAGES - 1);
    const float scale = left.scales[tile];
    const auto of_left =
        left_tile(tile).lane_piece(lane % 8 + lane / 16 * 8, warp_row + lane / 8 % 2 * 8);
    const auto of_right = right_tile(tile).lane_piece(lane % 16, warp_column + lane / 16 * 8);
    Sums<8> part[2];
    part[0].clear();
    part[1].clear();
#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
      std::uint32_t a[2][4];
      load_matrix_transposed(a[0], of_left.at(k, 0));
      load_matrix_transposed(a[1], of_left.at(k, 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t b[4];
        load_matrix_transposed(b, of_right.at(k, 16 * n));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(part[m].at[2 * n], a[m], b[0], b[1]);
          multiply_add<T>(part[m].at[2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[m].at[n][e] += part[m].at[n][e] * scale;
      }
    }
  }
  float* sums = parts + static_cast<std::int64_t>(split) * width * dim;
  const bool aligned = has_aligned_pairs(sums, dim);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int a = a0 + warp_row + 16 * m + lane / 4 + 8 * h;
      if (a >= width) continue;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        store_columns(sums + static_cast<std::int64_t>(a) * dim, b0 + warp_column + own_column(n),
                      dim, aligned, add, {total[m].at[n][2 * h], total[m].at[n][2 * h + 1]});
      }
    }
  }
  const int w = a0 + static_cast<int>(threadIdx.x);
  if (column_parts == nullptr || blockIdx.y > 0 || threadIdx.x >= TILE || w >= width) return;
  float sum = 0;
  for (int tile = begin; tile < end; ++tile) {
    sum += left.column_sums[static_cast<std::int64_t>(tile) * ld + w];
  }
  float& out = column_parts[static_cast<std::int64_t>(split) * width + w];
  out = sum + (add ? out : 0.0f);
}

}  // namespace ckd::cuda

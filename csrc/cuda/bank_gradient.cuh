// The gradient of the contrastive cross-entropy for the bank's rows, from which that of the
// projection follows: G_ik = (g_i + h_i) p_ik, and at the target h p - g p_other, where nothing
// cancels.

#pragma once

#include "operands.cuh"
#include "shift.cuh"
#include "weight_gradient.cuh"

namespace ckd::cuda {

// a b, but never infinite, since infinity times a probability of 0 is NaN.
CKD_DEVICE float finite_product(float a, float b) {
  constexpr float MAX_FLOAT32 = 3.402823466e38f;
  const float product = a * b;
  return fabsf(product) > MAX_FLOAT32 ? copysignf(MAX_FLOAT32, product) : product;
}

// The factors of a tile's students in shared memory, double-buffered; 0 past the batch.
template <int ROWS>
struct TileFactors {
  static constexpr int ARRAYS = Factors::size, PIECE = 4;  // floats in 16 bytes
  static constexpr int SIZE = 2 * ARRAYS * ROWS;
  float* data;

  CKD_DEVICE const float* array(int step, int index) const {
    return data + (step % 2 * ARRAYS + index) * ROWS;
  }
  CKD_DEVICE const int* columns(int step) const {
    return reinterpret_cast<const int*>(array(step, Factors::column));
  }
  CKD_DEVICE void copy(const Factors& from, int first, int batch, int step) const {
    static_assert(ARRAYS * ROWS / PIECE <= THREADS, "one piece for each thread at most");
    const int thread = static_cast<int>(threadIdx.x);
    const int index = thread / (ROWS / PIECE), at = thread % (ROWS / PIECE) * PIECE;
    if (index >= ARRAYS) return;
    const int count = max(min(batch - first - at, PIECE), 0);
    const float* source = from.array(index) + (count > 0 ? first + at : 0);
    copy_async(shared_address(array(step, index) + at), source, count * 4);
  }
};

// Row length of dN in shared memory, padded so that rows begin in different memory banks.
template <int WIDTH>
constexpr int GRADIENT_STRIDE = WIDTH + 8;

template <int WIDTH, bool EXACT>
constexpr int bank_gradient_bytes() {
  constexpr int FACTORS = carve_bytes<float>(TileFactors<Operands<WIDTH, EXACT>::ROWS>::SIZE);
  constexpr int PRODUCTS = operands_bytes<WIDTH, EXACT>() + FACTORS;
  constexpr int GRADIENT = EXACT ? 0 : carve_bytes<float>(TILE * GRADIENT_STRIDE<WIDTH>);
  return (PRODUCTS > GRADIENT ? PRODUCTS : GRADIENT) + carve_bytes<float>(THREADS / 32);
}

// Bank-stationary: a block keeps 64 bank rows and streams the students past them. It writes
// dN = logit_scale sum_i G_i u_i for one block of the width (grid axis y) to gradient [rows, ld],
// or, if that is all of the width and one piece, dZ = (dN - (dN . n) n) / |z| to `scaled`, where dN
// includes the terms of `shifted`.
template <int WIDTH, bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    bank_gradient(ContrastiveCeBackward op, Students students, Factors factors, Chunk chunk,
                  float* gradient, ShiftTerms shifted, ScaledGradient scaled) {
  constexpr float SMALLEST = 1e-30f;
  constexpr int ROWS = Operands<WIDTH, EXACT>::ROWS;
  CKD_SHARED(memory);
  Carve carve(memory);
  Operands<WIDTH, EXACT> operands = take_operands<WIDTH, EXACT>(carve);
  const TileFactors<ROWS> of_tile = {carve.take<float>(TileFactors<ROWS>::SIZE)};
  float* sizes = carve.take<float>(THREADS / 32);
  const int k0 = static_cast<int>(blockIdx.x) * TILE, batch = students.batch;
  operands.stay_rows = chunk.n;
  operands.first_stay = k0;
  operands.stay_end = chunk.rows;
  operands.stream_rows = students.u;
  operands.stream_end = batch;
  operands.ld = students.ld;
  operands.own = static_cast<int>(blockIdx.y);
  const float tau = positive(op.in.logit_scale);
  const float to_base_2 = scale_to_base_2(op.in.logit_scale, product_factor(students.pieces));
  const bool smooth = op.targets.label_smoothing > 0;

  of_tile.copy(factors, 0, batch, 0);
  operands.begin(0);
  float size = SMALLEST;
  for (int i = static_cast<int>(threadIdx.x); i < batch; i += THREADS) {
    size = fmaxf(size, factors.array(Factors::size)[i]);
  }
  size = max_of_block(size, sizes);
  // G is multiplied by `lift`, a power of 2 up to 2^113, before it is rounded to float16. Half
  // precision adds log2(lift) to the exponent of p, which does not overflow except at a target,
  // whose G is set separately. Exact arithmetic multiplies by_p, since a larger exponent would cost
  // p digits; the product may overflow where every p is 0, hence finite_product.
  const float lift = LIFT / power_of_2_above(size), log2_lift = EXACT ? 0 : log2f(lift);

  const int first = static_cast<int>(chunk.first) + k0;  // the block's first row of the bank
  Sums<WIDTH / 8> total;
  total.clear();
  int step = 0;
  for (int i0 = 0; i0 < batch; i0 += ROWS, ++step) {
    Sums<ROWS / 8> g;
    g.clear();
    const auto tile =
        operands.next(g, i0, step, [&] { of_tile.copy(factors, i0 + ROWS, batch, step + 1); });
    const float* products = of_tile.array(step, Factors::product);
    const float* above = of_tile.array(step, Factors::above);
    const float* by_p = of_tile.array(step, Factors::by_p);
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = own_column(n) + e % 2;
        const float p = exp2_fast(fmaf(g.at[n][e] - products[j], to_base_2, log2_lift - above[j]));
        g.at[n][e] = (EXACT ? finite_product(by_p[j], lift) : by_p[j]) * p;
      }
    }
    const int* columns = of_tile.columns(step);
    bool has_target = false;
#pragma unroll
    for (int j = 0; j < ROWS; j += 32) {
      has_target |= in_tile(columns[j + lane_index()] - first, TILE);
    }
    if (any_of_warp(has_target)) {  // rare
      const float* at_target = of_tile.array(step, Factors::at_target);
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = own_column(n) + e % 2;
          if (columns[j] == first + own_row() + e / 2 * 8) g.at[n][e] = at_target[j] * lift;
        }
      }
    }
    if (smooth) {
      const float* by_all = of_tile.array(step, Factors::by_all);
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) g.at[n][e] -= by_all[own_column(n) + e % 2] * lift;
      }
    }
    add_product<EXACT>(total, g, tile);
    if constexpr (EXACT) {
      keep_rest(g);
      add_product<EXACT>(total, g, tile);
    }
  }

  const float up = tau / lift;
  const int ld = students.ld, first_column = operands.own * WIDTH;
  if (EXACT || operands.blocks() > 1) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = k0 + own_row() + 8 * h;
      if (row >= chunk.rows) continue;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int w = first_column + own_column(n) + e;
          if (w < ld)
            gradient[static_cast<std::int64_t>(row) * ld + w] = total.at[n][2 * h + e] * up;
        }
      }
    }
    return;
  }

  // The gradient through the norm, row by row, in the memory that the products no longer need.
  sync_block();
  Carve again(memory);
  float* d_n = again.take<float>(TILE * GRADIENT_STRIDE<WIDTH>);
  float* tops = again.take<float>(THREADS / 32);
#pragma unroll
  for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* at = d_n + (own_row() + 8 * h) * GRADIENT_STRIDE<WIDTH> + own_column(n);
      *reinterpret_cast<float2*>(at) = {total.at[n][2 * h], total.at[n][2 * h + 1]};
    }
  }
  sync_block();
  const int rows = min(chunk.rows - k0, TILE);
  float factor = up;
  if (shifted.sums != nullptr) {
    // `lift` is not derived from the terms of the shift, which it might make overflow.
    factor = 1;
    for (int r = warp_index(); r < rows; r += THREADS / 32) {
      const bool any = shifted.counts[k0 + r] > 0;
      auto* d = reinterpret_cast<float2*>(d_n + r * GRADIENT_STRIDE<WIDTH>);
      const auto* terms =
          reinterpret_cast<const float2*>(shifted.sums + static_cast<std::int64_t>(k0 + r) * ld);
      // A lane changes only the elements that it reads in through_norm_of_tile.
      for (int w = lane_index(); w < ld / 2; w += 32) {
        const float2 term = any ? terms[w] : float2{0, 0};
        d[w] = {fmaf(d[w].x, up, term.x), fmaf(d[w].y, up, term.y)};
      }
    }
  }
  through_norm_of_tile(d_n, GRADIENT_STRIDE<WIDTH>, chunk.n + static_cast<std::int64_t>(k0) * ld,
                       chunk.inverse + k0, rows, ld, factor, tops, scaled);
}

}  // namespace ckd::cuda

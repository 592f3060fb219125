// The backward of the contrastive cross-entropy for the bank's rows, from which the projection's
// gradient comes: G_ik = (g_i + h_i) p_ik, and at the target h p - g p_other, where nothing
// cancels.

#pragma once

#include "operands.cuh"

namespace ckd::cuda {

// What the bank's gradient needs of a student: G_ik = by_p p_ik - by_all, at the target at_target -
// by_all; zeros where no gradient comes from, since such rows may hold NaN.
struct Factors {
  int column = -1;  // the target's row of the bank, -1 where there is none
  float log2_sum = 0, by_p = 0, at_target = 0, by_all = 0;
  float size = 0;  // |g| p_other + |h|: what |G| is at most but at the target
};

CKD_DEVICE Factors factors_of(const ContrastiveCeBackward& op, std::int64_t i) {
  const std::int64_t y = load_target(op.targets, i, op.in.bank.count);
  const float g = by_nll(op, i, y >= 0), h = by_lse(op, i);
  const float smoothing = op.targets.label_smoothing;
  Factors f;
  f.column = static_cast<int>(y);
  if (g == 0 && h == 0) return f;
  const float other = op.p_other[i];
  f.log2_sum = op.lse[i] * LOG2E;
  f.by_p = g + h;
  f.at_target = h * (1 - other) - g * (other - smoothing);
  f.by_all = g * (smoothing / static_cast<float>(op.in.bank.count));
  f.size = fabsf(g) * fmaxf(other, smoothing) + fabsf(h);
  return f;
}

// Large where every row is confident: then it meets probabilities of 0, and 0 inf would be NaN.
CKD_DEVICE float finite_product(float a, float b) {
  const float product = a * b;
  constexpr float MAX_FLOAT32 = 3.402823466e38f;
  return fabsf(product) > MAX_FLOAT32 ? copysignf(MAX_FLOAT32, product) : product;
}

// Bank rows stand still, 64 to a block, and the students pass: dN = logit_scale sum_i G_i u_i for
// one block of the width (axis y), and where that is the whole width dZ = (dN - (dN . n) n) / |z|,
// whose maximum goes to `largest`. Every row is owned by one block.
template <int WIDTH, bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    bank_gradient(ContrastiveCeBackward op, Students students, Chunk chunk, float* gradient,
                  float* largest) {
  constexpr float SMALLEST = 1e-30f;
  constexpr int ROWS = Operands<WIDTH, EXACT>::ROWS;
  CKD_SHARED(memory);
  Carve carve(memory);
  Operands<WIDTH, EXACT> operands = take_operands<WIDTH, EXACT>(carve);
  int* columns = carve.take<int>(2 * ROWS);
  float* log2_sums = carve.take<float>(2 * ROWS);
  float* by_p = carve.take<float>(2 * ROWS);
  float* at_target = carve.take<float>(2 * ROWS);
  float* by_all = carve.take<float>(2 * ROWS);
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
  const float to_base_2 = tau * LOG2E * product_factor(students.pieces);
  const bool smooth = op.targets.label_smoothing > 0;

  operands.begin(0);
  float size = SMALLEST;
  for (int i = static_cast<int>(threadIdx.x); i < batch; i += THREADS) {
    size = fmaxf(size, factors_of(op, i).size);
  }
  size = max_of_warp(size);
  if (lane_index() == 0) sizes[warp_index()] = size;
  sync_block();
  for (int warp = 0; warp < THREADS / 32; ++warp) size = fmaxf(size, sizes[warp]);
  const float lift = LIFT / size;

  const auto load_factors = [&](int i0, int to) {
    const int j = static_cast<int>(threadIdx.x);
    if (j >= ROWS) return;
    const Factors f = i0 + j < batch ? factors_of(op, i0 + j) : Factors();
    columns[to * ROWS + j] = f.column;
    log2_sums[to * ROWS + j] = f.log2_sum;
    by_p[to * ROWS + j] = finite_product(f.by_p, lift);
    at_target[to * ROWS + j] = f.at_target * lift;
    by_all[to * ROWS + j] = f.by_all * lift;
  };

  const int own = static_cast<int>(chunk.first + k0) + own_row();
  Sums<WIDTH / 8> total;
  total.clear();
  load_factors(0, 0);
  int step = 0;
  for (int i0 = 0; i0 < batch; i0 += ROWS, ++step) {
    Sums<ROWS / 8> g;
    g.clear();
    const auto tile = operands.next(g, i0, step, [&] { load_factors(i0 + ROWS, (step + 1) % 2); });
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = step % 2 * ROWS + own_column(n) + e % 2;
        const float p = exp2_fast(g.at[n][e] * to_base_2 - log2_sums[j]);
        g.at[n][e] = columns[j] == own + e / 2 * 8 ? at_target[j] : by_p[j] * p;
        if (smooth) g.at[n][e] -= by_all[j];
      }
    }
    add_product<EXACT>(total, g, tile);
    if constexpr (EXACT) {
      keep_rest(g);
      add_product<EXACT>(total, g, tile);
    }
  }

  const float up = tau / lift;
  const bool whole = operands.blocks() == 1 && !EXACT;
  const int first_column = operands.own * WIDTH;
  float top = 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = k0 + own_row() + 8 * h;
    float along = 0, factor = up;
    if (whole) {
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          along += total.at[n][2 * h + e] *
                   widen(operands.stays.at(own_row() + 8 * h, own_column(n) + e));
        }
      }
      along = sum_of_row(along);
      factor *= row < chunk.rows ? chunk.inverse[row] : 0;
    }
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int w = own_column(n) + e;
        float d = total.at[n][2 * h + e];
        if (whole) d -= along * widen(operands.stays.at(own_row() + 8 * h, w));
        d *= factor;
        if (row < chunk.rows && first_column + w < students.ld) {
          gradient[static_cast<std::int64_t>(row) * students.ld + first_column + w] = d;
          top = fmaxf(top, fabsf(d));
        }
      }
    }
  }
  if (!whole) return;
  top = max_of_warp(top);
  if (lane_index() == 0) atomic_max(largest, top);
}

}  // namespace ckd::cuda

// The forward of the contrastive cross-entropy over unit rows: u of the students, n of a chunk of
// the bank, float16, rows `ld` apart with zeros behind the student's width.
//
//   l = logit_scale u . n     with the target left out: a = log sum_{k != y} exp l_k - l_y
//   nll = softplus(a)     p_other = sigmoid(a)     d nll / d (logit_scale u) = p_other (E' / Z' -
//   n_y)

#pragma once

#include "operands.cuh"

namespace ckd::cuda {

// What the forward keeps of each part of the bank.
struct PartSums {
  float*
      shift;  // [blocks, parts, batch] of the exponentials, to base 2; a copy for each block of W
  float* total;   // [parts, batch] sum over k != y of 2^(l - shift)
  float* values;  // [parts, batch, ld] the same, times n; null: not kept
};

// l_y and n_y of the students whose target is in the chunk; a warp for each student.
static CKD_KERNEL void __launch_bounds__(THREADS)
    find_targets(Students students, Chunk chunk, Targets targets, const float* scale,
                 float* l_target, __half* n_target) {
  const std::int64_t i = warp_row();
  if (i >= students.batch) return;
  const std::int64_t y = load_target(targets, i, chunk.bank_rows) - chunk.first;
  if (y < 0 || y >= chunk.rows) return;
  float dot = 0;
  for (int w = lane_index(); w < students.ld; w += 32) {
    const __half value = chunk.n[y * students.ld + w];
    n_target[i * students.ld + w] = value;
    dot += widen(students.u[i * students.ld + w]) * widen(value);
  }
  dot = sum_of_warp(dot);
  if (lane_index() == 0) l_target[i] = dot * product_factor(students.pieces) * positive(scale);
}

CKD_DEVICE int column_of(std::int64_t k, int columns) {
  return k >= 0 && k < columns ? static_cast<int>(k) : -1;
}

// Students stand still, 64 to a block, and the bank passes: sums over the rows of one part of a
// chunk (axis y), E' for one block of the width (axis z), added to those of the chunks before.
//
// Work: 2 B K W for the logits of each block of the width, 2 B K W for E', B K exponentials.
// Traffic: u once, n ceil(B / 64) times (from L2), the sums once. Everything but operands in
// float32.
template <int WIDTH, bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    softmax_sums(Students students, Chunk chunk, Targets targets, const float* scale,
                 PartSums out) {
  constexpr int ROWS = Operands<WIDTH, EXACT>::ROWS;
  CKD_SHARED(memory);
  Carve carve(memory);
  Operands<WIDTH, EXACT> operands = take_operands<WIDTH, EXACT>(carve);
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.x) * TILE;
  const std::int64_t part = blockIdx.y, parts = gridDim.y, batch = students.batch;
  const std::int64_t each = ((chunk.rows + parts - 1) / parts + TILE - 1) / TILE * TILE;
  const std::int64_t begin = part * each, end = smaller(begin + each, chunk.rows);
  operands.stay_rows = students.u;
  operands.first_stay = i0;
  operands.stay_end = batch;
  operands.stream_rows = chunk.n;
  operands.stream_end = end;
  operands.ld = students.ld;
  operands.own = static_cast<int>(blockIdx.z);
  const float tau = positive(scale), to_base_2 = tau * LOG2E * product_factor(students.pieces);
  float* shifts = out.shift + (blockIdx.z * parts + part) * batch;
  const int columns = students.ld - operands.own * WIDTH;

  std::int64_t y[2];
  float top[2], total[2];
  Sums<WIDTH / 8> values;
  values.clear();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const std::int64_t i = i0 + own_row() + 8 * h;
    y[h] = i < batch ? load_target(targets, i, chunk.bank_rows) - chunk.first : -1;
    top[h] = -tau * LOG2E;  // l >= -logit_scale
    total[h] = 0;
    if (chunk.first == 0 || i >= batch) continue;
    top[h] = shifts[i] + HEADROOM;
    // What was there before, in one of the four lanes of a row; the blocks of axis z but the first
    // must not look while that one writes.
    if (blockIdx.z == 0 && lane_index() % 4 == 0) total[h] = out.total[part * batch + i];
    if (out.values == nullptr) continue;
    const float* before = out.values + (part * batch + i) * students.ld + operands.own * WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int w = own_column(n) + e;
        if (w < columns) values.at[n][2 * h + e] = before[w];
      }
    }
  }

  if (begin < end) operands.begin(begin);
  int step = 0;
  for (std::int64_t k0 = begin; k0 < end; k0 += ROWS, ++step) {
    Sums<ROWS / 8> p;
    p.clear();
    const auto tile = operands.next(p, k0, step, [] {});
    float new_top[2] = {top[0], top[1]};
    // Columns of this tile: how many there are, and which are targets.
    const int rest = static_cast<int>(smaller(end - k0, ROWS));
    const int own[2] = {column_of(y[0] - k0, ROWS), column_of(y[1] - k0, ROWS)};
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = own_column(n) + e % 2;
        float& l = p.at[n][e];
        l = column < rest && column != own[e / 2] ? l * to_base_2 : -INFINITY;
        new_top[e / 2] = fmaxf(new_top[e / 2], l);
      }
    }
    float rescale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      new_top[h] = max_of_row(new_top[h]);
      rescale[h] = exp2_fast(top[h] - new_top[h]);
      top[h] = new_top[h];
      total[h] *= rescale[h];
    }
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p.at[n][e] = exp2_fast(p.at[n][e] - (top[e / 2] - HEADROOM));
        total[e / 2] += p.at[n][e];
      }
    }
    if (out.values == nullptr) continue;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) values.at[n][e] *= rescale[e / 2];
    }
    add_product(values, p, tile);
    if constexpr (EXACT) {
      keep_rest(p);
      add_product(values, p, tile);
    }
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] = sum_of_row(total[h]);
    const std::int64_t i = i0 + own_row() + 8 * h;
    if (i >= batch) continue;
    if (lane_index() % 4 == 0) {
      shifts[i] = top[h] - HEADROOM;
      if (blockIdx.z == 0) out.total[part * batch + i] = total[h];
    }
    if (out.values == nullptr) continue;
    float* after = out.values + (part * batch + i) * students.ld + operands.own * WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int w = own_column(n) + e;
        if (w < columns) after[w] = values.at[n][2 * h + e];
      }
    }
  }
}

// n_sum [parts, ld] (+)= the sums of the rows of n, a part of them to each block of axis y.
static CKD_KERNEL void __launch_bounds__(THREADS) sum_rows(Chunk chunk, int ld, float* n_sum) {
  const int w = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  if (w >= ld) return;
  float sum = chunk.first == 0 ? 0 : n_sum[blockIdx.y * ld + w];
  for (std::int64_t k = blockIdx.y; k < chunk.rows; k += gridDim.y) {
    sum += widen(chunk.n[k * ld + w]);
  }
  n_sum[blockIdx.y * ld + w] = sum;
}

// log(1 + exp(-x)) for x >= 0, exact when tiny too.
CKD_DEVICE float softplus_of_minus(float x) { return log1pf(expf(-x)); }

// The parts become one, and the students' results; a warp for each student.
static CKD_KERNEL void __launch_bounds__(THREADS)
    combine(ContrastiveCeForward op, Students students, PartSums sums, int parts,
            const float* l_target, const __half* n_target, const float* n_sum, int n_sum_parts) {
  const std::int64_t i = warp_row(), batch = students.batch;
  if (i >= batch) return;
  const int ld = students.ld, width = static_cast<int>(op.in.student.width), lane = lane_index();
  const std::int64_t bank_rows = op.in.bank.count;
  const int pieces = students.pieces, piece = ld / pieces;
  const float smoothing = op.targets.label_smoothing;
  float top = sums.shift[i], z = 0;
  for (int part = 1; part < parts; ++part) top = fmaxf(top, sums.shift[part * batch + i]);
  for (int part = 0; part < parts; ++part) {
    z += exp2f(sums.shift[part * batch + i] - top) * sums.total[part * batch + i];
  }
  const float log_other = (top + log2f(z)) / LOG2E;
  const bool has_target = load_target(op.targets, i, bank_rows) >= 0;
  const float l_y = has_target ? l_target[i] : 0;
  const float odds = log_other - l_y;  // -inf where the target is the whole bank
  const float small = expf(-fabsf(odds));
  const float other = has_target ? (odds < 0 ? small : 1) / (1 + small) : 1;
  float loss = (odds < 0 ? 0 : odds) + softplus_of_minus(fabsf(odds));
  const float lse = has_target ? l_y + loss : log_other;

  const auto mean_n = [&](int w) {
    float sum = 0;
    for (int part = 0; part < n_sum_parts; ++part) sum += n_sum[part * ld + w];
    return sum / static_cast<float>(bank_rows);
  };
  if (smoothing > 0) {
    float mean = 0;
    for (int w = lane; w < ld; w += 32) mean += widen(students.u[i * ld + w]) * mean_n(w);
    loss += smoothing *
            (l_y - positive(op.in.logit_scale) * product_factor(pieces) * sum_of_warp(mean));
  }
  if (lane == 0) {
    const bool ignored = op.targets.target[i] == op.targets.ignore_index;
    op.nll[i] = has_target ? loss : ignored ? 0 : nanf("");
    op.lse[i] = lse;
    op.p_other[i] = other;
  }
  if (sums.values == nullptr) return;
  const float inverse = z == 0 ? 0 : 1 / z;
  for (int w = lane; w < width; w += 32) {
    float n_other = 0;
    for (int part = 0; part < parts; ++part) {
      n_other += exp2f(sums.shift[part * batch + i] - top) *
                 bank_column(sums.values + (part * batch + i) * ld, w, piece, pieces);
    }
    n_other *= inverse;
    const float n_y = has_target ? bank_column(n_target + i * ld, w, piece, pieces) : 0;
    if (op.residual != nullptr) {
      float slope = other * (n_other - n_y);
      if (smoothing > 0) {
        const float low = pieces == 1 ? 0 : mean_n(2 * piece + w);
        slope += smoothing * (n_y - (mean_n(w) + low) / (pieces == 1 ? 1 : PIECE_SCALE));
      }
      op.residual[i * width + w] = has_target ? slope : 0;
    }
    if (op.attention != nullptr) {
      op.attention[i * width + w] = other * n_other + (1 - other) * n_y;
    }
  }
}

}  // namespace ckd::cuda

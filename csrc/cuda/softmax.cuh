// The forward of the contrastive cross-entropy over unit rows: u of the students, n of a chunk of
// the bank, float16, rows `ld` apart with zeros past the student's width.
//
//   l = logit_scale u . n     with the target left out: a = log sum_{k != y} exp l_k - l_y
//   nll = softplus(a)     p_other = sigmoid(a)
//   d nll / d (logit_scale u) = p_other (E' / Z' - n_y)
//
// The shift of weighted targets (shift.cuh) is linear in the logits and added to these at the end.

#pragma once

#include "operands.cuh"

namespace ckd::cuda {

// The forward's partial sums over each part of the bank.
struct PartSums {
  float* top;    // [blocks, parts, batch] the largest product u.n; a copy for each block of W
  float* total;  // [parts, batch] sum over k != y of 2^(HEADROOM + l - that of top), l to base 2
  float* of_target;  // [batch] the product with the target's row
  float* values;     // [parts, batch, ld] the same, times n; null: not kept
};

// Copies n_y of students whose target is in the chunk to n_target [batch, ld]; a warp for each.
static CKD_KERNEL void __launch_bounds__(THREADS)
    keep_targets(Students students, Chunk chunk, Targets targets, __half* n_target) {
  const std::int64_t i = warp_row();
  if (i >= students.batch) return;
  const std::int64_t y = row_of_chunk(load_target(targets, i, chunk.bank_rows), chunk);
  if (y < 0) return;
  for (int w = lane_index(); w < students.ld; w += 32) {
    n_target[i * students.ld + w] = chunk.n[y * students.ld + w];
  }
}

// Student-stationary: a block keeps 64 students and streams one part of a chunk (grid axis y) past
// them. Its sums, and E' of one block of the width (axis z), are added to those of earlier chunks.
//
// Work: 2 B K W for the logits of each block of the width, 2 B K W for E', B K exponentials.
// Traffic: u once, n ceil(B / 64) times (from L2), the sums once. All but the operands in float32.
template <int WIDTH, bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS, 1)
    softmax_sums(Students students, Chunk chunk, Targets targets, const float* scale,
                 PartSums out) {
  constexpr int ROWS = Operands<WIDTH, EXACT>::ROWS;
  CKD_SHARED(memory);
  Carve carve(memory);
  Operands<WIDTH, EXACT> operands = take_operands<WIDTH, EXACT>(carve);
  const int i0 = static_cast<int>(blockIdx.x) * TILE, batch = students.batch;
  const int part = static_cast<int>(blockIdx.y), parts = static_cast<int>(gridDim.y);
  const int each = ((chunk.rows + parts - 1) / parts + TILE - 1) / TILE * TILE;
  const int begin = part * each, end = min(begin + each, chunk.rows);
  operands.stay_rows = students.u;
  operands.first_stay = i0;
  operands.stay_end = batch;
  operands.stream_rows = chunk.n;
  operands.stream_end = end;
  operands.ld = students.ld;
  operands.own = static_cast<int>(blockIdx.z);
  // Exponents are counted from the largest product and not from the largest logit: differences of
  // close products are exact, whatever the scale.
  const float to_base_2 = scale_to_base_2(scale, product_factor(students.pieces));
  const float slack = SLACK / to_base_2;
  float* tops = out.top + static_cast<std::int64_t>(operands.own * parts + part) * batch;
  const int columns = students.ld - operands.own * WIDTH;

  int y[2];  // the targets' rows of the chunk, -1 for targets elsewhere
  float top[2], total[2];
  Sums<WIDTH / 8> values;
  values.clear();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = i0 + own_row() + 8 * h;
    y[h] = i < batch ? row_of_chunk(load_target(targets, i, chunk.bank_rows), chunk) : -1;
    // Starts below every product, or at the maximum of earlier chunks: sums scale down.
    top[h] = chunk.first == 0 || i >= batch ? NO_COSINE / product_factor(students.pieces) : tops[i];
    total[h] = 0;
  }

  if (begin < end) operands.begin(begin);
  int step = 0;
  for (int k0 = begin; k0 < end; k0 += ROWS, ++step) {
    Sums<ROWS / 8> p;
    p.clear();
    const auto tile = operands.next(p, k0, step, [] {});
    // Masks columns past the end and targets, which few tiles have.
    const int rest = end - k0, own[2] = {y[0] - k0, y[1] - k0};
    if (rest < ROWS || in_tile(own[0], ROWS) || in_tile(own[1], ROWS)) {
#pragma unroll
      for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = own_column(n) + e % 2;
          if (column == own[e / 2] && blockIdx.z == 0) {
            out.of_target[i0 + own_row() + e / 2 * 8] = p.at[n][e];
          }
          if (column >= rest || column == own[e / 2]) p.at[n][e] = -INFINITY;
        }
      }
    }
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[e / 2] = fmaxf(largest[e / 2], p.at[n][e]);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) largest[h] = max_of_row(largest[h]);
    // Sums are scaled down only when an exponential would exceed 2^(HEADROOM + SLACK).
    if (any_of_warp(largest[0] - top[0] > slack || largest[1] - top[1] > slack)) {
      float rescale[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float new_top = fmaxf(top[h], largest[h]);
        rescale[h] = exp2_fast((top[h] - new_top) * to_base_2);
        top[h] = new_top;
        total[h] *= rescale[h];
      }
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) values.at[n][e] *= rescale[e / 2];
      }
    }
#pragma unroll
    for (int n = 0; n < ROWS / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        p.at[n][e] = exp2_fast(fmaf(p.at[n][e] - top[e / 2], to_base_2, HEADROOM));
        total[e / 2] += p.at[n][e];
      }
    }
    if (out.values == nullptr) continue;
    add_product<EXACT>(values, p, tile);
    if constexpr (EXACT) {
      keep_rest(p);
      add_product<EXACT>(values, p, tile);
    }
  }

  // The chunk's sums began at zero, since tensor cores truncate; those of earlier chunks are added.
  float of_before[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int i = i0 + own_row() + 8 * h;
    const bool is_first = chunk.first == 0 || i >= batch;
    of_before[h] = is_first ? 0 : exp2_fast((tops[i] - top[h]) * to_base_2);
  }
  sync_warp();  // the four lanes of a row have read its top, which one of them overwrites
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] = sum_of_row(total[h]);
    const int i = i0 + own_row() + 8 * h;
    if (i >= batch) continue;
    if (lane_index() % 4 == 0) {
      tops[i] = top[h];
      if (blockIdx.z == 0) {
        float& out_total = out.total[static_cast<std::int64_t>(part) * batch + i];
        out_total = total[h] + (chunk.first == 0 ? 0 : out_total * of_before[h]);
      }
    }
    if (out.values == nullptr) continue;
    float* row = out.values + (static_cast<std::int64_t>(part) * batch + i) * students.ld +
                 operands.own * WIDTH;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n) {
      if (8 * n >= columns) break;  // `columns` is a multiple of 16
      float2* pair = reinterpret_cast<float2*>(row + own_column(n));
      float2 sum = {values.at[n][2 * h], values.at[n][2 * h + 1]};
      if (chunk.first > 0) {
        sum.x += pair->x * of_before[h];
        sum.y += pair->y * of_before[h];
      }
      *pair = sum;
    }
  }
}

// n_sum [parts, ld] (+)= the sums of rows of n: those with row % parts == part (grid axis y).
static CKD_KERNEL void __launch_bounds__(THREADS) sum_rows(Chunk chunk, int ld, float* n_sum) {
  const int w = static_cast<int>(blockIdx.x * THREADS + threadIdx.x);
  if (w >= ld) return;
  float sum = chunk.first == 0 ? 0 : n_sum[blockIdx.y * ld + w];
  for (std::int64_t k = blockIdx.y; k < chunk.rows; k += gridDim.y) {
    sum += widen(chunk.n[k * ld + w]);
  }
  n_sum[blockIdx.y * ld + w] = sum;
}

// log(1 + exp(-x)) for x >= 0, accurate for tiny results too.
CKD_DEVICE float softplus_of_minus(float x) { return log1pf(expf(-x)); }

// n_y of the students: bank rows if the bank is one chunk, else the copies of keep_targets.
struct TargetRows {
  const __half* rows;
  bool is_bank;

  CKD_DEVICE const __half* of(std::int64_t i, std::int64_t y, int ld) const {
    return rows + (is_bank ? y : i) * ld;
  }
};

// Up to this scale the target's product is computed again with a sum in float32. Above it, it is as
// tensor cores computed it, so that rows equal to the target's share its softmax.
constexpr float MAX_EXACT_SCALE = 1024;

// Combines the partial sums of student i and writes its results; for one warp.
template <bool SHIFTED>
CKD_DEVICE void combine_row(const ContrastiveCeForward& op, const Students& students,
                            const PartSums& sums, int parts, TargetRows n_target,
                            const float* n_sum, int n_sum_parts, const float* n_shift,
                            std::int64_t i) {
  const std::int64_t batch = students.batch, bank_rows = op.in.bank.count;
  const int ld = students.ld, width = static_cast<int>(op.in.student.width), lane = lane_index();
  const int pieces = students.pieces, piece = ld / pieces;
  const float smoothing = op.targets.label_smoothing;
  const float scale = positive(op.in.logit_scale), to_logit = scale * product_factor(pieces);
  const float to_base_2 = scale_to_base_2(op.in.logit_scale, product_factor(pieces));
  float top = sums.top[i], z = 0;
  for (int part = 1; part < parts; ++part) top = fmaxf(top, sums.top[part * batch + i]);
  const auto share = [&](int part) {
    return exp2f((sums.top[part * batch + i] - top) * to_base_2);
  };
  for (int part = 0; part < parts; ++part) z += share(part) * sums.total[part * batch + i];
  const float log_z = (log2f(z) - HEADROOM) / LOG2E;
  const std::int64_t y = load_target(op.targets, i, bank_rows);
  const bool has_target = y >= 0;
  const __half *u = students.u + i * ld, *n_y = n_target.of(i, has_target ? y : 0, ld);
  float dot = 0;
  for (int w = lane; has_target && w < ld; w += 32) dot += widen(u[w]) * widen(n_y[w]);
  dot = sum_of_warp(dot);
  const float product = has_target && scale > MAX_EXACT_SCALE ? sums.of_target[i] : dot;
  const float l_y = product * to_logit;
  // -inf where the target is the whole bank.
  const float odds = (top - product) * to_logit + log_z;
  const float small = expf(-fabsf(odds));
  const float other = has_target ? (odds < 0 ? small : 1) / (1 + small) : 1;
  const float rest = softplus_of_minus(fabsf(odds));
  float loss = (odds < 0 ? 0 : odds) + rest;
  const float lse = has_target ? l_y + loss : top * to_logit + log_z;

  const auto mean_n = [&](int w) {
    float sum = 0;
    for (int part = 0; part < n_sum_parts; ++part) sum += n_sum[part * ld + w];
    return sum / static_cast<float>(bank_rows);
  };
  if (smoothing > 0) {
    float mean = 0;
    for (int w = lane; w < ld; w += 32) mean += widen(u[w]) * mean_n(w);
    loss += smoothing * (l_y - to_logit * sum_of_warp(mean));
  }
  if constexpr (SHIFTED) {
    float along = 0;
    for (int w = lane; w < piece; w += 32) {
      along += student_column(u, w, piece, pieces) * n_shift[i * piece + w];
    }
    loss -= scale * sum_of_warp(along);
  }
  if (lane == 0) {
    const bool ignored = op.targets.target[i] == op.targets.ignore_index;
    op.nll[i] = has_target ? loss : ignored ? 0 : nanf("");
    op.lse[i] = lse;
    op.p_other[i] = other;
    if (op.reference != nullptr) {
      const bool is_target = has_target && odds < 0;  // the largest product is the target's
      op.reference[i] = is_target ? product : top;
      op.reference[batch + i] = ((is_target ? 0 : log_z) + (has_target ? rest : 0)) * LOG2E;
    }
  }
  if (sums.values == nullptr) return;
  const float inverse = z == 0 ? 0 : 1 / z;
  for (int w = lane; w < width; w += 32) {
    float n_other = 0;
    for (int part = 0; part < parts; ++part) {
      n_other += share(part) * bank_column(sums.values + (part * batch + i) * ld, w, piece, pieces);
    }
    n_other *= inverse;
    const float target = has_target ? bank_column(n_y, w, piece, pieces) : 0;
    if (op.residual != nullptr) {
      float slope = other * (n_other - target);
      if (smoothing > 0) {
        const float low = pieces == 1 ? 0 : mean_n(2 * piece + w);
        slope += smoothing * (target - (mean_n(w) + low) / (pieces == 1 ? 1 : PIECE_SCALE));
      }
      if constexpr (SHIFTED) slope -= n_shift[i * piece + w];
      op.residual[i * width + w] = has_target ? slope : 0;
    }
    if (op.attention != nullptr) {
      op.attention[i * width + w] = other * n_other + (1 - other) * target;
    }
  }
}

constexpr int COMBINE_BYTES = carve_bytes<float>(THREADS / 32) + 2 * carve_bytes<int>(THREADS / 32);

// The results of the students, a warp for each; then the block that arrives last sums the losses (a
// small part of the work), always in the same order. n_shift: that of shift.cuh, if SHIFTED.
template <bool SHIFTED>
CKD_KERNEL void __launch_bounds__(THREADS)
    combine(ContrastiveCeForward op, Students students, PartSums sums, int parts,
            TargetRows n_target, const float* n_sum, int n_sum_parts, const float* n_shift,
            int* arrived) {
  const std::int64_t own = warp_row(), batch = students.batch;
  if (own < batch) {
    combine_row<SHIFTED>(op, students, sums, parts, n_target, n_sum, n_sum_parts, n_shift, own);
  }
  if (op.loss == nullptr) return;

  CKD_SHARED(memory);
  Carve carve(memory);
  float* losses = carve.take<float>(THREADS / 32);
  int* counts = carve.take<int>(THREADS / 32);
  int* last = carve.take<int>(THREADS / 32);
  const int thread = static_cast<int>(threadIdx.x);
  sync_block();  // the losses of this block are written
  if (thread == 0) *last = arrive(arrived) == static_cast<int>(gridDim.x) - 1;
  sync_block();
  if (*last == 0) return;
  double long_sum = 0;  // in double, since it has B / THREADS terms
  int kept = 0;
  for (std::int64_t i = thread; i < batch; i += THREADS) {
    long_sum += static_cast<double>(op.nll[i]);
    kept += op.targets.target[i] != op.targets.ignore_index;
  }
  float sum = sum_of_warp(static_cast<float>(long_sum));
  for (int mask = 16; mask > 0; mask /= 2) kept += shuffle_xor(kept, mask);
  if (lane_index() == 0) losses[warp_index()] = sum, counts[warp_index()] = kept;
  sync_block();
  if (thread != 0) return;
  for (int warp = 1; warp < THREADS / 32; ++warp) sum += losses[warp], kept += counts[warp];
  const float rows = static_cast<float>(kept > 0 ? kept : 1);
  *op.loss = op.kept == nullptr ? sum : sum / rows;
  if (op.kept != nullptr) *op.kept = rows;
}

}  // namespace ckd::cuda

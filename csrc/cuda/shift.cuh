// The shift of weighted targets (arguments.h). It is linear in the logits:
//
//   n_shift_i = sum_m shift_im n_{rows_im}
//   nll_i -= logit_scale u_i . n_shift_i      d nll_i / d (logit_scale u_i) -= n_shift_i
//   dN_k -= logit_scale sum g_i shift_im u_i  over the entries (i, m) with rows_im = k
//
// A warp computes each of these sums of unit rows, in float32 and always in the same order.
// Traffic: a row, and its low piece, for each entry.

#pragma once

#include "operands.cuh"

namespace ckd::cuda {

struct WeightedRow {
  float weight;
  int row;
};

// Shared memory for sum_of_rows, and a warp's part of it.
constexpr int SUM_OF_ROWS_BYTES = carve_bytes<WeightedRow>(THREADS);
CKD_DEVICE WeightedRow* rows_of_warp(Carve carve) {
  return carve.take<WeightedRow>(THREADS) + 32 * warp_index();
}

// The columns of sum_e weight_e row_e over entries begin <= e < end, computed by one warp: calls
// use(w, sum) for each even column w, with the sums of columns w and w + 1. In exact arithmetic a
// row's pieces are added, of which number `low` is the small one.
//
// Each lane evaluates entry(e) for another e and stores it in `shared` for the other lanes. The
// rows of AT_ONCE entries are loaded together, since a load takes far longer than its use. After
// the last entry row 0 is added with weight 0: if it holds NaN, all results are NaN anyway.
template <bool EXACT, class Entry, class Use>
CKD_DEVICE void sum_of_rows(const __half* rows, int ld, int low, int begin, int end,
                            const Entry& entry, WeightedRow* shared, const Use& use) {
  constexpr int PAIRS = 4, AT_ONCE = EXACT ? 4 : 8;
  constexpr float FACTOR = EXACT ? 1 / PIECE_SCALE : 1;
  const int piece = EXACT ? ld / 3 : ld, lane = lane_index();
  const auto pair_at = [](const __half* at) {
    return __half22float2(*reinterpret_cast<const __half2*>(at));
  };
  for (int first = 0; first < piece; first += 64 * PAIRS) {
    float2 sums[PAIRS] = {};
    for (int e = begin; e < end; e += 32) {
      const WeightedRow own = e + lane < end ? entry(e + lane) : WeightedRow{0, 0};
      if (!any_of_warp(own.weight != 0)) continue;
      shared[lane] = own;
      sync_warp();
      for (int at = 0; at < min(end - e, 32); at += AT_ONCE) {
        float2 x[AT_ONCE][PAIRS];
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const __half* row = rows + static_cast<std::int64_t>(shared[at + j].row) * ld;
#pragma unroll
          for (int p = 0; p < PAIRS; ++p) {
            const int w = first + 64 * p + 2 * lane;
            const __half* high = row + (w < piece ? w : 0);
            x[j][p] = pair_at(high);
            if constexpr (EXACT) {
              const float2 rest = pair_at(high + low * piece);
              x[j][p].x += rest.x;
              x[j][p].y += rest.y;
            }
          }
        }
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          const float weight = shared[at + j].weight;
#pragma unroll
          for (int p = 0; p < PAIRS; ++p) {
            sums[p].x = fmaf(weight, x[j][p].x, sums[p].x);
            sums[p].y = fmaf(weight, x[j][p].y, sums[p].y);
          }
        }
      }
      sync_warp();  // all lanes have read `shared`
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int w = first + 64 * p + 2 * lane;
      if (w < piece) use(w, float2{sums[p].x * FACTOR, sums[p].y * FACTOR});
    }
  }
}

// n_shift [batch, piece] (+)= the terms of the entries whose rows are in the chunk; a warp for each
// student.
template <bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS)
    add_shifted_rows(Students students, Chunk chunk, Targets targets, float* n_shift) {
  CKD_SHARED(memory);
  WeightedRow* shared = rows_of_warp(Carve(memory));
  const std::int64_t i = warp_row();
  if (i >= students.batch) return;
  const int begin = static_cast<int>(i) * targets.shift_count;
  float* own = n_shift + i * (students.ld / students.pieces);
  const auto entry = [&](int e) -> WeightedRow {
    const int row = row_of_chunk(targets.shift_rows[e], chunk);
    const float value = targets.shift[e];
    return {row < 0 ? 0 : value, row < 0 ? 0 : row};
  };
  sum_of_rows<EXACT>(chunk.n, students.ld, 2, begin, begin + targets.shift_count, entry, shared,
                     [&](int w, float2 sum) {
                       float2& to = *reinterpret_cast<float2*>(own + w);
                       if (chunk.first > 0) sum.x += to.x, sum.y += to.y;
                       to = sum;
                     });
}

// The shift's terms of dN for the rows of a chunk.
struct ShiftTerms {
  float* sums;  // [rows, ld], unwritten for rows without entries; null: there is no shift
  int* counts;  // [rows] of the entries
};

// The number of elements of the sorted array that are below k.
CKD_DEVICE int count_below(const int* sorted, int count, int k) {
  int low = 0;
  while (low < count) {
    const int middle = low + (count - low) / 2;
    if (sorted[middle] < k) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

// Writes the shift's terms of dN to `out` or, if that is null, adds them to dN [rows, ld], the
// first piece, as bank_gradient writes it. A warp for each bank row of the chunk.
template <bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS)
    shift_gradient(ContrastiveCeBackward op, Students students, Chunk chunk, float* d_n,
                   ShiftTerms out) {
  CKD_SHARED(memory);
  WeightedRow* shared = rows_of_warp(Carve(memory));
  const std::int64_t row = warp_row();
  if (row >= chunk.rows) return;
  const int all = students.batch * op.targets.shift_count;
  const int k = static_cast<int>(chunk.first + row);
  const int* sorted = op.shift_order.rows;
  const int begin = count_below(sorted, all, k);
  int end = begin;
  if (begin < all && sorted[begin] == k) end += count_below(sorted + begin, all - begin, k + 1);
  const bool separate = out.sums != nullptr;
  if (separate && lane_index() == 0) out.counts[row] = end - begin;
  if (begin == end) return;
  const auto entry = [&](int at) -> WeightedRow {
    const int e = static_cast<int>(op.shift_order.entries[at]), i = e / op.targets.shift_count;
    const bool has_target = load_target(op.targets, i, chunk.bank_rows) >= 0;
    return {-by_nll(op, i, has_target) * op.targets.shift[e], i};
  };
  const float factor = positive(op.in.logit_scale) * (EXACT ? PIECE_SCALE : 1);
  float* own = (separate ? out.sums : d_n) + row * students.ld;
  sum_of_rows<EXACT>(students.u, students.ld, 1, begin, end, entry, shared, [&](int w, float2 sum) {
    float2& to = *reinterpret_cast<float2*>(own + w);
    const float2 before = separate ? float2{0, 0} : to;
    to = {fmaf(sum.x, factor, before.x), fmaf(sum.y, factor, before.y)};
  });
}

}  // namespace ckd::cuda

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

// Calls use(w, sum) for each even column w of a piece, where sum are columns w and w + 1 of
// sum_e weight_e row_e over the entries `begin` to `end`, given by entry(e); for one warp. `rows`
// have `ld` columns; their pieces, of which the last small one is `low`, are added.
//
// The rows of AT_ONCE entries are loaded together, since a load takes far longer than its use.
// Entries of weight 0 are added like others: one row of NaN makes all results NaN anyway.
template <bool EXACT, class Entry, class Use>
CKD_DEVICE void sum_of_rows(const __half* rows, int ld, int low, std::int64_t begin,
                            std::int64_t end, const Entry& entry, const Use& use) {
  constexpr int PAIRS = 4, AT_ONCE = EXACT ? 4 : 8;
  const int piece = EXACT ? ld / 3 : ld, lane = lane_index();
  for (int first = 2 * lane; first < piece; first += 64 * PAIRS) {
    float2 sums[PAIRS] = {};
    for (std::int64_t e = begin; e < end; e += AT_ONCE) {
      WeightedRow of[AT_ONCE];
      bool any = false;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        of[j] = e + j < end ? entry(e + j) : WeightedRow{0, 0};
        any |= of[j].weight != 0;
      }
      if (!any) continue;
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const __half* row = rows + static_cast<std::int64_t>(of[j].row) * ld;
#pragma unroll
        for (int p = 0; p < PAIRS; ++p) {
          const int w = first + 64 * p;
          if (w >= piece) break;
          float2 x = __half22float2(*reinterpret_cast<const __half2*>(row + w));
          if constexpr (EXACT) {
            const float2 rest =
                __half22float2(*reinterpret_cast<const __half2*>(row + low * piece + w));
            x.x += rest.x;
            x.y += rest.y;
          }
          sums[p].x = fmaf(of[j].weight, x.x, sums[p].x);
          sums[p].y = fmaf(of[j].weight, x.y, sums[p].y);
        }
      }
    }
    constexpr float FACTOR = EXACT ? 1 / PIECE_SCALE : 1;
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
      const int w = first + 64 * p;
      if (w < piece) use(w, float2{sums[p].x * FACTOR, sums[p].y * FACTOR});
    }
  }
}

// n_shift [batch, piece] (+)= the terms of the entries whose rows are in the chunk; a warp for each
// student.
template <bool EXACT>
CKD_KERNEL void __launch_bounds__(THREADS)
    add_shifted_rows(Students students, Chunk chunk, Targets targets, float* n_shift) {
  const std::int64_t i = warp_row(), count = targets.shift_count;
  if (i >= students.batch) return;
  float* own = n_shift + i * (students.ld / students.pieces);
  const auto entry = [&](std::int64_t e) -> WeightedRow {
    const int row = row_of_chunk(targets.shift_rows[e], chunk);
    const float value = targets.shift[e];
    return {row < 0 ? 0 : value, row < 0 ? 0 : row};
  };
  sum_of_rows<EXACT>(chunk.n, students.ld, 2, i * count, (i + 1) * count, entry,
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
CKD_DEVICE std::int64_t count_below(const int* sorted, std::int64_t count, int k) {
  std::int64_t low = 0;
  while (low < count) {
    const std::int64_t middle = (low + count) / 2;
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
  const std::int64_t row = warp_row();
  if (row >= chunk.rows) return;
  const std::int64_t count = op.targets.shift_count, all = students.batch * count;
  const int k = static_cast<int>(chunk.first + row);
  const int* sorted = op.shift_order.rows;
  const std::int64_t begin = count_below(sorted, all, k);
  std::int64_t end = begin;
  if (begin < all && sorted[begin] == k) end += count_below(sorted + begin, all - begin, k + 1);
  const bool separate = out.sums != nullptr;
  if (separate && lane_index() == 0) out.counts[row] = static_cast<int>(end - begin);
  if (begin == end) return;
  const auto entry = [&](std::int64_t at) -> WeightedRow {
    const std::int64_t e = op.shift_order.entries[at], i = e / count;
    const bool has_target = load_target(op.targets, i, chunk.bank_rows) >= 0;
    return {-by_nll(op, i, has_target) * op.targets.shift[e], static_cast<int>(i)};
  };
  const float factor = positive(op.in.logit_scale) * (EXACT ? PIECE_SCALE : 1);
  float* own = (separate ? out.sums : d_n) + row * students.ld;
  sum_of_rows<EXACT>(students.u, students.ld, 1, begin, end, entry, [&](int w, float2 sum) {
    float2& to = *reinterpret_cast<float2*>(own + w);
    const float2 before = separate ? float2{0, 0} : to;
    to = {fmaf(sum.x, factor, before.x), fmaf(sum.y, factor, before.y)};
  });
}

}  // namespace ckd::cuda

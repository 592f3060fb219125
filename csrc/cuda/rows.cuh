// Kernels with one warp for each row: norms, and gradients through them. Bound by memory.
//
// A row whose norm is below MIN_NORM counts as zero, one whose norm overflows float32 is NaN; 1 /
// norm is 0 and NaN for them.

#pragma once

#include "tile.cuh"

namespace ckd::cuda {

constexpr int ROWS_PER_BLOCK = THREADS / 32;

CKD_DEVICE std::int64_t warp_row() {
  return static_cast<std::int64_t>(blockIdx.x) * ROWS_PER_BLOCK + warp_index();
}

CKD_DEVICE float sum_of_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
CKD_DEVICE float max_of_warp(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

CKD_DEVICE float inverse_of(float norm) {
  constexpr float MIN_NORM = 1e-6f, MAX_FLOAT32 = 3.402823466e38f;
  if (norm < MIN_NORM) return 0;
  return norm <= MAX_FLOAT32 ? 1 / norm : nanf("");
}

// x / norm: with x * inverse, rows of one element would not be exactly +-1.
CKD_DEVICE float divide(float x, float norm, float inverse) {
  const float quotient = x * inverse;
  return fmaf(fmaf(-quotient, norm, x), inverse, quotient);
}

// The coefficient of x in the projection of d on x, for along = d . x and squares = x . x. Unit
// rows are rounded: division by their squares removes all of d along them, however large that is.
CKD_DEVICE float coefficient(float along, float squares) {
  return squares == 0 ? 0 : along / squares;
}

// The layout of unit rows in memory. With pieces a row is three times as long: high, low, high for
// students and high, high, low for the bank, so that their product is high high + low high + high
// low. Pieces are multiplied by PIECE_SCALE, so that low ones are not subnormal.
enum class Layout { plain, student_pieces, bank_pieces };
constexpr float PIECE_SCALE = 64;

// The factor that removes PIECE_SCALE from the product of a student's row and a bank row.
CKD_DEVICE float product_factor(int pieces) {
  return pieces == 1 ? 1 : 1 / (PIECE_SCALE * PIECE_SCALE);
}

// Column w, its pieces added, of a bank row (or a sum of them) of `pieces` x `width` columns.
template <class T>
CKD_DEVICE float bank_column(const T* row, int w, int width, int pieces) {
  if (pieces == 1) return widen(row[w]);
  return (widen(row[w]) + widen(row[2 * width + w])) / PIECE_SCALE;
}

// The same of a student's row.
CKD_DEVICE float student_column(const __half* row, int w, int width, int pieces) {
  if (pieces == 1) return widen(row[w]);
  return (widen(row[w]) + widen(row[width + w])) / PIECE_SCALE;
}

// Writes a unit row: x / norm, with zeros past the width of x; all zeros if not `used`.
template <class T>
CKD_DEVICE void write_unit_row(const T* x, int width, float norm, bool used, __half* to, int ld,
                               Layout layout) {
  const float inverse = inverse_of(norm);
  for (int w = lane_index(); w < ld; w += 32) {
    const float from = used && w < width ? widen(x[w]) : 0.0f;
    if (layout == Layout::plain) {
      to[w] = __float2half_rn(from * inverse);
      continue;
    }
    const float value = used ? divide(from, norm, inverse) : 0.0f;
    const __half high = piece_of<__half>(value * PIECE_SCALE, 0);
    const __half low = piece_of<__half>(value * PIECE_SCALE, 1);
    to[w] = high;
    to[ld + w] = layout == Layout::student_pieces ? low : high;
    to[2 * ld + w] = layout == Layout::student_pieces ? high : low;
  }
}

// unit [rows, ld] = x / |x|, [rows, 3 ld] with pieces; inverse [rows] = 1 / |x|, or null.
template <class T>
struct UnitRows {
  const T* x;
  std::int64_t stride, rows;
  int width;
  __half* unit;
  int ld;
  Layout layout;
  float* inverse;

  CKD_DEVICE void write(std::int64_t row) const {
    if (row >= rows) return;
    const T* from = x + row * stride;
    float sum = 0;
    for (int w = lane_index(); w < width; w += 32) {
      const float value = widen(from[w]);
      sum += value * value;
    }
    const float norm = sqrtf(sum_of_warp(sum));
    const std::int64_t length = layout == Layout::plain ? ld : 3 * ld;
    write_unit_row(from, width, norm, true, unit + row * length, ld, layout);
    if (inverse != nullptr && lane_index() == 0) inverse[row] = inverse_of(norm);
  }
};

// 32-bit words to be set to 0 for a later kernel of the call.
struct Cleared {
  std::uint32_t* words;
  int count;

  CKD_DEVICE void clear() const {
    if (blockIdx.x != 0) return;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += THREADS) words[i] = 0;
  }
};

template <class T>
CKD_KERNEL void __launch_bounds__(THREADS) unit_rows(UnitRows<T> of) {
  of.write(warp_row());
}

// Unit rows of the students, by the first blocks of the grid, and of the bank.
template <class S, class Z>
CKD_KERNEL void __launch_bounds__(THREADS)
    unit_rows_of_both(UnitRows<S> students, UnitRows<Z> bank, Cleared cleared) {
  cleared.clear();
  const std::int64_t blocks = (students.rows + ROWS_PER_BLOCK - 1) / ROWS_PER_BLOCK;
  const std::int64_t row = warp_row();
  if (blockIdx.x < blocks) {
    students.write(row);
  } else {
    bank.write(row - blocks * ROWS_PER_BLOCK);
  }
}

// Overwrites the first ld columns of dN [rows, pieces ld] with dZ = scale (dN - (dN . n) n) / |z|,
// where a null scale is 1, and raises `largest` to the maximum of |dZ|. Columns of dN are those of
// the students' pieces: high and low ones are added.
static CKD_KERNEL void __launch_bounds__(THREADS)
    through_norm(float* gradient, const __half* n, const float* inverse, std::int64_t rows, int ld,
                 int pieces, const float* scale, float* largest) {
  const std::int64_t row = warp_row();
  if (row >= rows) return;
  float* d = gradient + row * pieces * ld;
  const __half* unit = n + row * pieces * ld;
  float along = 0, squares = 0, top = 0;
  for (int w = lane_index(); w < ld; w += 32) {
    if (pieces > 1) d[w] = (d[w] + d[ld + w]) / PIECE_SCALE;
    const float u = bank_column(unit, w, ld, pieces);
    along += d[w] * u;
    squares += u * u;
  }
  along = coefficient(sum_of_warp(along), sum_of_warp(squares));
  const float factor = inverse[row] * (scale == nullptr ? 1 : positive(scale));
  for (int w = lane_index(); w < ld; w += 32) {
    d[w] = (d[w] - along * bank_column(unit, w, ld, pieces)) * factor;
    top = fmaxf(top, fabsf(d[w]));
  }
  top = max_of_warp(top);
  if (lane_index() == 0) atomic_max(largest, top);
}

// d loss / d nll and d loss / d lse of a row.
CKD_DEVICE float by_nll(const ContrastiveCeBackward& op, std::int64_t i, bool has_target) {
  if (op.d_nll == nullptr || !has_target) return 0;
  return op.d_nll[i * op.d_nll_stride] / (op.kept == nullptr ? 1 : *op.kept);
}
CKD_DEVICE float by_lse(const ContrastiveCeBackward& op, std::int64_t i) {
  return op.d_lse == nullptr ? 0 : op.d_lse[i * op.d_lse_stride];
}

// Factors of G for each student, in arrays of [batch]: G_ik = by_p p_ik - by_all, at the target
// at_target - by_all; p_ik = 2^(log2(e) logit_scale (u.n - product) - above), with products as in
// ContrastiveCeForward::reference. 0 for rows without gradient, which may hold NaN.
struct Factors {
  enum Array { column, product, above, by_p, at_target, by_all, size, ARRAYS };
  float* data;  // null: not computed
  int stride;   // a multiple of 4, so that each array is aligned to 16 bytes

  CKD_DEVICE float* array(int index) const {
    return data + static_cast<std::int64_t>(index) * stride;
  }
  CKD_DEVICE void write(const ContrastiveCeBackward& op, std::int64_t i, float g, float h) const {
    const float smoothing = op.targets.label_smoothing;
    const bool busy = g != 0 || h != 0;
    const float other = busy ? op.p_other[i] : 0;
    // The target's row of the bank, -1 without a target.
    const std::int64_t y = load_target(op.targets, i, op.in.bank.count);
    reinterpret_cast<int*>(array(column))[i] = static_cast<int>(y);
    const bool has_reference = op.reference != nullptr;
    array(product)[i] = busy && has_reference ? op.reference[i] : 0;
    array(above)[i] = !busy           ? 0
                      : has_reference ? op.reference[op.in.student.count + i]
                                      : op.lse[i] * LOG2E;
    array(by_p)[i] = g + h;
    array(at_target)[i] = h * (1 - other) - g * (other - smoothing);
    array(by_all)[i] = g * (smoothing / static_cast<float>(op.in.bank.count));
    // An upper bound of |G|, except at the target.
    array(size)[i] = fabsf(g) * fmaxf(other, smoothing) + fabsf(h);
  }
  // Zeros after the last student, since copies of 16 bytes read them.
  CKD_DEVICE void clear_padding(std::int64_t students) const {
    for (int index = 0; index < ARRAYS; ++index) {
      for (std::int64_t i = students; i < stride; ++i) array(index)[i] = 0;
    }
  }
};

// d_student and `along`, whose sum is d logit_scale, from slope = g residual + h attention; and,
// unless u is null, u [rows, ld] and the factors. All 0 for rows without gradient, even if NaN.
template <class T>
CKD_KERNEL void __launch_bounds__(THREADS)
    student_rows(ContrastiveCeBackward op, __half* u, int ld, Layout layout, Factors factors,
                 Cleared cleared) {
  cleared.clear();
  const std::int64_t row = warp_row(), rows = op.in.student.count;
  if (row >= rows) return;
  const int width = static_cast<int>(op.in.student.width), lane = lane_index();
  const bool has_target =
      op.targets.target == nullptr || load_target(op.targets, row, op.in.bank.count) >= 0;
  const float g = by_nll(op, row, has_target), h = by_lse(op, row);
  const bool busy = g != 0 || h != 0, wants_slope = op.d_student != nullptr || op.along != nullptr;
  const T* student = static_cast<const T*>(op.in.student.data) + row * op.in.student.stride;
  const auto slope = [&](int w) {
    float value = g == 0 ? 0 : g * op.residual[row * width + w];
    if (h != 0) value += h * op.attention[row * width + w];
    return value;
  };
  float squares = 0, product = 0;
  for (int w = lane; busy && w < width; w += 32) {
    const float s = widen(student[w]);
    squares += s * s;
    if (wants_slope) product += s * slope(w);
  }
  squares = sum_of_warp(squares), product = sum_of_warp(product);
  const float norm = sqrtf(squares), inverse = inverse_of(norm);
  if (u != nullptr) {
    const std::int64_t length = layout == Layout::plain ? ld : 3 * ld;
    write_unit_row(student, width, norm, busy, u + row * length, ld, layout);
    if (lane == 0) factors.write(op, row, g, h);
    if (lane == 0 && row == rows - 1) factors.clear_padding(rows);
  }
  if (lane == 0 && op.along != nullptr) op.along[row] = product * inverse;
  if (op.d_student == nullptr) return;
  const float factor = positive(op.in.logit_scale) * inverse;
  const float along = coefficient(product, squares);
  T* out = static_cast<T*>(op.d_student) + row * width;
  for (int w = lane; w < width; w += 32) {
    out[w] = narrow<T>(busy ? factor * (slope(w) - along * widen(student[w])) : 0);
  }
}

}  // namespace ckd::cuda

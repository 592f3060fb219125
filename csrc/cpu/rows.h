// Student rows: unit vectors u = s / |s|, and gradients through this normalisation.

#pragma once

#include <cmath>

#include "buffer.h"
#include "pack.h"
#include "parallel.h"

namespace ckd::cpu::CKD_TIER {

// Students per work item when they are packed, finished or given their gradient: less than a panel,
// so that a batch of one panel, which is not rare, occupies two threads.
constexpr std::int64_t FEW_STUDENTS = PANEL / 2;
constexpr float MIN_NORM = 1e-6f;  // rows with a smaller norm count as zero

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A row's norm, NaN where it is not finite, and its inverse, 0 for a row that counts as zero.
struct Norm {
  explicit Norm(float sum_of_squares) : value(std::sqrt(sum_of_squares)) {
    if (!(value <= 3.40282347e38f)) value = __builtin_nanf("");
    inverse = value < MIN_NORM ? 0 : 1 / value;
  }
  float value, inverse;
};

// x / norm, correctly rounded: with x * inverse, rows of one element would not be exactly +-1.
template <class X, class N>
inline X divide(X x, N norm, N inverse) {
#if defined(__FMA__)
  const X quotient = x * inverse;
  return quotient + (x - quotient * norm) * inverse;
#else
  (void)inverse;
  return x / norm;
#endif
}

// In double, since an error in a row's norm or in its target's logit affects all of the row.
inline double dot(const float* x, const float* y, std::int64_t n) {
  constexpr int WAYS = 16;  // independent sums, so that compilers can vectorise
  double sum[WAYS] = {};
  std::int64_t i = 0;
  for (; i + WAYS <= n; i += WAYS) {
    for (int j = 0; j < WAYS; ++j) {
      sum[j] += static_cast<double>(x[i + j]) * static_cast<double>(y[i + j]);
    }
  }
  for (; i < n; ++i) sum[i % WAYS] += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int width = WAYS / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sum[j] += sum[j + width];
  }
  return sum[0];
}

template <class Type>
class Students {
 public:
  using Word = typename Type::Word;

  explicit Students(const Inputs& in) : in_(in), norm_(in.batch), inverse_(in.batch) {
    for (std::int64_t i = 0; i < in.batch; ++i) {
      const Norm norm(static_cast<float>(dot(row(i), row(i), in.student_dim)));
      norm_[i] = norm.value, inverse_[i] = norm.inverse;
    }
  }

  std::int64_t panels() const { return ceil_div(in_.batch, PANEL); }

  float inverse(std::int64_t i) const { return inverse_[i]; }
  // Makes the row count as zero, even if it holds NaN.
  void drop(std::int64_t i) { inverse_[i] = 0; }

  void unit_row(std::int64_t i, float* out) const {
    const float norm = norm_[i], inverse = inverse_[i], *s = row(i);
    for (std::int64_t w = 0; w < in_.student_dim; ++w) {
      out[w] = inverse == 0 ? 0 : divide(s[w], norm, inverse);
    }
  }

  // Packs unit rows [first, first + count) along W: out [count, words(W)], zeros past the batch.
  void pack_rows(std::int64_t first, std::int64_t count, Word* out, float* row_scratch) const {
    const std::int64_t width = words<Type>(in_.student_dim);
    for (std::int64_t i = first; i < first + count; ++i, out += width) {
      if (i >= in_.batch) {
        std::memset(out, 0, static_cast<std::size_t>(width) * sizeof(Word));
        continue;
      }
      unit_row(i, row_scratch);
      to_words(row_scratch, in_.student_dim, out);
    }
  }

  // d_student (or null) from slope = d loss / d (logit_scale u); returns row i's d_logit_scale.
  double row_gradient(std::int64_t i, const float* slope, float* unit, float* d_student) const {
    const std::int64_t n = in_.student_dim;
    unit_row(i, unit);
    const double along = dot(unit, slope, n);
    const float part = static_cast<float>(along);
    const float scale = in_.logit_scale * inverse_[i];
    if (d_student != nullptr) {
      for (std::int64_t w = 0; w < n; ++w) {
        d_student[w] = scale == 0 ? 0 : scale * (slope[w] - part * unit[w]);
      }
    }
    return scale == 0 ? 0.0 : along;
  }

 private:
  const float* row(std::int64_t i) const { return in_.student + i * in_.student_dim; }

  const Inputs& in_;
  Buffer<float> norm_, inverse_;
};

// How many threads are worth starting for this number of multiply-adds.
inline int useful_threads(const Inputs& in, double multiply_adds) {
  const double worth = 1 + multiply_adds / 1e6;  // about 10 us for each thread
  return worth < in.threads ? static_cast<int>(worth) : in.threads;
}

// d_student and d_logit_scale, each may be null; slope(i, out) writes d loss / d (logit_scale u).
template <class Type, class Slope>
void row_gradients(const Students<Type>& students, const Inputs& in, const Slope& slope,
                   float* d_student, float* d_logit_scale) {
  const std::int64_t dim = in.student_dim;
  Buffer<float> rows(in.threads * 2 * dim);
  Buffer<double> along(in.batch);
  // Bound by memory: an element takes as long as about 64 multiply-adds.
  const double work = 64 * static_cast<double>(in.batch) * static_cast<double>(dim);
  parallel(useful_threads(in, work), [&](int thread) {
    float* at = rows + thread * 2 * dim;
    each(ceil_div(in.batch, FEW_STUDENTS), [&](std::int64_t part) {
      const std::int64_t i0 = part * FEW_STUDENTS;
      for (std::int64_t i = i0; i < smaller(i0 + FEW_STUDENTS, in.batch); ++i) {
        slope(i, at);
        along[i] =
            students.row_gradient(i, at, at + dim, d_student ? d_student + i * dim : nullptr);
      }
    });
  });
  if (d_logit_scale == nullptr) return;
  double sum = 0;
  for (std::int64_t i = 0; i < in.batch; ++i) sum += along[i];
  *d_logit_scale = static_cast<float>(sum);
}

}  // namespace ckd::cpu::CKD_TIER

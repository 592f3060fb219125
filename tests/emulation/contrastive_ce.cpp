// The CUDA kernels of the contrastive cross-entropy against plain double loops (docs/emulation.md),
// on exactly sized arrays, for builds with sanitizers.
//
//     contrastive_ce [small | wrong | verbose]
//
// Shapes lie on and beside the edges of tiles (64, or 32 streaming rows), blocks of the width (64,
// 128, 256), chunks and parts of the bank. `small` is for ThreadSanitizer, `wrong` makes every
// truth wrong, `verbose` prints every error. Exits with 1 and says what differs, or prints a hash
// of all results.

#include "cuda/contrastive_ce.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace ckd::cuda;

using Int = std::int64_t;
constexpr Element HALF = Element::float16, BFLOAT = Element::bfloat16, FLOAT = Element::float32;
constexpr Int IGNORE = -100, WHOLE = Int{1} << 40;
const double NaN = std::numeric_limits<double>::quiet_NaN();

// The number of multiprocessors that launches plan for: few, so that parts are few.
constexpr int PROCESSORS = 3;

double rounded(double x, Element element) {
  const float narrow = static_cast<float>(x);
  if (element == HALF) return __half2float(__float2half_rn(narrow));
  if (element == BFLOAT) return __bfloat162float(__float2bfloat16_rn(narrow));
  return narrow;
}

// Exactly `size` bytes, so that AddressSanitizer finds overruns, initialised as NaN.
class Bytes {
 public:
  explicit Bytes(Int size) : size_(size), data_(new unsigned char[static_cast<std::size_t>(size)]) {
    std::memset(data_.get(), 0xff, static_cast<std::size_t>(size));
  }
  template <class T>
  T* as() const {
    return size_ == 0 ? nullptr : reinterpret_cast<T*>(data_.get());
  }

 private:
  Int size_;
  std::unique_ptr<unsigned char[]> data_;
};

// Rows `stride` apart, `offset` elements into their memory, which ends with the last row. Elements
// are initialised as a NaN that no arithmetic gives, which shows those that a kernel does not write
// even if NaN is their right value.
class Matrix {
 public:
  Matrix(Element element, Int rows, Int width, Int stride, Int offset = 0)
      : element(element),
        rows(rows),
        width(width),
        stride(stride),
        offset_(offset),
        bytes_(rows * width == 0
                   ? 0
                   : (offset + (rows - 1) * stride + width) * static_cast<Int>(size())) {
    for (Int i = 0; i < rows; ++i) {
      for (Int j = 0; j < width; ++j) std::memcpy(place(i, j), &UNTOUCHED, size());
    }
  }

  double at(Int row, Int column) const {
    const void* from = place(row, column);
    if (element == FLOAT) return load<float>(from);
    return element == HALF ? __half2float(load<__half>(from))
                           : __bfloat162float(load<__nv_bfloat16>(from));
  }
  void set(Int row, Int column, double x) {
    const float narrow = static_cast<float>(x);
    void* to = place(row, column);
    if (element == FLOAT) {
      std::memcpy(to, &narrow, sizeof narrow);
    } else if (element == HALF) {
      const __half half = __float2half_rn(narrow);
      std::memcpy(to, &half, sizeof half);
    } else {
      const __nv_bfloat16 half = __float2bfloat16_rn(narrow);
      std::memcpy(to, &half, sizeof half);
    }
  }
  bool is_written(Int row, Int column) const {
    return std::memcmp(place(row, column), &UNTOUCHED, size()) != 0;
  }
  void fill(std::mt19937& random, double size) {
    std::normal_distribution<double> normal(0, size);
    for (Int i = 0; i < rows; ++i) {
      for (Int j = 0; j < width; ++j) set(i, j, normal(random));
    }
  }
  template <class T = void>
  T* data() const {
    return rows * width == 0 ? nullptr : static_cast<T*>(place(0, 0));
  }
  Rows as_rows() const { return {data(), element, rows, width, stride}; }

  const Element element;
  const Int rows, width, stride;

 private:
  template <class T>
  static T load(const void* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  std::size_t size() const { return element == FLOAT ? 4 : 2; }
  void* place(Int row, Int column) const {
    return bytes_.as<unsigned char>() +
           (offset_ + row * stride + column) * static_cast<Int>(size());
  }

  static constexpr std::uint32_t UNTOUCHED = 0xffadffad;  // NaN as float32 and as two 16-bit ones

  Int offset_;
  Bytes bytes_;
};

Matrix vector(Int count) { return Matrix(FLOAT, 1, count, count); }

struct Case {
  Int batch, bank_rows, dim, width;
  Element student = FLOAT, bank = HALF;
  bool projection = true, bias = true, cache = true;
  double smoothing = 0;
  bool lse_gradient = false;
  double scale = 14;
  bool exact = false;
  Int most_chunk_rows = WHOLE;
  Int bank_gap = 0, bank_offset = 0, student_gap = 0;  // elements
  int weight_parts = 1;
  bool in_pieces = false;  // also runs backwards of only some gradients
  bool odd_rows = false;   // a zero student, and NaN students without gradient
  bool climbing = false;   // logits rise from -scale to scale along the bank, for every student
  Int shifts = 0;          // entries of each student's shift
};

struct Problem {
  Problem(const Case& c, unsigned seed)
      : c(c),
        student(c.student, c.batch, c.width, c.width + c.student_gap),
        bank(c.bank, c.bank_rows, c.dim, c.dim + c.bank_gap, c.bank_offset),
        weight(c.exact          ? FLOAT
               : c.bank == HALF ? HALF
                                : BFLOAT,
               c.projection ? c.width : 0, c.dim,
               c.exact ? c.dim + 1 : (c.dim + 7) / 8 * 8),  // rows aligned to 16 bytes
        bias(vector(c.projection && c.bias ? c.width : 0)),
        scale(vector(1)),
        d_nll(vector(2 * c.batch - 1)),
        d_lse(vector(c.batch)),
        targets(static_cast<std::size_t>(c.batch)),
        shift_rows(static_cast<std::size_t>(c.batch * c.shifts)),
        shift(shift_rows.size()) {
    std::mt19937 random(seed);
    student.fill(random, 2);
    bank.fill(random, 1);
    weight.fill(random, 0.3);
    bias.fill(random, 0.3);
    scale.set(0, 0, c.scale);
    // Every other element is the gradient's: d_nll_stride is 2.
    d_nll.fill(random, 5e-2);
    d_lse.fill(random, 1e-3);
    for (Int i = 0; i < c.batch; ++i) {
      target(i) = static_cast<Int>(random()) % c.bank_rows;
      if (i % 7 == 3) target(i) = IGNORE;
      if (i % 7 == 5) target(i) = i % 2 == 0 ? -1 : c.bank_rows;  // out of range
      if (i % 5 == 4) d_lse.set(0, i, 0);
    }
    // The first and the last row of the bank are targets.
    if (c.batch > 2) target(0) = 0, target(2) = c.bank_rows - 1;
    fill_shift(random);
    for (Int k = 0; c.climbing && k < c.bank_rows; ++k) {
      const double cosine = 2 * static_cast<double>(k) / static_cast<double>(c.bank_rows) - 1;
      bank.set(k, 0, cosine);
      for (Int d = 1; d < c.dim; ++d) bank.set(k, d, 0);
      bank.set(k, 1 + k % (c.dim - 1), std::sqrt(1 - cosine * cosine));
    }
    for (Int i = 0; c.climbing && i < c.batch; ++i) student.set(i, 0, 40);
    if (!c.odd_rows) return;
    fill_row(0, 0);  // has a target and a gradient, and the loss log K
    fill_row(1, std::nan(""));
    d_nll.set(0, 2 * 1, 0);
    d_lse.set(0, 1, 0);
    fill_row(3, std::nan(""));  // ignored
    d_lse.set(0, 3, 0);
  }

  Int& target(Int i) { return targets[static_cast<std::size_t>(i)]; }
  Int target(Int i) const { return targets[static_cast<std::size_t>(i)]; }
  bool has_target(Int i) const { return target(i) >= 0 && target(i) < c.bank_rows; }
  double kept() const {
    Int rows = 0;
    for (Int y : targets) rows += y != IGNORE;
    return static_cast<double>(std::max<Int>(rows, 1));
  }
  double g(Int i) const { return has_target(i) ? d_nll.at(0, 2 * i) / kept() : 0; }
  double h(Int i) const { return c.lse_gradient ? d_lse.at(0, i) : 0; }

  Inputs inputs() const {
    return {student.as_rows(),  bank.as_rows(),      weight.data(), weight.stride,
            bias.data<float>(), scale.data<float>(), c.exact};
  }
  Targets op_targets() const {
    const float smoothing = static_cast<float>(c.smoothing);
    if (c.shifts == 0) return {targets.data(), IGNORE, smoothing};
    return {targets.data(),    IGNORE,       smoothing,
            shift_rows.data(), shift.data(), static_cast<int>(c.shifts)};
  }
  ShiftOrder shift_order() const { return {sorted_rows.data(), entries.data()}; }
  // Calls f(row, value) for the entries of student i.
  template <class F>
  void each_shift(Int i, const F& f) const {
    for (Int e = i * c.shifts; e < (i + 1) * c.shifts; ++e) {
      f(shift_rows[static_cast<std::size_t>(e)], shift[static_cast<std::size_t>(e)]);
    }
  }

  const Case c;
  Matrix student, bank, weight, bias, scale, d_nll, d_lse;
  std::vector<Int> targets, shift_rows, entries;
  std::vector<float> shift;
  std::vector<int> sorted_rows;

 private:
  // The target, and others with positive values, some of them 0. Rows may repeat.
  void fill_shift(std::mt19937& random) {
    for (std::size_t e = 0; e < shift.size(); ++e) {
      const Int i = static_cast<Int>(e) / c.shifts, m = static_cast<Int>(e) % c.shifts;
      if (!has_target(i)) continue;
      shift_rows[e] = m == 0 ? target(i) : static_cast<Int>(random()) % c.bank_rows;
      if (m == 0) continue;
      shift[e] = static_cast<float>(random() % 5) / static_cast<float>(8 * c.shifts);
      shift[e - static_cast<std::size_t>(m)] -= shift[e];
    }
    for (std::size_t e = 0; e < shift.size(); ++e) entries.push_back(static_cast<Int>(e));
    std::stable_sort(entries.begin(), entries.end(), [&](Int a, Int b) {
      return shift_rows[static_cast<std::size_t>(a)] < shift_rows[static_cast<std::size_t>(b)];
    });
    for (Int e : entries) {
      sorted_rows.push_back(static_cast<int>(shift_rows[static_cast<std::size_t>(e)]));
    }
  }
  void fill_row(Int i, double x) {
    for (Int w = 0; w < c.width; ++w) student.set(i, w, x);
  }
};

struct Table {
  Table(Int rows, Int width) : width(width), values(static_cast<std::size_t>(rows * width)) {}
  double& at(Int i, Int j) { return values[static_cast<std::size_t>(i * width + j)]; }
  double at(Int i, Int j) const { return values[static_cast<std::size_t>(i * width + j)]; }
  Int width;
  std::vector<double> values;
};

double length(const Table& rows, Int i) {
  double sum = 0;
  for (Int w = 0; w < rows.width; ++w) sum += rows.at(i, w) * rows.at(i, w);
  return std::sqrt(sum);
}

double dot(const Table& a, Int i, const Table& b, Int j) {
  double sum = 0;
  for (Int w = 0; w < a.width; ++w) sum += a.at(i, w) * b.at(j, w);
  return sum;
}

// Everything in double, from the formulae. Operands of products are rounded as the op documents: u
// and n to float16, the bank to the dtype of the projection. Otherwise rounding of a few components
// would show in the logits as errors of 1e-3, which hide real ones. Probabilities and gradients are
// not rounded, and nothing is with exact arithmetic.
struct Truth {
  explicit Truth(const Problem& p)
      : u(p.c.batch, p.c.width),
        n(p.c.bank_rows, p.c.width),
        probability(p.c.batch, p.c.bank_rows),
        nll(1, p.c.batch),
        loss(1, 1),
        sum(1, 1),
        kept(1, 1),
        lse(1, p.c.batch),
        p_other(1, p.c.batch),
        residual(p.c.batch, p.c.width),
        attention(p.c.batch, p.c.width),
        d_student(p.c.batch, p.c.width),
        along(1, p.c.batch),
        d_weight(p.c.width, p.c.dim),
        d_bias(1, p.c.width) {
    const Case& c = p.c;
    for (Int i = 0; i < c.batch; ++i) {
      for (Int w = 0; w < c.width; ++w) u.at(i, w) = p.student.at(i, w);
      const double norm = length(u, i);
      for (Int w = 0; w < c.width; ++w) {
        u.at(i, w) = norm < 1e-6 ? 0 : rounded(u.at(i, w) / norm, p.c.exact ? FLOAT : HALF);
      }
    }
    for (Int k = 0; k < c.bank_rows; ++k) {
      for (Int w = 0; w < c.width; ++w) n.at(k, w) = projected(p, k, w);
      norms.push_back(length(n, k));
      for (Int w = 0; w < c.width; ++w)
        n.at(k, w) = rounded(n.at(k, w) / norms.back(), p.c.exact ? FLOAT : HALF);
    }
    for (Int i = 0; i < c.batch; ++i) forward(p, i);
    for (double x : nll.values) sum.at(0, 0) += x;
    kept.at(0, 0) = p.kept();
    loss.at(0, 0) = sum.at(0, 0) / p.kept();
    for (Int i = 0; i < c.batch; ++i) of_student(p, i);
    for (Int k = 0; c.projection && k < c.bank_rows; ++k) of_projection(p, k);
  }

  static double teacher(const Problem& p, Int k, Int d) {
    return p.c.projection ? rounded(p.bank.at(k, d), p.weight.element) : p.bank.at(k, d);
  }
  static double projected(const Problem& p, Int k, Int w) {
    if (!p.c.projection) return p.bank.at(k, w);
    double z = p.bias.width > 0 ? p.bias.at(0, w) : 0;
    for (Int d = 0; d < p.c.dim; ++d) z += teacher(p, k, d) * p.weight.at(w, d);
    return z;
  }

  void forward(const Problem& p, Int i) {
    const Int rows = p.c.bank_rows, y = p.target(i);
    double top = -1e300, sum = 0, mean = 0, others = 0;
    for (Int k = 0; k < rows; ++k) {
      const double l = p.c.scale * dot(u, i, n, k);
      probability.at(i, k) = l;
      top = std::max(top, l);
      mean += l / static_cast<double>(rows);
    }
    const double l_y = p.has_target(i) ? probability.at(i, y) : 0;
    for (Int k = 0; k < rows; ++k) sum += std::exp(probability.at(i, k) - top);
    lse.at(0, i) = top + std::log(sum);
    for (Int k = 0; k < rows; ++k) {
      probability.at(i, k) = std::exp(probability.at(i, k) - lse.at(0, i));
      if (k != y) others += probability.at(i, k);
    }
    p_other.at(0, i) = p.has_target(i) ? others : 1;
    nll.at(0, i) = y == IGNORE ? 0 : NaN;
    if (p.has_target(i)) {
      nll.at(0, i) = lse.at(0, i) - (1 - p.c.smoothing) * l_y - p.c.smoothing * mean;
      p.each_shift(
          i, [&](Int k, double value) { nll.at(0, i) -= value * p.c.scale * dot(u, i, n, k); });
    }
    for (Int w = 0; w < p.c.width; ++w) {
      double expected = 0, average = 0;
      for (Int k = 0; k < rows; ++k) {
        expected += probability.at(i, k) * n.at(k, w);
        average += n.at(k, w) / static_cast<double>(rows);
      }
      attention.at(i, w) = expected;
      if (!p.has_target(i)) continue;
      residual.at(i, w) = expected - (1 - p.c.smoothing) * n.at(y, w) - p.c.smoothing * average;
      p.each_shift(i, [&](Int k, double value) { residual.at(i, w) -= value * n.at(k, w); });
    }
  }

  static bool is_busy(const Problem& p, Int i) { return p.g(i) != 0 || p.h(i) != 0; }

  // d loss / d l_ik.
  double of_logit(const Problem& p, Int i, Int k) const {
    const double uniform = p.c.smoothing / static_cast<double>(p.c.bank_rows);
    double wanted = uniform + (k == p.target(i) ? 1 - p.c.smoothing : 0);
    p.each_shift(i, [&](Int row, double value) { wanted += row == k ? value : 0; });
    return (p.g(i) + p.h(i)) * probability.at(i, k) - p.g(i) * wanted;
  }

  void of_student(const Problem& p, Int i) {
    if (!is_busy(p, i)) return;
    // As the kernel, from the student's row itself and not from the rounded u.
    Table row(1, p.c.width), slope(1, p.c.width);
    for (Int w = 0; w < p.c.width; ++w) {
      row.at(0, w) = p.student.at(i, w);
      for (Int k = 0; k < p.c.bank_rows; ++k) slope.at(0, w) += of_logit(p, i, k) * n.at(k, w);
    }
    const double norm = length(row, 0);
    if (norm < 1e-6) return;
    along.at(0, i) = dot(slope, 0, row, 0) / norm;
    for (Int w = 0; w < p.c.width; ++w) {
      const double through = slope.at(0, w) - along.at(0, i) * row.at(0, w) / norm;
      d_student.at(i, w) = p.c.scale * through / norm;
    }
  }

  void of_projection(const Problem& p, Int k) {
    Table d(1, p.c.width);
    for (Int i = 0; i < p.c.batch; ++i) {
      if (!is_busy(p, i)) continue;
      const double g = p.c.scale * of_logit(p, i, k);
      for (Int w = 0; w < p.c.width; ++w) d.at(0, w) += g * u.at(i, w);
    }
    const double shrink = dot(d, 0, n, k);
    for (Int w = 0; w < p.c.width; ++w) {
      const double z = (d.at(0, w) - shrink * n.at(k, w)) / norms[static_cast<std::size_t>(k)];
      d_bias.at(0, w) += z;
      for (Int e = 0; e < p.c.dim; ++e) d_weight.at(w, e) += z * teacher(p, k, e);
    }
  }

  Table u, n, probability, nll, loss, sum, kept, lse, p_other, residual, attention, d_student,
      along, d_weight, d_bias;
  std::vector<double> norms;
};

bool failed = false, wrong = false, verbose = false;

void complain(const char* what, const Case& c, const std::string& how) {
  failed = true;
  std::printf(
      "%s: %s at B=%ld K=%ld D=%ld W=%ld student=%d bank=%d projection=%d bias=%d cache=%d "
      "smoothing=%g lse_gradient=%d scale=%g chunk=%ld parts=%d exact=%d shifts=%ld\n",
      what, how.c_str(), c.batch, c.bank_rows, c.dim, c.width, static_cast<int>(c.student),
      static_cast<int>(c.bank), c.projection, c.bias, c.cache, c.smoothing, c.lse_gradient, c.scale,
      c.most_chunk_rows, c.weight_parts, c.exact, c.shifts);
}

// Of all results, in the order in which they are checked.
std::uint64_t hash = 14695981039346656037u;

void add_to_hash(double x) {
  std::uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  hash = (std::isnan(x) ? ~hash : hash ^ bits) * 1099511628211u;
}

// Compares the sum of `parts` stacked matrices with the truth: to `limit` of its norm, and each
// element to `limit` of the largest.
void check(const char* what, const Case& c, const Matrix& got, Table truth, double limit,
           Int parts = 1) {
  // Where the truth is zero, as with one bank row, so is the result but for rounding.
  constexpr double FLOOR = 1e-6;
  const Int columns = truth.width, count = static_cast<Int>(truth.values.size());
  if (wrong) {
    double largest = 0;
    for (double x : truth.values) largest = std::fmax(largest, std::fabs(x));
    const auto last = std::find_if(truth.values.rbegin(), truth.values.rend(),
                                   [](double x) { return !std::isnan(x); });
    if (last != truth.values.rend()) *last += 2 * limit * (largest + FLOOR);
  }
  double difference = 0, size = 0, most = 0, largest = 0;
  for (Int j = 0; j < count; ++j) {
    const double expected = truth.values[static_cast<std::size_t>(j)];
    double sum = 0;
    for (Int part = 0; part < parts; ++part) {
      const Int at = part * count + j;
      const Int row = at / got.width, column = at % got.width;
      if (!got.is_written(row, column)) {
        return complain(what, c, "element " + std::to_string(at) + " was not written");
      }
      sum += got.at(row, column);
      add_to_hash(got.at(row, column));
    }
    if (std::isnan(expected) != std::isnan(sum)) {
      return complain(what, c,
                      "element " + std::to_string(j / columns) + ", " +
                          std::to_string(j % columns) + " is " + std::to_string(sum) + ", not " +
                          std::to_string(expected));
    }
    if (std::isnan(expected)) continue;
    difference += (sum - expected) * (sum - expected);
    size += expected * expected;
    most = std::fmax(most, std::fabs(sum - expected));
    largest = std::fmax(largest, std::fabs(expected));
  }
  const double error = std::sqrt(difference) / (std::sqrt(size) + FLOOR);
  const double worst = most / (largest + FLOOR);
  if (verbose) std::printf("%-20s %.1e %.1e of %.0e\n", what, error, worst, limit);
  if (error <= limit && worst <= limit) return;
  complain(what, c, "error " + std::to_string(error) + ", of one element " + std::to_string(worst));
}

void check_launch(const char* what, const Case& c, int error) {
  if (error != 0) complain(what, c, "cudaError " + std::to_string(error));
}

// Exponentials, G and dZ are rounded to float16, with errors up to 2^-12 of each; dZ with bfloat16
// weights, and gradients of bfloat16 students, to bfloat16, 2^-9. The relative error of a sum of
// many is smaller, unless terms cancel, as those of d_bias do.
constexpr double HALF_LIMIT = 1e-3, CANCELLED_LIMIT = 5e-3, BFLOAT_LIMIT = 5e-3, EXACT_LIMIT = 1e-5;

double limit_of(const Case& c) { return c.exact ? EXACT_LIMIT : HALF_LIMIT; }

void forward(const Case& c, const ContrastiveCeForward& op) {
  const Bytes workspace(forward_workspace(op, PROCESSORS, c.most_chunk_rows));
  check_launch(
      "forward", c,
      contrastive_ce_forward(op, PROCESSORS, c.most_chunk_rows, workspace.as<void>(), nullptr));
}

void backward(const Case& c, const ContrastiveCeBackward& op) {
  const Bytes workspace(backward_workspace(op, PROCESSORS, c.most_chunk_rows));
  check_launch(
      "backward", c,
      contrastive_ce_backward(op, PROCESSORS, c.most_chunk_rows, workspace.as<void>(), nullptr));
}

// The results of a backward.
struct Gradients {
  explicit Gradients(const Case& c)
      : c(c),
        d_student(c.student, c.batch, c.width, c.width),
        along(vector(c.batch)),
        d_weight(FLOAT, c.weight_parts * (c.projection ? c.width : 0), c.dim, c.dim),
        d_bias(vector(c.bias ? d_weight.rows : 0)) {}

  void check_rows(const Truth& truth) const {
    check("d_student", c, d_student, truth.d_student,
          c.student == BFLOAT ? BFLOAT_LIMIT
          : c.student == HALF ? HALF_LIMIT
                              : limit_of(c));
    check("along", c, along, truth.along, limit_of(c));
  }
  void check_weight(const Truth& truth) const {
    if (!c.projection) return;
    check("d_weight", c, d_weight, truth.d_weight,
          c.bank == HALF || c.exact ? limit_of(c) : BFLOAT_LIMIT, c.weight_parts);
  }
  void check_bias(const Truth& truth) const {
    if (!c.projection || !c.bias) return;
    check("d_bias", c, d_bias, truth.d_bias, c.exact ? EXACT_LIMIT : CANCELLED_LIMIT,
          c.weight_parts);
  }

  const Case c;
  Matrix d_student, along, d_weight, d_bias;
};

void test(const Case& c, unsigned seed) {
  const Problem p(c, seed);
  const Truth truth(p);
  const Int padded = (c.width + 15) / 16 * 16;
  const Bytes cache(c.cache ? c.bank_rows * ((c.exact ? 3 : 1) * 2 * padded + 4) : 0);
  const Matrix reference = vector(2 * c.batch);
  const Matrix nll = vector(c.batch), lse = vector(c.batch), p_other = vector(c.batch);
  const Matrix residual(FLOAT, c.batch, c.width, c.width);
  const Matrix attention(FLOAT, c.lse_gradient ? c.batch : 0, c.width, c.width);
  const Matrix loss = vector(1), kept = vector(1);
  forward(c, {p.inputs(), p.op_targets(), cache.as<void>(), reference.data<float>(),
              nll.data<float>(), loss.data<float>(), kept.data<float>(), lse.data<float>(),
              p_other.data<float>(), residual.data<float>(), attention.data<float>()});
  check("nll", c, nll, truth.nll, limit_of(c));
  check("loss", c, loss, truth.loss, limit_of(c));
  check("kept", c, kept, truth.kept, limit_of(c));
  check("lse", c, lse, truth.lse, limit_of(c));
  check("p_other", c, p_other, truth.p_other, limit_of(c));
  check("residual", c, residual, truth.residual, limit_of(c));
  if (c.lse_gradient) check("attention", c, attention, truth.attention, limit_of(c));

  const float* d_lse = c.lse_gradient ? p.d_lse.data<float>() : nullptr;
  const Gradients all(c);
  const ContrastiveCeBackward op = {p.inputs(),
                                    p.op_targets(),
                                    p.shift_order(),
                                    cache.as<void>(),
                                    reference.data<float>(),
                                    p.d_nll.data<float>(),
                                    2,
                                    kept.data<float>(),
                                    d_lse,
                                    1,
                                    lse.data<float>(),
                                    p_other.data<float>(),
                                    residual.data<float>(),
                                    attention.data<float>(),
                                    all.d_student.data(),
                                    all.along.data<float>(),
                                    all.d_weight.data<float>(),
                                    all.d_bias.data<float>(),
                                    c.weight_parts};
  backward(c, op);
  all.check_rows(truth);
  all.check_weight(truth);
  all.check_bias(truth);
  if (!c.in_pieces) return;

  // Only some of the gradients, without arguments that they do not need.
  const Gradients some(c);
  ContrastiveCeBackward of_weight = op;
  of_weight.residual = of_weight.attention = nullptr;
  of_weight.d_student = of_weight.along = of_weight.d_bias = nullptr;
  of_weight.d_weight = some.d_weight.data<float>();
  backward(c, of_weight);
  some.check_weight(truth);
  ContrastiveCeBackward of_rows = op;
  of_rows.d_weight = of_rows.d_bias = nullptr;
  of_rows.d_student = some.d_student.data();
  of_rows.along = some.along.data<float>();
  backward(c, of_rows);
  some.check_rows(truth);
}

// The forward that keeps neither residual nor attention: one block for all of the width.
void test_loss_alone(const Case& c, unsigned seed) {
  const Problem p(c, seed);
  const Truth truth(p);
  const Matrix nll = vector(c.batch), lse = vector(c.batch), p_other = vector(c.batch);
  const Matrix sum = vector(1);
  forward(c, {p.inputs(), p.op_targets(), nullptr, nullptr, nll.data<float>(), sum.data<float>(),
              nullptr, lse.data<float>(), p_other.data<float>(), nullptr, nullptr});
  check("sum alone", c, sum, truth.sum, limit_of(c));
  check("nll alone", c, nll, truth.nll, limit_of(c));
  check("lse alone", c, lse, truth.lse, limit_of(c));
  check("p_other alone", c, p_other, truth.p_other, limit_of(c));
}

Case with(Case c, const std::function<void(Case&)>& change) {
  change(c);
  return c;
}

// Few blocks each, since ThreadSanitizer is slow; together they have several blocks, and use each
// buffer more than twice.
std::vector<Case> small_cases() {
  return {
      // Three steps of 32 students, and of 64 of the bank's dimension.
      with({65, 4, 130, 130}, [](Case& c) { c.shifts = 3; }),
      // Two blocks of the width, two chunks.
      with({2, 65, 9, 43},
           [](Case& c) { c.exact = c.lse_gradient = true, c.most_chunk_rows = 64, c.shifts = 9; }),
  };
}

std::vector<Case> all_cases() {
  return {
      {1, 1, 3, 2},
      {1, 10, 8, 16},
      with({70, 200, 40, 48},
           [](Case& c) { c.most_chunk_rows = 64, c.lse_gradient = true, c.shifts = 7; }),
      with({70, 130, 33, 64}, [](Case& c) { c.cache = false, c.smoothing = 0.1; }),
      with({65, 64, 72, 70}, [](Case& c) { c.bank = BFLOAT, c.weight_parts = 2; }),
      with({9, 200, 70, 128},
           [](Case& c) {
             c.bank = FLOAT, c.cache = false, c.most_chunk_rows = 64;
             c.bank_gap = 3, c.weight_parts = 3;
           }),
      with({33, 63, 65, 129}, [](Case& c) { c.bank_gap = 7, c.bias = false; }),
      with({66, 97, 16, 256},
           [](Case& c) {
             c.most_chunk_rows = 64, c.bank_offset = 1, c.odd_rows = c.lse_gradient = true;
             c.student = HALF, c.shifts = 4;
           }),
      with({5, 150, 20, 300},
           [](Case& c) {
             c.most_chunk_rows = 64, c.smoothing = 0.2, c.cache = false;
             c.lse_gradient = c.in_pieces = true, c.shifts = 40;
           }),
      // Three blocks of the width, of which the last has 16 columns.
      with({3, 40, 8, 513}, [](Case& c) { c.bank = BFLOAT; }),
      // Several parts of the bank, one of them empty in the second chunk.
      with({4, 1100, 5, 20},
           [](Case& c) { c.most_chunk_rows = 1024, c.weight_parts = 5, c.shifts = 300; }),
      // A sharp softmax: partial sums with maxima that differ, losses near 0.
      with({12, 140, 17, 40}, [](Case& c) { c.scale = 100, c.most_chunk_rows = 64, c.shifts = 2; }),
      // The running maximum lags behind, by less than 2 a tile and by more.
      with({9, 400, 24, 24}, [](Case& c) { c.projection = false, c.climbing = true, c.scale = 4; }),
      with({9, 400, 24, 24},
           [](Case& c) { c.projection = c.cache = false, c.climbing = true, c.scale = 40; }),
      // Exact arithmetic: one block of 64, one of 128, and two; every dtype of the bank.
      with({70, 70, 70, 16}, [](Case& c) { c.exact = true, c.smoothing = 0.1; }),
      with({35, 100, 20, 42},
           [](Case& c) {
             c.exact = c.lse_gradient = true, c.bank = FLOAT, c.bank_gap = 1, c.weight_parts = 2;
             c.most_chunk_rows = 64, c.shifts = 3;
           }),
      with({9, 70, 33, 60},
           [](Case& c) {
             c.exact = c.lse_gradient = c.in_pieces = true, c.bank = BFLOAT, c.cache = false;
             c.smoothing = 0.2, c.most_chunk_rows = 64, c.shifts = 9;
           }),
      with({33, 100, 50, 50},
           [](Case& c) {
             c.exact = c.odd_rows = true, c.projection = false, c.bank = FLOAT, c.student_gap = 1;
             c.scale = 100;
           }),
      // Without a projection.
      with({17, 100, 24, 24},
           [](Case& c) {
             c.projection = false, c.bank = FLOAT, c.student = BFLOAT, c.student_gap = 5;
           }),
      with({8, 130, 100, 100},
           [](Case& c) {
             c.projection = false, c.cache = false, c.most_chunk_rows = 64, c.odd_rows = true;
             c.bank_gap = 1, c.smoothing = 0.1, c.lse_gradient = true, c.shifts = 3;
           }),
  };
}

}  // namespace

int main(int argc, char** argv) {
  const std::string argument = argc > 1 ? argv[1] : "";
  wrong = argument == "wrong";
  verbose = argument == "verbose";
  unsigned seed = 0;
  const bool few = argument == "small" || wrong;
  for (const Case& c : few ? small_cases() : all_cases()) test(c, ++seed);
  if (!few) {
    test_loss_alone(with({5, 130, 9, 300}, [](Case& c) { c.most_chunk_rows = 64, c.shifts = 3; }),
                    ++seed);
  }
  if (!failed) std::printf("all right, %016llx\n", static_cast<unsigned long long>(hash));
  return failed ? 1 : 0;
}

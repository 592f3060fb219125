// The CPU kernels against plain double loops, on exactly sized arrays, for builds with sanitizers.
//
//     test_kernels TIER [small]
//
// Shapes lie on and beside the edges of panels (64), tiles and student blocks (256), chunks (1024)
// and blocks of the teacher's dimension (256, 512). `small` leaves out what takes long under
// ThreadSanitizer. Exits with 1 and says what differs.

#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu/tiers.h"

namespace {

using namespace ckd::cpu;

// An array of exactly n elements, so that AddressSanitizer finds overruns.
template <class T>
struct Exact {
  explicit Exact(std::int64_t n, T fill = T()) : size(n), data(new T[static_cast<std::size_t>(n)]) {
    for (std::int64_t i = 0; i < n; ++i) data[i] = fill;
  }
  T& operator[](std::int64_t i) { return data[i]; }
  T operator[](std::int64_t i) const { return data[i]; }
  T* get() const { return size == 0 ? nullptr : data.get(); }
  std::int64_t size;
  std::unique_ptr<T[]> data;
};

// A copy in read-only pages, at their end: a write or an overrun ends the program.
class ReadOnly {
 public:
  ReadOnly(const void* from, std::int64_t n)
      : size_(static_cast<std::size_t>(n)), mapped_((size_ + 4095) / 4096 * 4096) {
    if (n == 0) return;
    pages_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages_ == MAP_FAILED) std::abort();
    std::memcpy(get(), from, size_);
    mprotect(pages_, mapped_, PROT_READ);
  }
  ~ReadOnly() {
    if (size_ > 0) munmap(pages_, mapped_);
  }
  ReadOnly(const ReadOnly&) = delete;
  ReadOnly& operator=(const ReadOnly&) = delete;
  void* get() const {
    return size_ == 0 ? nullptr : static_cast<char*>(pages_) + (mapped_ - size_);
  }

 private:
  std::size_t size_, mapped_;
  void* pages_ = nullptr;
};

constexpr std::int64_t TARGETS = 5;  // of a student, where they are several

// Results begin as NaN, which shows elements that a kernel does not write.
const float NOTHING = std::nanf("");

struct Shape {
  std::int64_t batch, bank_rows, teacher_dim, student_dim;
  bool projection, bias, half;
  float logit_scale, smoothing;
};

std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// x rounded towards zero to a number of every Element: eight bits, and no exponent below -13.
float storable(float x) {
  const std::uint32_t bits = std::fabs(x) < 0x1p-13f ? 0 : bits_of(x) & 0xffff0000u;
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}

// The bits of such a number in the dtype `element`.
std::uint32_t stored_bits(float x, Element element) {
  const std::uint32_t bits = bits_of(x);
  if (element == Element::float32) return bits;
  if (element == Element::bfloat16 || bits == 0) return bits >> 16;
  return (bits >> 16 & 0x8000u) | ((bits >> 13 & 0x3ffffu) - (112u << 10));
}

struct Problem {
  // `gap` elements lie between rows of the bank.
  Problem(const Shape& shape, Element element, std::int64_t gap, unsigned seed)
      : shape(shape),
        element(element),
        stride(shape.teacher_dim + gap),
        stored(((shape.bank_rows - 1) * stride + shape.teacher_dim) * element_size()),
        student(shape.batch * shape.student_dim),
        bank(shape.bank_rows * shape.teacher_dim),
        weight(shape.projection ? shape.student_dim * shape.teacher_dim : 0),
        bias(shape.projection && shape.bias ? shape.student_dim : 0),
        target(shape.batch),
        shift_rows(shape.batch * TARGETS),
        shift(shape.batch * TARGETS) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (auto* x : {&student, &bank, &weight, &bias}) {
      for (std::int64_t i = 0; i < x->size; ++i) (*x)[i] = normal(random);
    }
    for (std::int64_t i = 0; i < bank.size; ++i) {
      bank[i] = storable(bank[i]);
      const std::uint32_t bits = stored_bits(bank[i], element);
      const std::int64_t at = i / shape.teacher_dim * stride + i % shape.teacher_dim;
      std::memcpy(stored.get() + at * element_size(), &bits,
                  static_cast<std::size_t>(element_size()));
    }
    for (std::int64_t i = 0; i < shape.batch; ++i) {
      target[i] = i % 7 == 3 ? -100 : static_cast<std::int64_t>(random()) % shape.bank_rows;
    }
    // The first entry is the target, and some of the others may be, too.
    for (std::int64_t i = 0; i < shape.batch; ++i) {
      for (std::int64_t at = i * TARGETS; at < (i + 1) * TARGETS; ++at) {
        const bool own = at % TARGETS == 0 && target[i] != -100;
        shift_rows[at] = own ? target[i] : static_cast<std::int64_t>(random()) % shape.bank_rows;
        if (at % TARGETS == 0 || target[i] == -100) continue;
        shift[at] = static_cast<float>(random() % 4) / 16;
        shift[i * TARGETS] -= shift[at];
      }
    }
  }

  std::int64_t element_size() const { return element == Element::float32 ? 4 : 2; }

  Inputs inputs(int threads) const {
    Inputs in;
    in.student = student.get();
    in.batch = shape.batch;
    in.student_dim = shape.student_dim;
    in.bank = stored.get();
    in.element = element;
    in.bank_rows = shape.bank_rows;
    in.teacher_dim = shape.teacher_dim;
    in.bank_stride = stride;
    in.weight = weight.get();
    in.bias = bias.get();
    in.logit_scale = shape.logit_scale;
    in.half = shape.half;
    in.threads = threads;
    return in;
  }

  Shape shape;
  Element element;
  std::int64_t stride;
  Exact<unsigned char> stored;  // the bank
  Exact<float> student, bank, weight, bias;
  Exact<std::int64_t> target, shift_rows;
  Exact<float> shift;
};

// Everything in double, from the formulae.
struct Truth {
  Truth(const Problem& p, bool shifted) {
    const auto [batch, rows, teacher, width, projection, bias, half, tau, smoothing] = p.shape;
    (void)half;
    std::vector<double> u(batch * width), n(rows * width), student_norm(batch), norm(rows);
    for (std::int64_t i = 0; i < batch; ++i) {
      double sum = 0;
      for (std::int64_t w = 0; w < width; ++w) sum += std::pow(p.student[i * width + w], 2);
      student_norm[i] = std::sqrt(sum);
      for (std::int64_t w = 0; w < width; ++w) {
        u[i * width + w] = p.student[i * width + w] / student_norm[i];
      }
    }
    for (std::int64_t k = 0; k < rows; ++k) {
      double sum = 0;
      for (std::int64_t w = 0; w < width; ++w) {
        double z = projection ? (bias ? p.bias[w] : 0.0) : p.bank[k * teacher + w];
        for (std::int64_t d = 0; projection && d < teacher; ++d) {
          z += static_cast<double>(p.weight[w * teacher + d]) * p.bank[k * teacher + d];
        }
        n[k * width + w] = z;
        sum += z * z;
      }
      norm[k] = std::sqrt(sum);
      for (std::int64_t w = 0; w < width; ++w) n[k * width + w] /= norm[k];
    }
    logits.resize(batch * rows);
    nll.resize(batch);
    lse.resize(batch);
    d_student.resize(batch * width);
    std::vector<double> g(batch * rows);
    for (std::int64_t i = 0; i < batch; ++i) {
      double top = -1e300, sum = 0, mean = 0;
      for (std::int64_t k = 0; k < rows; ++k) {
        double cosine = 0;
        for (std::int64_t w = 0; w < width; ++w) cosine += u[i * width + w] * n[k * width + w];
        logits[i * rows + k] = tau * cosine;
        top = std::max(top, tau * cosine);
        mean += tau * cosine / rows;
      }
      for (std::int64_t k = 0; k < rows; ++k) sum += std::exp(logits[i * rows + k] - top);
      lse[i] = top + std::log(sum);
      const std::int64_t y = p.target[i];
      if (y == -100) continue;
      nll[i] = lse[i] - (1 - smoothing) * logits[i * rows + y] - smoothing * mean;
      for (std::int64_t k = 0; k < rows; ++k) {
        g[i * rows + k] = std::exp(logits[i * rows + k] - lse[i]) - smoothing / rows -
                          (k == y ? 1 - smoothing : 0);
      }
      for (std::int64_t at = i * TARGETS; shifted && at < (i + 1) * TARGETS; ++at) {
        const std::int64_t k = i * rows + p.shift_rows[at];
        nll[i] -= p.shift[at] * (logits[k] - logits[i * rows + y]);
        g[k] -= p.shift[at];
      }
    }
    chain(p, u, n, student_norm, norm, g);
  }

  void chain(const Problem& p, const std::vector<double>& u, const std::vector<double>& n,
             const std::vector<double>& student_norm, const std::vector<double>& norm,
             const std::vector<double>& g) {
    const auto [batch, rows, teacher, width, projection, bias, half, tau, smoothing] = p.shape;
    (void)bias, (void)half, (void)smoothing;
    d_student.assign(batch * width, 0);
    d_weight.assign(width * teacher, 0);
    d_bias.assign(width, 0);
    d_scale = 0;
    for (std::int64_t i = 0; i < batch; ++i) {
      std::vector<double> slope(width);
      double along = 0;
      for (std::int64_t k = 0; k < rows; ++k) {
        for (std::int64_t w = 0; w < width; ++w) slope[w] += g[i * rows + k] * n[k * width + w];
      }
      for (std::int64_t w = 0; w < width; ++w) along += slope[w] * u[i * width + w];
      d_scale += along;
      for (std::int64_t w = 0; w < width; ++w) {
        d_student[i * width + w] = tau * (slope[w] - along * u[i * width + w]) / student_norm[i];
      }
    }
    for (std::int64_t k = 0; projection && k < rows; ++k) {
      std::vector<double> d(width);
      double along = 0;
      for (std::int64_t i = 0; i < batch; ++i) {
        for (std::int64_t w = 0; w < width; ++w) d[w] += tau * g[i * rows + k] * u[i * width + w];
      }
      for (std::int64_t w = 0; w < width; ++w) along += d[w] * n[k * width + w];
      for (std::int64_t w = 0; w < width; ++w) {
        const double z = (d[w] - along * n[k * width + w]) / norm[k];
        d_bias[w] += z;
        for (std::int64_t e = 0; e < teacher; ++e) {
          d_weight[w * teacher + e] += z * p.bank[k * teacher + e];
        }
      }
    }
  }

  std::vector<double> logits, nll, lse, d_student, d_weight, d_bias;
  double d_scale = 0;
};

bool failed = false;

template <class Values>
void check(const char* what, const Shape& s, const Values& values, const std::vector<double>& truth,
           double floor = 0) {
  double difference = 0, size = floor;
  for (std::size_t i = 0; i < truth.size(); ++i) {
    difference += std::pow(values[static_cast<std::int64_t>(i)] - truth[i], 2);
    size += truth[i] * truth[i];
  }
  const double error = std::sqrt(difference / (size + 1e-30)), limit = s.half ? 0.1 : 1e-3;
  if (error <= limit) return;
  failed = true;
  std::printf("%s: error %g at B=%ld K=%ld D=%ld W=%ld half=%d scale=%g\n", what, error,
              static_cast<long>(s.batch), static_cast<long>(s.bank_rows),
              static_cast<long>(s.teacher_dim), static_cast<long>(s.student_dim), s.half,
              static_cast<double>(s.logit_scale));
}

std::vector<double> one(double x) { return {x}; }

void test_contrastive_ce(const Kernels& kernels, const Problem& p, const Truth& truth,
                         std::int64_t cache_bytes, bool shifted) {
  const Shape& s = p.shape;
  const TargetShift none = {nullptr, nullptr, 0};
  const TargetShift shift =
      shifted ? TargetShift{p.shift_rows.get(), p.shift.get(), TARGETS} : none;
  Exact<char> cache(cache_bytes);
  Exact<float> nll(s.batch, NOTHING), lse(s.batch, NOTHING), p_other(s.batch, NOTHING);
  Exact<float> residual(s.batch * s.student_dim, NOTHING);
  Exact<float> attention(s.batch * s.student_dim, NOTHING);
  ContrastiveCeForward forward;
  forward.in = p.inputs(3);
  forward.target = p.target.get();
  forward.shift = shift;
  forward.ignore_index = -100;
  forward.label_smoothing = s.smoothing;
  forward.reduction = Reduction::none;
  forward.cache = {cache.get(), cache_bytes, false};
  forward.loss = nll.get();
  forward.lse = lse.get();
  forward.p_other = p_other.get();
  forward.residual = residual.get();
  forward.attention = attention.get();
  kernels.contrastive_ce_forward(forward);
  check("nll", s, nll, truth.nll);
  check("lse", s, lse, truth.lse, 1);

  Exact<float> d_loss(s.batch, 1.0f), d_lse(s.batch, 0.0f);
  Exact<float> d_student(s.batch * s.student_dim, NOTHING), d_scale(1, NOTHING);
  Exact<float> d_weight(s.projection ? s.student_dim * s.teacher_dim : 0, NOTHING);
  Exact<float> d_bias(s.projection ? s.student_dim : 0, NOTHING);
  ContrastiveCeBackward backward;
  backward.in = p.inputs(2);
  backward.target = p.target.get();
  backward.shift = shift;
  backward.ignore_index = -100;
  backward.label_smoothing = s.smoothing;
  backward.reduction = Reduction::none;
  const ReadOnly left(cache.get(), cache_bytes);
  backward.cache = {left.get(), cache_bytes, true};
  backward.d_loss = d_loss.get();
  backward.d_lse = d_lse.get();
  backward.lse = lse.get();
  backward.p_other = p_other.get();
  backward.residual = residual.get();
  backward.attention = attention.get();
  backward.d_student = d_student.get();
  backward.d_weight = d_weight.get();
  backward.d_bias = d_bias.get();
  backward.d_logit_scale = d_scale.get();
  kernels.contrastive_ce_backward(backward);
  check("d_student", s, d_student, truth.d_student, 1e-3);
  check("d_logit_scale", s, d_scale, one(truth.d_scale), 1e-2);
  if (s.projection) {
    check("d_weight", s, d_weight, truth.d_weight, 1e-3);
    check("d_bias", s, d_bias, truth.d_bias, 1e-3);
  }

  // Without residual and attention, and without a cache.
  forward.residual = forward.attention = nullptr;
  forward.cache = NO_CACHE;
  kernels.contrastive_ce_forward(forward);
  check("nll alone", s, nll, truth.nll);
}

void test_similarity(const Kernels& kernels, const Problem& p, const Truth& truth) {
  const Shape& s = p.shape;
  Exact<float> logits(s.batch * s.bank_rows, NOTHING), d_logits(s.batch * s.bank_rows);
  kernels.similarity_forward({p.inputs(3), logits.get()});
  check("logits", s, logits, truth.logits);
  // The cross-entropy's own gradient, so that one truth serves both ops.
  for (std::int64_t i = 0; i < s.batch; ++i) {
    for (std::int64_t k = 0; k < s.bank_rows && p.target[i] != -100; ++k) {
      const double probability = std::exp(truth.logits[i * s.bank_rows + k] - truth.lse[i]);
      const double wanted = (p.target[i] == k ? 1 - s.smoothing : 0) + s.smoothing / s.bank_rows;
      d_logits[i * s.bank_rows + k] = static_cast<float>(probability - wanted);
    }
  }
  Exact<float> d_student(s.batch * s.student_dim, NOTHING), d_scale(1, NOTHING);
  Exact<float> d_weight(s.projection ? s.student_dim * s.teacher_dim : 0, NOTHING);
  Exact<float> d_bias(s.projection ? s.student_dim : 0, NOTHING);
  kernels.similarity_backward(
      {p.inputs(3), d_logits.get(), d_student.get(), d_weight.get(), d_bias.get(), d_scale.get()});
  check("similarity d_student", s, d_student, truth.d_student, 1e-3);
  check("similarity d_logit_scale", s, d_scale, one(truth.d_scale), 1e-2);
  if (s.projection) {
    check("similarity d_weight", s, d_weight, truth.d_weight, 1e-3);
    check("similarity d_bias", s, d_bias, truth.d_bias, 1e-3);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  const Kernels& kernels = *tier(argv[1]).kernels;
  const bool small = argc > 2 && std::string(argv[2]) == "small";
  // B, K, D, W, projection, bias, half (set below), scale, smoothing.
  std::vector<Shape> shapes = {
      {1, 1, 3, 2, true, true, false, 10, 0},      {1, 10, 8, 4, true, true, false, 14, 0},
      {65, 63, 33, 31, true, true, false, 14, 0},  {3, 257, 7, 17, true, false, false, 100, 0.1f},
      {66, 600, 5, 5, false, false, false, 14, 0}, {7, 2113, 9, 6, true, true, false, 70, 0.1f},
  };
  if (!small) {
    const std::vector<Shape> more = {
        {64, 64, 256, 64, true, true, false, 14, 0},
        {63, 65, 257, 129, true, true, false, 14, 0.1f},
        {257, 130, 40, 33, true, true, false, 14, 0},
        {5, 300, 513, 12, true, true, false, 30, 0},
        {129, 256, 64, 64, false, false, false, 100, 0.1f},
        {2, 2049, 16, 16, true, false, false, 1, 0},
    };
    shapes.insert(shapes.end(), more.begin(), more.end());
  }
  unsigned seed = 0;
  for (Shape shape : shapes) {
    const int halves = kernels.half ? 2 : 1, elements = small ? 1 : 3;
    for (int variant = 0; variant < halves * elements; ++variant) {
      shape.half = variant % halves != 0;
      const Problem problem(shape, static_cast<Element>(variant / halves), seed % 3, seed);
      ++seed;
      const Truth truth(problem, false), shifted(problem, true);
      // A cache with room for all panels, for one, and for none.
      const std::int64_t head = 64 + (shape.batch + 15) / 16 * 64;
      const std::int64_t panel = (shape.student_dim + 33) * 256;
      for (const std::int64_t bytes :
           {head + panel * (shape.bank_rows / 64 + 1), head + panel, std::int64_t{0}}) {
        test_contrastive_ce(kernels, problem, truth, bytes, false);
      }
      test_contrastive_ce(kernels, problem, shifted, head + panel, true);
      test_similarity(kernels, problem, truth);
    }
  }
  if (!failed) std::printf("%s: all right\n", argv[1]);
  return failed ? 1 : 0;
}

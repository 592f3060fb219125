// Contrastive cross-entropy over a bank of embeddings: with u = s / |s|, n = z / |z|, z = P t + b,
//
//   l_ik = logit_scale u_i . n_k        nll_i = log sum_k exp l_ik - l_iy
//
// Forward. For each panel of 64 students and tile of 256 bank rows: a block of logits, its
// exponentials p, and E' += p n, all in the CPU's cache; the [B, K] logits are never stored. The
// target is left out of the sums, so that nothing cancels when the softmax is peaked: with Z' (sum
// of p) and E' over k != y and a = log Z' - l_y (the log-odds against the target),
//
//   nll = softplus(a)     p_other = sigmoid(a)
//   d nll / d (logit_scale u) = p_other (E'/Z' - n_y)
//
// |l| <= logit_scale, so up to MAX_PLAIN_SCALE the exponentials need no shift, which is also the
// most accurate. Above it each row has a shift, raised when a logit exceeds it by MARGIN (rare).
// Above MAX_SHIFTED_SCALE ("steep") exponents are counted from the row's largest cosine:
// differences of close cosines are exact at any scale. The loss then takes l_y as computed like all
// logits, so that bank rows equal to the target's have its logit; at smaller scales l_y is computed
// in double.
//
// Weighted targets (target_shift.h): nll_i -= sum_m shift_im (l_im - l_iy), with l_im as exact as
// l_iy, and the residual -= d_i = sum_m shift_im (n_m - n_y), from the float32 rows of the chunk.
// One work item owns a student and a chunk, so that sums have one order.
//
// Reads the bank once. Work: 2 K D W (projection) + 2 B K W (logits) + 2 B K W (E', if needed)
// floating-point operations and B K exponentials, and 4 B M W for M targets. Memory beside the
// results: the students (B W), the sums ((W + 2) (B + 2048)), a chunk of the bank in up to two
// layouts, buffers of each thread; with several targets also d (B W), 6 numbers for each of them,
// and in bfloat16 the chunk in float32.
//
// Backward. Student and scale need only residual and attention. Weight and bias: projection.h with
// G_ik = (g_i + h_i) p_ik, where p is the softmax, g = d_nll and h = d_lse; at the target it is
// h_i p - g_i p_other, which again does not cancel. Then G_ik -= g_i shift_im at the rows of m.

#pragma once

#include "projection.h"
#include "target_shift.h"

namespace ckd::cpu::CKD_TIER {

constexpr float MAX_PLAIN_SCALE = 64;  // e^64 < 2^93: the sum of 2^34 such terms is below 2^127
constexpr float MARGIN = 80;           // by how much l log2(e) may exceed the row's shift
constexpr float NO_SHIFT = -1e30f;     // before the first tile; finite, since -inf - -inf is NaN
constexpr float MAX_SHIFTED_SCALE = 1024;
constexpr float NO_COSINE = -2;  // the largest cosine before the first tile
constexpr double LN2 = 0.693147180559945309;

// The softmax sums of a panel of students over a part of the bank, targets left out.
struct Sums {
  float* shift;   // [64] integral; steep: the largest cosine
  float* total;   // [64] sum of 2^(l2 - shift), where l2 = l log2(e); steep: l2 less the largest
  float* values;  // [W, 64] sum of 2^(l2 - shift) n; null: not kept
};

// log(1 + e^x).
inline double softplus(double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(x < 0 ? x : -x)); }

template <class Type>
class CeForward {
  using Word = typename Type::Word;
  static constexpr std::int64_t MIN_ITEMS = 32;  // a small batch splits the bank to reach them
  static constexpr std::int64_t MAX_SPLITS = 8;
  static constexpr std::int64_t FEW_ITEMS = 8;  // with fewer, panels of students are halved

 public:
  explicit CeForward(const ContrastiveCeForward& op)
      : op_(op),
        in_(op.in),
        students_(op.in),
        bank_(op.in, op.cache),
        panels_(students_.panels()),
        // Threads share the students, and with a small batch parts of the bank too.
        splits_(panels_ == 0 ? 1
                             : smaller(smaller(MAX_SPLITS, ceil_div(MIN_ITEMS, panels_)),
                                       ceil_div(in_.bank_rows, TILE))),
        strip_(panels_ * splits_ < FEW_ITEMS ? PANEL / 2 : PANEL),
        chunk_(bank_, in_.student_dim, round_up(chunk_tiles(in_), splits_), true),
        queries_(panels_ * bank_.width() * PANEL),
        shift_(panels_ * splits_ * PANEL),
        total_(panels_ * splits_ * PANEL),
        values_(keeps_values() ? panels_ * splits_ * in_.student_dim * PANEL : 0),
        nll_(op.reduction == Reduction::none ? 0 : in_.batch),
        l_target_(in_.batch),
        l_exact_(in_.batch),
        n_sum_(in_.student_dim),
        factor_(in_.logit_scale),
        entries_(in_, op.target, op.shift) {
    if (!entries_.exist()) return;
    const std::int64_t dim = in_.student_dim;
    l_entries_ = Buffer<double>(in_.batch * op.shift.count);
    if (op.residual != nullptr) moved_ = Buffer<float>(in_.batch * dim);
    if (Type::PER_WORD > 1) numbers_ = Buffer<float>(chunk_.panels() * PANEL * dim);
  }

  void run() {
    const double b = static_cast<double>(in_.batch), k = static_cast<double>(in_.bank_rows);
    const double shifts = b * static_cast<double>(op_.shift.count);
    const int threads =
        useful_threads(in_, k * in_.student_dim * ((in_.weight ? in_.teacher_dim : 0) + 2 * b) +
                                20 * b * k + 4 * shifts * in_.student_dim);
    std::vector<Scratch> scratch = per_thread<Scratch>(threads, bank_, in_);
    clear();
    parallel(threads, [&](int thread) {
      Scratch& mine = scratch[static_cast<std::size_t>(thread)];
      bank_.prepare();
      each(panels_ * PANEL / FEW_STUDENTS,
           [&](std::int64_t part) { pack_queries(part * FEW_STUDENTS, mine); });
      for (std::int64_t first = 0; first < bank_.panels(); first += chunk_.panels()) {
        const std::int64_t end = smaller(first + chunk_.panels(), bank_.panels());
        each(end - first, [&](std::int64_t p) {
          const float* numbers = chunk_.fill(first, first + p, mine.panel);
          take_targets(first, first + p, numbers, mine);
          if (entries_.exist()) keep_numbers(first, first + p, numbers);
        });
        const bool smooth = op_.label_smoothing > 0;
        // A work item is several adjacent strips: all but the first find the tile in the cache.
        const std::int64_t strips = ceil_div(in_.batch, strip_);
        const std::int64_t groups = smaller(strips, GROUPS_PER_THREAD * threads);
        each(groups * splits_ + smooth, [&](std::int64_t item) {
          if (item == groups * splits_) return add_rows(first);
          const std::int64_t group = item / splits_, split = item % splits_;
          const std::int64_t begin = group * strips / groups, end = (group + 1) * strips / groups;
          if (entries_.exist()) {
            // A part of the group's students; the tiles below are a part of the chunk.
            const std::int64_t i0 = begin * strip_, n = smaller(end * strip_, in_.batch) - i0;
            add_entries(first, i0 + n * split / splits_, i0 + n * (split + 1) / splits_, mine);
          }
          for (std::int64_t tile = split; tile < chunk_.tiles(); tile += splits_) {
            const std::int64_t k0 = first * PANEL + tile * TILE;
            if (k0 >= in_.bank_rows) break;
            for (std::int64_t strip = begin; strip < end; ++strip) {
              add_tile(strip * strip_, split, first, tile, mine);
            }
          }
        });
      }
      each(ceil_div(in_.batch, FEW_STUDENTS),
           [&](std::int64_t part) { finish(part * FEW_STUDENTS, mine); });
    });
    if (op_.reduction != Reduction::none) reduce();
  }

 private:
  struct Scratch {
    Scratch(const Bank<Type>& bank, const Inputs& in)
        : panel(bank),
          logits((TILE + 2) * PANEL),
          words(TILE / Type::PER_WORD * PANEL),
          rows(PANEL * (bank.width() > in.student_dim ? bank.width() : in.student_dim)),
          row(2 * in.student_dim) {}
    typename Bank<Type>::Scratch panel;
    Buffer<float> logits;  // [256, 64] logits, then exponentials; further rows for an odd count
    Buffer<Word> words;    // [256 / PER_WORD, 64]
    Buffer<float> rows;    // [64, W]; a word is as large as a float
    Buffer<float> row;
  };

  bool keeps_values() const { return op_.residual != nullptr || op_.attention != nullptr; }
  bool is_plain() const { return in_.logit_scale <= MAX_PLAIN_SCALE; }
  bool is_steep() const { return in_.logit_scale > MAX_SHIFTED_SCALE; }
  // A result whose rows hold n_y until finish_row overwrites them.
  float* n_target() const { return op_.residual != nullptr ? op_.residual : op_.attention; }

  // The sums of student i's panel, from that student's lane on.
  Sums sums(std::int64_t i, std::int64_t split) const {
    const std::int64_t at = i / PANEL * splits_ + split, lane = i % PANEL;
    return {shift_ + at * PANEL + lane, total_ + at * PANEL + lane,
            keeps_values() ? values_ + at * in_.student_dim * PANEL + lane : nullptr};
  }

  void clear() {
    const float shift = is_plain() ? 0 : is_steep() ? NO_COSINE : NO_SHIFT;
    for (std::int64_t i = 0; i < panels_ * splits_ * PANEL; ++i) shift_[i] = shift;
    for (std::int64_t i = 0; i < in_.batch; ++i) l_target_[i] = l_exact_[i] = -__builtin_inf();
    total_.zero();
    n_sum_.zero();
    if (moved_ != nullptr) moved_.zero();
    for (std::int64_t i = 0; keeps_values() && i < in_.batch; ++i) {
      if (op_.target[i] != op_.ignore_index) continue;
      std::memset(n_target() + i * in_.student_dim, 0,
                  static_cast<std::size_t>(in_.student_dim) * 4);
    }
  }

  // Packs u^T of students [i0, i0 + FEW_STUDENTS) along W.
  void pack_queries(std::int64_t i0, Scratch& mine) {
    const std::int64_t width = bank_.width();
    Word* rows = reinterpret_cast<Word*>(static_cast<float*>(mine.rows));
    students_.pack_rows(i0, FEW_STUDENTS, rows, mine.row);
    transpose<Word>(rows, width, FEW_STUDENTS, width,
                    queries_ + i0 / PANEL * width * PANEL + i0 % PANEL, PANEL);
  }

  // Adds a tile of the chunk (it begins at panel `first`) to the sums of the strip of students i0..
  void add_tile(std::int64_t i0, std::int64_t split, std::int64_t first, std::int64_t tile,
                Scratch& mine) {
    const std::int64_t k0 = first * PANEL + tile * TILE;
    const bool begins = k0 == split * TILE;  // the values are not initialised yet
    const std::int64_t count = smaller(TILE, in_.bank_rows - k0), width = bank_.width();
    const int cols = static_cast<int>(round_up(smaller(strip_, in_.batch - i0), 16));
    const Sums to = sums(i0, split);
    const Word* queries = queries_ + i0 / PANEL * width * PANEL + i0 % PANEL;
    gemm(count, cols, width,
         Operands<Type>{chunk_.rows(tile), width, queries, PANEL, mine.logits, PANEL}, false);
    if (entries_.exist() && is_steep()) take_entries(i0, first, tile, count, mine.logits);
    leave_out_targets(i0, k0, count, mine.logits);
    if (!is_plain()) raise_shift(mine.logits, count, cols, to, begins);
    const Word* p = exponentials(count, cols, to, mine);
    if (!keeps_values()) return;
    gemm(in_.student_dim, cols, words<Type>(count),
         from_panels<Type>(chunk_.columns(first, tile), in_.student_dim, p, to.values, PANEL),
         !begins);
  }

  // For students whose target is in this panel: stores n_y, and computes l_y again in double from
  // float32 operands, since its rounding error would be the loss's.
  void take_targets(std::int64_t first, std::int64_t panel, const float* numbers, Scratch& mine) {
    const std::int64_t dim = in_.student_dim, k0 = panel * PANEL, count = bank_.rows(panel);
    for (std::int64_t i = 0; i < in_.batch; ++i) {
      const std::int64_t k = op_.target[i] - k0;
      if (k < 0 || k >= count || op_.target[i] == op_.ignore_index) continue;
      float* n = keeps_values() ? n_target() + i * dim : mine.row + dim;
      if constexpr (Type::PER_WORD == 1) {
        const float* row = chunk_.rows(0) + ((panel - first) * PANEL + k) * dim;
        std::memcpy(n, row, static_cast<std::size_t>(dim) * 4);
      } else {
        for (std::int64_t w = 0; w < dim; ++w) n[w] = numbers[w * PANEL + k];
      }
      students_.unit_row(i, mine.row);
      l_exact_[i] = static_cast<double>(in_.logit_scale) * dot(mine.row, n, dim);
    }
  }

  // bfloat16: keeps the float32 rows of a panel's entries.
  void keep_numbers(std::int64_t first, std::int64_t panel, const float* numbers) {
    if constexpr (Type::PER_WORD > 1) {
      const std::int64_t dim = in_.student_dim, k0 = panel * PANEL;
      std::uint64_t used = 0;
      entries_.visit(k0, k0 + PANEL, 0, in_.batch,
                     [&](std::int64_t, std::int64_t, std::int64_t k) { used |= 1ull << k; });
      float* row = numbers_ + (panel - first) * PANEL * dim;
      for (int k = 0; k < PANEL; ++k, row += dim) {
        if ((used >> k & 1) == 0) continue;
        for (std::int64_t w = 0; w < dim; ++w) row[w] = numbers[w * PANEL + k];
      }
    }
  }

  // The logits of entries in the chunk, in double from float32 operands like l_y, and their rows'
  // part of the residual, for students [i0, i1).
  void add_entries(std::int64_t first, std::int64_t i0, std::int64_t i1, Scratch& mine) {
    const std::int64_t dim = in_.student_dim, k0 = first * PANEL;
    const bool needs_logits = !is_steep(), needs_rows = op_.residual != nullptr;
    if (!needs_logits && !needs_rows) return;
    const float* rows;
    if constexpr (Type::PER_WORD == 1) {
      rows = chunk_.rows(0);
    } else {
      rows = numbers_;
    }
    std::int64_t last = -1;
    const auto add = [&](std::int64_t i, std::int64_t entry, std::int64_t k) {
      const float* n = rows + k * dim;
      if (needs_logits) {
        if (i != last) students_.unit_row(i, mine.row);
        last = i;
        l_entries_[entry] = static_cast<double>(in_.logit_scale) * dot(mine.row, n, dim);
      }
      if (!needs_rows) return;
      const float value = entries_.value(entry);
      float* moved = moved_ + i * dim;
      for (std::int64_t w = 0; w < dim; ++w) moved[w] += value * n[w];
    };
    entries_.visit(k0, k0 + chunk_.panels() * PANEL, i0, i1, add);
  }

  // Steep: the logits of entries in a tile, as computed with the others.
  void take_entries(std::int64_t i0, std::int64_t first, std::int64_t tile, std::int64_t count,
                    const float* logits) {
    const std::int64_t k0 = first * PANEL + tile * TILE;
    const auto take = [&](std::int64_t i, std::int64_t entry, std::int64_t k) {
      const float cosine = logits[k * PANEL + i - i0];
      l_entries_[entry] = static_cast<double>(in_.logit_scale) * static_cast<double>(cosine);
    };
    entries_.visit(k0, k0 + count, i0, smaller(i0 + strip_, in_.batch), take);
  }

  void leave_out_targets(std::int64_t i0, std::int64_t k0, std::int64_t count, float* logits) {
    for (std::int64_t i = i0; i < smaller(i0 + strip_, in_.batch); ++i) {
      const std::int64_t k = op_.target[i] - k0;
      if (k < 0 || k >= count || op_.target[i] == op_.ignore_index) continue;
      float& logit = logits[k * PANEL + i - i0];
      l_target_[i] = static_cast<double>(in_.logit_scale) * logit;
      logit = -__builtin_inff();
    }
  }

  // Steep: also subtracts the shift, the largest cosine, from the cosines.
  void raise_shift(float* logits, std::int64_t count, int cols, Sums to, bool begins) const {
    for (int j = 0; j < cols; j += LANES) {
      Vec top = broadcast(-__builtin_inff());
      for (std::int64_t k = 0; k < count; ++k) top = larger(top, load(logits + k * PANEL + j));
      if (!is_steep()) top = nearest_integer(top * factor_.high);
      const Vec old = load(to.shift + j);
      const IntVec above = top > (is_steep() ? old : old + MARGIN);
      const Vec shift = above ? top : old;
      for (std::int64_t k = 0; is_steep() && k < count; ++k) {
        store(logits + k * PANEL + j, load(logits + k * PANEL + j) - shift);
      }
      if (!any(above)) continue;
      const Vec factor = above ? exp2_of_shift(old - shift) : broadcast(1.0f);
      store(to.shift + j, shift);
      store(to.total + j, load(to.total + j) * factor);
      if (begins || to.values == nullptr) continue;
      for (std::int64_t w = 0; w < in_.student_dim; ++w) {
        float* value = to.values + w * PANEL + j;
        store(value, load(value) * factor);
      }
    }
  }

  // The factor by which sums change for a difference of shifts.
  Vec exp2_of_shift(Vec x) const { return is_steep() ? exp2(x, factor_, Vec{}) : exp2_integral(x); }

  // Packs 2^(l2 - shift) along the bank, and adds them to the totals.
  const Word* exponentials(std::int64_t count, int cols, Sums to, Scratch& mine) const {
    Word* out;
    if constexpr (Type::PER_WORD == 1) {
      out = mine.logits;
    } else {
      out = mine.words;
    }
    int vectors = cols / LANES, j = 0;
    for (; vectors >= 4; vectors -= 4, j += 4 * LANES) {
      exponentials<4>(count, mine.logits + j, to.shift + j, to.total + j, out + j);
    }
    for (; vectors > 0; --vectors, j += LANES) {
      exponentials<1>(count, mine.logits + j, to.shift + j, to.total + j, out + j);
    }
    return out;
  }

  template <int VECTORS>
  void exponentials(std::int64_t count, const float* logits, const float* shifts, float* totals,
                    Word* out) const {
    const Log2Factor factor = factor_;
    Vec shift[VECTORS], even[VECTORS] = {}, odd[VECTORS] = {};
    for (int v = 0; v < VECTORS; ++v) shift[v] = is_steep() ? Vec{} : load(shifts + v * LANES);
    const std::int64_t padded = words<Type>(count) * Type::PER_WORD;
    for (std::int64_t k = 0; k < padded; k += 2, logits += 2 * PANEL) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const Vec l = load(logits + v * LANES), next = load(logits + PANEL + v * LANES);
        const Vec a = k < count ? exp2(l, factor, shift[v]) : Vec{};
        const Vec b = k + 1 < count ? exp2(next, factor, shift[v]) : Vec{};
        even[v] += a;
        odd[v] += b;
        store_pair(a, b, out + v * LANES);
      }
      out += 2 / Type::PER_WORD * PANEL;
    }
    for (int v = 0; v < VECTORS; ++v) {
      float* total = totals + v * LANES;
      store(total, load(total) + (even[v] + odd[v]));
    }
  }

  // Adds the rows of a chunk to n_sum_.
  void add_rows(std::int64_t first) {
    for (std::int64_t tile = 0; tile < chunk_.tiles(); ++tile) {
      const std::int64_t count = in_.bank_rows - first * PANEL - tile * TILE;
      if (count <= 0) return;
      chunk_.add_rows(first, tile, smaller(TILE, count), n_sum_);
    }
  }

  // Merges the splits of students [i0, i0 + FEW_STUDENTS) and writes their results.
  void finish(std::int64_t i0, Scratch& mine) {
    const std::int64_t dim = in_.student_dim;
    const Sums all = sums(i0, 0);
    for (std::int64_t split = 1; split < splits_; ++split) join(all, sums(i0, split));
    if (keeps_values()) transpose<float>(all.values, PANEL, dim, FEW_STUDENTS, mine.rows, dim);
    for (std::int64_t i = i0; i < smaller(i0 + FEW_STUDENTS, in_.batch); ++i) {
      const std::int64_t lane = i - i0;
      finish_row(i, all.shift[lane], all.total[lane], mine.rows + lane * dim, mine.row);
    }
  }

  void join(Sums all, Sums part) const {
    for (int j = 0; j < FEW_STUDENTS; j += LANES) {
      const Vec a = load(all.shift + j), b = load(part.shift + j);
      const Vec shift = larger(a, b);
      const Vec left = exp2_of_shift(a - shift), right = exp2_of_shift(b - shift);
      store(all.shift + j, shift);
      store(all.total + j, load(all.total + j) * left + load(part.total + j) * right);
      for (std::int64_t w = 0; all.values != nullptr && w < in_.student_dim; ++w) {
        float* value = all.values + w * PANEL + j;
        store(value, load(value) * left + load(part.values + w * PANEL + j) * right);
      }
    }
  }

  void finish_row(std::int64_t i, float shift, float total, const float* values, float* unit) {
    const std::int64_t dim = in_.student_dim;
    const float smoothing = op_.label_smoothing;
    const bool has_target = op_.target[i] != op_.ignore_index;
    const double scale = in_.logit_scale;
    // The log of the others' sum is base + log_total: two numbers, since base may be so much
    // larger.
    const double base = (is_steep() ? scale : LN2) * static_cast<double>(shift);
    const double log_total = std::log(static_cast<double>(total));
    // +inf without a target, -inf if the target is the bank's only row.
    const double odds = (base - l_target_[i]) + log_total;
    const double small = std::exp(odds < 0 ? odds : -odds);  // in (0, 1]
    const double other = odds < 0 ? small / (1 + small) : 1 / (1 + small);
    const double lse = has_target ? l_target_[i] + softplus(odds) : base + log_total;
    const double l_y = is_steep() ? l_target_[i] : l_exact_[i];
    double nll = softplus((base - l_y) + log_total);
    if (smoothing > 0) {
      students_.unit_row(i, unit);
      const double l_mean = scale * dot(unit, n_sum_, dim) / static_cast<double>(in_.bank_rows);
      nll += smoothing * (l_y - l_mean);
    }
    if (entries_.exist()) {
      entries_.of_student(i, [&](std::int64_t entry) {
        nll -= static_cast<double>(entries_.value(entry)) * (l_entries_[entry] - l_y);
      });
    }
    op_.p_other[i] = static_cast<float>(other);
    op_.lse[i] = static_cast<float>(lse);
    bank_.keep_lse(i, is_steep() ? steep_lse(i, shift, log_total, odds) : Lse(lse));
    float* losses = op_.reduction == Reduction::none ? op_.loss : nll_;
    losses[i] = has_target ? static_cast<float>(nll) : 0.0f;
    if (!keeps_values()) return;

    const float weight = static_cast<float>(other), inverse = total == 0 ? 0 : 1 / total;
    const float mean = 1 / static_cast<float>(in_.bank_rows);
    const float* n_y = n_target() + i * dim;
    const bool moves = entries_.exist() && op_.residual != nullptr;
    float* moved = moves ? moved_ + i * dim : nullptr;
    const float sum = moves ? static_cast<float>(entries_.sum(i)) : 0;
    for (std::int64_t w = 0; moves && w < dim; ++w) moved[w] -= sum * n_y[w];
    for (std::int64_t w = 0; w < dim; ++w) {
      const float n_other = values[w] * inverse, target = n_y[w];
      float residual = weight * (n_other - target);
      if (smoothing > 0) residual += smoothing * (target - n_sum_[w] * mean);
      if (op_.attention != nullptr) {
        op_.attention[i * dim + w] = weight * n_other + (1 - weight) * target;
      }
      if (op_.residual != nullptr) op_.residual[i * dim + w] = has_target ? residual : 0;
    }
    for (std::int64_t w = 0; moves && w < dim; ++w) op_.residual[i * dim + w] -= moved[w];
  }

  // The lse as a cosine, the largest of all, and the difference of their logits.
  Lse steep_lse(std::int64_t i, float top, double log_total, double odds) const {
    const double scale = in_.logit_scale;
    if (odds < 0)
      return {static_cast<float>(l_target_[i] / scale), static_cast<float>(softplus(odds))};
    return {top, static_cast<float>(log_total + softplus(-odds))};
  }

  void reduce() const {
    double sum = 0;
    std::int64_t kept = 0;
    for (std::int64_t i = 0; i < in_.batch; ++i) {
      sum += static_cast<double>(nll_[i]);
      kept += op_.target[i] != op_.ignore_index;
    }
    if (kept == 0) kept = 1;  // the mean over no rows is 0
    const bool mean = op_.reduction == Reduction::mean;
    *op_.loss = static_cast<float>(mean ? sum / static_cast<double>(kept) : sum);
    if (mean) *op_.kept = static_cast<float>(kept);
  }

  const ContrastiveCeForward& op_;
  const Inputs& in_;
  Students<Type> students_;
  Bank<Type> bank_;
  std::int64_t panels_, splits_, strip_;  // strip_: students of a block of logits
  Chunk<Type> chunk_;
  Buffer<Word> queries_;  // [panels, words(W), 64]: u^T, packed along W
  Buffer<float> shift_, total_, values_;
  Buffer<float> nll_;  // [B] if the loss is a scalar
  // [B] l_y; -inf without a target. l_target_ is computed like the other logits, for the gradient,
  // so that the probabilities of a row sum to one; l_exact_ in double, for the loss.
  Buffer<double> l_target_, l_exact_;
  Buffer<float> n_sum_;
  Log2Factor factor_;
  ShiftEntries entries_;
  Buffer<double> l_entries_;  // [B, M] logits of entries
  Buffer<float> moved_;       // [B, W] d
  Buffer<float> numbers_;     // bfloat16: the chunk's n, [rows, W]
};

template <class Type>
void contrastive_ce_backward(const ContrastiveCeBackward& op) {
  const Inputs& in = op.in;
  const std::int64_t dim = in.student_dim;
  Students<Type> students(in);
  const Bank<Type> bank(in, op.cache);
  // g and h of each row. Rows that no gradient reaches are dropped, since they may hold NaN.
  Buffer<float> g(in.batch), h(in.batch), shift(in.batch), rest(in.batch);
  const bool steep = in.logit_scale > MAX_SHIFTED_SCALE;
  const bool by_row = op.reduction == Reduction::none;
  const float rows = op.reduction == Reduction::mean ? *op.kept : 1;
  for (std::int64_t i = 0; i < in.batch; ++i) {
    const bool has_target = op.target[i] != op.ignore_index;
    g[i] = op.d_loss != nullptr && has_target ? op.d_loss[by_row ? i : 0] / rows : 0;
    h[i] = op.d_lse != nullptr ? op.d_lse[i] : 0;
    const bool idle = g[i] == 0 && h[i] == 0;
    if (idle) students.drop(i);
    // exp(l - lse) = 2^(l2 - shift) rest, with an integral shift, which exp2 subtracts exactly.
    // Steep: the shift is a cosine, which is subtracted from the others.
    const Lse lse =
        idle ? Lse(0.0f) : bank.lse(i, Lse(steep ? op.lse[i] / in.logit_scale : op.lse[i]));
    const double log2_sum = (static_cast<double>(lse.high) + static_cast<double>(lse.low)) / LN2;
    shift[i] = steep ? lse.high : static_cast<float>(std::nearbyint(log2_sum));
    rest[i] = static_cast<float>(steep ? std::exp(-lse.low) : std::exp2(shift[i] - log2_sum));
  }

  if (op.d_student != nullptr || op.d_logit_scale != nullptr) {
    const auto slope = [&](std::int64_t i, float* out) {
      const float* residual = op.residual + i * dim;
      const float* attention = op.attention + i * dim;
      const float by_nll = g[i], by_lse = h[i];
      for (std::int64_t w = 0; w < dim; ++w) out[w] = by_nll == 0 ? 0 : by_nll * residual[w];
      if (by_lse == 0) return;
      for (std::int64_t w = 0; w < dim; ++w) out[w] += by_lse * attention[w];
    };
    row_gradients(students, in, slope, op.d_student, op.d_logit_scale);
  }
  if (op.d_weight == nullptr && op.d_bias == nullptr) return;

  const Log2Factor factor(in.logit_scale);
  const ShiftEntries entries(in, op.target, op.shift);
  const float smoothing = op.label_smoothing / static_cast<float>(in.bank_rows);
  const auto fill = [&](Block block) {
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const std::int64_t i = block.i0 + r, k = op.target[i] - block.k0;
      float* row = block.at + r * PANEL;
      const float both = (g[i] + h[i]) * rest[i], smooth = g[i] * smoothing;
      Vec by = broadcast(shift[i]);
      const bool here = k >= 0 && k < block.bank_rows && op.target[i] != op.ignore_index;
      if (steep) {
        for (int j = 0; j < block.columns; j += LANES) {
          store(row + j, -larger(Vec{}, by - load(row + j)));
        }
        by = Vec{};
      }
      for (int j = 0; j < block.columns; j += LANES) {
        store(row + j, exp2(load(row + j), factor, by) * both - smooth);
      }
      if (!here) continue;
      // p_other may be NaN where no gradient needs it.
      row[k] = g[i] == 0 ? 0 : -g[i] * (op.p_other[i] - op.label_smoothing) - smooth;
      if (h[i] != 0) row[k] += h[i] * (1 - op.p_other[i]);
      if (entries.exist()) row[k] += g[i] * static_cast<float>(entries.sum(i));
    }
    if (!entries.exist()) return;
    const auto add = [&](std::int64_t i, std::int64_t entry, std::int64_t k) {
      block.at[(i - block.i0) * PANEL + k] -= g[i] * entries.value(entry);
    };
    entries.visit(block.k0, block.k0 + block.bank_rows, block.i0, block.i0 + block.rows, add);
  };
  const double b = static_cast<double>(in.batch), k = static_cast<double>(in.bank_rows);
  const int threads = useful_threads(in, k * dim * (in.teacher_dim + 2 * b) + 20 * b * k);
  ProjectionGradient<Type>(in, students, bank, true).run(threads, fill, op.d_weight, op.d_bias);
}

}  // namespace ckd::cpu::CKD_TIER

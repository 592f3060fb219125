// d_weight and d_bias, bank-stationary. For each panel of bank rows, over all students:
//
//   dN_k = logit_scale sum_i G_ik u_i     dZ_k = (dN_k - (dN_k . n_k) / (n_k . n_k) n_k) / |z_k|
//   d_weight = dZ^T T                     d_bias = sum_k dZ_k
//
// The op computes G, a block of students at a time. dZ of a run of panels is buffered and then
// multiplied with the bank. One thread computes each block of d_weight: no atomics, no copies of
// d_weight for each thread, and an order of sums that does not depend on the number of threads.
//
// Reads the bank once (twice where its projection is not in the cache). Work: 2 B K W (logits) +
// 2 B K W (dN) + 2 K D W (d_weight) floating-point operations.

#pragma once

#include <vector>

#include "bank.h"

namespace ckd::cpu::CKD_TIER {

constexpr std::int64_t STUDENT_BLOCK = 256;

// A block of G: students [i0, i0 + rows) by bank rows [k0, k0 + bank_rows), rows 64 apart.
struct Block {
  std::int64_t i0, rows, k0, bank_rows;
  int columns;  // bank_rows rounded up to whole vectors; the values of the padding do not matter
  float* at;    // in: u . n, out: G
};

template <class Type>
class ProjectionGradient {
  using Word = typename Type::Word;
  static constexpr std::int64_t RUN = 2048;  // bank rows whose dZ is buffered
  // Rows of a block of d_weight, which has 64 columns. Each block converts the bank again.
  static constexpr std::int64_t WEIGHT_BLOCK = 128, TALL_WEIGHT_BLOCK = 512;
  static constexpr std::int64_t WEIGHT_RUN = 256 * Type::PER_WORD;  // bank rows of one product

 public:
  ProjectionGradient(const Inputs& in, const Students<Type>& students, const Bank<Type>& bank,
                     bool needs_logits)
      : in_(in),
        students_(students),
        bank_(bank),
        needs_logits_(needs_logits),
        width_(bank.width()),
        batch_(round_up(in.batch, PANEL)),
        rows_(needs_logits ? batch_ * width_ : 0),
        columns_(in.student_dim * batch_ / Type::PER_WORD) {}

  // fill(Block) replaces a block of u . n (uninitialised unless needs_logits) by G.
  template <class Fill>
  void run(int threads, const Fill& fill, float* d_weight, float* d_bias) {
    const std::int64_t panels = bank_.panels(), per_run = smaller(RUN / PANEL, panels);
    const std::int64_t width = in_.student_dim, dim = in_.teacher_dim;
    const std::int64_t column_blocks = d_weight == nullptr ? 0 : ceil_div(dim, PANEL);
    const std::int64_t block = column_blocks < 4 * threads ? WEIGHT_BLOCK : TALL_WEIGHT_BLOCK;
    const std::int64_t row_blocks = ceil_div(width, block);
    // A work item is several adjacent blocks: all but the first read dZ from the CPU's cache.
    const std::int64_t groups = smaller(column_blocks, GROUPS_PER_THREAD * threads);
    const std::int64_t panel_size = width * PANEL_WORDS<Type>;
    Buffer<Word> d_z(per_run * panel_size);  // [panels, W, 64 / PER_WORD]: dZ^T, packed along K
    Buffer<float> d_bias_parts(per_run * width);  // a row for each panel
    Buffer<float> edge(width * PANEL);            // columns of d_weight after the last whole panel
    Buffer<double> d_bias_sum(width);
    std::vector<Scratch> scratch = per_thread<Scratch>(threads, bank_, in_);
    d_bias_sum.zero();

    parallel(threads, [&](int thread) {
      Scratch& mine = scratch[static_cast<std::size_t>(thread)];
      bank_.prepare();
      each(batch_ / FEW_STUDENTS,
           [&](std::int64_t part) { pack_students(part * FEW_STUDENTS, mine); });
      for (std::int64_t first = 0; first < panels; first += per_run) {
        const std::int64_t count = smaller(per_run, panels - first);
        each(count, [&](std::int64_t p) {
          panel_gradient(first + p, fill, mine, d_z + p * panel_size, d_bias_parts + p * width);
        });
        each(groups * row_blocks + 1, [&](std::int64_t item) {
          if (item == groups * row_blocks) {
            add_rows(d_bias_parts, count, width, d_bias_sum);
            return;
          }
          const std::int64_t w0 = item % row_blocks * block, rows = smaller(block, width - w0);
          const std::int64_t group = item / row_blocks;
          const std::int64_t from = group * column_blocks / groups * PANEL;
          const std::int64_t to = smaller((group + 1) * column_blocks / groups * PANEL, dim);
          const std::int64_t k1 = smaller((first + count) * PANEL, in_.bank_rows);
          for (std::int64_t k = first * PANEL; k < k1; k += WEIGHT_RUN) {
            const Word* a = d_z + ((k / PANEL - first) * width + w0) * PANEL_WORDS<Type>;
            for (std::int64_t d = from; d < to; d += PANEL) {
              const bool whole = d + PANEL <= dim;
              weight_block(k, smaller(WEIGHT_RUN, k1 - k), d, rows, a,
                           whole ? d_weight + w0 * dim + d : edge + w0 * PANEL, whole ? dim : PANEL,
                           mine);
            }
          }
          if (to % PANEL == 0 || first + count < panels) return;
          const std::int64_t d = to / PANEL * PANEL;
          for (std::int64_t w = w0; w < w0 + rows; ++w) {
            std::memcpy(d_weight + w * dim + d, edge + w * PANEL,
                        static_cast<std::size_t>(dim - d) * 4);
          }
        });
      }
    });
    for (std::int64_t w = 0; d_bias != nullptr && w < width; ++w) {
      d_bias[w] = static_cast<float>(d_bias_sum[w]);
    }
  }

 private:
  struct Scratch {
    Scratch(const Bank<Type>& bank, const Inputs& in)
        : panel(bank),
          block(STUDENT_BLOCK * PANEL),
          words(WEIGHT_RUN / Type::PER_WORD * PANEL),
          d_n(bank.width() * Type::PER_WORD * PANEL),
          pairs(FEW_STUDENTS * in.student_dim) {}
    typename Bank<Type>::Scratch panel;
    Buffer<float> block;  // [256, 64] logits, then G
    Buffer<Word> words;   // G packed along the students; then bank rows packed along the bank
    Buffer<float> d_n;    // unit rows of students; then, in bfloat16, dN^T [W, 64]
    Buffer<Word> pairs;   // the unit rows packed along the students
  };

  // Packs students [i0, i0 + FEW_STUDENTS) into rows_ and columns_.
  void pack_students(std::int64_t i0, Scratch& mine) {
    const std::int64_t dim = in_.student_dim;
    Word* columns = columns_ + (i0 / PANEL * dim * PANEL + i0 % PANEL) / Type::PER_WORD;
    if constexpr (Type::PER_WORD == 1) {
      float* rows = needs_logits_ ? rows_ + i0 * width_ : mine.d_n;
      students_.pack_rows(i0, FEW_STUDENTS, rows, mine.pairs);
      transpose<float>(rows, dim, FEW_STUDENTS, dim, columns, PANEL);
    } else {
      if (needs_logits_) students_.pack_rows(i0, FEW_STUDENTS, rows_ + i0 * width_, mine.d_n);
      constexpr std::int64_t WORDS = FEW_STUDENTS / Type::PER_WORD;
      float* unit = mine.d_n;
      for (std::int64_t i = 0; i < FEW_STUDENTS; ++i) {
        if (i0 + i < in_.batch) {
          students_.unit_row(i0 + i, unit + i * dim);
        } else {
          std::memset(unit + i * dim, 0, static_cast<std::size_t>(dim) * 4);
        }
      }
      for (std::int64_t r = 0; r < WORDS; ++r) {
        pair_rows(unit + r * Type::PER_WORD * dim, dim, dim, mine.pairs + r * dim);
      }
      transpose<Word>(mine.pairs, dim, WORDS, dim, columns, PANEL_WORDS<Type>);
    }
  }

  // Writes dZ^T of a panel, packed along the bank, and its sum over the panel's rows.
  template <class Fill>
  void panel_gradient(std::int64_t panel, const Fill& fill, Scratch& mine, Word* d_z,
                      float* d_bias) const {
    const Panel<Type> n = bank_.recall(panel, mine.panel);
    const int cols = bank_.columns(panel);
    float* d_n;
    if constexpr (Type::PER_WORD == 1) {
      d_n = d_z;
    } else {
      d_n = mine.d_n;
    }
    if (in_.batch == 0) std::memset(d_n, 0, static_cast<std::size_t>(in_.student_dim * PANEL) * 4);
    for (std::int64_t i0 = 0; i0 < in_.batch; i0 += STUDENT_BLOCK) {
      const std::int64_t count = smaller(STUDENT_BLOCK, in_.batch - i0);
      if (needs_logits_) {
        gemm(count, cols, width_,
             Operands<Type>{rows_ + i0 * width_, width_, n.words, PANEL, mine.block, PANEL}, false);
      }
      fill(Block{i0, count, panel * PANEL, bank_.rows(panel), cols, mine.block});
      const Word* g = block_words<Type>(mine.block, count, mine.words);
      gemm(in_.student_dim, cols, words<Type>(count),
           from_panels<Type>(columns_ + i0 / Type::PER_WORD * in_.student_dim, in_.student_dim, g,
                             d_n, PANEL),
           i0 > 0);
    }
    through_norm(n, cols, d_n);
    for (std::int64_t w = 0; w < in_.student_dim; ++w) {
      const float* row = d_n + w * PANEL;
      Vec sum = {};
      for (int j = 0; j < cols; j += LANES) sum += load(row + j);
      d_bias[w] = sum_lanes(sum);
      if constexpr (Type::PER_WORD > 1) to_words(row, PANEL, d_z + w * PANEL_WORDS<Type>);
    }
  }

  // dN to dZ in place; 0 for bank rows that count as zero and for columns of padding. Division by
  // n . n, which is not exactly 1, removes all of dN along n, however large that is.
  void through_norm(Panel<Type> n, int cols, float* d_n) const {
    for (int j = 0; j < PANEL; j += LANES) {
      Vec along = {}, squares = {};
      for (std::int64_t p = 0; j < cols && p < width_; ++p) {
        Vec parts[Type::PER_WORD];
        split_word(n.words + p * PANEL + j, parts);
        for (int e = 0; e < Type::PER_WORD; ++e) {
          const std::int64_t w = p * Type::PER_WORD + e;
          if (w >= in_.student_dim) continue;
          along += load(d_n + w * PANEL + j) * parts[e];
          squares += parts[e] * parts[e];
        }
      }
      along /= squares;
      const Vec inverse = load(n.inverse + j), scale = inverse * in_.logit_scale;
      for (std::int64_t p = 0; p < width_; ++p) {
        Vec parts[Type::PER_WORD];
        split_word(n.words + p * PANEL + j, parts);
        for (int e = 0; e < Type::PER_WORD; ++e) {
          const std::int64_t w = p * Type::PER_WORD + e;
          if (w >= in_.student_dim) continue;
          float* x = d_n + w * PANEL + j;
          store(x, inverse == 0.0f ? Vec{} : (load(x) - along * parts[e]) * scale);
        }
      }
    }
  }

  // d_weight [rows, 64 columns from d0] (+)= dZ^T T over `count` bank rows from k.
  void weight_block(std::int64_t k, std::int64_t count, std::int64_t d0, std::int64_t rows,
                    const Word* d_z, float* out, std::int64_t ld, Scratch& mine) const {
    const std::int64_t dims = smaller(PANEL, in_.teacher_dim - d0), used = words<Type>(count);
    bank_.pack_rows(k, count, d0, mine.words);
    gemm(rows, static_cast<int>(round_up(dims, GRAIN)), used,
         from_panels<Type>(d_z, in_.student_dim, mine.words, out, ld), k > 0);
  }

  static void add_rows(const float* rows, std::int64_t count, std::int64_t n, double* sum) {
    for (std::int64_t r = 0; r < count; ++r) {
      for (std::int64_t w = 0; w < n; ++w) sum[w] += static_cast<double>(rows[r * n + w]);
    }
  }

  const Inputs& in_;
  const Students<Type>& students_;
  const Bank<Type>& bank_;
  bool needs_logits_;
  std::int64_t width_, batch_;  // batch_: B rounded up to whole panels
  Buffer<Word> rows_;           // [B, words(W)]: u, packed along W
  Buffer<Word> columns_;        // [panels, W, 64 / PER_WORD]: u^T, packed along the students
};

}  // namespace ckd::cpu::CKD_TIER

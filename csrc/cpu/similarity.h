// logits [B, K] = logit_scale u n^T.
//
// Forward: each panel of the bank is multiplied with all students. Backward: d_student and
// d_logit_scale from slope_i = sum_k d_logits_ik n_k; weight and bias from projection.h with
// G = d_logits. The passes for logits and slope read the bank once, projection.h twice. Work of
// each: 2 K D W (projection) + 2 B K W (logits, slope or dN) floating-point operations.

#pragma once

#include "projection.h"

namespace ckd::cpu::CKD_TIER {

template <class Type>
void similarity_forward(const SimilarityForward& op) {
  using Word = typename Type::Word;
  struct Scratch {
    explicit Scratch(const Bank<Type>& bank, const Inputs& in)
        : panel(bank), block(STUDENT_BLOCK * PANEL), row(in.student_dim) {}
    typename Bank<Type>::Scratch panel;
    Buffer<float> block, row;
  };
  const Inputs& in = op.in;
  const Students<Type> students(in);
  const Bank<Type> bank(in, NO_CACHE);
  const std::int64_t width = bank.width();
  Buffer<Word> rows(round_up(in.batch, PANEL) * width);
  const double b = static_cast<double>(in.batch), k = static_cast<double>(in.bank_rows);
  const int threads =
      useful_threads(in, k * in.student_dim * ((in.weight ? in.teacher_dim : 0) + b));
  std::vector<Scratch> scratch = per_thread<Scratch>(threads, bank, in);

  parallel(threads, [&](int thread) {
    Scratch& mine = scratch[static_cast<std::size_t>(thread)];
    bank.prepare();
    each(students.panels(), [&](std::int64_t panel) {
      students.pack_rows(panel * PANEL, PANEL, rows + panel * PANEL * width, mine.row);
    });
    each(bank.panels(), [&](std::int64_t panel) {
      const Panel<Type> n = bank.make(panel, mine.panel, bank.place(panel, mine.panel.z));
      for (std::int64_t i0 = 0; i0 < in.batch; i0 += STUDENT_BLOCK) {
        const std::int64_t count = smaller(STUDENT_BLOCK, in.batch - i0);
        gemm(count, bank.columns(panel), width,
             Operands<Type>{rows + i0 * width, width, n.words, PANEL, mine.block, PANEL}, false);
        for (std::int64_t r = 0; r < count; ++r) {
          float* out = op.logits + (i0 + r) * in.bank_rows + panel * PANEL;
          const float* from = mine.block + r * PANEL;
          for (int c = 0; c < bank.rows(panel); ++c) out[c] = from[c] * in.logit_scale;
        }
      }
    });
  });
}

// slope [panels of students, W, 64] = sum_k n_k d_logits_ik.
template <class Type>
class SimilaritySlope {
  using Word = typename Type::Word;

 public:
  SimilaritySlope(const SimilarityBackward& op, const Bank<Type>& bank, std::int64_t panels)
      : op_(op),
        in_(op.in),
        bank_(bank),
        panels_(panels),
        chunk_(bank, in_.student_dim, chunk_tiles(in_), false),
        slope_(panels * in_.student_dim * PANEL) {}

  void run() {
    const double b = static_cast<double>(in_.batch), k = static_cast<double>(in_.bank_rows);
    const int threads =
        useful_threads(in_, k * in_.student_dim * ((in_.weight ? in_.teacher_dim : 0) + b));
    std::vector<Scratch> scratch = per_thread<Scratch>(threads, bank_);
    slope_.zero();
    parallel(threads, [&](int thread) {
      Scratch& mine = scratch[static_cast<std::size_t>(thread)];
      bank_.prepare();
      for (std::int64_t first = 0; first < bank_.panels(); first += chunk_.panels()) {
        const std::int64_t end = smaller(first + chunk_.panels(), bank_.panels());
        each(end - first, [&](std::int64_t p) { chunk_.fill(first, first + p, mine.panel); });
        each(panels_, [&](std::int64_t panel) {
          for (std::int64_t tile = 0; tile < chunk_.tiles(); ++tile) {
            const std::int64_t k0 = first * PANEL + tile * TILE;
            if (k0 < in_.bank_rows) add_tile(panel, first, tile, k0, mine);
          }
        });
      }
    });
  }

  float at(std::int64_t i, std::int64_t w) const {
    return slope_[(i / PANEL * in_.student_dim + w) * PANEL + i % PANEL];
  }

 private:
  struct Scratch {
    explicit Scratch(const Bank<Type>& bank)
        : panel(bank),
          rows(PANEL * TILE / Type::PER_WORD),
          columns(TILE / Type::PER_WORD * PANEL) {}
    typename Bank<Type>::Scratch panel;
    Buffer<Word> rows, columns;
  };

  void add_tile(std::int64_t panel, std::int64_t first, std::int64_t tile, std::int64_t k0,
                Scratch& mine) {
    constexpr std::int64_t LD = TILE / Type::PER_WORD;
    const std::int64_t count = smaller(TILE, in_.bank_rows - k0), k = words<Type>(count);
    const std::int64_t i0 = panel * PANEL, students = smaller(PANEL, in_.batch - i0);
    const int cols = static_cast<int>(round_up(students, 16));
    mine.rows.zero();
    for (std::int64_t i = 0; i < students; ++i) {
      to_words(op_.d_logits + (i0 + i) * in_.bank_rows + k0, count, mine.rows + i * LD);
    }
    transpose<Word>(mine.rows, LD, cols, k, mine.columns, PANEL);
    float* slope = slope_ + panel * in_.student_dim * PANEL;
    gemm(
        in_.student_dim, cols, k,
        from_panels<Type>(chunk_.columns(first, tile), in_.student_dim, mine.columns, slope, PANEL),
        true);
  }

  const SimilarityBackward& op_;
  const Inputs& in_;
  const Bank<Type>& bank_;
  std::int64_t panels_;
  Chunk<Type> chunk_;
  Buffer<float> slope_;
};

template <class Type>
void similarity_backward(const SimilarityBackward& op) {
  const Inputs& in = op.in;
  const std::int64_t dim = in.student_dim;
  const Students<Type> students(in);
  const Bank<Type> bank(in, NO_CACHE);
  if (op.d_student != nullptr || op.d_logit_scale != nullptr) {
    SimilaritySlope<Type> pass(op, bank, students.panels());
    pass.run();
    const auto slope = [&](std::int64_t i, float* out) {
      for (std::int64_t w = 0; w < dim; ++w) out[w] = pass.at(i, w);
    };
    row_gradients(students, in, slope, op.d_student, op.d_logit_scale);
  }
  if (op.d_weight == nullptr && op.d_bias == nullptr) return;
  const auto fill = [&](Block block) {
    for (std::int64_t r = 0; r < block.rows; ++r) {
      float* row = block.at + r * PANEL;
      std::memset(row, 0, PANEL * sizeof(float));
      std::memcpy(row, op.d_logits + (block.i0 + r) * in.bank_rows + block.k0,
                  static_cast<std::size_t>(block.bank_rows) * sizeof(float));
    }
  };
  const double b = static_cast<double>(in.batch), k = static_cast<double>(in.bank_rows);
  const int threads = useful_threads(in, k * dim * (2 * in.teacher_dim + b));
  ProjectionGradient<Type>(in, students, bank, false).run(threads, fill, op.d_weight, op.d_bias);
}

}  // namespace ckd::cpu::CKD_TIER

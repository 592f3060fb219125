#include "bank.cuh"
#include "bank_gradient.cuh"
#include "contrastive_ce.h"
#include "softmax.cuh"

namespace ckd::cuda {
namespace {

constexpr int N_SUM_PARTS = 32;

// Runs f with the width of a block, and whether arithmetic is exact, as constants.
template <class F>
int with_width(const Plan& plan, const F& f) {
  const auto both = [&](auto width) {
    return plan.pieces == 1 ? f(width, std::false_type()) : f(width, std::true_type());
  };
  switch (plan.width) {
    case 64:
      return both(std::integral_constant<int, 64>());
    case 128:
      return both(std::integral_constant<int, 128>());
    default:  // never in exact arithmetic
      return f(std::integral_constant<int, 256>(), std::false_type());
  }
}

class Forward {
 public:
  Forward(const ContrastiveCeForward& op, int processors, std::int64_t most_chunk_rows,
          void* workspace, cudaStream_t stream)
      : op_(op),
        plan_(op.in, processors, most_chunk_rows),
        pieces_(workspace),
        chunks_(op.in, plan_, op.cache, false, pieces_, stream),
        stream_(stream),
        batch_(op.in.student.count) {
    const bool keeps_values = op.residual != nullptr || op.attention != nullptr;
    const bool smooth = op.targets.label_smoothing > 0;
    const std::int64_t parts = plan_.parts;
    u_ = pieces_.take<__half>(batch_ * plan_.ld);
    n_target_ = pieces_.take<__half>(batch_ * plan_.ld);
    l_target_ = pieces_.take<float>(batch_);
    sums_.shift = pieces_.take<float>(axis_z(keeps_values) * parts * batch_);
    sums_.total = pieces_.take<float>(parts * batch_);
    sums_.values = keeps_values ? pieces_.take<float>(parts * batch_ * plan_.ld) : nullptr;
    // Counting, a piece is null: what is kept is told by this.
    keeps_values_ = keeps_values;
    n_sum_ = smooth ? pieces_.take<float>(N_SUM_PARTS * plan_.ld) : nullptr;
  }

  std::int64_t bytes() const { return pieces_.used(); }

  int run() const {
    if (batch_ == 0) return 0;
    if (int error = unit_students(op_.in, plan_, nullptr, u_, stream_)) return error;
    if (int error = chunks_.each([&](const Chunk& chunk, const Rows&) { return add(chunk); })) {
      return error;
    }
    return CKD_LAUNCH(combine, dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS), 0, stream_, op_,
                      students(), sums_, plan_.parts, static_cast<const float*>(l_target_),
                      static_cast<const __half*>(n_target_), static_cast<const float*>(n_sum_),
                      N_SUM_PARTS);
  }

 private:
  unsigned axis_z(bool keeps_values) const {
    return keeps_values ? static_cast<unsigned>(plan_.width_blocks) : 1u;
  }
  Students students() const { return {u_, batch_, plan_.ld, plan_.pieces}; }

  int add(const Chunk& chunk) const {
    if (int error = CKD_LAUNCH(find_targets, dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS), 0,
                               stream_, students(), chunk, op_.targets, op_.in.logit_scale,
                               l_target_, n_target_)) {
      return error;
    }
    const dim3 grid(blocks(batch_, TILE), static_cast<unsigned>(plan_.parts),
                    axis_z(keeps_values_));
    if (int error = with_width(plan_, [&](auto width, auto exact) {
          constexpr int WIDTH = decltype(width)::value;
          constexpr bool EXACT = decltype(exact)::value;
          return CKD_LAUNCH((softmax_sums<WIDTH, EXACT>), grid, dim3(THREADS),
                            operands_bytes<WIDTH, EXACT>(), stream_, students(), chunk, op_.targets,
                            op_.in.logit_scale, sums_);
        })) {
      return error;
    }
    if (n_sum_ == nullptr) return 0;
    return CKD_LAUNCH(sum_rows, dim3(blocks(plan_.ld, THREADS), N_SUM_PARTS), dim3(THREADS), 0,
                      stream_, chunk, plan_.ld, n_sum_);
  }

  const ContrastiveCeForward& op_;
  Plan plan_;
  Pieces pieces_;
  BankChunks chunks_;
  cudaStream_t stream_;
  std::int64_t batch_;
  bool keeps_values_;
  __half *u_, *n_target_;
  float* l_target_;
  PartSums sums_;
  float* n_sum_;
};

class Backward {
 public:
  Backward(const ContrastiveCeBackward& op, int processors, std::int64_t most_chunk_rows,
           void* workspace, cudaStream_t stream)
      : op_(op),
        plan_(op.in, processors, most_chunk_rows),
        pieces_(workspace),
        chunks_(op.in, plan_, op.cache, true, pieces_, stream),
        stream_(stream),
        batch_(op.in.student.count) {
    u_ = pieces_.take<__half>(batch_ * plan_.ld);
    gradient_ = pieces_.take<float>(plan_.chunk_rows * plan_.ld);
    factors_.busy = pieces_.take<bool>(batch_);
    factors_.column = pieces_.take<int>(batch_);
    factors_.log2_sum = pieces_.take<float>(batch_);
    factors_.by_p = pieces_.take<float>(batch_);
    factors_.at_target = pieces_.take<float>(batch_);
    factors_.by_all = pieces_.take<float>(batch_);
    count_ = static_cast<int>(1 + ceil_div(op.in.bank.count, plan_.chunk_rows));
    scalars_ = pieces_.take<float>(count_);
    factors_.size = scalars_;
  }

  // The students' gradients need nothing.
  std::int64_t bytes() const { return op_.d_weight == nullptr ? 0 : pieces_.used(); }

  int run() const {
    if (batch_ == 0) return 0;
    if (op_.d_student != nullptr || op_.along != nullptr) {
      if (int error = of_students()) return error;
    }
    if (op_.d_weight == nullptr) return 0;
    if (int error = CKD_LAUNCH(clear_scalars, dim3(blocks(count_, THREADS)), dim3(THREADS), 0,
                               stream_, scalars_, count_)) {
      return error;
    }
    if (int error = CKD_LAUNCH(student_factors, dim3(blocks(batch_, THREADS)), dim3(THREADS), 0,
                               stream_, op_, factors_)) {
      return error;
    }
    if (int error = unit_students(op_.in, plan_, factors_.busy, u_, stream_)) {
      return error;
    }
    int index = 0;
    return chunks_.each(
        [&](const Chunk& chunk, const Rows& t) { return add(chunk, t, scalars_ + ++index); });
  }

 private:
  Students students() const { return {u_, batch_, plan_.ld, plan_.pieces}; }

  int of_students() const {
    return with_element(op_.in.student.element, [&](auto* element) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
      return CKD_LAUNCH(student_gradient<S>, dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS), 0,
                        stream_, op_);
    });
  }

  int add(const Chunk& chunk, const Rows& t, float* largest) const {
    const dim3 grid(blocks(chunk.rows, TILE), static_cast<unsigned>(plan_.width_blocks));
    const bool smooth = op_.targets.label_smoothing > 0;
    if (int error = with_width(plan_, [&](auto width, auto exact) {
          constexpr int WIDTH = decltype(width)::value;
          constexpr bool EXACT = decltype(exact)::value;
          constexpr int BYTES = operands_bytes<WIDTH, EXACT>() +
                                5 * carve_bytes<float>(2 * Operands<WIDTH, EXACT>::ROWS);
          return CKD_LAUNCH((bank_gradient<WIDTH, EXACT>), grid, dim3(THREADS), BYTES, stream_,
                            students(), chunk, factors_, op_.in.logit_scale, smooth, gradient_,
                            largest);
        })) {
      return error;
    }
    if (plan_.width_blocks > 1 || plan_.pieces > 1) {
      if (int error =
              CKD_LAUNCH(through_norm, dim3(blocks(chunk.rows, ROWS_PER_BLOCK)), dim3(THREADS), 0,
                         stream_, gradient_, chunk.n, chunk.inverse, chunk.rows, plan_.piece,
                         plan_.pieces, static_cast<const float*>(nullptr), largest)) {
        return error;
      }
    }
    return add_weight_gradient(op_.in, plan_, chunk, t, gradient_, largest, op_.d_weight,
                               op_.d_bias, op_.weight_parts, stream_);
  }

  const ContrastiveCeBackward& op_;
  Plan plan_;
  Pieces pieces_;
  BankChunks chunks_;
  cudaStream_t stream_;
  std::int64_t batch_;
  __half* u_;
  float* gradient_;
  Factors factors_;
  float* scalars_;  // the size of G, and the largest |dZ| of each chunk
  int count_;
};

}  // namespace

std::int64_t forward_workspace(const ContrastiveCeForward& op, int processors,
                               std::int64_t most_chunk_rows) {
  return Forward(op, processors, most_chunk_rows, nullptr, nullptr).bytes();
}

std::int64_t backward_workspace(const ContrastiveCeBackward& op, int processors,
                                std::int64_t most_chunk_rows) {
  return Backward(op, processors, most_chunk_rows, nullptr, nullptr).bytes();
}

int contrastive_ce_forward(const ContrastiveCeForward& op, int processors,
                           std::int64_t most_chunk_rows, void* workspace, cudaStream_t stream) {
  return Forward(op, processors, most_chunk_rows, workspace, stream).run();
}

int contrastive_ce_backward(const ContrastiveCeBackward& op, int processors,
                            std::int64_t most_chunk_rows, void* workspace, cudaStream_t stream) {
  return Backward(op, processors, most_chunk_rows, workspace, stream).run();
}

}  // namespace ckd::cuda

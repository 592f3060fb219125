#include "bank.cuh"
#include "bank_gradient.cuh"
#include "contrastive_ce.h"
#include "shift.cuh"
#include "softmax.cuh"

namespace ckd::cuda {
namespace {

constexpr int N_SUM_PARTS = 32;

// Runs f with whether arithmetic is exact as a constant.
template <class F>
int with_exact(const Plan& plan, const F& f) {
  return plan.pieces == 1 ? f(std::false_type()) : f(std::true_type());
}

// The same with the width of a block before it.
template <class F>
int with_width(const Plan& plan, const F& f) {
  const auto both = [&](auto width) {
    return with_exact(plan, [&](auto exact) { return f(width, exact); });
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
    const bool smooth = op.targets.label_smoothing > 0, shifted = op.targets.shift != nullptr;
    const std::int64_t parts = plan_.parts;
    u_ = pieces_.take<__half>(batch_ * plan_.ld);
    is_whole_ = plan_.chunk_rows >= op.in.bank.count;
    n_target_ = is_whole_ ? nullptr : pieces_.take<__half>(batch_ * plan_.ld);
    arrived_ = pieces_.take<int>(1);
    sums_.top = pieces_.take<float>(axis_z(keeps_values) * parts * batch_);
    sums_.total = pieces_.take<float>(parts * batch_);
    sums_.of_target = pieces_.take<float>(batch_);
    sums_.values = keeps_values ? pieces_.take<float>(parts * batch_ * plan_.ld) : nullptr;
    // Kept apart, since sums_.values is null too while bytes are only counted.
    keeps_values_ = keeps_values;
    n_sum_ = smooth ? pieces_.take<float>(N_SUM_PARTS * plan_.ld) : nullptr;
    n_shift_ = shifted ? pieces_.take<float>(batch_ * plan_.piece) : nullptr;
    chunks_.normalise_students(u_, {reinterpret_cast<std::uint32_t*>(arrived_), 1});
  }

  std::int64_t bytes() const { return pieces_.used(); }

  int run() const {
    if (batch_ == 0) return 0;
    TargetRows n_target = {n_target_, is_whole_};
    if (int error = chunks_.each([&](const Chunk& chunk, const Rows&) {
          if (is_whole_) n_target.rows = chunk.n;
          return add(chunk);
        })) {
      return error;
    }
    const auto finish = [&](auto shifted) {
      return CKD_LAUNCH(combine<decltype(shifted)::value>, dim3(blocks(batch_, ROWS_PER_BLOCK)),
                        dim3(THREADS), COMBINE_BYTES, stream_, op_, students(), sums_, plan_.parts,
                        n_target, static_cast<const float*>(n_sum_), N_SUM_PARTS,
                        static_cast<const float*>(n_shift_), arrived_);
    };
    return n_shift_ == nullptr ? finish(std::false_type()) : finish(std::true_type());
  }

 private:
  unsigned axis_z(bool keeps_values) const {
    return keeps_values ? static_cast<unsigned>(plan_.width_blocks) : 1u;
  }
  Students students() const { return {u_, static_cast<int>(batch_), plan_.ld, plan_.pieces}; }

  int add(const Chunk& chunk) const {
    if (!is_whole_) {
      if (int error = CKD_LAUNCH(keep_targets, dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS),
                                 0, stream_, students(), chunk, op_.targets, n_target_)) {
        return error;
      }
    }
    if (n_shift_ != nullptr) {
      if (int error = with_exact(plan_, [&](auto exact) {
            return CKD_LAUNCH(add_shifted_rows<decltype(exact)::value>,
                              dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS),
                              SUM_OF_ROWS_BYTES, stream_, students(), chunk, op_.targets, n_shift_);
          })) {
        return error;
      }
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
  bool is_whole_;  // the bank is one chunk
  __half *u_, *n_target_;
  int* arrived_;
  PartSums sums_;
  float *n_sum_, *n_shift_;
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
        batch_(op.in.student.count),
        weight_(op.in, plan_, op.d_bias != nullptr, pieces_) {
    u_ = pieces_.take<__half>(batch_ * plan_.ld);
    in_parts_ = plan_.width_blocks > 1 || plan_.pieces > 1;
    gradient_ = in_parts_ ? pieces_.take<float>(plan_.chunk_rows * plan_.ld) : nullptr;
    if (op.targets.shift != nullptr && !in_parts_) {
      shifted_.sums = pieces_.take<float>(plan_.chunk_rows * plan_.ld);
      shifted_.counts = pieces_.take<int>(plan_.chunk_rows);
    }
    factors_.stride = static_cast<int>(round_up(batch_, 4));
    factors_.data =
        pieces_.take<float>(static_cast<std::int64_t>(Factors::ARRAYS) * factors_.stride);
  }

  // The students' gradients need no workspace.
  std::int64_t bytes() const { return op_.d_weight == nullptr ? 0 : pieces_.used(); }

  int run() {
    if (batch_ == 0) return 0;
    const bool wants_weight = op_.d_weight != nullptr;
    if (int error = with_element(op_.in.student.element, [&](auto* element) {
          using S = std::remove_const_t<std::remove_pointer_t<decltype(element)>>;
          const Cleared cleared = wants_weight ? weight_.cleared() : Cleared{nullptr, 0};
          return CKD_LAUNCH(student_rows<S>, dim3(blocks(batch_, ROWS_PER_BLOCK)), dim3(THREADS), 0,
                            stream_, op_, wants_weight ? u_ : nullptr, plan_.piece,
                            plan_.student_layout(), factors_, cleared);
        })) {
      return error;
    }
    if (!wants_weight) return 0;
    return chunks_.each([&](const Chunk& chunk, const Rows& t) { return add(chunk, t); });
  }

 private:
  Students students() const { return {u_, static_cast<int>(batch_), plan_.ld, plan_.pieces}; }

  int add(const Chunk& chunk, const Rows& t) {
    if (int error = in_parts_ ? 0 : add_shift(chunk)) return error;
    const dim3 grid(blocks(chunk.rows, TILE), static_cast<unsigned>(plan_.width_blocks));
    if (int error = with_width(plan_, [&](auto width, auto exact) {
          constexpr int WIDTH = decltype(width)::value;
          constexpr bool EXACT = decltype(exact)::value;
          return CKD_LAUNCH((bank_gradient<WIDTH, EXACT>), grid, dim3(THREADS),
                            bank_gradient_bytes<WIDTH, EXACT>(), stream_, op_, students(), factors_,
                            chunk, gradient_, shifted_, weight_.scaled());
        })) {
      return error;
    }
    if (in_parts_) {
      if (int error = add_shift(chunk)) return error;
      if (int error = weight_.take_through_norm(chunk, gradient_, nullptr, stream_)) return error;
    }
    return weight_.add(chunk, t, op_.d_weight, op_.d_bias, op_.weight_parts, stream_);
  }

  int add_shift(const Chunk& chunk) const {
    if (op_.targets.shift == nullptr) return 0;
    return with_exact(plan_, [&](auto exact) {
      return CKD_LAUNCH(shift_gradient<decltype(exact)::value>,
                        dim3(blocks(chunk.rows, ROWS_PER_BLOCK)), dim3(THREADS), SUM_OF_ROWS_BYTES,
                        stream_, op_, students(), chunk, gradient_, shifted_);
    });
  }

  const ContrastiveCeBackward& op_;
  Plan plan_;
  Pieces pieces_;
  BankChunks chunks_;
  cudaStream_t stream_;
  std::int64_t batch_;
  WeightGradient weight_;
  __half* u_;
  bool in_parts_;  // dN has several blocks of the width, or pieces, so that dZ takes another kernel
  float* gradient_;
  ShiftTerms shifted_ = {nullptr, nullptr};  // unless in_parts_: then they are added to gradient_
  Factors factors_;
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

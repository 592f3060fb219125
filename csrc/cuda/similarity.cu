#include "bank.cuh"
#include "similarity.h"

namespace ckd::cuda {
namespace {

class Forward {
 public:
  Forward(const SimilarityForward& op, int processors, std::int64_t most_chunk_rows,
          void* workspace, cudaStream_t stream)
      : op_(op),
        plan_(op.in, processors, most_chunk_rows),
        pieces_(workspace),
        chunks_(op.in, plan_, nullptr, false, pieces_, stream),
        stream_(stream),
        u_(pieces_.take<__half>(op.in.student.count * plan_.ld)) {
    chunks_.normalise_students(u_, {nullptr, 0});
  }

  std::int64_t bytes() const { return pieces_.used(); }

  int run() const {
    const std::int64_t batch = op_.in.student.count, ld = plan_.ld;
    if (batch == 0) return 0;
    const auto multiply = [&](const Chunk& chunk, auto exact) {
      return CKD_LAUNCH((project<__half, __half, true, decltype(exact)::value>),
                        dim3(blocks(batch, TILE), blocks(chunk.rows, TILE)), dim3(THREADS),
                        4 * carve_bytes<__half>(TILE * TILE), stream_,
                        static_cast<const __half*>(u_), ld, batch, plan_.ld, chunk.n, ld,
                        static_cast<const float*>(nullptr), static_cast<int>(chunk.rows),
                        op_.in.logit_scale, exact ? 1 / (PIECE_SCALE * PIECE_SCALE) : 1.0f,
                        op_.logits + chunk.first, op_.in.bank.count);
    };
    return chunks_.each([&](const Chunk& chunk, const Rows&) {
      return op_.in.exact ? multiply(chunk, std::true_type()) : multiply(chunk, std::false_type());
    });
  }

 private:
  const SimilarityForward& op_;
  Plan plan_;
  Pieces pieces_;
  BankChunks chunks_;
  cudaStream_t stream_;
  __half* u_;
};

class Backward {
 public:
  Backward(const SimilarityBackward& op, int processors, std::int64_t most_chunk_rows,
           void* workspace, cudaStream_t stream)
      : op_(op),
        plan_(op.in, processors, most_chunk_rows),
        pieces_(workspace),
        chunks_(op.in, plan_, nullptr, false, pieces_, stream),
        stream_(stream),
        weight_(op.in, plan_, op.d_bias != nullptr, pieces_) {
    u_ = pieces_.take<__half>(op.in.student.count * plan_.ld);
    gradient_ = pieces_.take<float>(plan_.chunk_rows * plan_.ld);
    chunks_.normalise_students(u_, weight_.cleared());
  }

  std::int64_t bytes() const { return pieces_.used(); }

  int run() {
    if (op_.in.student.count == 0) return 0;
    return chunks_.each([&](const Chunk& chunk, const Rows& t) {
      if (int error = op_.slope != nullptr ? add_slope(chunk) : 0) return error;
      return op_.d_weight != nullptr ? add_weight(chunk, t) : 0;
    });
  }

 private:
  // slope_i (+)= sum_k d_logits_ik n_k.
  int add_slope(const Chunk& chunk) const {
    const int batch = static_cast<int>(op_.in.student.count);
    const std::int64_t ld = plan_.ld;
    return CKD_LAUNCH(
        (sum_of_products<__half, __half, true>),
        dim3(blocks(batch, TILE), blocks(ld, TILE), static_cast<unsigned>(op_.slope_parts)),
        dim3(THREADS), PRODUCT_BYTES, stream_, op_.d_logits + chunk.first,
        static_cast<std::int64_t>(1), op_.in.bank.count, batch, chunk.n, ld, plan_.ld, chunk.rows,
        op_.largest_of_student, 1, op_.in.exact, op_.slope, static_cast<float*>(nullptr),
        chunk.first > 0);
  }

  // dN_k = logit_scale sum_i d_logits_ik u_i, then dZ, then the projection's gradient.
  int add_weight(const Chunk& chunk, const Rows& t) {
    const std::int64_t batch = op_.in.student.count, ld = plan_.ld;
    if (int error = CKD_LAUNCH((sum_of_products<__half, __half, true>),
                               dim3(blocks(chunk.rows, TILE), blocks(ld, TILE)), dim3(THREADS),
                               PRODUCT_BYTES, stream_, op_.d_logits + chunk.first,
                               op_.in.bank.count, static_cast<std::int64_t>(1),
                               static_cast<int>(chunk.rows), static_cast<const __half*>(u_), ld,
                               plan_.ld, batch, op_.largest_of_bank + chunk.first, 1, op_.in.exact,
                               gradient_, static_cast<float*>(nullptr), false)) {
      return error;
    }
    if (int error = weight_.take_through_norm(chunk, gradient_, op_.in.logit_scale, stream_)) {
      return error;
    }
    return weight_.add(chunk, t, op_.d_weight, op_.d_bias, op_.weight_parts, stream_);
  }

  const SimilarityBackward& op_;
  Plan plan_;
  Pieces pieces_;
  BankChunks chunks_;
  cudaStream_t stream_;
  WeightGradient weight_;
  __half* u_;
  float* gradient_;
};

}  // namespace

std::int64_t forward_workspace(const SimilarityForward& op, int processors,
                               std::int64_t most_chunk_rows) {
  return Forward(op, processors, most_chunk_rows, nullptr, nullptr).bytes();
}

std::int64_t backward_workspace(const SimilarityBackward& op, int processors,
                                std::int64_t most_chunk_rows) {
  return Backward(op, processors, most_chunk_rows, nullptr, nullptr).bytes();
}

int similarity_forward(const SimilarityForward& op, int processors, std::int64_t most_chunk_rows,
                       void* workspace, cudaStream_t stream) {
  return Forward(op, processors, most_chunk_rows, workspace, stream).run();
}

int similarity_backward(const SimilarityBackward& op, int processors, std::int64_t most_chunk_rows,
                        void* workspace, cudaStream_t stream) {
  return Backward(op, processors, most_chunk_rows, workspace, stream).run();
}

}  // namespace ckd::cuda

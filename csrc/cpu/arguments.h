// Arguments of the CPU kernels: plain pointers and sizes. This header must define no functions,
// since every tier compiles it for another instruction set.
//
// B student rows of width W, K bank rows of width D; row-major, float32 unless said otherwise.

#pragma once

#include <cstdint>

namespace ckd::cpu {

enum class Element : int { float16, bfloat16, float32 };

// Student, bank, projection and scale: the arguments common to all ops.
struct Inputs {
  const float* student;  // [B, W]
  std::int64_t batch;
  std::int64_t student_dim;
  const void* bank;  // [K, D] of `element`, rows `bank_stride` elements apart
  Element element;
  std::int64_t bank_rows;
  std::int64_t teacher_dim;
  std::int64_t bank_stride;
  const float* weight;  // [W, D], or null: D == W and no projection
  const float* bias;    // [W], or null
  float logit_scale;
  bool half;    // bfloat16 operands with float32 accumulation, where the tier has them
  int threads;  // the most that may be used
};

// Memory that the forward fills for the backward: a CacheHeader in 64 bytes; each student's lse in
// two numbers (2 B floats, padded to a multiple of 64 bytes); the first panels of the bank,
// projected and normalised, in words (gemm.h), as many as there is room for; then their inverse
// norms. A backward with words of another type (in another tier, say) ignores it.
struct Cache {
  void* data;  // null: none
  std::int64_t bytes;
  bool filled;  // true: read it, false: fill it
};

constexpr Cache NO_CACHE = {nullptr, 0, false};

struct CacheHeader {
  std::int64_t panels, width, per_word;
};

// Weighted targets: the distribution of a student is one-hot at its target, plus the shift at
// `rows` of the bank, whose sum is 0 (Targets of ckd/backends/interface.py).
struct TargetShift {
  const std::int64_t* rows;  // [B, count], or null: no shift
  const float* values;       // [B, count]
  std::int64_t count;
};

// The loss: nll of every row [B], their sum, or their sum / max(1, number of rows not ignored).
enum class Reduction : int { none, sum, mean };

struct ContrastiveCeForward {
  Inputs in;
  const std::int64_t* target;  // [B]
  TargetShift shift;
  std::int64_t ignore_index;
  float label_smoothing;
  Reduction reduction;
  Cache cache;
  // Results. [B] each; residual and attention [B, W], or null: not computed.
  float* loss;  // a scalar unless reduction is none
  float* kept;  // scalar, for reduction mean: the number of rows not ignored, at least 1
  float* lse;
  float* p_other;
  float* residual;
  float* attention;
};

// Null gradients are not computed.
struct ContrastiveCeBackward {
  Inputs in;
  const std::int64_t* target;
  TargetShift shift;
  std::int64_t ignore_index;
  float label_smoothing;
  Reduction reduction;
  Cache cache;
  const float* d_loss;  // in the shape of loss, or null: zero
  const float* kept;    // as the forward computed it
  const float* d_lse;   // [B], or null: zero
  const float* lse;
  const float* p_other;
  const float* residual;
  const float* attention;
  float* d_student;      // [B, W]
  float* d_weight;       // [W, D]
  float* d_bias;         // [W]
  float* d_logit_scale;  // scalar
};

struct SimilarityForward {
  Inputs in;
  float* logits;  // [B, K]
};

struct SimilarityBackward {
  Inputs in;
  const float* d_logits;  // [B, K]
  float* d_student;
  float* d_weight;
  float* d_bias;
  float* d_logit_scale;
};

// The ops of one tier. They throw std::bad_alloc and nothing else.
struct Kernels {
  bool half;  // whether the tier has the arithmetic of Inputs::half
  void (*contrastive_ce_forward)(const ContrastiveCeForward&);
  void (*contrastive_ce_backward)(const ContrastiveCeBackward&);
  void (*similarity_forward)(const SimilarityForward&);
  void (*similarity_backward)(const SimilarityBackward&);
  double (*gemm_peak)(bool half, int threads, double seconds);
};

}  // namespace ckd::cpu

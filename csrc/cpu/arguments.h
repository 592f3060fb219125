// What the ops hand to the CPU kernels: plain pointers and sizes. Nothing with code may stand here,
// since every tier compiles this header for another instruction set.
//
// B student rows of width W, K bank rows of width D; row-major, float32 unless said otherwise.

#pragma once

#include <cstdint>

namespace ckd::cpu {

enum class Element : int { float16, bfloat16, float32 };

// Student, bank, projection and scale: what every op has.
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
  int threads;  // at most so many
};

// What the forward leaves for the backward: a CacheHeader in 64 bytes; for each student what
// float32 dropped of its lse (B floats, made up to a multiple of 64 bytes); and of the first rows
// of the bank, projected and normalised, as many panels of words (gemm.h) as there is room for, and
// then their inverse norms. A backward that computes with other words (in another tier, say) makes
// no use of it.
struct Cache {
  void* data;  // null: none
  std::int64_t bytes;
  bool filled;  // by the forward, or else to be filled
};

constexpr Cache NO_CACHE = {nullptr, 0, false};

struct CacheHeader {
  std::int64_t panels, width, per_word;
};

// What the loss of a call is: nll of every row [B], or their sum, or that over the number of rows
// that are not ignored (at least 1).
enum class Reduction : int { none, sum, mean };

struct ContrastiveCeForward {
  Inputs in;
  const std::int64_t* target;  // [B]
  std::int64_t ignore_index;
  float label_smoothing;
  Reduction reduction;
  Cache cache;
  // Results. [B] each; residual and attention [B, W], or null where not asked for.
  float* loss;  // a scalar unless reduction is none
  float* kept;  // scalar, for reduction mean: the rows that are not ignored, at least 1
  float* lse;
  float* p_other;
  float* residual;
  float* attention;
};

// Null gradients are not computed.
struct ContrastiveCeBackward {
  Inputs in;
  const std::int64_t* target;
  std::int64_t ignore_index;
  float label_smoothing;
  Reduction reduction;
  Cache cache;
  const float* d_loss;  // of the forward's shape, or null: zero
  const float* kept;    // as the forward left it
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
  bool half;  // whether Inputs::half makes a difference
  void (*contrastive_ce_forward)(const ContrastiveCeForward&);
  void (*contrastive_ce_backward)(const ContrastiveCeBackward&);
  void (*similarity_forward)(const SimilarityForward&);
  void (*similarity_backward)(const SimilarityBackward&);
  double (*gemm_peak)(bool half, int threads, double seconds);
};

}  // namespace ckd::cpu

// Arguments of the CUDA kernels: plain pointers into one device's memory, and sizes.
//
// B student rows of width W, K bank rows of width D; row-major, float32 unless said otherwise.

#pragma once

#include <cstdint>

namespace ckd::cuda {

enum class Element : int { float16, bfloat16, float32 };

// A matrix of any of the dtypes, rows `stride` elements apart.
struct Rows {
  const void* data;
  Element element;
  std::int64_t count;
  std::int64_t width;
  std::int64_t stride;
};

// Student, bank, projection and scale: the arguments common to all ops.
struct Inputs {
  Rows student;  // [B, W]
  Rows bank;     // [K, D]
  // [W, D], rows weight_stride elements apart: float32 with `exact`, otherwise float16 for a
  // float16 bank and bfloat16 for any other. Null if there is no projection (then D == W).
  const void* weight;
  std::int64_t weight_stride;
  const float* bias;         // [W], or null
  const float* logit_scale;  // []
  bool exact = false;        // float32 accuracy, from pieces of operands (tile.cuh)
};

struct Targets {
  const std::int64_t* target;  // [B]
  std::int64_t ignore_index;
  float label_smoothing;
  // The difference of each student's distribution from the one-hot one of its target, as M entries:
  // bank rows and their values, whose sum is 0 (ckd/backends/interface.py).
  const std::int64_t* shift_rows = nullptr;  // [B, M], or null: no shift
  const float* shift = nullptr;              // [B, M]
  int shift_count = 0;                       // M; B M is below 2^31
};

// The B M entries of the shift, sorted by bank row and then by index.
struct ShiftOrder {
  const int* rows;              // [B M] bank rows
  const std::int64_t* entries;  // [B M] their indices in [B, M]
};

struct ContrastiveCeForward {
  Inputs in;
  Targets targets;
  void* cache;  // the projected bank, for the backward; null: it is projected again
  // [2, B], or null. For student i its largest product u.n with a row of the bank (in pieces, these
  // are PIECE_SCALE^2 times cosines), and by how much log2(e) lse exceeds that of this row's logit:
  // lse is as large as the scale, and its rounding error would be that of every probability.
  float* reference;
  // Results. [B] each; residual and attention [B, W], or null: not computed.
  float* nll;
  float* loss;  // [] the sum of nll, divided by kept; null: not computed
  float* kept;  // [] the number of rows that are not ignored, at least 1; null: loss is the sum
  float* lse;
  float* p_other;
  float* residual;
  float* attention;
};

struct ContrastiveCeBackward {
  Inputs in;
  Targets targets;
  ShiftOrder shift_order;  // needed for d_weight, if there is a shift
  void* cache;             // as the forward left it
  const float* reference;  // likewise; null: lse is used
  const float* d_nll;      // [B], d_nll_stride apart, each to be divided by kept; null: zeros
  std::int64_t d_nll_stride;
  const float* kept;   // [], or null: 1
  const float* d_lse;  // [B], d_lse_stride apart; null: zeros
  std::int64_t d_lse_stride;
  const float* lse;
  const float* p_other;
  const float* residual;
  const float* attention;
  // Results; null ones are not computed.
  void* d_student;  // [B, W] in the student's dtype
  float* along;     // [B], whose sum is d logit_scale
  float* d_weight;  // [parts, W, D], whose sum over parts is d weight
  float* d_bias;    // [parts, W], likewise
  int weight_parts;
};

struct SimilarityForward {
  Inputs in;
  float* logits;  // [B, K]
};

struct SimilarityBackward {
  Inputs in;
  const float* d_logits;            // [B, K]
  const float* largest_of_student;  // [B] the largest |d_logits| of a row; needed for slope
  const float* largest_of_bank;     // [K] that of a column; needed for d_weight
  // Results; null ones are not computed.
  float* slope;  // [slope_parts, B, ld]: sum_k d_logits n_k, in the layout of bank rows (rows.cuh)
  int slope_parts;
  float* d_weight;  // this and the rest as in ContrastiveCeBackward
  float* d_bias;
  int weight_parts;
};

}  // namespace ckd::cuda

// The ops compiled for one instruction set. A tier_*.cpp file names the tier and includes this;
// tiers.json has its compiler flags.

#pragma once

#include "contrastive_ce.h"
#include "peak.h"
#include "similarity.h"

namespace ckd::cpu {
namespace CKD_TIER {
namespace {

void run_contrastive_ce_forward(const ContrastiveCeForward& op) {
#if defined(CKD_BFLOAT16)
  if (op.in.half) return CeForward<BFloat16>(op).run();
#endif
  CeForward<Float32>(op).run();
}

void run_contrastive_ce_backward(const ContrastiveCeBackward& op) {
#if defined(CKD_BFLOAT16)
  if (op.in.half) return contrastive_ce_backward<BFloat16>(op);
#endif
  contrastive_ce_backward<Float32>(op);
}

void run_similarity_forward(const SimilarityForward& op) {
#if defined(CKD_BFLOAT16)
  if (op.in.half) return similarity_forward<BFloat16>(op);
#endif
  similarity_forward<Float32>(op);
}

void run_similarity_backward(const SimilarityBackward& op) {
#if defined(CKD_BFLOAT16)
  if (op.in.half) return similarity_backward<BFloat16>(op);
#endif
  similarity_backward<Float32>(op);
}

double run_gemm_peak(bool half, int threads, double seconds) {
#if defined(CKD_BFLOAT16)
  if (half) return gemm_peak<BFloat16>(threads, seconds);
#endif
  (void)half;
  return gemm_peak<Float32>(threads, seconds);
}

#if defined(CKD_BFLOAT16)
constexpr bool HALF = true;
#else
constexpr bool HALF = false;
#endif

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {HALF,
                         run_contrastive_ce_forward,
                         run_contrastive_ce_backward,
                         run_similarity_forward,
                         run_similarity_backward,
                         run_gemm_peak};

}  // namespace CKD_TIER
}  // namespace ckd::cpu

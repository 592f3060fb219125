// logit_scale u . n for every pair, as a matrix. Functions return as those of contrastive_ce.h do.

#pragma once

#include <driver_types.h>

#include "arguments.h"

namespace ckd::cuda {

std::int64_t forward_workspace(const SimilarityForward& op, int processors,
                               std::int64_t most_chunk_rows);
std::int64_t backward_workspace(const SimilarityBackward& op, int processors,
                                std::int64_t most_chunk_rows);

int similarity_forward(const SimilarityForward& op, int processors, std::int64_t most_chunk_rows,
                       void* workspace, cudaStream_t stream);
int similarity_backward(const SimilarityBackward& op, int processors, std::int64_t most_chunk_rows,
                        void* workspace, cudaStream_t stream);

}  // namespace ckd::cuda

// Contrastive cross-entropy on a CUDA device, with float16 operands and float32 sums. See
// softmax.cuh and bank_gradient.cuh for the mathematics. Every function returns a cudaError, 0 when
// all kernels were launched.

#pragma once

#include <driver_types.h>

#include "arguments.h"

namespace ckd::cuda {

// Bytes of workspace, results and cache not included. `most_chunk_rows` bounds the rows of a chunk
// of the bank (rounded up to a tile); only tests lower it.
std::int64_t forward_workspace(const ContrastiveCeForward& op, int processors,
                               std::int64_t most_chunk_rows);
std::int64_t backward_workspace(const ContrastiveCeBackward& op, int processors,
                                std::int64_t most_chunk_rows);

int contrastive_ce_forward(const ContrastiveCeForward& op, int processors,
                           std::int64_t most_chunk_rows, void* workspace, cudaStream_t stream);
int contrastive_ce_backward(const ContrastiveCeBackward& op, int processors,
                            std::int64_t most_chunk_rows, void* workspace, cudaStream_t stream);

// The description of a cudaError.
const char* error_text(int error);

// Whether earlier asynchronous work, ours or another library's, caused the error. Every later call
// returns such an error and launches nothing.
bool is_of_earlier_work(int error);

}  // namespace ckd::cuda

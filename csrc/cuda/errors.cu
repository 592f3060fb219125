#include "contrastive_ce.h"
#include "device.cuh"

namespace ckd::cuda {

const char* error_text(int error) {
#ifdef CKD_EMULATION
  return error == 0 ? "no error" : "an error of the emulation";
#else
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#endif
}

}  // namespace ckd::cuda

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

bool is_of_earlier_work(int error) {
  switch (error) {
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
      return true;
    default:
      return false;
  }
}

}  // namespace ckd::cuda

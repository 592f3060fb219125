// Everything that kernels use of the GPU beyond plain C++, and the only file with PTX. A wrapper is
// one instruction, so that little code needs a GPU to be tested. With CKD_EMULATION the same names
// come from csrc/emulation, where kernels run on the CPU (docs/emulation.md).

#pragma once

#ifdef CKD_EMULATION
#include "../emulation/emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

#define CKD_KERNEL __global__
#define CKD_DEVICE __device__ __forceinline__

// Launches a kernel and returns the cudaError, 0 for success. Names with a comma take parentheses:
// CKD_LAUNCH((name<A, B>), grid, block, shared_bytes, stream, arguments...).
#define CKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ckd::cuda::Launch<kernel>::start(grid, block, shared_bytes, stream, ##__VA_ARGS__)

// Declares `unsigned char* name`: the dynamic shared memory, 1024-byte aligned.
#define CKD_SHARED(name)                                            \
  extern __shared__ __align__(1024) unsigned char ckd_shared_all[]; \
  unsigned char* name = ckd_shared_all

namespace ckd::cuda {

// A kernel always takes the same amount of shared memory: its attributes are set once per device.
template <auto KERNEL>
struct Launch;
template <class... Parameters, void (*KERNEL)(Parameters...)>
struct Launch<KERNEL> {
  static int start(dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                   Parameters... parameters) {
    if (int error = prepare(shared_bytes)) return error;
    void* pointers[] = {&parameters...};
    const void* kernel = reinterpret_cast<const void*>(KERNEL);
    // The launch's own status: cudaGetLastError would also report failures of earlier calls.
    return told(cudaLaunchKernel(kernel, grid, block, pointers,
                                 static_cast<std::size_t>(shared_bytes), stream));
  }

 private:
  static int prepare(int shared_bytes) {
    constexpr int LITTLE = 16 << 10;  // fits the default carveout of the L1 cache
    constexpr int BITS = 64;
    static std::atomic<std::uint64_t> prepared{0};  // a bit for each device
    if (shared_bytes <= LITTLE) return 0;
    int device = 0;
    if (int error = told(cudaGetDevice(&device))) return error;
    const std::uint64_t bit = device < BITS ? std::uint64_t{1} << device : 0;
    if ((prepared.load(std::memory_order_relaxed) & bit) != 0) return 0;
    const auto set = [](cudaFuncAttribute attribute, int value) {
      return told(cudaFuncSetAttribute(reinterpret_cast<const void*>(KERNEL), attribute, value));
    };
    if (int error = set(cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) return error;
    // By default the driver may choose a carveout with room for only one block per multiprocessor.
    if (int error =
            set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared)) {
      return error;
    }
    prepared.fetch_or(bit, std::memory_order_relaxed);
    return 0;
  }

  // Clears the error, which no later call shall report again, and returns it.
  static int told(cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return static_cast<int>(error);
  }
};

// Bytes that Carve takes for `count` elements: a multiple of 16.
template <class T>
__host__ __device__ constexpr int carve_bytes(int count) {
  return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

// Allocates arrays in shared memory, each 16-byte aligned.
class Carve {
 public:
  CKD_DEVICE explicit Carve(unsigned char* memory) : next_(memory) {}

  template <class T>
  CKD_DEVICE T* take(int count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += carve_bytes<T>(count);
    return piece;
  }

 private:
  unsigned char* next_;
};

CKD_DEVICE void sync_block() { __syncthreads(); }
CKD_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
CKD_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

CKD_DEVICE bool any_of_warp(bool value) { return __any_sync(0xffffffffu, value) != 0; }

// An address in shared memory, to which byte offsets may be added.
using SharedAddress = std::uint32_t;
CKD_DEVICE SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix
// i, 16 bytes; r[i] of lane l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
CKD_DEVICE void load_matrix(std::uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same with each matrix transposed: lane l gets elements of column l / 4.
CKD_DEVICE void load_matrix_transposed(std::uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// c += a b for a 16 x 16 (row-major), b 16 x 8 (column-major) and c 16 x 8, distributed over the
// warp's registers as the PTX manual shows for m16n8k16; sums in float32.
template <class T>
CKD_DEVICE void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                             std::uint32_t b1) {
  static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value,
                "multiply_add takes __half or __nv_bfloat16");
  if constexpr (std::is_same<T, __half>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Starts an asynchronous copy of `bytes` (0 to 16) bytes of global memory to 16 bytes of shared
// memory, padded with zeros. Both addresses are multiples of 16. commit_copies closes its group.
CKD_DEVICE void copy_async(SharedAddress shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(bytes)
               : "memory");
}

CKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N newest groups of this thread are pending. Other threads see its copies
// only after a barrier.
template <int N>
CKD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x to 2 units in the last place; subnormal results are 0.
CKD_DEVICE float exp2_fast(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// For value >= 0 only: such floats are ordered as their bits are as integers.
CKD_DEVICE void atomic_max(float* address, float value) {
  atomicMax(reinterpret_cast<int*>(address), __float_as_int(value));
}

// Adds 1 to the counter and returns its old value, with acquire-release order: what the caller's
// block wrote before its last barrier is visible to later callers, and to all threads of a later
// caller's block after that block's next barrier.
CKD_DEVICE int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

}  // namespace ckd::cuda

#endif  // CKD_EMULATION

// The names of csrc/cuda/device.cuh for the CPU, where every CUDA thread is a fiber.
// docs/emulation.md says what the emulation checks and what it cannot. x86-64 Linux only.

#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulation of CUDA kernels needs x86-64 Linux: it switches stacks in assembly"
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// The toolkit's headers define these for nvcc only.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ \
  static_assert(false, "the emulation has no __shared__ variables: use CKD_SHARED");

#define CKD_KERNEL
#define CKD_DEVICE inline
#define CKD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::ckd::emulation::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)
#define CKD_SHARED(name) unsigned char* name = ::ckd::emulation::shared_begin()

#define threadIdx (::ckd::emulation::current->index)
#define blockIdx (::ckd::emulation::block_index)
#define blockDim (::ckd::emulation::block_size)
#define gridDim (::ckd::emulation::grid_size)

// nvcc has these without a namespace.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }

namespace ckd::emulation {

constexpr int LANES = 32;

// A source line of a kernel.
struct Site {
  const char* file;
  int line;
};

struct Thread {
  uint3 index;
  int lane, warp;
};

extern Thread* current;
extern uint3 block_index;
extern dim3 block_size, grid_size;

// Calls `thread` for each thread of the grid, block after block; returns a cudaError or 0.
int run(const char* kernel, dim3 grid, dim3 block, int shared_bytes, void (*thread)(const void*),
        const void* context);

template <class... Parameters, class... Arguments>
int launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
           cudaStream_t, Arguments... arguments) {
  const auto call = [&] { kernel(arguments...); };
  return run(
      name, grid, block, shared_bytes,
      [](const void* context) { (*static_cast<decltype(call)*>(context))(); }, &call);
}

unsigned char* shared_begin();

// Allocates the piece of shared memory that begins at `piece`; returns the address of the next one.
// `used` is the size of all pieces on a GPU, this one included.
unsigned char* carve(unsigned char* piece, std::size_t bytes, int used, Site site);

void wait_for_block(Site site);

// The operands and results of a warp's lanes in a collective.
struct Exchange {
  alignas(16) unsigned char in[LANES][64];
  alignas(16) unsigned char out[LANES][64];
};
using Compute = void (*)(Exchange& warp, int argument);

enum class Order { none, memory };  // memory: orders the lanes' writes, as __syncwarp does

struct Collective {
  const char* name;
  Compute compute;
  int argument;  // the same in all lanes
  Order order;
};

// Waits for all 32 lanes; the last lane to arrive computes every lane's result from their inputs.
void wait_for_warp(const Collective& collective, const void* in, std::size_t in_bytes, void* out,
                   std::size_t out_bytes, Site site);

void compute_nothing(Exchange& warp, int);
void compute_shuffle_xor(Exchange& warp, int mask);
void compute_any(Exchange& warp, int);
void compute_load_matrix(Exchange& warp, int transposed);
void compute_multiply_add_half(Exchange& warp, int);
void compute_multiply_add_bfloat16(Exchange& warp, int);

// A lane's operands of a matrix product.
struct Fragments {
  std::uint32_t a[4], b[2];
  float c[4];
};

void read_shared_row(unsigned char (&row)[16], const void* address, Site site);

void start_copy(void* shared, const void* global, int bytes, Site site);
void commit_copies();
void wait_copies(int newest);

}  // namespace ckd::emulation

// A last parameter whose default is the line of the call.
#define CKD_SITE ::ckd::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace ckd::cuda {

template <class T>
constexpr int carve_bytes(int count) {
  return (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
}

class Carve {
 public:
  explicit Carve(unsigned char* memory) : next_(memory) {}

  template <class T>
  T* take(int count, CKD_SITE) {
    unsigned char* piece = next_;
    used_ += carve_bytes<T>(count);
    next_ = emulation::carve(piece, static_cast<std::size_t>(count) * sizeof(T), used_, site);
    return reinterpret_cast<T*>(piece);
  }

 private:
  unsigned char* next_;
  int used_ = 0;
};

inline void sync_block(CKD_SITE) { emulation::wait_for_block(site); }

inline void sync_warp(CKD_SITE) {
  emulation::wait_for_warp({"sync_warp", emulation::compute_nothing, 0, emulation::Order::memory},
                           nullptr, 0, nullptr, 0, site);
}

template <class T>
T shuffle_xor(T value, int mask, CKD_SITE) {
  static_assert(sizeof(T) == 4, "a shuffle moves 32 bits");
  T other;
  emulation::wait_for_warp(
      {"shuffle_xor", emulation::compute_shuffle_xor, mask, emulation::Order::none}, &value,
      sizeof value, &other, sizeof other, site);
  return other;
}

inline bool any_of_warp(bool value, CKD_SITE) {
  bool any;
  emulation::wait_for_warp({"any_of_warp", emulation::compute_any, 0, emulation::Order::none},
                           &value, sizeof value, &any, sizeof any, site);
  return any;
}

using SharedAddress = unsigned char*;
inline SharedAddress shared_address(const void* pointer) {
  return static_cast<unsigned char*>(const_cast<void*>(pointer));
}

inline void load_matrix(std::uint32_t (&r)[4], SharedAddress row, CKD_SITE) {
  unsigned char elements[16];
  emulation::read_shared_row(elements, row, site);
  emulation::wait_for_warp(
      {"load_matrix", emulation::compute_load_matrix, 0, emulation::Order::none}, elements,
      sizeof elements, r, sizeof r, site);
}

inline void load_matrix_transposed(std::uint32_t (&r)[4], SharedAddress row, CKD_SITE) {
  unsigned char elements[16];
  emulation::read_shared_row(elements, row, site);
  emulation::wait_for_warp(
      {"load_matrix_transposed", emulation::compute_load_matrix, 1, emulation::Order::none},
      elements, sizeof elements, r, sizeof r, site);
}

template <class T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                  CKD_SITE) {
  static_assert(std::is_same<T, __half>::value || std::is_same<T, __nv_bfloat16>::value,
                "multiply_add takes __half or __nv_bfloat16");
  const emulation::Fragments in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  emulation::wait_for_warp(
      {"multiply_add",
       std::is_same<T, __half>::value ? emulation::compute_multiply_add_half
                                      : emulation::compute_multiply_add_bfloat16,
       0, emulation::Order::none},
      &in, sizeof in, c, sizeof c, site);
}

inline void copy_async(SharedAddress shared, const void* global, int bytes, CKD_SITE) {
  emulation::start_copy(shared, global, bytes, site);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int N>
void wait_copies() {
  emulation::wait_copies(N);
}

inline float exp2_fast(float x) {
  const float power = std::exp2(x);
  return power < FLT_MIN ? 0 : power;  // NaN stays NaN
}

// Compiled with the kernel, so that ThreadSanitizer sees an atomic.
inline void atomic_max(float* address, float value) {
  int wanted;
  std::memcpy(&wanted, &value, sizeof wanted);
  int* bits = reinterpret_cast<int*>(address);
  int seen = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (seen < wanted && !__atomic_compare_exchange_n(bits, &seen, wanted, false, __ATOMIC_RELAXED,
                                                       __ATOMIC_RELAXED)) {
  }
}

inline int arrive(int* counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL); }

}  // namespace ckd::cuda

#undef CKD_SITE

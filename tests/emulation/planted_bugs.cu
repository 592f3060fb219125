// A kernel with planted bugs, which shows what the emulation finds. For logits = a b, a [rows,
// inner], b [inner, columns]: log2 of each row's sum of 2^logit, and the largest |logit|.
//
// 32 x 32 tiles of logits by 2 x 2 warps, copies one tile ahead, a running sum over column tiles.
// -DBUG=n plants bug n; without it the program's argument does. 0 is none.

#include <cfloat>

#include "../../csrc/cuda/device.cuh"

#ifndef BUG
static int planted_bug = 0;
#define BUG planted_bug
#define BUG_IS_ARGUMENT
#endif

namespace {

using namespace ckd::cuda;

constexpr int THREADS = 128, TILE = 32, INNER = 32, STAGES = 2;
constexpr int STRIDE = INNER + 8;  // padded, so that rows begin in different memory banks
constexpr int PIECE = TILE * STRIDE;

template <class T>
constexpr int shared_size() {
  return 2 * carve_bytes<T>(STAGES * PIECE) + 2 * carve_bytes<float>(2 * TILE) +
         carve_bytes<float>(THREADS);
}

// Each thread copies 8 elements of a row, those beyond the matrix as zeros. A row of the matrix is
// `stride` elements, a multiple of 8, of which `columns` count.
template <class T>
CKD_DEVICE void copy_tile(T* tile, const T* matrix, int first_row, int rows, int first_column,
                          int columns, int stride) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
  const int from_row = first_row + row, from_column = first_column + column;
  int count = min(max(columns - from_column, 0), 8);
  if (BUG != 7 && from_row >= rows) count = 0;
  const T* from =
      count > 0 ? matrix + static_cast<long long>(from_row) * stride + from_column : matrix;
  const int to_row = BUG == 6 && row == TILE - 1 ? row + TILE : row;
  copy_async(shared_address(tile + to_row * STRIDE + column), from,
             count * static_cast<int>(sizeof(T)));
}

template <class T>
CKD_KERNEL void __launch_bounds__(THREADS)
    row_sums(const T* a, const T* b, float* sums, float* largest, int rows, int columns, int inner,
             int a_stride, int b_stride) {
  CKD_SHARED(memory);
  Carve carve(memory);
  T* a_tiles = carve.take<T>(STAGES * PIECE);
  T* b_tiles = carve.take<T>(STAGES * PIECE);
  float* part_max = carve.take<float>(2 * TILE);  // [warp column, row]
  float* part_sum = carve.take<float>(2 * TILE);
  float* peaks = carve.take<float>(THREADS);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16, first_row = blockIdx.x * TILE;
  const int inner_tiles = (inner + INNER - 1) / INNER;
  const int steps = (columns + TILE - 1) / TILE * inner_tiles;

  const auto start_copies = [&](int step) {
    if (step < steps) {
      const int stage = step % STAGES, k = step % inner_tiles * INNER;
      copy_tile(a_tiles + stage * PIECE, a, first_row, rows, k, inner, a_stride);
      copy_tile(b_tiles + stage * PIECE, b, k, inner, step / inner_tiles * TILE, columns, b_stride);
    }
    if (BUG != 18) commit_copies();
  };

  if (BUG == 12 && warp_row >= rows - first_row) return;
  float running_max[2] = {-FLT_MAX, -FLT_MAX}, running_sum[2] = {0, 0}, peak = 0;
  float logits[2][4];
  start_copies(0);
  for (int step = 0; step < steps; ++step) {
    start_copies(step + 1);
    if (BUG == 3) {
      wait_copies<2>();
    } else {
      wait_copies<1>();
    }
    if (BUG != 1) sync_block();  // the copies of all threads have arrived
    if (step % inner_tiles == 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) logits[i / 4][i % 4] = 0;
    }
    const T* a_tile = a_tiles + step % STAGES * PIECE;
    const T* b_tile = b_tiles + step % STAGES * PIECE;
#pragma unroll
    for (int k = 0; k < INNER; k += 16) {
      std::uint32_t a_part[4], b_part[4];
      const int half = lane / 16 * 8 + (BUG == 16 ? 4 : 0);
      load_matrix(a_part, shared_address(a_tile + (warp_row + lane % 16) * STRIDE + k + half));
      const T* b_row = b_tile + (k + lane % 16) * STRIDE + warp_column + lane / 16 * 8;
      if (BUG == 5) {
        load_matrix(b_part, shared_address(b_row));
      } else {
        load_matrix_transposed(b_part, shared_address(b_row));
      }
      if (BUG == 4) {
        const std::uint32_t other = a_part[1];
        a_part[1] = a_part[2];
        a_part[2] = other;
      }
      multiply_add<T>(logits[0], a_part, b_part[0], b_part[1]);
      multiply_add<T>(logits[1], a_part, b_part[2], b_part[3]);
    }
    if (BUG != 2) sync_block();  // the next copies overwrite what was read here
    if (step % inner_tiles != inner_tiles - 1) continue;

    const int first_column = step / inner_tiles * TILE + warp_column + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // rows lane / 4 and lane / 4 + 8
      float tile_max = -FLT_MAX, tile_sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& logit = logits[i / 2][half * 2 + i % 2];
        peak = fmaxf(peak, fabsf(logit));
        if (first_column + i / 2 * 8 + i % 2 >= columns) logit = -FLT_MAX;
        tile_max = fmaxf(tile_max, logit);
      }
      if (BUG == 11) {
        if (lane < 16) tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 1));
      } else {
        tile_max = fmaxf(tile_max, shuffle_xor(tile_max, 1));
      }
      tile_max = fmaxf(tile_max, shuffle_xor(tile_max, BUG == 19 ? 4 : 2));
      const float new_max = fmaxf(running_max[half], tile_max);
#pragma unroll
      for (int i = 0; i < 4; ++i) tile_sum += exp2_fast(logits[i / 2][half * 2 + i % 2] - new_max);
      running_sum[half] = running_sum[half] * exp2_fast(running_max[half] - new_max) + tile_sum;
      running_max[half] = new_max;
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = running_sum[half];
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int part = warp_column / 16 * TILE + warp_row + half * 8 + lane / 4;
    if (lane % 4 == 0) {
      part_max[part] = running_max[half];
      part_sum[part] = sum;
    }
  }

  peaks[thread] = peak;
  if (BUG != 10) sync_warp();  // one lane reads what all of its warp wrote
  if (lane == 0) {
    for (int i = 0; i < 32; ++i) peak = fmaxf(peak, peaks[warp * 32 + i]);
    if (BUG == 15) {
      *largest = fmaxf(*largest, peak);
    } else {
      atomic_max(largest, peak);
    }
  }

  if (BUG == 13) {
    if (warp_row == 0) {
      sync_block();
    } else {
      sync_block();
    }
  } else if (BUG != 17) {
    sync_block();  // each row combines the partial sums of two warps
  }
  if (BUG == 21 && thread == 0 && sums[0] == FLT_MAX) return;
  if (thread >= TILE && BUG != 14) return;
  const int row = thread % TILE;
  if (first_row + row >= rows && BUG != 8) return;
  const int other = (BUG == 9 ? 2 : 1) * TILE + row;
  const float all_max = fmaxf(part_max[row], part_max[other]);
  const float sum = part_sum[row] * exp2_fast(part_max[row] - all_max) +
                    part_sum[other] * exp2_fast(part_max[other] - all_max);
  sums[first_row + row] = all_max + log2f(sum);
}

}  // namespace

template <class T>
int launch_row_sums(const T* a, const T* b, float* sums, float* largest, int rows, int columns,
                    int inner, int a_stride, int b_stride, cudaStream_t stream) {
  const int shared_bytes = shared_size<T>() - (BUG == 20 ? 16 : 0);
  return CKD_LAUNCH((row_sums<T>), (rows + TILE - 1) / TILE, THREADS, shared_bytes, stream, a, b,
                    sums, largest, rows, columns, inner, a_stride, b_stride);
}

template int launch_row_sums<__half>(const __half*, const __half*, float*, float*, int, int, int,
                                     int, int, cudaStream_t);
template int launch_row_sums<__nv_bfloat16>(const __nv_bfloat16*, const __nv_bfloat16*, float*,
                                            float*, int, int, int, int, int, cudaStream_t);

#ifdef CKD_EMULATION

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

// A matrix of exactly rows x stride elements, so that AddressSanitizer sees its end.
template <class T>
struct Matrix {
  Matrix(int rows, int columns, std::mt19937& numbers)
      : stride((columns + 7) / 8 * 8), elements(static_cast<std::size_t>(rows) * stride) {
    for (T& element : elements) element = T(numbers() % 2048 / 1024.0f - 1);
  }
  double at(int row, int column) const {
    return static_cast<float>(elements[static_cast<std::size_t>(row) * stride + column]);
  }
  int stride;
  std::vector<T> elements;
};

bool near(const char* what, int row, double got, double expected) {
  if (std::fabs(got - expected) <= 1e-4 * (1 + std::fabs(expected))) return true;  // not for NaN
  std::printf("WRONG: %s %d is %g, expected %g\n", what, row, got, expected);
  return false;
}

template <class T>
bool check(int rows, int columns, int inner) {
  std::mt19937 numbers(1);
  const Matrix<T> a(rows, inner, numbers), b(inner, columns, numbers);
  std::vector<float> sums(rows, NAN), largest(1, 0.0f);
  const int error =
      launch_row_sums<T>(a.elements.data(), b.elements.data(), sums.data(), largest.data(), rows,
                         columns, inner, a.stride, b.stride, nullptr);
  if (error != 0) return near("error", 0, error, 0);
  double expected_largest = 0;
  for (int row = 0; row < rows; ++row) {
    double sum = 0;
    for (int column = 0; column < columns; ++column) {
      double logit = 0;
      for (int k = 0; k < inner; ++k) logit += a.at(row, k) * b.at(k, column);
      expected_largest = std::fmax(expected_largest, std::fabs(logit));
      sum += std::exp2(logit);
    }
    if (!near("sum of row", row, sums[row], std::log2(sum))) return false;
  }
  return near("largest", 0, largest[0], expected_largest);
}

}  // namespace

int main([[maybe_unused]] int count, [[maybe_unused]] char** arguments) {
#ifdef BUG_IS_ARGUMENT
  if (count > 1) planted_bug = std::atoi(arguments[1]);
#endif
  // Whole tiles; ragged in every dimension with several blocks; fewer rows than half a tile.
  const int shapes[][3] = {{32, 64, 64}, {45, 77, 83}, {9, 40, 32}};
  bool right = true;
  for (const auto& shape : shapes) {
    right &= check<__half>(shape[0], shape[1], shape[2]);
    right &= check<__nv_bfloat16>(shape[0], shape[1], shape[2]);
  }
  return right ? 0 : 1;
}

#endif

// Unit rows of students and of the bank, and their way through shared memory tile by tile.

#pragma once

#include "rows.cuh"

namespace ckd::cuda {

// Exponentials and G are multiplied by 2^13 before they are rounded to float16: the largest is in
// its range, and underflow starts at 2^-37 of it. A running maximum may lag behind by 2^SLACK.
constexpr float HEADROOM = 13, LIFT = 8192, SLACK = 2;
constexpr float NO_COSINE = -2;  // the maximum over no rows: below every cosine, and finite

// A chunk of the bank, projected and normalised.
struct Chunk {
  const __half* n;       // [rows, ld]
  const float* inverse;  // [rows] 1 / |z|
  int rows;
  std::int64_t first, bank_rows;
};

// Row k of the bank as a row of the chunk; -1 if it is in another chunk or k is -1.
CKD_DEVICE int row_of_chunk(std::int64_t k, const Chunk& chunk) {
  return k >= chunk.first && k < chunk.first + chunk.rows ? static_cast<int>(k - chunk.first) : -1;
}

struct Students {
  const __half* u;  // [batch, ld]
  int batch;
  int ld;      // row length, with all pieces
  int pieces;  // 1, or 3 with exact arithmetic
};

// The operands of a product u n^T in shared memory: one tile stays, the other operand is streamed
// past it, double-buffered, so that the next tile is copied during the products of this one. If the
// width has several blocks, both are loaded block by block, in the same order whatever the block
// `own` is, which the second buffer keeps: a product has the same bits in every kernel.
template <int WIDTH, bool EXACT>
struct Operands {
  // Rows of a streaming tile. With 64 the sums of a wide block would not fit into registers.
  static constexpr int ROWS = WIDTH == 256 || (WIDTH == 128 && EXACT) ? 32 : 64;
  using Streaming = Tile<__half, WIDTH, ROWS>;

  Tile<__half, WIDTH> stays;
  Buffers<__half, WIDTH, ROWS> streams;
  const __half *stay_rows, *stream_rows;
  int first_stay, stay_end, stream_end;
  int ld, own;

  CKD_DEVICE int blocks() const { return (ld + WIDTH - 1) / WIDTH; }

  // Starts the first copies. Copies that the caller has started arrive with the first tile.
  CKD_DEVICE void begin(int first_stream) const {
    if (blocks() > 1) return;
    stays.copy(stay_rows, ld, first_stay, stay_end, 0, ld);
    streams.tile(0).copy(stream_rows, ld, first_stream, stream_end, 0, ld);
    commit_copies();
  }

  // Adds the products of tile `step`, rows from `row` on, and returns the tile (its block `own`).
  // If another tile follows, calls `prefetch()` after the barrier that frees the other buffer;
  // copies that it starts arrive with that tile.
  template <class Prefetch>
  CKD_DEVICE Streaming next(Sums<ROWS / 8>& sums, int row, int step,
                            const Prefetch& prefetch) const {
    if (blocks() == 1) {
      const Streaming tile = streams.tile(step);
      wait_copies<0>();
      sync_block();  // this tile has arrived, and the other buffer is free
      if (row + ROWS < stream_end) {
        streams.tile(step + 1).copy(stream_rows, ld, row + ROWS, stream_end, 0, ld);
        prefetch();
        commit_copies();
      }
      add_product_of_rows(sums, stays, tile);
      return tile;
    }
    for (int block = 0; block < blocks(); ++block) {
      const Streaming tile = streams.tile(block == own);
      sync_block();  // no warp still reads the tiles
      stays.copy(stay_rows, ld, first_stay, stay_end, block * WIDTH, ld);
      tile.copy(stream_rows, ld, row, stream_end, block * WIDTH, ld);
      if (block == 0 && row + ROWS < stream_end) prefetch();
      commit_copies();
      wait_copies<0>();
      sync_block();  // both have arrived
      if constexpr (EXACT) {
        add_rounded_product_of_rows(sums, stays, tile);
      } else {
        add_product_of_rows(sums, stays, tile);
      }
    }
    return streams.tile(1);
  }
};

template <int WIDTH, bool EXACT>
constexpr int operands_bytes() {
  return carve_bytes<__half>(Tile<__half, WIDTH>::SIZE) +
         carve_bytes<__half>(2 * Operands<WIDTH, EXACT>::Streaming::SIZE);
}

template <int WIDTH, bool EXACT>
CKD_DEVICE Operands<WIDTH, EXACT> take_operands(Carve& carve) {
  Operands<WIDTH, EXACT> operands;
  operands.stays.data = carve.take<__half>(operands.stays.SIZE);
  operands.streams.data = carve.take<__half>(2 * Operands<WIDTH, EXACT>::Streaming::SIZE);
  return operands;
}

}  // namespace ckd::cuda

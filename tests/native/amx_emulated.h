// AMX tiles in plain C++, so that the tier's loops over tiles run on processors without AMX. Must
// be the first include of the AVX-512 tier with bfloat16, which then multiplies with these tiles.
//
// Tiles hold NaN until they are loaded. Use of a tile against its configuration aborts.

#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CKD_AMX

namespace amx_emulated {

struct Tile {
  int rows = 0, row_bytes = 0;
  float words[16][16];  // 32 bits each, of any type
};
inline thread_local Tile tiles[8];

inline void demand(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Tile& configured(int tile) {
  demand(tiles[tile].rows > 0 && tiles[tile].row_bytes > 0, "a tile that is not configured");
  return tiles[tile];
}

inline void load_config(const void* config) {
  std::uint8_t bytes[64];
  std::memcpy(bytes, config, sizeof bytes);
  demand(bytes[0] == 1, "palette 1 is the only one");
  for (int tile = 0; tile < 8; ++tile) {
    Tile& t = tiles[tile];
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof row_bytes);
    t.rows = bytes[48 + tile];
    t.row_bytes = row_bytes;
    demand(t.rows <= 16 && row_bytes <= 64, "a tile has at most 16 rows of 64 bytes");
    for (auto& row : t.words) {
      for (float& word : row) word = std::nanf("");
    }
  }
}

inline void release() {
  for (Tile& t : tiles) t.rows = t.row_bytes = 0;
}

inline void zero(int tile) {
  Tile& t = configured(tile);
  std::memset(t.words, 0, sizeof t.words);
}

inline void load_tile(int tile, const void* from, std::int64_t stride) {
  Tile& t = configured(tile);
  std::memset(t.words, 0, sizeof t.words);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.words[r], static_cast<const char*>(from) + r * stride,
                static_cast<std::size_t>(t.row_bytes));
  }
}

inline void store_tile(int tile, void* to, std::int64_t stride) {
  const Tile& t = configured(tile);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, t.words[r],
                static_cast<std::size_t>(t.row_bytes));
  }
}

// Element 0 or 1 of a pair of bfloat16.
inline float element(float pair, int which) {
  std::uint32_t bits;
  std::memcpy(&bits, &pair, sizeof bits);
  bits = which == 0 ? bits << 16 : bits & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void multiply(int to, int left, int right) {
  Tile& c = configured(to);
  const Tile &a = configured(left), &b = configured(right);
  demand(a.rows == c.rows && b.row_bytes == c.row_bytes && a.row_bytes == 4 * b.rows,
         "tiles that do not fit each other");
  for (int m = 0; m < c.rows; ++m) {
    for (int k = 0; k < b.rows; ++k) {
      for (int n = 0; n < c.row_bytes / 4; ++n) {
        for (int which = 0; which < 2; ++which) {
          c.words[m][n] += element(a.words[m][k], which) * element(b.words[k][n], which);
        }
      }
    }
  }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_emulated::load_config
#define _tile_release amx_emulated::release
#define _tile_zero amx_emulated::zero
#define _tile_loadd amx_emulated::load_tile
#define _tile_stored amx_emulated::store_tile
#define _tile_dpbf16ps amx_emulated::multiply

#endif

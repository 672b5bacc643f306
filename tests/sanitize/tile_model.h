// A software model of AMX's tiles, in the place of the instructions of csrc/core/tiles.h: eight tiles of at most 16 rows
// of 64 bytes. What the processor would refuse, and what it would leave undefined, ends the program with a message:
// shapes past the palette, tiles that do not fit each other, reading a tile that nothing was written to since it was
// configured. Configured tiles hold NaNs, not the processor's zeros, and so does what a shorter row leaves free.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace tile_model {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tiles {
  bool configured = false;
  int rows[kTiles], row_bytes[kTiles];
  bool written[kTiles];
  alignas(64) unsigned char data[kTiles][kRows][kRowBytes];
};
inline thread_local Tiles tiles;
inline std::atomic<int> configured{0};  // threads that hold tiles now
inline std::atomic<long> products{0};   // of tiles, so far

inline void require(bool condition, const char* what, int tile = -1) {
  if (condition) return;
  std::printf("FAILED tile model: %s (tile %d)\n", what, tile);
  std::fflush(stdout);
  std::abort();
}
inline void require_shape(int tile) {
  require(tiles.configured, "no configuration is loaded", tile);
  require(tile >= 0 && tile < kTiles, "there is no such tile", tile);
  require(tiles.rows[tile] > 0, "the configuration leaves this tile out", tile);
}
inline void require_written(int tile) {
  require_shape(tile);
  require(tiles.written[tile], "reads a tile that nothing was written to", tile);
}

// The 64 bytes that LDTILECFG reads.
inline void configure(const unsigned char* bytes) {
  require(bytes[0] == 1, "palette is not 1");
  require(bytes[1] == 0, "start_row is not 0");
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "a reserved byte is not 0");
  if (!tiles.configured) ++configured;
  tiles.configured = true;
  for (int t = 0; t < 16; ++t) {
    const int row_bytes = bytes[16 + 2 * t] + 256 * bytes[17 + 2 * t], rows = bytes[48 + t];
    require((rows == 0) == (row_bytes == 0), "rows without bytes, or bytes without rows", t);
    require(t < kTiles || rows == 0, "palette 1 has eight tiles", t);
    require(rows <= kRows && row_bytes <= kRowBytes, "larger than 16 rows of 64 bytes", t);
    if (t >= kTiles) continue;
    tiles.rows[t] = rows, tiles.row_bytes[t] = row_bytes, tiles.written[t] = false;
    std::memset(tiles.data[t], 0xff, sizeof tiles.data[t]);
  }
}
inline void release() {
  if (tiles.configured) --configured;
  tiles.configured = false;
}
inline void zero(int t) {
  require_shape(t);
  for (int r = 0; r < tiles.rows[t]; ++r) std::memset(tiles.data[t][r], 0, size_t(tiles.row_bytes[t]));
  tiles.written[t] = true;
}
inline void load(int t, const void* from, long stride) {
  require_shape(t);
  for (int r = 0; r < tiles.rows[t]; ++r)
    std::memcpy(tiles.data[t][r], static_cast<const char*>(from) + r * stride, size_t(tiles.row_bytes[t]));
  tiles.written[t] = true;
}
inline void store(int t, void* to, long stride) {
  require_written(t);
  for (int r = 0; r < tiles.rows[t]; ++r)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[t][r], size_t(tiles.row_bytes[t]));
}

// Denormal numbers count as zeros, going in and coming out.
inline float flushed(float v) { return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v; }
inline float element(int t, int row, int i) {
  uint16_t half;
  std::memcpy(&half, tiles.data[t][row] + 2 * i, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return flushed(v);
}
inline void require_multipliable(int c, int a, int b) {
  require_written(c), require_written(a), require_written(b);
  require(c != a && c != b && a != b, "operands must be three tiles", c);
  require(tiles.row_bytes[a] % 4 == 0 && tiles.row_bytes[b] % 4 == 0, "rows are not whole pairs", a);
  require(tiles.rows[c] == tiles.rows[a], "C and A differ in rows", c);
  require(tiles.row_bytes[c] == tiles.row_bytes[b], "C and B differ in columns", c);
  require(tiles.row_bytes[a] / 4 == tiles.rows[b], "A's columns are not B's rows", a);
}
// TDPBF16PS: even and odd products are summed apart, by fused steps, and then added to C.
inline void multiply(int c, int a, int b) {
  require_multipliable(c, a, b);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < tiles.rows[b]; ++k) {
        even = flushed(std::fma(element(a, m, 2 * k), element(b, k, 2 * n), even));
        odd = flushed(std::fma(element(a, m, 2 * k + 1), element(b, k, 2 * n + 1), odd));
      }
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
    }
  ++products;
}
// TDPBUSD, and TDPBSSD where A is signed: bytes of A, unsigned or signed, by signed ones of B, in 32-bit integers, which wrap.
inline void multiply_bytes(int c, int a, int b, bool a_is_signed) {
  require_multipliable(c, a, b);
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      uint32_t sum;
      std::memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
      for (int k = 0; k < tiles.row_bytes[a]; ++k) {
        const unsigned char left = tiles.data[a][m][k], right = tiles.data[b][k / 4][4 * n + k % 4];
        const int factor = a_is_signed ? static_cast<signed char>(left) : left;
        sum += uint32_t(factor * static_cast<signed char>(right));
      }
      std::memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
    }
  ++products;
}

}  // namespace tile_model

namespace fastseq {
namespace FASTSEQ_ISA {

inline void tile_configure(const TileShapes& shapes) {
  tile_model::configure(reinterpret_cast<const unsigned char*>(&shapes));
}
inline void tile_release() { tile_model::release(); }
template <int kTile>
void tile_zero() {
  tile_model::zero(kTile);
}
template <int kTile>
void tile_load(const void* from, long stride) {
  tile_model::load(kTile, from, stride);
}
template <int kTile>
void tile_store(void* to, long stride) {
  tile_model::store(kTile, to, stride);
}
template <int kC, int kA, int kB>
void tile_multiply() {
  tile_model::multiply(kC, kA, kB);
}
template <int kC, int kA, int kB>
void tile_multiply_bytes() {
  tile_model::multiply_bytes(kC, kA, kB, false);
}
template <int kC, int kA, int kB>
void tile_multiply_signed_bytes() {
  tile_model::multiply_bytes(kC, kA, kB, true);
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

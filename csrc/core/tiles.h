// The matrix tiles of AMX: eight registers of up to 16 rows of 64 bytes, and C += A B over pairs of bfloat16, or over four
// bytes.
//
// These are the chip's instructions, one function each, and nothing else, so that a software model can stand in their
// place (FASTSEQ_TILE_MODEL names its header): tests run the kernels through it on machines without such tiles.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(FASTSEQ_TILE_MODEL) || defined(__AMX_BF16__)
#define FASTSEQ_TILES
#endif

#if defined(FASTSEQ_TILES)

#ifndef FASTSEQ_ISA
#define FASTSEQ_ISA baseline
#endif

namespace fastseq {
namespace FASTSEQ_ISA {

// What tile_configure reads: rows and bytes of a row of each tile; zeros: a tile that is not used.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void shape(int tile, int tile_rows, int bytes) {
    rows[tile] = uint8_t(tile_rows);
    row_bytes[tile] = uint16_t(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "the processor's format");

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

#if defined(FASTSEQ_TILE_MODEL)
#include FASTSEQ_TILE_MODEL
#else

namespace fastseq {
namespace FASTSEQ_ISA {

// In assembly, as the compilers' intrinsics take a tile's number from the source text only, which no template has, and
// do not say that they read memory.
inline void tile_configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory"); }
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, long stride) {  // stride in bytes, from row to row
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, long stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
// C[m][n] += sum_k A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1], in float.
template <int kC, int kA, int kB>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
// C[m][n] += sum_k of four A[m][4k + i] B[k][4n + i], A unsigned and B signed bytes, in 32-bit integers.
template <int kC, int kA, int kB>
inline void tile_multiply_bytes() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
// The same of signed bytes.
template <int kC, int kA, int kB>
inline void tile_multiply_signed_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace FASTSEQ_ISA
}  // namespace fastseq

#endif
#endif

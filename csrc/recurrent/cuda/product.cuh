// A block's rows of W times the vector of every row of the batch, on tensor cores: gates are M, the batch is N.
//
// Both are taken in tiles of 32 bytes of k: 16 of a 16-bit dtype, 8 floats. Within a tile lane l takes the 8 bytes from
// 8 * (l % 4) on, of W as of the vector, instead of the two halves that mma names: the sum over k does not care for its
// order, and so each lane reads its share at once. W lies as fragments, 16 bytes a lane: some in registers, the rest in
// shared memory; neither is read from global memory again while the walk lasts.
#pragma once
#include "primitives/primitives.cuh"
#include "recurrent/cuda/recurrent.h"
#include "recurrent/cuda/number.cuh"

namespace fastseq::cuda {

struct alignas(16) Fragment {
  uint32_t r[4];
};

FASTSEQ_DEVICE void mma(Bf16, float (&c)[4], const Fragment& a, const uint32_t (&b)[2]) {
  mma_m16n8k16<Bf16>(c, a.r, b);
}
FASTSEQ_DEVICE void mma(Fp16, float (&c)[4], const Fragment& a, const uint32_t (&b)[2]) {
  mma_m16n8k16<Fp16>(c, a.r, b);
}
FASTSEQ_DEVICE void mma(Tf32, float (&c)[4], const Fragment& a, const uint32_t (&b)[2]) {
  mma_m16n8k8_tf32(c, a.r, b);
}
// float32: each factor is the sum of two TF32 numbers; all but the product of the small ones counts.
FASTSEQ_DEVICE void mma(float, float (&c)[4], const Fragment& a, const uint32_t (&b)[2]) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    a_high[i] = to_tf32(bits_float(a.r[i]));
    a_low[i] = to_tf32(bits_float(a.r[i]) - bits_float(a_high[i]));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    b_high[i] = to_tf32(bits_float(b[i]));
    b_low[i] = to_tf32(bits_float(b[i]) - bits_float(b_high[i]));
  }
  mma_m16n8k8_tf32(c, a_low, b_high);
  mma_m16n8k8_tf32(c, a_high, b_low);
  mma_m16n8k8_tf32(c, a_high, b_high);
}

FASTSEQ_DEVICE uint32_t pair_bits(Bf16 low, Bf16 high) { return low.bits | uint32_t(high.bits) << 16; }
FASTSEQ_DEVICE uint32_t pair_bits(Fp16 low, Fp16 high) { return low.bits | uint32_t(high.bits) << 16; }

// The fragment of one tile of W; weight(row, k) gives an element, 0 outside of W.
template <class T, class Weight>
FASTSEQ_DEVICE Fragment load_fragment(int row_tile, int k_tile, Weight weight) {
  const int row = row_tile * kScanTileRows + lane() / 4;
  Fragment f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = row + (i & 1) * 8;
    if constexpr (sizeof(T) == 2) {
      const int k = k_tile * 16 + lane() % 4 * 4 + (i >> 1) * 2;
      f.r[i] = pair_bits(weight(m, k), weight(m, k + 1));
    } else {
      f.r[i] = float_bits(to_float(operand(weight(m, k_tile * 8 + lane() % 4 * 2 + (i >> 1)))));
    }
  }
  return f;
}

// A warp's tasks are warp(), warp() + warps, ...; this is where the fragments of one begin in shared memory.
FASTSEQ_DEVICE int first_stored(const ScanProduct& p, int task) {
  const int warps = nthreads() / 32;
  const int skipped = (task < warps ? task : warps) * p.held;
  return p.first_fragment + task * p.per_split - skipped;
}

// Lays W down: the first p.held fragments of each warp's first task in `held` (the others there are 0), the rest stored.
template <class T, int kHeld, int kRoom, class Weight>
FASTSEQ_DEVICE void lay_weights(const ScanProduct& p, Fragment (&held)[kRoom], Fragment* stored, Weight weight) {
  const int warps = nthreads() / 32, tasks = p.row_tiles * p.splits;
  for (int task = warp(); task < tasks; task += warps) {
    const int row_tile = task % p.row_tiles, k0 = task / p.row_tiles * p.per_split;
    const int in_registers = task < warps ? p.held : 0;
    Fragment* out = stored + first_stored(p, task) * 32 + lane();
    for (int i = in_registers; i < p.per_split; ++i)
      if (k0 + i < p.k_tiles) out[(i - in_registers) * 32] = load_fragment<T>(row_tile, k0 + i, weight);
  }
  const int row_tile = warp() % p.row_tiles, k0 = warp() / p.row_tiles * p.per_split;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = Fragment{{0, 0, 0, 0}};
    if (i < p.held && static_cast<int>(warp()) < tasks && k0 + i < p.k_tiles)
      held[i] = load_fragment<T>(row_tile, k0 + i, weight);
  }
}

// A warp's first task: its tile of rows and its split of k. Where a warp has more than one, there is one split alone.
struct FirstTask {
  int row_tile, split;
  FASTSEQ_DEVICE explicit FirstTask(const ScanProduct& p)
      : row_tile(warp() % at_least_one(p.row_tiles)), split(warp() / at_least_one(p.row_tiles)) {}
  FASTSEQ_DEVICE static int at_least_one(int n) { return n > 0 ? n : 1; }  // of a product that the cell does not have
};

// partial[split][column][row] = W vector, of every tile of columns. As many tiles of the vector are read before the first
// is multiplied as there are registers for: a product waits for shared memory once, not once a tile.
template <class T, int kHeld, int kRoom, class Exchange>
FASTSEQ_DEVICE void multiply(const ScanProduct& p, const FirstTask& first, const Fragment (&held)[kRoom],
                             const Fragment* stored, float* partial, int partial_rows, int columns,
                             const Exchange& exchange) {
  constexpr int kChunk = 2, kGroup = kThreefold<T> ? 1 : 4;
  static_assert(kHeld % kChunk == 0 && kHeld % kGroup == 0, "chunks of the held fragments");
  const int warps = nthreads() / 32, tasks = p.row_tiles * p.splits;
  const int k0 = first.split * p.per_split;
  const int count = p.k_tiles - k0 < p.per_split ? p.k_tiles - k0 : p.per_split;
  for (int task = warp(), row_tile = first.row_tile; task < tasks; task += warps, row_tile += warps) {
    const int in_registers = task < warps ? p.held : 0;
    const Fragment* in = stored + first_stored(p, task) * 32 + lane();
#pragma unroll 1
    for (int n = 0; n * kScanTileColumns < columns; ++n) {
      float sums[2][4] = {};  // two, so that a product need not wait for the one before it
      // This lane's share of the first tile. (Reckoned anew: there is no register to keep a part of it in.)
      const int vector = exchange.offset() + (n * kScanTileColumns + lane() / 4) * exchange.layout.column +
                         lane() % 4 * 8 + (p.first_k + k0) * kScanTileBytes;
      if (kHeld > 0 && kGroup > 1 && in_registers == kHeld && count >= kHeld) {  // no condition inside the loop
#pragma unroll
        for (int i0 = 0; i0 < kHeld; i0 += kGroup) {
          uint2 b[kGroup];
#pragma unroll
          for (int j = 0; j < kGroup; ++j) b[j] = exchange.read(vector + (i0 + j) * kScanTileBytes);
#pragma unroll
          for (int j = 0; j < kGroup; ++j) mma(T{}, sums[j & 1], held[i0 + j], {b[j].x, b[j].y});
        }
      } else if constexpr (kHeld > 0) {
#pragma unroll
        for (int i0 = 0; i0 < kHeld; i0 += kChunk) {
          if (i0 < in_registers) {
            uint2 b[kChunk];
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
              b[j] = uint2{0, 0};
              if (i0 + j < count) b[j] = exchange.read(vector + (i0 + j) * kScanTileBytes);
            }
#pragma unroll
            for (int j = 0; j < kChunk; ++j)
              if (i0 + j < in_registers) mma(T{}, sums[j & 1], held[i0 + j], {b[j].x, b[j].y});
          }
        }
      }
#pragma unroll 1
      for (int i0 = in_registers; i0 < count; i0 += kChunk) {
        uint2 b[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          b[j] = uint2{0, 0};
          if (i0 + j < count) b[j] = exchange.read(vector + (i0 + j) * kScanTileBytes);
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
          if (i0 + j < count) mma(T{}, sums[j & 1], in[(i0 + j - in_registers) * 32], {b[j].x, b[j].y});
      }
      const int row = row_tile * kScanTileRows + lane() / 4, column = n * kScanTileColumns + lane() % 4 * 2;
      float* out = partial + (first.split * columns + column) * partial_rows + row;
      out[0] = sums[0][0] + sums[1][0];
      out[partial_rows] = sums[0][1] + sums[1][1];
      out[8] = sums[0][2] + sums[1][2];
      out[partial_rows + 8] = sums[0][3] + sums[1][3];
    }
  }
}

// kCount elements of the product, `apart` rows from one to the next: the sums over its splits, added in order. `at` is
// where the first one's sum of the first split lies, `split` floats before that of the second.
template <int kCount>
FASTSEQ_DEVICE void sums_of(const ScanProduct& p, const float* at, int apart, int split, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = at[i * apart];
  constexpr int kTogether = kCount > 2 ? 2 : 4;
#pragma unroll 1
  for (int s = 1; s < p.splits; s += kTogether) {
    float more[kTogether][kCount];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int i = 0; i < kCount; ++i) more[j][i] = s + j < p.splits ? at[(s + j) * split + i * apart] : 0.0f;
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] += more[j][i];
  }
}

}  // namespace fastseq::cuda

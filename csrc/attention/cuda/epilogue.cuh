// From accumulators to global memory.
#pragma once
#include "attention/cuda/mask.cuh"

namespace fastseq::cuda::attention {

// Rounds a warp's rows row.. row + 16 kM - 1 of a tile to T, by way of shared memory that only this warp uses, so that
// whole rows of 16-byte chunks leave it. Those of the matrix at `base` are rows first.., below `count`.
template <class T, class Tile, bool kAnyLayout, int kM, int kN>
FASTSEQ_DEVICE void store_rows(const Fragment<kM, kN>& x, unsigned char* tile, int row, T* base, int64_t stride, int first,
                               int count, int columns, bool aligned) {
  static_assert(8 * kN <= Tile::kColumns);
  sync_warp();  // other lanes' last ldmatrix may still read these rows
  for_each_element<kM, kN>([&](int m, int n, int e) {
    if (e % 2 == 0) {
      const int own = row + 16 * m + int(lane() >> 2) + 4 * e;
      *reinterpret_cast<uint32_t*>(tile + Tile::offset(own, n) + 4 * (lane() & 3)) =
          pack2<T>(x.x[m][n][e], x.x[m][n][e + 1]);
    }
  });
  sync_warp();
  for (int n = int(lane()); n < 16 * kM * kN; n += 32) {
    const int r = n / kN, chunk = n % kN;
    const unsigned char* from = tile + Tile::offset(row + r, chunk);
    T* to = base + int64_t(first + r) * stride + chunk * 8;
    if (first + r >= count || chunk * 8 >= columns) continue;
    if (!kAnyLayout || aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < 8 && chunk * 8 + e < columns; ++e) to[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
  sync_warp();
}

// The lse of a warp's rows first.. of the matrix, below `count`, from units of log 2.
template <int kM>
FASTSEQ_DEVICE void store_lse(const float (&l)[kM][2], float* lse, int first, int count) {
  if ((lane() & 3) != 0) return;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = first + 16 * m + int(lane() >> 2) + 8 * half;
      if (i < count) lse[i] = l[m][half] * kLn2;
    }
}

}  // namespace fastseq::cuda::attention

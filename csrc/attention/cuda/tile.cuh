// Tiles of q, k, v and do in shared memory, and the register fragments of m16n8k16 products.
//
// A tile [kRows, kColumns] lies in panels of 64 columns (32 where 64 does not divide), a row of a panel being 128 (64)
// bytes; its 16-byte chunks are permuted by the row, so that eight rows of one chunk meet all banks once: both the
// copies that fill a tile and the ldmatrix that read it are free of conflicts. With 64 columns it is the 128-byte
// swizzle of TMA and wgmma.
//
// A fragment of accumulators of M16 x N8 products holds, in lane 4 g + t, element e of product (m, n): row 16 m + g +
// 8 (e / 2), column 8 n + 2 t + e % 2. Two neighbouring ones, rounded, are an A operand of the next product.
#pragma once
#include "attention/cuda/attention.h"
#include "primitives/primitives.cuh"

namespace fastseq::cuda::attention {

template <int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kPanel = kColumns % 64 == 0 ? 8 : 4;
  static constexpr int kBytes = kRows * kColumns * 2;
  static_assert(kColumns % 32 == 0 && kRows % 16 == 0, "whole panels, whole products");

  static constexpr int kRowBytes = kPanel * 16, kPanelBytes = kRows * kRowBytes;

  // Bytes from the tile's begin to a chunk of eight elements.
  FASTSEQ_DEVICE static unsigned offset(unsigned row, unsigned chunk) {
    const unsigned permuted = kPanel == 8 ? (chunk ^ row) & 7 : (chunk ^ (row >> 1)) & 3;
    return (chunk / kPanel * kRows + row) * kRowBytes + permuted * 16;
  }
  // From the offset of a chunk in column 0 or 1 to that in a column further to the right by `chunks`, an even number.
  FASTSEQ_DEVICE static unsigned right(unsigned start, unsigned chunks) {
    return (start ^ chunks % kPanel * 16) + chunks / kPanel * kPanelBytes;
  }
};

// Fills a tile with rows first.. of a matrix whose row 0 is at `base`: 0 from row `count` or column `columns` on.
// Asynchronous; rows that are not aligned are copied by the elements. `thread` counts the kThreads that take part.
template <class Tile, int kThreads, bool kAnyLayout, class T>
FASTSEQ_DEVICE void load_tile(unsigned char* tile, const T* base, int64_t stride, int first, int count, int columns,
                              bool aligned, unsigned thread) {
  // A thread keeps its place in a panel and walks down the rows: neighbours read whole panels' rows.
  constexpr int kStep = kThreads / Tile::kPanel;
  static_assert(kStep % 8 == 0 || (kStep == 4 && Tile::kPanel == 8), "rows further down have the same permutation");
  static_assert(Tile::kRows % kStep == 0 || kStep % Tile::kRows == 0);
  const unsigned column = thread % Tile::kPanel, row0 = thread / Tile::kPanel;
  if (kStep > Tile::kRows && row0 >= unsigned(Tile::kRows)) return;
  const unsigned start = Tile::offset(row0, column);
  const T* from = base + int64_t(first + int(row0)) * stride + column * 8;
  const int rows = count - first - int(row0), width = columns - int(column) * 8;  // left from here on
#pragma unroll 1
  for (int row = 0; row < Tile::kRows; row += kStep, from += kStep * stride) {
    unsigned char* line = tile + (start ^ (row % 8 * 16)) + row * Tile::kRowBytes;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += Tile::kPanel) {
      const bool inside = row < rows && chunk * 8 < width;
      unsigned char* to = line + chunk / Tile::kPanel * Tile::kPanelBytes;
      if (!kAnyLayout || aligned) {
        cp_async16(to, inside ? from + chunk * 8 : base, inside ? 16 : 0);
      } else {
        for (int e = 0; e < 8; ++e) {
          T value{};
          if (inside && chunk * 8 + e < width) value = from[chunk * 8 + e];
          reinterpret_cast<T*>(to)[e] = value;
        }
      }
    }
  }
}

// Where a lane reads a tile for ldmatrix: `start` is the offset of its row in columns 0 or 1.
template <class Tile_>
struct Reader {
  using Tile = Tile_;
  const unsigned char* tile;
  unsigned start;
};
// A operands [16, 16]: rows row.. of the tile, not transposed.
template <class Tile>
FASTSEQ_DEVICE Reader<Tile> reader_of_a(const unsigned char* tile, unsigned row) {
  return {tile, Tile::offset(row + (lane() & 15), lane() >> 4)};
}
// B operands [16, 8] in pairs of neighbouring columns, from a tile that holds Bᵀ: its rows are columns of B.
template <class Tile>
FASTSEQ_DEVICE Reader<Tile> reader_of_rows(const unsigned char* tile) {
  return {tile, Tile::offset((lane() & 7) + ((lane() >> 4) << 3), (lane() >> 3) & 1)};
}
// The same from a tile that holds B.
template <class Tile>
FASTSEQ_DEVICE Reader<Tile> reader_of_columns(const unsigned char* tile) {
  return {tile, Tile::offset(lane() & 15, lane() >> 4)};
}

template <int kM, int kN>
struct Fragment {
  float x[kM][kN][4];
  FASTSEQ_DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0;
  }
};

template <class T>
FASTSEQ_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  mma_m16n8k16<T>(c, a, b);
}

// c = A Bᵀ, the sum running along the columns of both tiles: 16 kM rows of A from its reader on, all rows of B.
template <class T, class TileA, class TileB, int kM, int kN>
FASTSEQ_DEVICE void product_of_rows(Fragment<kM, kN>& c, const Reader<TileA>& a_reader, const Reader<TileB>& b_reader) {
  static_assert(TileA::kColumns == TileB::kColumns && TileB::kRows == 8 * kN && kN % 2 == 0);
  c.clear();
#pragma unroll
  for (int k = 0; k < TileA::kColumns / 16; ++k) {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
      ldmatrix_x4(a[m], a_reader.tile + TileA::right(a_reader.start, 2 * k) + 16 * m * TileA::kRowBytes);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_reader.tile + TileB::right(b_reader.start, 2 * k) + 8 * n * TileB::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(c.x[m][n], a[m], b[0], b[1]);
        multiply<T>(c.x[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

struct Unseen {
  FASTSEQ_DEVICE void operator()(const uint32_t (&)[4]) const {}
};

// c += A B with A in registers (accumulators of an earlier product, rounded to T) and B columns 8 first.. of a tile.
// see(a): A operands of 16 rows, rounded.
template <class T, class TileB, int kM, int kK, int kN, class See = Unseen>
FASTSEQ_DEVICE void add_product(Fragment<kM, kN>& c, const Fragment<kM, kK>& a, const Reader<TileB>& b_reader,
                                int first = 0, const See& see = {}) {
  static_assert(TileB::kRows == 8 * kK && kK % 2 == 0 && kN % 2 == 0);
#pragma unroll
  for (int k = 0; k < kK / 2; ++k) {
    uint32_t rounded[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float* pair = a.x[m][2 * k + r / 2] + 2 * (r % 2);
        rounded[m][r] = pack2<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int m = 0; m < kM; ++m) see(rounded[m]);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, b_reader.tile + TileB::right(b_reader.start, first + n) + 16 * k * TileB::kRowBytes);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply<T>(c.x[m][n], rounded[m], b[0], b[1]);
        multiply<T>(c.x[m][n + 1], rounded[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace fastseq::cuda::attention

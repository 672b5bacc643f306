// Tiles that TMA brings and warpgroups multiply: what the kernels for sm_90a have in common.
//
// A tile [kRows, kColumns] is that of tile.cuh: panels of 64 columns, rows of 128 bytes, swizzled. A box of a
// tensor map is one panel. What a box covers outside the tensor comes as zero; what it covers past the end of a sequence
// is the next one's, or padding, which may hold anything: a tile whose rows are summed over (B of `multiply_columns`) is
// started by `start_clean`, since 0 times NaN is NaN. In all other tiles such rows only reach rows or columns of
// products that are hidden or not stored.
//
//   producer, a warp:                     consumers, whole warpgroups:
//     ring.wait_empty();                    ring.wait_full();
//     start_clean<Tile>(to, map,            wg_fence(); multiply_rows<T, TileQ, TileK>(s, q, row, k);
//       ring.full(), row, h, b, ...);       wg_commit(); wg_wait<0>(numbers_of(s));
//     ring.advance();                       ring.release(); ring.advance();
#pragma once
#include <algorithm>
#include <numeric>

#include "attention/cuda/schedule.cuh"
#include "attention/cuda/tile.cuh"

namespace fastseq::cuda::attention {

constexpr int kWarpgroup = 128;  // threads

// ---- Tensor maps: host code.

// The map of [batch, heads, rows, columns] whose boxes are the panels of tiles of kRows. Null, or the error: what it
// cannot map the plan keeps away (`mappable`).
template <class Tile>
const char* make_map(TensorMap& map, const View& view, int64_t batch, int64_t heads, int64_t rows, int64_t columns) {
  static_assert(Tile::kPanel == 8 && Tile::kRows <= 256, "a box is a panel of 64 columns");
  const auto bytes = [](int64_t size, int64_t stride) { return size == 1 ? uint64_t(16) : uint64_t(2 * stride); };
  const uint64_t sizes[4] = {uint64_t(columns), uint64_t(rows), uint64_t(heads), uint64_t(batch)};
  const uint64_t strides[3] = {bytes(rows, view.row), bytes(heads, view.head), bytes(batch, view.batch)};
  const uint32_t box[4] = {64, Tile::kRows, 1, 1};
  return make_tensor_map(map, view.data, 2, 4, sizes, strides, box, 128);
}

// The tiles of blocks that stay on their multiprocessor. Where a limit makes some longer than others, a group's must come
// out even between the blocks, which by whole rounds of the grid they do. Of gradients a tile is computed on for so long
// that what it reads may come from memory: there all heads are one group, whose tiles run from the longest to the shortest.
inline Tiling even_tiling(const AttentionCall& call, bool of_keys, int block, int64_t blocks, bool of_gradients) {
  Tiling t = tiling_of(call, of_keys, block);
  if ((call.left == kUnlimited && call.right == kUnlimited) || t.tiles == 0 || t.units == 0) return t;
  if (of_gradients) {
    t.together = t.units;
    return t;
  }
  const int64_t whole = blocks / std::gcd(blocks, int64_t(t.tiles));  // so many heads fill whole rounds
  const int64_t wanted = std::max<int64_t>(1, (t.together + whole / 2) / whole) * whole;
  if (wanted <= t.together + t.together / 2 && wanted < t.units) t.together = int32_t(wanted);
  return t;
}

// ---- A ring of buffers between a producer and consumers. Each side has a copy of its own and walks it in step.
template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_, kBytes = 2 * kStages * int(sizeof(Mbar));

  Mbar* bars;  // [kStages] full, [kStages] empty
  unsigned stage = 0, parity = 0;

  FASTSEQ_DEVICE explicit Ring(void* place) : bars(static_cast<Mbar*>(place)) {}
  // One thread, before fence_mbar_init and a barrier of the block. So many warps release each buffer.
  FASTSEQ_DEVICE void init(unsigned warps) const {
    for (int i = 0; i < kStages; ++i) {
      mbar_init(bars + i, 1);
      mbar_init(bars + kStages + i, warps);
    }
  }
  FASTSEQ_DEVICE Mbar* full() const { return bars + stage; }
  FASTSEQ_DEVICE void wait_full() const { mbar_wait(full(), parity); }
  // A warp. At first all are empty. No lane fills the buffer while another still waits: that one could miss the phase.
  FASTSEQ_DEVICE void wait_empty() const {
    mbar_wait(bars + kStages + stage, parity ^ 1);
    sync_warp();
  }
  // A warp, once all its lanes are done with the buffer.
  FASTSEQ_DEVICE void release() const {
    sync_warp();
    if (lane() == 0) mbar_arrive(bars + kStages + stage);
  }
  FASTSEQ_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// ---- The producer.

// One thread: `full` will open when rows row.. of head h of batch b are in the tile.
template <class Tile>
FASTSEQ_DEVICE void start_tile(unsigned char* tile, const TensorMap& map, Mbar* full, int row, int h, int b) {
  mbar_arrive_tx(full, Tile::kBytes);
#pragma unroll
  for (int panel = 0; panel < Tile::kChunks / 8; ++panel)
    tma_load_4d(tile + panel * Tile::kPanelBytes, map, full, panel * 64, row, h, b);
}

// A warp: the same, and the tile's rows from `count` on are zero. Where there are such rows the warp waits for the boxes
// itself, at `landed`, a barrier of its own, of count 1, in phase `parity`.
template <class Tile>
FASTSEQ_DEVICE void start_clean(unsigned char* tile, const TensorMap& map, Mbar* full, int row, int h, int b, int count,
                                Mbar* landed, unsigned& parity) {
  if (count >= Tile::kRows) {
    if (lane() == 0) start_tile<Tile>(tile, map, full, row, h, b);
    sync_warp();
    return;
  }
  if (lane() == 0) start_tile<Tile>(tile, map, landed, row, h, b);
  sync_warp();
  mbar_wait(landed, parity);
  parity ^= 1;
#pragma unroll 1
  for (int panel = 0; panel < Tile::kChunks / 8; ++panel)
#pragma unroll 1
    for (int place = count * Tile::kRowBytes + 16 * int(lane()); place < Tile::kPanelBytes; place += 16 * 32)
      *reinterpret_cast<uint4*>(tile + panel * Tile::kPanelBytes + place) = make_uint4(0, 0, 0, 0);
  fence_proxy_async();
  sync_warp();
  if (lane() == 0) mbar_arrive(full);
}

// ---- The consumers. A fragment of one warpgroup: 64 rows, of which warp w of the four has 16 w.. + 15.

template <int kN>
FASTSEQ_DEVICE float (&numbers_of(Fragment<1, kN>& c))[4 * kN] {
  return reinterpret_cast<float(&)[4 * kN]>(c.x);
}

// Starts c = A Bᵀ, the sum running along the columns of both tiles: 64 rows of A from `row` on, all rows of B. With
// `add`, c += A Bᵀ.
template <class T, class TileA, class TileB, int kN>
FASTSEQ_DEVICE void multiply_rows(Fragment<1, kN>& c, const unsigned char* a, int row, const unsigned char* b,
                                  bool add = false) {
  static_assert(TileA::kColumns == TileB::kColumns && TileB::kRows == 8 * kN);
  static_assert(TileA::kPanel == 8 && TileB::kPanel == 8);
  const uint64_t a_first = wg_desc(a + row * TileA::kRowBytes, 16, 1024, 128), b_first = wg_desc(b, 16, 1024, 128);
#pragma unroll
  for (int k = 0; k < TileA::kColumns / 16; ++k)  // a descriptor counts sixteens of bytes
    wgmma<T>(numbers_of(c), a_first + unsigned(k / 4 * TileA::kPanelBytes + k % 4 * 32) / 16,
             b_first + unsigned(k / 4 * TileB::kPanelBytes + k % 4 * 32) / 16, add || k > 0);
}

// A fragment rounded to T: the A operand, 64 x 16 kK, of a product.
template <class T, int kK>
FASTSEQ_DEVICE void round_fragment(uint32_t (&a)[kK][4], const Fragment<1, 2 * kK>& s) {
#pragma unroll
  for (int k = 0; k < kK; ++k)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float* pair = s.x[0][2 * k + r / 2] + 2 * (r % 2);
      a[k][r] = pack2<T>(pair[0], pair[1]);
    }
}

// Starts c += A B with A in registers, which must be left alone until the wait: all rows of B, and its columns from
// `column`, a multiple of 64, on. Without `add`, c = A B.
template <class T, class TileB, int kK, int kN>
FASTSEQ_DEVICE void multiply_columns(Fragment<1, kN>& c, const uint32_t (&a)[kK][4], const unsigned char* b,
                                     int column = 0, bool add = true) {
  static_assert(TileB::kRows == 16 * kK && TileB::kPanel == 8 && 8 * kN <= TileB::kColumns);
  const uint64_t first = wg_desc(b + column / 64 * TileB::kPanelBytes, TileB::kPanelBytes, 1024, 128);
#pragma unroll
  for (int k = 0; k < kK; ++k) wgmma<T, 1>(numbers_of(c), a[k], first + unsigned(2048 * k) / 16, add || k > 0);
}

}  // namespace fastseq::cuda::attention

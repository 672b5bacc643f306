// Checks of csrc/attention/cuda/hopper_tile.cuh: tiles through a ring of TMA buffers into products of warpgroups.
#include "attention/cuda/hopper_tile.cuh"

#include <type_traits>

#include "tests/emulation/check.h"

namespace fastseq::cuda {

// o[64 groups, Dv] = sum over the tiles of keys of (q kᵀ) v, of which the first `keys` count, by a producer warp and
// kGroups warpgroups: what attention does without its softmax. Whole numbers, exact in fp16 and in the sums.
template <class T, int kKeys, int kDim, int kDimV, int kGroups>
struct Chain {
  using TileQ = attention::Tile<64 * kGroups, kDim>;
  using TileK = attention::Tile<kKeys, kDim>;
  using TileV = attention::Tile<kKeys, kDimV>;
  static constexpr int kThreads = attention::kWarpgroup * (kGroups + 1);
  static constexpr int kStages = 2, kStage = TileK::kBytes + TileV::kBytes;
  static constexpr int kBars = TileQ::kBytes + kStages * kStage, kShared = kBars + 1024;
};

template <class C, class T, int kKeys, int kDim, int kDimV, int kGroups>
FASTSEQ_KERNEL(C::kThreads, 1)
chain(FASTSEQ_IN_PLACE TensorMap q_map, FASTSEQ_IN_PLACE TensorMap k_map, FASTSEQ_IN_PLACE TensorMap v_map, int begin,
      int keys, int h, int b, float* o) {
  using namespace attention;
  if constexpr (kHasWgmma) {
    unsigned char* q = shared_memory();
    unsigned char* stages = q + C::TileQ::kBytes;
    auto* q_full = reinterpret_cast<Mbar*>(q + C::kBars);
    Ring<C::kStages> ring(q_full + 2);
    if (tid() == 0) {
      mbar_init(q_full, 1);
      mbar_init(q_full + 1, 1);
      ring.init(4 * kGroups);
      fence_mbar_init();
    }
    sync_block();
    if (warp() / 4 == kGroups) {
      if (warp() % 4 == 0) {
        unsigned parity = 0;
        if (lane() == 0) start_tile<typename C::TileQ>(q, q_map, q_full, 0, h, b);
        for (int j = 0; j < keys; j += kKeys) {
          ring.wait_empty();
          unsigned char* k = stages + ring.stage * C::kStage;
          unsigned char* v = k + C::TileK::kBytes;
          // Both tiles of a stage by one barrier: k's bytes are expected before v's arrival can end the phase.
          if (lane() == 0) {
            mbar_expect_tx(ring.full(), C::TileK::kBytes);
            for (int panel = 0; panel < C::TileK::kChunks / 8; ++panel)
              tma_load_4d(k + panel * C::TileK::kPanelBytes, k_map, ring.full(), panel * 64, begin + j, h, b);
          }
          sync_warp();
          start_clean<typename C::TileV>(v, v_map, ring.full(), begin + j, h, b, keys - j, q_full + 1, parity);
          ring.advance();
        }
      }
    } else {
      const int row = int(warp()) / 4 * 64;
      Fragment<1, kKeys / 8> s;
      Fragment<1, kDimV / 8> sum;
      uint32_t p[kKeys / 16][4];
      sum.clear();
      mbar_wait(q_full, 0);
      for (int j = 0; j < keys; j += kKeys) {
        const unsigned char* k = stages + ring.stage * C::kStage;
        ring.wait_full();
        wg_fence();
        multiply_rows<T, typename C::TileQ, typename C::TileK>(s, q, row, k);
        wg_commit();
        wg_wait<0>(numbers_of(s));
        for (int n = 0; n < kKeys / 8; ++n)
          for (int e = 0; e < 4; ++e)
            if (j + 8 * n + 2 * int(lane() & 3) + e % 2 >= keys) s.x[0][n][e] = 0;
        round_fragment<T>(p, s);
        wg_fence();
        multiply_columns<T, typename C::TileV>(sum, p, k + C::TileK::kBytes);
        wg_commit();
        wg_wait<0>(numbers_of(sum));
        ring.release();
        ring.advance();
      }
      const int first = int(warp()) * 16 + int(lane() >> 2);
      for (int n = 0; n < kDimV / 8; ++n)
        for (int e = 0; e < 4; ++e)
          o[(first + e / 2 * 8) * kDimV + 8 * n + 2 * int(lane() & 3) + e % 2] = sum.x[0][n][e];
    }
  } else {
    trap();
  }
}

// Ones of either sign, [B, T, H, D] in memory and [B, H, T, D] to the kernel; NaN in rows of other sequences.
template <class T>
struct Numbers {
  static constexpr int kBatch = 2, kHeads = 3;
  int rows, columns, padded;
  Buffer<T> buffer;

  static std::vector<T> made(int rows, int padded, int columns, int begin, int end, unsigned seed) {
    constexpr uint16_t kOne = std::is_same_v<T, Bf16> ? 0x3f80 : 0x3c00, kNan = 0x7fff;
    std::vector<T> x(size_t(kBatch) * rows * kHeads * padded, T{kNan});
    for (size_t i = 0; i < x.size(); ++i) {
      const int column = int(i) % padded, row = int(i) / padded / kHeads % rows;
      const uint16_t sign = sample(unsigned(i), seed) > 0 ? 0 : 0x8000;
      if (column < columns && row >= begin && row < end) x[i].bits = kOne | sign;
    }
    return x;
  }

  Numbers(int rows, int columns, int begin, int end, unsigned seed)
      : rows(rows), columns(columns), padded(columns + 8), buffer(made(rows, padded, columns, begin, end, seed)) {}
  View view() {
    View v;
    v.data = buffer.data();
    v.row = kHeads * padded, v.head = padded, v.batch = int64_t(rows) * v.row;
    return v;
  }
  float at(int b, int h, int row, int column) {
    return buffer.values()[((size_t(b) * rows + row) * kHeads + h) * padded + column].bits >> 15 ? -1.f : 1.f;
  }
};

template <class T, int kKeys, int kDim, int kDimV, int kGroups>
const char* check_chain(int dim, int dim_v, int begin, int keys, int rows) {
  using C = Chain<T, kKeys, kDim, kDimV, kGroups>;
  constexpr int kB = Numbers<T>::kBatch, kH = Numbers<T>::kHeads, kQueries = 64 * kGroups;
  const int end = begin + keys;
  Numbers<T> q(kQueries, dim, 0, kQueries, 1), k(rows, dim, begin, end, 2), v(rows, dim_v, begin, end, 3);
  TensorMap q_map, k_map, v_map;
  const char* error = attention::make_map<typename C::TileQ>(q_map, q.view(), kB, kH, kQueries, dim);
  if (!error) error = attention::make_map<typename C::TileK>(k_map, k.view(), kB, kH, rows, dim);
  if (!error) error = attention::make_map<typename C::TileV>(v_map, v.view(), kB, kH, rows, dim_v);
  if (error) return error;
  const int b = 1, h = 2;
  std::vector<float> expected(size_t(kQueries) * kDimV, 0.f);
  for (int i = 0; i < kQueries; ++i)
    for (int j = begin; j < end; ++j) {
      float s = 0;
      for (int d = 0; d < dim; ++d) s += q.at(b, h, i, d) * k.at(b, h, j, d);
      for (int d = 0; d < dim_v; ++d) expected[size_t(i) * kDimV + d] += s * v.at(b, h, j, d);
    }
  Buffer<float> o(size_t(kQueries) * kDimV, -1.f);
  error = finish(chain<C, T, kKeys, kDim, kDimV, kGroups>, shape_of(1, C::kThreads, C::kShared), q_map, k_map, v_map,
                 begin, keys, h, b, o.data());
  return error ? error : compare(o, expected);
}

FASTSEQ_CHECK(hopper_tiles, 91) { return check_chain<Bf16, 64, 64, 64, 2>(64, 64, 0, 128, 128); }
FASTSEQ_CHECK(hopper_tiles_past_the_end_of_a_sequence, 91) {
  return check_chain<Fp16, 80, 128, 64, 1>(72, 40, 5, 170, 300);
}
FASTSEQ_CHECK(hopper_tiles_past_the_end_of_the_tensor, 91) {
  return check_chain<Bf16, 16, 64, 128, 1>(64, 128, 3, 37, 40);
}

}  // namespace fastseq::cuda

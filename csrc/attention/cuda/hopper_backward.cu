// dk and dv, and dq, on Hopper: TMA brings the tiles, warpgroups multiply them. The plain class alone; what is computed
// stands in gradient.cuh.
//
// A block owns a tile of rows of one side, the near one, and meets tiles of the other, the far one. For dk and dv
// (kOfKeys) k and v are near, q and do of all query heads that share them far; for dq it is the other way around. Rows of
// scores are near rows, so that p and ds are A operands of the sums as held in registers:
//
//   s = near_s far_sᵀ;  dp = near_p far_pᵀ;  p, ds from them;  sum_s += ds far_s;  sum_p += p far_p (kOfKeys)
//
// For dq the sums of the rows then settle their delta, and one tile more, or two, or all of them once more, take back
// from sum_s what was wrong. Which, all warps read in what those that compute wrote, by a barrier of its own (`decided`).
// Here near_s and far_s are the factors of s, k and q, and near_p and far_p those of dp, v and do: sum_s becomes dk or
// dq, sum_p becomes dv. A warp brings the factors of s, another those of dp, through a ring of buffers each; the other
// warpgroups own 64 rows each, and the exponentials of one run under the products of another. Where the sums are too wide
// for the registers, kParts blocks share the columns and each computes the scores. A block stays on its multiprocessor and
// makes one tile after another.
#include "attention/cuda/gradient.cuh"
#include "attention/cuda/hopper_tile.cuh"

namespace fastseq::cuda {
namespace attention {

struct GradientMaps {
  TensorMap near_s, near_p, far_s, far_p;
};

// A tile of near rows: where it lies, and the tiles of far rows that it meets, of one head after another.
template <class Shape>
struct GradientTile {
  Slot slot;
  Sequence own;
  int first;  // near row
  Range far;

  FASTSEQ_DEVICE GradientTile(const AttentionBackward& call, const Slot& slot, const Sequence& own)
      : slot(slot), own(own), first(slot.tile * Shape::kNear) {
    const int last = at_most(first + Shape::kNear, counted()) - 1;
    far = Shape::kOfKeys ? queries_of<false>(call, own, first, last, Shape::kFar)
                         : keys_of<false>(call, own, first, last, Shape::kFar);
  }
  // Near rows that are there, and those that count; where the sequence begins, of near and of far rows.
  FASTSEQ_DEVICE int present() const { return Shape::kOfKeys ? own.keys : own.rows; }
  FASTSEQ_DEVICE int counted() const { return Shape::kOfKeys ? own.tk : own.tq; }
  FASTSEQ_DEVICE int near_row() const { return Shape::kOfKeys ? own.k_row : own.q_row; }
  FASTSEQ_DEVICE int far_row() const { return Shape::kOfKeys ? own.q_row : own.k_row; }
  // each(head, tile of far rows), of one head after another.
  template <class Each>
  FASTSEQ_DEVICE void for_each_far(const AttentionBackward& call, const Each& each) const {
    if (far.begin >= far.end) return;
    int h = Shape::kOfKeys ? slot.h * call.group : slot.h / call.group;
    const int last = Shape::kOfKeys ? h + call.group : h + 1;
    int j = far.begin;
#pragma unroll 1
    do {
      each(h, j);
      j += Shape::kFar;
      if (j >= far.end) j = far.begin, ++h;
    } while (h < last);
  }
  // The same of dq's tiles that take back: the last that all see, or those in which rows see their last keys; then, if
  // everywhere(), all others.
  template <class Everywhere, class Each>
  FASTSEQ_DEVICE void for_each_again(const AttentionBackward& call, const Everywhere& everywhere,
                                     const Each& each) const {
    if (Shape::kOfKeys || far.begin >= far.end) return;
    const bool whole = far.whole_begin < far.whole_end;
    const int last = (far.end - 1) / Shape::kFar * Shape::kFar, start = whole ? far.whole_end - Shape::kFar : last;
    const int seen = at_most(far.end - 1, first + own.shift + call.right) / Shape::kFar * Shape::kFar;
    const int least = whole ? start : at_least(far.begin, seen);
    int j = start;
#pragma unroll 1
    do {
      each(slot.h / call.group, j);
      if (j == least && !everywhere()) return;
      j = j == far.begin ? last : j - Shape::kFar;
    } while (j != start);
  }
};

// A number that is not negative and is had only when all of p are, which are not negative either.
template <int kN>
FASTSEQ_DEVICE float united(const Fragment<1, kN>& p) {
  uint32_t bits = 0;
  for_each_element<1, kN>([&](int m, int n, int e) { bits |= float_bits(p.x[m][n][e]); });
  return bits_float(bits);
}

template <class Shape>
struct HopperGradient {
  using T = typename Shape::T;
  static constexpr bool kOfKeys = Shape::kOfKeys;
  static constexpr int kFar = Shape::kFar, kStages = Shape::kStages, kGroups = Shape::kGroups;
  static constexpr int kColumnsS = Shape::kDim / Shape::kParts, kColumnsP = Shape::kDimV / Shape::kParts;
  using NearS = Tile<Shape::kNear, Shape::kDim>;
  using NearP = Tile<Shape::kNear, Shape::kDimV>;
  using FarS = Tile<kFar, Shape::kDim>;
  using FarP = Tile<kFar, Shape::kDimV>;

  // One factor's near tile and its ring of far ones; of keys, with a number of each far row (its lse, its delta).
  template <class Near_, class Far_>
  struct Factor {
    using Near = Near_;
    using Far = Far_;
    static constexpr int kTiles = Near::kBytes + kStages * Far::kBytes, kNumbers = kOfKeys ? kFar * 4 : 0;
    static constexpr int kRest = kStages * kNumbers + Ring<1>::kBytes + Ring<kStages>::kBytes + 16;
    unsigned char* near_tile;  // then [kStages] far ones
    unsigned char* numbers;    // [kStages, kFar]
    Ring<1> near;
    Ring<kStages> far;
    Mbar* landed;

    FASTSEQ_DEVICE Factor(unsigned char* tiles, unsigned char* rest)
        : near_tile(tiles),
          numbers(rest),
          near(rest + kStages * kNumbers),
          far(rest + kStages * kNumbers + Ring<1>::kBytes),
          landed(reinterpret_cast<Mbar*>(rest + kRest - 16)) {}
    FASTSEQ_DEVICE void init() const {
      near.init(4 * kGroups);
      far.init(4 * kGroups);
      mbar_init(landed, 1);
    }
    FASTSEQ_DEVICE unsigned char* far_tile() const { return near_tile + Near::kBytes + far.stage * Far::kBytes; }
    FASTSEQ_DEVICE unsigned char* far_numbers() const { return numbers + far.stage * kNumbers; }
  };
  using FactorS = Factor<NearS, FarS>;
  using FactorP = Factor<NearP, FarP>;
  static_assert(FactorS::kTiles + FactorP::kTiles == Shape::kTiles && FactorS::kTiles % 1024 == 0);
  static constexpr int kRest = Shape::kTiles + FactorS::kRest + FactorP::kRest;
  static_assert(kRest + (kOfKeys ? 0 : 16 + 4 * kGroups * int(sizeof(float2))) <= Shape::kShared);

  const AttentionBackward& call;
  const Tiling& tiling;
  FactorS of_s;
  FactorP of_p;
  Mbar* decided;    // of dq: a near tile's `largest` are there
  float2* largest;  // [warps that compute], of dq

  FASTSEQ_DEVICE HopperGradient(const AttentionBackward& call, const Tiling& tiling, unsigned char* shared)
      : call(call),
        tiling(tiling),
        of_s(shared, shared + Shape::kTiles),
        of_p(shared + FactorS::kTiles, shared + Shape::kTiles + FactorS::kRest),
        decided(reinterpret_cast<Mbar*>(shared + kRest)),
        largest(reinterpret_cast<float2*>(shared + kRest + 16)) {}
  FASTSEQ_DEVICE void init() const {
    of_s.init();
    of_p.init();
    if (!kOfKeys) mbar_init(decided, 4 * kGroups);
  }
  // Whether a tile's rows need all keys again; `parity` of its ring, of one buffer, counts the near tiles.
  FASTSEQ_DEVICE bool everywhere(unsigned parity) const {
    mbar_wait(decided, parity);
    return everywhere_again<T, 4 * kGroups>(largest);
  }

  template <class Each>
  FASTSEQ_DEVICE void for_each_tile(const Each& each) const {
    for_each_slot<Shape::kNear>(call, tiling, [&](const Slot& slot, const Sequence& own) {
      const GradientTile<Shape> tile(call, slot, own);
      if (tile.first < tile.present()) each(tile);
    });
  }

  // A warp brings a factor's tiles. `numbers`, of keys, are of all query rows.
  template <class Factor>
  FASTSEQ_DEVICE void bring(Factor& factor, const TensorMap& near, const TensorMap& far, const float* numbers) {
    unsigned parity = 0;
    for_each_tile([&](const GradientTile<Shape>& tile) {
      const int b = call.cu_q != nullptr ? 0 : tile.slot.b;  // in a map a packed batch is one sequence
      factor.near.wait_empty();
      if (lane() == 0)
        start_tile<typename Factor::Near>(factor.near_tile, near, factor.near.full(), tile.near_row() + tile.first,
                                          tile.slot.h, b);
      factor.near.advance();
      // Rows past the tensor's end come as zero; those past the sequence's end alone may be anything.
      const int count = kOfKeys ? tile.own.tq : tile.own.tk, all = kOfKeys ? call.length_q : call.length_k;
      const int end = tile.far_row() + count < all ? count : kUnlimited;
      const auto bring_far = [&](int h, int first) {
        factor.far.wait_empty();
        if (kOfKeys && lane() == 0) {
          mbar_expect_tx(factor.far.full(), Factor::kNumbers);
          tma_load_1d(factor.far_numbers(), numbers + scratch_of(call, tile.own, tile.slot.b, h) + first,
                      factor.far.full(), Factor::kNumbers);
        }
        sync_warp();
        start_clean<typename Factor::Far>(factor.far_tile(), far, factor.far.full(), tile.far_row() + first, h, b,
                                          end - first, factor.landed, parity);
        factor.far.advance();
      };
      tile.for_each_far(call, bring_far);
      tile.for_each_again(call, [&] { return everywhere(factor.near.parity ^ 1); }, bring_far);
    });
  }

  FASTSEQ_DEVICE void make_sums(int group) {
    for_each_tile([&](const GradientTile<Shape>& tile) { make_tile(group, tile); });
  }

  FASTSEQ_DEVICE void make_tile(int group, const GradientTile<Shape>& tile) {
    const Slot& slot = tile.slot;
    const Sequence& own = tile.own;
    const int row = 64 * group + int(warp() % 4) * 16;  // this warp's first in the near tile
    const int part = Shape::kParts == 1 ? 0 : int(bid_y());
    Fragment<1, kFar / 8> s, dp, slope;
    Fragment<1, kColumnsS / 8> sum_s;
    Fragment<1, kOfKeys ? kColumnsP / 8 : 1> sum_p;
    uint32_t p[kFar / 16][4], ds[kFar / 16][4];
    sum_s.clear();
    sum_p.clear();
    float log[2] = {0, 0}, delta[2] = {0, 0};  // of queries, this lane's rows
    RowSums<false> sums;
    if (!kOfKeys) {
      const int64_t scratch = scratch_of(call, own, slot.b, slot.h) + tile.first + row + int(lane() >> 2);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        log[half] = call.log[scratch + 8 * half], delta[half] = call.delta[scratch + 8 * half];
    }
    const auto number = [](const unsigned char* of_columns, const float (&of_rows)[2], int n, int e) {
      if (!kOfKeys) return of_rows[e >> 1];
      const float2 pair = reinterpret_cast<const float2*>(of_columns)[4 * n + int(lane() & 3)];
      return e & 1 ? pair.y : pair.x;
    };

    of_s.near.wait_full();
    of_p.near.wait_full();
    tile.for_each_far(call, [&](int, int first) {
      const Corner corner{slot.b, slot.h, kOfKeys ? first : tile.first + row, kOfKeys ? tile.first + row : first};
      of_s.far.wait_full();
      wg_fence();
      multiply_rows<T, NearS, FarS>(s, of_s.near_tile, 64 * group, of_s.far_tile());
      wg_commit();
      of_p.far.wait_full();
      wg_fence();
      multiply_rows<T, NearP, FarP>(dp, of_p.near_tile, 64 * group, of_p.far_tile());
      wg_commit();
      wg_wait<1>(numbers_of(s));
      probabilities<kOfKeys, false>(s, slope, call, own, corner, tile.far.masked(first),
                                    [&](int, int n, int e) { return number(of_s.far_numbers(), log, n, e); });
      wg_cover(united(s), of_s.near_tile);
      wg_wait<0>(numbers_of(dp));
      if constexpr (!kOfKeys) of_p.far.release();
      score_gradients<kOfKeys, false>(s, dp, call, corner,
                                      [&](int, int n, int e) { return number(of_p.far_numbers(), delta, n, e); });
      if constexpr (kOfKeys) round_fragment<T>(p, s);
      if constexpr (!kOfKeys) {
        sums.add_ds(dp, call);
        sums.add_sloped(dp, call);
      }
      round_fragment<T>(ds, dp);
      if constexpr (!kOfKeys) {
#pragma unroll
        for (int k = 0; k < kFar / 16; ++k) sums.template add_rounded<T>(ds[k]);
      }
      wg_fence();
      if constexpr (kOfKeys) {
        multiply_columns<T, FarP>(sum_p, p, of_p.far_tile(), part * kColumnsP);
        wg_commit();
      }
      multiply_columns<T, FarS>(sum_s, ds, of_s.far_tile(), part * kColumnsS);
      wg_commit();
      if constexpr (kOfKeys) {
        wg_wait<1>(numbers_of(sum_p));
        of_p.far.release();
      }
      wg_wait<0>(numbers_of(sum_s));
      of_s.far.release();
      of_s.far.advance();
      of_p.far.stage = of_s.far.stage, of_p.far.parity = of_s.far.parity;  // in step: one pair of registers
    });
    if constexpr (!kOfKeys) take_back(group, tile, log, delta, sums, sum_s);

    // Results leave by way of the near tiles' rows: when the whole group is done with them.
    named_bar_sync(unsigned(1 + group), kWarpgroup);
    const int b = slot.b, h = slot.h, begin = tile.first + row, end = tile.present();
    scale_rows(sum_s, float(call.scale), begin, tile.counted());
    const View& to_s = kOfKeys ? call.dk : call.dq;
    store_rows<T, NearS, false>(sum_s, of_s.near_tile, row, at<T>(to_s, b, h, tile.near_row()) + part * kColumnsS,
                                to_s.row, begin, end, call.dim - part * kColumnsS, true);
    if constexpr (kOfKeys) {
      scale_rows(sum_p, 1.0f, begin, tile.counted());
      store_rows<T, NearP, false>(sum_p, of_p.near_tile, row, at<T>(call.dv, b, h, tile.near_row()) + part * kColumnsP,
                                  call.dv.row, begin, end, call.dim_v - part * kColumnsP, true);
    }
    fence_proxy_async();  // the next near tiles overwrite what was stored there
    of_s.near.release();
    of_s.near.advance();
    of_p.near.release();
    of_p.near.parity = of_s.near.parity;
  }

  // Of dq: settles the rows' delta, and takes back from sum_s what was wrong.
  FASTSEQ_DEVICE void take_back(int group, const GradientTile<Shape>& met, const float (&log)[2],
                                const float (&delta)[2], const RowSums<false>& sums,
                                Fragment<1, kColumnsS / 8>& sum_s) {
    // Found anew, by numbers that the compiler does not know: what was found before would be held through the loop.
    Slot slot = met.slot;
    slot.b = shfl_idx(slot.b, 0), slot.h = shfl_idx(slot.h, 0), slot.tile = shfl_idx(slot.tile, 0);
    const GradientTile<Shape> tile(call, slot, Sequence(call, slot.b));
    const int row = tile.first + 64 * group + int(warp() % 4) * 16;
    Settled rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + int(lane() >> 2) + 8 * half;
      rows[half] = settle(sums, half, call, tile.own, tile.slot, i, log[half], delta[half]);
      if ((lane() & 3) == 0 && log[half] != kInfinity)
        call.delta[scratch_of(call, tile.own, tile.slot.b, tile.slot.h) + i] = rows[half].delta;
    }
    write_largest(largest, rows);
    if (lane() == 0) mbar_arrive(decided);
    const bool all = everywhere(of_s.near.parity);
    const auto meet = [&](int, int first) {
      Fragment<1, kFar / 8> s, slope;
      uint32_t p[kFar / 16][4];
      float unit[2];
      of_p.far.wait_full(), of_p.far.release();  // v came along, to keep the rings in step
      of_s.far.wait_full();
      wg_fence();
      multiply_rows<T, NearS, FarS>(s, of_s.near_tile, 64 * group, of_s.far_tile());
      wg_commit();
      wg_wait<0>(numbers_of(s));
      probabilities<false, false>(s, slope, call, tile.own, Corner{tile.slot.b, tile.slot.h, row, first},
                                  tile.far.masked(first), [&](int, int, int e) { return log[e >> 1]; });
#pragma unroll
      for (int half = 0; half < 2; ++half) start_taking_back(s, sum_s, half, rows[half], all, unit[half]);
      round_fragment<T>(p, s);
      wg_wait<0>(numbers_of(sum_s));  // nothing is under way: the fence is not to come before what was computed here
      wg_fence();
      multiply_columns<T, FarS>(sum_s, p, of_s.far_tile());
      wg_commit();
      wg_wait<0>(numbers_of(sum_s));
      multiply_rows_by(sum_s, unit);
      of_s.far.release();
      of_s.far.advance();
      of_p.far.stage = of_s.far.stage, of_p.far.parity = of_s.far.parity;
    };
    tile.for_each_again(call, [&] { return all; }, meet);
  }
};

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, 1)
hopper_gradient_kernel(FASTSEQ_IN_PLACE GradientMaps maps, FASTSEQ_IN_PLACE AttentionBackward call,
                       FASTSEQ_IN_PLACE Tiling tiling) {
  if constexpr (kHasWgmma) {
    HopperGradient<Shape> self(call, tiling, shared_memory());
    if (tid() == 0) {
      self.init();
      fence_mbar_init();
    }
    sync_block();
    const int group = int(shfl_idx(warp() / 4, 0));  // known to be the same in all lanes
    if (group == Shape::kGroups) {
      reg_dealloc<Shape::kBringingRegisters>();
      if (warp() % 4 == 0) self.bring(self.of_s, maps.near_s, maps.far_s, call.log);
      if (warp() % 4 == 1) self.bring(self.of_p, maps.near_p, maps.far_p, call.delta);
    } else {
      reg_alloc<Shape::kRegisters>();
      self.make_sums(group);
    }
  } else {
    trap();
  }
}

template <class Shape>
const char* launch_hopper_gradient(const AttentionBackward& call, const Place& place) {
  using Kernel = HopperGradient<Shape>;
  const int64_t batch = call.cu_q != nullptr ? 1 : call.batch;
  GradientMaps maps;
  const char* error = nullptr;
  const auto map = [&](auto tile, TensorMap& to, const View& view, bool of_keys, int columns) {
    if (error == nullptr)
      error = make_map<decltype(tile)>(to, view, batch, of_keys ? call.heads_k : call.heads_q,
                                       of_keys ? call.length_k : call.length_q, columns);
  };
  constexpr bool kOfKeys = Shape::kOfKeys;
  map(typename Kernel::NearS(), maps.near_s, kOfKeys ? call.k : call.q, kOfKeys, call.dim);
  map(typename Kernel::NearP(), maps.near_p, kOfKeys ? call.v : call.d_o, kOfKeys, call.dim_v);
  map(typename Kernel::FarS(), maps.far_s, kOfKeys ? call.q : call.k, !kOfKeys, call.dim);
  map(typename Kernel::FarP(), maps.far_p, kOfKeys ? call.d_o : call.v, !kOfKeys, call.dim_v);
  if (error != nullptr) return error;
  const int64_t together = place.multiprocessors > Shape::kParts ? place.multiprocessors / Shape::kParts : 1;
  const Tiling tiling = even_tiling(call, kOfKeys, Shape::kNear, together, true);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks() < together ? tiling.blocks() : together);
  shape.grid.y = Shape::kParts;
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  return launch(hopper_gradient_kernel<Shape>, shape, static_cast<Stream>(place.stream), maps, call, tiling);
}

}  // namespace attention

const char* attention_hopper_backward(const AttentionBackward& call, const Place& place, bool of_keys) {
  using namespace attention;
  return with_hopper_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    return of_keys ? launch_hopper_gradient<HopperGradientShape<T, H, true>>(call, place)
                   : launch_hopper_gradient<HopperGradientShape<T, H, false>>(call, place);
  });
}

}  // namespace fastseq::cuda

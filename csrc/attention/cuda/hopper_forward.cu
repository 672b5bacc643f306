// softmax(Q Kᵀ) V, forward, on Hopper: TMA brings the tiles, warpgroups multiply them. The plain class alone.
//
// A block stays on its multiprocessor and makes one tile [kBlockM, Dv] of o after another. Two warps of its last
// warpgroup bring tiles, one those of q, the other those of k and v; the other warpgroups make 64 rows each. Over tiles
// j = last .. first of keys, so that those under a causal limit come first:
//
//   s(j) = q k(j)ᵀ;   p(j), a(j) from s(j) by the running softmax;   acc = a(j) acc + p(j) v(j)
//
// The product s(j) is started before the product p(j+1) v(j+1), and the tensor cores have the latter while the softmax
// of s(j) waits for nothing but the former. Across warpgroups the products take turns, so that the exponentials of one
// run under the products of another.
#include "attention/cuda/epilogue.cuh"
#include "attention/cuda/hopper_tile.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/table.cuh"

namespace fastseq::cuda {
namespace attention {

struct ForwardMaps {
  TensorMap q, k, v;
};

// One tile of o: where it lies, and the tiles of keys that it meets.
template <class Shape>
struct ForwardTile {
  Slot slot;
  Sequence own;
  int i0;
  Range keys;
  int last;  // the tile of keys that comes first

  FASTSEQ_DEVICE ForwardTile(const AttentionForward& call, const Slot& slot, const Sequence& own)
      : slot(slot), own(own), i0(slot.tile * Shape::kBlockM) {
    keys = keys_of<false>(call, own, i0, at_most(i0 + Shape::kBlockM, own.tq) - 1, Shape::kBlockN);
    last = keys.begin + (keys.end - 1 - keys.begin) / Shape::kBlockN * Shape::kBlockN;
  }
  FASTSEQ_DEVICE bool any() const { return keys.begin < keys.end; }
};

template <class Shape>
struct HopperForward {
  using T = typename Shape::T;
  static constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kGroups = Shape::kGroups;
  using TileQ = Tile<kBlockM, Shape::kDim>;
  using TileK = Tile<kBlockN, Shape::kDim>;
  using TileV = Tile<kBlockN, Shape::kDimV>;
  using Queries = Ring<Shape::kStagesQ>;
  using Keys = Ring<Shape::kStages>;

  const AttentionForward& call;
  const Tiling& tiling;
  unsigned char *q_tiles, *k_tiles, *v_tiles;
  Queries q_ring;
  Keys k_ring, v_ring;
  Mbar* landed;

  FASTSEQ_DEVICE HopperForward(const AttentionForward& call, const Tiling& tiling, unsigned char* shared)
      : call(call),
        tiling(tiling),
        q_tiles(shared),
        k_tiles(q_tiles + Shape::kStagesQ * TileQ::kBytes),
        v_tiles(k_tiles + Shape::kStages * TileK::kBytes),
        q_ring(shared + Shape::kTiles),
        k_ring(shared + Shape::kTiles + Queries::kBytes),
        v_ring(shared + Shape::kTiles + Queries::kBytes + Keys::kBytes),
        landed(reinterpret_cast<Mbar*>(shared + Shape::kTiles + Queries::kBytes + 2 * Keys::kBytes)) {}

  FASTSEQ_DEVICE void init() const {
    q_ring.init(4 * kGroups);
    k_ring.init(4 * kGroups);
    v_ring.init(4 * kGroups);
    mbar_init(landed, 1);
    fence_mbar_init();
  }

  template <class Each>
  FASTSEQ_DEVICE void for_each_tile(const Each& each) const {
    for_each_slot<kBlockM>(call, tiling, [&](const Slot& slot, const Sequence& own) {
      if (slot.tile * kBlockM < own.rows) each(ForwardTile<Shape>(call, slot, own));
    });
  }
  // In a map a packed batch is one sequence.
  FASTSEQ_DEVICE int batch_of(const Slot& slot) const { return call.cu_q != nullptr ? 0 : slot.b; }

  FASTSEQ_DEVICE void bring_queries(const TensorMap& map) {
    for_each_tile([&](const ForwardTile<Shape>& tile) {
      q_ring.wait_empty();
      if (lane() == 0)
        start_tile<TileQ>(q_tiles + q_ring.stage * TileQ::kBytes, map, q_ring.full(), tile.own.q_row + tile.i0,
                          tile.slot.h, batch_of(tile.slot));
      q_ring.advance();
    });
  }

  FASTSEQ_DEVICE void bring_keys(const TensorMap& k_map, const TensorMap& v_map) {
    unsigned parity = 0;
    for_each_tile([&](const ForwardTile<Shape>& tile) {
      if (!tile.any()) return;
      const Sequence& own = tile.own;
      const int h = tile.slot.h / call.group, b = batch_of(tile.slot);
      // Keys past the tensor's end come as zero; keys past the sequence's end alone may be anything.
      const int end = own.k_row + own.tk < call.length_k ? own.tk : kUnlimited;
      const auto bring_v = [&](int j0) {
        v_ring.wait_empty();
        start_clean<TileV>(v_tiles + v_ring.stage * TileV::kBytes, v_map, v_ring.full(), own.k_row + j0, h, b, end - j0,
                           landed, parity);
        v_ring.advance();
      };
#pragma unroll 1
      for (int j0 = tile.last; j0 >= tile.keys.begin; j0 -= kBlockN) {
        k_ring.wait_empty();
        if (lane() == 0)
          start_tile<TileK>(k_tiles + k_ring.stage * TileK::kBytes, k_map, k_ring.full(), own.k_row + j0, h, b);
        k_ring.advance();
        if (j0 != tile.last) bring_v(j0 + kBlockN);
      }
      bring_v(tile.keys.begin);
    });
  }

  // The groups' turns, by one named barrier a group: it opens when the group before has passed its turn on.
  FASTSEQ_DEVICE static void take_turn(int group) {
    if (Shape::kTurns) named_bar_sync(unsigned(1 + group), 2 * kWarpgroup);
  }
  FASTSEQ_DEVICE static void pass_turn(int group) {
    if (Shape::kTurns) named_bar_arrive(unsigned(1 + (group + 1) % kGroups), 2 * kWarpgroup);
  }

  FASTSEQ_DEVICE void make_rows(int group) {
    if (group == kGroups - 1) pass_turn(group);  // to the first
    for_each_tile([&](const ForwardTile<Shape>& tile) { make_tile(group, tile); });
    if (group == 0) take_turn(group);  // what the last has passed on
  }

  FASTSEQ_DEVICE void make_tile(int group, const ForwardTile<Shape>& tile) {
    const Slot& slot = tile.slot;
    const Sequence& own = tile.own;
    const int row = 64 * group + int(warp() % 4) * 16;  // this warp's first in the tile
    Softmax<1> softmax(call.sinks != nullptr ? number_at(call.sinks, call.sinks_dtype, slot.h) * kLog2e : -kInfinity);
    Fragment<1, kBlockN / 8> s;
    Fragment<1, Shape::kDimV / 8> acc;
    uint32_t p[kBlockN / 16][4];
    acc.clear();
    unsigned char* q_tile = q_tiles + q_ring.stage * TileQ::kBytes;

    const auto start_s = [&] {
      wg_fence();
      multiply_rows<T, TileQ, TileK>(s, q_tile, 64 * group, k_tiles + k_ring.stage * TileK::kBytes);
      wg_commit();
    };
    const auto start_acc = [&] {
      v_ring.wait_full();
      wg_fence();
      multiply_columns<T, TileV>(acc, p, v_tiles + v_ring.stage * TileV::kBytes);
      wg_commit();
    };
    // From here on s is p, still to be rounded; a[half] is due to acc.
    const auto weigh = [&](int j0, float (&a)[2]) {
      k_ring.release();
      k_ring.advance();
      if (tile.keys.masked(j0)) hide<false, false>(s, call, own, Corner{slot.b, slot.h, tile.i0 + row, j0});
#pragma unroll
      for (int half = 0; half < 2; ++half) a[half] = softmax.weigh(0, half, s, call.factor);
    };
    const auto finish_acc = [&] {
      wg_cover(softmax.l[0][0] + softmax.l[0][1], landed);
      wg_wait<0>(numbers_of(acc));
      v_ring.release();
      v_ring.advance();
    };

    q_ring.wait_full();
    if (tile.any()) {
      float a[2];
      k_ring.wait_full();
      start_s();
      wg_wait<0>(numbers_of(s));
      weigh(tile.last, a);
      round_fragment<T>(p, s);
#pragma unroll 1
      for (int j0 = tile.last - kBlockN; j0 >= tile.keys.begin; j0 -= kBlockN) {
        k_ring.wait_full();
        take_turn(group);
        start_s();
        start_acc();
        pass_turn(group);
        wg_wait<1>(numbers_of(s));
        weigh(j0, a);
        finish_acc();
#pragma unroll
        for (int half = 0; half < 2; ++half) softmax.rescale(0, half, acc, a[half]);
        round_fragment<T>(p, s);
      }
      start_acc();
      finish_acc();
    }

    softmax.finish(acc, call.kept_scale, tile.i0 + row, own.tq);
    // o leaves by way of q's rows: when the whole group is done with them.
    named_bar_sync(unsigned(1 + kGroups + group), kWarpgroup);
    store_rows<T, TileQ, false>(acc, q_tile, row, at<T>(call.o, slot.b, slot.h, own.q_row), call.o.row, tile.i0 + row,
                                own.rows, call.dim_v, true);
    fence_proxy_async();  // the next q overwrites what was stored there
    q_ring.release();
    q_ring.advance();
    store_lse(softmax.l, at<float>(call.lse, slot.b, slot.h, own.q_row), tile.i0 + row, own.rows);
  }
};

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, 1)
hopper_forward_kernel(FASTSEQ_IN_PLACE ForwardMaps maps, FASTSEQ_IN_PLACE AttentionForward call,
                      FASTSEQ_IN_PLACE Tiling tiling) {
  if constexpr (kHasWgmma) {
    HopperForward<Shape> self(call, tiling, shared_memory());
    if (tid() == 0) self.init();
    sync_block();
    const int group = int(shfl_idx(warp() / 4, 0));  // known to be the same in all lanes
    if (group == Shape::kGroups) {
      reg_dealloc<Shape::kBringingRegisters>();
      if (warp() % 4 == 0) self.bring_keys(maps.k, maps.v);
      if (warp() % 4 == 1) self.bring_queries(maps.q);
    } else {
      reg_alloc<Shape::kRegisters>();
      self.make_rows(group);
    }
  } else {
    trap();
  }
}

template <class Shape>
const char* launch_hopper_forward(const AttentionForward& call, const Place& place) {
  using Kernel = HopperForward<Shape>;
  const bool packed = call.cu_q != nullptr;
  const int64_t batch = packed ? 1 : call.batch;
  ForwardMaps maps;
  const char* error =
      make_map<typename Kernel::TileQ>(maps.q, call.q, batch, call.heads_q, call.length_q, call.dim);
  if (error == nullptr)
    error = make_map<typename Kernel::TileK>(maps.k, call.k, batch, call.heads_k, call.length_k, call.dim);
  if (error == nullptr)
    error = make_map<typename Kernel::TileV>(maps.v, call.v, batch, call.heads_k, call.length_k, call.dim_v);
  if (error != nullptr) return error;
  const Tiling tiling = even_tiling(call, false, Shape::kBlockM, place.multiprocessors, false);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks() < place.multiprocessors ? tiling.blocks() : place.multiprocessors);
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  return launch(hopper_forward_kernel<Shape>, shape, static_cast<Stream>(place.stream), maps, call, tiling);
}

}  // namespace attention

const char* attention_hopper_forward(const AttentionForward& call, const Place& place) {
  using namespace attention;
  return with_hopper_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    const auto rounded = [&](int block) { return (call.length_q + block - 1) / block * block; };
    const bool large = H::kDim == 128 ? call.left == kUnlimited && call.right == kUnlimited
                                      : call.cu_q != nullptr || rounded(192) <= rounded(128);
    if constexpr (H::kDim <= 128) {
      if (large) return launch_hopper_forward<HopperForwardShape<T, H, true>>(call, place);
    }
    return launch_hopper_forward<HopperForwardShape<T, H, false>>(call, place);
  });
}

}  // namespace fastseq::cuda

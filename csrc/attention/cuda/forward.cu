// softmax(Q Kᵀ) V, forward, for every GPU from sm_80 on: one pass over the keys, the scores never stored.
//
// A block makes kBlockM rows of o, a warp 16 kM of them. K and V have one buffer each: V comes in under the product with
// K, the next K under the product with V. Tiles of keys that no row sees are not visited; those that all rows see skip
// the masks. Dropout acts on what reaches acc, not on l.
#include "attention/cuda/epilogue.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/table.cuh"

namespace fastseq::cuda {
namespace attention {

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, Shape::kBlocks) forward_kernel(FASTSEQ_IN_PLACE AttentionForward call, Tiling tiling) {
  using T = typename Shape::T;
  constexpr int kM = Shape::kM, kThreads = Shape::kThreads;
  constexpr bool kGeneral = Shape::kGeneral;
  using TileQ = Tile<Shape::kBlockM, Shape::kDim>;
  using TileK = Tile<Shape::kBlockN, Shape::kDim>;
  using TileV = Tile<Shape::kBlockN, Shape::kDimV>;

  const Slot slot = find_slot<Shape::kBlockM>(call, tiling, int(bid()));
  const Sequence own(call, slot.b);
  const int i0 = slot.tile * Shape::kBlockM;
  if (i0 >= own.rows) return;
  unsigned char* q_tile = shared_memory();
  unsigned char* k_tile = q_tile + TileQ::kBytes;
  unsigned char* v_tile = k_tile + TileK::kBytes;
  const int head_k = slot.h / call.group;
  const T* k_head = at<T>(call.k, slot.b, head_k, own.k_row);
  const T* v_head = at<T>(call.v, slot.b, head_k, own.k_row);
  const int row = int(warp()) * 16 * kM;  // this warp's first in the tile

  const Range keys = keys_of<kGeneral>(call, own, i0, at_most(i0 + Shape::kBlockM, own.tq) - 1, Shape::kBlockN);
  const auto load_k = [&](int j0) {
    load_tile<TileK, kThreads, kGeneral>(k_tile, k_head, call.k.row, j0, own.tk, call.dim, call.aligned, tid());
    cp_commit();
  };
  if (keys.begin < keys.end) {
    load_tile<TileQ, kThreads, kGeneral>(q_tile, at<T>(call.q, slot.b, slot.h, own.q_row), call.q.row, i0, own.tq,
                                         call.dim, call.aligned, tid());
    load_k(keys.begin);
  }
  const auto q_reader = reader_of_a<TileQ>(q_tile, row);
  const auto k_reader = reader_of_rows<TileK>(k_tile);
  const auto v_reader = reader_of_columns<TileV>(v_tile);
  Softmax<kM> softmax(call.sinks != nullptr ? number_at(call.sinks, call.sinks_dtype, slot.h) * kLog2e : -kInfinity);
  Fragment<kM, Shape::kDimV / 8> acc;
  acc.clear();

  for (int j0 = keys.begin; j0 < keys.end; j0 += Shape::kBlockN) {
    cp_wait<0>();
    sync_block();  // K is there, and V of the tile before is done with
    load_tile<TileV, kThreads, kGeneral>(v_tile, v_head, call.v.row, j0, own.tk, call.dim_v, call.aligned,
                                        tid());
    cp_commit();
    Fragment<kM, Shape::kBlockN / 8> s;
    product_of_rows<T>(s, q_reader, k_reader);
    const Corner corner{slot.b, slot.h, i0 + row, j0};
    if (kGeneral) {
      scale_and_cap(s, call);
      add_pairs<false>(s, call, own, corner);
    }
    if (keys.masked(j0)) hide<false, kGeneral>(s, call, own, corner);
    softmax.step(s, acc, kGeneral ? 1.0f : call.factor);
    if (kGeneral && call.seed != nullptr) drop<false>(s, call, corner, 1.0f);
    cp_wait<0>();
    sync_block();  // V is there, and K is done with
    if (j0 + Shape::kBlockN < keys.end) load_k(j0 + Shape::kBlockN);
    add_product<T>(acc, s, v_reader);
  }

  softmax.finish(acc, call.kept_scale, i0 + row, own.tq);
  store_rows<T, TileQ, kGeneral>(acc, q_tile, row, at<T>(call.o, slot.b, slot.h, own.q_row), call.o.row, i0 + row,
                                 own.rows, call.dim_v, call.aligned);
  store_lse(softmax.l, at<float>(call.lse, slot.b, slot.h, own.q_row), i0 + row, own.rows);
}

template <class Shape>
const char* launch_forward(const AttentionForward& call, Stream stream) {
  const Tiling tiling = tiling_of(call, false, Shape::kBlockM);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks());
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  return launch(forward_kernel<Shape>, shape, stream, call, tiling);
}

}  // namespace attention

const char* attention_forward(const AttentionForward& call, const Place& place) {
  using namespace attention;
  if (call.batch == 0 && call.cu_q == nullptr) return nullptr;
  if (call.heads_q == 0 || call.length_q == 0) return nullptr;
  if (hopper_refusal(call, place) == nullptr) return attention_hopper_forward(call, place);
  const Stream stream = static_cast<Stream>(place.stream);
  return with_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    return is_general(call) ? launch_forward<ForwardShape<T, H, true>>(call, stream)
                            : launch_forward<ForwardShape<T, H, false>>(call, stream);
  });
}

}  // namespace fastseq::cuda

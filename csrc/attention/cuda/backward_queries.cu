// dq: a block owns a tile of queries of one head and meets the keys that they see. k and v have two buffers each, so that
// the next ones come in under all three products. At the end it settles its rows' share and delta, and takes back from dq
// what was wrong with them: by one tile of keys, or by all of them once more.
#include "attention/cuda/gradient.cuh"

namespace fastseq::cuda {
namespace attention {

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, Shape::kBlocks)
queries_kernel(FASTSEQ_IN_PLACE AttentionBackward call, Tiling tiling) {
  using T = typename Shape::T;
  constexpr int kThreads = Shape::kThreads, kBlockN = Shape::kBlockN;
  constexpr bool kGeneral = Shape::kGeneral;
  using TileQ = Tile<Shape::kBlockM, Shape::kDim>;
  using TileD = Tile<Shape::kBlockM, Shape::kDimV>;
  using TileK = Tile<kBlockN, Shape::kDim>;
  using TileV = Tile<kBlockN, Shape::kDimV>;
  constexpr int kBuffer = TileK::kBytes + TileV::kBytes;

  const Slot slot = find_slot<Shape::kBlockM>(call, tiling, int(bid()));
  const Sequence own(call, slot.b);
  const int i0 = slot.tile * Shape::kBlockM;
  if (i0 >= own.rows) return;
  unsigned char* q_tile = shared_memory();
  unsigned char* d_tile = q_tile + TileQ::kBytes;
  unsigned char* buffers = d_tile + TileD::kBytes;
  const int row = int(warp()) * 16, head_k = slot.h / call.group;

  const Range keys = keys_of<kGeneral>(call, own, i0, at_most(i0 + Shape::kBlockM, own.tq) - 1, kBlockN);
  const auto load_keys = [&](int j0) {
    unsigned char* k_tile = buffers + j0 / kBlockN % 2 * kBuffer;
    load_tile<TileK, kThreads, kGeneral>(k_tile, at<T>(call.k, slot.b, head_k, own.k_row), call.k.row, j0, own.tk,
                                         call.dim, call.aligned, tid());
    load_tile<TileV, kThreads, kGeneral>(k_tile + TileK::kBytes, at<T>(call.v, slot.b, head_k, own.k_row), call.v.row,
                                         j0, own.tk, call.dim_v, call.aligned, tid());
    cp_commit();
  };
  if (keys.begin < keys.end) {
    load_tile<TileQ, kThreads, kGeneral>(q_tile, at<T>(call.q, slot.b, slot.h, own.q_row), call.q.row, i0, own.tq,
                                         call.dim, call.aligned, tid());
    load_tile<TileD, kThreads, kGeneral>(d_tile, at<T>(call.d_o, slot.b, slot.h, own.q_row), call.d_o.row, i0, own.tq,
                                         call.dim_v, call.aligned, tid());
    load_keys(keys.begin);
  }
  const int64_t scratch = scratch_of(call, own, slot.b, slot.h);
  float log[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + row + int(lane() >> 2) + 8 * half;
    log[half] = call.log[scratch + i], delta[half] = call.delta[scratch + i];
  }
  const auto q_reader = reader_of_a<TileQ>(q_tile, row);
  const auto d_reader = reader_of_a<TileD>(d_tile, row);
  const auto k_rows = reader_of_rows<TileK>(buffers);
  const auto v_rows = reader_of_rows<TileV>(buffers + TileK::kBytes);
  const auto k_columns = reader_of_columns<TileK>(buffers);
  Fragment<1, Shape::kDim / 8> dq;
  dq.clear();
  RowSums<kGeneral> sums;
  constexpr bool kSumsShared = Shape::kSums > 0;
  float* kept = reinterpret_cast<float*>(shared_memory() + Shape::kShared - Shape::kSums) + tid();
  if constexpr (kSumsShared) sums.write(kept, kThreads);

  for (int j0 = keys.begin; j0 < keys.end; j0 += kBlockN) {
    cp_wait<0>();
    sync_block();  // these keys are there, and those of the tile before are done with
    if (j0 + kBlockN < keys.end) load_keys(j0 + kBlockN);
    const unsigned buffer = unsigned(j0 / kBlockN % 2 * kBuffer);
    const auto shifted = [&](auto reader) {
      reader.tile += buffer;
      return reader;
    };
    const Corner corner{slot.b, slot.h, i0 + row, j0};
    Fragment<1, kBlockN / 8> s, dp, slope;
    product_of_rows<T>(s, q_reader, shifted(k_rows));
    probabilities<false, kGeneral>(s, slope, call, own, corner, keys.masked(j0),
                                   [&](int, int, int e) { return log[e >> 1]; });
    if constexpr (kSumsShared) sums = RowSums<kGeneral>();
    sums.add_p(s, slope, call);
    product_of_rows<T>(dp, d_reader, shifted(v_rows));
    score_gradients<false, kGeneral>(s, dp, call, corner, [&](int, int, int e) { return delta[e >> 1]; });
    sums.add_ds(dp, call);
    through_cap<kGeneral>(dp, slope, call);
    sums.add_sloped(dp, call);
    add_product<T>(dq, dp, shifted(k_columns), 0, [&](const uint32_t(&a)[4]) { sums.template add_rounded<T>(a); });
    if constexpr (kSumsShared) sums.add_to(kept, kThreads);
  }
  if constexpr (kSumsShared) {
    sums = RowSums<kGeneral>();
    sums.read(kept, kThreads);
  }

  Settled rows[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = i0 + row + int(lane() >> 2) + 8 * half;
    rows[half] = settle(sums, half, call, own, slot, i, log[half], delta[half]);
    if ((lane() & 3) != 0 || log[half] == kInfinity) continue;
    call.delta[scratch + i] = rows[half].delta;
    if (kGeneral) call.share[scratch + i] = rows[half].share;
  }
  sync_block();  // the last tile is done with
  float2* largest = reinterpret_cast<float2*>(buffers + TileK::kBytes);  // [warps]
  write_largest(largest, rows);
  sync_block();  // all warps' largest are there
  const bool everywhere = everywhere_again<T, Shape::kWarps>(largest);
  // The last tile that all see; where there is none, or a row has no p there, or all are wanted, the tiles from the end on.
  int j0 = keys.whole_begin < keys.whole_end && !everywhere ? keys.whole_end - kBlockN
                                                            : (keys.end - 1) / kBlockN * kBlockN;
  uint32_t* waiting = reinterpret_cast<uint32_t*>(buffers + TileK::kBytes);  // [warps]
  for (bool more = keys.begin < keys.end; more && j0 >= keys.begin; j0 -= kBlockN) {
    load_tile<TileK, kThreads, kGeneral>(buffers, at<T>(call.k, slot.b, head_k, own.k_row), call.k.row, j0, own.tk,
                                         call.dim, call.aligned, tid());
    cp_commit();
    cp_wait<0>();
    sync_block();
    Fragment<1, kBlockN / 8> s, slope;
    product_of_rows<T>(s, q_reader, k_rows);
    probabilities<false, kGeneral>(s, slope, call, own, Corner{slot.b, slot.h, i0 + row, j0}, keys.masked(j0),
                                   [&](int, int, int e) { return log[e >> 1]; });
    through_cap<kGeneral>(s, slope, call);
    float unit[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) start_taking_back(s, dq, half, rows[half], everywhere, unit[half]);
    add_product<T>(dq, s, k_columns);
    multiply_rows_by(dq, unit);
    const uint32_t lanes = ballot(rows[0].left != 0 || rows[1].left != 0);
    if (lane() == 0) waiting[warp()] = lanes;
    sync_block();  // all are done with this one
    more = false;
    for (int n = 0; n < Shape::kWarps; ++n) more = more || waiting[n] != 0;
  }
  if (kGeneral) multiply_rows_by(dq, {rows[0].share, rows[1].share});

  scale_rows(dq, float(call.scale), i0 + row, own.tq);
  store_rows<T, TileQ, kGeneral>(dq, q_tile, row, at<T>(call.dq, slot.b, slot.h, own.q_row), call.dq.row, i0 + row,
                                 own.rows, call.dim, call.aligned);
}

template <class Shape>
const char* launch_queries(const AttentionBackward& call, Stream stream) {
  const Tiling tiling = tiling_of(call, false, Shape::kBlockM);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks());
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  return launch(queries_kernel<Shape>, shape, stream, call, tiling);
}

}  // namespace attention

const char* attention_backward_queries(const AttentionBackward& call, const Place& place) {
  using namespace attention;
  const Stream stream = static_cast<Stream>(place.stream);
  return with_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    return is_general(call) ? launch_queries<QueriesShape<T, H, true>>(call, stream)
                            : launch_queries<QueriesShape<T, H, false>>(call, stream);
  });
}

}  // namespace fastseq::cuda

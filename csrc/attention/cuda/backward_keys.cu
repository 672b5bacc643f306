// dk and dv: a block owns a tile of keys of one key head and meets the queries of all query heads that share it.
//
// Scores are held transposed, rows are keys: p and ds are A operands of the products with do and q as stored in
// registers. q and do have two buffers each, so that the next ones come in under all four products. Where dk and dv are
// too wide for the registers, kParts blocks share the columns and each computes the scores.
#include "attention/cuda/gradient.cuh"

namespace fastseq::cuda {
namespace attention {

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, Shape::kBlocks)
keys_kernel(FASTSEQ_IN_PLACE AttentionBackward call, Tiling tiling) {
  using T = typename Shape::T;
  constexpr int kThreads = Shape::kThreads, kParts = Shape::kParts, kBlockM = Shape::kBlockM;
  constexpr bool kGeneral = Shape::kGeneral;
  using TileK = Tile<Shape::kBlockN, Shape::kDim>;
  using TileV = Tile<Shape::kBlockN, Shape::kDimV>;
  using TileQ = Tile<kBlockM, Shape::kDim>;
  using TileD = Tile<kBlockM, Shape::kDimV>;
  constexpr int kBuffer = TileQ::kBytes + TileD::kBytes + Shape::kNumbers * kBlockM * 4;
  constexpr int kColumnsK = Shape::kDim / kParts, kColumnsV = Shape::kDimV / kParts;  // of this block's results

  const int part = kParts == 1 ? 0 : int(bid()) % kParts;
  const Slot slot = find_slot<Shape::kBlockN>(call, tiling, int(bid()) / kParts);
  const Sequence own(call, slot.b);
  const int j0 = slot.tile * Shape::kBlockN;
  if (j0 >= own.keys) return;
  unsigned char* k_tile = shared_memory();
  unsigned char* v_tile = k_tile + TileK::kBytes;
  unsigned char* buffers = v_tile + TileV::kBytes;
  const int row = int(warp()) * 16;

  const Range queries = queries_of<kGeneral>(call, own, j0, at_most(j0 + Shape::kBlockN, own.tk) - 1, kBlockM);
  const int tiles = queries.begin < queries.end ? (queries.end - queries.begin + kBlockM - 1) / kBlockM : 0;
  const int steps = tiles * call.group;
  const auto load_queries = [&](int step) {
    unsigned char* q_tile = buffers + step % 2 * kBuffer;
    unsigned char* d_tile = q_tile + TileQ::kBytes;
    unsigned char* numbers = d_tile + TileD::kBytes;
    const int h = slot.h * call.group + step / tiles, i0 = queries.begin + step % tiles * kBlockM;
    load_tile<TileQ, kThreads, kGeneral>(q_tile, at<T>(call.q, slot.b, h, own.q_row), call.q.row, i0, own.tq, call.dim,
                                         call.aligned, tid());
    load_tile<TileD, kThreads, kGeneral>(d_tile, at<T>(call.d_o, slot.b, h, own.q_row), call.d_o.row, i0, own.tq,
                                         call.dim_v, call.aligned, tid());
    const int64_t scratch = scratch_of(call, own, slot.b, h) + i0;
    if (tid() < Shape::kNumbers * kBlockM / 4) {
      const unsigned which = tid() / (kBlockM / 4), n = tid() % (kBlockM / 4) * 4;
      cp_async16(numbers + (which * kBlockM + n) * 4,
                 (which == 0 ? call.log : which == 1 ? call.delta : call.share) + scratch + n);
    }
  };
  Fragment<1, kColumnsK / 8> dk;
  Fragment<1, kColumnsV / 8> dv;
  dk.clear();
  dv.clear();
  if (steps > 0) {
    load_tile<TileK, kThreads, kGeneral>(k_tile, at<T>(call.k, slot.b, slot.h, own.k_row), call.k.row, j0, own.tk,
                                         call.dim, call.aligned, tid());
    load_tile<TileV, kThreads, kGeneral>(v_tile, at<T>(call.v, slot.b, slot.h, own.k_row), call.v.row, j0, own.tk,
                                         call.dim_v, call.aligned, tid());
    load_queries(0);
    cp_commit();
  }
  const auto k_reader = reader_of_a<TileK>(k_tile, row);
  const auto v_reader = reader_of_a<TileV>(v_tile, row);
  const auto q_rows = reader_of_rows<TileQ>(buffers);
  const auto d_rows = reader_of_rows<TileD>(buffers + TileQ::kBytes);
  const auto q_columns = reader_of_columns<TileQ>(buffers + part * (kColumnsK / 8 / TileQ::kPanel) * TileQ::kPanelBytes);
  const auto d_columns =
      reader_of_columns<TileD>(buffers + TileQ::kBytes + part * (kColumnsV / 8 / TileD::kPanel) * TileD::kPanelBytes);
  static_assert(kParts == 1 || (kColumnsK % 64 == 0 && kColumnsV % 64 == 0), "parts are whole panels");

  for (int step = 0; step < steps; ++step) {
    cp_wait<0>();
    sync_block();  // this step's q and do are there, and those of the step before are done with
    if (step + 1 < steps) {
      load_queries(step + 1);
      cp_commit();
    }
    const unsigned buffer = unsigned(step % 2 * kBuffer);
    const auto shifted = [&](auto reader) {
      reader.tile += buffer;
      return reader;
    };
    const int h = slot.h * call.group + step / tiles, i0 = queries.begin + step % tiles * kBlockM;
    const Corner corner{slot.b, h, i0, j0 + row};
    const float* log = reinterpret_cast<const float*>(buffers + buffer + TileQ::kBytes + TileD::kBytes);
    const auto column = [](int n, int e) { return 8 * n + 2 * int(lane() & 3) + (e & 1); };
    Fragment<1, kBlockM / 8> s, dp, slope;
    product_of_rows<T>(s, k_reader, shifted(q_rows));
    probabilities<true, kGeneral>(s, slope, call, own, corner, queries.masked(i0),
                                  [&](int, int n, int e) { return log[column(n, e)]; });
    if (kGeneral)
      for_each_element<1, kBlockM / 8>([&](int m, int n, int e) { s.x[m][n][e] *= log[2 * kBlockM + column(n, e)]; });
    product_of_rows<T>(dp, v_reader, shifted(d_rows));
    score_gradients<true, kGeneral>(s, dp, call, corner,
                                    [&](int, int n, int e) { return log[kBlockM + column(n, e)]; });
    add_product<T>(dv, s, shifted(d_columns));
    through_cap<kGeneral>(dp, slope, call);
    add_product<T>(dk, dp, shifted(q_columns));
  }

  scale_rows(dk, float(call.scale), j0 + row, own.tk);
  scale_rows(dv, 1.0f, j0 + row, own.tk);
  store_rows<T, TileK, kGeneral>(dk, k_tile, row, at<T>(call.dk, slot.b, slot.h, own.k_row) + part * kColumnsK,
                                 call.dk.row, j0 + row, own.keys, call.dim - part * kColumnsK, call.aligned);
  store_rows<T, TileV, kGeneral>(dv, v_tile, row, at<T>(call.dv, slot.b, slot.h, own.k_row) + part * kColumnsV,
                                 call.dv.row, j0 + row, own.keys, call.dim_v - part * kColumnsV, call.aligned);
}

template <class Shape>
const char* launch_keys(const AttentionBackward& call, Stream stream) {
  const Tiling tiling = tiling_of(call, true, Shape::kBlockN);
  Launch shape;
  shape.grid.x = unsigned(tiling.blocks() * Shape::kParts);
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  return launch(keys_kernel<Shape>, shape, stream, call, tiling);
}

}  // namespace attention

const char* attention_backward_keys(const AttentionBackward& call, const Place& place) {
  using namespace attention;
  const Stream stream = static_cast<Stream>(place.stream);
  return with_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    return is_general(call) ? launch_keys<KeysShape<T, H, true>>(call, stream)
                            : launch_keys<KeysShape<T, H, false>>(call, stream);
  });
}

}  // namespace fastseq::cuda

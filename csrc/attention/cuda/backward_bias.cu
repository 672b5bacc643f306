// The gradient of the bias: ds, summed over what the bias was broadcast along, without atomics.
//
// A block owns a tile of the bias and meets, in order, the tiles of scores that it was broadcast to. Where that would
// leave the machine idle (a bias of few numbers) bias_splits blocks share them, and their sums are added in a second
// kernel, in order.
#include "attention/cuda/gradient.cuh"

namespace fastseq::cuda {
namespace attention {

// The bias's own dimensions: how many sequences, heads and tiles it tells apart, and over how many it is a sum.
struct BiasTiles {
  int tiles_i, tiles_j;      // of the scores
  int own_i, own_j;          // of the bias
  int own_heads, own_batch;  // 1 where all share
  int sum_heads, sum_batch;
  FASTSEQ_DEVICE BiasTiles(const AttentionBackward& call, int block_m, int block_n)
      : tiles_i((call.length_q + block_m - 1) / block_m), tiles_j((call.length_k + block_n - 1) / block_n),
        own_i(call.bias_size[2] == 1 ? 1 : tiles_i), own_j(call.bias_size[3] == 1 ? 1 : tiles_j),
        own_heads(call.bias_size[1]), own_batch(call.bias_size[0]), sum_heads(call.heads_q / own_heads),
        sum_batch(call.batch / own_batch) {}
};

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, Shape::kBlocks) bias_kernel(FASTSEQ_IN_PLACE AttentionBackward call) {
  using T = typename Shape::T;
  constexpr int kThreads = Shape::kThreads, kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN;
  using TileQ = Tile<kBlockM, Shape::kDim>;
  using TileD = Tile<kBlockM, Shape::kDimV>;
  using TileK = Tile<kBlockN, Shape::kDim>;
  using TileV = Tile<kBlockN, Shape::kDimV>;
  unsigned char* q_tile = shared_memory();
  unsigned char* d_tile = q_tile + TileQ::kBytes;
  unsigned char* k_tile = d_tile + TileD::kBytes;
  unsigned char* v_tile = k_tile + TileK::kBytes;
  const int row = int(warp()) * 16;

  const BiasTiles x(call, kBlockM, kBlockN);
  const int split = int(bid()) % call.bias_splits;
  int index = int(bid()) / call.bias_splits;
  const int own_j = index % x.own_j;
  index /= x.own_j;
  const int own_i = index % x.own_i;
  index /= x.own_i;
  const int own_h = index % x.own_heads, own_b = index / x.own_heads;
  const int shared_i = x.tiles_i / x.own_i, shared_j = x.tiles_j / x.own_j;
  const int terms = x.sum_batch * x.sum_heads * shared_i * shared_j;
  const int share = (terms + call.bias_splits - 1) / call.bias_splits;

  Fragment<1, kBlockN / 8> acc;
  acc.clear();
  for (int n = split * share; n < at_most(terms, split * share + share); ++n) {
    const int tile_j = own_j + n % shared_j, tile_i = own_i + n / shared_j % shared_i;
    const int h = own_h + n / shared_j / shared_i % x.sum_heads, b = own_b + n / shared_j / shared_i / x.sum_heads;
    const Sequence own(call, b);
    const int i0 = tile_i * kBlockM, j0 = tile_j * kBlockN, head_k = h / call.group;
    const Range keys = keys_of<true>(call, own, i0, at_most(i0 + kBlockM, own.tq) - 1, kBlockN);
    if (j0 < keys.begin || j0 >= keys.end) continue;
    sync_block();  // the tiles of the term before are done with
    load_tile<TileQ, kThreads, true>(q_tile, at<T>(call.q, b, h, 0), call.q.row, i0, own.tq, call.dim, call.aligned, tid());
    load_tile<TileD, kThreads, true>(d_tile, at<T>(call.d_o, b, h, 0), call.d_o.row, i0, own.tq, call.dim_v, call.aligned,
                                     tid());
    load_tile<TileK, kThreads, true>(k_tile, at<T>(call.k, b, head_k, 0), call.k.row, j0, own.tk, call.dim, call.aligned,
                                     tid());
    load_tile<TileV, kThreads, true>(v_tile, at<T>(call.v, b, head_k, 0), call.v.row, j0, own.tk, call.dim_v,
                                     call.aligned, tid());
    cp_commit();
    const int64_t scratch = scratch_of(call, own, b, h);
    float log[2], delta[2], share[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + row + int(lane() >> 2) + 8 * half;
      log[half] = call.log[scratch + i], delta[half] = call.delta[scratch + i], share[half] = call.share[scratch + i];
    }
    cp_wait<0>();
    sync_block();
    const Corner corner{b, h, i0 + row, j0};
    Fragment<1, kBlockN / 8> s, dp, slope;
    product_of_rows<T>(s, reader_of_a<TileQ>(q_tile, unsigned(row)), reader_of_rows<TileK>(k_tile));
    probabilities<false, true>(s, slope, call, own, corner, keys.masked(j0),
                               [&](int, int, int e) { return log[e >> 1]; });
    multiply_rows_by(s, share);
    product_of_rows<T>(dp, reader_of_a<TileD>(d_tile, unsigned(row)), reader_of_rows<TileV>(v_tile));
    score_gradients<false, true>(s, dp, call, corner, [&](int, int, int e) { return delta[e >> 1]; });
    for_each_element<1, kBlockN / 8>([&](int m, int nn, int e) { acc.x[m][nn][e] += dp.x[m][nn][e]; });
  }

  // By way of shared memory, rows padded by one number.
  sync_block();
  float* sums = reinterpret_cast<float*>(shared_memory());
  for_each_element<1, kBlockN / 8>([&](int, int n, int e) {
    const int r = row + int(lane() >> 2) + 8 * (e >> 1), c = 8 * n + 2 * int(lane() & 3) + (e & 1);
    sums[r * (kBlockN + 1) + c] = acc.x[0][n][e];
  });
  sync_block();
  const bool sum_i = call.bias_size[2] == 1, sum_j = call.bias_size[3] == 1;
  const int height = call.bias_size[2], width = call.bias_size[3];
  float* to = call.dbias_parts +
              ((int64_t(split) * x.own_batch + own_b) * x.own_heads + own_h) * height * int64_t(width);
  if (sum_j) {  // each row's sum, into its first number
    for (int r = int(tid()); r < kBlockM; r += kThreads) {
      float sum = 0;
      for (int c = 0; c < kBlockN; ++c) sum += sums[r * (kBlockN + 1) + c];
      sums[r * (kBlockN + 1)] = sum;
    }
    sync_block();
  }
  const int columns = sum_j ? 1 : kBlockN;
  for (int n = int(tid()); n < (sum_i ? 1 : kBlockM) * columns; n += kThreads) {
    const int r = n / columns, c = n % columns;
    const int i = sum_i ? 0 : own_i * kBlockM + r, j = sum_j ? 0 : own_j * kBlockN + c;
    if (i >= height || j >= width) continue;
    float sum = sums[r * (kBlockN + 1) + c];
    if (sum_i)
      for (int k = 1; k < kBlockM; ++k) sum += sums[k * (kBlockN + 1) + c];
    to[int64_t(i) * width + j] = sum;
  }
}

constexpr int kSumThreads = 128;

FASTSEQ_KERNEL(kSumThreads, 1) bias_sum_kernel(FASTSEQ_IN_PLACE AttentionBackward call, int64_t size) {
  const int64_t n = int64_t(bid()) * kSumThreads + tid();
  if (n >= size) return;
  float sum = 0;
  for (int split = 0; split < call.bias_splits; ++split) sum += call.dbias_parts[split * size + n];
  put_number(call.dbias, call.bias_dtype, n, sum);
}

template <class Shape>
const char* launch_bias(const AttentionBackward& call, Stream stream) {
  const auto tiles = [](int size, int block) { return size == 1 ? 1 : (size + block - 1) / block; };
  Launch shape;
  shape.grid.x = unsigned(call.bias_size[0] * call.bias_size[1] * tiles(call.bias_size[2], Shape::kBlockM) *
                          tiles(call.bias_size[3], Shape::kBlockN) * call.bias_splits);
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  const char* error = launch(bias_kernel<Shape>, shape, stream, call);
  if (error != nullptr) return error;
  const int64_t size =
      int64_t(call.bias_size[0]) * call.bias_size[1] * call.bias_size[2] * int64_t(call.bias_size[3]);
  Launch sum;
  sum.grid.x = unsigned((size + kSumThreads - 1) / kSumThreads);
  sum.threads = kSumThreads;
  return launch(bias_sum_kernel, sum, stream, call, size);
}

}  // namespace attention

const char* attention_backward_bias(const AttentionBackward& call, const Place& place) {
  using namespace attention;
  const Stream stream = static_cast<Stream>(place.stream);
  return with_heads(call, [&](auto t, auto heads) {
    return launch_bias<BiasShape<decltype(t), decltype(heads)>>(call, stream);
  });
}

}  // namespace fastseq::cuda

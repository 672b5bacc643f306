// softmax(Q Kᵀ) V for a few queries against many keys, where reading K and V is all the work.
//
// The query heads that share a key head, times the queries, are the rows of a tile of 16, so each key is read once for
// all of them. The keys are cut into splits, a block each; in a block every warp has keys and buffers of its own and
// waits for nobody. What the warps found is merged in shared memory, and the splits' results in a second kernel:
//
//   o = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m),   m = max_s lse_s
//
// in the order of the splits; one that sees nothing changes no bit of the sum. Where a sequence is cut depends on what
// its own queries see, on `splits` and on split_keys alone.
#include "attention/cuda/epilogue.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/table.cuh"

namespace fastseq::cuda {
namespace attention {

// Row r of a tile is query r % Tq of query head r / Tq of the group.
struct DecodeRow {
  int h, i;
  FASTSEQ_DEVICE DecodeRow(const AttentionCall& call, int head_k, int r)
      : h(head_k * call.group + r / call.length_q), i(r % call.length_q) {}
};

// Keys [begin, end) of this block that any of its queries sees.
template <bool kGeneral>
FASTSEQ_DEVICE Range keys_of_split(const AttentionForward& call, const Sequence& own, int split, int block) {
  Range keys = keys_of<kGeneral>(call, own, 0, own.tq - 1, block);
  const int even = round_up((keys.end - keys.begin + call.splits - 1) / call.splits, kSplitUnit);
  const int share = at_least(call.split_keys, even);
  keys.begin += split * share;
  keys.end = at_most(keys.end, keys.begin + share);
  return keys;
}

// Scores of a tile whose rows are heads and queries: what add_pairs, hide and drop do for rows of one head.
template <bool kGeneral, int kN>
FASTSEQ_DEVICE void decode_scores(Fragment<1, kN>& s, const AttentionForward& call, const Sequence& own, int b,
                                  int head_k, int first_row, int rows, int j0, bool masked) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = at_most(first_row + int(lane() >> 2) + 8 * half, rows - 1);
    const DecodeRow row(call, head_k, r);
    const SeenKeys<kGeneral> seen(call, own, row.i);
    const float* slopes = static_cast<const float*>(call.alibi);
    const float slope = kGeneral && slopes != nullptr ? slopes[row.h] * kLog2e : 0.0f;
    const int64_t bias = int64_t(b) * call.bias.batch + int64_t(row.h) * call.bias.head + int64_t(row.i) * call.bias.row;
    const uint8_t* mask = static_cast<const uint8_t*>(call.mask.data);
    if (kGeneral && mask != nullptr)
      mask += int64_t(b) * call.mask.batch + int64_t(row.h) * call.mask.head + int64_t(row.i) * call.mask.row;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        const int j = j0 + 8 * n + 2 * int(lane() & 3) + (e & 1);
        float& x = s.x[0][n][e];
        const bool inside = row.i < own.tq && j < own.tk;
        if (kGeneral) {
          if (call.bias.data != nullptr && inside)
            x += kLog2e * number_at(call.bias.data, call.bias_dtype, bias + int64_t(j) * call.bias.step);
          const int distance = row.i + own.shift - j;
          if (call.alibi != nullptr) x -= slope * float(distance < 0 ? -distance : distance);
          if (mask != nullptr && inside && mask[int64_t(j) * call.mask.step] == 0) x = -kInfinity;
        }
        if (masked && seen.hides(j)) x = -kInfinity;
      }
  }
}

// Rows are of different heads here, so each lane draws the words of its own two pairs of keys.
template <int kN>
FASTSEQ_DEVICE void decode_drop(Fragment<1, kN>& p, const AttentionForward& call, int b, int head_k, int first_row,
                                int j0) {
  const uint64_t seed = uint64_t(*call.seed);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const DecodeRow row(call, head_k, first_row + int(lane() >> 2) + 8 * half);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int j = j0 + 8 * n + 2 * int(lane() & 3);
      uint32_t words[4] = {uint32_t(j) / 4, uint32_t(row.i), uint32_t(row.h), uint32_t(b)};
      philox(seed, words);
      if (pick(words, unsigned(j) & 3) < call.threshold) p.x[0][n][2 * half] = 0;
      if (pick(words, (unsigned(j) & 3) + 1) < call.threshold) p.x[0][n][2 * half + 1] = 0;
    }
  }
}

template <class Shape>
FASTSEQ_KERNEL(Shape::kThreads, Shape::kBlocks) decode_kernel(FASTSEQ_IN_PLACE AttentionForward call) {
  using T = typename Shape::T;
  constexpr int kBlockN = Shape::kBlockN, kStages = Shape::kStages, kWarps = Shape::kWarps;
  constexpr bool kGeneral = Shape::kGeneral;
  using TileQ = Tile<16, Shape::kDim>;
  using TileK = Tile<kBlockN, Shape::kDim>;
  using TileV = Tile<kBlockN, Shape::kDimV>;
  constexpr int kBuffer = TileK::kBytes + TileV::kBytes;

  const int split = int(bid()) % call.splits, head_k = int(bid()) / call.splits % call.heads_k;
  const int b = int(bid()) / call.splits / call.heads_k;
  const int rows = call.group * call.length_q, first_row = int(bid_y()) * 16;
  const Sequence own(call, b);
  const Range keys = keys_of_split<kGeneral>(call, own, split, kBlockN);
  unsigned char* q_tile = shared_memory();
  unsigned char* buffers = q_tile + TileQ::kBytes + warp() * kStages * kBuffer;

  // q: gathered by the elements' chunks, once.
  for (int n = int(tid()); n < 16 * TileQ::kChunks; n += Shape::kThreads) {
    const int r = n / TileQ::kChunks, chunk = n % TileQ::kChunks;
    T* to = reinterpret_cast<T*>(q_tile + TileQ::offset(r, chunk));
    const DecodeRow row(call, head_k, at_most(first_row + r, rows - 1));
    const bool real = first_row + r < rows && row.i < own.tq;
    const T* from = at<T>(call.q, b, row.h, row.i) + chunk * 8;
    for (int e = 0; e < 8; ++e) to[e] = real && chunk * 8 + e < call.dim ? from[e] : T{};
  }
  sync_block();

  const T* k_head = at<T>(call.k, b, head_k, 0);
  const T* v_head = at<T>(call.v, b, head_k, 0);
  const auto load = [&](int step) {  // this warp's tile number `step`
    const int j0 = keys.begin + (step * kWarps + int(warp())) * kBlockN;
    if (j0 < keys.end) {
      unsigned char* k_tile = buffers + step % kStages * kBuffer;
      load_tile<TileK, 32, kGeneral>(k_tile, k_head, call.k.row, j0, own.tk, call.dim, call.aligned, lane());
      load_tile<TileV, 32, kGeneral>(k_tile + TileK::kBytes, v_head, call.v.row, j0, own.tk, call.dim_v, call.aligned,
                                     lane());
    }
    cp_commit();
  };
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step);
  const auto q_reader = reader_of_a<TileQ>(q_tile, 0);
  Softmax<1> softmax(-kInfinity);
  Fragment<1, Shape::kDimV / 8> acc;
  acc.clear();
  for (int step = 0;; ++step) {
    const int j0 = keys.begin + (step * kWarps + int(warp())) * kBlockN;
    if (j0 >= keys.end) break;
    sync_warp();  // the buffer that is filled next is done with
    load(step + kStages - 1);
    cp_wait<kStages - 1>();
    sync_warp();
    const unsigned char* k_tile = buffers + step % kStages * kBuffer;
    Fragment<1, kBlockN / 8> s;
    product_of_rows<T>(s, q_reader, reader_of_rows<TileK>(k_tile));
    if (kGeneral) scale_and_cap(s, call);
    const bool masked = keys.masked(j0);
    if (kGeneral || masked) decode_scores<kGeneral>(s, call, own, b, head_k, first_row, rows, j0, masked);
    softmax.step(s, acc, kGeneral ? 1.0f : call.factor);
    if (kGeneral && call.seed != nullptr) decode_drop(s, call, b, head_k, first_row, j0);
    add_product<T>(acc, s, reader_of_columns<TileV>(k_tile + TileK::kBytes));
  }
  softmax.finish(acc, call.kept_scale, 0, 16);
  cp_wait<0>();

  // The warps' results, [kWarps, 16, kDimV] and [kWarps, 16], take the place of the tiles.
  sync_block();
  float* results = reinterpret_cast<float*>(shared_memory());
  float* logs = results + kWarps * 16 * Shape::kDimV;
  for_each_element<1, Shape::kDimV / 8>([&](int, int n, int e) {
    const int r = int(lane() >> 2) + 8 * (e >> 1), column = 8 * n + 2 * int(lane() & 3) + (e & 1);
    results[(int(warp()) * 16 + r) * Shape::kDimV + column] = acc.x[0][n][e];
    if (n == 0 && e % 2 == 0 && (lane() & 3) == 0) logs[int(warp()) * 16 + r] = softmax.l[0][e >> 1];
  });
  sync_block();
  for (int n = int(tid()); n < 16 * Shape::kDimV; n += Shape::kThreads) {
    const int r = n / Shape::kDimV, column = n % Shape::kDimV;
    if (first_row + r >= rows || column >= call.dim_v) continue;
    float m = -kInfinity, sum = 0, weights = 0;
    for (int w = 0; w < kWarps; ++w) m = max_(m, logs[w * 16 + r]);
    const float base = m == -kInfinity ? 0.0f : m;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = ex2(logs[w * 16 + r] - base);
      weights += weight, sum += weight * results[(w * 16 + r) * Shape::kDimV + column];
    }
    const DecodeRow row(call, head_k, first_row + r);
    const int64_t place = ((int64_t(b) * call.heads_q + row.h) * call.length_q + row.i) * call.splits + split;
    call.o_split[place * call.dim_v + column] = weights == 0 ? 0.0f : sum / weights;
    if (column == 0) call.lse_split[place] = weights == 0 ? -kInfinity : m + lg2(weights);
  }
}

constexpr int kMergeThreads = 128;

// A warp merges one row's splits and the sink.
template <class T>
FASTSEQ_KERNEL(kMergeThreads, 1) merge_kernel(FASTSEQ_IN_PLACE AttentionForward call) {
  const int64_t row = int64_t(bid()) * (kMergeThreads / 32) + warp();
  if (row >= int64_t(call.batch) * call.heads_q * call.length_q) return;
  const int i = int(row % call.length_q), h = int(row / call.length_q % call.heads_q);
  const int b = int(row / call.length_q / call.heads_q);
  const Sequence own(call, b);
  const float* logs = call.lse_split + row * call.splits;
  const float sink =
      call.sinks != nullptr && i < own.tq ? number_at(call.sinks, call.sinks_dtype, h) * kLog2e : -kInfinity;
  float m = sink;
  for (int s = int(lane()); s < call.splits; s += 32) m = max_(m, logs[s]);
  for (unsigned mask = 1; mask < 32; mask *= 2) m = max_(m, shfl_xor(m, mask));
  const float base = m == -kInfinity ? 0.0f : m;
  float weights = ex2(sink - base);
  for (int s = 0; s < call.splits; ++s) weights += ex2(logs[s] - base);
  const bool empty = weights == 0 || i >= own.tq;
  T* o = at<T>(call.o, b, h, i);
  for (int column = int(lane()); column < call.dim_v; column += 32) {
    float sum = 0;
    for (int s = 0; s < call.splits; ++s)
      sum += ex2(logs[s] - base) * call.o_split[(row * call.splits + s) * call.dim_v + column];
    o[column] = from_float<T>(empty ? 0.0f : sum / weights);
  }
  if (lane() == 0) *at<float>(call.lse, b, h, i) = empty ? -kInfinity : (m + lg2(weights)) * kLn2;
}

template <class Shape>
const char* launch_decode(const AttentionForward& call, Stream stream) {
  Launch shape;
  shape.grid.x = unsigned(call.batch * call.heads_k * call.splits);
  shape.grid.y = unsigned((call.group * call.length_q + 15) / 16);
  shape.threads = Shape::kThreads;
  shape.shared = Shape::kShared;
  const char* error = launch(decode_kernel<Shape>, shape, stream, call);
  if (error != nullptr) return error;
  const int64_t rows = int64_t(call.batch) * call.heads_q * call.length_q;
  Launch merge;
  merge.grid.x = unsigned((rows + kMergeThreads / 32 - 1) / (kMergeThreads / 32));
  merge.threads = kMergeThreads;
  return launch(merge_kernel<typename Shape::T>, merge, stream, call);
}

}  // namespace attention

const char* read_device(Place& place) {
  DeviceLimits limits{};
  const char* error = device_limits(limits);
  if (error == nullptr) {
    place.multiprocessors = limits.multiprocessors;
    place.capability = 10 * limits.major + limits.minor;
  }
  return error;
}

const char* attention_decode(const AttentionForward& call, const Place& place) {
  using namespace attention;
  if (call.batch == 0 || call.heads_q == 0 || call.length_q == 0) return nullptr;
  const Stream stream = static_cast<Stream>(place.stream);
  return with_heads(call, [&](auto t, auto heads) {
    using T = decltype(t);
    using H = decltype(heads);
    return is_general(call) ? launch_decode<DecodeShape<T, H, true>>(call, stream)
                            : launch_decode<DecodeShape<T, H, false>>(call, stream);
  });
}

}  // namespace fastseq::cuda

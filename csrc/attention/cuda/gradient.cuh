// What attention's backward kernels share.
//
//   p[i,j] = share 2^(s[i,j] - lse[i]);  dp[i,j] = do[i]·v[j];  delta[i] = do[i]·o[i] - dlse[i];  ds = p (dp - delta)
//   dv[j] = sum_i p do[i];  dk[j] = scale sum_i ds q[i];  dq[i] = scale sum_j ds k[j];  dbias = ds
//   dsink = - sum_i share exp(sink - lse[i]) delta[i]
//
// Without rounding, share is 1. But beside a bias like finfo.min lse holds no logarithm of a sum, and o is rounded to 16
// bits, which makes delta wrong. The kernel that makes dq meets all keys of its rows, and so it runs first: share (in the
// general class) and delta come from sums over these keys (`settle`). What is made after it uses both. dq has been summed
// with the wrong delta by then, and from rounded ds, so that what all keys have in common has been multiplied by a sum of
// ds that is wrong by `left`:
//
//   dq[i] = scale share (sum_j ds k[j] - left[i] mean[i])
//
// The exact mean is that of the keys by p (under a cap, by p times its slope). That of one tile has the same offset, and
// the row's p of that tile keep hidden keys out of it: so one tile is met again, and, where `left` is large beside the root
// of the sum of the rows' ds^2, as values with an offset make it, all of them (`start_taking_back`).
//
// With dropout p reaches o as keep p / (1 - rate), so dv and dp take it so; delta needs no change. Under a cap, ds is
// multiplied by the cap's slope before it reaches q and k. A row that sees nothing has an lse of -inf: it is read as
// +inf, which makes its p, and with delta = 0 all its gradients, 0.
#pragma once
#include "attention/cuda/epilogue.cuh"
#include "attention/cuda/softmax.cuh"
#include "attention/cuda/table.cuh"

namespace fastseq::cuda::attention {

// Where the scratch of a head's rows begins: each sequence at a multiple of kRowBlock, so that a tile of it needs no mask.
FASTSEQ_DEVICE int64_t scratch_of(const AttentionBackward& call, const Sequence& own, int b, int h) {
  if (call.cu_q == nullptr) return (int64_t(b) * call.heads_q + h) * call.rows;
  return int64_t(h) * call.rows + int64_t(own.q_row / kRowBlock + b) * kRowBlock;
}

// s: products to p. `slope`: what the cap makes of a gradient, if there is a cap. log_of(m, n, e): lse of the element's
// row, in units of log 2.
template <bool kKeysFirst, bool kGeneral, int kM, int kN, class LogOf>
FASTSEQ_DEVICE void probabilities(Fragment<kM, kN>& s, Fragment<kM, kN>& slope, const AttentionCall& call,
                                  const Sequence& own, const Corner& corner, bool masked, const LogOf& log_of) {
  if (kGeneral) {
    scale_and_cap(s, call);
    if (call.cap_out != 0)
      for_each_element<kM, kN>([&](int m, int n, int e) { slope.x[m][n][e] = cap_slope(s.x[m][n][e], call); });
    add_pairs<kKeysFirst>(s, call, own, corner);
  }
  if (masked) hide<kKeysFirst, kGeneral>(s, call, own, corner);
  const float factor = kGeneral ? 1.0f : call.factor;
  for_each_element<kM, kN>([&](int m, int n, int e) { s.x[m][n][e] = ex2(s.x[m][n][e] * factor - log_of(m, n, e)); });
}

// dp becomes ds, without the cap's slope; s, which is p, becomes what reaches o.
template <bool kKeysFirst, bool kGeneral, int kM, int kN, class DeltaOf>
FASTSEQ_DEVICE void score_gradients(Fragment<kM, kN>& s, Fragment<kM, kN>& dp, const AttentionCall& call,
                                    const Corner& corner, const DeltaOf& delta_of) {
  if (kGeneral && call.seed != nullptr) {
    const uint64_t seed = uint64_t(*call.seed);
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint32_t bits = kept<kKeysFirst>(call, seed, corner, m, n);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float keep = bits >> e & 1 ? call.kept_scale : 0.0f;
          dp.x[m][n][e] = s.x[m][n][e] * ((keep != 0 ? dp.x[m][n][e] * keep : 0.0f) - delta_of(m, n, e));
          s.x[m][n][e] *= keep;
        }
      }
  } else {
    for_each_element<kM, kN>(
        [&](int m, int n, int e) { dp.x[m][n][e] = s.x[m][n][e] * (dp.x[m][n][e] - delta_of(m, n, e)); });
  }
}

template <bool kGeneral, int kM, int kN>
FASTSEQ_DEVICE void through_cap(Fragment<kM, kN>& ds, const Fragment<kM, kN>& slope, const AttentionCall& call) {
  if (kGeneral && call.cap_out != 0)
    for_each_element<kM, kN>([&](int m, int n, int e) { ds.x[m][n][e] *= slope.x[m][n][e]; });
}

// What a lane has met of its two rows' keys.
template <bool kGeneral>
struct RowSums {
  float p[2] = {0, 0};        // kGeneral
  float sloped[2] = {0, 0};   // kGeneral, under a cap: p by the cap's slope
  float ds[2] = {0, 0};       // without the slope; kGeneral, or with sinks
  float rounded[2] = {0, 0};  // ds as the product of dq reads it; under a cap less ds with the slope
  float squares[kGeneral ? 1 : 2] = {};  // of ds with the slope, of one in four columns; kGeneral, of both rows

  // The sums in shared memory, each `step` numbers from the one before: where a loop has no registers for them.
  template <class Each>
  FASTSEQ_DEVICE void for_each(const Each& each) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      each(0 + half, p[half]), each(2 + half, sloped[half]), each(4 + half, ds[half]), each(6 + half, rounded[half]);
    each(8, squares[0]);
  }
  FASTSEQ_DEVICE void write(float* to, int step) {
    for_each([&](int n, float& x) { to[n * step] = x; });
  }
  FASTSEQ_DEVICE void add_to(float* to, int step) {
    for_each([&](int n, float& x) { to[n * step] += x; });
  }
  FASTSEQ_DEVICE void read(const float* from, int step) {
    for_each([&](int n, float& x) { x = from[n * step]; });
  }

  // p before dropout.
  template <int kN>
  FASTSEQ_DEVICE void add_p(const Fragment<1, kN>& s, const Fragment<1, kN>& slope, const AttentionCall& call) {
    if (!kGeneral) return;
    for_each_element<1, kN>([&](int m, int n, int e) { p[e >> 1] += s.x[m][n][e]; });
    if (call.cap_out != 0)
      for_each_element<1, kN>([&](int m, int n, int e) { sloped[e >> 1] += s.x[m][n][e] * slope.x[m][n][e]; });
  }
  template <int kN>
  FASTSEQ_DEVICE void add_ds(const Fragment<1, kN>& x, const AttentionCall& call) {
    if (kGeneral || call.sinks != nullptr)
      for_each_element<1, kN>([&](int m, int n, int e) { ds[e >> 1] += x.x[m][n][e]; });
  }
  // ds with the slope, to be rounded.
  template <int kN>
  FASTSEQ_DEVICE void add_sloped(const Fragment<1, kN>& x, const AttentionCall& call) {
#pragma unroll
    for (int n = 0; n < kN; n += 4)
#pragma unroll
      for (int e = 0; e < 4; ++e) squares[kGeneral ? 0 : e >> 1] += x.x[0][n][e] * x.x[0][n][e];
    if (kGeneral && call.cap_out != 0)
      for_each_element<1, kN>([&](int m, int n, int e) { rounded[e >> 1] -= x.x[m][n][e]; });
  }
  // ds as an A operand: its registers are rows g, g + 8, g, g + 8.
  template <class T>
  FASTSEQ_DEVICE void add_rounded(const uint32_t (&a)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 pair = unpack2<T>(a[r]);
      rounded[r % 2] += pair.x;
      rounded[r % 2] += pair.y;
    }
  }
};

// What a block knows of a row in the end. `total` is the sum of the weights whose mean `left` multiplies.
struct Settled {
  float share, delta, left, total, squares;
};

// All lanes: what the sums of row i, with its log and delta, say. All of dp - delta, by p, is dlse, with a sink's own p in
// both sums.
template <bool kGeneral>
FASTSEQ_DEVICE Settled settle(const RowSums<kGeneral>& sums, int half, const AttentionBackward& call, const Sequence& own,
                              const Slot& slot, int i, float log, float delta) {
  const bool empty = log == kInfinity;
  const float of_sink =
      call.sinks == nullptr ? 0.0f : ex2(number_at(call.sinks, call.sinks_dtype, slot.h) * kLog2e - log);
  const float dlse =
      call.dlse.data == nullptr || empty ? 0.0f : at<float>(call.dlse, slot.b, slot.h, own.q_row)[i];
  const float rounded = sum_of_row(sums.rounded[half]);
  const float p = kGeneral ? sum_of_row(sums.p[half]) : 1.0f - of_sink;
  const float ds = kGeneral || call.sinks != nullptr ? sum_of_row(sums.ds[half]) : rounded;
  const float share = !kGeneral ? 1.0f : p + of_sink == 0 ? 0.0f : 1.0f / (p + of_sink);
  const float wrong = (ds - of_sink * delta) * share - dlse;
  const bool capped = kGeneral && call.cap_out != 0;
  const float total = capped ? sum_of_row(sums.sloped[half]) : p;
  const float left = rounded - (capped ? 0.0f : ds) + wrong * total;
  const float squares = sum_of_row(sums.squares[kGeneral ? 0 : half]);
  return {share, delta + wrong, empty ? 0.0f : left, total, empty ? 0.0f : squares};
}

// Where all keys are to be met again. Each warp writes the largest `left` and `squares` of its rows, squared both; all
// decide alike by those of the block. The limit on the root is about 6 roundings of T: where values have no offset, left
// is far below; beyond it, what a tile's mean differs by from that of all keys comes near the bound on dq's error.
FASTSEQ_DEVICE void write_largest(float2* of_warps, const Settled (&rows)[2]) {
  float2 largest = make_float2(max_(rows[0].left * rows[0].left, rows[1].left * rows[1].left),
                               max_(rows[0].squares, rows[1].squares));
  for (unsigned mask = 4; mask < 32; mask *= 2) {
    largest.x = max_(largest.x, shfl_xor(largest.x, mask));
    largest.y = max_(largest.y, shfl_xor(largest.y, mask));
  }
  if (lane() == 0) of_warps[warp()] = largest;
}
template <class T, int kWarps>
FASTSEQ_DEVICE bool everywhere_again(const float2* of_warps) {
  float2 largest = make_float2(0, 0);
  for (int n = 0; n < kWarps; ++n)
    largest = make_float2(max_(largest.x, of_warps[n].x), max_(largest.y, of_warps[n].y));
  return largest.x > (std::is_same<T, Bf16>::value ? 0x1p-7f : 0x1p-13f) * largest.y;
}

// Makes s, a row's weights of a tile, what takes `left` times the mean of keys by them back from x in a product: of all
// tiles if `everywhere`, else of this one, after which nothing is left; but a row may have no p there. x is in units of the
// result, which that product's sum is multiplied by: left by p may be too small for float16.
template <int kN, int kD>
FASTSEQ_DEVICE void start_taking_back(Fragment<1, kN>& s, Fragment<1, kD>& x, int half, Settled& row, bool everywhere,
                                      float& unit) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n) sum += s.x[0][n][2 * half] + s.x[0][n][2 * half + 1];
  sum = everywhere ? row.total : sum_of_row(sum);
  const bool seen = sum > 1e-30f, real = seen && (row.left > 1e-30f || row.left < -1e-30f);
  const float factor = real ? -1.0f / sum : 0.0f, inverse = real ? 1.0f / row.left : 1.0f;
  unit = real ? row.left : 1.0f;
  if (seen && !everywhere) row.left = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) s.x[0][n][e] = real ? s.x[0][n][e] * factor : 0.0f;
#pragma unroll
  for (int n = 0; n < kD; ++n)
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) x.x[0][n][e] *= inverse;
}
template <int kD>
FASTSEQ_DEVICE void multiply_rows_by(Fragment<1, kD>& x, const float (&factor)[2]) {
  for_each_element<1, kD>([&](int m, int n, int e) { x.x[m][n][e] *= factor[e >> 1]; });
}

// Multiplies by the scale, and zeroes rows from `end` on, counted from `first`: whatever a row past its length took in.
template <int kM, int kN>
FASTSEQ_DEVICE void scale_rows(Fragment<kM, kN>& x, float scale, int first, int end) {
  for_each_element<kM, kN>([&](int m, int n, int e) {
    const bool real = first + 16 * m + int(lane() >> 2) + 8 * (e >> 1) < end;
    x.x[m][n][e] = real ? x.x[m][n][e] * scale : 0.0f;
  });
}

}  // namespace fastseq::cuda::attention

namespace fastseq::cuda {

// The parts of attention_backward; each null, or why its launch failed.
const char* attention_backward_rows(const AttentionBackward& call, const Place& place);
const char* attention_backward_sinks(const AttentionBackward& call, const Place& place);
const char* attention_backward_keys(const AttentionBackward& call, const Place& place);
const char* attention_backward_queries(const AttentionBackward& call, const Place& place);
const char* attention_backward_bias(const AttentionBackward& call, const Place& place);
// Those of keys or of queries, for calls that hopper_refusal leaves to it.
const char* attention_hopper_backward(const AttentionBackward& call, const Place& place, bool of_keys);

}  // namespace fastseq::cuda

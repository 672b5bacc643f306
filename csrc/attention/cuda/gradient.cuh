// What attention's backward kernels share.
//
//   p[i,j] = 2^(s[i,j] - lse[i]);  dp[i,j] = do[i]·v[j];  delta[i] = do[i]·o[i] - dlse[i];  ds = p (dp - delta)
//   dv[j] = sum_i p do[i];  dk[j] = scale sum_i ds q[i];  dq[i] = scale sum_j ds k[j];  dbias = ds
//   dsink = - sum_i exp(sink - lse[i]) delta[i]
//
// With dropout p reaches o as keep p / (1 - rate), so dv and dp take it so; delta needs no change. Under a cap, ds is
// multiplied by the cap's slope before it reaches q and k. A row that sees nothing has an lse of -inf: it is read as
// +inf, which makes its p, and with delta = 0 all its gradients, 0.
#pragma once
#include "attention/cuda/epilogue.cuh"
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
  if (masked) hide<kKeysFirst>(s, call, own, corner);
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
const char* attention_backward_keys(const AttentionBackward& call, const Place& place);
const char* attention_backward_queries(const AttentionBackward& call, const Place& place);
const char* attention_backward_bias(const AttentionBackward& call, const Place& place);
// Those of keys or of queries, for calls that hopper_refusal leaves to it.
const char* attention_hopper_backward(const AttentionBackward& call, const Place& place, bool of_keys);

}  // namespace fastseq::cuda

// The running softmax of a block of rows, each spread over four lanes.
//
//   m' = max(m, max_j s[j]);  a = 2^(m - m');  p[j] = 2^(s[j] - m');  l' = a l + sum_j p[j];  acc' = a acc
//
// m is the same in the four lanes of a row, l only sums their own columns until `finish`. A row that has seen nothing
// has m = -inf and is taken from base 0, so that its p are 0.
#pragma once
#include "attention/cuda/mask.cuh"

namespace fastseq::cuda::attention {

FASTSEQ_DEVICE float max_of_row(float x) {
  x = max_(x, shfl_xor(x, 1));
  return max_(x, shfl_xor(x, 2));
}
FASTSEQ_DEVICE float sum_of_row(float x) {
  x += shfl_xor(x, 1);
  return x + shfl_xor(x, 2);
}

template <int kM>
struct Softmax {
  float m[kM][2], l[kM][2];

  // `sink`, in units of log 2, is a key of value 0 met before all others; -inf where there is none.
  FASTSEQ_DEVICE explicit Softmax(float sink) {
    const float first = sink == -kInfinity || (lane() & 3) != 0 ? 0.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) m[i][half] = sink, l[i][half] = first;
  }

  // Turns a row of s, which times `factor` > 0 is in units of log 2, into p; returns a.
  template <int kN>
  FASTSEQ_DEVICE float weigh(int i, int half, Fragment<kM, kN>& s, float factor) {
    const int e0 = 2 * half, e1 = e0 + 1;
    float largest = max_(s.x[i][0][e0], s.x[i][0][e1]);
#pragma unroll
    for (int n = 1; n < kN; ++n) largest = max_(largest, max_(s.x[i][n][e0], s.x[i][n][e1]));
    const float m_new = max_(m[i][half], max_of_row(largest) * factor);
    const float base = m_new == -kInfinity ? 0.0f : m_new;
    const float a = ex2(m[i][half] - base);
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      s.x[i][n][e0] = ex2(s.x[i][n][e0] * factor - base);
      s.x[i][n][e1] = ex2(s.x[i][n][e1] * factor - base);
      sum += s.x[i][n][e0] + s.x[i][n][e1];
    }
    l[i][half] = l[i][half] * a + sum;
    m[i][half] = m_new;
    return a;
  }
  // A row of acc times a.
  template <int kNV>
  FASTSEQ_DEVICE static void rescale(int i, int half, Fragment<kM, kNV>& acc, float a) {
#pragma unroll
    for (int n = 0; n < kNV; ++n) acc.x[i][n][2 * half] *= a, acc.x[i][n][2 * half + 1] *= a;
  }
  // Both, of every row.
  template <int kN, int kNV>
  FASTSEQ_DEVICE void step(Fragment<kM, kN>& s, Fragment<kM, kNV>& acc, float factor) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) rescale(i, half, acc, weigh(i, half, s, factor));
  }

  // Divides acc by the whole sums (and multiplies by kept_scale); l becomes lse in units of log 2, -inf in an empty row,
  // whose acc becomes 0. Rows are counted from `first`; those from `end` on are empty.
  template <int kNV>
  FASTSEQ_DEVICE void finish(Fragment<kM, kNV>& acc, float kept_scale, int first, int end) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_of_row(l[i][half]);
        const bool empty = sum == 0.0f || first + 16 * i + int(lane() >> 2) + 8 * half >= end;
        const float share = empty ? 0.0f : kept_scale / sum;
        l[i][half] = empty ? -kInfinity : m[i][half] + lg2(sum);
#pragma unroll
        for (int n = 0; n < kNV; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) acc.x[i][n][e] = empty ? 0.0f : acc.x[i][n][e] * share;
      }
  }
};

}  // namespace fastseq::cuda::attention

// Scores from products: scale, cap, bias, slopes, limits, mask; and which weights dropout keeps.
//
// Scores are kept in units of log 2, so that exp is one ex2. A tile of them is a fragment whose rows are queries and whose
// columns are keys, or, transposed (kKeysFirst), the other way around.
#pragma once
#include "attention/cuda/schedule.cuh"
#include "attention/cuda/tile.cuh"

namespace fastseq::cuda::attention {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();

// Where a fragment of scores lies: its head, and the query and key of its element (0, 0) in lane 0.
struct Corner {
  int b, h, i0, j0;
};

template <bool kKeysFirst>
struct Element {
  int i, j;
  FASTSEQ_DEVICE Element(const Corner& c, int m, int n, int e) {
    const int row = 16 * m + int(lane() >> 2) + 8 * (e >> 1), column = 8 * n + 2 * int(lane() & 3) + (e & 1);
    i = c.i0 + (kKeysFirst ? column : row);
    j = c.j0 + (kKeysFirst ? row : column);
  }
};

template <int kM, int kN, class Each>
FASTSEQ_DEVICE void for_each_element(const Each& each) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) each(m, n, e);
}

// tanh to 1e-7 absolutely.
FASTSEQ_DEVICE float tanh_of(float x) { return 1.0f - 2.0f / (1.0f + ex2(x * (2.0f * kLog2e))); }

FASTSEQ_DEVICE float number_at(const void* data, Dtype type, int64_t index) {
  if (type == Dtype::f32) return static_cast<const float*>(data)[index];
  if (type == Dtype::bf16) return to_float(static_cast<const Bf16*>(data)[index]);
  return to_float(static_cast<const Fp16*>(data)[index]);
}
FASTSEQ_DEVICE void put_number(void* data, Dtype type, int64_t index, float x) {
  if (type == Dtype::f32)
    static_cast<float*>(data)[index] = x;
  else if (type == Dtype::bf16)
    static_cast<Bf16*>(data)[index] = from_float<Bf16>(x);
  else
    static_cast<Fp16*>(data)[index] = from_float<Fp16>(x);
}

// Products to scores, all but bias, slopes and what hides: scaled and capped.
template <int kM, int kN>
FASTSEQ_DEVICE void scale_and_cap(Fragment<kM, kN>& s, const AttentionCall& call) {
  if (call.cap_out != 0) {
    for_each_element<kM, kN>([&](int m, int n, int e) { s.x[m][n][e] = tanh_of(s.x[m][n][e] * call.cap_in) * call.cap_out; });
  } else {
    for_each_element<kM, kN>([&](int m, int n, int e) { s.x[m][n][e] *= call.factor; });
  }
}
// What the cap makes of a gradient, from the capped score: 1 - tanh².
FASTSEQ_DEVICE float cap_slope(float score, const AttentionCall& call) {
  const float t = score / call.cap_out;
  return 1.0f - t * t;
}

// Adds bias and slopes, and hides what the mask hides. Pairs past a length are left as they are.
template <bool kKeysFirst, int kM, int kN>
FASTSEQ_DEVICE void add_pairs(Fragment<kM, kN>& s, const AttentionCall& call, const Sequence& own, const Corner& c) {
  if (call.bias.data != nullptr) {
    const int64_t base = int64_t(c.b) * call.bias.batch + int64_t(c.h) * call.bias.head;
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const Element<kKeysFirst> at(c, m, n, e);
      if (at.i < own.tq && at.j < own.tk)
        s.x[m][n][e] += kLog2e * number_at(call.bias.data, call.bias_dtype,
                                           base + int64_t(at.i) * call.bias.row + int64_t(at.j) * call.bias.step);
    });
  }
  if (call.alibi != nullptr) {
    const float slope = static_cast<const float*>(call.alibi)[c.h] * kLog2e;
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const Element<kKeysFirst> at(c, m, n, e);
      const int distance = at.i + own.shift - at.j;
      s.x[m][n][e] -= slope * float(distance < 0 ? -distance : distance);
    });
  }
  if (call.mask.data != nullptr) {
    const uint8_t* mask = static_cast<const uint8_t*>(call.mask.data) + int64_t(c.b) * call.mask.batch +
                          int64_t(c.h) * call.mask.head;
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const Element<kKeysFirst> at(c, m, n, e);
      if (at.i < own.tq && at.j < own.tk && mask[int64_t(at.i) * call.mask.row + int64_t(at.j) * call.mask.step] == 0)
        s.x[m][n][e] = -kInfinity;
    });
  }
}

// Hides the pairs outside the limits of causality, window and lengths.
template <bool kKeysFirst, bool kGeneral, int kM, int kN>
FASTSEQ_DEVICE void hide(Fragment<kM, kN>& s, const AttentionCall& call, const Sequence& own, const Corner& c) {
  if (kKeysFirst) {  // by its row of keys; queries past the last have an lse of +inf and keys past it rows of their own
    for_each_element<kM, kN>([&](int m, int n, int e) {
      const Element<kKeysFirst> at(c, m, n, e);
      if (hides<kGeneral>(call, own, at.i, at.j)) s.x[m][n][e] = -kInfinity;
    });
  } else {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SeenKeys<kGeneral> seen(call, own, Element<false>(c, m, 0, 2 * half).i);
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            if (seen.hides(Element<false>(c, m, n, e).j)) s.x[m][n][e] = -kInfinity;
          }
      }
  }
}

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
FASTSEQ_DEVICE void philox(uint64_t seed, uint32_t (&c)[4]) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll 1
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c[1] ^ k0, n2 = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[0] = n0, c[1] = uint32_t(p1), c[2] = n2, c[3] = uint32_t(p0);
  }
}
FASTSEQ_DEVICE uint32_t pick(const uint32_t (&x)[4], unsigned i) {
  return i < 2 ? (i == 0 ? x[0] : x[1]) : (i == 2 ? x[2] : x[3]);
}

// Bit e: whether dropout keeps element e of product (m, n). The words of counter (j / 4, i, h, b) serve four keys; each
// lane draws one counter and the lanes that hold those keys exchange words.
template <bool kKeysFirst>
FASTSEQ_DEVICE uint32_t kept(const AttentionCall& call, uint64_t seed, const Corner& c, int m, int n) {
  uint32_t bits = 0;
  if (kKeysFirst) {  // the four lanes whose keys share a counter: g = 0..3 mod 4; lane r draws for element r
    const unsigned r = (lane() >> 2) & 3;
    const int row = 16 * m + int(lane() >> 2) + 8 * int(r >> 1);
    uint32_t words[4] = {uint32_t(c.j0 + row) / 4, uint32_t(c.i0 + 8 * n + 2 * int(lane() & 3) + int(r & 1)),
                         uint32_t(c.h), uint32_t(c.b)};
    philox(seed, words);
#pragma unroll
    for (unsigned k = 0; k < 4; ++k) {
      const uint32_t word = shfl_xor(pick(words, r ^ k), k << 2);
      bits |= uint32_t(word >= call.threshold) << (r ^ k);
    }
  } else {  // lanes t and t ^ 1 share counters: the even one draws for the upper row, the odd one for the lower
    const unsigned r = lane() & 1;
    const int row = 16 * m + int(lane() >> 2) + 8 * int(r);
    uint32_t words[4] = {uint32_t(c.j0 + 8 * n + 2 * int(lane() & 3)) / 4, uint32_t(c.i0 + row), uint32_t(c.h),
                         uint32_t(c.b)};
    philox(seed, words);
#pragma unroll
    for (unsigned k = 0; k < 2; ++k) {
      const unsigned to = r ^ k, row_of = r ^ k;  // to whom the words go; whose row has come
      const uint32_t first = shfl_xor(pick(words, 2 * to), k), second = shfl_xor(pick(words, 2 * to + 1), k);
      bits |= uint32_t(first >= call.threshold) << (2 * row_of) | uint32_t(second >= call.threshold) << (2 * row_of + 1);
    }
  }
  return bits;
}

// x = keep ? factor * x : 0 with dropout's bits of a tile.
template <bool kKeysFirst, int kM, int kN>
FASTSEQ_DEVICE void drop(Fragment<kM, kN>& x, const AttentionCall& call, const Corner& c, float factor) {
  const uint64_t seed = uint64_t(*call.seed);
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t bits = kept<kKeysFirst>(call, seed, c, m, n);
#pragma unroll
      for (int e = 0; e < 4; ++e) x.x[m][n][e] = bits >> e & 1 ? x.x[m][n][e] * factor : 0.0f;
    }
}

}  // namespace fastseq::cuda::attention

// softmax(Q Kᵀ) V on the CPU, tiled, forward and backward: plain structs in, plain arrays out, nothing of torch.
//
//   s[i,j] = scale * q[i]·k[j];  softcap * tanh(s / softcap);  + bias[i,j];  - alibi * |i + shift - j|
//   lse[i] = log( sum over visible j of exp s[i,j]  +  exp sink )
//   o[i]   = sum over visible j of  exp(s[i,j] - lse[i]) v[j]
//
// with shift = 0, or tk - tq of each sequence where bottom_right. The matrix of scores is never stored. Results do not
// depend on chance: no sum is shared between threads but in a fixed order.
#pragma once
#include <cstdint>

#include "core/isa.h"

namespace fastseq {

struct AttentionCall {
  enum class Dtype : int { f64, f32, bf16, f16 };

  // Rows of D elements, unit stride inside a row; strides in elements. Packed batches have no batch stride: sequence b
  // begins at row cu_seqlens[b].
  struct View {
    void* data = nullptr;
    long batch = 0, head = 0, row = 0;
  };
  // [B,Hq,Tq,Tk] by strides, 0 where it is broadcast.
  struct Scores {
    const void* data = nullptr;
    long stride[4] = {};
  };

  Dtype dtype, bias_dtype = Dtype::f32, sinks_dtype = Dtype::f32, alibi_dtype = Dtype::f32;
  long batch, heads_q, heads_k;
  long length_q, length_k;  // of every sequence; packed: of the longest
  long dim, dim_v;
  View q, k, v;
  const int32_t *cu_q = nullptr, *cu_k = nullptr;          // [B+1]: packed
  const int64_t *lengths_q = nullptr, *lengths_k = nullptr;  // [B]
  Scores bias;                                             // bias_dtype
  Scores mask;                                             // bytes, not 0: may look
  const void* sinks = nullptr;                             // sinks_dtype [Hq]
  const void* alibi = nullptr;                             // alibi_dtype [Hq]: float, or double with dtype f64
  double scale, softcap = 0, dropout_p = 0;
  uint64_t seed = 0;
  bool causal = false, bottom_right = true;
  long window_left = -1, window_right = -1;
  int threads = 1;
};

struct AttentionForward : AttentionCall {
  View o;    // dtype
  View lse;  // float (double for f64), row stride 1
};

struct AttentionBackward : AttentionCall {
  View o, d_o;     // dtype
  View lse, dlse;  // float (double for f64); dlse may be absent
  View dq, dk, dv;  // dtype
  void* dbias = nullptr;  // bias_dtype, contiguous, of the bias's own sizes
  long bias_size[4] = {};
  void* rows = nullptr;  // with dbias: room for two numbers (float, double for f64) a row [B,Hq,Tq,2], which the pass over
                         // dq, dk and dv leaves for that over dbias
  void* dsinks = nullptr;  // sinks_dtype [Hq]
};

// All three return false where there was no memory for their scratch, which is linear in the lengths.
FASTSEQ_DECLARE(bool, attention_forward, (const AttentionForward& call))
FASTSEQ_DECLARE(bool, attention_backward, (const AttentionBackward& call))
// Forward for a few queries against many keys (length_q <= kDecodeQueries), where reading K and V is all the work.
FASTSEQ_DECLARE(bool, attention_decode, (const AttentionForward& call))
// The part of the backward that fills dbias.
FASTSEQ_DECLARE(bool, attention_bias_gradient, (const AttentionBackward& call))

constexpr long kDecodeQueries = 8;

// Of the threads there are, those worth asking: a call of a few microseconds is over before a second one has begun.
inline int worth_asking(const AttentionCall& call, int threads) {
  const long products = call.batch * call.heads_q * call.length_q * call.length_k * (call.dim + call.dim_v);
  return products < (1 << 16) ? 1 : threads;
}

inline bool run_attention(const AttentionForward& call) {
  return call.length_q <= kDecodeQueries ? FASTSEQ_DISPATCH(attention_decode, call)
                                         : FASTSEQ_DISPATCH(attention_forward, call);
}

}  // namespace fastseq

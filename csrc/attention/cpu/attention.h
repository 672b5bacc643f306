// softmax(Q Kᵀ) V on the CPU, tiled, forward and backward: plain structs in, plain arrays out, nothing of torch.
// The matrix of scores is never stored. Results do not depend on chance: no sum is shared between threads but in a fixed
// order.
#pragma once
#include <cstdint>

#include "attention/call.h"
#include "core/isa.h"

namespace fastseq {

struct AttentionCall : AttentionArguments<int64_t> {
  int threads = 1;
  bool deterministic = false;  // the order of every sum depends on the sequence alone, also of dq
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
  int64_t bias_size[4] = {};
  void* rows = nullptr;  // with dbias: room for two numbers (float, double for f64) a row [B,Hq,Tq,2], which the pass over
                         // dq, dk and dv leaves for that over dbias
  void* dsinks = nullptr;  // sinks_dtype [Hq]
};

// All return false where there was no memory for their scratch, which is linear in the lengths. Of the two forward, each
// takes its sequences of the batch and leaves the others: a sequence's result is the same whatever is beside it.
FASTSEQ_DECLARE(bool, attention_forward, (const AttentionForward& call))
FASTSEQ_DECLARE(bool, attention_backward, (const AttentionBackward& call))
// Forward of sequences of up to kDecodeQueries queries, where reading K and V is all the work.
FASTSEQ_DECLARE(bool, attention_decode, (const AttentionForward& call))
// The part of the backward that fills dbias.
FASTSEQ_DECLARE(bool, attention_bias_gradient, (const AttentionBackward& call))

constexpr long kDecodeQueries = 8;

// Of the threads there are, those worth asking: a call of a few microseconds is over before a second one has begun.
inline int worth_asking(const AttentionCall& call, int threads) {
  const long products = call.batch * call.heads_q * call.length_q * call.length_k * (call.dim + call.dim_v);
  return products < (1 << 16) ? 1 : threads;
}

// Queries of sequence b that count.
inline int64_t queries_of(const AttentionCall& call, int64_t b) {
  const int64_t rows = call.cu_q ? call.cu_q[b + 1] - call.cu_q[b] : call.length_q;
  return call.lengths_q && call.lengths_q[b] < rows ? call.lengths_q[b] : rows;
}

inline bool run_attention(const AttentionForward& call) {
  int64_t few = 0;
  if (!call.cu_q && !call.lengths_q)
    few = call.length_q <= kDecodeQueries ? call.batch : 0;
  else
    for (int64_t b = 0; b < call.batch; ++b) few += queries_of(call, b) <= kDecodeQueries;
  return (few == 0 || FASTSEQ_DISPATCH(attention_decode, call)) &&
         (few == call.batch || FASTSEQ_DISPATCH(attention_forward, call));
}

}  // namespace fastseq

// One call of attention as the kernels take it, on the CPU and on a GPU; marshal.h fills it in.
//
//   s[i,j] = scale * q[i]·k[j];  softcap * tanh(s / softcap);  + bias[i,j];  - alibi * |i + shift - j|
//   lse[i] = log( sum over visible j of exp s[i,j]  +  exp sink )
//   o[i]   = sum over visible j of  exp(s[i,j] - lse[i]) v[j]
//
// with shift = 0, or tk - tq of each sequence where bottom_right.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace fastseq {

// The operators' options in their order, that of AttentionCall in fastseq/attn/call.py: tensors, which may be absent, and
// settings.
#define FASTSEQ_ATTENTION_FIELDS(tensor, setting, separator) \
  tensor(bias) separator tensor(mask) separator tensor(sinks) separator tensor(alibi_slopes) separator \
  tensor(lengths_q) separator tensor(lengths_k) separator tensor(prefix_lengths) separator \
  tensor(cu_seqlens_q) separator tensor(cu_seqlens_k) separator tensor(block_table) separator \
  tensor(k_scale) separator tensor(v_scale) separator tensor(seed) separator \
  setting(double, scale) separator setting(bool, causal) separator setting(bool, bottom_right) separator \
  setting(int64_t, window_left) separator setting(int64_t, window_right) separator \
  setting(double, softcap) separator setting(double, dropout_p)

// [B,H,T,D] of unit stride in D, or [B,H,T] of unit stride in T; strides in elements. Packed: the batch stride is 0, and
// sequence b begins at row cu[b].
struct View {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// [B,Hq,Tq,Tk] by strides in elements, 0 where it is broadcast.
struct Pairs {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, step = 0;
};

// Size: int64_t on the CPU; int32_t on a GPU, whose registers have 32 bits. What a side needs besides is in its own struct.
template <class Size>
struct AttentionArguments {
  Dtype dtype = Dtype::f32, bias_dtype = Dtype::f32, sinks_dtype = Dtype::f32;
  Size batch = 0, heads_q = 0, heads_k = 0;
  Size length_q = 0, length_k = 0;  // of every sequence; packed: of the longest, or (on a GPU) rows in all
  Size dim = 0, dim_v = 0;
  View q, k, v;
  const int32_t *cu_q = nullptr, *cu_k = nullptr;            // [B+1]: packed
  const int64_t *lengths_q = nullptr, *lengths_k = nullptr;  // [B]
  const int32_t* pages = nullptr;  // [B,table_row] on the CPU: k and v are pools of pages, whose batch stride is a page's;
  Size page = 0, table_row = 0;    // key j of sequence b is row j % page of page pages[b][j / page]
  View k_scale, v_scale;           // float, on the CPU: k and v are int8, and their rows are multiples of these
  const int64_t* prefix = nullptr;                           // [B]: keys seen whatever causality and window say
  Pairs bias;                                                // bias_dtype
  Pairs mask;                                                // bytes, not 0: may look
  const void* sinks = nullptr;                               // sinks_dtype [Hq]
  const void* alibi = nullptr;                               // alibi_dtype [Hq]
  const int64_t* seed = nullptr;                             // [1]; there where dropout_p > 0
  double scale = 1, softcap = 0, dropout_p = 0;
  bool causal = false, bottom_right = true;
  Dtype alibi_dtype = Dtype::f32;  // f64 only with dtype f64
  int64_t window_left = -1, window_right = -1;
};

}  // namespace fastseq

// softmax(Q Kᵀ) V on NVIDIA GPUs, tiled, forward and backward: plain structs in, launches out, nothing of torch.
// The matrix of scores is never stored, no sum is shared between blocks but in a fixed order, and the host looks at no
// tensor's values: a call can be captured in a CUDA graph.
#pragma once
#include <cstdint>

#include "attention/call.h"

namespace fastseq::cuda {

// What a caller fills in (dtype is bf16 or f16, slopes are float), and what `prepare` derives from it.
struct AttentionCall : AttentionArguments<int32_t> {
  int32_t group = 1;               // query heads that share a key head
  int32_t left = 0, right = 0;     // limits, kUnlimited where there are none
  float factor = 0;                // scale * log2(e)
  float cap_in = 0, cap_out = 0;   // scale / softcap, softcap * log2(e)
  float kept_scale = 1;            // 1 / (1 - dropout_p)
  uint32_t threshold = 0;          // a weight whose word is below is dropped
  bool aligned = true;             // every row begins at 16 bytes and holds whole sixteens
};

// Whether anything acts on single pairs, the scale is not positive, or rows are not laid out for 16-byte copies.
bool is_general(const AttentionCall& call);

constexpr int32_t kUnlimited = 1 << 28;  // no distance between two positions is larger
constexpr int32_t kLongest = 1 << 27;    // rows of q or of k
constexpr int32_t kSplitUnit = 64;       // keys of a split are a multiple of this
constexpr int32_t kRowBlock = 128;       // rows of each sequence in the backward's scratch are a multiple of this

struct AttentionForward : AttentionCall {
  View o;                      // dtype
  View lse;                    // float
  float* o_split = nullptr;    // decoding: [B*Hq*Tq, splits, Dv]
  float* lse_split = nullptr;  // decoding: [B*Hq*Tq, splits], in units of log 2
  int32_t splits = 0, split_keys = 0;  // of every sequence's keys; and how many keys one has at least
};

struct AttentionBackward : AttentionCall {
  View o, d_o;       // dtype
  View lse, dlse;    // float; dlse may be absent
  View dq, dk, dv;   // dtype
  float* log = nullptr;    // scratch [B,Hq,rows]: lse in units of log 2, +inf for a row that sees nothing
  float* delta = nullptr;  // scratch, the same shape: do·o - dlse, 0 there; once dq is made, what ds needs
  float* share = nullptr;  // scratch, the same shape, general class alone: once dq is made, what makes p sum to 1
  int64_t rows = 0;        // per head in the scratch, see scratch_rows
  float* sinks_parts = nullptr;  // scratch [parts, Hq], zeros
  void* dsinks = nullptr;        // sinks_dtype [Hq]
  float* dbias_parts = nullptr;  // scratch [splits, the bias's own sizes]
  void* dbias = nullptr;         // bias_dtype, contiguous, of the bias's own sizes
  int32_t bias_size[4] = {};
  int32_t bias_splits = 1;
};

// Derives what the kernels want from what the caller filled in. Comes before everything below.
void prepare(AttentionForward& call);
void prepare(AttentionBackward& call);

// Why these kernels cannot run a call of this dtype and these features a head; null where they can.
const char* attention_refusal(Dtype dtype, int64_t dim, int64_t dim_v);

// Where and how a call is launched.
struct Place {
  void* stream = nullptr;
  int32_t multiprocessors = 132;
  int32_t capability = 80;  // ten times the major version and the minor one
};
// Reads what the current device is; null, or why it could not be read.
const char* read_device(Place& place);

// Whether a call of so few queries is decoding.
bool is_decoding(const AttentionCall& call);
// Fills in splits and split_keys; splits stays 0 where the call is not decoding. They fill the machine or, where they are
// `fixed`, cut a sequence alike whatever the batch around it.
void plan_decode(AttentionForward& call, const Place& place, bool fixed);
// Rows a head in the backward's scratch; rows of sinks_parts; how many blocks share a tile of the bias's gradient.
int64_t scratch_rows(const AttentionCall& call);
int64_t sinks_parts(const AttentionCall& call);
int32_t plan_bias(const AttentionBackward& call, const Place& place);

// Why the kernels for Hopper do not take a call, which the portable ones then do; null where they take it.
const char* hopper_refusal(const AttentionForward& call, const Place& place);
const char* hopper_refusal(const AttentionBackward& call, const Place& place);

// All return null, or why the launch failed.
const char* attention_forward(const AttentionForward& call, const Place& place);
const char* attention_hopper_forward(const AttentionForward& call, const Place& place);
const char* attention_decode(const AttentionForward& call, const Place& place);
const char* attention_backward(const AttentionBackward& call, const Place& place);

}  // namespace fastseq::cuda

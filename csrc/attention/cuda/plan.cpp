// What is decided about a call before anything is launched.
#include "attention/cuda/attention.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fastseq::cuda {
namespace {

constexpr double kLog2e = 1.4426950408889634;
constexpr int64_t kDecodeQueries = 16;  // up to so many, and kDecodeRows in a group of heads, attention is decoding
constexpr int64_t kDecodeRows = 64;
constexpr int64_t kLeastKeys = 2 * kSplitUnit;
constexpr int64_t kFixedSplits = 32, kFixedKeys = 4 * kSplitUnit;  // a short sequence has splits of so many keys
constexpr int64_t kFarthestStep = int64_t(1) << 39;  // of a tensor map, in elements

bool aligned(const View& view, bool packed) {
  const auto whole = [](int64_t stride) { return stride % 8 == 0; };
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (packed || whole(view.batch)) && whole(view.head) &&
         whole(view.row);
}

void prepare_call(AttentionCall& call) {
  call.group = call.heads_k > 0 ? call.heads_q / call.heads_k : 1;
  const auto limit = [](int64_t n) { return int32_t(n < 0 ? kUnlimited : std::min<int64_t>(n, kUnlimited)); };
  call.left = limit(call.window_left);
  call.right = call.causal ? 0 : limit(call.window_right);
  call.factor = float(call.scale * kLog2e);
  call.cap_in = call.softcap > 0 ? float(call.scale / call.softcap) : 0;
  call.cap_out = float(call.softcap > 0 ? call.softcap * kLog2e : 0);
  if (call.dropout_p <= 0) call.seed = nullptr;
  call.kept_scale = call.dropout_p < 1 ? float(1 / (1 - call.dropout_p)) : 0;
  call.threshold = uint32_t(std::min<int64_t>(int64_t(call.dropout_p * 4294967296.0), 0xffffffff));
  const bool packed = call.cu_q != nullptr;
  call.aligned = call.dim % 8 == 0 && call.dim_v % 8 == 0 && aligned(call.q, packed) && aligned(call.k, packed) &&
                 aligned(call.v, packed);
}

}  // namespace

void prepare(AttentionForward& call) {
  prepare_call(call);
  call.aligned = call.aligned && aligned(call.o, call.cu_q != nullptr);
}

void prepare(AttentionBackward& call) {
  prepare_call(call);
  const bool packed = call.cu_q != nullptr;
  for (const View* view : {&call.o, &call.d_o, &call.dq, &call.dk, &call.dv})
    call.aligned = call.aligned && aligned(*view, packed);
}

bool is_general(const AttentionCall& call) {
  return call.bias.data != nullptr || call.mask.data != nullptr || call.alibi != nullptr || call.seed != nullptr ||
         call.cap_out != 0 || call.prefix != nullptr || !(call.factor > 0) || !call.aligned;
}

namespace {

// Of either direction; `views` of [B,Hq,Tq,..] or, `of_keys`, of [B,Hk,Tk,..] are what TMA reads.
struct Mapped {
  const View& view;
  bool of_keys;
};

const char* hopper_refusal_of(const AttentionCall& call, const Place& place, std::initializer_list<Mapped> views) {
  if (place.capability != 90) return "the GPU is not of compute capability 9.0";
  if (!call.aligned) return "rows do not begin at 16 bytes";
  if (is_general(call))
    return "bias, mask, cap, slopes, dropout, a prefix or a scale that is not positive act on single pairs";
  if (call.length_q == 0 || call.length_k == 0) return "there are no queries, or no keys";
  const bool packed = call.cu_q != nullptr;
  const auto stepped = [](int64_t size, int64_t stride) {
    return size == 1 || (stride > 0 && stride < kFarthestStep);
  };
  for (const Mapped& x : views) {
    const int64_t heads = x.of_keys ? call.heads_k : call.heads_q, rows = x.of_keys ? call.length_k : call.length_q;
    if (!stepped(packed ? 1 : call.batch, x.view.batch) || !stepped(heads, x.view.head) || !stepped(rows, x.view.row))
      return "TMA cannot step through a broadcast tensor";
  }
  return nullptr;
}

}  // namespace

const char* hopper_refusal(const AttentionForward& call, const Place& place) {
  return hopper_refusal_of(call, place, {{call.q, false}, {call.k, true}, {call.v, true}});
}

const char* hopper_refusal(const AttentionBackward& call, const Place& place) {
  return hopper_refusal_of(call, place, {{call.q, false}, {call.k, true}, {call.v, true}, {call.d_o, false}});
}

const char* attention_refusal(Dtype dtype, int64_t dim, int64_t dim_v) {
  if (dtype != Dtype::bf16 && dtype != Dtype::f16)
    return "the CUDA C++ kernels of attention take bfloat16 and float16 alone";
  if (std::max(dim, dim_v) > 256) return "the CUDA C++ kernels of attention take up to 256 features a head";
  return nullptr;
}

bool is_decoding(const AttentionCall& call) {
  return call.cu_q == nullptr && call.length_q <= kDecodeQueries &&
         int64_t(call.length_q) * call.group <= kDecodeRows && call.length_k > 0;
}

void plan_decode(AttentionForward& call, const Place& place, bool fixed) {
  call.splits = 0;
  if (!is_decoding(call)) return;
  const int64_t rows = int64_t(call.length_q) * call.group;
  const int64_t heads = std::max<int64_t>(1, int64_t(call.batch) * call.heads_k * ((rows + 15) / 16));
  const int64_t wanted = fixed ? kFixedSplits : std::max<int64_t>(1, 2 * place.multiprocessors / heads);
  call.split_keys = int32_t(fixed ? kFixedKeys : kLeastKeys);
  call.splits = int32_t(std::min<int64_t>(wanted, (call.length_k + call.split_keys - 1) / call.split_keys));
}

namespace {

int64_t scratch_tiles(const AttentionCall& call) {
  return call.cu_q != nullptr ? int64_t(call.length_q) / kRowBlock + call.batch + 1
                              : (int64_t(call.length_q) + kRowBlock - 1) / kRowBlock;
}

}  // namespace

int64_t scratch_rows(const AttentionCall& call) { return scratch_tiles(call) * kRowBlock; }

int64_t sinks_parts(const AttentionCall& call) {
  return scratch_tiles(call) * (call.cu_q != nullptr ? 1 : call.batch);
}

int32_t plan_bias(const AttentionBackward& call, const Place& place) {
  constexpr int64_t kBlock = 64;
  const int64_t whole[4] = {call.batch, call.heads_q, (call.length_q + kBlock - 1) / kBlock,
                            (call.length_k + kBlock - 1) / kBlock};
  int64_t own = 1, terms = 1;
  for (int i = 0; i < 4; ++i) (call.bias_size[i] == 1 ? terms : own) *= whole[i];
  return int32_t(std::max<int64_t>(1, std::min(terms, 2 * place.multiprocessors / std::max<int64_t>(own, 1))));
}

}  // namespace fastseq::cuda

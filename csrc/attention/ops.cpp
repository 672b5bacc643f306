// torch.ops.fastseq.attention_forward.native and attention_backward.native on the CPU. The schemas, with every shape, are
// in fastseq/ops/schemas.py.
#include "attention/ops.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "attention/cpu/attention.h"
#include "core/settings.h"
#include "recurrent/marshal.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

const AttentionRules kRules = {
    /*looks_at_values=*/true,
    /*reads_caches=*/true,
    /*refusal=*/[](Dtype, int64_t, int64_t) -> const char* { return nullptr; },
    /*most_rows=*/std::numeric_limits<int64_t>::max(),
    /*check=*/[](const char* name, const Tensor& x, const Tensor&) { check_readable(name, x.get()); },
    /*contiguous=*/dense,
    /*empty=*/[](const Tensor&, const Sizes& sizes, const int64_t* strides, Dtype dtype) {
      return empty(sizes.data(), strides, int64_t(sizes.size()), dtype);
    },
};

// Whether rows belong to no sequence: no kernel writes them.
bool leaves_rows(const int32_t* offsets, int64_t batch, int64_t total) { return offsets && offsets[batch] != total; }

}  // namespace

void check_memory(bool enough) { STD_TORCH_CHECK(enough, "attention: out of memory for the kernel's scratch"); }

TwoTensors attention_forward_cpu(const Tensor& q, const Tensor& k, const Tensor& v, FASTSEQ_ATTENTION_OPTIONS) {
  AttentionForward call;
  const AttentionTensors in(q, k, v, FASTSEQ_GIVEN_OPTIONS, kRules, call);
  call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
  auto [o, lse] = in.results(call);
  if (leaves_rows(call.cu_q, call.batch, in.total_q())) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  if (lse.numel() > 0) check_memory(run_attention(call));
  return {o, lse};
}

FiveTensors attention_backward_cpu(const Tensor& d_o, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                                   const Tensor& v, const Tensor& o, const Tensor& lse, FASTSEQ_ATTENTION_OPTIONS,
                                   bool bias_grad) {
  FASTSEQ_CHECK(!block_table, "attention: keys in pages (block_table) have no backward pass");
  FASTSEQ_CHECK(!k_scale, "attention: int8 keys (k_scale) have no backward pass");
  AttentionBackward call;
  AttentionTensors in(q, k, v, FASTSEQ_GIVEN_OPTIONS, kRules, call);
  call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
  call.deterministic = is_deterministic();
  auto [dq, dk, dv, dbias, dsinks] = in.gradients(call, d_o, dlse, o, lse, bias_grad);
  const bool is_empty = lse.numel() == 0;  // no sequence, head or query
  if (leaves_rows(call.cu_q, call.batch, in.total_q())) torch::stable::zero_(dq);
  if (leaves_rows(call.cu_k, call.batch, in.total_k()) || is_empty) torch::stable::zero_(dk), torch::stable::zero_(dv);
  if (call.dbias) {
    torch::stable::zero_(dbias);
    call.rows = in.keep(in.empty({2 * lse.numel()}, accumulator_of(call.dtype))).data_ptr();
  }
  if (call.dsinks && is_empty) torch::stable::zero_(dsinks);
  if (is_empty) return {dq, dk, dv, dbias, dsinks};
  check_memory(FASTSEQ_DISPATCH(attention_backward, call));
  if (call.dbias && dbias.numel() > 0) check_memory(FASTSEQ_DISPATCH(attention_bias_gradient, call));
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace fastseq

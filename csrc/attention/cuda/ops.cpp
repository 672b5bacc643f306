// torch.ops.fastseq.attention_*.native on a GPU. No tensor's values are looked at, so lengths are clamped by the kernels
// rather than refused here. The schemas, with every shape, are in fastseq/ops/schemas.py.
// The tests' emulated machine has the same operators on the CPU.
#include "attention/ops.h"

#include <torch/csrc/stable/ops.h>

#include "attention/cuda/attention.h"
#include "core/cuda/current.h"
#include "core/settings.h"

namespace fastseq::cuda {
namespace {

using torch::stable::Tensor;

// Makes a tensor's device the current one, and says how kernels are launched there.
struct Launching {
  explicit Launching(const Tensor& like) : current(like) {
    place.stream = current.stream;
    check(read_device(place));
  }
  static void check(const char* error) {
    STD_TORCH_CHECK(error == nullptr, "attention: a CUDA kernel could not start: ", error);
  }
  Current current;
  Place place;
};

const AttentionRules kRules = {
    /*looks_at_values=*/false,
    /*reads_caches=*/false,
    /*refusal=*/attention_refusal,
    /*most_rows=*/kLongest,
    /*check=*/[](const char* name, const Tensor& x, const Tensor& q) {
      FASTSEQ_CHECK(x.is_cpu() == q.is_cpu() && x.get_device_index() == q.get_device_index(), "attention: ", name,
                    " must be on q's device");
    },
    /*contiguous=*/[](const Tensor& x) { return torch::stable::contiguous(x); },
    /*empty=*/[](const Tensor& x, const Sizes& sizes, const int64_t* strides, Dtype dtype) {
      const int32_t codes[] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                               aoti_torch_dtype_float16()};
      int32_t device;
      AtenTensorHandle made;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
      TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides, codes[int(dtype)],
                                                      device, x.get_device_index(), &made));
      return Tensor(made);
    },
};

float* scratch(AttentionTensors& in, const Sizes& sizes, bool zero = false) {
  Tensor made = in.keep(in.empty(sizes, Dtype::f32));
  if (zero) torch::stable::zero_(made);
  return static_cast<float*>(made.data_ptr());
}

}  // namespace

TwoTensors attention_forward_cuda(const Tensor& q, const Tensor& k, const Tensor& v, FASTSEQ_ATTENTION_OPTIONS) {
  const Launching on(q);
  AttentionForward call;
  AttentionTensors in(q, k, v, FASTSEQ_GIVEN_OPTIONS, kRules, call);
  auto [o, lse] = in.results(call);
  if (lse.numel() == 0) return {o, lse};
  prepare(call);
  plan_decode(call, on.place, is_decoding(call) && is_deterministic());
  if (call.splits > 0) {
    const int64_t rows = lse.numel();
    call.o_split = scratch(in, {rows, call.splits, call.dim_v}), call.lse_split = scratch(in, {rows, call.splits});
    Launching::check(attention_decode(call, on.place));
  } else {
    Launching::check(attention_forward(call, on.place));
  }
  return {o, lse};
}

FiveTensors attention_backward_cuda(const Tensor& d_o, const MaybeTensor& dlse, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& o, const Tensor& lse, FASTSEQ_ATTENTION_OPTIONS,
                                    bool bias_grad) {
  const Launching on(q);
  AttentionBackward call;
  AttentionTensors in(q, k, v, FASTSEQ_GIVEN_OPTIONS, kRules, call);
  auto [dq, dk, dv, dbias, dsinks] = in.gradients(call, d_o, dlse, o, lse, bias_grad);
  prepare(call);
  call.rows = scratch_rows(call);
  const int64_t heads = int64_t(in.packed() ? 1 : call.batch) * call.heads_q;
  call.log = scratch(in, {heads, call.rows}), call.delta = scratch(in, {heads, call.rows});
  if (is_general(call)) call.share = scratch(in, {heads, call.rows});
  if (call.dsinks && lse.numel() > 0) {
    call.sinks_parts = scratch(in, {sinks_parts(call), call.heads_q}, true);
  } else if (call.dsinks) {
    torch::stable::zero_(dsinks);
    call.dsinks = nullptr;
  }
  if (call.dbias && lse.numel() > 0 && call.length_k > 0) {
    call.bias_splits = plan_bias(call, on.place);
    call.dbias_parts = scratch(in, {call.bias_splits, dbias.numel()});
  } else if (call.dbias) {
    torch::stable::zero_(dbias);
    call.dbias = nullptr;
  }
  Launching::check(attention_backward(call, on.place));
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace fastseq::cuda

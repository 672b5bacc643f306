// torch.ops.fastseq.attention_forward.native and attention_backward.native: tensors into the structs of attention.h.
// The schemas, with every shape, are in fastseq/ops/__init__.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "attention/layout.h"
#include "attention/cpu/attention.h"
#include "core/ops.h"
#include "recurrent/marshal.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

AttentionCall::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return AttentionCall::Dtype::f64;
    case ScalarType::Float:
      return AttentionCall::Dtype::f32;
    case ScalarType::BFloat16:
      return AttentionCall::Dtype::bf16;
    case ScalarType::Half:
      return AttentionCall::Dtype::f16;
    default:
      FASTSEQ_CHECK(false, "attention: the native kernels take float64, float32, bfloat16 and float16 tensors");
  }
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  const Dtype dtype = type == ScalarType::Double     ? Dtype::f64
                      : type == ScalarType::Float    ? Dtype::f32
                      : type == ScalarType::BFloat16 ? Dtype::bf16
                                                     : Dtype::f16;
  return empty(sizes.data(), int64_t(sizes.size()), dtype);
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// A result of x's dtype and of these sizes, in the order of x's dimensions.
Tensor empty_as(const Tensor& x, const std::vector<int64_t>& sizes) {
  int64_t strides[kMostDimensions];
  strides_as(x.dim(), x.sizes().data(), x.strides().data(), sizes.data(), strides);
  return empty(sizes.data(), strides, x.dim(), fastseq::dtype_of(x.get()));
}

// Rows must be contiguous: any other layout is rare and copied.
Tensor with_unit_rows(const char* name, const Tensor& x) {
  check_readable(name, x.get());
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) <= 1 ? x : dense(x);
}

// [B,H,T,D], packed [total,H,D].
AttentionCall::View view_of(const Tensor& x, bool packed) {
  AttentionCall::View view;
  view.data = x.data_ptr();
  view.batch = packed ? 0 : x.stride(0);
  view.head = x.stride(1);
  view.row = packed ? x.stride(0) : x.stride(2);
  return view;
}
// [B,H,T], packed [H,total].
AttentionCall::View row_view_of(const Tensor& x, bool packed) {
  AttentionCall::View view;
  view.data = x.data_ptr();
  view.batch = packed ? 0 : x.stride(0);
  view.head = packed ? x.stride(0) : x.stride(1);
  view.row = 1;
  return view;
}

struct Options {
  const Optional &bias, &mask, &sinks, &alibi, &lengths_q, &lengths_k, &cu_q, &cu_k, &seed;
  double scale;
  bool causal, bottom_right;
  int64_t window_left, window_right;
  double softcap, dropout_p;
};

// The tensors of a call, and the struct that points into them.
class Marshalled {
 public:
  Marshalled(const Tensor& q, const Tensor& k, const Tensor& v, const Options& x)
      : q(with_unit_rows("q", q)), k(with_unit_rows("k", k)), v(with_unit_rows("v", v)), packed(x.cu_q.has_value()) {
    const int64_t rank = packed ? 3 : 4;
    FASTSEQ_CHECK(q.dim() == rank && k.dim() == rank && v.dim() == rank, "attention: q, k and v must have ", rank,
                    " dimensions, got ", q.dim(), ", ", k.dim(), " and ", v.dim());
    FASTSEQ_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                    "attention: q, k and v must have one dtype");
    const int64_t length = packed ? 0 : 2;
    heads_q = q.size(1), heads_k = k.size(1), total_q = q.size(length), total_k = k.size(length);
    FASTSEQ_CHECK(v.size(1) == heads_k && v.size(length) == total_k, "attention: k and v differ in heads or length");
    FASTSEQ_CHECK(k.size(rank - 1) == q.size(rank - 1), "attention: q has ", q.size(rank - 1), " features, k has ",
                    k.size(rank - 1));
    FASTSEQ_CHECK(heads_k > 0 ? heads_q % heads_k == 0 : heads_q == 0, "attention: ", heads_q,
                    " query heads cannot share ", heads_k, " key heads");
    FASTSEQ_CHECK(packed == x.cu_k.has_value(), "attention: cu_seqlens_q and cu_seqlens_k come together");
    if (packed) {
      batch = x.cu_q->size(0) - 1;
      FASTSEQ_CHECK(batch >= 0 && x.cu_k->size(0) == batch + 1, "attention: cu_seqlens_q and cu_seqlens_k differ");
      length_q = use_offsets(*x.cu_q, total_q, "cu_seqlens_q");
      length_k = use_offsets(*x.cu_k, total_k, "cu_seqlens_k");
    } else {
      batch = q.size(0), length_q = total_q, length_k = total_k;
      FASTSEQ_CHECK(k.size(0) == batch && v.size(0) == batch, "attention: q, k and v differ in batch size");
    }
    check_lengths(x.lengths_q, length_q, "lengths_q");
    check_lengths(x.lengths_k, length_k, "lengths_k");
  }

  void fill(AttentionCall& call, const Options& x) {
    call.dtype = dtype_of(q);
    call.batch = batch, call.heads_q = heads_q, call.heads_k = heads_k;
    call.length_q = length_q, call.length_k = length_k;
    call.dim = q.size(q.dim() - 1), call.dim_v = v.size(v.dim() - 1);
    call.q = view_of(q, packed), call.k = view_of(k, packed), call.v = view_of(v, packed);
    if (packed) {
      call.cu_q = static_cast<const int32_t*>(keep("cu_seqlens_q", *x.cu_q).data_ptr());
      call.cu_k = static_cast<const int32_t*>(keep("cu_seqlens_k", *x.cu_k).data_ptr());
    }
    if (x.lengths_q) call.lengths_q = static_cast<const int64_t*>(keep("lengths_q", *x.lengths_q).data_ptr());
    if (x.lengths_k) call.lengths_k = static_cast<const int64_t*>(keep("lengths_k", *x.lengths_k).data_ptr());
    if (x.bias) {
      call.bias = broadcast(*x.bias, "bias");
      call.bias_dtype = dtype_of(*x.bias);
      check_number(call.bias_dtype, call.dtype, "bias");
    }
    if (x.mask) {
      FASTSEQ_CHECK(x.mask->scalar_type() == ScalarType::Bool, "attention: mask must be bool");
      call.mask = broadcast(*x.mask, "mask");
    }
    if (x.sinks) {
      FASTSEQ_CHECK(x.sinks->dim() == 1 && x.sinks->size(0) == heads_q, "attention: sinks must have shape [",
                      heads_q, "]");
      call.sinks = keep("sinks", *x.sinks).data_ptr();
      call.sinks_dtype = dtype_of(*x.sinks);
      check_number(call.sinks_dtype, call.dtype, "sinks");
    }
    if (x.alibi) {
      const bool wide = x.alibi->scalar_type() == ScalarType::Double && call.dtype == AttentionCall::Dtype::f64;
      FASTSEQ_CHECK((wide || x.alibi->scalar_type() == ScalarType::Float) && x.alibi->dim() == 1 &&
                        x.alibi->size(0) == heads_q,
                    "attention: alibi_slopes must be float32 (or float64 as q) of shape [", heads_q, "]");
      call.alibi = keep("alibi_slopes", *x.alibi).data_ptr();
      call.alibi_dtype = wide ? AttentionCall::Dtype::f64 : AttentionCall::Dtype::f32;
    }
    call.scale = x.scale, call.softcap = x.softcap, call.dropout_p = x.dropout_p;
    if (x.dropout_p > 0) {
      FASTSEQ_CHECK(x.seed && x.seed->numel() == 1 && x.seed->scalar_type() == ScalarType::Long,
                      "attention: dropout_p > 0 needs a seed, an int64 tensor of shape [1]");
      check_readable("seed", x.seed->get());
      call.seed = uint64_t(*static_cast<const int64_t*>(x.seed->data_ptr()));
    }
    call.causal = x.causal, call.bottom_right = x.bottom_right;
    call.window_left = x.window_left, call.window_right = x.window_right;
    call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
  }

  // Keeps a contiguous copy alive as long as this.
  const Tensor& keep(const char* name, const Tensor& x) {
    check_readable(name, x.get());
    kept_.push_back(dense(x));
    return kept_.back();
  }

  std::vector<int64_t> row_sizes() const {
    return packed ? std::vector<int64_t>{heads_q, total_q} : std::vector<int64_t>{batch, heads_q, total_q};
  }

  const Tensor q, k, v;
  const bool packed;
  int64_t batch, heads_q, heads_k, total_q, total_k, length_q, length_k;

 private:
  // Checks offsets of sequences; returns the longest.
  int64_t use_offsets(const Tensor& cu, int64_t total, const char* name) {
    FASTSEQ_CHECK(cu.scalar_type() == ScalarType::Int && cu.dim() == 1, "attention: ", name,
                    " must be int32 of one dimension");
    check_readable(name, cu.get());
    const Tensor flat = torch::stable::contiguous(cu);
    const int32_t* offsets = static_cast<const int32_t*>(flat.data_ptr());
    int64_t longest = 0;
    FASTSEQ_CHECK(offsets[0] == 0, "attention: ", name, " must begin with 0, got ", offsets[0]);
    for (int64_t b = 0; b < batch; ++b) {
      FASTSEQ_CHECK(offsets[b + 1] >= offsets[b], "attention: ", name, " must not decrease");
      longest = std::max<int64_t>(longest, offsets[b + 1] - offsets[b]);
    }
    FASTSEQ_CHECK(offsets[batch] <= total, "attention: ", name, " ends at ", offsets[batch], ", past the ", total,
                    " rows that there are");
    return longest;
  }
  void check_lengths(const Optional& lengths, int64_t longest, const char* name) const {
    if (!lengths) return;
    FASTSEQ_CHECK(lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 && lengths->size(0) == batch,
                    "attention: ", name, " must be int64 of shape [", batch, "]");
    check_readable(name, lengths->get());
    const Tensor flat = torch::stable::contiguous(*lengths);
    const int64_t* values = static_cast<const int64_t*>(flat.data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      FASTSEQ_CHECK(values[b] >= 0 && values[b] <= longest, "attention: ", name, "[", b, "] is ", values[b],
                      ", outside 0..", longest);
  }
  static void check_number(AttentionCall::Dtype got, AttentionCall::Dtype wanted, const char* name) {
    FASTSEQ_CHECK(got == wanted || got == AttentionCall::Dtype::f32, "attention: ", name,
                    " must have q's dtype or float32");
  }
  AttentionCall::Scores broadcast(const Tensor& x, const char* name) const {
    const int64_t wanted[4] = {batch, heads_q, length_q, length_k};
    FASTSEQ_CHECK(x.dim() == 4, "attention: ", name, " must have 4 dimensions, got ", x.dim());
    check_readable(name, x.get());
    AttentionCall::Scores out;
    out.data = x.data_ptr();
    for (int64_t i = 0; i < 4; ++i) {
      FASTSEQ_CHECK(x.size(i) == 1 || x.size(i) >= wanted[i], "attention: ", name, " has size ", x.size(i),
                      " in dimension ", i, ", neither 1 nor ", wanted[i]);
      out.stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
    }
    return out;
  }

  std::vector<Tensor> kept_;
};

// Rows that belong to no sequence are written by no kernel.
bool leaves_rows(const Marshalled& in, const AttentionCall& call) {
  return call.cu_q != nullptr && call.cu_q[call.batch] != in.total_q;
}
bool leaves_keys(const Marshalled& in, const AttentionCall& call) {
  return call.cu_k != nullptr && call.cu_k[call.batch] != in.total_k;
}

void check_memory(bool enough) { STD_TORCH_CHECK(enough, "attention: out of memory for the kernel's scratch"); }

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& mask,
    const Optional& sinks, const Optional& alibi, const Optional& lengths_q, const Optional& lengths_k,
    const Optional& cu_q, const Optional& cu_k, const Optional& seed, double scale, bool causal, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  const Options options{bias, mask, sinks, alibi, lengths_q, lengths_k, cu_q, cu_k, seed, scale, causal, bottom_right,
                        window_left, window_right, softcap, dropout_p};
  Marshalled in(q, k, v, options);
  AttentionForward call;
  in.fill(call, options);
  std::vector<int64_t> o_sizes = sizes_of(q);
  o_sizes.back() = call.dim_v;
  Tensor o = empty_as(q, o_sizes);
  Tensor lse = empty(in.row_sizes(), call.dtype == AttentionCall::Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  call.o = view_of(o, in.packed), call.lse = row_view_of(lse, in.packed);
  if (leaves_rows(in, call)) {
    torch::stable::zero_(o);
    torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  }
  if (lse.numel() > 0) check_memory(run_attention(call));
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& d_o, const Optional& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& lse, const Optional& bias, const Optional& mask, const Optional& sinks, const Optional& alibi,
    const Optional& lengths_q, const Optional& lengths_k, const Optional& cu_q, const Optional& cu_k,
    const Optional& seed, double scale, bool causal, bool bottom_right, int64_t window_left, int64_t window_right,
    double softcap, double dropout_p, bool bias_grad) {
  const Options options{bias, mask, sinks, alibi, lengths_q, lengths_k, cu_q, cu_k, seed, scale, causal, bottom_right,
                        window_left, window_right, softcap, dropout_p};
  Marshalled in(q, k, v, options);
  AttentionBackward call;
  in.fill(call, options);
  std::vector<int64_t> o_sizes = sizes_of(q);
  o_sizes.back() = call.dim_v;
  FASTSEQ_CHECK(sizes_of(o) == o_sizes && sizes_of(d_o) == o_sizes, "attention: o and its gradient must be as q");
  FASTSEQ_CHECK(o.scalar_type() == q.scalar_type() && d_o.scalar_type() == q.scalar_type(),
                  "attention: o and its gradient must have q's dtype");
  const auto rows = call.dtype == AttentionCall::Dtype::f64 ? ScalarType::Double : ScalarType::Float;
  FASTSEQ_CHECK(sizes_of(lse) == in.row_sizes() && lse.scalar_type() == rows, "attention: lse has a wrong shape");
  const Tensor o_rows = with_unit_rows("o", o), d_o_rows = with_unit_rows("d_o", d_o);
  call.o = view_of(o_rows, in.packed), call.d_o = view_of(d_o_rows, in.packed);
  call.lse = row_view_of(in.keep("lse", lse), in.packed);
  if (dlse) {
    FASTSEQ_CHECK(sizes_of(*dlse) == in.row_sizes() && dlse->scalar_type() == rows,
                    "attention: the gradient of lse must be as lse");
    call.dlse = row_view_of(in.keep("dlse", *dlse), in.packed);
  }
  Tensor dq = empty_as(q, sizes_of(q)), dk = empty_as(k, sizes_of(k)), dv = empty_as(v, sizes_of(v));
  call.dq = view_of(dq, in.packed), call.dk = view_of(dk, in.packed), call.dv = view_of(dv, in.packed);
  const bool is_empty = lse.numel() == 0;  // no sequence, head or query
  if (leaves_rows(in, call)) torch::stable::zero_(dq);
  if (leaves_keys(in, call) || is_empty) torch::stable::zero_(dk), torch::stable::zero_(dv);
  const bool with_bias = bias && bias_grad;
  Tensor dbias = empty(with_bias ? sizes_of(*bias) : std::vector<int64_t>{0}, (with_bias ? *bias : q).scalar_type());
  Tensor dsinks = empty(sinks ? sizes_of(*sinks) : std::vector<int64_t>{0}, (sinks ? *sinks : q).scalar_type());
  const Tensor row_numbers = empty({with_bias ? 2 * lse.numel() : 0}, rows);
  if (with_bias) {
    torch::stable::zero_(dbias);
    call.rows = row_numbers.data_ptr();
    call.dbias = dbias.data_ptr();
    for (int64_t i = 0; i < 4; ++i) call.bias_size[i] = dbias.size(i);
  }
  if (sinks) call.dsinks = dsinks.data_ptr();
  if (sinks && is_empty) torch::stable::zero_(dsinks);
  if (is_empty) return {dq, dk, dv, dbias, dsinks};
  check_memory(FASTSEQ_DISPATCH(attention_backward, call));
  if (with_bias && dbias.numel() > 0) check_memory(FASTSEQ_DISPATCH(attention_bias_gradient, call));
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace fastseq

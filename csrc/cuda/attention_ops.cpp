// torch.ops.fastseq.attention_*.native on a GPU: tensors into the structs of attention.h. No tensor's values are looked
// at, so lengths are clamped by the kernels rather than refused here. The schemas, with every shape, are in fastseq/ops.py.
// The tests' emulated machine has the same operators on the CPU.
#include "attention_ops.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../attention_layout.h"
#include "attention.h"
#include "current.h"
#include "settings.h"

namespace fastseq::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

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

Number number_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, "attention: ",
                  name, " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Number::f32 : type == ScalarType::BFloat16 ? Number::bf16 : Number::f16;
}

Sizes sizes_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// 0 where there is one index only, whatever the tensor says.
int64_t stride_of(const Tensor& x, int64_t i) { return x.size(i) == 1 ? 0 : x.stride(i); }

// [B,H,T,D], packed [T,H,D].
View view_of(const Tensor& x, bool packed) {
  View view;
  view.data = x.data_ptr();
  view.batch = packed ? 0 : stride_of(x, 0), view.head = stride_of(x, 1), view.row = stride_of(x, packed ? 0 : 2);
  return view;
}
// [B,H,T], packed [H,T]; contiguous.
View row_view_of(const Tensor& x, bool packed) {
  View view;
  view.data = x.data_ptr();
  view.batch = packed ? 0 : stride_of(x, 0), view.head = stride_of(x, packed ? 0 : 1), view.row = 1;
  return view;
}

// Rows must be contiguous: any other layout is rare and copied.
Tensor with_unit_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.stride(last) == 1 || x.size(last) <= 1 ? x : torch::stable::contiguous(x);
}

struct Options {
  const Optional &bias, &mask, &sinks, &alibi, &lengths_q, &lengths_k, &cu_q, &cu_k, &seed;
  double scale;
  bool causal, bottom_right;
  int64_t window_left, window_right;
  double softcap, dropout_p;
};

// The tensors of a call, checked as far as shapes tell, and kept alive while the struct points into them.
class Marshalled {
 public:
  Marshalled(const Tensor& q, const Tensor& k, const Tensor& v, const Options& x, AttentionCall& call)
      : q(with_unit_rows(q)), k(with_unit_rows(k)), v(with_unit_rows(v)), packed(x.cu_q.has_value()) {
    const int64_t rank = packed ? 3 : 4, length = packed ? 0 : 2;
    STD_TORCH_CHECK(q.dim() == rank && k.dim() == rank && v.dim() == rank, "attention: q, k and v must have ", rank,
                    " dimensions, got ", q.dim(), ", ", k.dim(), " and ", v.dim());
    check_like(k, "k", q.scalar_type()), check_like(v, "v", q.scalar_type());
    call.dtype = number_of(q, "q");
    const char* refusal = attention_refusal(call.dtype, q.size(rank - 1), v.size(rank - 1));
    STD_TORCH_CHECK(refusal == nullptr, "attention: ", refusal);
    STD_TORCH_CHECK(packed == x.cu_k.has_value(), "attention: cu_seqlens_q and cu_seqlens_k come together");
    STD_TORCH_CHECK(!packed || !(x.bias || x.mask || x.lengths_q || x.lengths_k),
                    "attention: bias, mask and lengths belong to the padded layout, not to cu_seqlens");
    const int64_t batch = packed ? x.cu_q->numel() - 1 : q.size(0), heads_q = q.size(1), heads_k = k.size(1);
    const int64_t length_q = q.size(length), length_k = k.size(length);
    STD_TORCH_CHECK(v.size(1) == heads_k && v.size(length) == length_k, "attention: k and v differ in heads or length");
    STD_TORCH_CHECK(k.size(rank - 1) == q.size(rank - 1), "attention: q and k differ in features");
    STD_TORCH_CHECK(heads_k > 0 ? heads_q > 0 && heads_q % heads_k == 0 : heads_q == 0, "attention: ", heads_q,
                    " query heads cannot share ", heads_k, " key heads");
    STD_TORCH_CHECK(packed || (k.size(0) == batch && v.size(0) == batch), "attention: q, k and v differ in batch size");
    STD_TORCH_CHECK(std::max(length_q, length_k) <= kLongest && batch * heads_q <= kLongest,
                    "attention: the CUDA C++ kernels take up to ", kLongest, " rows and as many heads in all");
    call.batch = int32_t(batch), call.heads_q = int32_t(heads_q), call.heads_k = int32_t(heads_k);
    call.length_q = int32_t(length_q), call.length_k = int32_t(length_k);
    call.dim = int32_t(q.size(rank - 1)), call.dim_v = int32_t(v.size(rank - 1));
    call.q = view_of(this->q, packed), call.k = view_of(this->k, packed), call.v = view_of(this->v, packed);
    call.cu_q = vector<int32_t>(x.cu_q, "cu_seqlens_q", ScalarType::Int, batch + 1);
    call.cu_k = vector<int32_t>(x.cu_k, "cu_seqlens_k", ScalarType::Int, batch + 1);
    call.lengths_q = vector<int64_t>(x.lengths_q, "lengths_q", ScalarType::Long, batch);
    call.lengths_k = vector<int64_t>(x.lengths_k, "lengths_k", ScalarType::Long, batch);
    call.alibi = vector<float>(x.alibi, "alibi_slopes", ScalarType::Float, heads_q);
    if (x.sinks) {
      call.sinks_dtype = number_of(*x.sinks, "sinks");
      call.sinks = vector<void>(x.sinks, "sinks", x.sinks->scalar_type(), heads_q);
    }
    const int64_t shape[4] = {batch, heads_q, length_q, length_k};
    if (x.bias) call.bias = pairs(*x.bias, "bias", shape), call.bias_dtype = number_of(*x.bias, "bias");
    if (x.mask) {
      STD_TORCH_CHECK(x.mask->scalar_type() == ScalarType::Bool, "attention: mask must be bool");
      call.mask = pairs(*x.mask, "mask", shape);
    }
    if (x.dropout_p > 0) {
      STD_TORCH_CHECK(x.seed, "attention: dropout_p > 0 needs a seed, an int64 tensor of shape [1]");
      call.seed = vector<int64_t>(x.seed, "seed", ScalarType::Long, 1);
    }
    call.scale = x.scale, call.softcap = x.softcap, call.dropout_p = x.dropout_p;
    call.causal = x.causal, call.bottom_right = x.bottom_right;
    call.window_left = x.window_left, call.window_right = x.window_right;
  }

  const Tensor& keep(const Tensor& x) {
    kept_.push_back(x);
    return kept_.back();
  }
  // Scratch or a result on q's device.
  Tensor empty(const Sizes& sizes, ScalarType type) const { return torch::stable::new_empty(q, sizes, type); }
  // A result of x's dtype and of these sizes, in the order of x's dimensions.
  static Tensor empty_as(const Tensor& x, const Sizes& sizes) {
    int64_t strides[kMostDimensions];
    strides_as(x.dim(), x.sizes().data(), x.strides().data(), sizes.data(), strides);
    int32_t dtype, device;
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(x.dim(), sizes.data(), strides, dtype, device,
                                                    x.get_device_index(), &made));
    return Tensor(made);
  }
  float* scratch(const Sizes& sizes, bool zero = false) {
    const Tensor made =
        zero ? torch::stable::new_zeros(q, sizes, ScalarType::Float) : empty(sizes, ScalarType::Float);
    return static_cast<float*>(keep(made).data_ptr());
  }
  // A tensor that must be as the forward pass gave it.
  View given(const Tensor& x, const char* name, const Sizes& sizes, ScalarType type, bool of_rows) {
    check_like(x, name, type);
    STD_TORCH_CHECK(sizes_of(x) == sizes, "attention: ", name, " has another shape than the forward pass gave");
    if (of_rows) return row_view_of(keep(torch::stable::contiguous(x)), packed);
    return view_of(keep(with_unit_rows(x)), packed);
  }
  Sizes o_sizes() const {
    Sizes sizes = sizes_of(q);
    sizes.back() = v.size(v.dim() - 1);
    return sizes;
  }
  Sizes row_sizes() const {
    return packed ? Sizes{q.size(1), q.size(0)} : Sizes{q.size(0), q.size(1), q.size(2)};
  }

  const Tensor q, k, v;
  const bool packed;

 private:
  void check_like(const Tensor& x, const char* name, ScalarType type) const {
    STD_TORCH_CHECK(x.scalar_type() == type, "attention: ", name, " has another dtype than expected");
    STD_TORCH_CHECK(x.is_cpu() == q.is_cpu() && x.get_device_index() == q.get_device_index(), "attention: ", name,
                    " must be on q's device");
  }
  template <class T>
  const T* vector(const Optional& x, const char* name, ScalarType type, int64_t size) {
    if (!x) return nullptr;
    check_like(*x, name, type);
    STD_TORCH_CHECK(x->dim() == 1 && x->size(0) == size, "attention: ", name, " must be of shape [", size, "]");
    return static_cast<const T*>(keep(torch::stable::contiguous(*x)).data_ptr());
  }
  Pairs pairs(const Tensor& x, const char* name, const int64_t (&shape)[4]) const {
    check_like(x, name, x.scalar_type());
    STD_TORCH_CHECK(x.dim() == 4, "attention: ", name, " must have 4 dimensions, got ", x.dim());
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(x.size(i) == 1 || x.size(i) == shape[i], "attention: ", name, " has size ", x.size(i),
                      " in dimension ", i, ", neither 1 nor ", shape[i]);
    Pairs out;
    out.data = x.data_ptr();
    out.batch = stride_of(x, 0), out.head = stride_of(x, 1), out.row = stride_of(x, 2), out.step = stride_of(x, 3);
    return out;
  }

  std::vector<Tensor> kept_;
};

}  // namespace

std::tuple<Tensor, Tensor> attention_forward_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& mask,
    const Optional& sinks, const Optional& alibi, const Optional& lengths_q, const Optional& lengths_k,
    const Optional& cu_q, const Optional& cu_k, const Optional& seed, double scale, bool causal, bool bottom_right,
    int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  const Launching on(q);
  AttentionForward call;
  Marshalled in(q, k, v,
                {bias, mask, sinks, alibi, lengths_q, lengths_k, cu_q, cu_k, seed, scale, causal, bottom_right,
                 window_left, window_right, softcap, dropout_p},
                call);
  const Tensor o = in.empty_as(q, in.o_sizes()), lse = in.empty(in.row_sizes(), ScalarType::Float);
  call.o = view_of(o, in.packed), call.lse = row_view_of(lse, in.packed);
  if (lse.numel() == 0) return {o, lse};
  prepare(call);
  plan_decode(call, on.place, is_decoding(call) && is_deterministic());
  if (call.splits > 0) {
    const int64_t rows = lse.numel();
    call.o_split = in.scratch({rows, call.splits, call.dim_v}), call.lse_split = in.scratch({rows, call.splits});
    Launching::check(attention_decode(call, on.place));
  } else {
    Launching::check(attention_forward(call, on.place));
  }
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward_cuda(
    const Tensor& d_o, const Optional& dlse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
    const Tensor& lse, const Optional& bias, const Optional& mask, const Optional& sinks, const Optional& alibi,
    const Optional& lengths_q, const Optional& lengths_k, const Optional& cu_q, const Optional& cu_k,
    const Optional& seed, double scale, bool causal, bool bottom_right, int64_t window_left, int64_t window_right,
    double softcap, double dropout_p, bool bias_grad) {
  const Launching on(q);
  AttentionBackward call;
  Marshalled in(q, k, v,
                {bias, mask, sinks, alibi, lengths_q, lengths_k, cu_q, cu_k, seed, scale, causal, bottom_right,
                 window_left, window_right, softcap, dropout_p},
                call);
  call.o = in.given(o, "o", in.o_sizes(), q.scalar_type(), false);
  call.d_o = in.given(d_o, "o's gradient", in.o_sizes(), q.scalar_type(), false);
  call.lse = in.given(lse, "lse", in.row_sizes(), ScalarType::Float, true);
  if (dlse) call.dlse = in.given(*dlse, "lse's gradient", in.row_sizes(), ScalarType::Float, true);
  const Tensor dq = in.empty_as(q, sizes_of(q)), dk = in.empty_as(k, sizes_of(k)), dv = in.empty_as(v, sizes_of(v));
  call.dq = view_of(dq, in.packed), call.dk = view_of(dk, in.packed), call.dv = view_of(dv, in.packed);
  const bool with_bias = bias && bias_grad;
  Tensor dbias = in.empty(with_bias ? sizes_of(*bias) : Sizes{0}, (with_bias ? *bias : q).scalar_type());
  Tensor dsinks = in.empty(sinks ? sizes_of(*sinks) : Sizes{0}, (sinks ? *sinks : q).scalar_type());
  prepare(call);
  call.rows = scratch_rows(call);
  const int64_t heads = int64_t(in.packed ? 1 : call.batch) * call.heads_q;
  call.log = in.scratch({heads, call.rows}), call.delta = in.scratch({heads, call.rows});
  if (is_general(call)) call.share = in.scratch({heads, call.rows});
  if (sinks && lse.numel() > 0) {
    call.dsinks = dsinks.data_ptr();
    call.sinks_parts = in.scratch({sinks_parts(call), call.heads_q}, true);
  } else if (sinks) {
    torch::stable::zero_(dsinks);
  }
  if (with_bias && lse.numel() > 0 && call.length_k > 0) {
    call.dbias = dbias.data_ptr();
    for (int i = 0; i < 4; ++i) call.bias_size[i] = int32_t(dbias.size(i));
    call.bias_splits = plan_bias(call, on.place);
    call.dbias_parts = in.scratch({call.bias_splits, dbias.numel()});
  } else if (with_bias) {
    torch::stable::zero_(dbias);
  }
  Launching::check(attention_backward(call, on.place));
  return {dq, dk, dv, dbias, dsinks};
}

}  // namespace fastseq::cuda

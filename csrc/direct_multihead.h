// A whole MultiheadAttention, forward (direct_multihead.cpp) and back (direct_multihead_gradient.cpp), called straight from
// Python: see direct.cpp. x [rows, E] in whichever layout it came, each projection one matrix of rows:
//
//   [q k v] = x Wᵀ + b  (one product where query, key and value are one tensor, two where key and value are)
//   o = softmax(q kᵀ / sqrt(D)) v, a head's D columns at a time, read and written where they lie;  y = o W_oᵀ + b_o
//
// The products are torch's own, by the functions that its compiler's code calls, looked up by name: where torch has them
// no more, the layer is declined.
#pragma once
#include <optional>

#include "direct_attention.h"

namespace fastseq {

using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle b, AtenTensorHandle x, AtenTensorHandle w,
                                    double beta, double alpha);
using MmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle x, AtenTensorHandle w);

// Set once by bind_multihead(). in_proj_weight, in_proj_bias; weight, bias.
inline PyObject* names[4];
inline AddmmOut addmm_out;
inline MmOut mm_out;

// Torch's products record nothing: they are called past its dispatch, but call other operators themselves.
class Unrecorded {
 public:
  Unrecorded() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~Unrecorded() { aoti_torch_grad_mode_set_enabled(before_); }
  Unrecorded(const Unrecorded&) = delete;
  Unrecorded& operator=(const Unrecorded&) = delete;

 private:
  const bool before_;
};

inline torch::stable::Tensor viewed(AtenTensorHandle x, std::initializer_list<int64_t> sizes,
                                    std::initializer_list<int64_t> strides, int64_t offset) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x, int64_t(sizes.size()), sizes.begin(), strides.begin(), offset, &made));
  return torch::stable::Tensor(made);
}

// A linear layer: rows [from, from + n) of its weights [.., K] and of its bias, if it has one. All contiguous.
struct Linear {
  Strided weight, bias;

  bool take(PyObject* parameters, PyObject* weight_name, PyObject* bias_name) {
    return weight.take(PyDict_GetItem(parameters, weight_name)) && weight.given() &&
           bias.take(PyDict_GetItem(parameters, bias_name));
  }
  bool fits(int64_t rows, int64_t K, int32_t code) {
    return weight.is({rows, K}) && weight.code == code && is_contiguous(weight.handle()) &&
           (!bias.given() || (bias.is({rows}) && bias.code == code && is_contiguous(bias.handle())));
  }
  void run(AtenTensorHandle x, AtenTensorHandle to, int64_t K, int64_t from, int64_t n) {
    const torch::stable::Tensor w = viewed(weight.handle(), {K, n}, {1, K}, from * K);
    if (bias.given()) {
      const torch::stable::Tensor b = viewed(bias.handle(), {n}, {1}, from);
      TORCH_ERROR_CODE_CHECK(addmm_out(to, b.get(), x, w.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(mm_out(to, x, w.get()));
    }
  }
};

// What the layer and its gradient have in common.
class Layer {
 protected:
  // Shapes and masks, once the tensors are taken; false: something speaks against the short way.
  bool fit(AttentionCall& call, bool batch_first) {
    rank_ = query_.rank;
    E_ = rank_ > 0 ? query_.sizes[rank_ - 1] : 0;
    if (E_ == 0 || heads_ < 1 || E_ % heads_ != 0 || (rank_ != 2 && rank_ != 3)) return false;
    for (Strided* x : {&query_, &key_, &value_})
      if (x->rank != rank_ || x->code != query_.code || x->sizes[rank_ - 1] != E_ || !is_contiguous(x->handle()))
        return false;
    for (int64_t i = 0; i < rank_; ++i)
      if (value_.sizes[i] != key_.sizes[i]) return false;
    by_sequence_ = rank_ == 2 || batch_first;
    const int time = rank_ == 3 && batch_first ? 1 : 0;
    call.batch = rank_ == 2 ? 1 : query_.sizes[1 - time];
    call.length_q = query_.sizes[time], call.length_k = key_.sizes[time];
    if (std::min({call.batch, call.length_q, call.length_k}) == 0) return false;
    if (rank_ == 3 && key_.sizes[1 - time] != call.batch) return false;
    rows_q_ = call.batch * call.length_q, rows_k_ = call.batch * call.length_k;
    dtype_ = dtype_of(query_.handle());
    call.dtype = attention_dtype(dtype_);
    call.heads_q = call.heads_k = heads_;
    call.dim = call.dim_v = E_ / heads_;
    call.scale = scale_of(call.dim), call.bottom_right = false;
    call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
    return take_pairs(call, bias_, mask_, query_.code);
  }
  int64_t products(const AttentionCall& call) const {
    return 2 * E_ * (E_ * (rows_q_ + rows_k_) + rows_q_ * call.length_k);
  }

  // One matrix for q, k and v, or two or three.
  void count(PyObject* query, PyObject* key, PyObject* value) {
    matrices_ = key != value ? 3 : query != key ? 2 : 1;
  }
  int64_t width_q() const { return matrices_ == 1 ? 3 * E_ : E_; }
  int64_t width_k() const { return matrices_ == 3 ? E_ : matrices_ == 2 ? 2 * E_ : 3 * E_; }

  // The heads of q, k and v (in this order), in matrices q, k and v of which some are one.
  void place(const AttentionCall& call, AttentionCall::View& q, AttentionCall::View& k, AttentionCall::View& v,
             void* at_q, void* at_k, void* at_v) const {
    q = heads_of(at_q, width_q(), 0, call.length_q, call);
    k = heads_of(at_k, width_k(), matrices_ == 1 ? E_ : 0, call.length_k, call);
    v = heads_of(at_v, width_k(), width_k() - E_, call.length_k, call);
  }
  // The heads in rows of `width` elements, from `column` on.
  AttentionCall::View heads_of(void* data, int64_t width, int64_t column, int64_t length,
                               const AttentionCall& call) const {
    data = static_cast<char*>(data) + column * int64_t(bytes_of(dtype_));
    if (by_sequence_) return {data, length * width, call.dim, width};
    return {data, width, call.dim, call.batch * width};
  }

  Linear in_, out_;
  Strided query_, key_, value_, bias_, mask_;
  long heads_;
  int matrices_;
  bool by_sequence_;  // a sequence's rows are neighbours, not a position's
  int64_t E_, rank_, rows_q_, rows_k_;
  Dtype dtype_;
};

}  // namespace fastseq

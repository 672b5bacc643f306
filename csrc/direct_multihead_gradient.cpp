// MultiheadAttention back: see direct_multihead.h.
//
//   do = dy W_o;  dW_o = dyᵀ o;  db_o = sum over rows of dy
//   [dq dk dv] from do, q, k, v, o and lse, each head's columns written where those of q, k and v lie
//   dx = [dq dk dv] W;  dW = [dq dk dv]ᵀ x;  db = sum over rows of [dq dk dv]
//
// for each matrix that was one product forward. Nothing is computed that nobody wants.
#include "cpu/column_sums.h"
#include "direct_multihead.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

class MultiheadGradient : Layer {
 public:
  // In which place each input is, among those saved and those that may want gradients.
  enum Saved { kQuery, kKey, kValue, kInWeight, kOutWeight, kBias, kMask, kQ, kK, kV, kO, kLse, kSaved };
  enum Wanted { kDQuery, kDKey, kDValue, kDInWeight, kDInBias, kDOutWeight, kDOutBias, kWanted };

  // False: something speaks against the short way. Arguments as `multihead_backward` below.
  bool take(PyObject* d_y, PyObject* saved, PyObject* settings, PyObject* wanted) {
    if (!PyTuple_Check(saved) || PyTuple_Size(saved) != kSaved || !PyTuple_Check(settings) ||
        PyTuple_Size(settings) != 3 || !PyTuple_Check(wanted) || PyTuple_Size(wanted) < kWanted)
      return false;
    PyObject* given[kSaved];
    for (int i = 0; i < kSaved; ++i) given[i] = PyTuple_GetItem(saved, i);
    for (int i = 0; i < kWanted; ++i) wants_[i] = PyTuple_GetItem(wanted, i) == Py_True;
    for (int i : {kKey, kValue})
      if (given[i] == Py_None) given[i] = given[i - 1];
    count(given[kQuery], given[kKey], given[kValue]);
    bool batch_first;
    if (!d_y_.take(d_y) || !d_y_.given() || !query_.take(given[kQuery]) || !query_.given() ||
        !key_.take(given[kKey]) || !value_.take(given[kValue]) || !in_.weight.take(given[kInWeight]) ||
        !out_.weight.take(given[kOutWeight]) || !bias_.take(given[kBias]) || !mask_.take(given[kMask]) ||
        !q_.take(given[kQ]) || !k_.take(given[kK]) || !v_.take(given[kV]) || !o_.take(given[kO]) ||
        !lse_.take(given[kLse]))
      return false;
    if (!read(PyTuple_GetItem(settings, 0), heads_) || !read(PyTuple_GetItem(settings, 1), batch_first) ||
        !read(PyTuple_GetItem(settings, 2), call_.causal) || !fit(call_, batch_first))
      return false;
    const int32_t code = query_.code;
    const bool inputs = wants_[kDQuery] || wants_[kDKey] || wants_[kDValue];
    if (in_.weight.given() ? !in_.fits(3 * E_, E_, code) : inputs) return false;
    if (!out_.weight.given() || !out_.fits(E_, E_, code)) return false;
    bool same = d_y_.rank == rank_ && d_y_.code == code;
    for (int64_t i = 0; same && i < rank_; ++i) same = d_y_.sizes[i] == query_.sizes[i];
    return same && is_matrix(q_, rows_q_, width_q()) && is_matrix(o_, rows_q_, E_) &&
           (matrices_ > 1 ? is_matrix(k_, rows_k_, width_k()) : !k_.given()) &&
           (matrices_ > 2 ? is_matrix(v_, rows_k_, E_) : !v_.given()) &&
           lse_.is({call_.batch, heads_, call_.length_q}) && is_contiguous(lse_.handle()) &&
           lse_.code == (dtype_ == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

  // A gradient, or None, for each input, and one None more; null where there was no memory.
  PyObject* run() {
    if (wants_[kDQuery]) made_[kDQuery] = empty(query_.sizes, rank_, dtype_);
    if (wants_[kDKey] && matrices_ > 1) made_[kDKey] = empty(key_.sizes, rank_, dtype_);
    if (wants_[kDValue] && matrices_ > 2) made_[kDValue] = empty(value_.sizes, rank_, dtype_);
    if (wants_[kDInWeight]) made_[kDInWeight] = empty({3 * E_, E_}, dtype_);
    if (wants_[kDInBias]) made_[kDInBias] = empty({3 * E_}, dtype_);
    if (wants_[kDOutWeight]) made_[kDOutWeight] = empty({E_, E_}, dtype_);
    if (wants_[kDOutBias]) made_[kDOutBias] = empty({E_}, dtype_);
    bool enough = false;
    compute(2 * products(call_), [&] {
      const Unrecorded guard;
      enough = differentiate();
    });
    PyObject* result = enough ? PyTuple_New(kWanted + 1) : nullptr;
    for (int i = 0; result && i <= kWanted; ++i) {
      PyObject* one = i < kWanted && made_[i] ? wrapped(*made_[i]) : Py_NewRef(Py_None);
      if (!one || PyTuple_SetItem(result, i, one) != 0) {
        Py_DECREF(result);
        return nullptr;
      }
    }
    return result;
  }

 private:
  bool is_matrix(Strided& x, int64_t rows, int64_t columns) const {
    return x.is({rows, columns}) && x.code == query_.code && is_contiguous(x.handle());
  }

  bool differentiate() {
    std::optional<Tensor> copy;
    if (!is_contiguous(d_y_.handle())) {
      AtenTensorHandle same;
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(d_y_.handle(), &same));
      copy = dense(Tensor(same));
    }
    const Tensor d_y = viewed(copy ? copy->get() : d_y_.handle(), {rows_q_, E_}, {E_, 1}, 0);
    if (made_[kDOutWeight])
      multiply(*made_[kDOutWeight], viewed(d_y.get(), {E_, rows_q_}, {1, E_}, 0), o_.handle());
    if (made_[kDOutBias]) sum(d_y, rows_q_, E_, made_[kDOutBias]->data_ptr());
    const Tensor d_o = empty({rows_q_, E_}, dtype_);
    multiply(d_o, d_y, viewed(out_.weight.handle(), {E_, E_}, {E_, 1}, 0).get());

    const Tensor dq = empty({rows_q_, width_q()}, dtype_);
    const Tensor dk = matrices_ > 1 ? empty({rows_k_, width_k()}, dtype_) : dq;
    const Tensor dv = matrices_ > 2 ? empty({rows_k_, E_}, dtype_) : dk;
    void* const at_k = matrices_ > 1 ? k_.data : q_.data;
    place(call_, call_.q, call_.k, call_.v, q_.data, at_k, matrices_ > 2 ? v_.data : at_k);
    place(call_, call_.dq, call_.dk, call_.dv, dq.data_ptr(), dk.data_ptr(), dv.data_ptr());
    call_.o = heads_of(o_.data, E_, 0, call_.length_q, call_);
    call_.d_o = heads_of(d_o.data_ptr(), E_, 0, call_.length_q, call_);
    call_.lse = {lse_.data, heads_ * call_.length_q, call_.length_q, 1};
    if (!FASTSEQ_DISPATCH(attention_backward, call_)) return false;

    project(query_, rows_q_, 0, matrices_ == 1 ? 3 : 1, dq, made_[kDQuery]);
    if (matrices_ > 1) project(key_, rows_k_, 1, matrices_ == 2 ? 2 : 1, dk, made_[kDKey]);
    if (matrices_ > 2) project(value_, rows_k_, 2, 1, dv, made_[kDValue]);
    return true;
  }
  // What `matrices` of W_q, W_k and W_v from the `first` on make of their products' gradient d [rows, matrices * E].
  void project(Strided& x, int64_t rows, int64_t first, int64_t matrices, const Tensor& d,
               const std::optional<Tensor>& dx) {
    const int64_t n = matrices * E_, from = first * E_;
    if (dx)
      multiply(viewed(dx->get(), {rows, E_}, {E_, 1}, 0), d,
               viewed(in_.weight.handle(), {n, E_}, {E_, 1}, from * E_).get());
    if (made_[kDInWeight])
      multiply(viewed(made_[kDInWeight]->get(), {n, E_}, {E_, 1}, from * E_), viewed(d.get(), {n, rows}, {1, n}, 0),
               viewed(x.handle(), {rows, E_}, {E_, 1}, 0).get());
    if (made_[kDInBias])
      sum(d, rows, n, static_cast<char*>(made_[kDInBias]->data_ptr()) + from * int64_t(bytes_of(dtype_)));
  }
  static void multiply(const Tensor& to, const Tensor& a, AtenTensorHandle b) {
    TORCH_ERROR_CODE_CHECK(mm_out(to.get(), a.get(), b));
  }
  void sum(const Tensor& x, long rows, long columns, void* to) const {
    const ColumnSums sums{call_.dtype, x.data_ptr(), rows, columns, to, int(torch::stable::get_num_threads())};
    FASTSEQ_DISPATCH(column_sums, sums);
  }

  AttentionBackward call_;
  Strided d_y_, q_, k_, v_, o_, lse_;
  bool wants_[kWanted];
  std::optional<Tensor> made_[kWanted];
};

}  // namespace

// multihead_backward(dy, (query, key, value, in_proj_weight, out_proj.weight, bias, mask, q, k, v, o, lse), (heads,
// batch_first, causal), wanted: tuple of bool) -> (dquery, dkey, dvalue, din_proj_weight, din_proj_bias, dout_proj.weight,
// dout_proj.bias, None), or None. key, value: None where they are what stands before them, whose gradient then is the sum;
// q, k, v, o and lse as multihead_forward made them. A gradient is None where `wanted`, in their order, says so.
PyObject* multihead_backward(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 4 || !mm_out || !nothing_speaks_against_it()) return decline();
  MultiheadGradient gradient;
  if (!gradient.take(args[0], args[1], args[2], args[3])) return decline();
  PyObject* made = gradient.run();
  return made ? made : decline();
} catch (const std::exception&) {
  return decline();
}

}  // namespace fastseq

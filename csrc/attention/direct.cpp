// Attention called straight from Python: see recurrent/direct.cpp.
#include "attention/direct.h"
#include "attention/ops.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

thread_local Workspace denominators;  // lse, which the kernel writes even where nobody asked for it

// The items of a tuple of `count`, borrowed; false where it is none.
bool unpack(PyObject* tuple, Py_ssize_t count, PyObject** to) {
  if (!PyTuple_CheckExact(tuple) || PyTuple_Size(tuple) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) to[i] = PyTuple_GetItem(tuple, i);
  return true;
}

// scale (None: 1 / sqrt(D), which the call has), causal, bottom_right, window (both sides, or None), softcap, grouped (k
// and v may have fewer heads). False: none of these.
bool read_settings(PyObject* settings, AttentionCall& call, bool& grouped) {
  PyObject *set[6], *window[2];
  return unpack(settings, 6, set) && (set[0] == Py_None || read(set[0], call.scale)) && read(set[1], call.causal) &&
         read(set[2], call.bottom_right) && read(set[4], call.softcap) && call.softcap >= 0 && read(set[5], grouped) &&
         (set[3] == Py_None || (unpack(set[3], 2, window) && read(window[0], call.window_left) &&
                                read(window[1], call.window_right)));
}

// q, k and v of four dimensions, bias and mask, and settings.
struct Heads {
  Strided q, k, v, bias, mask;

  // False: the fast path does not take the call.
  bool take(PyObject* const* tensors, PyObject* settings, AttentionCall& call) {
    if (!q.take(tensors[0]) || !k.take(tensors[1]) || !v.take(tensors[2]) || !bias.take(tensors[3]) ||
        !mask.take(tensors[4]) || q.rank != 4 || k.rank != 4 || v.rank != 4 || k.code != q.code || v.code != q.code)
      return false;
    call.batch = q.sizes[0], call.heads_q = q.sizes[1], call.length_q = q.sizes[2], call.dim = q.sizes[3];
    call.heads_k = k.sizes[1], call.length_k = k.sizes[2], call.dim_v = v.sizes[3];
    call.q = q.view(), call.k = k.view(), call.v = v.view();
    bool grouped;
    return complete(call, q, bias, mask) && read_settings(settings, call, grouped) &&
           k.is({call.batch, call.heads_k, call.length_k, call.dim}) &&
           v.is({call.batch, call.heads_k, call.length_k, call.dim_v}) && call.heads_q % call.heads_k == 0 &&
           (grouped || call.heads_q == call.heads_k) && q.has_unit_rows() && k.has_unit_rows() && v.has_unit_rows();
  }
};

// A new tensor of these sizes that lies in memory as x does; and its view.
PyObject* make_as(const Strided& x, const int64_t* sizes, Dtype dtype, View& view) {
  int64_t strides[kMostDimensions];
  strides_as(4, x.sizes, x.strides, sizes, strides);
  const Tensor tensor = empty(sizes, strides, 4, dtype);
  view = {tensor.data_ptr(), strides[0], strides[1], strides[2]};
  return wrapped(tensor);
}

int64_t products(const AttentionCall& call) {
  return call.batch * call.heads_q * call.length_q * call.length_k * (call.dim + call.dim_v);
}

}  // namespace

void attend_into(AttentionForward& call) {
  const size_t rows = size_t(call.batch * call.heads_q * call.length_q);
  if (!call.lse.data) call.lse.data = denominators.of(rows * bytes_of(accumulator_of(call.dtype)));
  call.lse = {call.lse.data, call.heads_q * call.length_q, call.length_q, 1};
  check_memory(run_attention(call));
}

// attend(q, k, v, bias, mask, settings) -> o, with gradients on (o, lse); or None. See Heads.
PyObject* attend(PyObject* const* args, Py_ssize_t count) {
  Heads given;
  AttentionForward call;
  if (count != 6 || !is_plain_call(true) || !given.take(args, args[5], call)) return decline();
  const bool with_lse = aoti_torch_grad_mode_is_enabled();
  const int64_t sizes[4] = {call.batch, call.heads_q, call.length_q, call.dim_v};
  Object o(make_as(given.q, sizes, call.dtype, call.o));
  Object lse(with_lse ? make(sizes, 3, accumulator_of(call.dtype), call.lse.data) : nullptr);
  if (!o.get() || (with_lse && !lse.get())) return nullptr;
  compute(products(call), [&] { attend_into(call); });
  return with_lse ? PyTuple_Pack(2, o.get(), lse.get()) : o.release();
}

// attend_kept(q, k, v, bias, mask, settings, sinks, lengths_q, lengths_k, block_table, k_scale, v_scale) -> o, without
// gradients, or None: by the operator's own function, which checks them.
PyObject* attend_kept(PyObject* const* args, Py_ssize_t count) {
  MaybeTensor x[12];
  AttentionCall call;
  bool grouped, plain = count == 12 && is_plain_call();
  for (Py_ssize_t i = 0; plain && i < 12; i += i == 4 ? 2 : 1)
    if (Borrowed borrowed; (plain = borrowed.take(args[i]))) x[i] = borrowed.tensor();
  if (!plain || !x[0] || !x[1] || !x[2] || x[0]->dim() == 0) return decline();
  call.scale = std::pow(double(x[0]->size(-1)), -0.5);
  if (!read_settings(args[5], call, grouped)) return decline();
  compute(kAlone, [&] {
    x[0] = std::get<0>(attention_forward_cpu(*x[0], *x[1], *x[2], x[3], x[4], x[6], {}, x[7], x[8], {}, {}, {}, x[9], x[10],
                                             x[11], {}, call.scale, call.causal, call.bottom_right, call.window_left,
                                             call.window_right, call.softcap, 0));
  });
  return wrapped(*x[0]);
}

// attend_backward(d_o, (q, k, v, bias, mask, o, lse), settings) -> (dq, dk, dv, None) or None.
PyObject* attend_backward(PyObject* const* args, Py_ssize_t count) {
  PyObject* tensors[7];
  Heads given;
  AttentionBackward call;
  Strided d_o, o, lse;
  if (count != 3 || !unpack(args[1], 7, tensors) || !is_plain_call() || !given.take(tensors, args[2], call) ||
      !d_o.take(args[0]) || !o.take(tensors[5]) || !lse.take(tensors[6]))
    return decline();
  const int64_t B = call.batch, H = call.heads_q, T = call.length_q, D = call.dim_v;
  if (!d_o.is({B, H, T, D}) || d_o.code != given.q.code || !o.is({B, H, T, D}) || o.code != given.q.code ||
      !o.has_unit_rows() || !lse.is({B, H, T}) || !is_contiguous(lse.handle()) ||
      dtype_of(lse.handle()) != accumulator_of(call.dtype))
    return decline();
  std::optional<Tensor> copy;  // of a sum's gradient, whose strides are 0
  call.d_o = d_o.view(), call.o = o.view(), call.lse = {lse.data, H * T, T, 1};
  if (!d_o.has_unit_rows()) {
    AtenTensorHandle same;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(d_o.handle(), &same));
    copy = dense(Tensor(same));
    call.d_o = {copy->data_ptr(), H * T * D, T * D, D};
  }
  Object dq(make_as(given.q, given.q.sizes, call.dtype, call.dq)),
      dk(make_as(given.k, given.k.sizes, call.dtype, call.dk)),
      dv(make_as(given.v, given.v.sizes, call.dtype, call.dv));
  if (!dq.get() || !dk.get() || !dv.get()) return nullptr;
  compute(3 * products(call), [&] { check_memory(FASTSEQ_DISPATCH(attention_backward, call)); });
  return PyTuple_Pack(4, dq.get(), dk.get(), dv.get(), Py_None);
}

}  // namespace fastseq

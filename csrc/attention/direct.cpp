// Attention of dense tensors, called straight from Python: see direct.cpp.
#include "attention/direct.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

thread_local Workspace denominators;  // lse, which the kernel writes even where nobody asked for it

// A limit for both sides, or None.
bool read_window(PyObject* object, AttentionCall& call) {
  if (object == Py_None) return true;
  return PyTuple_CheckExact(object) && PyTuple_Size(object) == 2 &&
         read(PyTuple_GetItem(object, 0), call.window_left) && read(PyTuple_GetItem(object, 1), call.window_right);
}

// Tensors: q, k and v of four dimensions, bias, mask. Settings: scale (None: 1 / sqrt(D)), causal, bottom_right, window,
// softcap, grouped (k and v may have fewer heads).
struct Heads {
  static constexpr Py_ssize_t kTensors = 5, kSettings = 6;

  Strided q, k, v, bias, mask;
  Dtype dtype;

  // False: the fast path does not take the call.
  bool take(PyObject* const* tensors, PyObject* const* settings, AttentionCall& call) {
    if (!q.take(tensors[0]) || !k.take(tensors[1]) || !v.take(tensors[2]) || !bias.take(tensors[3]) ||
        !mask.take(tensors[4]))
      return false;
    if (q.rank != 4 || k.rank != 4 || v.rank != 4 || k.code != q.code || v.code != q.code) return false;
    call.batch = q.sizes[0], call.heads_q = q.sizes[1], call.length_q = q.sizes[2], call.dim = q.sizes[3];
    call.heads_k = k.sizes[1], call.length_k = k.sizes[2], call.dim_v = v.sizes[3];
    bool grouped;
    if (!read(settings[1], call.causal) || !read(settings[2], call.bottom_right) || !read_window(settings[3], call) ||
        !read(settings[4], call.softcap) || !read(settings[5], grouped) || call.softcap < 0)
      return false;
    call.scale = scale_of(call.dim);
    if (settings[0] != Py_None && !read(settings[0], call.scale)) return false;
    if (std::min({call.batch, call.heads_q, call.length_q, call.heads_k, call.length_k, call.dim, call.dim_v}) == 0 ||
        !k.is({call.batch, call.heads_k, call.length_k, call.dim}) ||
        !v.is({call.batch, call.heads_k, call.length_k, call.dim_v}) || call.heads_q % call.heads_k != 0 ||
        (!grouped && call.heads_q != call.heads_k) || !q.has_unit_rows() || !k.has_unit_rows() || !v.has_unit_rows() ||
        !take_pairs(call, bias, mask, q.code))
      return false;
    dtype = dtype_of(q.handle());
    call.dtype = dtype;
    call.q = q.view(), call.k = k.view(), call.v = v.view();
    call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
    return true;
  }
};

View contiguous_view(void* data, int64_t heads, int64_t length, int64_t dim) {
  return {data, heads * length * dim, length * dim, dim};
}

int64_t products(const AttentionCall& call) {
  return call.batch * call.heads_q * call.length_q * call.length_k * (call.dim + call.dim_v);
}

// The items of a tuple of `count`, borrowed; false where it is none.
bool unpack(PyObject* tuple, Py_ssize_t count, PyObject** to) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) to[i] = PyTuple_GetItem(tuple, i);
  return true;
}

// o; with lse: (o, lse).
PyObject* run(PyObject* const* tensors, PyObject* const* settings, bool with_lse) {
  Heads given;
  AttentionForward call;
  if (!given.take(tensors, settings, call)) return decline();
  const int64_t sizes[4] = {call.batch, call.heads_q, call.length_q, call.dim_v};
  Object o(make_as(given.q, sizes, given.dtype, call.o));
  Object lse(with_lse ? make(sizes, 3, accumulator_of(given.dtype), call.lse.data) : nullptr);
  if (!o.get() || (with_lse && !lse.get())) return nullptr;
  compute(products(call), [&] { attend_into(call); });
  return with_lse ? PyTuple_Pack(2, o.get(), lse.get()) : o.release();
}

}  // namespace

void attend_into(AttentionForward& call) {
  if (!call.lse.data) {
    const size_t number = call.dtype == Dtype::f64 ? 8 : 4;
    call.lse.data = denominators.of(size_t(call.batch * call.heads_q * call.length_q) * number);
  }
  call.lse = {call.lse.data, call.heads_q * call.length_q, call.length_q, 1};
  require_scratch(run_attention(call));
}

// attend(q, k, v, bias, mask, scale, causal, bottom_right, window, softcap, grouped) -> o or None: see Heads.
PyObject* attend(PyObject* const* args, Py_ssize_t count) {
  if (count != Heads::kTensors + Heads::kSettings || !is_plain_call()) return decline();
  return run(args, args + Heads::kTensors, false);
}

// attend_forward(q, k, v, bias, mask, settings: tuple) -> (o, lse) or None: as `attend`, and gradients may be on.
PyObject* attend_forward(PyObject* const* args, Py_ssize_t count) {
  PyObject* settings[Heads::kSettings];
  if (count != Heads::kTensors + 1 || !unpack(args[5], Heads::kSettings, settings)) return decline();
  return is_plain_call(true) ? run(args, settings, true) : decline();
}

// attend_backward(d_o, (q, k, v, bias, mask, o, lse), settings: tuple) -> (dq, dk, dv, None) or None.
PyObject* attend_backward(PyObject* const* args, Py_ssize_t count) {
  PyObject *tensors[Heads::kTensors + 2], *settings[Heads::kSettings];
  if (count != 3 || !unpack(args[1], Heads::kTensors + 2, tensors) || !unpack(args[2], Heads::kSettings, settings) ||
      !is_plain_call())
    return decline();
  Heads given;
  AttentionBackward call;
  Strided d_o, o, lse;
  if (!given.take(tensors, settings, call) || !d_o.take(args[0]) || !o.take(tensors[5]) || !lse.take(tensors[6]))
    return decline();
  const int64_t B = call.batch, H = call.heads_q, T = call.length_q, D = call.dim_v;
  const int32_t number = given.dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  if (!d_o.is({B, H, T, D}) || d_o.code != given.q.code || !o.is({B, H, T, D}) || o.code != given.q.code ||
      !o.has_unit_rows() || !lse.is({B, H, T}) || !is_contiguous(lse.handle()) ||
      lse.code != number)
    return decline();
  std::optional<Tensor> copy;  // of a sum's gradient, whose strides are 0
  if (d_o.has_unit_rows()) {
    call.d_o = d_o.view();
  } else {
    AtenTensorHandle same;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(d_o.handle(), &same));
    copy = dense(Tensor(same));
    call.d_o = contiguous_view(copy->data_ptr(), H, T, D);
  }
  call.o = o.view(), call.lse = {lse.data, H * T, T, 1};
  Object dq(make_as(given.q, given.q.sizes, given.dtype, call.dq)),
      dk(make_as(given.k, given.k.sizes, given.dtype, call.dk)),
      dv(make_as(given.v, given.v.sizes, given.dtype, call.dv));
  if (!dq.get() || !dk.get() || !dv.get()) return nullptr;
  compute(3 * products(call), [&] { require_scratch(FASTSEQ_DISPATCH(attention_backward, call)); });
  return PyTuple_Pack(4, dq.get(), dk.get(), dv.get(), Py_None);
}

}  // namespace fastseq

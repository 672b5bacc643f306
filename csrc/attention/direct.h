// What the fast paths of attention share (direct.cpp, direct_multihead.cpp): tensors whose facts are asked once, and the
// settings of a call.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/cpu/attention.h"
#include "attention/layout.h"
#include "core/direct_objects.h"
#include "core/settings.h"

namespace fastseq {

// An ordinary tensor, its facts asked once, kept alive: other threads may run meanwhile.
class Strided {
 public:
  // False: no ordinary tensor. None is no tensor, and fine.
  bool take(PyObject* object) {
    if (!borrowed_.take(object) || !given()) return object == Py_None;
    Py_INCREF(object);
    kept_.reset(object);
    int64_t *its_sizes, *its_strides;
    rank = rank_of(handle());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle(), &its_sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle(), &its_strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle(), &code));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle(), &data));
    sizes = its_sizes, strides = its_strides;
    return true;
  }
  bool given() const { return borrowed_.impl; }
  AtenTensorHandle handle() { return borrowed_.handle(); }
  bool is(std::initializer_list<int64_t> shape) const {
    return rank == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), sizes);
  }
  View view() const { return {data, strides[0], strides[1], strides[2]}; }  // of four dimensions
  bool has_unit_rows() const { return strides[rank - 1] == 1 || sizes[rank - 1] == 1; }

  int64_t rank = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
  int32_t code = -1;
  void* data = nullptr;

 private:
  Borrowed borrowed_;
  Object kept_{nullptr};
};

// Exact types only: the operator judges whatever else converts to them.
inline bool read(PyObject* object, bool& to) {
  to = object == Py_True;
  return to || object == Py_False;
}
inline bool read(PyObject* object, double& to) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  to = PyFloat_AsDouble(object);
  return !PyErr_Occurred() && std::isfinite(to);
}
inline bool read(PyObject* object, int64_t& to) {
  if (!PyLong_CheckExact(object)) return false;
  to = PyLong_AsLong(object);
  return !PyErr_Occurred() && to >= -1;
}

// Bias or mask, broadcast where it has a size of 1 or no such dimension. False: it does not fit.
inline bool take_pairs(const AttentionCall& call, const Strided& x, Pairs& to) {
  if (!x.given()) return true;
  const int64_t wanted[4] = {call.batch, call.heads_q, call.length_q, call.length_k}, missing = 4 - x.rank;
  int64_t strides[4] = {};
  bool fits = missing >= 0;
  for (int64_t i = 0; fits && i < x.rank; ++i) {
    fits = x.sizes[i] == 1 || x.sizes[i] == wanted[missing + i];
    strides[missing + i] = x.sizes[i] == 1 ? 0 : x.strides[i];
  }
  to = {x.data, strides[0], strides[1], strides[2], strides[3]};
  return fits;
}

// The rest of a call whose sizes, limits and softcap are set: dtype, that of x, scale, threads, bias and mask. False: a
// size is 0, or bias or mask do not fit.
inline bool complete(AttentionCall& call, Strided& x, Strided& bias, const Strided& mask) {
  call.dtype = dtype_of(x.handle());
  call.scale = std::pow(double(call.dim), -0.5);
  call.threads = worth_asking(call, int(torch::stable::get_num_threads()));
  call.deterministic = is_deterministic();
  if (std::min({call.batch, call.heads_q, call.length_q, call.heads_k, call.length_k, call.dim, call.dim_v}) == 0 ||
      !take_pairs(call, bias, call.bias) || !take_pairs(call, mask, call.mask))
    return false;
  if (bias.given() && bias.code != x.code && bias.code != aoti_torch_dtype_float32()) return false;
  if (bias.given()) call.bias_dtype = dtype_of(bias.handle());
  return !mask.given() || mask.code == aoti_torch_dtype_bool();
}

// The call, into o, and into lse (contiguous) where it has memory.
void attend_into(AttentionForward& call);

}  // namespace fastseq

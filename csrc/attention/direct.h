// What the fast paths of attention share (direct.cpp, direct_multihead.cpp): tensors whose facts are asked once,
// and the settings of a call.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/layout.h"
#include "attention/cpu/attention.h"
#include "core/direct_objects.h"

namespace fastseq {

// An ordinary tensor, its facts asked once, kept alive: other threads may run meanwhile.
class Strided {
 public:
  // False: no ordinary tensor. None is no tensor, and fine.
  bool take(PyObject* object) {
    if (!object) return false;
    Py_INCREF(object);
    kept_.reset(object);
    if (!borrowed_.take(object)) return false;
    if (!given()) return true;
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
    bool same = rank == int64_t(shape.size());
    for (int64_t i = 0; same && i < rank; ++i) same = sizes[i] == shape.begin()[i];
    return same;
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

// A new tensor of these sizes, of four dimensions that lie in memory as x's do; and its view.
inline PyObject* make_as(const Strided& x, const int64_t* sizes, Dtype dtype, View& view) {
  int64_t strides[kMostDimensions];
  strides_as(4, x.sizes, x.strides, sizes, strides);
  const torch::stable::Tensor tensor = empty(sizes, strides, 4, dtype);
  view = {tensor.data_ptr(), strides[0], strides[1], strides[2]};
  return wrapped(tensor);
}

// Exact types only: whatever else converts to them is for the careful way to judge.
inline bool read(PyObject* object, bool& to) {
  to = object == Py_True;
  return to || object == Py_False;
}
inline bool read(PyObject* object, double& to) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  to = PyFloat_AsDouble(object);
  return !PyErr_Occurred() && std::isfinite(to);
}
inline bool read(PyObject* object, long& to) {
  if (!PyLong_CheckExact(object)) return false;
  to = PyLong_AsLong(object);
  return !PyErr_Occurred() && to >= -1;
}

inline double scale_of(int64_t dim) { return std::pow(double(dim), -0.5); }

// Bias or mask, broadcast where it has a size of 1 or no such dimension.
inline bool take_scores(const AttentionCall& call, const Strided& x, Pairs& to) {
  if (!x.given()) return true;
  const int64_t wanted[4] = {call.batch, call.heads_q, call.length_q, call.length_k}, missing = 4 - x.rank;
  if (missing < 0) return false;
  int64_t strides[4] = {};
  for (int64_t i = 0; i < x.rank; ++i) {
    if (x.sizes[i] != 1 && x.sizes[i] != wanted[missing + i]) return false;
    strides[missing + i] = x.sizes[i] == 1 ? 0 : x.strides[i];
  }
  to = {x.data, strides[0], strides[1], strides[2], strides[3]};
  return true;
}
inline bool take_pairs(AttentionCall& call, Strided& bias, const Strided& mask, int32_t code) {
  if (!take_scores(call, bias, call.bias) || !take_scores(call, mask, call.mask)) return false;
  if (bias.given() && bias.code != code && bias.code != aoti_torch_dtype_float32()) return false;
  if (bias.given()) call.bias_dtype = dtype_of(bias.handle());
  return !mask.given() || mask.code == aoti_torch_dtype_bool();
}

// The call, into o, and into lse (contiguous) where it has memory.
void attend_into(AttentionForward& call);

// What a kernel returns: whether there was memory for its scratch.
inline void require_scratch(bool enough) {
  if (!enough) throw std::runtime_error("attention: out of memory for the kernel's scratch");
}

}  // namespace fastseq

// What the functions called straight from Python share (direct*.cpp): Python objects into handles of tensors, new tensors
// into Python objects, and the question whether a tensor is no more than its numbers.
#pragma once
#include <Python.h>

#include <exception>

#include "direct.h"
#include "recurrent_marshal.h"

namespace fastseq {

constexpr int64_t kAlone = int64_t(1) << 18;  // more multiplications than this: let other threads run meanwhile

// Set once by bind(): the exact types that are ordinary tensors, and questions that must all be answered with something
// false. They run no Python code: an interrupt would be raised there, and lost. The names of the module
// torch.autograd.forward_ad. Interned names of attributes and parameters.
inline PyObject *tensor_type, *parameter_type, *questions, *forward_ad, *cdata_name, *is_neg_name, *level_name;

inline int64_t most_bf16_rows;  // AUTO has more than one answer for more: steps times batch

using Wrap = PyObject* (*)(void* const& tensor);  // an at::TensorBase
inline Wrap wrap;

// An owned reference.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  void reset(PyObject* object) {
    Py_XDECREF(object_);
    object_ = object;
  }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// A tensor borrowed from Python. impl is what an at::Tensor would hold: its address serves as a handle.
struct Borrowed {
  void* impl = nullptr;
  // False: not an ordinary tensor. None is no tensor, and fine.
  bool take(PyObject* object) {
    if (object == Py_None) return true;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) return false;
    Object address(PyObject_GetAttr(object, cdata_name));
    if (!address.get()) return false;
    impl = PyLong_AsVoidPtr(address.get());
    return impl != nullptr && lies_in_memory() && is_as_it_lies(object);
  }
  // Elements that strides lead to: neither a layout of another kind (oneDNN's, sparse ones), nor the zeros of forward
  // mode, which have no memory.
  bool lies_in_memory() {
    static const int32_t strided = aoti_torch_layout_strided();
    int32_t layout;
    int64_t elements;
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle(), &layout));
    if (layout != strided) return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle(), &data));
    if (data) return true;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle(), &elements));
    return elements == 0;
  }
  // Not negated in the reader's mind, as the imaginary part of a conjugate is: such a view has strides of 2.
  bool is_as_it_lies(PyObject* object) {
    int64_t elements;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle(), &elements));
    if (elements > 1 && is_contiguous(handle())) return true;
    Object negative(PyObject_CallMethodObjArgs(object, is_neg_name, nullptr));
    return negative.get() == Py_False;
  }
  AtenTensorHandle handle() { return impl ? reinterpret_cast<AtenTensorHandle>(&impl) : nullptr; }
};

// Whether tangents go along with tensors, which they do without gradients too.
inline bool in_forward_mode() {
  PyObject* level = PyDict_GetItem(forward_ad, level_name);
  return !level || PyLong_AsLong(level) >= 0;
}

// with_gradients: but for the first question, whether gradients are on.
inline bool nothing_speaks_against_it(bool with_gradients = false) {
  if (!questions || in_forward_mode()) return false;
  const Py_ssize_t count = PyTuple_Size(questions);
  for (Py_ssize_t i = with_gradients; i < count; ++i) {
    Object answer(PyObject_CallNoArgs(PyTuple_GetItem(questions, i)));
    if (!answer.get() || PyObject_IsTrue(answer.get()) != 0) return false;
  }
  return true;
}

inline PyObject* wrapped(const torch::stable::Tensor& tensor) {
  return wrap(*reinterpret_cast<void* const*>(tensor.get()));
}

// A new contiguous tensor, and where its elements are.
inline PyObject* make(const int64_t* sizes, int64_t rank, Dtype dtype, void*& data) {
  torch::stable::Tensor tensor = empty(sizes, rank, dtype);
  data = tensor.data_ptr();
  return wrapped(tensor);
}

template <class Work>
void compute(int64_t products, const Work& work) {
  if (products < kAlone) return work();
  std::exception_ptr failure;
  Py_BEGIN_ALLOW_THREADS
  try {
    work();
  } catch (...) {
    failure = std::current_exception();
  }
  Py_END_ALLOW_THREADS
  if (failure) std::rethrow_exception(failure);
}

template <class Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// None in place of whatever went wrong.
inline PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

inline const char* text_of(PyObject* object) { return PyUnicode_AsUTF8AndSize(object, nullptr); }

// direct_training.cpp
PyObject* undisturbed(PyObject*, PyObject*);
PyObject* layer_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* layer_gradient(PyObject*, PyObject* const* args, Py_ssize_t count);

// direct_attention.cpp
PyObject* attend(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* attend_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* attend_backward(PyObject*, PyObject* const* args, Py_ssize_t count);
// direct_multihead.cpp, direct_multihead_gradient.cpp
PyObject* multihead(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* multihead_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* multihead_backward(PyObject*, PyObject* const* args, Py_ssize_t count);
void bind_multihead();

}  // namespace fastseq

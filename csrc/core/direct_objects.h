// What the functions called straight from Python share (direct*.cpp): Python objects into handles of tensors, new tensors
// into Python objects, and the question whether a tensor is no more than its numbers.
#pragma once
#include <Python.h>
#include <dlfcn.h>

#include <cstring>
#include <exception>
#include <memory>

#include "recurrent/marshal.h"

namespace fastseq {

constexpr int64_t kAlone = int64_t(1) << 18;  // more multiplications than this: let other threads run meanwhile

// Set once by bind(): the exact types of ordinary tensors, and a question whose answer must be something false. It runs no
// Python code: an interrupt would be raised there, and lost. The names of the modules torch.autograd.forward_ad and
// torch.autograd.profiler. Interned names in these.
inline PyObject *tensor_type, *parameter_type, *question, *forward_ad, *profiler, *level_name, *profiled_name;

// Also set by bind(): where a Python Tensor has the address of its TensorImpl, where that has its set of dispatch keys,
// and this set of an ordinary CPU tensor, made outside and inside of inference mode.
inline int64_t impl_offset, keys_offset;
inline uint64_t plain_keys[2];

// Dispatch keys that may differ from a new thread's: of those included what inference mode changes, of those excluded all
// but autocast's.
inline uint64_t inference_keys, autocast_keys;

using Wrap = PyObject* (*)(void* const& tensor);  // an at::TensorBase
inline Wrap wrap;

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;  // an owned reference

inline void* impl_of(PyObject* tensor) {
  void* impl;
  std::memcpy(&impl, reinterpret_cast<const char*>(tensor) + impl_offset, sizeof impl);
  return impl;
}

// A tensor borrowed from Python. impl is what an at::Tensor would hold: its address serves as a handle.
struct Borrowed {
  void* impl = nullptr;
  // False: not an ordinary tensor. None is no tensor, and accepted. This is the one place that decides whether a tensor
  // may be read past torch's dispatcher. Its dispatch keys answer for the device, the layout, the negative bit, zero
  // tensors, names, wrappers of transforms and subclasses with a dispatch of their own; its type answers for subclasses
  // with a torch function; its storage may have been freed.
  bool take(PyObject* object) {
    if (!object || object == Py_None) return object;
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != tensor_type && type != parameter_type) return false;
    impl = impl_of(object);
    return impl && has_plain_keys() && has_memory(handle());
  }
  bool has_plain_keys() const {
    uint64_t keys;
    std::memcpy(&keys, static_cast<const char*>(impl) + keys_offset, sizeof keys);
    return keys == plain_keys[0] || keys == plain_keys[1];
  }
  AtenTensorHandle handle() { return impl ? reinterpret_cast<AtenTensorHandle>(&impl) : nullptr; }
  OptionalTensor tensor() {  // which owns it too
    AtenTensorHandle own = nullptr;
    if (impl) TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle(), &own));
    return impl ? OptionalTensor(torch::stable::Tensor(own)) : OptionalTensor();
  }
};

// Whether tangents go along with tensors, which they do without gradients too.
inline bool in_forward_mode() {
  PyObject* level = PyDict_GetItem(forward_ad, level_name);
  return !level || PyLong_AsLong(level) >= 0;
}

// What has changed of this thread's dispatch keys, those included and those excluded; null where torch has them elsewhere.
inline const uint64_t* changed_keys() {
  static void* const library = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  static thread_local const void* const keys =  // the address of the thread's own
      library ? dlsym(library, "_ZN3c104impl26raw_local_dispatch_key_setE") : nullptr;
  return static_cast<const uint64_t*>(keys);
}

// with_gradients: whether gradients may be on. Transforms, dispatch modes and tracing include keys of their own, and
// autocast no longer excludes its own.
inline bool is_plain_call(bool with_gradients = false) {
  const uint64_t* changed = changed_keys();
  if (!question || !changed || changed[0] & ~inference_keys || changed[1] & autocast_keys || in_forward_mode()) return false;
  if (!with_gradients && aoti_torch_grad_mode_is_enabled()) return false;
  if (PyDict_GetItem(profiler, profiled_name) != Py_False) return false;
  Object answer(PyObject_CallNoArgs(question));
  return answer.get() && PyObject_IsTrue(answer.get()) == 0;
}

inline PyObject* wrapped(const torch::stable::Tensor& tensor) {
  return wrap(*reinterpret_cast<void* const*>(tensor.get()));
}

// A new tensor, contiguous or of these dense strides, and where its elements are.
inline PyObject* make(const int64_t* sizes, int64_t rank, Dtype dtype, void*& data, const int64_t* strides = nullptr) {
  torch::stable::Tensor tensor = strides ? empty(sizes, strides, rank, dtype) : empty(sizes, rank, dtype);
  data = tensor.data_ptr();
  return wrapped(tensor);
}

template <class Work>
void compute(int64_t products, const Work& work) {
  if (products < kAlone) return work();
  const std::unique_ptr<PyThreadState, void (*)(PyThreadState*)> without_lock(PyEval_SaveThread(), PyEval_RestoreThread);
  work();
}

// None: the caller takes the general path, which has the checks and the messages.
inline PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

// A function of the module: it declines arguments that do not fit. Any other failure is raised, for to decline it would
// run the call a second time. A null result has its Python error set.
using Body = PyObject* (*)(PyObject* const* args, Py_ssize_t count);
template <Body body>
PyObject* guarded(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    return body(args, count);
  } catch (const BadArgument&) {
    return decline();
  } catch (const std::exception& error) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <Body body>
PyMethodDef method(const char* name) {
  auto function = reinterpret_cast<void (*)()>(&guarded<body>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

inline const char* text_of(PyObject* object) { return PyUnicode_AsUTF8AndSize(object, nullptr); }

// attention/direct.cpp
PyObject* attend(PyObject* const* args, Py_ssize_t count);
PyObject* attend_kept(PyObject* const* args, Py_ssize_t count);
PyObject* attend_backward(PyObject* const* args, Py_ssize_t count);
// attention/direct_multihead.cpp
PyObject* multihead(PyObject* const* args, Py_ssize_t count);
void bind_multihead();

}  // namespace fastseq

// One step of a small model takes 1 us of arithmetic and, through an operator, 4 us of finding out what was called:
// matching the schema, boxing each tensor, handing the lock over. These functions take the Python objects and ask only
// what has an influence here. They return None for a call that they do not take; the caller then takes the operator, which
// has the checks and the messages.
//
// Three assumptions beyond torch's stable interface. A Python Tensor has the address of its TensorImpl at a fixed place,
// and an at::Tensor, which an AtenTensorHandle points to, is one pointer to that. A TensorImpl has its set of dispatch
// keys at a fixed place. THPVariable_Wrap, which torch exports under a name that holds its signature, makes a Python object
// of an at::TensorBase. fastseq/direct.py tries each at import.
#include <cstring>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "core/direct_objects.h"
#include "recurrent/inference.h"

namespace fastseq {
namespace {

constexpr Py_ssize_t kMostWeights = 64;  // a larger stack gains nothing from this

PyObject* version_name;  // set once by bind()

// Tensors that are kept alive: what they came from may change while other threads run.
class BorrowedList {
 public:
  BorrowedList() = default;
  BorrowedList(const BorrowedList&) = delete;
  BorrowedList& operator=(const BorrowedList&) = delete;
  ~BorrowedList() {
    for (int64_t i = 0; i < count; ++i) Py_DECREF(kept_[i]);
  }
  bool add(PyObject* tensor) {
    if (count == kMostWeights || tensor == Py_None) return false;
    Py_INCREF(tensor);
    kept_[count] = tensor;
    Borrowed& borrowed = tensors_[count++];
    const bool taken = borrowed.take(tensor);
    handles[count - 1] = borrowed.handle();
    return taken;
  }
  bool add_all(PyObject* list) {
    if (!PyList_Check(list)) return false;
    for (Py_ssize_t i = 0; i < PyList_Size(list); ++i)
      if (!add(PyList_GetItem(list, i))) return false;
    return true;
  }
  // The values of a dict whose keys are these names, in this order. None, a cell's absent bias, is skipped.
  bool add_named(PyObject* dict, PyObject* names) {
    if (!PyDict_Check(dict) || !PyList_Check(names) || PyDict_Size(dict) != PyList_Size(names)) return false;
    PyObject *name, *tensor;
    for (Py_ssize_t i = 0, at = 0; PyDict_Next(dict, &at, &name, &tensor); ++i) {
      PyObject* expected = PyList_GetItem(names, i);
      if (name != expected && PyObject_RichCompareBool(name, expected, Py_EQ) != 1) return false;
      if (tensor != Py_None && !add(tensor)) return false;
    }
    return true;
  }
  AtenTensorHandle handles[kMostWeights];
  int64_t count = 0;

 private:
  PyObject* kept_[kMostWeights];
  Borrowed tensors_[kMostWeights];
};

bool same_isa(PyObject* name) {
  const char* isa = text_of(name);
  return isa && !std::strcmp(isa, isa_name(active_isa()));
}

// Whether a tensor (or None) is the i-th source, at its address in memory and of its version (None: it has none).
bool is_still(PyObject* tensor, PyObject* sources, PyObject* addresses, PyObject* versions, Py_ssize_t i) {
  if (tensor != PyTuple_GetItem(sources, i)) return false;
  if (tensor == Py_None) return true;
  void *impl = impl_of(tensor), *data = nullptr;
  if (!impl) return false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(&impl), &data));
  PyObject* version = PyTuple_GetItem(versions, i);
  if (data != PyLong_AsVoidPtr(PyTuple_GetItem(addresses, i))) return false;
  if (version == Py_None) return true;
  Object now(PyObject_GetAttr(tensor, version_name));
  return now.get() && PyLong_AsLongLong(now.get()) == PyLong_AsLongLong(version);
}

// infer(weights, names, scales: list or None, x, h0, c0, cell, layout, num_layers, bidirectional, hidden, outputs)
// -> (y, h_n[, c_n]), of a cell (h_n[, c_n]), or None. weights: a list, or the dict of parameters that has just these names,
// in this order; layout as layout_of's; hidden and outputs go with packed weights, else 0.
PyObject* infer(PyObject* const* args, Py_ssize_t count) {
  if (count != 12 || !is_plain_call()) return decline();
  BorrowedList weights, scales;
  const bool named = PyDict_Check(args[0]);
  if (!(named ? weights.add_named(args[0], args[1]) : weights.add_all(args[0])) ||
      (args[2] != Py_None && !scales.add_all(args[2])))
    return decline();
  Borrowed x, h0, c0;
  if (args[3] == Py_None || !x.take(args[3]) || !h0.take(args[4]) || !c0.take(args[5])) return decline();
  const char *cell = text_of(args[6]), *layout = text_of(args[7]);
  if (!cell || !layout) return decline();
  const StackCall call{x.handle(), h0.handle(), c0.handle(), weights.handles, weights.count, scales.handles,
                       scales.count, cell_of(cell), layout_of(layout), PyLong_AsLongLong(args[8]),
                       PyObject_IsTrue(args[9]) == 1, PyLong_AsLongLong(args[10]), PyLong_AsLongLong(args[11])};
  Stack stack(call);
  if (stack.dtype() == Dtype::bf16 && stack.rows() > most_bf16_rows) return decline();
  void *to_y = nullptr, *to_h, *to_c = nullptr;
  Object y(stack.is_cell() ? nullptr : make(stack.y_sizes, stack.rank(), stack.dtype(), to_y, stack.y_strides));
  Object h_n(make(stack.h_sizes, stack.rank(), stack.dtype(), to_h));
  Object c_n(stack.lstm() ? make(stack.c_sizes, stack.rank(), stack.dtype(), to_c) : nullptr);
  if ((!stack.is_cell() && !y.get()) || !h_n.get() || (stack.lstm() && !c_n.get())) return nullptr;
  compute(stack.products(), [&] { stack.run(to_y, to_h, to_c); });
  if (stack.is_cell()) return stack.lstm() ? PyTuple_Pack(2, h_n.get(), c_n.get()) : PyTuple_Pack(1, h_n.get());
  return stack.lstm() ? PyTuple_Pack(3, y.get(), h_n.get(), c_n.get()) : PyTuple_Pack(2, y.get(), h_n.get());
}

// unchanged(tensors: list, sources, addresses, versions: tuples, isa) -> bool: whether each tensor is still its source,
// and the instruction set is this one.
PyObject* unchanged(PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyList_Check(args[0])) return decline();
  const Py_ssize_t length = PyList_Size(args[0]);
  bool same = PyTuple_Size(args[1]) == length && same_isa(args[4]);
  for (Py_ssize_t i = 0; same && i < length; ++i)
    same = is_still(PyList_GetItem(args[0], i), args[1], args[2], args[3], i);
  PyErr_Clear();
  return PyBool_FromLong(same);
}

// bind(Tensor, Parameter, questions, forward_ad: dict, most_bf16_rows, impl_offset, keys_offset, plain_keys: pair of int)
// -> bool: False where torch has no THPVariable_Wrap as we know it.
PyObject* bind(PyObject* const* args, Py_ssize_t count) {
  if (count != 8 || !PyTuple_Check(args[2]) || !PyDict_Check(args[3]) || !PyTuple_Check(args[7])) {
    PyErr_SetString(PyExc_TypeError,
                    "bind(Tensor, Parameter, questions: tuple, forward_ad: dict, most_bf16_rows, impl_offset, "
                    "keys_offset, plain_keys: tuple)");
    return nullptr;
  }
  most_bf16_rows = PyLong_AsLongLong(args[4]);
  impl_offset = PyLong_AsLongLong(args[5]);
  keys_offset = PyLong_AsLongLong(args[6]);
  for (int i = 0; i < 2; ++i) plain_keys[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(args[7], i));
  if (PyErr_Occurred()) return nullptr;
#if defined(__linux__)
  if (void* library = dlopen("libtorch_python.so", RTLD_LAZY | RTLD_NOLOAD))
    wrap = reinterpret_cast<Wrap>(dlsym(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE"));
#endif
  if (!wrap) Py_RETURN_FALSE;
  if (!version_name) version_name = PyUnicode_InternFromString("_version");
  if (!level_name) level_name = PyUnicode_InternFromString("_current_level");
  bind_multihead();
  for (Py_ssize_t i = 0; i < 4; ++i) Py_INCREF(args[i]);  // for as long as the process lives
  tensor_type = args[0], parameter_type = args[1], questions = args[2], forward_ad = args[3];
  Py_RETURN_TRUE;
}

// described(tensor) -> (address of its data, sizes, a new tensor of its kind, the address of that one's data), or None
// where it is not an ordinary tensor: what the assumptions above lead to, for a trial.
PyObject* described(PyObject* const* args, Py_ssize_t count) {
  Borrowed borrowed;
  if (count != 1 || !tensor_type || args[0] == Py_None || !borrowed.take(args[0])) return decline();
  const int64_t rank = rank_of(borrowed.handle()), *sizes = sizes_of(borrowed.handle());
  Object shape(PyTuple_New(Py_ssize_t(rank)));
  for (int64_t i = 0; i < rank; ++i) PyTuple_SetItem(shape.get(), Py_ssize_t(i), PyLong_FromLongLong(sizes[i]));
  void* data;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(borrowed.handle(), &data));
  Object address(PyLong_FromVoidPtr(data)), made(make(sizes, rank, dtype_of(borrowed.handle()), data));
  Object its(PyLong_FromVoidPtr(data));
  return PyTuple_Pack(4, address.get(), shape.get(), made.get(), its.get());
}

}  // namespace

PyMethodDef direct_methods[] = {method<infer>("infer"),
                                method<unchanged>("unchanged"),
                                {"is_plain", is_plain, METH_NOARGS, nullptr},
                                method<layer_forward>("layer_forward"),
                                method<layer_gradient>("layer_gradient"),
                                method<attend>("attend"),
                                method<attend_backward>("attend_backward"),
                                method<multihead>("multihead"),
                                method<bind>("bind"),
                                method<described>("described"),
                                {nullptr, nullptr, 0, nullptr}};

}  // namespace fastseq

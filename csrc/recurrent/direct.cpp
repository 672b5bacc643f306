// One step of a small model takes 1 us of arithmetic and, through an operator, 4 us of finding out what was called:
// matching the schema, boxing each tensor, handing the lock over. These functions are handed the Python objects and
// ask only what has an influence here. They return None for a call that they do not take, and the caller takes the
// operator, which has all the answers and all the messages.
//
// Three assumptions beyond torch's stable interface. A Python Tensor has the address of its TensorImpl at a fixed place,
// and an at::Tensor, which an AtenTensorHandle points to, is one pointer to that. A TensorImpl has its set of dispatch
// keys at a fixed place. THPVariable_Wrap, which torch exports under a name that holds its signature, makes a Python object
// of an at::TensorBase. fastseq/direct.py tries each at import.
#include <cstring>
#include <vector>
#if defined(__linux__)
#include <dlfcn.h>
#endif

#include "core/direct_objects.h"
#include "recurrent/inference.h"

namespace fastseq {
namespace {

constexpr Py_ssize_t kMostWeights = 64;  // a larger stack gains nothing from this

// Set once by bind(): interned names of attributes and parameters.
PyObject *version_name, *cell_names[4];

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
  // The values of a dict whose keys are these names, in this order.
  bool add_named(PyObject* dict, PyObject* names) {
    if (!PyDict_Check(dict) || !PyList_Check(names) || PyDict_Size(dict) != PyList_Size(names)) return false;
    PyObject *name, *tensor;
    for (Py_ssize_t i = 0, at = 0; PyDict_Next(dict, &at, &name, &tensor); ++i) {
      PyObject* expected = PyList_GetItem(names, i);
      if (name != expected && PyObject_RichCompareBool(name, expected, Py_EQ) != 1) return false;
      if (!add(tensor)) return false;
    }
    return true;
  }
  AtenTensorHandle handles[kMostWeights];
  int64_t count = 0;

 private:
  PyObject* kept_[kMostWeights];
  Borrowed tensors_[kMostWeights];
};

// The results of a stack of layers.
PyObject* run(const StackCall& call) {
  Stack layers(call);
  if (layers.dtype() == Dtype::bf16 && layers.rows() > most_bf16_rows) return decline();
  const bool lstm = layers.lstm();
  void *to_y, *to_h, *to_c = nullptr;
  Object y(make(layers.y_sizes, layers.rank(), layers.dtype(), to_y));
  Object h_n(make(layers.h_sizes, layers.rank(), layers.dtype(), to_h));
  Object c_n(lstm ? make(layers.c_sizes, layers.rank(), layers.dtype(), to_c) : nullptr);
  if (!y.get() || !h_n.get() || (lstm && !c_n.get())) return nullptr;
  compute(layers.products(), [&] { layers.run(to_y, to_h, to_c); });
  return lstm ? PyTuple_Pack(3, y.get(), h_n.get(), c_n.get()) : PyTuple_Pack(2, y.get(), h_n.get());
}

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

// What a call of a stack is given: x, h0, c0, and the arguments from its cell on.
PyObject* run_on(const BorrowedList& weights, const BorrowedList& scales, PyObject* const* states,
                 PyObject* const* shape, PyObject* const* sizes) {
  Borrowed x, h0, c0;
  if (states[0] == Py_None || !x.take(states[0]) || !h0.take(states[1]) || !c0.take(states[2])) return decline();
  const char* cell = text_of(shape[0]);
  if (!cell) return decline();
  return run({x.handle(), h0.handle(), c0.handle(), weights.handles, weights.count, scales.handles, scales.count,
              cell_of(cell), PyLong_AsLongLong(shape[1]), PyObject_IsTrue(shape[2]) == 1, PyObject_IsTrue(shape[3]) == 1,
              sizes ? PyLong_AsLongLong(sizes[0]) : 0, sizes ? PyLong_AsLongLong(sizes[1]) : 0});
}

// stack(x, h0, c0, weights: list, scales: list, cell, num_layers, bidirectional, batch_first[, hidden, outputs])
// -> (y, h_n[, c_n]) or None
PyObject* stack(PyObject* const* args, Py_ssize_t count) {
  if ((count != 9 && count != 11) || !is_plain_call()) return decline();
  BorrowedList weights, scales;
  if (!weights.add_all(args[3]) || !scales.add_all(args[4])) return decline();
  return run_on(weights, scales, args, args + 5, count > 9 ? args + 9 : nullptr);
}

// layer(parameters: dict, names: list, x, h0, c0, cell, num_layers, bidirectional, batch_first): as `stack`, the weights
// being the parameters; None too where these are not just the ones named, in their order.
PyObject* layer(PyObject* const* args, Py_ssize_t count) {
  BorrowedList weights, scales;
  if (count != 9 || !is_plain_call() || !weights.add_named(args[0], args[1])) return decline();
  return run_on(weights, scales, args + 2, args + 5, nullptr);
}

// What packed weights were made from, and the call that reads them, for the layers of one module.
struct Plan {
  std::vector<PyObject*> owned;  // what is pointed to below
  PyObject *sources, *addresses, *versions, *isa, *options[4];
  BorrowedList weights, scales;
  bool taken;

  explicit Plan(PyObject* const* args)
      : owned(args, args + 10), sources(args[0]), addresses(args[1]), versions(args[2]), isa(args[3]),
        options{args[6], args[7], args[8], args[9]} {
    for (PyObject* object : owned) Py_INCREF(object);
    taken = weights.add_all(args[4]) && scales.add_all(args[5]);
  }
  ~Plan() {
    for (PyObject* object : owned) Py_DECREF(object);
  }
};
constexpr const char* kPlan = "fastseq.plan";
Plan* plan_of(PyObject* capsule) { return static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlan)); }

// plan(sources, addresses, versions, isa, weights, scales, cell, num_layers, bidirectional, batch_first) -> plan or None:
// the first four as `unchanged` has them, the others as `stack`.
PyObject* plan(PyObject* const* args, Py_ssize_t count) {
  if (count != 10 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) return decline();
  Plan* made = new Plan(args);
  PyObject* capsule = PyCapsule_New(made, kPlan, [](PyObject* object) { delete plan_of(object); });
  if (!capsule) delete made;
  if (!capsule || made->taken) return capsule;
  Py_DECREF(capsule);
  return decline();
}

// planned(plan, parameters: dict, x, h0, c0, cell, num_layers, bidirectional, batch_first, hidden, outputs): as `stack`,
// with the plan's weights; None too where one of the parameters, or an option, is no longer what the plan was made for.
PyObject* planned(PyObject* const* args, Py_ssize_t count) {
  if (count != 11) return decline();
  Plan* made = plan_of(args[0]);
  if (!made || !PyDict_Check(args[1]) || !same_isa(made->isa)) return decline();
  for (int i = 0; i < 4; ++i)
    if (args[5 + i] != made->options[i]) return decline();
  Py_ssize_t position = 0, i = 0;
  PyObject *name, *tensor;
  const Py_ssize_t length = PyTuple_Size(made->sources);
  if (PyDict_Size(args[1]) != length) return decline();
  for (; PyDict_Next(args[1], &position, &name, &tensor); ++i)
    if (i >= length || !is_still(tensor, made->sources, made->addresses, made->versions, i)) return decline();
  if (!is_plain_call()) return decline();
  return run_on(made->weights, made->scales, args + 2, args + 5, args + 9);
}

// One step of a cell; matrices packed for `hidden` units, or 0.
PyObject* run_cell(PyObject* const (&given)[9], PyObject* cell, int64_t hidden) {
  Borrowed t[9];
  for (int i = 0; i < 9; ++i)
    if (!t[i].take(given[i])) return decline();
  const char* name = text_of(cell);
  if (!name || !t[0].impl || !t[3].impl || !t[4].impl) return decline();
  CellStep step({t[0].handle(), t[1].handle(), t[2].handle(), t[3].handle(), t[4].handle(), t[5].handle(),
                 t[6].handle(), t[7].handle(), t[8].handle(), cell_of(name), hidden});
  const bool lstm = step.lstm();
  void *to_h, *to_c = nullptr;
  Object h_n(make(step.sizes, step.rank(), step.dtype(), to_h));
  Object c_n(lstm ? make(step.sizes, step.rank(), step.dtype(), to_c) : nullptr);
  if (!h_n.get() || (lstm && !c_n.get())) return nullptr;
  compute(step.products(), [&] { step.run(to_h, to_c); });
  return lstm ? PyTuple_Pack(2, h_n.get(), c_n.get()) : PyTuple_Pack(1, h_n.get());
}

// cell(x, h, c, w_ih, w_hh, b_ih, b_hh, s_ih, s_hh, cell[, hidden]) -> (h_n[, c_n]) or None
PyObject* cell(PyObject* const* args, Py_ssize_t count) {
  if ((count != 10 && count != 11) || !is_plain_call()) return decline();
  return run_cell({args[0], args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8]}, args[9],
                  count > 10 ? PyLong_AsLongLong(args[10]) : 0);
}

// cell_layer(parameters: dict, x, h, c, cell): as `cell`, the weights being the parameters; None too where one of the
// four is not among them.
PyObject* cell_layer(PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyDict_Check(args[0]) || !is_plain_call()) return decline();
  PyObject* weights[4];
  for (int i = 0; i < 4; ++i)
    if (!(weights[i] = PyDict_GetItem(args[0], cell_names[i]))) return decline();
  return run_cell({args[1], args[2], args[3], weights[0], weights[1], weights[2], weights[3], Py_None, Py_None}, args[4],
                  0);
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
  const char* names[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  for (int i = 0; i < 4; ++i)
    if (!cell_names[i]) cell_names[i] = PyUnicode_InternFromString(names[i]);
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

PyMethodDef direct_methods[] = {method<stack>("stack"),
                                method<layer>("layer"),
                                method<cell_layer>("cell_layer"),
                                method<cell>("cell"),
                                method<plan>("plan"),
                                method<planned>("planned"),
                                method<unchanged>("unchanged"),
                                {"undisturbed", undisturbed, METH_NOARGS, nullptr},
                                method<layer_forward>("layer_forward"),
                                method<layer_gradient>("layer_gradient"),
                                method<attend>("attend"),
                                method<attend_backward>("attend_backward"),
                                method<multihead>("multihead"),
                                method<bind>("bind"),
                                method<described>("described"),
                                {nullptr, nullptr, 0, nullptr}};

}  // namespace fastseq

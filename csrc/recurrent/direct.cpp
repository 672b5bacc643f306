// One step of a small model takes 1 us of arithmetic and, through an operator, 4 us of finding out what was called:
// matching the schema, boxing each tensor, handing the lock over. These functions take the Python objects and ask only
// what has an influence here. They return None for a call that they do not take; the caller then takes the operator, which
// has the checks and the messages.
//
// Five assumptions beyond torch's stable interface, each tried at import (fastseq/direct.py). A Python Tensor has the
// address of its TensorImpl at a fixed place, and an at::Tensor, which an AtenTensorHandle points to, is one pointer to
// that. A TensorImpl has its set of dispatch keys at a fixed place. THPVariable_Wrap makes a Python object of an
// at::TensorBase. libc10 exports a thread's changes of the dispatch keys, two sets, 0 where there are none. The module
// torch.autograd.profiler says whether a profile is on.
#include <algorithm>
#include <cstring>

#include "core/direct_objects.h"
#include "recurrent/stack.h"

namespace fastseq {
namespace {

constexpr Py_ssize_t kMostTensors = 64;  // a larger stack gains nothing from this

PyObject* version_name;  // set once by bind()

// Tensors that are kept alive: what they came from may change while other threads run.
struct BorrowedList {
  Borrowed tensors[kMostTensors];
  AtenTensorHandle handles[kMostTensors];
  PyObject* kept[kMostTensors];
  int64_t count = 0;

  ~BorrowedList() {
    for (int64_t i = 0; i < count; ++i) Py_DECREF(kept[i]);
  }
  bool add(PyObject* tensor) {
    if (count == kMostTensors || tensor == Py_None || !tensors[count].take(tensor)) return false;
    Py_INCREF(kept[count] = tensor);
    handles[count] = tensors[count].handle();
    return ++count;
  }
  // Of a list or a tuple; None is an empty one.
  bool add_all(PyObject* all) {
    const bool list = PyList_Check(all);
    if (!list && !PyTuple_Check(all)) return all == Py_None;
    for (Py_ssize_t i = 0, n = list ? PyList_Size(all) : PyTuple_Size(all); i < n; ++i)
      if (!add(list ? PyList_GetItem(all, i) : PyTuple_GetItem(all, i))) return false;
    return true;
  }
  // The values of a dict whose keys are these names, in this order. None, a cell's absent bias, is skipped.
  bool add_named(PyObject* dict, PyObject* names) {
    if (!PyList_Check(names) || PyDict_Size(dict) != PyList_Size(names)) return false;
    PyObject *name, *tensor;
    for (Py_ssize_t i = 0, at = 0; PyDict_Next(dict, &at, &name, &tensor); ++i) {
      PyObject* expected = PyList_GetItem(names, i);
      if (name != expected && PyObject_RichCompareBool(name, expected, Py_EQ) != 1) return false;
      if (tensor != Py_None && !add(tensor)) return false;
    }
    return true;
  }
};

// What every call has: x, h0 and c0, the weights, the cell, and how its layers are stacked.
struct Given {
  BorrowedList weights, scales;
  Borrowed x, h0, c0;
  StackCall call{};

  // From x, h0, c0, cell, layout, num_layers and bidirectional; the weights come before. False: not taken.
  bool take(PyObject* const* args) {
    const char *cell = text_of(args[3]), *layout = text_of(args[4]);
    if (args[0] == Py_None || !x.take(args[0]) || !h0.take(args[1]) || !c0.take(args[2]) || !cell || !layout)
      return false;
    call = {x.handle(), h0.handle(), c0.handle(), weights.handles, weights.count, cell_of(cell), layout_of(layout),
            PyLong_AsLongLong(args[5]), PyObject_IsTrue(args[6]) == 1};
    return call.layout != Layout::scan && (!has_c(call.cell) || !h0.impl == !c0.impl);
  }
};

// A tuple of results, None in place of those that are absent.
PyObject* tuple_of(const OptionalTensor* results, size_t count) {
  Object tuple(PyTuple_New(Py_ssize_t(count)));
  for (size_t i = 0; tuple.get() && i < count; ++i) {
    if (!results[i]) Py_INCREF(Py_None);
    PyObject* item = results[i] ? wrapped(*results[i]) : Py_None;
    if (!item || PyTuple_SetItem(tuple.get(), Py_ssize_t(i), item) != 0) return nullptr;
  }
  return tuple.release();
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

// infer(weights, names, scales: list or None, x, h0, c0, cell, layout, num_layers, bidirectional, hidden, outputs, narrow,
// lengths, reset[, h, c, read, write]) -> (y, h_n[, c_n]), of a cell (h_n[, c_n]), or None. weights: a list, or the dict of
// parameters that has just these names, in this order; layout as layout_of's; hidden, outputs and narrow go with packed weights,
// else 0; lengths as set_lengths takes them, reset [T,B] too; the last four: StackBlock.
PyObject* infer(PyObject* const* args, Py_ssize_t count) {
  Given given;
  Borrowed more[6];
  if ((count != 15 && count != 19) || !is_plain_call()) return decline();
  for (Py_ssize_t i = 13; i < count; ++i)
    if (!more[i - 13].take(args[i])) return decline();
  if (!(PyDict_Check(args[0]) ? given.weights.add_named(args[0], args[1]) : given.weights.add_all(args[0])) ||
      !given.scales.add_all(args[2]) || !given.take(args + 3))
    return decline();
  given.call.scales = given.scales.handles, given.call.scale_count = given.scales.count;
  given.call.hidden = PyLong_AsLongLong(args[10]), given.call.outputs = PyLong_AsLongLong(args[11]);
  given.call.narrow = PyObject_IsTrue(args[12]) == 1;
  given.call.lengths = more[0].tensor(), given.call.reset = more[1].tensor();
  given.call.block = {more[2].handle(), more[3].handle(), more[4].handle(), more[5].handle()};
  Stack stack(given.call);
  if (stack.steps() == 0) return decline();  // which torch's layers refuse
  StackResult r;
  compute(stack.products(), [&] { r = stack.run(false, false); });
  const OptionalTensor results[] = {r.y, r.h_n, r.c_n};
  return tuple_of(results + !r.y, 2 + r.c_n.has_value() - !r.y);
}

// layers_forward(x, h0, c0, cell, layout, num_layers, bidirectional, weights: tuple) -> (y, h_n, c_n, *ys, *states, *tapes)
// or None: a stack of layers, or a cell, whose h_n is y. None in place of what there is not. See StackResult.
PyObject* layers_forward(PyObject* const* args, Py_ssize_t count) {
  Given given;
  if (count != 8 || !is_plain_call() || !given.weights.add_all(args[7]) || !given.take(args)) return decline();
  Stack stack(given.call);
  if (stack.steps() == 0) return decline();  // which torch's layers refuse
  StackResult r;
  compute(stack.products(), [&] { r = stack.run(true, true); });
  std::vector<OptionalTensor> results{r.y ? r.y : r.h_n, r.y ? r.h_n : OptionalTensor(), r.c_n};
  for (const auto* list : {&r.ys, &r.states, &r.tapes}) results.insert(results.end(), list->begin(), list->end());
  return tuple_of(results.data(), results.size());
}

// layers_backward(x, h0, c0, cell, layout, num_layers, bidirectional, weights: tuple, need: tuple, dy, dh_n, dc_n, saved:
// tuple of y, ys, states, tapes) -> the gradients of x, h0, c0 and the weights, None where there is none; or None. need:
// whose gradient is needed, in this order.
PyObject* layers_backward(PyObject* const* args, Py_ssize_t count) {
  Given given;
  BorrowedList saved;
  Borrowed dy, dh_n, dc_n;
  if (count != 13 || !is_plain_call() || !given.weights.add_all(args[7]) || !given.take(args) || !dy.take(args[9]) ||
      !dh_n.take(args[10]) || !dc_n.take(args[11]) || !saved.add_all(args[12]))
    return decline();
  const int64_t W = given.weights.count, below = given.call.num_layers - 1;
  const int64_t rows = given.call.num_layers * (given.call.bidirectional ? 2 : 1);
  const int64_t states = has_c(given.call.cell) ? rows : 0;
  if (!PyTuple_Check(args[8]) || PyTuple_Size(args[8]) != 3 + W || saved.count < 1 + below + states) return decline();
  std::vector<bool> need;
  for (Py_ssize_t i = 0; i < 3 + W; ++i) need.push_back(PyObject_IsTrue(PyTuple_GetItem(args[8], i)) == 1);
  const AtenTensorHandle *at = saved.handles + 1, *end = saved.handles + saved.count;
  StackGradient gradient{dy.handle(), dh_n.handle(), dc_n.handle(), {}, saved.handles[0], Handles(at, at + below),
                         Handles(at + below, at + below + states),
                         Handles(at + below + states, end), need[0], need[1] || need[2],
                         std::find(need.begin() + 3, need.end(), true) != need.end()};
  Stack stack(given.call);
  StackInputGradients r;
  compute(2 * stack.products(), [&] { r = stack.run_back(gradient); });
  std::vector<OptionalTensor> results{r.dx, need[1] ? r.dh0 : OptionalTensor(), need[2] ? r.dc0 : OptionalTensor()};
  results.insert(results.end(), r.weights.begin(), r.weights.end());
  results.resize(size_t(3 + W));
  for (size_t i = 3; i < results.size(); ++i)
    if (!need[i]) results[i].reset();
  return tuple_of(results.data(), results.size());
}

// is_plain() -> bool: whether no mode but gradients changes what a tensor means here (is_plain_call).
PyObject* is_plain(PyObject* const*, Py_ssize_t) { return PyBool_FromLong(is_plain_call(true)); }

// unchanged(tensors: list, sources, addresses, versions: tuples, isa) -> bool: whether each tensor is still its source,
// and the instruction set is this one.
PyObject* unchanged(PyObject* const* args, Py_ssize_t count) {
  if (count != 5 || !PyList_Check(args[0])) return decline();
  const Py_ssize_t length = PyList_Size(args[0]);
  const char* isa = text_of(args[4]);
  bool same = PyTuple_Size(args[1]) == length && isa && !std::strcmp(isa, isa_name(active_isa()));
  for (Py_ssize_t i = 0; same && i < length; ++i)
    same = is_still(PyList_GetItem(args[0], i), args[1], args[2], args[3], i);
  PyErr_Clear();
  return PyBool_FromLong(same);
}

// bind(Tensor, Parameter, question, forward_ad, profiler: dicts, impl_offset, keys_offset, plain_keys: pair of int,
// inference_keys, autocast_keys) -> bool: False where torch has no THPVariable_Wrap as we know it.
PyObject* bind(PyObject* const* args, Py_ssize_t count) {
  if (count != 10) Py_RETURN_FALSE;
  impl_offset = PyLong_AsLongLong(args[5]), keys_offset = PyLong_AsLongLong(args[6]);
  for (int i = 0; i < 2; ++i) plain_keys[i] = PyLong_AsUnsignedLongLong(PyTuple_GetItem(args[7], i));
  inference_keys = PyLong_AsUnsignedLongLong(args[8]), autocast_keys = PyLong_AsUnsignedLongLong(args[9]);
  if (PyErr_Occurred()) return nullptr;
  if (void* library = dlopen("libtorch_python.so", RTLD_LAZY | RTLD_NOLOAD))
    wrap = reinterpret_cast<Wrap>(dlsym(library, "_Z16THPVariable_WrapRKN2at10TensorBaseE"));
  if (!wrap) Py_RETURN_FALSE;
  version_name = PyUnicode_InternFromString("_version"), level_name = PyUnicode_InternFromString("_current_level");
  profiled_name = PyUnicode_InternFromString("_is_profiler_enabled");
  bind_multihead();
  for (Py_ssize_t i = 0; i < 5; ++i) Py_INCREF(args[i]);  // for as long as the process lives
  tensor_type = args[0], parameter_type = args[1], question = args[2], forward_ad = args[3], profiler = args[4];
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

PyMethodDef direct_methods[] = {
    method<infer>("infer"), method<unchanged>("unchanged"), method<is_plain>("is_plain"),
    method<layers_forward>("layers_forward"), method<layers_backward>("layers_backward"), method<attend>("attend"),
    method<attend_kept>("attend_kept"), method<attend_backward>("attend_backward"), method<multihead>("multihead"),
    method<bind>("bind"), method<described>("described"), {nullptr, nullptr, 0, nullptr}};

}  // namespace fastseq

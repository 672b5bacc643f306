// One step of a small model takes 1 us of arithmetic and, through an operator, 4 us of finding out what was called:
// matching the schema, boxing each tensor, handing the lock over. These functions are handed the Python objects and
// ask only what has an influence here. Where anything speaks against the short way they return None, and the caller
// takes the operator, which has all the answers and all the messages.
//
// The one assumption beyond torch's stable interface: a Tensor's attribute `_cdata` is the address of its TensorImpl,
// and an at::Tensor, which an AtenTensorHandle points to, is one pointer to that. fastseq/functional/direct.py turns
// this on only for releases of torch with which it was tested, after a trial.
#include "direct.h"

#include <cstring>
#include <exception>
#include <vector>

#include "inference.h"

namespace fastseq {
namespace {

constexpr Py_ssize_t kMostWeights = 64;        // a larger stack gains nothing from this
constexpr int64_t kAlone = int64_t(1) << 18;   // more multiplications than this: let other threads run meanwhile

// Set once by bind(): the exact types that are ordinary tensors, questions that must all be answered with something
// false, and torch.empty_like. Interned names of attributes.
PyObject *tensor_type, *parameter_type, *questions, *empty_like, *cdata_name, *new_empty_name, *is_neg_name,
    *version_name;

// An owned reference.
class Object {
 public:
  explicit Object(PyObject* object) : object_(object) {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
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
    return impl != nullptr && is_as_it_lies(object);
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

bool nothing_speaks_against_it() {
  if (!questions) return false;
  const Py_ssize_t count = PyTuple_Size(questions);
  for (Py_ssize_t i = 0; i < count; ++i) {
    Object answer(PyObject_CallNoArgs(PyTuple_GetItem(questions, i)));
    if (!answer.get() || PyObject_IsTrue(answer.get()) != 0) return false;
  }
  return true;
}

// A new tensor of x's kind. `like` has the shape already if it is contiguous: that is the quickest way to make one.
PyObject* make(PyObject* x, PyObject* like, AtenTensorHandle like_handle, const int64_t* sizes, int64_t rank) {
  if (like_handle && rank_of(like_handle) == rank && is_contiguous(like_handle)) {
    const int64_t* have = sizes_of(like_handle);
    bool same = true;
    for (int64_t i = 0; i < rank; ++i) same = same && have[i] == sizes[i];
    if (same) return PyObject_CallFunctionObjArgs(empty_like, like, nullptr);
  }
  Object shape(PyTuple_New(Py_ssize_t(rank)));
  for (int64_t i = 0; shape.get() && i < rank; ++i) {
    PyObject* size = PyLong_FromLongLong(sizes[i]);
    if (!size) return nullptr;
    PyTuple_SetItem(shape.get(), Py_ssize_t(i), size);
  }
  return shape.get() ? PyObject_CallMethodObjArgs(x, new_empty_name, shape.get(), nullptr) : nullptr;
}

void* data_of(PyObject* tensor) {
  Borrowed borrowed;
  void* data = nullptr;
  if (borrowed.take(tensor)) TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(borrowed.handle(), &data));
  return data;
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

// None in place of whatever went wrong.
PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

const char* text_of(PyObject* object) { return PyUnicode_AsUTF8AndSize(object, nullptr); }

// The tensors of a list, which stays alive as a tuple: the list may change while others run.
struct BorrowedList {
  Object kept;
  Borrowed tensors[kMostWeights];
  AtenTensorHandle handles[kMostWeights];
  Py_ssize_t count = 0;

  explicit BorrowedList(PyObject* list) : kept(PyList_Check(list) ? PyList_AsTuple(list) : nullptr) {}
  bool take() {
    if (!kept.get() || PyTuple_Size(kept.get()) > kMostWeights) return false;
    for (; count < PyTuple_Size(kept.get()); ++count) {
      PyObject* tensor = PyTuple_GetItem(kept.get(), count);
      if (tensor == Py_None || !tensors[count].take(tensor)) return false;
      handles[count] = tensors[count].handle();
    }
    return true;
  }
};

// The results of a stack of layers over x; `state` is h0, or None.
PyObject* run(const StackCall& call, PyObject* x, PyObject* state) {
  Stack layers(call);
  const bool lstm = layers.lstm();
  Object h_n(make(x, state, call.h0, layers.h_sizes, layers.rank()));
  if (!h_n.get()) return decline();
  Borrowed last;
  last.take(h_n.get());
  Object y(make(x, h_n.get(), last.handle(), layers.y_sizes, layers.rank()));
  Object c_n(lstm ? make(x, h_n.get(), last.handle(), layers.c_sizes, layers.rank()) : nullptr);
  if (!y.get() || (lstm && !c_n.get())) return decline();
  void *to_y = data_of(y.get()), *to_h = data_of(h_n.get()), *to_c = lstm ? data_of(c_n.get()) : nullptr;
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
  Object cdata(PyObject_GetAttr(tensor, cdata_name));
  void *impl = cdata.get() ? PyLong_AsVoidPtr(cdata.get()) : nullptr, *data = nullptr;
  if (!impl) return false;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(reinterpret_cast<AtenTensorHandle>(&impl), &data));
  PyObject* version = PyTuple_GetItem(versions, i);
  if (data != PyLong_AsVoidPtr(PyTuple_GetItem(addresses, i))) return false;
  if (version == Py_None) return true;
  Object now(PyObject_GetAttr(tensor, version_name));
  return now.get() && PyLong_AsLongLong(now.get()) == PyLong_AsLongLong(version);
}

// stack(x, h0, c0, weights: list, scales: list, cell, num_layers, bidirectional, batch_first[, hidden, outputs])
// -> (y, h_n[, c_n]) or None
PyObject* stack(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if ((count != 9 && count != 11) || !nothing_speaks_against_it()) return decline();
  Borrowed x, h0, c0;
  BorrowedList weights(args[3]), scales(args[4]);
  if (args[0] == Py_None || !x.take(args[0]) || !h0.take(args[1]) || !c0.take(args[2]) || !weights.take() ||
      !scales.take())
    return decline();
  const char* cell = text_of(args[5]);
  if (!cell) return decline();
  const StackCall call{x.handle(), h0.handle(), c0.handle(), weights.handles, int64_t(weights.count), scales.handles,
                       int64_t(scales.count), cell, PyLong_AsLongLong(args[6]), PyObject_IsTrue(args[7]) == 1,
                       PyObject_IsTrue(args[8]) == 1, count > 9 ? PyLong_AsLongLong(args[9]) : 0,
                       count > 9 ? PyLong_AsLongLong(args[10]) : 0};
  return run(call, args[0], args[1]);
} catch (const std::exception&) {
  return decline();
}

// What packed weights were made from, and the call that reads them, for the layers of one module.
struct Plan {
  std::vector<PyObject*> owned;  // what is pointed to below
  PyObject *sources, *addresses, *versions, *isa, *options[4];
  BorrowedList weights, scales;
  bool taken;

  explicit Plan(PyObject* const* args)
      : owned(args, args + 10), sources(args[0]), addresses(args[1]), versions(args[2]), isa(args[3]),
        options{args[6], args[7], args[8], args[9]}, weights(args[4]), scales(args[5]) {
    for (PyObject* object : owned) Py_INCREF(object);
    taken = weights.take() && scales.take();
  }
  ~Plan() {
    for (PyObject* object : owned) Py_DECREF(object);
  }
};
constexpr const char* kPlan = "fastseq.plan";
Plan* plan_of(PyObject* capsule) { return static_cast<Plan*>(PyCapsule_GetPointer(capsule, kPlan)); }

// plan(sources, addresses, versions, isa, weights, scales, cell, num_layers, bidirectional, batch_first) -> plan or None:
// the first four as `unchanged` has them, the others as `stack`.
PyObject* plan(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 10 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1]) || !PyTuple_Check(args[2])) return decline();
  Plan* made = new Plan(args);
  PyObject* capsule = PyCapsule_New(made, kPlan, [](PyObject* object) { delete plan_of(object); });
  if (!capsule) delete made;
  if (!capsule || made->taken) return capsule;
  Py_DECREF(capsule);
  return decline();
} catch (const std::exception&) {
  return decline();
}

// planned(plan, parameters: dict, x, h0, c0, cell, num_layers, bidirectional, batch_first, hidden, outputs): as `stack`,
// with the plan's weights; None too where one of the parameters, or an option, is no longer what the plan was made for.
PyObject* planned(PyObject*, PyObject* const* args, Py_ssize_t count) try {
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
  Borrowed x, h0, c0;
  if (!nothing_speaks_against_it() || args[2] == Py_None || !x.take(args[2]) || !h0.take(args[3]) || !c0.take(args[4]))
    return decline();
  const StackCall call{x.handle(), h0.handle(), c0.handle(), made->weights.handles, int64_t(made->weights.count),
                       made->scales.handles, int64_t(made->scales.count), text_of(args[5]), PyLong_AsLongLong(args[6]),
                       args[7] == Py_True, args[8] == Py_True, PyLong_AsLongLong(args[9]), PyLong_AsLongLong(args[10])};
  return run(call, args[2], args[3]);
} catch (const std::exception&) {
  return decline();
}

// cell(x, h, c, w_ih, w_hh, b_ih, b_hh, s_ih, s_hh, cell[, hidden]) -> (h_n[, c_n]) or None
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  constexpr int kTensors = 9;
  if ((count != kTensors + 1 && count != kTensors + 2) || !nothing_speaks_against_it()) return decline();
  Borrowed t[kTensors];
  for (int i = 0; i < kTensors; ++i)
    if (!t[i].take(args[i])) return decline();
  const char* name = text_of(args[kTensors]);
  if (!name || !t[0].impl || !t[3].impl || !t[4].impl) return decline();
  CellStep step({t[0].handle(), t[1].handle(), t[2].handle(), t[3].handle(), t[4].handle(), t[5].handle(),
                 t[6].handle(), t[7].handle(), t[8].handle(), name,
                 count > kTensors + 1 ? PyLong_AsLongLong(args[kTensors + 1]) : 0});
  const bool lstm = step.lstm();
  Object h_n(make(args[0], args[1], t[1].handle(), step.sizes, step.rank()));
  if (!h_n.get()) return decline();
  Borrowed last;
  last.take(h_n.get());
  Object c_n(lstm ? make(args[0], h_n.get(), last.handle(), step.sizes, step.rank()) : nullptr);
  if (lstm && !c_n.get()) return decline();
  void *to_h = data_of(h_n.get()), *to_c = lstm ? data_of(c_n.get()) : nullptr;
  compute(step.products(), [&] { step.run(to_h, to_c); });
  return lstm ? PyTuple_Pack(2, h_n.get(), c_n.get()) : PyTuple_Pack(1, h_n.get());
} catch (const std::exception&) {
  return decline();
}

// unchanged(tensors: list, sources, addresses, versions: tuples, isa) -> bool: whether each tensor is still its source,
// and the instruction set is this one.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) try {
  if (count != 5 || !PyList_Check(args[0])) return decline();
  const Py_ssize_t length = PyList_Size(args[0]);
  bool same = PyTuple_Size(args[1]) == length && same_isa(args[4]);
  for (Py_ssize_t i = 0; same && i < length; ++i)
    same = is_still(PyList_GetItem(args[0], i), args[1], args[2], args[3], i);
  PyErr_Clear();
  return PyBool_FromLong(same);
} catch (const std::exception&) {
  return decline();
}

// bind(Tensor, Parameter, empty_like, questions)
PyObject* bind(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "bind(Tensor, Parameter, empty_like, questions: tuple)");
    return nullptr;
  }
  if (!cdata_name) cdata_name = PyUnicode_InternFromString("_cdata");
  if (!version_name) version_name = PyUnicode_InternFromString("_version");
  if (!is_neg_name) is_neg_name = PyUnicode_InternFromString("is_neg");
  if (!new_empty_name) new_empty_name = PyUnicode_InternFromString("new_empty");
  for (Py_ssize_t i = 0; i < count; ++i) Py_INCREF(args[i]);  // for as long as the process lives
  tensor_type = args[0], parameter_type = args[1], empty_like = args[2], questions = args[3];
  Py_RETURN_NONE;
}

// described(tensor) -> (address of its data, sizes): what the assumption above leads to, for a trial.
PyObject* described(PyObject*, PyObject* tensor) try {
  Borrowed borrowed;
  if (!tensor_type || tensor == Py_None || !borrowed.take(tensor)) return decline();
  const int64_t rank = rank_of(borrowed.handle()), *sizes = sizes_of(borrowed.handle());
  Object shape(PyTuple_New(Py_ssize_t(rank)));
  for (int64_t i = 0; i < rank; ++i) PyTuple_SetItem(shape.get(), Py_ssize_t(i), PyLong_FromLongLong(sizes[i]));
  Object address(PyLong_FromVoidPtr(data_of(tensor)));
  return PyTuple_Pack(2, address.get(), shape.get());
} catch (const std::exception&) {
  return decline();
}

template <class Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef direct_methods[] = {{"stack", method(stack), METH_FASTCALL, nullptr},
                                {"cell", method(cell), METH_FASTCALL, nullptr},
                                {"plan", method(plan), METH_FASTCALL, nullptr},
                                {"planned", method(planned), METH_FASTCALL, nullptr},
                                {"unchanged", method(unchanged), METH_FASTCALL, nullptr},
                                {"bind", method(bind), METH_FASTCALL, nullptr},
                                {"described", method(described), METH_O, nullptr},
                                {nullptr, nullptr, 0, nullptr}};

}  // namespace fastseq

// A scan and its gradient, called straight from Python: see direct.cpp. What is differentiated is decided above: these run
// inside of an autograd Function, where no gradient is recorded.
#include <Python.h>

#include <optional>

#include "core/direct_objects.h"
#include "core/ops.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

// Tensors of Python's, as the operators take them.
class Operands {
 public:
  // False: one of them is no ordinary tensor. None is no tensor, and fine.
  bool take(PyObject* const* objects, int count) {
    for (int i = 0; i < count; ++i) {
      Borrowed borrowed;
      if (!borrowed.take(objects[i])) return false;
      if (!borrowed.impl) {
        tensors_[i].reset();
        continue;
      }
      AtenTensorHandle own;
      TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed.handle(), &own));
      tensors_[i] = Tensor(own);
    }
    return true;
  }
  OptionalTensor& operator[](int i) { return tensors_[i]; }

 private:
  OptionalTensor tensors_[16];
};

// The same elements under other sizes.
Tensor seen_as(const Tensor& x, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), int64_t(sizes.size()), sizes.begin(), strides.begin(), 0, &made));
  return Tensor(made);
}

// How the caller lays out what the scan has as x and y [T, B, n] and states [B, n]. "scan": so. "layer": x as well, or
// [T, n] of one sequence, and states [1, B, n], or [1, n]; "batch_first": but x [B, T, n]. "cell": [B, n] or [n], states
// alike.
struct Layout {
  bool is_scan, is_cell, batch_first;
  int64_t rank;  // of x

  Layout(const OptionalTensor& x, const std::string& name)
      : is_scan(name == "scan"), is_cell(name == "cell"), batch_first(name == "batch_first"), rank(x->dim()),
        is_layer_(batch_first || name == "layer") {}
  bool is_known() const {
    return is_scan ? rank == 3 : is_cell ? rank == 1 || rank == 2 : is_layer_ && (rank == 2 || rank == 3);
  }
  // Whether these are laid out as x, or as states beside it.
  bool fits_steps(const OptionalTensor& x) const { return !x || x->dim() == rank; }
  bool fits_state(const OptionalTensor& s) const {
    if (!s || is_scan) return !s || s->dim() == 2;
    return s->dim() == rank && (is_cell || s->size(0) == 1);
  }

  Tensor steps_in(const Tensor& x) const {
    if (is_cell && rank == 1) return seen_as(x, {1, 1, x.size(0)}, {x.stride(0), x.stride(0), x.stride(0)});
    if (is_cell) return seen_as(x, {1, x.size(0), x.size(1)}, {x.stride(0), x.stride(0), x.stride(1)});
    if (rank == 2) return seen_as(x, {x.size(0), 1, x.size(1)}, {x.stride(0), x.stride(0), x.stride(1)});
    return batch_first ? swapped(x) : x;
  }
  Tensor steps_out(const Tensor& x) const {
    if (is_cell && rank == 1) return seen_as(x, {x.size(2)}, {x.stride(2)});
    if (is_cell) return seen_as(x, {x.size(1), x.size(2)}, {x.stride(1), x.stride(2)});
    if (rank == 2) return seen_as(x, {x.size(0), x.size(2)}, {x.stride(0), x.stride(2)});
    return batch_first ? swapped(x) : x;
  }
  Tensor state_in(const Tensor& s) const {
    if (is_scan) return s;
    if (rank == 1) return seen_as(s, {1, s.size(0)}, {s.stride(0), s.stride(0)});
    return rank == 3 ? seen_as(s, {s.size(1), s.size(2)}, {s.stride(1), s.stride(2)}) : s;
  }
  Tensor state_out(const Tensor& s) const {
    if (rank == 1) return seen_as(s, {s.size(1)}, {s.stride(1)});
    if (is_scan || rank == 2) return s;
    return seen_as(s, {1, s.size(0), s.size(1)}, {s.size(0) * s.stride(0), s.stride(0), s.stride(1)});
  }
  void steps_in(OptionalTensor& x) const {
    if (x) x = steps_in(*x);
  }
  void state_in(OptionalTensor& s) const {
    if (s) s = state_in(*s);
  }

 private:
  bool is_layer_;

  static Tensor swapped(const Tensor& x) {
    return seen_as(x, {x.size(1), x.size(0), x.size(2)}, {x.stride(1), x.stride(0), x.stride(2)});
  }
};

// Results as a tuple, None in place of those that are none or empty.
class Results {
 public:
  explicit Results(Py_ssize_t count) : tuple_(PyTuple_New(count)) {
    if (!tuple_.get()) failed_ = true;
  }
  void add(const Tensor& tensor) { put(tensor.dim() == 1 && tensor.size(0) == 0 ? none() : wrapped(tensor)); }
  void add_none() { put(none()); }
  template <class Make>
  void add_if(bool present, const Make& make) {
    put(present ? wrapped(make()) : none());  // present: even without elements
  }
  PyObject* done() { return failed_ ? nullptr : tuple_.release(); }

 private:
  static PyObject* none() {
    Py_INCREF(Py_None);
    return Py_None;
  }
  void put(PyObject* object) {
    failed_ = failed_ || !object || PyTuple_SetItem(tuple_.get(), next_++, object) != 0;
  }
  Object tuple_;
  Py_ssize_t next_ = 0;
  bool failed_ = false;
};

int64_t products_of(const Tensor& steps, const Tensor& w_hh) {
  return steps.size(0) * steps.size(1) * (steps.size(2) + w_hh.size(1)) * w_hh.size(0);
}

bool is_true(PyObject* object) { return PyObject_IsTrue(object) == 1; }

}  // namespace

// undisturbed() -> bool: whether tensors are no more than their numbers here and now, but for gradients.
PyObject* undisturbed(PyObject*, PyObject*) {
  const bool plain = is_plain_call(true);
  PyErr_Clear();
  return PyBool_FromLong(plain);
}

// layer_forward(input, h0, c0, cell, layout, reverse, w_ih, w_hh, b_ih, b_hh) -> (y, h_n, c_n, states, tape) or None: one
// layer of one direction, or a cell, whose h_n is y. None in place of what there is not.
PyObject* layer_forward(PyObject* const* args, Py_ssize_t count) {
  if (count != 10 || !is_plain_call()) return decline();
  Operands given, weights;
  if (!given.take(args, 3) || !weights.take(args + 6, 4)) return decline();
  const char *cell = text_of(args[3]), *name = text_of(args[4]);
  OptionalTensor &x = given[0], &h0 = given[1], &c0 = given[2];
  if (!cell || !name || !x || !weights[0] || !weights[1]) return decline();
  const Layout layout(x, name);
  const int64_t number = int64_t(cell_of(cell));
  const bool lstm = cell_of(cell) == Cell::lstm, reverse = is_true(args[5]);
  if (!layout.is_known() || !layout.fits_state(h0) || !layout.fits_state(c0)) return decline();
  if (lstm && h0.has_value() != c0.has_value()) return decline();
  layout.steps_in(x), layout.state_in(h0), layout.state_in(c0);
  if (x->size(0) == 0 || weights[1]->dim() != 2 || weights[1]->size(1) == 0) return decline();
  if (dtype_of(x->get()) == Dtype::bf16 && x->size(0) * x->size(1) > most_bf16_rows) return decline();
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>> made;
  compute(products_of(*x, *weights[1]), [&] {
    made = scan_forward_cpu(*x, *weights[0], *weights[1], weights[2], weights[3], {}, h0, c0, {}, {}, number, reverse,
                            true, true);
  });
  auto& [y, h_n, c_n, states, tape] = *made;
  Results results(5);
  results.add(layout.steps_out(y));
  results.add_if(!layout.is_cell, [&] { return layout.state_out(h_n); });
  results.add_if(lstm, [&] { return layout.state_out(c_n); });
  results.add(states), results.add(tape);
  return results.done();
}

// layer_gradient(need, dy, dh_n, dc_n, input, h0, c0, y, states, tape, cell, layout, reverse, w_ih, w_hh) -> gradients of
// layer_forward's arguments (of biases if `need` has them), None where there is none, or None. need: whose gradient is
// needed, in the same order.
PyObject* layer_gradient(PyObject* const* args, Py_ssize_t count) {
  if (count != 15 || !PyTuple_Check(args[0]) || !is_plain_call()) return decline();
  Operands given, weights;
  if (!given.take(args + 1, 9) || !weights.take(args + 13, 2)) return decline();
  const char *cell = text_of(args[10]), *name = text_of(args[11]);
  OptionalTensor &dy = given[0], &dh_n = given[1], &dc_n = given[2], &x = given[3], &h0 = given[4], &c0 = given[5],
                 &y = given[6];
  if (!cell || !name || !x || !y || !weights[0] || !weights[1]) return decline();
  const Layout layout(x, name);
  if (!layout.fits_steps(dy) || !layout.fits_state(dh_n) || !layout.fits_state(dc_n)) return decline();
  for (OptionalTensor* steps : {&dy, &x, &y}) layout.steps_in(*steps);
  for (OptionalTensor* state : {&dh_n, &dc_n, &h0, &c0}) layout.state_in(*state);
  const Py_ssize_t length = PyTuple_Size(args[0]);
  const auto needed = [&](Py_ssize_t i) { return is_true(PyTuple_GetItem(args[0], i)); };
  bool with_weights = false;
  for (Py_ssize_t i = 6; i < length; ++i) with_weights = with_weights || needed(i);
  const bool with_dx = needed(0), with_dh0 = h0 && needed(1), with_dc0 = c0 && needed(2), with_biases = length > 8;
  const bool reverse = is_true(args[12]);
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> made;
  compute(2 * products_of(*x, *weights[1]), [&] {
    made = scan_gradient(dy, dh_n, dc_n, {}, *x, *weights[0], *weights[1], {}, h0, c0, {}, {}, *y, given[7], given[8],
                         int64_t(cell_of(cell)), reverse, with_dx, with_weights, with_dh0 || with_dc0);
  });
  auto& [dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dhidden] = *made;
  Results results(length);
  results.add_if(with_dx, [&] { return layout.steps_out(dx); });
  results.add_if(with_dh0, [&] { return layout.state_out(dh0); });
  results.add_if(with_dc0, [&] { return layout.state_out(dc0); });
  for (int i = 0; i < 3; ++i) results.add_none();  // of cell, layout and reverse
  results.add(dw_ih), results.add(dw_hh);
  if (with_biases) results.add(db_ih), results.add(db_hh);
  return results.done();
}

}  // namespace fastseq

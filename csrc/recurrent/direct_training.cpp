// A scan and its gradient, called straight from Python: see direct.cpp. What is differentiated is decided above: these run
// inside of an autograd Function, where no gradient is recorded.
#include <Python.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/direct_objects.h"
#include "core/ops.h"
#include "recurrent/inference.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;

// Tensors of Python's, as the operators take them. False: one of them is no ordinary tensor. None is no tensor, and fine.
bool take(PyObject* const* objects, int count, OptionalTensor* to) {
  for (int i = 0; i < count; ++i) {
    Borrowed borrowed;
    if (!borrowed.take(objects[i])) return false;
    if (!borrowed.impl) continue;
    AtenTensorHandle own;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(borrowed.handle(), &own));
    to[i] = Tensor(own);
  }
  return true;
}

// A view of the same elements: a dimension of size 1 inserted, the first of two dropped, or the first two swapped.
enum class Change { insert, drop, swap };
Tensor changed(const Tensor& x, Change change, int64_t at) {
  int64_t rank = rank_of(x.get()), sizes[4], strides[4], n = 0;  // x has up to three dimensions
  for (int64_t i = 0; i < rank; ++i) {
    if (change == Change::insert && i == at) sizes[n] = 1, strides[n++] = x.size(i) * x.stride(i);
    if (change == Change::drop && i == at) continue;
    sizes[n] = x.size(i), strides[n++] = x.stride(i);
  }
  if (change == Change::swap) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), n, sizes, strides, 0, &made));
  return Tensor(made);
}

// From the caller's layout (inference.h) to the scan's [T, B, n] and [B, n], and back.
struct Views {
  Layout layout;
  int64_t rank;  // of x

  bool is_cell() const { return layout == Layout::cell; }
  bool is_known() const {
    return layout == Layout::scan ? rank == 3 : is_cell() ? rank == 1 || rank == 2 : rank == 2 || rank == 3;
  }
  bool fits_state(const OptionalTensor& s) const {
    if (!s || layout == Layout::scan) return !s || s->dim() == 2;
    return s->dim() == rank && (is_cell() || s->size(0) == 1);
  }
  Tensor steps_in(const Tensor& x) const {
    if (is_cell()) return changed(rank == 1 ? changed(x, Change::insert, 0) : x, Change::insert, 0);
    return rank == 2 ? changed(x, Change::insert, 1) : layout == Layout::batch_first ? changed(x, Change::swap, 0) : x;
  }
  Tensor steps_out(const Tensor& x) const {
    if (is_cell()) return rank == 1 ? changed(changed(x, Change::drop, 0), Change::drop, 0) : changed(x, Change::drop, 0);
    return rank == 2 ? changed(x, Change::drop, 1) : layout == Layout::batch_first ? changed(x, Change::swap, 0) : x;
  }
  Tensor state_in(const Tensor& s) const {
    if (layout == Layout::scan || rank == 2) return s;
    return changed(s, rank == 1 ? Change::insert : Change::drop, 0);
  }
  Tensor state_out(const Tensor& s) const {
    if (layout == Layout::scan || rank == 2) return s;
    return changed(s, rank == 1 ? Change::drop : Change::insert, 0);
  }
};

// A tuple of results, None in place of those that are absent.
PyObject* tuple_of(const std::vector<OptionalTensor>& results) {
  Object tuple(PyTuple_New(Py_ssize_t(results.size())));
  for (size_t i = 0; tuple.get() && i < results.size(); ++i) {
    if (!results[i]) Py_INCREF(Py_None);
    PyObject* item = results[i] ? wrapped(*results[i]) : Py_None;
    if (!item || PyTuple_SetItem(tuple.get(), Py_ssize_t(i), item) != 0) return nullptr;
  }
  return tuple.release();
}

int64_t products_of(const Tensor& steps, const Tensor& w_hh) {
  return steps.size(0) * steps.size(1) * (steps.size(2) + w_hh.size(1)) * w_hh.size(0);
}

bool is_true(PyObject* object) { return PyObject_IsTrue(object) == 1; }

}  // namespace

// is_plain() -> bool: whether no mode but gradients changes what a tensor means here (is_plain_call).
PyObject* is_plain(PyObject*, PyObject*) {
  const bool plain = is_plain_call(true);
  PyErr_Clear();
  return PyBool_FromLong(plain);
}

// layer_forward(x, h0, c0, cell, layout, reverse, w_ih, w_hh, b_ih, b_hh) -> (y, h_n, c_n, states, tape) or None: one layer
// of one direction, or a cell, whose h_n is y. None in place of what there is not.
PyObject* layer_forward(PyObject* const* args, Py_ssize_t count) {
  OptionalTensor given[3], w[4];
  if (count != 10 || !is_plain_call() || !take(args, 3, given) || !take(args + 6, 4, w)) return decline();
  const char *cell = text_of(args[3]), *layout = text_of(args[4]);
  auto& [x, h0, c0] = given;
  if (!cell || !layout || !x || !w[0] || !w[1]) return decline();
  const Views views{layout_of(layout), x->dim()};
  const bool lstm = cell_of(cell) == Cell::lstm, reverse = is_true(args[5]);
  if (!views.is_known() || !views.fits_state(h0) || !views.fits_state(c0)) return decline();
  if (lstm && h0.has_value() != c0.has_value()) return decline();
  x = views.steps_in(*x);
  for (OptionalTensor* state : {&h0, &c0})
    if (*state) *state = views.state_in(**state);
  if (x->size(0) == 0 || w[1]->dim() != 2 || w[1]->size(1) == 0) return decline();
  if (dtype_of(x->get()) == Dtype::bf16 && x->size(0) * x->size(1) > most_bf16_rows) return decline();
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>> made;
  compute(products_of(*x, *w[1]), [&] {
    made = scan_forward_cpu(*x, *w[0], *w[1], w[2], w[3], {}, h0, c0, {}, {}, int64_t(cell_of(cell)), reverse, true, true);
  });
  auto& [y, h_n, c_n, states, tape] = *made;
  std::vector<OptionalTensor> results(5);
  results[0] = views.steps_out(y);
  if (!views.is_cell()) results[1] = views.state_out(h_n);
  if (lstm) results[2] = views.state_out(c_n), results[3] = states;
  if (gates_of(cell_of(cell)) > 1) results[4] = tape;
  return tuple_of(results);
}

// layer_gradient(need, dy, dh_n, dc_n, x, h0, c0, y, states, tape, cell, layout, reverse, w_ih, w_hh) -> the gradients of x,
// h0, c0, w_ih, w_hh and, where `need` has six places, b_ih and b_hh; None where there is none; or None. need: whose
// gradient is needed, in this order.
PyObject* layer_gradient(PyObject* const* args, Py_ssize_t count) {
  OptionalTensor given[9], w[2];
  if (count != 15 || !PyTuple_Check(args[0]) || !is_plain_call() || !take(args + 1, 9, given) || !take(args + 13, 2, w))
    return decline();
  const char *cell = text_of(args[10]), *layout = text_of(args[11]);
  auto& [dy, dh_n, dc_n, x, h0, c0, y, states, tape] = given;
  if (!cell || !layout || !x || !y || !w[0] || !w[1]) return decline();
  const Views views{layout_of(layout), x->dim()};
  if ((dy && dy->dim() != views.rank) || !views.fits_state(dh_n) || !views.fits_state(dc_n)) return decline();
  for (OptionalTensor* steps : {&dy, &x, &y})
    if (*steps) *steps = views.steps_in(**steps);
  for (OptionalTensor* state : {&dh_n, &dc_n, &h0, &c0})
    if (*state) *state = views.state_in(**state);
  const size_t length = size_t(PyTuple_Size(args[0]));
  std::vector<bool> need(std::max<size_t>(length, 5));
  for (size_t i = 0; i < length; ++i) need[i] = is_true(PyTuple_GetItem(args[0], Py_ssize_t(i)));
  const bool with_weights = std::any_of(need.begin() + 3, need.end(), [](bool needed) { return needed; });
  const bool reverse = is_true(args[12]), with_dh0 = h0 && need[1], with_dc0 = c0 && need[2];
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> made;
  compute(2 * products_of(*x, *w[1]), [&] {
    made = scan_gradient(dy, dh_n, dc_n, {}, *x, *w[0], *w[1], {}, h0, c0, {}, {}, *y, states, tape,
                         int64_t(cell_of(cell)), reverse, need[0], with_weights, with_dh0 || with_dc0);
  });
  auto& [dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dhidden] = *made;
  std::vector<OptionalTensor> results(length);
  if (need[0]) results[0] = views.steps_out(dx);
  if (with_dh0) results[1] = views.state_out(dh0);
  if (with_dc0) results[2] = views.state_out(dc0);
  const Tensor* gradients[] = {&dw_ih, &dw_hh, &db_ih, &db_hh};
  for (size_t i = 3; with_weights && i < length; ++i) results[i] = *gradients[i - 3];
  return tuple_of(results);
}

}  // namespace fastseq

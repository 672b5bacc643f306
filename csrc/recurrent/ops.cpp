// torch.ops.fastseq.scan_*.native: tensors into the structs of recurrent.h.
// The schemas, with every shape, are in fastseq/ops/__init__.py.
#include "core/ops.h"
#include "recurrent/marshal.h"

namespace fastseq {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = OptionalTensor;

// What both directions share. Keeps alive what it had to copy.
struct Common {
  Optional lengths;
  void fill(ScanSizes& s, const Optional& given_lengths, const Optional& reset) {
    s.threads = int(torch::stable::get_num_threads());
    s.lengths = nullptr;
    s.reset = nullptr;
    if (given_lengths) {
      lengths = *given_lengths;
      FASTSEQ_CHECK(lengths->is_cpu() && lengths->scalar_type() == ScalarType::Long && lengths->dim() == 1 &&
                          lengths->size(0) == s.B,
                      "scan: lengths must be an int64 CPU tensor of shape [", s.B, "]");
      check_readable("lengths", lengths->get());
      if (s.B > 1 && lengths->stride(0) != 1) lengths = torch::stable::contiguous(*lengths);
      s.lengths = static_cast<const int64_t*>(lengths->data_ptr());
    }
    if (reset) {
      FASTSEQ_CHECK(reset->is_cpu() && reset->scalar_type() == ScalarType::Bool && reset->dim() == 2 &&
                          reset->size(0) == s.T && reset->size(1) == s.B,
                      "scan: reset must be a bool CPU tensor of shape [", s.T, ", ", s.B, "]");
      check_readable("reset", reset->get());
      s.reset = static_cast<const bool*>(reset->data_ptr());
      s.reset_t = reset->stride(0);
      s.reset_b = reset->stride(1);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_forward_cpu(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
    const Optional& w_hr, const Optional& h0, const Optional& c0, const Optional& lengths, const Optional& reset,
    int64_t cell, bool reverse, bool save, bool states) {
  ScanForward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(x.get());
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  const bool lstm = p.cell == Cell::lstm;
  FASTSEQ_CHECK(x.dim() == 3 && w_hh.dim() == 2, "scan: x must be [T, B, I] and w_hh [G*H, P]");
  p.T = x.size(0), p.B = x.size(1), p.I = x.size(2), p.H = w_hh.size(0) / G, p.P = w_hh.size(1);
  FASTSEQ_CHECK(w_hr || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  FASTSEQ_CHECK(lstm || (!w_hr && !c0), "scan: only an LSTM has w_hr and c0");
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.weights = p.dtype;
  p.x = view("x", x, dtype, {p.T, p.B, p.I});
  p.w_ih = view("w_ih", w_ih, dtype, {G * p.H, p.I});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.P});
  p.b_ih = view("b_ih", b_ih, dtype, {G * p.H});
  p.b_hh = view("b_hh", b_hh, dtype, {G * p.H});
  p.w_hr = view("w_hr", w_hr, dtype, {p.P, p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});
  p.c0 = view("c0", c0, dtype, {p.B, p.H});

  const Dtype accumulator = accumulator_of(dtype);
  const bool with_states = lstm && (save || states), with_tape = save && G > 1;
  Tensor y = empty({p.T, p.B, p.P}, dtype), h_n = empty({p.B, p.P}, dtype);
  Tensor c_n = lstm ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  Tensor c_all = with_states ? empty({p.T, p.B, p.H}, accumulator) : empty({0}, dtype);
  Tensor tape = with_tape ? empty({p.T, p.B, 4 * p.H}, dtype) : empty({0}, dtype);
  if (p.B > 0 && p.P > 0) {
    auto whole = [&](const Tensor& out, int64_t n) { return ScanView{out.data_ptr(), p.B * n, n, 1}; };
    p.y = whole(y, p.P);
    p.h_n = whole(h_n, p.P);
    if (lstm) p.c_n = whole(c_n, p.H);
    if (with_states) p.states = whole(c_all, p.H);
    if (with_tape) p.tape = whole(tape, 4 * p.H);
    run_forward(p);
  }
  return {y, h_n, c_n, c_all, tape};
}

// scan_backward_cpu; `inner`: dgates goes no further than scan_gradient. As large as the tape, it would fault in all its
// pages at every step of a training: then it lies in memory that the thread keeps. with_starts: dh0 and dc0 are asked for.
static std::tuple<Tensor, Tensor, Tensor, Tensor> walk_back(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Optional& tape, const Tensor& w_hh, const Optional& w_hr, const Optional& h0,
    const Optional& c0, const Optional& lengths, const Optional& reset, int64_t cell, bool reverse,
    bool inner, bool with_starts) {
  ScanBackward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(y.get());
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  const bool lstm = p.cell == Cell::lstm;
  FASTSEQ_CHECK((tape || G == 1) && (states || !lstm), "scan: this cell's backward pass needs its tape, an LSTM's its states");
  FASTSEQ_CHECK(y.dim() == 3 && w_hh.dim() == 2, "scan: y must be [T, B, P] and w_hh [G*H, P]");
  p.T = y.size(0), p.B = y.size(1), p.P = y.size(2), p.H = w_hh.size(0) / G;
  FASTSEQ_CHECK(w_hr || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  FASTSEQ_CHECK(lstm || (!w_hr && !c0 && !dc_n && !dstates), "scan: only an LSTM has w_hr, c0, dc_n and dstates");
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.dtype, accumulator = accumulator_of(dtype);
  p.dy = view("dy", dy, dtype, {p.T, p.B, p.P});
  p.dh_n = view("dh_n", dh_n, dtype, {p.B, p.P});
  p.dc_n = view("dc_n", dc_n, dtype, {p.B, p.H});
  p.dstates = view("dstates", dstates, accumulator, {p.T, p.B, p.H});
  p.y = view("y", y, dtype, {p.T, p.B, p.P});
  if (lstm) p.states = view("states", states, accumulator, {p.T, p.B, p.H});
  if (G > 1) p.tape = view("tape", tape, dtype, {p.T, p.B, 4 * p.H});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.P});
  p.w_hr = view("w_hr", w_hr, dtype, {p.P, p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});
  p.c0 = view("c0", c0, dtype, {p.B, p.H});

  const int64_t beside = p.cell == Cell::gru ? p.H : w_hr ? p.P : 0;  // what dhidden holds a row
  thread_local Workspace gates;
  const bool kept = inner && size_t(p.T * p.B * G * p.H) * bytes_of(dtype) <= Workspace::kKept;
  Tensor dgates = kept ? gates.tensor({p.T, p.B, G * p.H}, dtype) : empty({p.T, p.B, G * p.H}, dtype);
  const bool with_dh0 = h0 && with_starts, with_dc0 = c0 && with_starts;
  Tensor dh0 = with_dh0 ? empty({p.B, p.P}, dtype) : empty({0}, dtype);
  Tensor dhidden = beside ? empty({p.T, p.B, beside}, dtype) : empty({0}, dtype);
  Tensor dc0 = with_dc0 ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  if (p.B > 0 && p.P > 0) {
    auto whole = [&](const Tensor& out, int64_t n) { return ScanView{out.data_ptr(), p.B * n, n, 1}; };
    p.dgates = whole(dgates, G * p.H);
    if (beside) p.dhidden = whole(dhidden, beside);
    if (with_dh0) p.dh0 = whole(dh0, p.P);
    if (with_dc0) p.dc0 = whole(dc0, p.H);
    p.workspace = scratch().of(FASTSEQ_DISPATCH(scan_backward_workspace, p));
    FASTSEQ_DISPATCH(scan_backward, p);
  }
  return {dgates, dhidden, dh0, dc0};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> scan_backward_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Optional& tape, const Tensor& w_hh, const Optional& w_hr, const Optional& h0,
    const Optional& c0, const Optional& lengths, const Optional& reset, int64_t cell, bool reverse) {
  return walk_back(dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset, cell, reverse, false,
                   true);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_products_cpu(
    const Tensor& dgates, const Tensor& dhidden, const Tensor& x, const Tensor& w_ih, const Tensor& y,
    const Optional& tape, const Optional& h0, const Optional& lengths, const Optional& reset, int64_t cell,
    bool reverse, bool with_dx, bool with_weights) {
  ScanProducts p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(dgates.get());
  p.reverse = reverse;
  const int64_t G = gates_of(p.cell);
  FASTSEQ_CHECK(x.dim() == 3 && y.dim() == 3 && dgates.dim() == 3,
                  "scan: x must be [T, B, I], y [T, B, P] and dgates [T, B, G*H]");
  p.T = x.size(0), p.B = x.size(1), p.I = x.size(2), p.P = y.size(2), p.H = dgates.size(2) / G;
  Common common;
  common.fill(p, lengths, reset);
  const Dtype dtype = p.dtype;
  p.dgates = view("dgates", dgates, dtype, {p.T, p.B, G * p.H});
  if (p.cell == Cell::gru) p.dhidden = view("dhidden", dhidden, dtype, {p.T, p.B, p.H});
  p.x = view("x", x, dtype, {p.T, p.B, p.I});
  p.w_ih = view("w_ih", w_ih, dtype, {G * p.H, p.I});
  p.y = view("y", y, dtype, {p.T, p.B, p.P});
  if (p.cell == Cell::gru_reset_before) p.tape = view("tape", tape, dtype, {p.T, p.B, 4 * p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});

  Tensor dx = with_dx ? empty({p.T, p.B, p.I}, dtype) : empty({0}, dtype);
  Tensor dw_ih = with_weights ? empty({G * p.H, p.I}, dtype) : empty({0}, dtype);
  Tensor dw_hh = with_weights ? empty({G * p.H, p.P}, dtype) : empty({0}, dtype);
  Tensor db_ih = with_weights ? empty({G * p.H}, dtype) : empty({0}, dtype);
  Tensor db_hh = with_weights ? empty({G * p.H}, dtype) : empty({0}, dtype);
  if (with_dx) p.dx = ScanView{dx.data_ptr(), p.B * p.I, p.I, 1};
  if (with_weights) {
    p.dw_ih = ScanView{dw_ih.data_ptr(), 0, p.I, 1};
    p.dw_hh = ScanView{dw_hh.data_ptr(), 0, p.P, 1};
    p.db_ih.data = db_ih.data_ptr();
    p.db_hh.data = db_hh.data_ptr();
  }
  p.workspace = scratch().of(FASTSEQ_DISPATCH(scan_products_workspace, p));
  FASTSEQ_DISPATCH(scan_products, p);
  return {dx, dw_ih, dw_hh, db_ih, db_hh};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_gradient(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& x,
    const Tensor& w_ih, const Tensor& w_hh, const Optional& w_hr, const Optional& h0, const Optional& c0,
    const Optional& lengths, const Optional& reset, const Tensor& y, const Optional& states, const Optional& tape,
    int64_t cell, bool reverse, bool with_dx, bool with_weights, bool with_starts) {
  auto [dgates, dhidden, dh0, dc0] =
      walk_back(dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset, cell, reverse, true,
                with_starts);
  if (!with_dx && !with_weights) {
    auto absent = [&] { return empty({0}, dtype_of(x.get())); };  // one each: results must not alias
    return {absent(), absent(), absent(), absent(), absent(), dh0, dc0, dhidden};
  }
  auto [dx, dw_ih, dw_hh, db_ih, db_hh] = scan_products_cpu(dgates, dhidden, x, w_ih, y, tape, h0, lengths, reset,
                                                            cell, reverse, with_dx, with_weights);
  return {dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dhidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_gradient_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& x,
    const Tensor& w_ih, const Tensor& w_hh, const Optional& w_hr, const Optional& h0, const Optional& c0,
    const Optional& lengths, const Optional& reset, const Tensor& y, const Optional& states, const Optional& tape,
    int64_t cell, bool reverse, bool with_dx, bool with_weights) {
  return scan_gradient(dy, dh_n, dc_n, dstates, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, y, states, tape, cell,
                       reverse, with_dx, with_weights, true);
}

}  // namespace fastseq

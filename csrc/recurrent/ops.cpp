// torch.ops.fastseq.scan_*.native and layers_*.native on the CPU. The schemas, with every shape, are in fastseq/ops.
#include "core/ops.h"
#include "core/settings.h"
#include "recurrent/stack.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;
using Optional = OptionalTensor;
using Tensors = std::vector<Tensor>;

Handles handles_of(const Tensors& tensors) {
  Handles handles;
  for (const Tensor& t : tensors) handles.push_back(t.get());
  return handles;
}

// A result that is always a tensor: of no elements in place of none.
Tensor present(const Optional& t, Dtype dtype) { return t ? *t : empty({0}, dtype); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scan_forward_cpu(
    const Tensor& x, const Tensor& w_ih, const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
    const Optional& w_hr, const Optional& h0, const Optional& c0, const Optional& reset_h, const Optional& reset_c,
    const Optional& lengths, const Optional& reset, const Optional& state_mask, const Optional& zoneout_h,
    const Optional& zoneout_c, int64_t cell, bool reverse, bool save, bool states) {
  const AtenTensorHandle weights[] = {w_ih.get(), w_hh.get(), handle_of(b_ih), handle_of(b_hh), handle_of(w_hr)};
  const StackCall call{x.get(), handle_of(h0), handle_of(c0), weights, w_hr ? 5 : 4, cell_of(cell), Layout::scan,
                       1,       false,         reverse,       lengths, reset, handle_of(state_mask), handle_of(reset_h),
                       handle_of(reset_c), handle_of(zoneout_h), handle_of(zoneout_c)};
  const Dtype dtype = dtype_of(x.get());
  StackResult r = Stack(call).run(save, states);
  Tensor c_all = r.states.empty() ? empty({0}, dtype) : r.states[0];
  return {*r.y, *r.h_n, present(r.c_n, dtype), c_all, r.tapes.empty() ? empty({0}, dtype) : r.tapes[0]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Optional& tape, const Tensor& w_hh, const Optional& w_hr, const Optional& h0,
    const Optional& c0, const Optional& reset_h, const Optional& reset_c, const Optional& lengths, const Optional& reset,
    const Optional& state_mask, const Optional& zoneout_h, const Optional& zoneout_c, int64_t cell, bool reverse) {
  ScanBackward p{};
  p.cell = cell_of(cell);
  p.dtype = dtype_of(y.get());
  p.reverse = reverse;
  p.threads = int(torch::stable::get_num_threads());
  p.deterministic = is_deterministic();
  const int64_t G = gates_of(p.cell);
  const bool lstm = has_c(p.cell);
  FASTSEQ_CHECK((tape || tape_of(p.cell) == 0) && (states || !lstm), "scan: this cell's backward pass needs its tape, an LSTM's its states");
  FASTSEQ_CHECK(y.dim() == 3 && w_hh.dim() == 2, "scan: y must be [T, B, P] and w_hh [G*H, P]");
  p.T = y.size(0), p.B = y.size(1), p.P = y.size(2), p.H = w_hh.size(0) / G;
  FASTSEQ_CHECK(w_hr || p.P == p.H, "scan: w_hh must be [G*H, H] where there is no w_hr");
  FASTSEQ_CHECK(lstm || (!w_hr && !c0 && !dc_n && !dstates && !reset_c && !zoneout_c),
                "scan: only an LSTM has w_hr, c0, dc_n, dstates, reset_c and zoneout_c");
  FASTSEQ_CHECK(!w_hr || !zoneout_c, "scan: there is no zoneout_c beside w_hr");
  const Optional dense_lengths = set_lengths(p, lengths, reset);
  const Dtype dtype = p.dtype, accumulator = accumulator_of(dtype);
  p.dy = view("dy", dy, dtype, {p.T, p.B, p.P});
  p.dh_n = view("dh_n", dh_n, dtype, {p.B, p.P});
  p.dc_n = view("dc_n", dc_n, dtype, {p.B, p.H});
  p.dstates = view("dstates", dstates, accumulator, {p.T, p.B, p.H});
  p.y = view("y", y, dtype, {p.T, p.B, p.P});
  if (lstm) p.states = view("states", states, accumulator, {p.T, p.B, p.H});
  if (tape_of(p.cell) > 0) p.tape = view("tape", tape, dtype, {p.T, p.B, tape_of(p.cell) * p.H});
  p.w_hh = view("w_hh", w_hh, dtype, {G * p.H, p.P});
  p.w_hr = view("w_hr", w_hr, dtype, {p.P, p.H});
  p.h0 = view("h0", h0, dtype, {p.B, p.P});
  p.c0 = view("c0", c0, dtype, {p.B, p.H});
  p.mask = view("state_mask", state_mask, dtype, {p.B, p.P});
  p.reset_h = view("reset_h", reset_h, dtype, {p.B, p.P});
  p.reset_c = view("reset_c", reset_c, dtype, {p.B, p.H});
  p.keep_h = view("zoneout_h", zoneout_h, dtype, {p.T, p.B, p.P});
  p.keep_c = view("zoneout_c", zoneout_c, dtype, {p.T, p.B, p.H});

  const int64_t beside = p.cell == Cell::gru ? p.H : w_hr ? p.P : 0;  // what dhidden holds a row
  Tensor dgates = empty({p.T, p.B, G * p.H}, dtype);
  Tensor dh0 = h0 ? empty({p.B, p.P}, dtype) : empty({0}, dtype);
  Tensor dhidden = beside ? empty({p.T, p.B, beside}, dtype) : empty({0}, dtype);
  Tensor dc0 = c0 ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  Tensor dreset_h = reset_h ? empty({p.B, p.P}, dtype) : empty({0}, dtype);
  Tensor dreset_c = reset_c ? empty({p.B, p.H}, dtype) : empty({0}, dtype);
  if (p.B > 0 && p.P > 0) {
    auto whole = [&](const Tensor& out, int64_t n) { return ScanView{out.data_ptr(), p.B * n, n, 1}; };
    p.dgates = whole(dgates, G * p.H);
    if (beside) p.dhidden = whole(dhidden, beside);
    if (h0) p.dh0 = whole(dh0, p.P);
    if (c0) p.dc0 = whole(dc0, p.H);
    if (reset_h) p.dreset_h = whole(dreset_h, p.P);
    if (reset_c) p.dreset_c = whole(dreset_c, p.H);
    p.workspace = scratch().of(FASTSEQ_DISPATCH(scan_backward_workspace, p));
    FASTSEQ_DISPATCH(scan_backward, p);
  }
  return {dgates, dhidden, dh0, dc0, dreset_h, dreset_c};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> layers_forward_cpu(
    const Tensor& x, const Tensors& weights, const Optional& h0, const Optional& c0, const Optional& reset_h,
    const Optional& reset_c, const Optional& lengths, const Optional& reset, const Optional& state_mask,
    const Optional& zoneout_h, const Optional& zoneout_c, int64_t cell, int64_t num_layers, bool bidirectional, bool reverse,
    bool save, bool states) {
  const Handles w = handles_of(weights);
  const StackCall call{x.get(), handle_of(h0), handle_of(c0), w.data(), int64_t(w.size()), cell_of(cell), Layout::layer,
                       num_layers, bidirectional, reverse, lengths, reset, handle_of(state_mask), handle_of(reset_h),
                       handle_of(reset_c), handle_of(zoneout_h), handle_of(zoneout_c)};
  StackResult r = Stack(call).run(save, states);
  return {*r.y, *r.h_n, present(r.c_n, dtype_of(x.get())), r.ys, r.states, r.tapes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors> layers_backward_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Tensors& dstates, const Tensor& x,
    const Tensors& weights, const Optional& h0, const Optional& c0, const Optional& reset_h, const Optional& reset_c,
    const Optional& lengths, const Optional& reset, const Optional& state_mask, const Optional& zoneout_h,
    const Optional& zoneout_c, const Optional&, const Tensors& ys, const Tensors& states, const Tensors& tapes,
    int64_t cell, int64_t num_layers, bool bidirectional, bool reverse, bool with_dx, bool with_weights) {
  const Handles w = handles_of(weights);
  const StackCall call{x.get(), handle_of(h0), handle_of(c0), w.data(), int64_t(w.size()), cell_of(cell), Layout::layer,
                       num_layers, bidirectional, reverse, lengths, reset, handle_of(state_mask), handle_of(reset_h),
                       handle_of(reset_c), handle_of(zoneout_h), handle_of(zoneout_c)};
  FASTSEQ_CHECK(!ys.empty(), "scan: the backward pass needs the outputs of all layers");
  Handles below = handles_of(ys);
  below.pop_back();
  const Dtype dtype = dtype_of(x.get());
  StackInputGradients d = Stack(call).run_back({handle_of(dy), handle_of(dh_n), handle_of(dc_n), handles_of(dstates),
                                                ys.back().get(), below, handles_of(states), handles_of(tapes), with_dx,
                                                true, with_weights});
  return {present(d.dx, dtype),       present(d.dh0, dtype),      present(d.dc0, dtype),
          present(d.dreset_h, dtype), present(d.dreset_c, dtype), d.weights};
}

}  // namespace fastseq

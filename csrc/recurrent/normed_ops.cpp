// torch.ops.fastseq.normed_forward.native and normed_backward.native. The schemas, with every shape, are in fastseq/ops.
#include "core/ops.h"
#include "core/settings.h"
#include "recurrent/cpu/normed.h"
#include "recurrent/stack.h"

namespace fastseq {
namespace {

using torch::stable::Tensor;
using Optional = OptionalTensor;

// What both calls are told beside tensors, from the shape of `steps` [T,B,..]. Returns what must be kept alive.
Optional set_sizes(NormedSizes& p, const Tensor& steps, const Tensor& w_hh, const Optional& c, const Optional& lengths,
                   const Optional& reset, const Optional& state_mask, int64_t cell, bool joint, bool reverse) {
  p.cell = cell_of(cell);
  p.dtype = dtype_of(steps.get());
  p.joint = joint;
  p.reverse = reverse;
  p.threads = int(torch::stable::get_num_threads());
  p.deterministic = is_deterministic();
  FASTSEQ_CHECK(p.cell != Cell::gru_reset_before, "scan: gru_reset_before has no normalised form");
  FASTSEQ_CHECK(!joint || p.cell == Cell::gru, "scan: a GRU alone is normalised jointly");
  FASTSEQ_CHECK(has_c(p.cell) || !c, "scan: only an LSTM has a c");
  FASTSEQ_CHECK(steps.dim() == 3 && w_hh.dim() == 2, "scan: gates_x and y must be [T, B, ..] and w_hh [G*H, H]");
  p.T = steps.size(0), p.B = steps.size(1), p.I = 0, p.H = p.P = w_hh.size(1);
  p.mask = view("state_mask", state_mask, p.dtype, {p.B, p.H});
  return set_lengths(p, lengths, reset);
}

// The parameters of a normalisation, and the states that a walk starts from.
template <class P>
void set_parameters(P& p, const Tensor& w_hh, const Tensor& gain, const Optional& shift, const Optional& gain_c,
                    const Optional& shift_c, const Optional& h0, const Optional& c0) {
  const int64_t rows = gates_of(p.cell) * p.H;
  FASTSEQ_CHECK(has_c(p.cell) == bool(gain_c) && bool(gain_c) == bool(shift_c), "scan: an LSTM, and nothing else, has gain_c and shift_c");
  p.w_hh = view("w_hh", w_hh, p.dtype, {rows, p.H});
  p.gain = view("gain", gain, p.dtype, {rows});
  p.shift = view("shift", shift, p.dtype, {rows});
  p.gain_c = view("gain_c", gain_c, p.dtype, {p.H});
  p.shift_c = view("shift_c", shift_c, p.dtype, {p.H});
  p.h0 = view("h0", h0, p.dtype, {p.B, p.H});
  p.c0 = view("c0", c0, p.dtype, {p.B, p.H});
}

// A result [T,B,n] or [B,n], and its view; of no elements where it is not wanted.
Tensor made(ScanView& to, bool wanted, std::initializer_list<int64_t> sizes, Dtype dtype) {
  if (!wanted) return empty({0}, dtype);
  Tensor out = empty(sizes, dtype);
  const int64_t* n = sizes.begin();
  if (sizes.size() == 3) to = {out.data_ptr(), n[1] * n[2], n[2], 1};
  if (sizes.size() == 2) to = {out.data_ptr(), 0, n[1], 1};
  if (sizes.size() == 1) to = {out.data_ptr(), 0, 0, 1};
  return out;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normed_forward_cpu(
    const Tensor& gates_x, const Tensor& w_hh, const Tensor& gain, const Optional& shift, const Optional& gain_c,
    const Optional& shift_c, const Optional& h0, const Optional& c0, const Optional& lengths, const Optional& reset,
    const Optional& state_mask, int64_t cell, bool joint, bool reverse, bool save, bool states) {
  NormedForward p{};
  const Optional kept = set_sizes(p, gates_x, w_hh, c0, lengths, reset, state_mask, cell, joint, reverse);
  set_parameters(p, w_hh, gain, shift, gain_c, shift_c, h0, c0);
  p.gx = view("gates_x", gates_x, p.dtype, {p.T, p.B, gates_of(p.cell) * p.H});
  const bool lstm = has_c(p.cell);
  const Dtype wide = accumulator_of(p.dtype);
  Tensor y = made(p.y, true, {p.T, p.B, p.H}, p.dtype);
  Tensor h_n = made(p.h_n, true, {p.B, p.H}, p.dtype);
  Tensor c_n = made(p.c_n, lstm, {p.B, p.H}, p.dtype);
  Tensor c_all = made(p.states, lstm && (save || states), {p.T, p.B, p.H}, wide);
  Tensor tape = made(p.tape, save, {p.T, p.B, normed_tape_of(p.cell) * p.H}, p.dtype);
  Tensor stats = made(p.stats, save, {p.T, p.B, normed_stats_of(p.cell)}, wide);
  if (p.B > 0 && p.H > 0) {
    p.workspace = scratch().of(FASTSEQ_DISPATCH(normed_forward_workspace, p));
    FASTSEQ_DISPATCH(normed_forward, p);
  }
  return {y, h_n, c_n, c_all, tape, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normed_backward_cpu(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dstates, const Tensor& y,
    const Optional& states, const Tensor& tape, const Tensor& stats, const Tensor& w_hh, const Tensor& gain,
    const Optional& shift, const Optional& gain_c, const Optional& shift_c, const Optional& h0, const Optional& c0,
    const Optional& lengths, const Optional& reset, const Optional& state_mask, int64_t cell, bool joint, bool reverse) {
  NormedBackward p{};
  const Optional kept = set_sizes(p, y, w_hh, c0, lengths, reset, state_mask, cell, joint, reverse);
  set_parameters(p, w_hh, gain, shift, gain_c, shift_c, h0, c0);
  const bool lstm = has_c(p.cell);
  FASTSEQ_CHECK(lstm == bool(states) && (lstm || (!dc_n && !dstates)), "scan: an LSTM, and nothing else, has states");
  const Dtype wide = accumulator_of(p.dtype);
  const int64_t rows = gates_of(p.cell) * p.H;
  p.dy = view("dy", dy, p.dtype, {p.T, p.B, p.H});
  p.dh_n = view("dh_n", dh_n, p.dtype, {p.B, p.H});
  p.dc_n = view("dc_n", dc_n, p.dtype, {p.B, p.H});
  p.dstates = view("dstates", dstates, wide, {p.T, p.B, p.H});
  p.y = view("y", y, p.dtype, {p.T, p.B, p.H});
  p.states = view("states", states, wide, {p.T, p.B, p.H});
  p.tape = view("tape", tape, p.dtype, {p.T, p.B, normed_tape_of(p.cell) * p.H});
  p.stats = view("stats", stats, wide, {p.T, p.B, normed_stats_of(p.cell)});
  FASTSEQ_CHECK(p.stats.e == 1, "scan: stats must be as the forward pass gave them");
  Tensor dgates_x = made(p.dgx, !joint, {p.T, p.B, rows}, p.dtype);
  Tensor dproduct = made(p.dproduct, true, {p.T, p.B, rows}, p.dtype);
  Tensor dgain = made(p.dgain, true, {rows}, p.dtype);
  Tensor dshift = made(p.dshift, bool(shift), {rows}, p.dtype);
  Tensor dgain_c = made(p.dgain_c, lstm, {p.H}, p.dtype);
  Tensor dshift_c = made(p.dshift_c, lstm, {p.H}, p.dtype);
  Tensor dh0 = made(p.dh0, bool(h0), {p.B, p.H}, p.dtype);
  Tensor dc0 = made(p.dc0, bool(c0), {p.B, p.H}, p.dtype);
  if (p.H > 0) {
    p.workspace = scratch().of(FASTSEQ_DISPATCH(normed_backward_workspace, p));
    FASTSEQ_DISPATCH(normed_backward, p);
  }
  return {dgates_x, dproduct, dgain, dshift, dgain_c, dshift_c, dh0, dc0};
}

}  // namespace fastseq

// Entries that walk with options (ScanOptions) and without torch, for faults planted in them: an LSTM and both GRUs, in
// bfloat16, in the role `grid`.
#include "recurrent_setting.h"
#include "entry.h"

using namespace fastseq::cuda;
using fastseq::Cell;

// p: gates_x, w_hh, b_hh, lengths, reset, mask, reset_h, reset_c, zoneout_h, zoneout_c; y, h_n, c_n, states, tape
FASTSEQ_ENTRY(walk_options_forward) {
  ScanForward a{};
  const int64_t B = n[1], H = n[2];
  a.options = {p[5], p[6], p[7], {p[8], B * H, H, 1}, {p[9], B * H, H, 1}};
  const Setting s(a, n, false, p[3], p[4]);
  if (s.plan.role != ScanRole::grid) return "the plan has no such role";
  a.gates_x = p[0], a.x_t = a.B, a.x_b = 1, a.w_hh = p[1], a.b_hh = p[2];
  a.y = p[10], a.y_t = a.B, a.y_b = 1, a.h_n = p[11], a.c_n = p[12], a.states = static_cast<float*>(p[13]), a.tape = p[14];
  return launch(s.cell == Cell::lstm  ? resident_forward<Cell::lstm, Bf16, GridExchange, true>
                : s.cell == Cell::gru ? resident_forward<Cell::gru, Bf16, GridExchange, true>
                                      : resident_forward<Cell::gru_reset_before, Bf16, GridExchange, true>,
                s.plan.launch, nullptr, a, s.resident());
}

// p: dy, dh_n, dc_n, y, tape, w_hh, states, lengths, reset, mask, reset_h, reset_c, zoneout_h, zoneout_c; dgates,
// dhidden, dreset_h, dreset_c, which are zeros
FASTSEQ_ENTRY(walk_options_backward) {
  ScanBackward a{};
  const int64_t B = n[1], H = n[2];
  a.options = {p[9], p[10], p[11], {p[12], B * H, H, 1}, {p[13], B * H, H, 1}, static_cast<float*>(p[16]),
               static_cast<float*>(p[17])};
  const Setting s(a, n, true, p[7], p[8]);
  if (s.plan.role != ScanRole::grid) return "the plan has no such role";
  a.dy = p[0], a.x_t = a.B, a.x_b = 1, a.dh_n = p[1], a.dc_n = p[2], a.y = p[3], a.y_t = a.B, a.y_b = 1;
  a.tape = p[4], a.w_hh = p[5], a.states = static_cast<const float*>(p[6]), a.dgates = p[14], a.dhidden = p[15];
  return launch(s.cell == Cell::lstm  ? resident_backward<Cell::lstm, Bf16, GridExchange, true>
                : s.cell == Cell::gru ? resident_backward<Cell::gru, Bf16, GridExchange, true>
                                      : resident_backward<Cell::gru_reset_before, Bf16, GridExchange, true>,
                s.plan.launch, nullptr, a, s.resident());
}

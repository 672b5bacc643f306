// Entries that walk without torch, as a sanitizer's process can call them: an LSTM and a gru_reset_before, whose
// exchanges are those of all cells, in bfloat16.
#include "recurrent_setting.h"
#include "entry.h"

namespace fastseq::cuda {

template <template <class> class Exchange>
ForwardKernel some_forward(ScanCell cell) {
  return cell == ScanCell::lstm ? resident_forward<ScanCell::lstm, Bf16, Exchange>
                                : resident_forward<ScanCell::gru_reset_before, Bf16, Exchange>;
}
template <template <class> class Exchange>
BackwardKernel some_backward(ScanCell cell) {
  return cell == ScanCell::lstm ? resident_backward<ScanCell::lstm, Bf16, Exchange>
                                : resident_backward<ScanCell::gru_reset_before, Bf16, Exchange>;
}

}  // namespace fastseq::cuda

using namespace fastseq::cuda;

// p: gates_x, w_hh, b_hh, h0, c0, lengths, reset; y, h_n, c_n, states, tape
FASTSEQ_ENTRY(walk_forward) {
  ScanForward a{};
  const Setting s(a, n, false, p[5], p[6]);
  if (s.plan.role == ScanRole::step) return "the plan has no such role";
  a.gates_x = p[0], a.x_t = a.B, a.x_b = 1, a.w_hh = p[1], a.b_hh = p[2], a.h0 = p[3], a.c0 = p[4];
  a.y = p[7], a.y_t = a.B, a.y_b = 1, a.h_n = p[8], a.c_n = p[9], a.states = static_cast<float*>(p[10]), a.tape = p[11];
  return launch(s.plan.role == ScanRole::cluster           ? some_forward<ClusterExchange>(s.cell)
                : s.plan.role == ScanRole::cluster_barrier ? some_forward<ClusterBarrierExchange>(s.cell)
                                                           : some_forward<GridExchange>(s.cell),
                s.plan.launch, nullptr, a, s.resident());
}

// p: dy, dh_n, dc_n, y, tape, w_hh, h0, c0, states, lengths, reset; dgates, dh0, dc0
FASTSEQ_ENTRY(walk_backward) {
  ScanBackward a{};
  const Setting s(a, n, true, p[9], p[10]);
  if (s.plan.role == ScanRole::step) return "the plan has no such role";
  a.dy = p[0], a.x_t = a.B, a.x_b = 1, a.dh_n = p[1], a.dc_n = p[2], a.y = p[3], a.y_t = a.B, a.y_b = 1;
  a.tape = p[4], a.w_hh = p[5];
  a.h0 = p[6], a.c0 = p[7], a.states = static_cast<const float*>(p[8]);
  a.dgates = p[11], a.dh0 = p[12], a.dc0 = p[13];
  return launch(s.plan.role == ScanRole::cluster           ? some_backward<ClusterExchange>(s.cell)
                : s.plan.role == ScanRole::cluster_barrier ? some_backward<ClusterBarrierExchange>(s.cell)
                                                           : some_backward<GridExchange>(s.cell),
                s.plan.launch, nullptr, a, s.resident());
}

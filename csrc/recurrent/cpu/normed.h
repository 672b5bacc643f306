// The recurrence of a layer with layer normalisation on the CPU: one layer, one direction, all time steps.
//
// The caller normalises the input's share of the gates, gx, over all steps at once. Here u = gain * LN(product) + shift,
// with product = W_hh h_prev, or gx + W_hh h_prev in the joint form (GRU alone). LN is over all G*H gates of a row.
// Letters and views as in recurrent.h; P = H and I = 0.
#pragma once
#include "recurrent/cpu/recurrent.h"

namespace fastseq {

constexpr double kNormEps = 1e-5;  // added to a variance

// Numbers that `stats` keeps of a row and step: 1/std of the product, and where there is a c its mean and 1/std.
constexpr int normed_stats_of(Cell cell) { return has_c(cell) ? 3 : 1; }
// Blocks of H that the tape keeps of a row and step: the activated gates, (an RNN's is its output), then LN(product).
constexpr int normed_gates_of(Cell cell) { return cell == Cell::rnn_tanh || cell == Cell::rnn_relu ? 0 : gates_of(cell); }
constexpr int normed_tape_of(Cell cell) { return normed_gates_of(cell) + gates_of(cell); }

struct NormedSizes : ScanSizes {
  bool joint;
};

// gx [T,B,G*H], w_hh [G*H,H], gain and shift [G*H], gain_c and shift_c [H] (of a c alone); shift, h0 and c0 may be null.
struct NormedForward : NormedSizes {
  ScanView gx, w_hh, gain, shift, gain_c, shift_c, h0, c0;
  // Outputs with e = 1. c_n is null without a c; states [T,B,H] (c_t), tape [T,B,normed_tape_of*H] and stats
  // [T,B,normed_stats_of] are null where not wanted. states and stats are of the accumulator's type.
  ScanView y, h_n, c_n, states, tape, stats;
  void* workspace;  // of normed_forward_workspace bytes, aligned to 64; need not be initialised
};

struct NormedBackward : NormedSizes {
  ScanView dy, dh_n, dc_n, dstates;  // any may be null: zero
  ScanView y, states, tape, stats, w_hh, gain, shift, gain_c, shift_c, h0, c0;
  // Outputs with e = 1. dproduct [T,B,G*H] is the gradient of W_hh h_prev, in the joint form of gx too: dgx is null then.
  // dshift, dh0 and dc0 are null where not wanted.
  ScanView dgx, dproduct, dgain, dshift, dgain_c, dshift_c, dh0, dc0;
  void* workspace;  // of normed_backward_workspace bytes, as above
};

FASTSEQ_DECLARE(size_t, normed_forward_workspace, (const NormedForward& p))
FASTSEQ_DECLARE(void, normed_forward, (const NormedForward& p))
FASTSEQ_DECLARE(size_t, normed_backward_workspace, (const NormedBackward& p))
FASTSEQ_DECLARE(void, normed_backward, (const NormedBackward& p))

}  // namespace fastseq

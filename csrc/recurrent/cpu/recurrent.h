// The recurrent scan on the CPU: one layer, one direction, all time steps.
//
// Plain arguments, no torch: pointers, sizes, strides in elements. Letters: T steps, B batch, I input features,
// H hidden units, P projected units (= H without w_hr), G gates of the cell in torch's order.
#pragma once
#include <cstddef>
#include <cstdint>

#include "recurrent/cells.h"
#include "core/dtype.h"
#include "core/isa.h"

namespace fastseq {

// Element [t, b, e] of a tensor; what has no time or no batch has a stride that is not used.
struct ScanView {
  void* data = nullptr;
  int64_t t = 0, b = 0, e = 1;
};

struct ScanSizes {
  Cell cell;
  Dtype dtype;  // of all but states and dstates, which have the accumulator's: float for the 16-bit ones
  int64_t T, B, I, H, P;
  bool reverse;
  int threads;             // at most this many
  bool deterministic;      // the order of every sum of a row depends on the row alone, not on how many there are
  const int64_t* lengths;  // [B] or null; from step lengths[b] on, y is 0 and the state stands still
  const bool* reset;       // [T,B] or null: the state is replaced before that step
  int64_t reset_t, reset_b;
  ScanView mask;  // [B,P] or null: multiplies what products read of the state before, not what a GRU carries on of it
  ScanView reset_h, reset_c;  // [B,P], [B,H] or null (zeros): what `reset` puts in the state's place
  // [T,B,P], [T,B,H] or null: the share of the state before that the new one keeps. Backward takes those of an RNN for 0 or 1,
  // and has none of c beside w_hr.
  ScanView keep_h, keep_c;
};

// w_ih [G*H,I], w_hh [G*H,P], w_hr [P,H] or null are ScanViews with b for the row and e for the column; biases [G*H].
struct ScanForward : ScanSizes {
  // Of w_ih, w_hh and w_hr: dtype, or with f32 the smaller bf16 or i8. The smaller ones are packed beforehand, for
  // scan_lanes() lanes; data is all of their view. Of i8 each row has a float scale: s_ih and s_hh [G*H], s_hr [P].
  Dtype weights;
  // Products multiply weights as they are, activations being rounded to their type, where the instruction set multiplies
  // that. Elsewhere, and without this, such weights are widened and products are float32's. Then i8 has a second row of
  // floats beside its scales, b apart: -128 times the sum of each row's weights.
  bool narrow;
  ScanView s_ih, s_hh, s_hr;
  ScanView x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0;  // biases, w_hr and (zero) states may be null
  // Outputs with e = 1. c_n is null but for an LSTM; states [T,B,H] and tape [T,B,tape_of(cell)*H] (an LSTM's gates; GRU
  // r,z,n,q) are null where not wanted.
  ScanView y, h_n, c_n, states, tape;
  // States of many sequences in one block. With `read` row b starts from row read[b] of h0 and c0; with `write` its last
  // state goes to row write[b] of h_kept and c_kept too. Rows that are written are distinct, and none of those read.
  const int64_t *read, *write;  // [B] or null
  ScanView h_kept, c_kept;      // e = 1
  void* workspace;  // of scan_forward_workspace bytes, aligned to 64; need not be initialised
};

struct ScanBackward : ScanSizes {
  ScanView dy, dh_n, dc_n, dstates;              // any may be null: zero
  ScanView y, states, tape, w_hh, w_hr, h0, c0;  // w_hr null without a projection; h0, c0 null: zero
  // Outputs with e = 1. dhidden: gru [T,B,H] gradient of W_hn h + b_hn; with w_hr [T,B,P] gradient of h_t; else null.
  // dh0, dc0 and the gradients of reset_h and reset_c are null where not wanted.
  ScanView dgates, dhidden, dh0, dc0, dreset_h, dreset_c;
  void* workspace;  // of scan_backward_workspace bytes, as above
};

// The products over all steps at once: dx = dgates W_ih, dW_ih = dgates^T x, dW_hh = dgates^T h_prev, db = sum dgates.
// What is null is not made, dw_ih, dw_hh, db_ih and db_hh only together. y, tape and h0 (null: zero) as the walk had
// them.
struct ScanProducts : ScanSizes {
  ScanView dgates, dhidden, x, w_ih, y, tape, h0;
  ScanView dx, dw_ih, dw_hh, db_ih, db_hh;  // outputs with e = 1
  void* workspace;                          // of scan_products_workspace bytes, as above
};

// A matrix of `gates` blocks of H rows of K, of a type smaller than float, packed: its rows are zero-padded to whole
// vectors of lanes and its columns to whole words of 4 bytes, and lie as [vector of H][word of K][gate][lane][element of
// the word]. W_hh of gru_reset_before is two such blocks: of r and z, then of n.
struct ScanPacked {
  int64_t lanes, word;  // lanes of a vector; elements of a word
  int64_t vectors(int64_t H) const { return (H + lanes - 1) / lanes; }
  int64_t words(int64_t K) const { return (K + word - 1) / word; }
};
FASTSEQ_DECLARE(int, scan_lanes, ())

FASTSEQ_DECLARE(size_t, scan_forward_workspace, (const ScanForward& p))
FASTSEQ_DECLARE(void, scan_forward, (const ScanForward& p))
FASTSEQ_DECLARE(size_t, scan_backward_workspace, (const ScanBackward& p))
FASTSEQ_DECLARE(void, scan_backward, (const ScanBackward& p))
FASTSEQ_DECLARE(size_t, scan_products_workspace, (const ScanProducts& p))
FASTSEQ_DECLARE(void, scan_products, (const ScanProducts& p))

}  // namespace fastseq

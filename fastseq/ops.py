"""The table of contents of ``torch.ops.fastseq``: every schema, its fake kernel and its vmap rule.

Schemas are defined here, in Python, so that they exist whether or not the compiled extension does. An operator has
one overload a backend (``scan_forward.native``, ``scan_forward.triton``), so a compiled graph shows which one ran.

Shapes: T time steps, B batch, I input features, H hidden units, P projected units (= H without ``w_hr``),
G gates a cell (1 for an RNN, 3 for a GRU, 4 for an LSTM); Tq, Tk query and key positions, Hq, Hk heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}
"""Number of gates G of each cell; rows of ``w_ih`` and ``w_hh`` are G blocks of H, in torch's order."""

TAPE = {"rnn_tanh": 0, "rnn_relu": 0, "lstm": 4, "gru": 4, "gru_reset_before": 4}
"""Blocks of H that the tape keeps a step: LSTM i,f,g,o; GRU r,z,n,q with q = W_hn h + b_hn (reset after the product)
or q = r * h_prev (reset before it). An RNN needs only its output."""

# One layer, one direction, all time steps.
#   x [T,B,I], w_ih [G*H,I], w_hh [G*H,P], b_ih, b_hh [G*H], w_hr [P,H] (LSTM only), h0 [B,P], c0 [B,H] (LSTM only),
#   lengths int64 [B], reset bool [T,B]
# -> y [T,B,P], h_n [B,P], c_n [B,H] (empty unless LSTM),
#    states [T,B,H]: c_t of each step in the accumulator's dtype (LSTM, where asked for by save or states; else empty),
#    tape [T,B,TAPE*H] (where save is set; else empty)
# From step lengths[b] on y is 0 and the state stands still; a reverse scan starts at lengths[b]-1.
SCAN_FORWARD = (
    "(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor h0, Tensor? c0, "
    "Tensor? lengths, Tensor? reset, str cell, bool reverse, bool save, bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor states, Tensor tape)"
)

# The walk back through time; the large products (dx, dW, db) are torch's and live in autograd.py.
# -> dgates [T,B,G*H]: gradient of the gates' input-side pre-activations (0 at steps past lengths),
#    dhidden: what the hidden side needs besides: GRU [T,B,H] gradient of W_hn h + b_hn; LSTM with w_hr [T,B,P] whole
#    gradient that reaches h_t; else empty,
#    dh0 [B,P], dc0 [B,H] (empty unless LSTM)
SCAN_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dstates, Tensor y, Tensor states, Tensor tape, Tensor w_hh, "
    "Tensor? w_hr, Tensor h0, Tensor? c0, Tensor? lengths, Tensor? reset, str cell, bool reverse) "
    "-> (Tensor dgates, Tensor dhidden, Tensor dh0, Tensor dc0)"
)

# Dense: q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv]. Packed (cu_seqlens given): [total,H,D].
#   bias [B|1,Hq|1,Tq|1,Tk|1] in q's dtype or float32, mask bool of such a shape (True: may look), sinks [Hq],
#   alibi_slopes float32 [Hq], lengths_q, lengths_k int64 [B], cu_seqlens int32 [B+1], seed int64 [1]
#   scores s = scale * q k^T; softcap * tanh(s / softcap); + bias; - alibi * |i + shift - j|; then mask and limits
#   shift = 0, or Tk - Tq where bottom_right; a window of -1 has no limit
# -> o as q with Dv features, lse float32 (float64 for float64) [B,Hq,Tq], packed [Hq,total]
_ATTENTION_OPTIONS = (
    "Tensor? bias, Tensor? mask, Tensor? sinks, Tensor? alibi_slopes, Tensor? lengths_q, Tensor? lengths_k, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, float scale, bool causal, bool bottom_right, "
    "int window_left, int window_right, float softcap, float dropout_p"
)
ATTENTION_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_ATTENTION_OPTIONS}) -> (Tensor o, Tensor lse)"

# -> dq, dk, dv, dbias (shape and dtype of bias, summed over what was broadcast; empty unless bias_grad),
#    dsinks (empty without sinks)
ATTENTION_BACKWARD = (
    f"(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_ATTENTION_OPTIONS}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

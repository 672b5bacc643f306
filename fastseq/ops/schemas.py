"""The schemas of ``torch.ops.fastseq``, with every shape and dtype.

Nothing is imported here: setup.py reads this file too, for the library that programs without Python load.

Shapes: T time steps, B batch, I input features, H hidden units, P projected units (= H without ``w_hr``),
G gates a cell (the table in fastseq/recurrent/cells.py), L layers, D directions; Tq, Tk query and key positions,
Hq, Hk heads.
"""

from __future__ import annotations

# `int cell`, here and below: a cell's number, NUMBER of its name.

# One layer, one direction, all time steps.
#   x [T,B,I], w_ih [G*H,I], w_hh [G*H,P], b_ih, b_hh [G*H], w_hr [P,H] (LSTM only), h0 [B,P], c0 [B,H] (LSTM only),
#   reset_h [B,P], reset_c [B,H] (LSTM only): what takes a state's place at a reset, zeros where absent,
#   lengths int64 [B], reset bool [T,B], state_mask [B,P]: multiplies what products read of h_{t-1} (not what a GRU
#   carries on of it, nor c); a state that is absent starts from zeros; zoneout_h [T,B,P], zoneout_c [T,B,H] (LSTM
#   without w_hr): the share of h_{t-1} and c_{t-1} that h_t and c_t keep, h_t being of the c_t that keeps none
# -> y [T,B,P] contiguous, h_n [B,P], c_n [B,H] (empty unless LSTM),
#    states [T,B,H]: c_t of each step in the accumulator's dtype (LSTM, where asked for by save or states; else empty),
#    tape [T,B,TAPE*H] in x's dtype (where save is set; else empty); all outputs contiguous, 0 on the tape past lengths
# From step lengths[b] on y is 0 and the state stands still; a reverse scan starts at lengths[b]-1.
_OPTIONS = (
    "Tensor? reset_h, Tensor? reset_c, Tensor? lengths, Tensor? reset, Tensor? state_mask, Tensor? zoneout_h, "
    "Tensor? zoneout_c, "
)
SCAN_FORWARD = (
    "(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? h0, Tensor? c0, "
    + _OPTIONS
    + "int cell, bool reverse, bool save, bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor states, Tensor tape)"
)

# The walk back through time; the large products (dx, dW, db) follow, in fastseq/recurrent/autograd.py.
# -> dgates [T,B,G*H]: gradient of the gates' input-side pre-activations (0 at steps past lengths),
#    dhidden: what the hidden side needs besides: GRU [T,B,H] gradient of W_hn h + b_hn; LSTM with w_hr [T,B,P] whole
#    gradient that reaches h_t; else empty,
#    dh0 [B,P], dc0 [B,H], dreset_h [B,P], dreset_c [B,H] (each empty where that state is absent). All contiguous, in
#    x's dtype. "empty" is a tensor of shape [0]. states and tape: as the forward pass gave them, or None in place of an
#    empty one. Of an RNN zoneout_h must be 0 or 1: the output, which tells of its gate, is the new state or the old.
SCAN_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dstates, Tensor y, Tensor? states, Tensor? tape, "
    "Tensor w_hh, Tensor? w_hr, Tensor? h0, Tensor? c0, " + _OPTIONS + "int cell, bool reverse) "
    "-> (Tensor dgates, Tensor dhidden, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c)"
)

# A stack of layers in one call: above the scan, and made of it. On CUDA what is independent runs side by side: layers
# in a wavefront over windows of time, both directions at once, and in backward gradients of weights beside the walks.
# x [T,B,I], T, B and H above 0; weights flat, in torch's order (with w_hr on the CPU alone); h0 [L*D,B,P] and
# c0 [L*D,B,H], or None for zeros; lengths int64 [B], reset bool [T,B]; reset_h and reset_c as h0 and c0, state_mask
# [L*D,B,P], zoneout_h [L*D,T,B,P], zoneout_c [L*D,T,B,H]; on the CPU alone reverse: a lone direction walks from the
# last step to the first
# -> y [T,B,D*P], h_n [L*D,B,P], c_n [L*D,B,H] (empty unless LSTM); with save: the outputs of the layers below the
#    last; a layer and direction at a time, an LSTM's states and the tapes of a cell that has one, as SCAN_FORWARD has
#    them. With states alone: the last layer's states.
LAYERS_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
    + _OPTIONS
    + "int cell, int num_layers, bool bidirectional, bool reverse, bool save, bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor[] ys, Tensor[] states, Tensor[] tapes)"
)

# dstates: of the last layer's directions, or none; on CUDA x is 0 past the lengths, and starts int64 [1,B,1] tells
# where the reverse direction begins, with lengths; ys: of all layers; states and tapes: as the forward pass gave them
# -> dx, dh0, dc0, dreset_h, dreset_c (each empty where unwanted or absent), the gradients of weights (none unless
#    with_weights)
LAYERS_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
    + _OPTIONS
    + "Tensor? starts, Tensor[] ys, Tensor[] states, Tensor[] tapes, "
    "int cell, int num_layers, bool bidirectional, bool reverse, bool with_dx, bool with_weights) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c, Tensor[] dweights)"
)

# The recurrence of one layer and direction with layer normalisation, from the input's share of the gates, which torch
# makes of all steps at once (fastseq/recurrent/normed.py). u = gain * LN(product) + shift, LN over the G*H gates of a
# row, product = W_hh h_{t-1}, or with joint (GRU alone) gates_x + W_hh h_{t-1}; of an LSTM
# h = o * tanh(gain_c * LN(c) + shift_c).
#   gates_x [T,B,G*H], w_hh [G*H,H], gain, shift [G*H], gain_c, shift_c [H] (LSTM only), the rest as SCAN_FORWARD has
#   it; no gru_reset_before
# -> y, h_n, c_n, states as SCAN_FORWARD's; where save is set, else empty: tape [T,B,N*H] in x's dtype, the activated
#    gates (LSTM i,f,g,o, coupled i,g,o, GRU r,z,n, RNN none), then the G blocks of LN(product); stats [T,B,1 or LSTM 3]
#    in the accumulator's dtype: 1/std of the product, the mean of c, 1/std of c. All of it 0 past lengths.
NORMED_FORWARD = (
    "(Tensor gates_x, Tensor w_hh, Tensor gain, Tensor? shift, Tensor? gain_c, Tensor? shift_c, Tensor? h0, "
    "Tensor? c0, Tensor? lengths, Tensor? reset, Tensor? state_mask, int cell, bool joint, bool reverse, bool save, "
    "bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor states, Tensor tape, Tensor stats)"
)

# -> dgates_x [T,B,G*H] (empty with joint: it is dproduct), dproduct [T,B,G*H]: gradient of W_hh h_{t-1}, of which dW_hh
#    is torch's product; dgain, dshift, dgain_c, dshift_c, dh0, dc0, each empty where that argument is absent
NORMED_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dstates, Tensor y, Tensor? states, Tensor tape, Tensor stats, "
    "Tensor w_hh, Tensor gain, Tensor? shift, Tensor? gain_c, Tensor? shift_c, Tensor? h0, Tensor? c0, "
    "Tensor? lengths, Tensor? reset, Tensor? state_mask, int cell, bool joint, bool reverse) "
    "-> (Tensor dgates_x, Tensor dproduct, Tensor dgain, Tensor dshift, Tensor dgain_c, Tensor dshift_c, Tensor dh0, "
    "Tensor dc0)"
)

NATIVE_SCAN_SCHEDULE = (
    "(bool backward, int steps, int layers, int directions, int beside, bool with_dx, bool with_weights, "
    "float products) -> str"
)
"""What of a stack runs beside what, where a device holds so many walks at once and products take so much of a walk's
time: a line with windows, walkers, lanes and slots; then a piece of work a line: its name, layer, direction, window,
lane, and the places of those it waits for."""

NATIVE_SCAN_WINDOWS = "(int windows, int walkers) -> int"
"""For tests and measurements: fixes the windows of time and the lanes that walk (0: as would be chosen)."""

# The options are the fields of AttentionCall (fastseq/attn/call.py) after q, k and v, in its order.
# Dense: q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv]. Packed (cu_seqlens given): [total,H,D].
#   bias [B|1,Hq|1,Tq|1,Tk|1] in q's dtype or float32, mask bool of such a shape (True: may look), sinks [Hq],
#   alibi_slopes float32 (float64 as q) [Hq], lengths (PER_SEQUENCE) int64 [B], cu_seqlens int32 [B+1], seed int64 [1]
#   scores s = scale * q k^T; softcap * tanh(s / softcap); + bias; - alibi * |i + shift - j|; then mask and limits
#   shift = 0, or Tk - Tq where bottom_right; a window of -1 has no limit
# On a cache of pages, by Triton's kernels and the CPU's: k [P,page,Hk,D], v [P,page,Hk,Dv], block_table int32 [B,
#   pages of the longest], of which lengths_k rows count; q dense, or packed with cu_seqlens_q alone; Tk = pages of the
#   longest * page. No dropout and no gradient.
# On int8, by the CPU's kernels: k and v int8, k_scale and v_scale float32 of their shapes with 1 feature: what a row's
#   numbers are multiples of. Dense or in pages; q float32, bfloat16 or float16. No gradient.
# -> o as q with Dv features, dense, its dimensions in memory in the order of q's; lse float32 (float64 for float64)
#    [B,Hq,Tq], packed [Hq,total]
ATTENTION_FORWARD = "(Tensor q, Tensor k, Tensor v, {options}) -> (Tensor o, Tensor lse)"

# -> dq, dk, dv (in memory as q, k, v), dbias (shape and dtype of bias, summed over what was broadcast; empty unless
#    bias_grad), dsinks (empty without sinks)
ATTENTION_BACKWARD = (
    "(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {options}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

# A matrix [(gates + apart)*H, K] of bfloat16 or int8 as the kernels of this instruction set read it, for inference:
# [vectors of H * words of K * gates, lanes, elements of a word of 4 bytes], then the same of the gates `apart`, which
# are multiplied by themselves: n of gru_reset_before's w_hh.
PACK_WEIGHTS = "(Tensor w, int gates, int apart) -> Tensor"

# What a transformer's layer does to each row by itself: after(residual + w2 act(w1 before(x) + b1) + b2), in inference.
#   x [rows, I], w1 [F, I], w2 [O, F], residual [rows, O]; without w2 it is after(act(w1 before(x) + b1 + residual)),
#   O = F; a norm over the features where it has a weight; float32, contiguous, F and O multiples of 32;
#   activation: 0 none, 1 relu, 2 gelu -> [rows, O]
FEED_FORWARD = (
    "(Tensor x, Tensor w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? residual, Tensor? before_weight, "
    "Tensor? before_bias, Tensor? after_weight, Tensor? after_bias, float eps, int activation) -> Tensor"
)

NATIVE_ISA = "(str name) -> str"
"""Test hook: force an instruction set of the CPU kernels ('' only asks); returns the one now active."""

NATIVE_SCAN_PLAN = "(str cell, str dtype, bool backward, int hidden, int batch, int[] device) -> str"
"""How the CUDA C++ kernels would run a scan: role, division of the work, bytes, and why no better role is taken.
dtype: fp32, tf32, bf16 or fp16; device: major compute capability, multiprocessors, bytes of shared memory a block; []
asks the current one."""

NATIVE_SCAN_ROLE = "(str role, int blocks, int threads, int rows) -> str"
"""For tests and measurements: fixes the role (cluster, cluster_barrier, grid, step; '': the plan's choice) and shape of
CUDA scans."""

SETTING = "() -> bool"
"""A setting of torch's that the CUDA C++ kernels ask for at each call, as torch's stable ABI has no function for it:
``one_tf32_product`` for float32 products, ``is_deterministic``."""


def of_the_cpu(options: str) -> dict[str, str]:
    """Of the operators that the CPU kernels implement, by name with overload; ``options``: attention's part."""
    return {
        "scan_forward.native": SCAN_FORWARD,
        "scan_backward.native": SCAN_BACKWARD,
        "layers_forward.native": LAYERS_FORWARD,
        "layers_backward.native": LAYERS_BACKWARD,
        "normed_forward.native": NORMED_FORWARD,
        "normed_backward.native": NORMED_BACKWARD,
        "attention_forward.native": ATTENTION_FORWARD.format(options=options),
        "attention_backward.native": ATTENTION_BACKWARD.format(options=options),
        "pack_weights": PACK_WEIGHTS,
        "feed_forward": FEED_FORWARD,
        "native_isa": NATIVE_ISA,
    }

"""The table of contents of ``torch.ops.fastseq``: every schema, its fake kernel and its vmap rule.

Schemas are defined here, in Python, so that they exist whether or not the compiled extension does. An operator has
one overload a backend (``scan_forward.native``, ``scan_forward.triton``), so a compiled graph shows which one ran.

Shapes: T time steps, B batch, I input features, H hidden units, P projected units (= H without ``w_hr``),
G gates a cell (the table in fastseq/recurrent/cells.py); Tq, Tk query and key positions, Hq, Hk heads.
"""

from __future__ import annotations

import torch

from fastseq.ops import triton as ops_triton
from fastseq.ops.attention import (
    OPTIONS_SCHEMA,
    attention_rule,
    fake_attention_backward,
    fake_attention_forward,
)
from fastseq.ops.define import BACKENDS as BACKENDS
from fastseq.ops.define import define, fold_batch
from fastseq.ops.layers import (
    LAYERS_BACKWARD,
    LAYERS_FORWARD,
    NATIVE_SCAN_SCHEDULE,
    NATIVE_SCAN_WINDOWS,
    fake_layers_backward,
    fake_layers_forward,
)
from fastseq.recurrent.cells import CELLS
from fastseq.recurrent.cells import GATES as GATES
from fastseq.recurrent.cells import HAS_C as HAS_C
from fastseq.recurrent.cells import NOT_IN_TORCH as NOT_IN_TORCH
from fastseq.recurrent.cells import NUMBER as NUMBER
from fastseq.recurrent.cells import TAPE as TAPE

# `int cell`, here and below: a cell's number, NUMBER of its name.

# One layer, one direction, all time steps.
#   x [T,B,I], w_ih [G*H,I], w_hh [G*H,P], b_ih, b_hh [G*H], w_hr [P,H] (LSTM only), h0 [B,P], c0 [B,H] (LSTM only),
#   lengths int64 [B], reset bool [T,B]; a state that is absent starts from zeros
# -> y [T,B,P] contiguous, h_n [B,P], c_n [B,H] (empty unless LSTM),
#    states [T,B,H]: c_t of each step in the accumulator's dtype (LSTM, where asked for by save or states; else empty),
#    tape [T,B,TAPE*H] in x's dtype (where save is set; else empty); all outputs contiguous, 0 on the tape past lengths
# From step lengths[b] on y is 0 and the state stands still; a reverse scan starts at lengths[b]-1.
SCAN_FORWARD = (
    "(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, Tensor? h0, Tensor? c0, "
    "Tensor? lengths, Tensor? reset, int cell, bool reverse, bool save, bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor states, Tensor tape)"
)

# The walk back through time; the large products (dx, dW, db) follow, in fastseq/recurrent/autograd.py.
# -> dgates [T,B,G*H]: gradient of the gates' input-side pre-activations (0 at steps past lengths),
#    dhidden: what the hidden side needs besides: GRU [T,B,H] gradient of W_hn h + b_hn; LSTM with w_hr [T,B,P] whole
#    gradient that reaches h_t; else empty,
#    dh0 [B,P], dc0 [B,H] (each empty where that state is absent). All contiguous, in x's dtype. "empty" is a tensor
#    of shape [0]. states and tape: as the forward pass gave them, or None in place of an empty one.
SCAN_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dstates, Tensor y, Tensor? states, Tensor? tape, "
    "Tensor w_hh, Tensor? w_hr, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int cell, bool reverse) "
    "-> (Tensor dgates, Tensor dhidden, Tensor dh0, Tensor dc0)"
)

# The options are the fields of AttentionCall (fastseq/attn/call.py) after q, k and v, in its order.
# Dense: q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv]. Packed (cu_seqlens given): [total,H,D].
#   bias [B|1,Hq|1,Tq|1,Tk|1] in q's dtype or float32, mask bool of such a shape (True: may look), sinks [Hq],
#   alibi_slopes float32 (float64 as q) [Hq], lengths (PER_SEQUENCE) int64 [B], cu_seqlens int32 [B+1], seed int64 [1]
#   scores s = scale * q k^T; softcap * tanh(s / softcap); + bias; - alibi * |i + shift - j|; then mask and limits
#   shift = 0, or Tk - Tq where bottom_right; a window of -1 has no limit
# On a cache of pages, of a backend that reads them (Triton's): k [P,page,Hk,D], v [P,page,Hk,Dv], block_table int32 [B,
#   pages of the longest], of which lengths_k rows count; q dense, or packed with cu_seqlens_q alone; Tk = pages of the
#   longest * page. No dropout and no gradient.
# -> o as q with Dv features, dense, its dimensions in memory in the order of q's; lse float32 (float64 for float64)
#    [B,Hq,Tq], packed [Hq,total]
ATTENTION_FORWARD = f"(Tensor q, Tensor k, Tensor v, {OPTIONS_SCHEMA}) -> (Tensor o, Tensor lse)"

# -> dq, dk, dv (in memory as q, k, v), dbias (shape and dtype of bias, summed over what was broadcast; empty unless
#    bias_grad), dsinks (empty without sinks)
ATTENTION_BACKWARD = (
    f"(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {OPTIONS_SCHEMA}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)

# A matrix [(gates + apart)*H, K] of bfloat16 or int8 as the kernels of this instruction set read it, for inference:
# [vectors of H * words of K * gates, lanes, elements of a word of 4 bytes], then the same of the gates `apart`, which
# are multiplied by themselves: n of gru_reset_before's w_hh.
PACK_WEIGHTS = "(Tensor w, int gates, int apart) -> Tensor"

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


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel computes in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _fake_scan_forward(
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, cell, reverse, save, states
):  # fmt: skip
    steps, batch = x.shape[0], x.shape[1]
    kind = CELLS[cell]
    hidden, lstm = w_hh.shape[0] // kind.gates, kind.has_c
    absent = x.new_empty(0)
    return (
        x.new_empty(steps, batch, w_hh.shape[1]),
        x.new_empty(batch, w_hh.shape[1]),
        x.new_empty(batch, hidden) if lstm else absent,
        x.new_empty(steps, batch, hidden, dtype=accumulator(x.dtype)) if lstm and (save or states) else x.new_empty(0),
        x.new_empty(steps, batch, kind.tape * hidden) if save and kind.tape else x.new_empty(0),
    )


def _fake_scan_backward(
    dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset, cell, reverse
):  # fmt: skip
    steps, batch = y.shape[0], y.shape[1]
    hidden = w_hh.shape[0] // CELLS[cell].gates
    dhidden = y.new_empty(0)
    if CELLS[cell].name == "gru":
        dhidden = y.new_empty(steps, batch, hidden)
    elif w_hr is not None:
        dhidden = y.new_empty(steps, batch, w_hr.shape[0])
    return (
        y.new_empty(steps, batch, w_hh.shape[0]),
        dhidden,
        y.new_empty((batch, w_hh.shape[1]) if h0 is not None else 0),
        y.new_empty((batch, hidden) if c0 is not None else 0),
    )


define(
    "scan_forward", SCAN_FORWARD, _fake_scan_forward,
    lambda op: fold_batch(op, (1, *[None] * 5, 0, 0, 0, 1, *[None] * 4), (1, 0, 0, 1, 1)),
)  # fmt: skip
define(
    "scan_backward", SCAN_BACKWARD, _fake_scan_backward,
    lambda op: fold_batch(op, (1, 0, 0, 1, 1, 1, 1, None, None, 0, 0, 0, 1, None, None), (1, 1, 0, 0)),
)  # fmt: skip
define("layers_forward", LAYERS_FORWARD, fake_layers_forward, None, ("native",))
define("layers_backward", LAYERS_BACKWARD, fake_layers_backward, None, ("native",))
define("attention_forward", ATTENTION_FORWARD, fake_attention_forward, attention_rule(3, backward=False))
define("attention_backward", ATTENTION_BACKWARD, fake_attention_backward, attention_rule(7, backward=True))
torch.library.define("fastseq::native_isa", NATIVE_ISA)
torch.library.define("fastseq::pack_weights", PACK_WEIGHTS)
torch.library.define("fastseq::native_scan_plan", NATIVE_SCAN_PLAN)
torch.library.define("fastseq::native_scan_role", NATIVE_SCAN_ROLE)
torch.library.define("fastseq::native_scan_schedule", NATIVE_SCAN_SCHEDULE)
torch.library.define("fastseq::native_scan_windows", NATIVE_SCAN_WINDOWS)
torch.library.define("fastseq::one_tf32_product", SETTING)
torch.library.define("fastseq::is_deterministic", SETTING)
ops_triton.register()


@torch.library.impl("fastseq::one_tf32_product", "CompositeExplicitAutograd")
def _one_tf32_product() -> bool:
    from fastseq.kernels.precision import one_tf32_product

    return one_tf32_product()


@torch.library.impl("fastseq::is_deterministic", "CompositeExplicitAutograd")
def _is_deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _load_native() -> str | None:
    """Load the compiled extension; returns None, or the reason why there is none."""
    try:
        import fastseq._native  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def _load_native_cuda() -> str | None:
    """Load the CUDA kernels, where torch is one that could run them; returns None, or the reason why there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        import fastseq._native_cuda  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


NATIVE_MISSING: str | None = _load_native()
"""None where the compiled extension is loaded, else why it is not."""

NATIVE_CUDA_MISSING: str | None = _load_native_cuda() if NATIVE_MISSING is None else NATIVE_MISSING
"""None where the compiled CUDA kernels are loaded, else why they are not."""

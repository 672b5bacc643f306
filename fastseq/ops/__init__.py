"""The table of contents of ``torch.ops.fastseq``: every operator with its schema, its fake kernel and its vmap rule.

Schemas are defined here, in Python, so that they exist whether or not the compiled extension does; their text, with
every shape, is in :mod:`fastseq.ops.schemas`. An operator has one overload a backend (``scan_forward.native``,
``scan_forward.triton``), so a compiled graph shows which one ran.
"""

from __future__ import annotations

import torch

from fastseq import installed
from fastseq.ops import schemas
from fastseq.ops import triton as ops_triton
from fastseq.ops.attention import attention_rule, fake_attention_backward, fake_attention_forward
from fastseq.ops.define import BACKENDS as BACKENDS
from fastseq.ops.define import SCHEMAS as SCHEMAS
from fastseq.ops.define import define, fold_batch
from fastseq.ops.layers import fake_layers_backward, fake_layers_forward
from fastseq.ops.normed import fake_normed_backward, fake_normed_forward
from fastseq.recurrent.cells import CELLS
from fastseq.recurrent.cells import GATES as GATES
from fastseq.recurrent.cells import HAS_C as HAS_C
from fastseq.recurrent.cells import NOT_IN_TORCH as NOT_IN_TORCH
from fastseq.recurrent.cells import NUMBER as NUMBER
from fastseq.recurrent.cells import TAPE as TAPE


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype a kernel computes in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _fake_scan_forward(
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c, cell,
    reverse, save, states,
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
    dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, reset_h, reset_c, lengths, reset, state_mask,
    zoneout_h, zoneout_c, cell, reverse,
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
        *(
            y.new_empty((batch, size) if state is not None else 0)
            for state, size in ((h0, w_hh.shape[1]), (c0, hidden), (reset_h, w_hh.shape[1]), (reset_c, hidden))
        ),
    )


define(
    "scan_forward", _fake_scan_forward,
    lambda op: fold_batch(op, (1, *[None] * 5, 0, 0, 0, 0, 0, 1, 0, 1, 1, *[None] * 4), (1, 0, 0, 1, 1)),
)  # fmt: skip
define(
    "scan_backward", _fake_scan_backward,
    lambda op: fold_batch(
        op, (1, 0, 0, 1, 1, 1, 1, None, None, 0, 0, 0, 0, 0, 1, 0, 1, 1, None, None), (1, 1, 0, 0, 0, 0)
    ),
)  # fmt: skip
define("layers_forward", fake_layers_forward, None, ("native",))
define("layers_backward", fake_layers_backward, None, ("native",))
define("normed_forward", fake_normed_forward, None)
define("normed_backward", fake_normed_backward, None)
define("attention_forward", fake_attention_forward, attention_rule(3, backward=False))
define("attention_backward", fake_attention_backward, attention_rule(7, backward=True))
torch.library.define("fastseq::native_isa", schemas.NATIVE_ISA)
torch.library.define("fastseq::pack_weights", schemas.PACK_WEIGHTS)
torch.library.define("fastseq::feed_forward", schemas.FEED_FORWARD)
torch.library.define("fastseq::native_scan_plan", schemas.NATIVE_SCAN_PLAN)
torch.library.define("fastseq::native_scan_role", schemas.NATIVE_SCAN_ROLE)
torch.library.define("fastseq::native_scan_schedule", schemas.NATIVE_SCAN_SCHEDULE)
torch.library.define("fastseq::native_scan_windows", schemas.NATIVE_SCAN_WINDOWS)
torch.library.define("fastseq::one_tf32_product", schemas.SETTING)
torch.library.define("fastseq::is_deterministic", schemas.SETTING)
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
        return installed.reason("cuda") or str(error)
    return None


NATIVE_MISSING: str | None = _load_native()
"""None where the compiled extension is loaded, else why it is not."""

NATIVE_CUDA_MISSING: str | None = _load_native_cuda() if NATIVE_MISSING is None else NATIVE_MISSING
"""None where the compiled CUDA kernels are loaded, else why they are not."""

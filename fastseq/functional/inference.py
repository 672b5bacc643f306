"""Inference on the CPU in one native call: a whole stack of layers, or a cell.

One step of a small model is all call overhead, so nothing is asked here that the kernel does not ask itself. Whenever
a question remains (a gradient, a transform, another backend, a bad argument) the answer is None, and the caller takes
the general way, which checks everything and has the error messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import auto, backend, ops
from fastseq.autograd import forward_mode
from fastseq.functional import direct

_stack = torch.ops.fastseq.stack_forward.native
_cell = torch.ops.fastseq.cell_forward.native
_transforms = torch._C._functorch.peek_interpreter_stack


def _plain(x: object) -> bool:
    """An ordinary CPU tensor, no gradient, no transform; for what the operators do not ask themselves."""
    return type(x) is Tensor and x.is_cpu and _outside_of_modes()


def _outside_of_modes() -> bool:
    if torch.is_grad_enabled() or forward_mode():
        return False
    return not torch.is_autocast_enabled("cpu") and _transforms() is None


def undisturbed() -> bool:
    """Whether tensors are no more than their numbers here and now: no gradient, transform or mode is on."""
    if direct.stack is not None:
        return direct.plain()
    return _outside_of_modes()


def stack(
    x: Any,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    cell: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    *sizes: int,
) -> tuple[Tensor, ...] | None:
    """y, h_n and an LSTM's c_n of a stack, as ``ops.STACK_FORWARD``; None: take the general way.

    sizes: H and P where the matrices are packed.
    """
    if torch.compiler.is_compiling() or not backend.native_scan():
        return None
    if type(x) is not Tensor:  # a PackedSequence, or nothing that we know
        return None
    if x.dtype is torch.bfloat16 and x.numel() > auto.BF16_ROWS * x.shape[-1] and backend.forced() is None:
        return None  # AUTO has more than one answer here
    if direct.stack is not None:
        done = direct.stack(x, h0, c0, weights, scales, cell, num_layers, bidirectional, batch_first, *sizes)
        if done is not None:
            return done
    if not _plain(x):
        return None
    try:
        done = _stack(x, h0, c0, weights, scales, ops.NUMBER[cell], num_layers, bidirectional, batch_first, *sizes)
    except (RuntimeError, TypeError):
        return None
    return done if cell == "lstm" else done[:2]


def cell(
    x: Any,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor | None],
    scales: Sequence[Tensor],
    name: str,
    *sizes: int,
) -> tuple[Tensor, ...] | None:
    """The new h, and an LSTM's new c, of one step, as ``ops.CELL_FORWARD``; None: take the general way.

    weights: w_ih, w_hh, b_ih, b_hh. scales: those of int8 matrices, else empty. sizes: H where
    the matrices are packed.
    """
    if torch.compiler.is_compiling() or not backend.native_scan():
        return None
    s_ih, s_hh = scales or (None, None)
    if direct.cell is not None:
        done = direct.cell(x, h, c, *weights, s_ih, s_hh, name, *sizes)
        if done is not None:
            return done
    if not _plain(x):
        return None
    try:
        done = _cell(x, h, c, *weights, s_ih, s_hh, ops.NUMBER[name], *sizes)
    except (RuntimeError, TypeError):
        return None
    return done if name == "lstm" else done[:1]

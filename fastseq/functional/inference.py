"""Inference on the CPU in one native call: a whole stack of layers, or a cell.

One step of a small model is all call overhead, so nothing is asked here that the kernel does not ask itself. Whenever
a question remains (a gradient, a transform, another backend, a bad argument) the answer is None, and the caller takes
the general way, which checks everything and has the error messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import backend

_stack = torch.ops.fastseq.stack_forward.native
_cell = torch.ops.fastseq.cell_forward.native
_transforms = torch._C._functorch.peek_interpreter_stack


def _plain(x: object) -> bool:
    """An ordinary CPU tensor, no gradient, no tracing, no transform, and the native backend in force."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return False
    return x.is_cpu and backend.native_scan() and not torch.is_autocast_enabled("cpu") and _transforms() is None


def stack(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """y, h_n, c_n of a stack (c_n empty unless an LSTM), as ``ops.STACK_FORWARD``; None: take the general way."""
    if not _plain(x):
        return None
    if x.dtype is torch.bfloat16 and x.numel() > backend.BF16_ROWS * x.shape[-1] and backend.forced() is None:
        return None  # AUTO has more than one answer here
    try:
        return _stack(x, h0, c0, weights, cell, num_layers, bidirectional, batch_first)
    except (RuntimeError, TypeError):
        return None


def cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    name: str,
) -> tuple[Tensor, Tensor] | None:
    """The new h and c (empty unless an LSTM) of one step, as ``ops.CELL_FORWARD``; None: take the general way."""
    if not _plain(x):
        return None
    try:
        return _cell(x, h, c, w_ih, w_hh, b_ih, b_hh, name)
    except (RuntimeError, TypeError):
        return None

"""A stack of layers on CUDA by one native call, which runs side by side what is independent in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.autograd import apply, forward_mode, functorch_active
from fastseq.recurrent import autograd_layers
from fastseq.recurrent.autograd_layers import Kind, Layers

if TYPE_CHECKING:
    from fastseq.recurrent.functional import Stack


def suits(name: str, x: Tensor, hidden: int) -> bool:
    """Whether a stack goes this way: what is traced, transformed or empty takes the scan, layer by layer."""
    if name != "native" or not x.is_cuda or 0 in (x.shape[0], x.shape[1], hidden):
        return False
    return not (torch.compiler.is_compiling() or functorch_active() or forward_mode())


def run(
    stack: Stack,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    want_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As ``functional.recurrent._layers``: y, h_n, c_n and every c_t. Dropout ends a call: layers follow one by one."""
    dropout = stack.dropout if stack.training else 0.0
    together = 1 if dropout else stack.num_layers
    rows, width = together * stack.directions, 4 if stack.has_biases else 2
    kind = Kind(stack.cell, together, stack.bidirectional, stack.has_biases)
    last = stack.num_layers // together - 1
    found: list[tuple[Tensor, ...]] = []
    for n in range(last + 1):
        own = weights[n * rows * width : (n + 1) * rows * width]
        h, c = (None if s is None else s[n * rows : (n + 1) * rows] for s in (h0, c0))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h, c, *own)):
            found.append(apply(Layers, x, h, c, lengths, reset, kind, *own))
        else:
            y, h_n, c_n, _, states, _ = autograd_layers.FORWARD(
                x, own, h, c, lengths, reset, *kind.numbers(), False, want_states and n == last
            )
            found.append((y, h_n, c_n, *states) if stack.cell == "lstm" else (y, h_n))
        x = found[-1][0]
        if dropout and n < last:
            x = F.dropout(x, dropout, True)
    h_n, *c_n = (
        torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*(f[1:3] for f in found), strict=True)
    )
    states = torch.cat(found[-1][3:], -1) if want_states and stack.cell == "lstm" else None
    return x, h_n, c_n[0] if c_n else None, states

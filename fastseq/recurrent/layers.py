"""A stack of layers on CUDA by one native call, which runs side by side what is independent in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseq.autograd import apply, forward_mode, functorch_active, wants_gradient
from fastseq.recurrent import autograd_layers
from fastseq.recurrent.autograd_layers import Kind, Layers
from fastseq.recurrent.call import RecurrentCall, Result


def suits(name: str, call: RecurrentCall) -> bool:
    """Whether a stack is one call: what is traced, transformed or empty takes the scan, layer by layer."""
    if name != "native" or not call.x.is_cuda or 0 in (*call.x.shape[:2], call.hidden):
        return False
    return not (torch.compiler.is_compiling() or functorch_active() or forward_mode())


def run(call: RecurrentCall) -> Result:
    """As ``run._layers``: y, h_n, c_n and every c_t. Dropout ends a call: layers follow one by one."""
    x = call.x
    dropout = call.dropout if call.training else 0.0
    together = 1 if dropout else call.num_layers
    rows, width = together * call.directions, 4 if call.has_biases else 2
    kind = Kind(call.cell, together, call.bidirectional, call.has_biases)
    last = call.num_layers // together - 1
    found: list[tuple[torch.Tensor, ...]] = []
    for n in range(last + 1):
        own = call.weights[n * rows * width : (n + 1) * rows * width]
        h, c = (None if s is None else s[n * rows : (n + 1) * rows] for s in (call.h0, call.c0))
        if torch.is_grad_enabled() and wants_gradient((x, h, c, *own)):
            found.append(apply(Layers, x, h, c, call.lengths, call.reset, kind, *own))
        else:
            y, h_n, c_n, _, states, _ = autograd_layers.FORWARD(
                x, own, h, c, call.lengths, call.reset, *kind.numbers(), False, call.want_states and n == last
            )
            found.append((y, h_n, c_n, *states) if call.cell == "lstm" else (y, h_n))
        x = found[-1][0]
        if dropout and n < last:
            x = F.dropout(x, dropout, True)
    h_n, *c_n = (
        torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*(f[1:3] for f in found), strict=True)
    )
    states = torch.cat(found[-1][3:], -1) if call.want_states and call.cell == "lstm" else None
    return x, h_n, c_n[0] if c_n else None, states

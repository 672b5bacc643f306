"""A stack of recurrent layers as one differentiable function: one native call runs side by side what is independent.

On CUDA alone (:mod:`fastseq.ops.layers`). Its gradient is the fused one; whoever differentiates that gets the
reference's, computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import ops
from fastseq.recurrent import reference

FORWARD = torch.ops.fastseq.layers_forward.native
BACKWARD = torch.ops.fastseq.layers_backward.native


class Kind(NamedTuple):
    """What a stack is made of; weights are flat, in torch's order, a layer and direction at a time."""

    cell: str
    num_layers: int
    bidirectional: bool
    has_biases: bool

    def numbers(self) -> tuple[int, ...]:
        """The same as the operators take it."""
        return ops.NUMBER[self.cell], *self[1:]


class Layers(torch.autograd.Function):
    """y, h_n; then an LSTM's c_n, and the states of the last layer's directions."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        kind: Kind,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, ys, states, tapes = FORWARD(x, weights, h0, c0, lengths, reset, *kind.numbers(), True, True)
        ctx.kind, ctx.counts = kind, (len(weights), len(ys), len(states))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, lengths, reset, y, *weights, *ys, *states, *tapes)
        if kind.cell != "lstm":
            return y, h_n
        return y, h_n, c_n, *states[-2 if kind.bidirectional else -1 :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, h0, c0, lengths, reset, y, *rest = ctx.saved_tensors
        n, m = ctx.counts[0], ctx.counts[0] + ctx.counts[1]
        weights, ys, states, tapes = rest[:n], rest[n:m], rest[m : m + ctx.counts[2]], rest[m + ctx.counts[2] :]
        need = ctx.needs_input_grad
        inputs = (x, h0, c0, *weights)
        wanted = (*need[:3], *need[6:])
        if torch.is_grad_enabled():
            found = reference_gradient(ctx.kind, inputs, lengths, reset, grads, wanted)
        else:
            starts = None
            if lengths is not None:  # the padding may hold anything, and 0 * NaN is NaN
                steps = torch.arange(x.shape[0], device=x.device)
                x = x.masked_fill((steps[:, None] >= lengths)[:, :, None], 0)
                starts = (lengths - 1).clamp_min(0)[None, :, None] if ctx.kind.bidirectional else None
            dy, dh_n, dc_n, *dstates = (*grads, None) if len(grads) == 2 else grads
            if any(d is not None for d in dstates):
                own = zip(dstates, states[-len(dstates) :], strict=True)
                dstates = [torch.zeros_like(s) if d is None else d for d, s in own]
            else:
                dstates = []
            dx, dh0, dc0, dweights = BACKWARD(
                dy, dh_n, dc_n, dstates, x, weights, h0, c0, lengths, reset, starts, [*ys, y], states, tapes,
                *ctx.kind.numbers(), wanted[0], any(wanted[3:]),
            )  # fmt: skip
            found = [dx, dh0, dc0, *(dweights or n * [None])]
        made = [g if w else None for g, w in zip(found, wanted, strict=True)]
        return (*made[:3], None, None, None, *made[3:])


def reference_layers(
    kind: Kind,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The same results by the reference, differentiable to any order."""
    directions, width = 2 if kind.bidirectional else 1, 4 if kind.has_biases else 2
    h_n, c_n, states = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer in range(kind.num_layers):
        outputs, states = [], []
        for direction in range(directions):
            i = layer * directions + direction
            own: list[Tensor | None] = [*weights[i * width : (i + 1) * width], *(4 - width) * [None]]
            w_ih, w_hh, b_ih, b_hh = own
            assert w_ih is not None
            assert w_hh is not None
            y, h, c, all_c = reference.scan(
                x, w_ih, w_hh, b_ih, b_hh, None, None if h0 is None else h0[i], None if c0 is None else c0[i],
                lengths, reset, cell=kind.cell, reverse=direction == 1,
            )  # fmt: skip
            outputs.append(y)
            h_n.append(h)
            if c is not None and all_c is not None:
                c_n.append(c)
                states.append(all_c)
        x = torch.cat(outputs, -1)
    return (x, torch.stack(h_n), torch.stack(c_n), *states) if c_n else (x, torch.stack(h_n))


def reference_gradient(
    kind: Kind,
    inputs: Sequence[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, h0, c0 and the weights, themselves differentiable."""
    x, h0, c0, *weights = (None if t is None else t.view_as(t) for t in inputs)
    assert x is not None
    results = reference_layers(kind, x, h0, c0, lengths, reset, [w for w in weights if w is not None])
    own = [t for t, w in zip((x, h0, c0, *weights), wanted, strict=True) if w and t is not None]
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    outputs, given = [r for r, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(outputs, own, given, create_graph=True, materialize_grads=True))
    return [next(found) if w and t is not None else None for t, w in zip(inputs, wanted, strict=True)]

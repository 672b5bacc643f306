"""Training that keeps a stack's states at some steps only, and computes the others again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import autograd, ops
from fastseq.recurrent import stack
from fastseq.recurrent.call import RecurrentCall, Result
from fastseq.recurrent.stack import Kind, Tensors

PARTS = 8
"""Into how many parts of time a walk is cut, at most. The tape of one is there while the backward pass goes through it:
more parts would save little more beside the outputs, and each costs some calls."""

FEWEST_ROWS = 256
"""Steps times sequences of a part, at least: a call packs the weights, or reads them unpacked, which takes longer."""


def suits(call: RecurrentCall) -> bool:
    """Whether something would be kept for a backward pass that can be made again; of calls that take the native kernels
    as a stack. Not under torch.compile, which decides by itself what it computes again, or where every c_t is a result.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or call.want_states:
        return False
    if call.x.is_cuda and call.bidirectional:  # whose kernels have no lone direction that walks back
        return False
    return part_size(*call.x.shape[:2]) < call.x.shape[0]


def part_size(steps: int, batch: int) -> int:
    """How many steps a part has, but perhaps the last."""
    return max(-(-steps // PARTS), -(-FEWEST_ROWS // batch))


class Part:
    """Some steps of a walk, as the operators take them."""

    def __init__(self, start: int, end: int, options: Tensors) -> None:
        lengths, reset, mask, *shares = options
        self.start, self.end = start, end
        if lengths is not None:
            lengths = (lengths - start).clamp(0, end - start)
        shares = [self.of(share, 1) for share in shares]  # [rows, T, ...]
        self.options = lengths, self.of(reset), mask, *shares

    def of(self, x: Tensor | None, dim: int = 0) -> Any:
        """The steps' part of a tensor that has the steps in this dimension."""
        return None if x is None else x.narrow(dim, self.start, self.end - self.start)


def parts_of(x: Tensor, reverse: bool, options: Tensors) -> Iterator[Part]:
    """The parts of x in the order of the walk."""
    steps, size = x.shape[0], part_size(*x.shape[:2])
    starts = range(0, steps, size)
    for start in reversed(starts) if reverse else starts:
        yield Part(start, min(start + size, steps), options)


class Recomputed(torch.autograd.Function):
    """A stack of one direction, in the native operators' shapes. Results: y, h_n, and an LSTM's c_n."""

    @staticmethod
    def forward(
        ctx: Any, kind: Kind, x: Tensor, h0: Any, c0: Any, reset_h: Any, reset_c: Any, lengths: Any, reset: Any,
        state_mask: Any, zoneout_h: Any, zoneout_c: Any, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        options = lengths, reset, state_mask, zoneout_h, zoneout_c
        y = x.new_empty(*x.shape[:2], weights[1].shape[1])
        begun: list[Tensor | None] = []
        h, c = h0, c0
        for part in parts_of(x, kind.reverse, options):
            begun += [h, c]
            own, h, c_n, *_ = stack.FORWARD(
                part.of(x), weights, h, c, reset_h, reset_c, *part.options, *kind.numbers(), False, False
            )
            c = c_n if ops.HAS_C[kind.cell] else None
            part.of(y).copy_(own)
        ctx.kind, ctx.count = kind, len(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, reset_h, reset_c, *options, *weights, *begun[2:])
        return (y, h) if c is None else (y, h, c)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        kind, needed = ctx.kind, (*ctx.needs_input_grad[1:6], *ctx.needs_input_grad[11:])
        if autograd.all_absent(grads):
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        inputs = (*saved[:5], *saved[10 : 10 + ctx.count])
        if torch.is_grad_enabled() or stack.is_mapped(grads):
            found = stack.whole_gradient(kind, grads, inputs, saved[5:10], needed)
        else:
            found = _gradient(kind, grads, inputs, saved[5:10], saved[10 + ctx.count :], needed)
        found = [d if n else None for d, n in zip(found, needed, strict=True)]
        return (None, *found[:5], *5 * (None,), *found[5:])


def _gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, begun: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Part by part, from the last: its walk again, with a tape, and back. ``begun``: the states h and c that each part
    but the first began with."""
    x, h0, c0, reset_h, reset_c, *weights = inputs
    dy, dh, dc = (*grads, None)[:3]
    parts = list(parts_of(x, kind.reverse, options))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None
    sums: list[Tensor | None] = [None] * (2 + len(weights))  # of reset_h, reset_c and the weights
    for n in reversed(range(len(parts))):
        part = parts[n]
        h, c = begun[2 * n - 2 : 2 * n] if n else (h0, c0)
        own = (part.of(x), h, c, reset_h, reset_c, *weights)
        y, _, _, *kept = stack.FORWARD(own[0], weights, *own[1:5], *part.options, *kind.numbers(), True, True)
        ys, states, tapes = kept
        outputs = (part.of(dy), dh, dc)
        found = stack.fused_stack_gradient(kind, outputs, own, part.options, (y, *ys, *states, *tapes), needed)
        if dx is not None:
            part.of(dx).copy_(found[0])
        dh, dc = (None if s is None else d for s, d in zip((h, c), found[1:3], strict=True))
        for i, d in enumerate(found[3:]):
            if d is not None and needed[3 + i]:
                sums[i] = d if sums[i] is None else sums[i].add_(d)  # type: ignore[union-attr]
    return [dx, dh, dc, *sums]


def run(call: RecurrentCall) -> Result:
    """y, h_n, c_n of a stack whose directions and, with dropout between them, layers follow one by one."""
    x, width = call.x, len(call.weights) // call.rows
    dropout = call.dropout if call.training else 0.0
    together = 1 if dropout or call.bidirectional else call.num_layers
    last: list[Sequence[Tensor]] = []
    for layer in range(0, call.num_layers, together):
        outputs = []
        if layer and dropout:
            x = F.dropout(x, dropout, True)
        for direction in range(call.directions):
            first = layer * call.directions + direction
            rows = slice(first, first + together)
            given = (call.h0, call.c0, call.reset_h, call.reset_c, call.state_mask)
            *starts, mask = (None if s is None else s[rows] for s in given)
            kind = Kind(call.cell, together, reverse=direction == 1)
            options = call.lengths, call.reset, mask, *call.zoneout_shares(*x.shape[:2], together)
            y, *states = Recomputed.apply(
                kind, x, *starts, *options, *call.weights[first * width : (first + together) * width]
            )
            outputs.append(y)
            last.append(states)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
    h_n, *c_n = (torch.cat(list(states)) for states in zip(*last, strict=True))
    return x, h_n, c_n[0] if c_n else None, None

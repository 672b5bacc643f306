"""The scan as one differentiable function.

A backend walks the cell forward and back. The large products of the backward pass (``dx``, ``dW``, ``db``) are one
matrix product of torch's each for the whole sequence. The native kernels take a whole stack instead, products included
(:mod:`fastseq.recurrent.stack`), wherever no transform, trace or empty tensor keeps them from it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import autograd, ops
from fastseq.recurrent import reference

FORWARD = {name: getattr(torch.ops.fastseq.scan_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.scan_backward, name) for name in ops.BACKENDS}


class Inputs(NamedTuple):
    """The tensors of a scan, in the operators' order and shapes (``schemas.SCAN_FORWARD``)."""

    x: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None
    h0: Tensor | None = None
    c0: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    state_mask: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None


DIFFERENTIABLE = 10
"""How many of :class:`Inputs` have gradients: the first ones."""


class Kept(NamedTuple):
    """What a scan's forward pass leaves to its backward pass, beside its inputs."""

    y: Tensor
    states: Tensor | None
    tape: Tensor | None


class Walk(NamedTuple):
    """Which cell is walked, in which direction, on which backend."""

    cell: str
    reverse: bool
    backend: str


Grads = Sequence[Tensor | None]
"""Of y, h_n, c_n and every c_t."""


@functools.lru_cache
def values_read(
    cell: str, one_step: bool, need_x: bool, need_w_ih: bool, need_w_hh: bool, need_h0: bool
) -> tuple[bool, ...]:
    """Of which of x, w_ih, w_hh, h0 and y the fused gradient reads the values. As with torch's layers, the others, and
    biases, may be changed in place before the backward pass."""
    w_hh = not one_step or need_h0 or cell == "gru_reset_before"
    y = not one_step or cell.startswith("rnn")
    return need_w_ih, need_x, w_hh, cell.startswith("gru") or need_w_hh, y


class Scan(torch.autograd.Function):
    """One layer, one direction, on an operator backend.

    Arguments: :class:`Inputs`, then :class:`Walk`, flat. Results: y, h_n; then an LSTM's c_n and states; then the tape,
    but for an RNN.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        cell, reverse, backend = args[15:]
        y, h_n, c_n, states, tape = FORWARD[backend](*args[:15], ops.NUMBER[cell], reverse, True, True)
        if ops.HAS_C[cell]:
            return y, h_n, c_n, states, tape
        return (y, h_n, tape) if ops.TAPE[cell] else (y, h_n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.cell, ctx.reverse, ctx.backend = inputs[15:]
        tape = output[-1] if len(output) > 2 else None
        if tape is not None:
            ctx.mark_non_differentiable(tape)
        ctx.set_materialize_grads(False)
        y, states = output[0], output[3] if len(output) > 3 else None
        read: list[bool] | None = None
        if not (torch.compiler.is_compiling() or autograd.functorch_active()):
            need = ctx.needs_input_grad
            x, w_ih, w_hh, h0, kept_y = values_read(ctx.cell, bool(y.shape[0] == 1), *need[:3], need[6])
            read = [x, w_ih, w_hh, False, False, True, h0, *8 * [True], kept_y, True, True]
            y = y if kept_y else y.detach()  # else the result would hold its own graph
        autograd.save(ctx, (*inputs[:15], y, states, tape), read)

    @staticmethod
    def backward(ctx: Any, *results: Tensor | None) -> tuple:
        if autograd.all_absent(results):
            return (None,) * 18
        saved = autograd.saved(ctx)
        inputs, kept = Inputs(*saved[:15]), Kept(*saved[15:])
        grads = results[:4] if ops.HAS_C[ctx.cell] else (*results[:2], None, None)
        walk = Walk(ctx.cell, ctx.reverse, ctx.backend)
        return (*gradient(grads, inputs, kept, walk, ctx.needs_input_grad[:DIFFERENTIABLE]), *(None,) * 8)


def gradient(grads: Grads, inputs: Inputs, kept: Kept, walk: Walk, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of the first ten inputs, None where not needed; differentiable in grad mode."""
    if need[5] and grads[0] is None and grads[1] is None and kept.y.shape[0] == 1:
        need = (*need[:5], False, *need[6:])  # the c of one step does not depend on w_hr
    found: Sequence[Tensor | None]
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        found = fused_gradient(grads, inputs, kept, walk, need)
    elif autograd.needs_reference():
        found = reference_gradient(grads, inputs, walk, need)
    else:
        found = _differentiable_gradient(grads, inputs, kept, walk, need)
    return tuple(g if n else None for g, n in zip(found, need, strict=True))


def _differentiable_gradient(
    grads: Grads, inputs: Inputs, kept: Kept, walk: Walk, need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The fused gradient, whose own derivative is the reference's. A place that is not needed holds an empty tensor."""

    # Of tensors these use their arguments alone: in a transform those outside are of another level.
    def kernel(*t: Any) -> tuple[Tensor, ...]:
        return autograd.present(fused_gradient(t[:4], Inputs(*t[4:19]), Kept(*t[19:]), walk, need), need, t[4])

    def by_reference(*t: Any) -> tuple[Tensor, ...]:
        return autograd.present(reference_gradient(t[:4], Inputs(*t[4:]), walk, need), need, t[4])

    return autograd.apply(autograd.WithReference, kernel, None, by_reference, 14, 19, *grads, *inputs, *kept)


def fused_gradient(
    grads: Grads, inputs: Inputs, kept: Kept, walk: Walk, need: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the first ten inputs by a backend; anything, or None, where not needed."""
    w_hh, w_hr = inputs.w_hh, inputs.w_hr
    dgates, dhidden, *dstarts = BACKWARD[walk.backend](
        *grads, *kept, w_hh, w_hr, *inputs[6:], ops.NUMBER[walk.cell], walk.reverse
    )
    with_weights = need[1] or need[2] or need[3] or need[4]
    dx, dw_ih, dw_hh, db_ih, db_hh = torch_products(dgates, dhidden, inputs, kept, walk, need[0], with_weights)
    dw_hr = None
    if w_hr is not None and need[5]:
        assert kept.states is not None and kept.tape is not None  # noqa: PT018
        o = kept.tape[..., -kept.states.shape[-1] :]
        dw_hr = _rows(dhidden).t() @ _rows(o * torch.tanh(kept.states).to(o.dtype))
    return dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *dstarts


def reference_gradient(grads: Grads, inputs: Inputs, walk: Walk, need: Sequence[bool]) -> Sequence[Tensor | None]:
    """The same by the reference: slower, and differentiable itself."""

    def forward(*own: Any) -> tuple[Tensor | None, ...]:
        given: Any = (*own, *inputs[DIFFERENTIABLE:])
        return reference.scan(*given, cell=walk.cell, reverse=walk.reverse)

    return autograd.vjp(forward, inputs[:DIFFERENTIABLE], need, grads)


def torch_products(
    dgates: Tensor, dhidden: Tensor, inputs: Inputs, kept: Kept, walk: Walk, with_dx: bool, with_weights: bool
) -> tuple[Tensor | None, ...]:
    """dx, dW_ih, dW_hh, db_ih, db_hh as torch's matrix products."""
    dx = dw_ih = dw_hh = db_ih = db_hh = None
    x, lengths = inputs.x, inputs.lengths
    flat = _rows(dgates)
    if with_dx:
        dx = (flat @ inputs.w_ih).reshape(x.shape)
    if with_weights:
        if lengths is not None:  # the padding may hold anything, and 0 * NaN is NaN
            steps = torch.arange(x.shape[0], device=x.device)
            x = x.masked_fill((steps[:, None] >= lengths)[:, :, None], 0)
        dw_ih = flat.t() @ _rows(x)
        dw_hh = dw_hh_of(dgates, dhidden, inputs, kept, walk)
        db_ih = flat.sum(0)
        if walk.cell != "gru":
            db_hh = db_ih.clone()  # the caller may scale each in place
        else:
            db_hh = torch.cat((db_ih[: -dhidden.shape[-1]], dhidden.sum((0, 1))))
    return dx, dw_ih, dw_hh, db_ih, db_hh


def dw_hh_of(dgates: Tensor, dhidden: Tensor, inputs: Inputs, kept: Kept, walk: Walk) -> Tensor:
    """dW_hh = sum over steps of dgates_tᵀ · (m * h_prev_t), without laying out h_prev: it is y, one step aside."""
    y, lengths, cell, mask = kept.y, inputs.lengths, walk.cell, inputs.state_mask
    start = y.new_zeros(y.shape[1:]) if inputs.h0 is None else inputs.h0
    if mask is not None:
        y, start = y * mask, start * mask

    def product(d: Tensor) -> Tensor:
        of_reset: Tensor | None = None
        if inputs.reset is not None:  # the state before has no part in the product there
            if inputs.reset_h is not None:
                put_in = inputs.reset_h if mask is None else inputs.reset_h * mask
                of_reset = (d * inputs.reset[:, :, None]).sum(0).t() @ put_in
            d = d * ~inputs.reset[:, :, None]
        found = without_resets(d)
        return found if of_reset is None else found + of_reset

    def without_resets(d: Tensor) -> Tensor:
        if walk.reverse:
            first = d[-1] if lengths is None else _at(d, (lengths - 1).clamp_min(0))
            later, before = d[:-1], y[1:]
        else:
            first, later, before = d[0], d[1:], y[:-1]
        return torch.addmm(first.t() @ start, _rows(later).t(), _rows(before))

    if cell not in ("gru", "gru_reset_before"):
        return product(dgates)
    hidden = start.shape[-1]
    if cell == "gru":
        candidate = product(dhidden)
    else:
        assert kept.tape is not None
        q = kept.tape[..., 3 * hidden :]  # r * h_prev
        candidate = _rows(dgates[..., 2 * hidden :]).t() @ _rows(q)
    return torch.cat((product(dgates[..., : 2 * hidden]), candidate))


def _rows(x: Tensor) -> Tensor:
    """``[T, B, N]`` as ``[T * B, N]``; of flatten, the vmap of ``is_grads_batched`` knows nothing."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _at(values: Tensor, steps: Tensor) -> Tensor:
    """``values[steps[b], b]`` of ``values [T, B, N]``."""
    return values.gather(0, steps.to(torch.int64)[None, :, None].expand(1, -1, values.shape[-1]))[0]

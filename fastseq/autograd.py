"""The scan as one differentiable function.

A backend walks the cell forward and back; the large products of the backward pass (``dx``, ``dW``, ``db``) are one
matrix product each for the whole sequence, are the same for every backend, and are written here once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import ops, reference

FORWARD = {name: getattr(torch.ops.fastseq.scan_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.scan_backward, name) for name in ops.BACKENDS}


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is being traced."""
    if torch.compiler.is_compiling():  # Dynamo runs its own account of transforms, and cannot trace these questions
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def needs_reference() -> bool:
    """Whether a derivative is being taken that the fused operators do not have: forward mode, or a nested gradient."""
    if torch.compiler.is_compiling():
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return False
    kinds = [level.key() for level in stack]
    transform = torch._C._functorch.TransformType
    return transform.Jvp in kinds or kinds.count(transform.Grad) > 1


class Scan(torch.autograd.Function):
    """One layer, one direction, on an operator backend. Arguments and results as ``ops.SCAN_FORWARD``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        cell: str,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        return FORWARD[backend](
            x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, cell, reverse, True, True
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.cell, ctx.reverse, ctx.backend = inputs
        y, _, _, states, tape = output
        ctx.mark_non_differentiable(tape)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, y, states, tape)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dstates: Tensor | None, _: None
    ) -> tuple:
        x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, y, states, tape = ctx.saved_tensors
        if ctx.cell != "lstm":
            dc_n = dstates = None
        if torch.is_grad_enabled() and not functorch_active():
            inputs = (x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0)
            grads = _differentiable_backward(
                ctx.needs_input_grad, inputs, lengths, reset, ctx.cell, ctx.reverse, (dy, dh_n, dc_n, dstates)
            )
            return (*grads, None, None, None, None, None)
        dgates, dhidden, dh0, dc0 = BACKWARD[ctx.backend](
            dy, dh_n, dc_n, dstates, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset, ctx.cell, ctx.reverse
        )
        need = ctx.needs_input_grad
        hidden = w_hh.shape[0] // ops.GATES[ctx.cell]
        dx = dw_ih = dw_hh = db_ih = db_hh = dw_hr = None
        flat = dgates.flatten(0, 1)
        if need[0]:
            dx = (flat @ w_ih).unflatten(0, dgates.shape[:2])
        if need[1]:
            if lengths is not None:  # the padding may hold anything, and 0 * NaN is NaN
                steps = torch.arange(x.shape[0], device=x.device)
                x = x.masked_fill((steps[:, None] >= lengths)[:, :, None], 0)
            dw_ih = flat.t() @ x.flatten(0, 1)
        if need[2]:
            dw_hh = _dw_hh(dgates, dhidden, y, tape, h0, lengths, reset, ctx.cell, ctx.reverse)
        if need[3] or need[4]:
            db_ih = db_hh = flat.sum(0)
            if ctx.cell == "gru" and need[4]:
                db_hh = torch.cat((db_ih[: 2 * hidden], dhidden.sum((0, 1))))
        if w_hr is not None and need[5]:
            o = tape[..., 3 * hidden :]
            m = (o * torch.tanh(states).to(o.dtype)).flatten(0, 1)
            dw_hr = dhidden.flatten(0, 1).t() @ m
        return (
            dx,
            dw_ih,
            dw_hh,
            db_ih if need[3] else None,
            db_hh if need[4] else None,
            dw_hr,
            dh0,
            dc0 if c0 is not None else None,
            *(None,) * 5,
        )


def _dw_hh(
    dgates: Tensor,
    dhidden: Tensor,
    y: Tensor,
    tape: Tensor,
    h0: Tensor,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
) -> Tensor:
    """dW_hh = sum over steps of dgates_tᵀ · h_prev_t, without laying out h_prev: it is y, one step aside."""
    if reset is not None:  # a cleared state has no part in the product
        keep = ~reset[:, :, None]
        dgates = dgates * keep
        dhidden = dhidden * keep if cell == "gru" else dhidden

    def product(d: Tensor) -> Tensor:
        if reverse:
            first = d[-1] if lengths is None else _at(d, (lengths - 1).clamp_min(0))
            later, before = d[:-1], y[1:]
        else:
            first, later, before = d[0], d[1:], y[:-1]
        return torch.addmm(first.t() @ h0, later.flatten(0, 1).t(), before.flatten(0, 1))

    if cell not in ("gru", "gru_reset_before"):
        return product(dgates)
    hidden = h0.shape[-1]
    if cell == "gru":
        candidate = product(dhidden)
    else:
        q = tape[..., 3 * hidden :]  # r * h_prev
        candidate = dgates[..., 2 * hidden :].flatten(0, 1).t() @ q.flatten(0, 1)
    return torch.cat((product(dgates[..., : 2 * hidden]), candidate))


def _at(values: Tensor, steps: Tensor) -> Tensor:
    """``values[steps[b], b]`` of ``values [T, B, N]``."""
    return values.gather(0, steps.to(torch.int64)[None, :, None].expand(1, -1, values.shape[-1]))[0]


def _differentiable_backward(
    need: tuple[bool, ...],
    inputs: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    grads: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """The gradient as a differentiable function of everything: forward and backward again, in eager torch."""
    # Views of their own, so that one tensor given twice (h0 as c0) is two inputs here.
    own: list[Any] = [None if t is None else t.view_as(t) for t in inputs]
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = own
    outputs = reference.scan(
        x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, cell=cell, reverse=reverse
    )  # fmt: skip
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t, n in zip(own, need, strict=False) if t is not None and n]
    found = iter(
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and n else None for t, n in zip(own, need, strict=False)]

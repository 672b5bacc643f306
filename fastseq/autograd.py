"""The scan as one differentiable function.

A backend walks the cell forward and back. The large products of the backward pass (``dx``, ``dW``, ``db``) are one
matrix product each for the whole sequence: the backend's own where it has them, else torch's, written here once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import ops
from fastseq.recurrent import reference

FORWARD = {name: getattr(torch.ops.fastseq.scan_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.scan_backward, name) for name in ops.BACKENDS}
# The whole gradient, of the backends that have it in one call; native on the CPU.
GRADIENT = {"native": torch.ops.fastseq.scan_gradient.native}

_unwrap = torch._C._functorch.unwrap_if_dead  # a tensor that outlived its transform
is_batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd.grad(..., is_grads_batched=True)


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is being traced."""
    if torch.compiler.is_compiling():  # Dynamo runs its own account of transforms, and cannot trace these questions
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """Whether tangents go along with tensors, which they do under ``torch.no_grad()`` too."""
    return torch.autograd.forward_ad._current_level >= 0


def wants_gradient(tensors: Sequence[Any]) -> bool:
    """Whether one of these, some of which may be None, has a gradient to be computed."""
    for t in tensors:  # noqa: SIM110 - a plain loop takes half the time of any() over a generator
        if t is not None and getattr(t, "requires_grad", False):  # what is no tensor is refused elsewhere
            return True
    return False


def needs_reference() -> bool:
    """Whether a transform is active that the fused operators do not have: forward mode, a nested gradient, or
    functionalization, which takes no Function."""
    if torch.compiler.is_compiling():
        return transform_is_traced()
    if forward_mode():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return False
    kinds = [level.key() for level in stack]
    transform = torch._C._functorch.TransformType
    return transform.Jvp in kinds or transform.Functionalize in kinds or kinds.count(transform.Grad) > 1


def transform_is_traced() -> bool:
    """Whether a torch.func transform is active, asked while Dynamo traces: it enters transforms as it meets them, and
    takes this answer for a constant. It loses a Function's backward inside one, so the reference must run there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


transform_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recorder(function: Any) -> Any:
    """``function.apply`` of a Function without default arguments, outside of transforms.

    torch.autograd.Function's own inspects the signature of ``forward`` at every call, to bind defaults: that costs more
    than a small layer's kernels.
    """
    return super(torch.autograd.Function, function).apply


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` by way of :func:`recorder`. What torch's own does besides is done here."""
    if torch.compiler.is_compiling() or functorch_active():
        return function.apply(*args)
    return recorder(function)(*[_unwrap(a) if isinstance(a, Tensor) else a for a in args])


@functools.lru_cache
def values_read(
    cell: str, one_step: bool, need_x: bool, need_w_ih: bool, need_w_hh: bool, need_h0: bool
) -> tuple[bool, ...]:
    """Of which of x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 and y the fused gradient reads the values. As with torch's
    layers, the others may be changed in place before the backward pass."""
    gru = cell.startswith("gru")
    w_hh = not one_step or need_h0 or cell == "gru_reset_before"
    y = not one_step or cell.startswith("rnn")
    return need_w_ih, need_x, w_hh, False, False, True, gru or need_w_hh, True, y


def save(ctx: Any, tensors: Sequence[Tensor | None], read: Sequence[bool]) -> None:
    """Save for the backward pass the tensors that are read there, and keep the others aside, for second derivatives.
    No output may be among those."""
    kept: list[Tensor | None] = []
    aside: list[tuple[int, Tensor, int | None]] = []
    for n, t in enumerate(tensors):
        if t is None or read[n]:
            kept.append(t)
        else:
            kept.append(None)
            aside.append((n, t, None if t.is_inference() else t._version))
    ctx.save_for_backward(*kept)
    ctx.aside = aside


def saved(ctx: Any) -> list[Any]:
    """The tensors that :func:`save` was given."""
    tensors = list(ctx.saved_tensors)
    for n, tensor, version in ctx.aside:
        if torch.is_grad_enabled() and version is not None and tensor._version != version:
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} that a second derivative needs was modified by an inplace operation: "
                f"it is at version {tensor._version}, expected {version}; give the layer a clone of it"
            )
        tensors[n] = tensor
    return tensors


class Scan(torch.autograd.Function):
    """One layer, one direction, on an operator backend. Arguments and results as ``ops.SCAN_FORWARD``, without the
    results that are empty: y, h_n; then an LSTM's c_n and states; then the tape, but for an RNN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        w_hr: Tensor | None,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        cell: str,
        reverse: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        y, h_n, c_n, states, tape = FORWARD[backend](
            x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, ops.NUMBER[cell], reverse, True, True
        )  # fmt: skip
        if cell == "lstm":
            return y, h_n, c_n, states, tape
        return (y, h_n, tape) if ops.TAPE[cell] else (y, h_n)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*_context(ctx, inputs, output))

    @staticmethod
    def backward(ctx: Any, *results: Tensor | None) -> tuple:
        return _scan_backward(ctx, ctx.saved_tensors, results)


class EagerScan(Scan):
    """:class:`Scan` outside of transforms and torch.compile, which see saved tensors only. It saves what its backward
    pass reads."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, lengths, reset, y, states, tape = _context(ctx, inputs, output)
        assert y is not None
        need = ctx.needs_input_grad
        *read, read_y = values_read(ctx.cell, y.shape[0] == 1, *need[:3], need[6])
        y = y if read_y else y.detach()  # else the result would hold its own graph
        save(ctx, (*tensors, lengths, reset, y, states, tape), (*read, True, True, read_y, True, True))

    @staticmethod
    def backward(ctx: Any, *results: Tensor | None) -> tuple:
        return _scan_backward(ctx, saved(ctx), results)


def _context(ctx: Any, inputs: tuple, output: tuple) -> tuple[Tensor | None, ...]:
    """Settles what a scan's gradient needs besides tensors; returns these: the inputs, y, states, tape."""
    *tensors, ctx.cell, ctx.reverse, ctx.backend = inputs
    tape = output[-1] if len(output) > 2 else None
    if tape is not None:
        ctx.mark_non_differentiable(tape)
    ctx.set_materialize_grads(False)
    return *tensors, output[0], output[3] if len(output) > 3 else None, tape


def _scan_backward(ctx: Any, tensors: Sequence[Any], results: Sequence[Tensor | None]) -> tuple:
    *inputs, lengths, reset, y, states, tape = tensors
    grads = results[:4] if ctx.cell == "lstm" else (*results[:2], None, None)
    need = ctx.needs_input_grad[:8]
    found = gradient(grads, inputs, lengths, reset, y, states, tape, ctx.cell, ctx.reverse, ctx.backend, need)
    return (*found, *(None,) * 5)


class ScanGradient(torch.autograd.Function):
    """The gradient as a function of its own: the fused kernels, and behind them, for whoever differentiates once more,
    the reference. Second derivatives are rare, so nothing is computed for them until one is taken."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        lengths, reset, y, states, tape, cell, reverse, backend, need = args[12:]
        found = fused_gradient(
            args[:4], args[4:12], lengths, reset, y, states, tape, cell, reverse, backend, need
        )  # fmt: skip
        return tuple(y.new_empty(0) if g is None or not n else g for g, n in zip(found, need, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:14])  # y, states and tape follow from these
        ctx.cell, ctx.reverse, _, ctx.need = inputs[17:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        *tensors, lengths, reset = ctx.saved_tensors
        places = [n for n, t in enumerate(tensors) if t is not None]

        def first(*present: Tensor) -> tuple[Tensor, ...]:
            """The gradient that was asked for, as a function of all that it depends on."""
            given = dict(zip(places, present, strict=True))
            values = [given.get(n) for n in range(12)]
            found = reference_gradient(values[:4], values[4:], lengths, reset, ctx.cell, ctx.reverse, ctx.need)
            return tuple(g for g, n in zip(found, ctx.need, strict=True) if n)

        vjp: Any = torch.func.vjp(first, *(t for t in tensors if t is not None))[1]
        found: list[Tensor | None] = [None] * 21
        for place, grad in zip(places, vjp(tuple(g for g, n in zip(grads, ctx.need, strict=True) if n)), strict=True):
            found[place] = grad
        return tuple(found)


def gradient(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    states: Tensor | None,
    tape: Tensor | None,
    cell: str,
    reverse: bool,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, None where not needed; differentiable in grad mode."""
    if need[5] and grads[0] is None and grads[1] is None and y.shape[0] == 1:
        need = (*need[:5], False, *need[6:])  # the c of one step does not depend on w_hr
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        found = fused_gradient(grads, inputs, lengths, reset, y, states, tape, cell, reverse, backend, need)
    elif needs_reference():
        found = reference_gradient(grads, inputs, lengths, reset, cell, reverse, need)
    else:
        found = apply(
            ScanGradient, *grads, *inputs, lengths, reset, y, states, tape, cell, reverse, backend, need
        )  # fmt: skip
    return tuple(g if n else None for g, n in zip(found, need, strict=True))


def fused_gradient(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    lengths: Tensor | None,
    reset: Tensor | None,
    y: Tensor,
    states: Tensor | None,
    tape: Tensor | None,
    cell: str,
    reverse: bool,
    backend: str,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 by a backend; anything, or None, where not needed."""
    x, w_ih, w_hh, _, _, w_hr, h0, c0 = inputs
    flags = (need[0], need[1] or need[2] or need[3] or need[4])
    if backend in GRADIENT and y.device.type == "cpu":
        dx, dw_ih, dw_hh, db_ih, db_hh, dh0, dc0, dhidden = GRADIENT[backend](
            *grads, x, w_ih, w_hh, w_hr, h0, c0, lengths, reset, y, states, tape,
            ops.NUMBER[cell], reverse, *flags,
        )  # fmt: skip
    else:
        dgates, dhidden, dh0, dc0 = BACKWARD[backend](
            *grads, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset, ops.NUMBER[cell], reverse
        )
        dx, dw_ih, dw_hh, db_ih, db_hh = torch_products(
            dgates, dhidden, x, w_ih, y, tape, h0, lengths, reset, cell, reverse, *flags
        )
    dw_hr = None
    if w_hr is not None and need[5]:
        assert states is not None and tape is not None  # noqa: PT018
        o = tape[..., 3 * states.shape[-1] :]
        dw_hr = _rows(dhidden).t() @ _rows(o * torch.tanh(states).to(o.dtype))
    return dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, dh0, dc0


def reference_gradient(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    need: Sequence[bool],
) -> tuple[Tensor, ...]:
    """The same by the reference: slower, and differentiable itself."""
    wanted = [n for n, t in enumerate(inputs) if t is not None and need[n]]
    outputs = [n for n, g in enumerate(grads) if g is not None]

    def forward(*own: Tensor) -> tuple[Tensor, ...]:
        x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = (
            own[wanted.index(n)] if n in wanted else t for n, t in enumerate(inputs)
        )
        results: Any = reference.scan(
            x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset, cell=cell, reverse=reverse
        )  # fmt: skip
        return tuple(results[n] for n in outputs)

    vjp: Any = torch.func.vjp(forward, *(inputs[n] for n in wanted))[1]
    found = [inputs[0].new_empty(0)] * 8
    for place, grad in zip(wanted, vjp(tuple(g for g in grads if g is not None)), strict=True):
        found[place] = grad
    return tuple(found)


def torch_products(
    dgates: Tensor,
    dhidden: Tensor,
    x: Tensor,
    w_ih: Tensor,
    y: Tensor,
    tape: Tensor | None,
    h0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    with_dx: bool,
    with_weights: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dW_ih, dW_hh, db_ih, db_hh as torch's matrix products, for backends without ``scan_gradient``."""
    dx = dw_ih = dw_hh = db_ih = db_hh = None
    flat = _rows(dgates)
    if with_dx:
        dx = (flat @ w_ih).reshape(x.shape)
    if with_weights:
        if lengths is not None:  # the padding may hold anything, and 0 * NaN is NaN
            steps = torch.arange(x.shape[0], device=x.device)
            x = x.masked_fill((steps[:, None] >= lengths)[:, :, None], 0)
        dw_ih = flat.t() @ _rows(x)
        dw_hh = _dw_hh(dgates, dhidden, y, tape, h0, lengths, reset, cell, reverse)
        db_ih = db_hh = flat.sum(0)
        if cell == "gru":
            db_hh = torch.cat((db_ih[: -dhidden.shape[-1]], dhidden.sum((0, 1))))
    return dx, dw_ih, dw_hh, db_ih, db_hh


def _dw_hh(
    dgates: Tensor,
    dhidden: Tensor,
    y: Tensor,
    tape: Tensor | None,
    h0: Tensor | None,
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

    start = y.new_zeros(y.shape[1:]) if h0 is None else h0

    def product(d: Tensor) -> Tensor:
        if reverse:
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
        assert tape is not None
        q = tape[..., 3 * hidden :]  # r * h_prev
        candidate = _rows(dgates[..., 2 * hidden :]).t() @ _rows(q)
    return torch.cat((product(dgates[..., : 2 * hidden]), candidate))


def _rows(x: Tensor) -> Tensor:
    """``[T, B, N]`` as ``[T * B, N]``; of flatten, the vmap of ``is_grads_batched`` knows nothing."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def _at(values: Tensor, steps: Tensor) -> Tensor:
    """``values[steps[b], b]`` of ``values [T, B, N]``."""
    return values.gather(0, steps.to(torch.int64)[None, :, None].expand(1, -1, values.shape[-1]))[0]

"""Recurrent layers with layer normalisation (``norm=``): the checks of their arguments, and one layer and direction.

The input's share of the gates is torch's product and normalisation of all steps at once, which torch differentiates.
The recurrence is one operator pair (``schemas.NORMED_FORWARD``), whose gradient's own derivative is the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import autograd, ops
from fastseq import backend as backends
from fastseq.checks import ArgumentError, check_like, check_tensor, sizes
from fastseq.recurrent import normed_reference as reference
from fastseq.recurrent.autograd import Inputs, Kept, Walk, dw_hh_of
from fastseq.recurrent.call import RecurrentCall, Result

FORWARD = {name: getattr(torch.ops.fastseq.normed_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.normed_backward, name) for name in ops.BACKENDS}


def check_form(norm: object, cell: str, projected: bool = False) -> None:
    """The name of a normalisation, and whether there is one of such a layer."""
    if norm is None:
        return
    gru = cell.startswith("gru")
    if not isinstance(norm, str) or norm not in ("layer", *("joint",) * gru):
        accepted = "None, 'layer' or 'joint'" if gru else "None or 'layer' (a GRU's may be 'joint')"
        raise ArgumentError(f"norm must be {accepted}, got {norm!r}")
    if cell == "gru_reset_before":
        raise ArgumentError(
            f"norm={norm!r} has no form with reset_after=False: the reset gate acts on the normalised product there; "
            "leave reset_after=True"
        )
    if projected:
        raise ArgumentError(f"norm={norm!r} has no form with a projection: leave proj_size=0 (projected=False)")


def weight_sizes(cell: str, norm: str, hidden: int) -> dict[str, int]:
    """The parameters of the normalisations of one layer and direction, in their flat order, with their sizes."""
    gates = ops.GATES[cell] * hidden
    if norm == "joint":
        return {"norm": gates, "norm_bias": gates}
    of_c = {"norm_c": hidden, "norm_c_bias": hidden} if ops.HAS_C[cell] else {}
    return {"norm_ih": gates, "norm_hh": gates} | of_c


def check(call: RecurrentCall) -> None:
    """The normalisation of a call, and its parameters."""
    check_form(call.norm, call.cell, call.projected)
    if not isinstance(call.norm_weights, (tuple, list)):
        raise TypeError(f"norm_weights must be a sequence of Tensors, got {type(call.norm_weights).__name__}")
    if call.norm is None:
        if len(call.norm_weights):
            raise ArgumentError(f"there are {len(call.norm_weights)} norm_weights but norm is None: name the form")
        return
    expected = weight_sizes(call.cell, call.norm, call.hidden)
    if len(call.norm_weights) != call.rows * len(expected):
        raise ArgumentError(
            f"norm={call.norm!r} in {call.rows} layers and directions needs {call.rows * len(expected)} norm_weights "
            f"({', '.join(expected)} each), but there are {len(call.norm_weights)}"
        )
    for n, weight in enumerate(call.norm_weights):
        name, size = list(expected.items())[n % len(expected)]
        check_tensor(f"norm_weights[{n}]", weight)
        if tuple(weight.shape) != (size,):
            raise ArgumentError(f"norm_weights[{n}] ({name}) must be [{size}], got {sizes(weight)}")
        check_like(f"norm_weights[{n}] ({name})", weight, call.x, "input is")


def weights_of(call: RecurrentCall, index: int) -> Sequence[Tensor]:
    """Those of the normalisations of the ``index``-th layer and direction."""
    width = len(call.norm_weights) // call.rows
    return call.norm_weights[index * width : (index + 1) * width]


class Kind(NamedTuple):
    """Which recurrence is walked, on which backend."""

    cell: str
    form: str
    reverse: bool
    backend: str

    def numbers(self) -> tuple[int, bool, bool]:
        """As the operators take them."""
        return ops.NUMBER[self.cell], self.form == "joint", self.reverse


def scan(
    walk: Walk, form: str, x: Tensor, weights: Sequence[Any], norms: Sequence[Tensor], state: Sequence[Any],
    want_states: bool,
) -> Result:  # fmt: skip
    """One layer and direction; results as :func:`fastseq.recurrent.reference.scan`.

    ``weights``: w_ih, w_hh, b_ih, b_hh and None; ``state``: h0, c0, lengths, reset and state_mask, and what the
    reference alone has: reset_h, reset_c and zoneout's shares.
    """
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # the call was cast already
        with torch.autocast(device, enabled=False):
            return scan(walk, form, x, weights, norms, state, want_states)
    cell, reverse, backend = walk
    w_ih, w_hh, b_ih, b_hh, _ = weights
    if backend == "reference" or autograd.needs_reference() or autograd.functorch_active():
        return reference.scan(x, w_ih, w_hh, b_ih, b_hh, norms, *state, cell=cell, form=form, reverse=reverse)
    state, lengths = state[:5], state[2]
    if lengths is not None:  # the padding may hold anything, and 0 * NaN is NaN
        x = x.masked_fill((torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[:, :, None], 0)
    gates_x, *parameters = reference.sides(x, w_ih, b_ih, b_hh, norms, form)
    tensors = (gates_x, w_hh, *parameters, *state)
    kind = Kind(cell, form, reverse, backend)
    recorded = torch.is_grad_enabled() and autograd.wants_gradient(tensors[:8]) and not backends.tracing()
    if recorded and backends.keeps_a_tape():
        found = autograd.apply(Normed, *tensors, kind)
    else:
        found = FORWARD[backend](*tensors, *kind.numbers(), False, want_states)
    return found[:4] if ops.HAS_C[cell] else (found[0], found[1], None, None)


class Normed(torch.autograd.Function):
    """The recurrence on the kernels of a backend.

    Arguments: gates_x, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset, state_mask, then :class:`Kind`.
    Results: y, h_n, and an LSTM's c_n and states.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *tensors, kind = args
        y, h_n, c_n, states, tape, stats = FORWARD[kind.backend](*tensors, *kind.numbers(), True, True)
        has_c = ops.HAS_C[kind.cell]
        ctx.kind = kind
        ctx.set_materialize_grads(False)
        autograd.save(ctx, (*tensors, y, states if has_c else None, tape, stats))
        return (y, h_n, c_n, states) if has_c else (y, h_n)

    @staticmethod
    def backward(ctx: Any, *results: Tensor | None) -> tuple:
        need = ctx.needs_input_grad[:8]
        if autograd.all_absent(results):
            return (None,) * 12
        saved = autograd.saved(ctx)
        grads = results if len(results) == 4 else (*results, None, None)
        recorded = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        way = _differentiable_gradient if recorded else fused_gradient
        found = way(ctx.kind, grads, saved[:8], saved[8:11], saved[11:], need)
        return (*(d if n else None for d, n in zip(found, need, strict=True)), *(None,) * 4)


Tensors = Sequence[Any]
"""Of tensors, some of which may be None."""


def fused_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, kept: Tensors, need: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Gradients of the eight inputs by the operator; anything, or None, where not needed.

    ``grads``: of y, h_n, c_n and states; ``options``: lengths, reset and state_mask; ``kept``: y, states, tape, stats.
    """
    gates_x, w_hh, h0 = inputs[0], inputs[1], inputs[6]
    dgates_x, dproduct, *more = BACKWARD[kind.backend](*grads, *kept, *inputs[1:], *options, *kind.numbers())
    dw_hh = None
    if need[1]:
        read = Inputs(gates_x, w_hh, w_hh, None, None, None, h0, None, None, None, *options)
        one_product = Walk("rnn_tanh", kind.reverse, kind.backend)  # of all gates with the same h
        dw_hh = dw_hh_of(dproduct, dproduct, read, Kept(kept[0], None, None), one_product)
    return (dproduct if kind.form == "joint" else dgates_x, dw_hh, *more)


def reference_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, need: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The same by the reference: slower, and differentiable itself."""

    def forward(*own: Any) -> tuple[Tensor | None, ...]:
        return reference.walk(*own, *options, cell=kind.cell, form=kind.form, reverse=kind.reverse)

    return autograd.vjp(forward, inputs, need, grads)


def _differentiable_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, kept: Tensors, need: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The same, whose own derivative is the reference's. A place that is not needed holds an empty tensor."""

    # Of tensors these use their arguments alone: in a transform those outside are of another level.
    def kernel(*t: Any) -> tuple[Tensor, ...]:
        return autograd.present(fused_gradient(kind, t[:4], t[4:12], t[12:15], t[15:], need), need, t[4])

    def by_reference(*t: Any) -> tuple[Tensor, ...]:
        return autograd.present(reference_gradient(kind, t[:4], t[4:12], t[12:15], need), need, t[4])

    tensors = (*grads, *inputs, *options, *kept)
    if autograd.needs_reference():
        return by_reference(*tensors)
    return autograd.apply(autograd.WithReference, kernel, None, by_reference, 12, 15, *tensors)

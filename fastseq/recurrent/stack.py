"""A stack of recurrent layers on the native kernels as one differentiable function: one call forward, one back.

On CUDA the call runs side by side what is independent (:mod:`fastseq.ops.schemas`). On the CPU in eager mode it goes
past torch's dispatcher (:mod:`fastseq.direct`). The gradient is the kernels' own; whoever differentiates that gets
the reference's, computed anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import autograd, direct, ops
from fastseq import backend as backends
from fastseq.recurrent import reference
from fastseq.recurrent.autograd import Inputs, Kept, Walk, fused_gradient
from fastseq.recurrent.autograd import values_read as values_a_scan_reads
from fastseq.recurrent.call import RecurrentCall, Result
from fastseq.recurrent.layout import has_one_step, state_in, state_out, steps_in, steps_out

FORWARD = torch.ops.fastseq.layers_forward.native
BACKWARD = torch.ops.fastseq.layers_backward.native


class Kind(NamedTuple):
    """What a stack is made of, and how it is called; its weights are flat, in torch's order, a layer and direction at
    a time. ``reverse``: its one direction walks from the last step to the first. ``fast``: the call past the
    dispatcher may take it. ``checked``: what that declines takes the operator; else nobody has looked at the
    arguments yet."""

    cell: str
    num_layers: int = 1
    bidirectional: bool = False
    reverse: bool = False
    want_states: bool = False
    layout: str = "layer"
    fast: bool = False
    checked: bool = True

    def numbers(self) -> tuple[int, ...]:
        """The cell and the layers, as the operators take them."""
        return ops.NUMBER[self.cell], *self[1:4]

    @property
    def directions(self) -> int:
        """1, or 2 where bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def rows(self) -> int:
        """Layers and directions."""
        return self.num_layers * self.directions


@functools.lru_cache(maxsize=1024)
def values_read(kind: Kind, one_step: bool, need: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of which of x, h0, c0, reset_h, reset_c, the options, y, the weights and what else is kept the gradient reads the
    values. As with torch's layers, the others may be changed in place before the backward pass. ``need``: whose
    gradient is needed, by the place among the arguments of :class:`Layers`."""
    own, cell = need[11:], kind.cell
    width = len(own) // kind.rows
    need_w_ih, need_w_hh = any(own[: kind.directions * width : width]), any(own[1::width])
    x, w_ih, w_hh, h0, y = values_a_scan_reads(cell, one_step, need[0], need_w_ih, need_w_hh, need[1])
    read = [x, h0, *8 * [True], y]
    for row in range(kind.rows):
        biases, projection = (False, False) * (width >= 4), (True,) * (width % 2)
        read += (w_ih or row >= kind.directions, w_hh, *biases, *projection)
    kept = kind.num_layers - 1 + kind.rows * (ops.HAS_C[cell] + bool(ops.TAPE[cell]))  # as parts_of has them
    return (*read, *kept * [True])


class Layers(torch.autograd.Function):
    """Results: y; h_n, if not of a cell; an LSTM's c_n; with ``want_states`` every c_t of the last layer's directions.
    None where the arguments are not checked and the call past the dispatcher does not take them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        state_mask: Tensor | None,
        zoneout_h: Tensor | None,
        zoneout_c: Tensor | None,
        kind: Kind,
        *weights: Tensor,
    ) -> Any:
        options = reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c
        cell, num_layers, bidirectional, _, want_states, layout, fast, checked = kind
        made: Any = None
        if fast:
            made = direct.layers_forward(x, h0, c0, cell, layout, num_layers, bidirectional, weights)
        if made is not None:
            y, h_n, c_n, *rest = made
        elif checked:
            y, h_n, c_n, ys, states, tapes = FORWARD(x, weights, h0, c0, *options, *kind.numbers(), True, True)
            c_n = c_n if ops.HAS_C[cell] else None
            rest = [*ys, *states, *tapes]
        else:
            return None
        ctx.kind, ctx.count = kind, len(weights)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():
            autograd.save(ctx, (x, h0, c0, *options, y, *weights, *rest))
        else:
            one_step = bool(has_one_step(layout, y))  # a size may be a symbol of a trace
            read = values_read(kind, one_step, ctx.needs_input_grad)
            kept_y = y if read[10] else y.detach()  # else the result would hold its own graph
            autograd.save(ctx, (x, h0, c0, *options, kept_y, *weights, *rest), read)
        results = (y,) if h_n is None else (y, h_n)
        if c_n is None:
            return results
        if not want_states:
            return (*results, c_n)
        at = num_layers - 1 + kind.rows  # where states end
        return (*results, c_n, *rest[at - kind.directions : at])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        kind, need = ctx.kind, ctx.needs_input_grad
        if autograd.all_absent(grads):
            return (None,) * len(need)
        x, h0, c0, reset_h, reset_c, *rest = autograd.saved(ctx)
        y, weights, made = rest[5], tuple(rest[6 : 6 + ctx.count]), rest[6 + ctx.count :]
        is_cell, lstm = kind.layout == "cell", ops.HAS_C[kind.cell]
        dy, dh_n = grads[0], None if is_cell else grads[1]
        dc_n = grads[1 if is_cell else 2] if lstm else None
        more = grads[2 - is_cell + lstm :]
        found: Any = None
        if kind.fast and not more and not torch.compiler.is_compiling():
            found = direct.layers_backward(
                x, h0, c0, kind.cell, kind.layout, kind.num_layers, kind.bidirectional, weights,
                (*need[:3], *need[11:]), dy, dh_n, dc_n, (y, *made),
            )  # fmt: skip
        if found is not None:
            found = [*found[:3], None, None, *found[3:]]
        else:
            layout, rank = kind.layout, x.dim()
            dh_n, dc_n, *starts = (state_in(layout, rank, s) for s in (dh_n, dc_n, h0, c0, reset_h, reset_c))
            inputs = (steps_in(layout, rank, x), *starts, *weights)
            outputs = (steps_in(layout, rank, dy), dh_n, dc_n, *more)
            kept, needed = (steps_in(layout, rank, y), *made), (*need[:5], *need[11:])
            way = _way(grads)
            dx, *others = way(kind, outputs, inputs, tuple(rest[:5]), kept, needed)
            starts, own = others[:4], others[4:]
            found = [
                steps_out(layout, rank, dx if need[0] else None),
                *(state_out(layout, rank, d if n else None) for d, n in zip(starts, need[1:5], strict=True)),
                *(d if n else None for d, n in zip(own, need[11:], strict=True)),
            ]
        width = len(weights) // kind.rows
        if dy is None and dh_n is None and width % 2 and has_one_step(kind.layout, x):
            for row in range(kind.rows - kind.directions, kind.rows):
                found[5 + (row + 1) * width - 1] = None  # c of one step does not depend on w_hr
        return (*found[:5], *6 * (None,), *found[5:])


def _way(grads: Sequence[Tensor | None]) -> Callable[..., list[Tensor | None]]:
    """Which of the ways below to the gradients, given those of the results."""
    if torch.compiler.is_compiling():
        return fused_stack_gradient
    if torch.is_grad_enabled():
        return _differentiable_gradient
    return _gradient_by_scans if is_mapped(grads) else fused_stack_gradient


_recorded = autograd.recorder(Layers)


def is_mapped(grads: Sequence[Tensor | None]) -> bool:
    """Whether a vmap goes over gradients, torch.func's or that of ``is_grads_batched``."""
    for d in grads:
        if d is not None and autograd.is_batched(d):
            return True
    return autograd.functorch_active()


Tensors = Sequence[Any]
"""Of tensors, some of which may be None."""


def parts_of(kind: Kind, kept: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """The outputs of all layers, an LSTM's states and a cell's tapes, of y, the outputs of the layers below, states and
    tapes one after another."""
    n = kind.num_layers
    m = n + kind.rows * ops.HAS_C[kind.cell]
    return (*kept[1:n], kept[0]), kept[n:m], kept[m:]


def fused_stack_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, kept: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of x, h0, c0, reset_h, reset_c and the weights by the operator; anything, or None, where not needed.

    ``grads``: of y, h_n, c_n, and none or all of the last layer's states; ``options``: lengths, reset, state_mask and
    zoneout's shares; ``kept``: y, the outputs of the layers below, states and tapes.
    """
    x, *at_first, weights = *inputs[:5], inputs[5:]
    lengths = options[0]
    ys, states, tapes = parts_of(kind, kept)
    starts = None
    if lengths is not None and x.is_cuda:
        x, starts = with_lengths(x, lengths, kind.bidirectional)
    dy, dh_n, dc_n, *dstates = grads
    if any(d is not None for d in dstates):
        own = zip(dstates, states[-kind.directions :], strict=True)
        dstates = [torch.zeros_like(s) if d is None else d for d, s in own]
    else:
        dstates = []
    *found, dweights = BACKWARD(
        dy, dh_n, dc_n, dstates, x, weights, *at_first, *options, starts, ys, states, tapes, *kind.numbers(), needed[0],
        any(needed[5:]),
    )  # fmt: skip
    return [*found, *(dweights or len(weights) * [None])]


def with_lengths(x: Tensor, lengths: Tensor, bidirectional: bool) -> tuple[Tensor, Tensor | None]:
    """x and ``starts`` as the operator has them on CUDA. The padding may hold anything, and 0 * NaN is NaN."""
    steps = torch.arange(x.shape[0], device=x.device)
    x = x.masked_fill((steps[:, None] >= lengths)[:, :, None], 0)
    return x, (lengths - 1).clamp_min(0)[None, :, None] if bidirectional else None


def whole_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same where nothing was kept of a forward pass, which is run again: a gradient that is differentiated, or
    mapped over."""
    with torch.no_grad():
        plain = [None if t is None else t.detach() for t in (*inputs, *options)]
        x, starts, own = plain[0], plain[1:5], plain[5 : len(inputs)]
        y, _, _, ys, states, tapes = FORWARD(x, own, *starts, *plain[len(inputs) :], *kind.numbers(), True, True)
    way = _differentiable_gradient if torch.is_grad_enabled() else _gradient_by_scans
    return way(kind, (*grads, None)[:3], inputs, options, (y, *ys, *states, *tapes), needed)


def _gradient_by_scans(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, kept: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same, a layer and direction at a time: for a vmap over gradients, which knows no operator with lists."""
    x, *at_first, weights = *inputs[:5], inputs[5:]
    d, dh_n, dc_n, *dstates = grads
    width, below, directions = len(weights) // kind.rows, kind.num_layers - 1, kind.directions
    ys, *all_rows = parts_of(kind, kept)
    states, tapes = (rows or kind.rows * (None,) for rows in all_rows)
    found: list[Any] = len(weights) * [None]
    starts: list[list[Any]] = [kind.rows * [None] for _ in at_first]
    for layer in reversed(range(kind.num_layers)):
        below_d: list[Tensor] = []
        for direction in range(directions):
            row = layer * directions + direction
            w_ih, w_hh, *more = weights[row * width : (row + 1) * width]
            b_ih, b_hh = more[:2] if width >= 4 else (None, None)
            w_hr = more[-1] if width % 2 else None

            def of_row(s: Tensor | None, row: int = row) -> Tensor | None:
                return None if s is None else s[row]

            at, P = direction * w_hh.shape[1], w_hh.shape[1]
            found_row = fused_gradient(
                (None if d is None else d.narrow(-1, at, P), of_row(dh_n), of_row(dc_n),
                 dstates[direction] if dstates and layer == below else None),
                Inputs(ys[layer - 1] if layer else x, w_ih, w_hh, b_ih, b_hh, w_hr, *map(of_row, at_first),
                       *reference.options_of(options, row)),
                Kept(ys[layer].narrow(-1, at, P), states[row], tapes[row]),
                Walk(kind.cell, kind.reverse or direction == 1, "native"),
                (bool(layer) or needed[0], True, True, True, True, w_hr is not None, True, True, True, True),
            )  # fmt: skip
            dx, dw_ih, dw_hh, db_ih, db_hh, dw_hr, *dstarts = found_row
            for of_rows, dstart in zip(starts, dstarts, strict=True):
                of_rows[row] = dstart
            if dx is not None:
                below_d.append(dx)
            found[row * width : (row + 1) * width] = [
                dw_ih, dw_hh, *(db_ih, db_hh) * (width >= 4), *(dw_hr,) * (width % 2)
            ]  # fmt: skip
        d = below_d[0] if len(below_d) == 1 else below_d[0] + below_d[1] if below_d else None
    made = (
        None if s is None else torch.stack([t for t in of_rows if t is not None])
        for s, of_rows in zip(at_first, starts, strict=True)
    )
    return [d, *made, *found]


def _differentiable_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, kept: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same, whose own derivative is the reference's."""
    n, m = len(grads), len(grads) + len(inputs)

    # Of tensors these use their arguments alone: in a transform those outside are of another level.
    def kernel(*t: Any) -> tuple[Tensor, ...]:
        found = fused_stack_gradient(kind, t[:n], t[n:m], t[m : m + 5], t[m + 5 :], needed)
        return autograd.present(found, needed, t[n])

    def by_reference(*t: Any) -> tuple[Tensor, ...]:
        return autograd.present(reference_gradient(kind, t[:n], t[n:m], t[m : m + 5], needed), needed, t[n])

    tensors = (*grads, *inputs, *options, *kept)
    if autograd.needs_reference():
        return list(by_reference(*tensors))
    return list(autograd.apply(autograd.WithReference, kernel, None, by_reference, m, m + 5, *tensors))


def reference_gradient(
    kind: Kind, grads: Tensors, inputs: Tensors, options: Tensors, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same by the reference: slower, and differentiable itself."""

    def forward(*own: Any) -> tuple[Tensor, ...]:
        x, h0, c0, reset_h, reset_c, *weights = own
        return reference.layers(x, h0, c0, reset_h, reset_c, weights, options, *kind[:4])

    return autograd.vjp(forward, inputs, needed, grads)


@functools.lru_cache
def _unchecked(cell: str, layout: str, num_layers: int, bidirectional: bool) -> Kind:
    return Kind(cell, num_layers, bidirectional, layout=layout, fast=True, checked=False)


def in_one_call(
    x: Any, h0: Any, c0: Any, weights: Sequence[Tensor], cell: str, layout: str, num_layers: int, bidirectional: bool
) -> tuple[Tensor, ...] | None:
    """y, h_n and an LSTM's c_n of a stack, to be differentiated; of a cell the new h and c. Nothing is checked before.
    None where the native call does not take the arguments. For eager mode with gradients on, where the native kernels
    are in force."""
    if not isinstance(x, Tensor) or not direct.is_plain() or not autograd.wants_gradient((x, *weights, h0, c0)):
        return None
    kind = _unchecked(cell, layout, num_layers, bidirectional)
    return _recorded(x, h0, c0, None, None, None, None, None, None, None, kind, *weights)


def suits(name: str, x: Tensor) -> bool:
    """Whether a call takes the native kernels as a stack. What torch.jit traces, what is transformed or empty takes the
    scan, layer by layer; on CUDA what is compiled too."""
    if name != "native" or 0 in x.shape or backends.tracing() or (x.is_cuda and torch.compiler.is_compiling()):
        return False
    return not (autograd.functorch_active() or autograd.needs_reference())


def run(call: RecurrentCall) -> Result:
    """y, h_n, c_n and every c_t of a stack. Dropout ends a call: layers follow one by one."""
    x = call.x
    dropout = call.dropout if call.training else 0.0
    together = 1 if dropout else call.num_layers
    rows, width = together * call.directions, len(call.weights) // call.rows
    last = call.num_layers // together - 1
    found: list[Sequence[Tensor]] = []
    for n in range(last + 1):
        own = call.weights[n * rows * width : (n + 1) * rows * width]
        states_in = (call.h0, call.c0, call.reset_h, call.reset_c, call.state_mask)
        *starts, mask = (None if s is None else s[n * rows : (n + 1) * rows] for s in states_in)
        kind = Kind(call.cell, together, call.bidirectional, want_states=call.want_states and n == last)
        options = call.lengths, call.reset, mask, *call.zoneout_shares(*x.shape[:2], rows)
        found.append(stack(kind, x, starts, options, own))
        x = found[-1][0]
        if dropout and n < last:
            x = F.dropout(x, dropout, True)
    h_n, *c_n = (
        torch.cat(parts) if len(parts) > 1 else parts[0]
        for parts in zip(*(f[1 : 3 if ops.HAS_C[call.cell] else 2] for f in found), strict=True)
    )
    states = torch.cat(list(found[-1][3:]), -1) if call.want_states and ops.HAS_C[call.cell] else None
    return x, h_n, c_n[0] if c_n else None, states


def stack(kind: Kind, x: Tensor, starts: Tensors, options: Tensors, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """y, h_n, an LSTM's c_n, and where wanted every c_t of the last layer's directions. ``starts``: h0, c0, reset_h and
    reset_c; ``options``: lengths, reset, state_mask and zoneout's shares."""
    learns = torch.is_grad_enabled() and autograd.wants_gradient((x, *starts, *weights))
    if not learns or not backends.keeps_a_tape():
        y, h_n, c_n, _, states, _ = FORWARD(x, weights, *starts, *options, *kind.numbers(), False, kind.want_states)
        return (y, h_n, c_n, *states) if ops.HAS_C[kind.cell] else (y, h_n)
    compiling = torch.compiler.is_compiling()
    plain = not kind.reverse and all(option is None for option in options)
    if not compiling and x.is_cpu and plain and direct.is_plain():
        return _recorded(x, *starts, *options, kind._replace(fast=True), *weights)
    return autograd.apply(Layers, x, *starts, *options, kind, *weights)


def scan(
    walk: Walk, x: Tensor, starts: Tensors, options: Tensors, weights: Sequence[Tensor], want_states: bool
) -> Result:
    """A stack of one layer and direction; results as :func:`fastseq.recurrent.reference.scan`."""
    kind = Kind(walk.cell, reverse=walk.reverse, want_states=want_states)
    starts, shares = ([None if s is None else s.unsqueeze(0) for s in own] for own in (starts, options[2:]))
    y, h_n, *more = stack(kind, x, starts, (*options[:2], *shares), weights)
    return y, h_n[0], more[0][0] if more else None, more[1] if len(more) > 1 else None

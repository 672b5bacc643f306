"""Launches of the kernels of normalised layers: tensors as in the schemas ``normed_forward`` and ``normed_backward``.

The role is *sequence* where W_hh fits one SM and there is more than one step, else *step*, whose products are torch's,
one a step. As in launch.py the host waits for nothing, and all of it may be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from . import normed_tuning as tiles
from . import tuning
from .launch import (
    _NAMES,
    C0,
    CARRY,
    DC,
    DSTATES,
    DY,
    H0,
    LATER,
    LENGTHS,
    RESET,
    STATES,
    Repeated,
    absent,
    common,
    dense,
    on_its_device,
    properties,
    rows,
    walk,
)
from .normed import normed_forward_sequence, normed_forward_step
from .normed_backward import gain_gradients, normed_backward_sequence, normed_backward_step

# Further bits of `given`, as the kernels have them.
SHIFT, PRODUCT = 1 << 24, 1 << 25

role: str | None = None
"""For tests and measurements: ``"sequence"`` or ``"step"``, not what :func:`tile` would choose."""


def tile(cell: str, x: Tensor, hidden: int, backward: bool) -> tuple[tuning.Sequence | None, str | None]:
    """The tile of the sequence role, and why a call gets the step role (None where it does not).

    Raises:
        ValueError: the sequence role was asked for and cannot be had; says why.
    """
    if role == "step":
        return None, "asked for"
    if x.shape[0] == 1 and role is None:
        return None, "one step is one product either way"
    found = tiles.sequence(cell, _NAMES[x.dtype], hidden, properties(x.device)[0], backward)
    if not isinstance(found, str):
        return found, None
    if role is not None:
        raise ValueError(found)
    return None, found


def multiplication(w: Tensor) -> Any:
    """A function of a, of w's dtype, and out: out = a · w in float32. Where torch has no such product of 16 bits it
    multiplies a copy of w."""
    if w.dtype is torch.float32:
        return lambda a, out: torch.mm(a, w, out=out)
    if w.is_cuda and torch.version.hip is None:
        return lambda a, out: torch.mm(a, w, out_dtype=torch.float32, out=out)
    wide = w.float()
    return lambda a, out: torch.mm(a.float(), wide, out=out)


def step_options(hidden: int) -> dict[str, Any]:
    """Constants and launch options of the step role's kernels."""
    block_n, warps = tiles.step(hidden)
    return {"BLOCK_N": block_n, "num_warps": warps}


@torch.no_grad()  # a program that holds the operator calls it on parameters, and torch's products here write to ``out``
@on_its_device
def normed_forward(
    gates_x, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset, state_mask, cell, joint, reverse, save, states
) -> tuple[Tensor, ...]:  # fmt: skip
    """``fastseq::normed_forward.triton``."""
    steps, batch, width = gates_x.shape
    hidden, lstm = w_hh.shape[1], tuning.HAS_C[cell]
    with_states = lstm and (save or states)

    def made(wanted: bool, *shape: int, dtype: torch.dtype = gates_x.dtype) -> Tensor:
        return gates_x.new_empty(shape if wanted else 0, dtype=dtype)

    y = made(True, steps, batch, hidden)
    h_n, c_n = made(True, batch, hidden), made(lstm, batch, hidden)
    all_c = made(with_states, steps, batch, hidden, dtype=torch.float32)
    tape = made(save, steps, batch, tiles.tape_of(cell) * hidden)
    stats = made(save, steps, batch, tiles.stats_of(cell), dtype=torch.float32)
    results = y, h_n, c_n, all_c, tape, stats
    if batch == 0:
        return results

    there = partial(_there, gates_x)
    gates_x, x_t, x_b = rows(gates_x)
    w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, state_mask = (
        dense(t) for t in (w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, state_mask)
    )
    given = (
        H0 * (h0 is not None) | C0 * (c0 is not None) | LENGTHS * (lengths is not None) | RESET * (reset is not None)
        | STATES * with_states | SHIFT * (shift is not None)
    )  # fmt: skip
    reset_t, reset_b = (0, 0) if reset is None else reset.stride()
    lengths, reset = there(lengths, torch.int64), there(reset, torch.bool)
    first, direction = walk(y, reverse)
    parameters = gain, there(shift), there(gain_c), there(shift_c)
    kept = there(all_c if with_states else None, torch.float32), tape, stats
    options = {"CELL": cell, "JOINT": joint, "SAVE": save}
    found, _ = tile(cell, gates_x, hidden, False)
    if found is not None:
        grid = (triton.cdiv(batch, found.block_b),)
        normed_forward_sequence[grid](
            gates_x, w_hh, *parameters, there(h0), there(c0), lengths, reset, state_mask, y, h_n, c_n, *kept,
            steps, batch, given, first, direction, x_t, x_b, reset_t, reset_b, hidden, **options,
            **sequence_options(found, gates_x),
        )  # fmt: skip
        return results

    before, after = (gates_x.new_zeros(1 + lstm, batch, hidden, dtype=torch.float32) for _ in range(2))
    for n, start in enumerate((h0, c0)):
        if start is not None:
            before[n] = start
    product = gates_x.new_empty(batch, width, dtype=torch.float32)
    operand = gates_x.new_empty(batch, hidden)
    multiply = multiplication(w_hh.t())
    launch = Repeated(normed_forward_step, (batch,), **options, **step_options(hidden))
    if h0 is not None:
        multiply(h0 if state_mask is None else h0 * state_mask, product)
        given |= PRODUCT
    for step in range(steps):
        if step > 0:
            multiply(operand, product)
        launch(
            gates_x, product, *parameters, before, lengths, reset, state_mask, y, operand, after, *kept,
            first + step * direction, batch, given, x_t, x_b, reset_t, reset_b, hidden,
        )  # fmt: skip
        before, after = after, before
        given |= PRODUCT
    h_n.copy_(before[0])
    if lstm:
        c_n.copy_(before[1])
    return results


def _there(like: Tensor, t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    return absent(like.dtype if dtype is None else dtype, like.device) if t is None else t


def sequence_options(found: tuning.Sequence, x: Tensor) -> dict[str, Any]:
    """Constants and launch options of the sequence role's kernels, which take their units in one part."""
    return {name: value for name, value in common(found, x).items() if name != "TAIL"}


@torch.no_grad()
@on_its_device
def normed_backward(
    dy, dh_n, dc_n, dstates, y, states, tape, stats, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset,
    state_mask, cell, joint, reverse,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``fastseq::normed_backward.triton``."""
    (steps, batch, hidden), lstm = y.shape, tuning.HAS_C[cell]
    width = w_hh.shape[0]
    there = partial(_there, y)
    dgates, dproduct = y.new_empty(steps, batch, width), y.new_empty(steps, batch, width)
    dnormal_c = y.new_empty((steps, batch, hidden) if lstm else 0)
    dh0, dc0 = (y.new_empty(0 if t is None else t.shape) for t in (h0, c0))

    def results() -> tuple[Tensor, ...]:
        gains, of_c = (dgates, tape, False), (dnormal_c, states, True)
        dgain, dshift = gain_sums(*gains, stats, hidden, cell == "gru" and not joint)
        dgain_c, dshift_c = gain_sums(*of_c, stats, hidden, False) if lstm else (y.new_empty(0), y.new_empty(0))
        dshift = y.new_empty(0) if shift is None else dshift
        return y.new_empty(0) if joint else dgates, dproduct, dgain, dshift, dgain_c, dshift_c, dh0, dc0

    if batch == 0:
        return results()
    dy, x_t, x_b = rows(dy)
    dh_n, dc_n = (None if t is None else t.to(torch.float32).contiguous() for t in (dh_n, dc_n))
    y, w_hh, tape, stats, states, dstates, gain, shift, gain_c, shift_c, h0, c0, lengths, state_mask = (
        dense(t)
        for t in (y, w_hh, tape, stats, states, dstates, gain, shift, gain_c, shift_c, h0, c0, lengths, state_mask)
    )
    given = (
        H0 * (h0 is not None) | C0 * (c0 is not None) | LENGTHS * (lengths is not None) | RESET * (reset is not None)
        | DY * (dy is not None) | DSTATES * (dstates is not None) | SHIFT * (shift is not None)
        | CARRY * (dh_n is not None) | DC * (dc_n is not None)
    )  # fmt: skip
    reset_t, reset_b = (0, 0) if reset is None else reset.stride()
    cleared, lengths, reset = reset, there(lengths, torch.int64), there(reset, torch.bool)
    first, direction = walk(y, reverse)
    saved = y, there(states, torch.float32), tape, stats
    parameters = gain, there(shift), there(gain_c), there(shift_c), there(h0), there(c0), lengths, reset, state_mask
    options = {"CELL": cell, "JOINT": joint}
    found, _ = tile(cell, y, hidden, True)
    dy, dstates = there(dy), there(dstates, torch.float32)
    if found is not None:
        grid = (triton.cdiv(batch, found.block_b),)
        normed_backward_sequence[grid](
            dy, there(dh_n, torch.float32), there(dc_n, torch.float32), dstates, *saved, w_hh, *parameters, dgates,
            dproduct, dnormal_c, dh0, dc0, steps, batch, given, first, direction, x_t, x_b,
            reset_t, reset_b, hidden, **options, **sequence_options(found, y),
        )  # fmt: skip
        return results()

    later, carry = (y.new_zeros(1 + lstm, batch, hidden, dtype=torch.float32) for _ in range(2))
    for n, d in enumerate((dh_n, dc_n)):
        if d is not None:
            later[n] = d
    back = y.new_empty(batch, hidden, dtype=torch.float32)
    multiply = multiplication(w_hh)
    launch = Repeated(normed_backward_step, (batch,), **options, **step_options(hidden))
    for step in reversed(range(steps)):
        t = first + step * direction
        if step < steps - 1:
            multiply(dproduct[t + direction], back)
        launch(
            dy, dstates, *saved, back, *parameters, later, dgates, dproduct, dnormal_c, carry, t, t + direction,
            batch, given, first, direction, x_t, x_b, reset_t, reset_b, steps, hidden,
        )  # fmt: skip
        later, carry = carry, later
        given |= LATER
    if h0 is not None:
        multiply(dproduct[first], back)
        if state_mask is not None:
            back *= state_mask
        if cleared is not None:
            back = back.masked_fill(cleared[first][:, None], 0)
        dh0.copy_(back + later[0])
    if c0 is not None:
        dc0.copy_(later[1])
    return results()


def gain_sums(
    d: Tensor, normal: Tensor, of_c: bool, stats: Tensor, hidden: int, reset_gate: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of a gain and its shift from ``d``, those of u at all steps: sums over T and B, in its dtype."""
    count, size = d.shape[0] * d.shape[1], d.shape[2]
    if count == 0:
        return d.new_zeros(size), d.new_zeros(size)
    block_r, block_n = tiles.GAIN_TILE
    programs = min(triton.cdiv(count, block_r), tiles.GAIN_PROGRAMS)
    found = d.new_empty(programs, 2, size, dtype=torch.float32)
    width = normal.shape[2]
    at = normal if of_c else normal.flatten()[width - size :]  # LN(product) comes last in a row of the tape
    gain_gradients[triton.cdiv(size, block_n), programs](
        d, at, stats, normal if reset_gate else d, found, count, size, hidden, width, OF_C=of_c,
        RESET_GATE=reset_gate, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip
    return found[:, 0].sum(0).to(d.dtype), found[:, 1].sum(0).to(d.dtype)

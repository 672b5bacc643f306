"""The scan's operators held to the reference: draws, the error budget, and the gradients of every input."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from devices import operator
from support import cell_inputs, error
from torch import Tensor

from fastseq import ops
from fastseq.recurrent import reference

OPTIONS = ["plain", "lengths", "reset", "reverse", "lengths+reset+reverse"]
INPUTS = ["x", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "h0", "c0"]
# T, B, I, H: none a multiple of a vector's length but 16 and 128, a step or a row alone among them.
SHAPES = [(1, 1, 1, 1), (1, 1, 33, 65), (3, 1, 7, 17), (1, 17, 16, 16), (2, 33, 17, 7), (7, 7, 65, 33), (17, 2, 1, 129)]


def draw(*sizes: Any, **settings: Any) -> list[Any]:
    """cell_inputs, for callers who know which of them are there."""
    return list(cell_inputs(*sizes, **settings))


def seed(*key: object) -> None:
    torch.manual_seed(zlib.crc32(repr(key).encode()))


def options(name: str, steps: int, batch: int) -> tuple[Tensor | None, Tensor | None, bool]:
    lengths = torch.randint(0, steps + 1, (batch,)) if "lengths" in name else None
    reset = torch.rand(steps, batch) < 0.3 if "reset" in name else None
    return lengths, reset, "reverse" in name


def options_of(lengths=None, reset=None, mask=None):
    """The operators' optional tensors after the initial states: without states to reset to, and without zoneout."""
    return None, None, lengths, reset, mask, None, None


def forward(inputs, lengths, reset, cell: str, reverse: bool, save=True, states=True, backend="native", mask=None):
    op = operator("scan_forward", backend)
    return op(*inputs, *options_of(lengths, reset, mask), ops.NUMBER[cell], reverse, save, states)


def backward(grads, out, inputs, lengths, reset, cell: str, reverse: bool, backend="native", mask=None):
    y, _, _, states, tape = out
    _, _, w_hh, _, _, w_hr, h0, c0 = inputs
    op = operator("scan_backward", backend)
    given = options_of(lengths, reset, mask)
    return op(*grads, y, states, tape, w_hh, w_hr, h0, c0, *given, ops.NUMBER[cell], reverse)


def whole_gradient(
    grads, out, inputs, lengths, reset, cell: str, reverse: bool, with_dx=True, with_weights=True, mask=None
):
    """Gradients of the inputs, all in one call, as the native kernels give those of a stack of one layer."""
    dy, dh_n, dc_n, dstates = grads
    y, _, _, states, tape = out
    x, *weights, h0, c0 = inputs
    given = [w for w in weights if w is not None]
    dh_n, dc_n, h0, c0, mask = (None if s is None else s.unsqueeze(0) for s in (dh_n, dc_n, h0, c0, mask))
    dx, dh0, dc0, _, _, found = torch.ops.fastseq.layers_backward.native(
        dy, dh_n, dc_n, [] if dstates is None else [dstates], x, given, h0, c0, *options_of(lengths, reset, mask), None,
        [y], [states] if ops.HAS_C[cell] else [], [tape] if ops.TAPE[cell] else [], ops.NUMBER[cell], 1, False,
        reverse, with_dx, with_weights,
    )  # fmt: skip
    own = iter(found or [x.new_empty(0) for _ in given])
    return [dx, *(None if w is None else next(own) for w in weights), dh0, dc0]


def budget_of(peer: Tensor, truth: Tensor, floor_ulps: float = 8) -> float:
    """Twice the reference's error in its dtype, plus some roundings of terms of about 1.

    Gates are sums of such terms, which may cancel: a value is then small, and its error is not.
    """
    if peer.dtype == torch.float64:  # the truth is itself rounded in float64
        floor_ulps = max(floor_ulps, 64)
    scale = max(1.0, float(truth.detach().abs().max()))
    return 2 * error(peer, truth) + floor_ulps * torch.finfo(peer.dtype).eps * scale


def assert_within_budget(ours: Tensor, peer: Tensor, truth: Tensor, what: str, floor_ulps: float = 8) -> None:
    assert ours.dtype == peer.dtype, what
    scale, budget = max(1.0, float(truth.detach().abs().max())), budget_of(peer, truth, floor_ulps)
    found = error(ours, truth)
    assert found <= budget, f"{what}: error {found:.3g} over the budget of {budget:.3g} (largest value {scale:.3g})"


def whole(dtype: torch.dtype, inputs: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]


def step_on_sides(above: Tensor, reverse: bool, met: list[Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """The reference's step of an rnn_relu, with the slope of that side of the kink that ``above`` [T,B,H] names.

    Rounding moves units that lie at the kink across it, where the gradient jumps, and either one is right. What the
    units were goes to ``met``, in the order of the walk.
    """
    sides = iter(above.flip(0) if reverse else above)

    def step(
        cell, gates_x: Tensor, h: Tensor, c: None, w_hh: Tensor, b_hh: Tensor | None, _: None = None, mask=None, *no
    ):
        pre = gates_x + F.linear(h if mask is None else h * mask, w_hh, b_hh)
        met.append(pre.detach())
        line = pre * next(sides)
        return line + (pre.clamp(min=0) - line).detach(), None

    return step


def reference_gradients(inputs, grads, lengths, reset, cell, reverse, dtype, step=reference.step, mask=None):
    """The reference's results and the gradients of all inputs, computed from the same values in another dtype."""
    own: list[Any] = whole(dtype, inputs)
    with mock.patch.object(reference, "step", step):
        given = (*own, *options_of(lengths, reset, mask))
        out = reference.scan(*given, cell=cell, reverse=reverse)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(out, grads, strict=True) if o is not None and g is not None]
    wanted = [t for t in own if t is not None]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))
    return out, [None if t is None else next(found) for t in own]


def walked_gradients(inputs, grads, lengths, reset, cell, reverse, backend="native", mask=None):
    """A backend's results, and the gradients they give; large products in float64: only the walk is judged."""
    out = forward(inputs, lengths, reset, cell, reverse, backend=backend, mask=mask)
    x, w_ih, w_hh, _, _, w_hr, h0, c0 = inputs
    dgates, dhidden, dh0, dc0, *_ = backward(grads, out, inputs, lengths, reset, cell, reverse, backend, mask)
    steps, hidden = x.shape[0], w_hh.shape[0] // ops.GATES[cell]
    live = torch.ones(x.shape[:2], dtype=torch.bool)
    if lengths is not None:
        live = torch.arange(steps)[:, None] < lengths
    assert not dgates[~live].any(), "past the lengths"
    assert dhidden.dim() == 1 or not dhidden[~live].any(), "past the lengths"
    d, y = dgates.double(), out[0].double()
    h_prev = torch.empty_like(y)
    for b in range(y.shape[1]):
        end = steps if lengths is None else int(lengths[b])
        column, first = y[:end, b], h0[b : b + 1].double()
        h_prev[:end, b] = torch.cat((column[1:], first) if reverse else (first, column[:-1])) if end else 0
    if reset is not None:
        h_prev[reset] = 0
    h_prev[~live] = 0
    if mask is not None:
        h_prev = h_prev * mask.double()
    hidden_side = d
    if cell == "gru":
        hidden_side = torch.cat((d[..., : 2 * hidden], dhidden.double()), -1)
    product = torch.einsum("tbg,tbp->gp", hidden_side, h_prev)
    if cell == "gru_reset_before":
        product[2 * hidden :] = torch.einsum("tbg,tbp->gp", d[..., 2 * hidden :], out[4][..., 3 * hidden :].double())
    gradients = [
        d @ w_ih.double(),
        torch.einsum("tbg,tbi->gi", d, x.double()),
        product,
        d.sum((0, 1)) if inputs[3] is not None else None,
        hidden_side.sum((0, 1)) if inputs[4] is not None else None,
        None,
        dh0,
        dc0 if c0 is not None else None,
    ]
    if w_hr is not None:
        m = out[4][..., -hidden:].double() * out[3].double().tanh()
        gradients[5] = torch.einsum("tbp,tbh->ph", dhidden.double(), m)
    return out, gradients


def rounds_h(dtype: torch.dtype, backend: str) -> bool:
    """Whether the products take h rounded to its storage type: tensor cores do, and the CPU's bfloat16 pairs."""
    if backend in ("triton", "emulated"):
        return dtype.itemsize == 2
    return dtype is torch.bfloat16 and torch.ops.fastseq.native_isa("") in ("avx512_bf16", "amx_bf16")


def assert_states_are_steps(ours, inputs, lengths, reset, cell, reverse, mask=None) -> None:
    """Every c_t is, to float32's rounding, one step of the cell from the y and the c before it.

    Where h is rounded for the products, the walk as a whole follows the exact one no more closely than y tells; what it
    keeps in float32 is judged step by step.
    """
    y, states = ours[0], ours[3]
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 = inputs
    steps, batch = x.shape[:2]
    h_prev, c_prev = torch.empty_like(y), torch.empty_like(states)
    live = torch.ones(steps, batch, dtype=torch.bool)
    for b in range(batch):
        end = steps if lengths is None else int(lengths[b])
        live[end:, b] = False
        for before, now, first in ((h_prev, y, h0), (c_prev, states, c0)):
            column, start = now[:end, b], first[b : b + 1].to(now.dtype)
            before[:end, b] = torch.cat((column[1:], start) if reverse else (start, column[:-1])) if end else 0
    if not live.any():
        return
    if reset is not None:
        h_prev[reset], c_prev[reset] = 0, 0

    def one_step(dtype: torch.dtype) -> Tensor:
        weights = [None if w is None else w.to(dtype) for w in (w_ih, w_hh, b_ih, b_hh, w_hr)]
        rows = [t.detach()[live].to(dtype) for t in (x, h_prev, c_prev)]
        own = None if mask is None else mask.expand(steps, batch, -1)[live].to(dtype)
        return reference.scan(rows[0][None], *weights, *rows[1:], *options_of(mask=own), cell=cell)[3][0]

    assert_within_budget(states[live], one_step(torch.float32), one_step(torch.float64), "states, step by step")


def compare(
    inputs, lengths, reset, cell, reverse, given=(True, True, True, False), backend="native", mask=None
) -> None:
    """One draw, forward and backward, within the budget of the reference in the same dtype.

    ``given``: which of y, h_n, c_n and states a gradient comes for. Units of a ReLU that rounding moves across its kink
    must lie at it, as near as y must be; the gradients are then held to those on the side that they are on.
    """
    x = inputs[0]
    steps, batch, state = x.shape[0], x.shape[1], inputs[2].shape[1]
    hidden, lstm = inputs[2].shape[0] // ops.GATES[cell], ops.HAS_C[cell]
    shapes = [(steps, batch, state), (batch, state), (batch, hidden), (steps, batch, hidden)]
    grads: list[Tensor | None] = [
        torch.randn(shape).to(x.dtype) if wanted and (lstm or i < 2) else None
        for i, (shape, wanted) in enumerate(zip(shapes, given, strict=True))
    ]
    if grads[3] is not None:
        grads[3] = grads[3].to(ops.accumulator(x.dtype))
    ours, found = walked_gradients(inputs, grads, lengths, reset, cell, reverse, backend, mask)
    met: list[Tensor] = []

    def judged(dtype: torch.dtype) -> Any:
        step = step_on_sides(ours[0] > 0, reverse, met) if cell == "rnn_relu" else reference.step
        return reference_gradients(inputs, grads, lengths, reset, cell, reverse, dtype, step, mask)

    truth, want = judged(torch.float64)
    exact = torch.stack(met[::-1] if reverse else met) if met else None
    peer, peer_gradients = judged(x.dtype)
    if exact is not None:
        live = torch.arange(steps)[:, None] < (steps if lengths is None else lengths)
        moved = exact[((exact > 0) != (ours[0] > 0)) & live[..., None]].abs()
        assert (moved <= budget_of(peer[0], truth[0])).all(), f"moved across the kink: {float(moved.max()):.3g}"
    for name, o, p, t in zip(["y", "h_n", "c_n", "states"], ours, peer, truth, strict=False):
        if t is None:
            assert o.shape == (0,), name
        elif name == "states" and rounds_h(x.dtype, backend):
            assert o.dtype == p.dtype
            if backend == "native":
                assert_states_are_steps(ours, inputs, lengths, reset, cell, reverse, mask)
            assert_within_budget(o.to(x.dtype), p.to(x.dtype), t, name)  # as layers hand them out
        else:
            assert_within_budget(o, p, t, name)
    # A 16-bit gradient comes from gates and states that were rounded on the tape, which eager float32 never does.
    floor = 8.0 if x.dtype.itemsize > 2 else 16.0
    for name, o, p, t in zip(INPUTS, found, peer_gradients, want, strict=True):
        if o is not None:
            assert_within_budget(o.to(x.dtype), p, t, f"gradient of {name}", floor)

"""Layers of every kind as a loop over single steps, made of torch's own cells and functions: the truth for options that
torch's layers do not have."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from support import flat
from torch import Tensor, nn

import fastseq

LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": fastseq.nn.RNN,
    "relu": lambda *sizes, **more: fastseq.nn.RNN(*sizes, nonlinearity="relu", **more),
    "GRU": fastseq.nn.GRU,
    "reset before": lambda *sizes, **more: fastseq.nn.GRU(*sizes, reset_after=False, **more),
    "LSTM": fastseq.nn.LSTM,
    "coupled": lambda *sizes, **more: fastseq.nn.LSTM(*sizes, input_forget=True, **more),
    "projected": lambda *sizes, **more: fastseq.nn.LSTM(*sizes, proj_size=sizes[1] // 2, **more),
}


def mask_of(*shape: int, dtype: torch.dtype = torch.float64, p: float = 0.4) -> Tensor:
    return F.dropout(torch.ones(shape, dtype=dtype), p, True)


def one_step(layer: nn.RNNBase, x: Tensor, h: Tensor, c: Tensor | None, m: Tensor, w: list[Tensor]) -> list[Tensor]:
    """One step of one layer and direction: torch's own cell on m * h, where torch has such a cell."""
    w_ih, w_hh, b_ih, b_hh, *projection = w
    if isinstance(layer, fastseq.nn.RNN):
        cell = torch.rnn_relu_cell if layer.nonlinearity == "relu" else torch.rnn_tanh_cell
        return [cell(x, m * h, w_ih, w_hh, b_ih, b_hh)]
    if isinstance(layer, fastseq.nn.LSTM) and not layer.input_forget and not projection:
        assert c is not None
        return list(torch.lstm_cell(x, (m * h, c), w_ih, w_hh, b_ih, b_hh))
    of_x = F.linear(x, w_ih, b_ih)
    if isinstance(layer, fastseq.nn.LSTM):
        assert c is not None
        gates = (of_x + F.linear(m * h, w_hh, b_hh)).chunk(3 if layer.input_forget else 4, -1)
        i, g, o = gates[0].sigmoid(), gates[-2].tanh(), gates[-1].sigmoid()
        c = (1 - i if layer.input_forget else gates[1].sigmoid()) * c + i * g
        h = o * c.tanh()
        return [F.linear(h, projection[0]) if projection else h, c]
    x_r, x_z, x_n = of_x.chunk(3, -1)
    w_r, w_z, w_n = w_hh.chunk(3)
    b_r, b_z, b_n = b_hh.chunk(3)
    r, z = (x_r + F.linear(m * h, w_r, b_r)).sigmoid(), (x_z + F.linear(m * h, w_z, b_z)).sigmoid()
    n = r * F.linear(m * h, w_n, b_n) if layer.reset_after else F.linear(r * (m * h), w_n, b_n)  # type: ignore[attr-defined]
    return [z * h + (1 - z) * (x_n + n).tanh()]


def by_loop(
    layer: nn.RNNBase, x: Tensor, hx: Any, lengths: Any, reset: Any, mask: Any, reset_state: Any = None,
    shares: Sequence[Tensor | None] = (None, None), step: Callable[..., list[Tensor]] = one_step,
    norms: Sequence[Tensor] = (), with_c: bool = False,
) -> list[Tensor]:  # fmt: skip
    """y and the last states of a layer, and ``with_c`` every c_t of its last layer, on x [T,B,I], a step at a time.

    ``shares`` of h and c [rows,T,B,..]: what zoneout keeps of the states before. ``step`` makes a step, of the plain
    layer with biases, or of a row's weights and ``norms``.
    """
    states = hx if isinstance(hx, tuple) else (hx,)
    put_in = reset_state if isinstance(reset_state, tuple) else len(states) * (reset_state,)
    directions = 1 + layer.bidirectional
    rows = layer.num_layers * directions
    width, norm_width = len(layer._flat_weights) // rows, len(norms) // rows
    lengths = torch.full((x.shape[1],), x.shape[0]) if lengths is None else lengths
    last: list[list[Tensor]] = []
    all_c: list[Tensor] = []
    for number in range(layer.num_layers):
        beside, all_c = [], []
        for row in range(number * directions, (number + 1) * directions):
            own: Any = layer._flat_weights[row * width : (row + 1) * width]
            more = [norms[row * norm_width : (row + 1) * norm_width]] if norms else []
            now, ys, cs = [s[row] for s in states], [torch.empty(0)] * x.shape[0], [torch.empty(0)] * x.shape[0]
            for t in reversed(range(x.shape[0])) if row % directions else range(x.shape[0]):
                live = (t < lengths)[:, None]
                started = now
                if reset is not None:
                    cleared = [torch.zeros(()).to(x) if s is None else s[row] for s in put_in]
                    started = [torch.where(reset[t][:, None], r, s) for r, s in zip(cleared, now, strict=True)]
                m = torch.ones_like(now[0]) if mask is None else mask[row]
                x_t = torch.where(live, x[t], 0)
                new = step(layer, x_t, started[0], started[1] if len(now) == 2 else None, m, own, *more)
                kept = [None if s is None else s[row, t] for s in shares]
                pairs = zip(new, started, kept, strict=False)
                new = [a if k is None else k * b + (1 - k) * a for a, b, k in pairs]
                ys[t] = torch.where(live, new[0], 0)
                now = [torch.where(live, a, b) for a, b in zip(new, now, strict=True)]
                cs[t] = now[-1]
            beside.append(torch.stack(ys))
            all_c.append(torch.stack(cs))
            last.append(now)
        x = torch.cat(beside, -1)
    return [x, *(torch.stack(s) for s in zip(*last, strict=True)), *([torch.cat(all_c, -1)] if with_c else [])]


def function_of(layer: nn.RNNBase) -> Callable[..., Any]:
    """The layer's function, which takes what the layer does not: state_mask."""

    def call(x: Tensor, hx: Any, **more: Any) -> Any:
        return layer._function(x, hx, batch_first=layer.batch_first, **more)  # type: ignore[operator]

    return call


def drawn(name: str, number: int) -> tuple[Any, Tensor, Any, Any, Any, Tensor]:
    """A layer of float64, and a call: x, hx, lengths, reset, mask."""
    pick = random.Random(f"{name} {number}")
    torch.manual_seed(number)
    inputs, hidden = pick.choice([1, 3, 17]), pick.choice([2, 8, 17, 33])
    steps, batch = pick.choice([1, 2, 5, 9]), pick.choice([1, 3, 7, 18])
    stack = {"num_layers": pick.choice([1, 1, 2, 3]), "bidirectional": pick.random() < 0.5}
    layer = LAYERS[name](inputs, hidden, **stack, dtype=torch.float64)
    rows, outputs = layer.num_layers * (1 + layer.bidirectional), getattr(layer, "proj_size", 0) or hidden
    x = torch.randn(steps, batch, inputs, dtype=torch.float64, requires_grad=True)
    hx: Any = torch.randn(rows, batch, outputs, dtype=torch.float64).tanh().requires_grad_()
    if isinstance(layer, fastseq.nn.LSTM):
        hx = (hx, torch.randn(rows, batch, hidden, dtype=torch.float64, requires_grad=True))
    lengths = torch.randint(0, steps + 1, (batch,)) if pick.random() < 0.5 else None
    reset = torch.rand(steps, batch) < 0.3 if pick.random() < 0.5 else None
    return layer, x, hx, lengths, reset, mask_of(rows, batch, outputs)


def assert_as_near(ours: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice as far from the truth as the peer in its dtype, and 24 roundings of numbers of about 1."""
    truth = truth.detach()
    scale = max(1.0, float(truth.abs().max()))
    limit = 2 * float((peer.double() - truth).abs().max()) + 24 * torch.finfo(peer.dtype).eps * scale
    assert float((ours.double() - truth).abs().max()) <= limit


def assert_gradients_of_many_are_those_of_each(y: Tensor, leaves: list[Tensor]) -> None:
    """``is_grads_batched=True``, for three draws of y's gradient."""
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    found = torch.autograd.grad(y, leaves, grads, retain_graph=True, is_grads_batched=True)
    want = [torch.autograd.grad(y, leaves, d, retain_graph=True) for d in grads]
    for d, each in zip(found, zip(*want, strict=True), strict=True):
        torch.testing.assert_close(d, torch.stack(each))


def gradients(results: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weighed = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in flat(results))
    return torch.autograd.grad(weighed, leaves, materialize_grads=True)

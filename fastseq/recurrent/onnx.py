"""A recurrent layer as ONNX's LSTM, GRU or RNN, one node for both directions.

While ``torch.onnx.export`` traces a model, a call of a stack becomes such nodes by torch's own interface for that,
``torch.onnx.ops.symbolic_multi_out``. :mod:`fastseq.integrations.onnx` builds the same from our operators, in a program
that was exported before. What differs between the two is how an operation is written: :class:`TorchOps` here, and a
class with the same methods there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import ops
from fastseq.recurrent import normed, normed_reference, reference
from fastseq.recurrent.call import RecurrentCall, Result

BLOCKS = {
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
    "lstm": (0, 3, 1, 2),  # i, o, f, c
    "lstm_coupled": (0, 2, 0, 1),  # there is no f: ONNX computes 1 - i and does not read the block
    "gru": (1, 0, 2),  # z, r, h
    "gru_reset_before": (1, 0, 2),
}
"""ONNX's order of the blocks of a weight, as places in torch's order."""

OPERATOR = {name: "LSTM" if name.startswith("lstm") else name[:3].upper() for name in BLOCKS}

Value = Any
"""A torch tensor, or a value of an ONNX graph."""


class Layer(NamedTuple):
    """What one node is made of; ``reverse``: its one direction walks from the last step to the first."""

    cell: str
    hidden: int
    directions: int
    reverse: bool = False

    @property
    def has_c(self) -> bool:
        """Whether it is an LSTM's."""
        return ops.HAS_C[self.cell]

    def attributes(self) -> dict[str, Any]:
        """The node's."""
        direction = "bidirectional" if self.directions == 2 else "reverse" if self.reverse else "forward"
        found: dict[str, Any] = {"hidden_size": self.hidden, "direction": direction}
        if self.cell == "rnn_relu":
            found["activations"] = self.directions * ["Relu"]
        elif self.cell == "lstm_coupled":
            found["input_forget"] = 1
        elif self.cell == "gru":
            found["linear_before_reset"] = 1
        return found


def layer(
    to: Any, kind: Layer, weights: Sequence[Sequence[Value]], x: Value, h0: Value, c0: Value, lengths: Value
) -> tuple[Value, ...]:
    """y ``[T,B,D*P]``, h_n ``[D,B,P]`` and an LSTM's c_n of one layer.

    Args:
        to: builds operations, a :class:`TorchOps`.
        weights: of each direction, in torch's order: w_ih, w_hh, with biases b_ih, b_hh, with a projection w_hr.
        x: ``[T,B,I]``, float32 or float64.
        h0, c0, lengths: ``[D,B,P]``, ``[D,B,H]``, int64 ``[B]``, or None.
    """
    width, cell = len(weights[0]), kind.cell
    w_ih, w_hh = ([own[n] for own in weights] for n in (0, 1))
    w_hr = to.stack([own[-1] for own in weights]) if width % 2 else None
    start = h0
    if w_hr is not None:
        # ONNX has no projection. h = W_hr m with m = o * tanh(c), so the same layer without one has m for its output
        # and W_hh W_hr for its recurrent weight. h0 may be no such product: it comes in at the first step, as input.
        w_hh = [to.product(own[1], own[-1]) for own in weights]
        if h0 is not None:
            x, w_ih, start = *_with_first_step(to, kind, weights, x, h0, lengths), None

    def ordered(*parts: Value) -> Value:
        return to.cat([to.rows(part, n * kind.hidden, kind.hidden) for part in parts for n in BLOCKS[cell]], 0)

    w, r = (to.stack([ordered(m) for m in each]) for each in (w_ih, w_hh))
    b = to.stack([ordered(*own[2:4]) for own in weights]) if width >= 4 else None
    inputs = [x, w, r, b, None if lengths is None else to.int32(lengths), start]
    if kind.has_c:
        inputs.append(c0)
    y, *last = to.node(kind, inputs)
    if w_hr is not None:
        y, last[0] = to.project(y, w_hr), to.project(last[0], w_hr)
    if lengths is not None:  # ONNX does not say what the state of an empty sequence is; here it stands still
        starts = (h0, c0)[: len(last)]
        last = [
            s if given is None else to.where_empty(lengths, given, s) for s, given in zip(last, starts, strict=True)
        ]
    return to.beside(y), *last


def _with_first_step(
    to: Any, kind: Layer, weights: Sequence[Sequence[Value]], x: Value, h0: Value, lengths: Value
) -> tuple[Value, list[Value]]:
    """x with h0 beside it at the step where each direction begins, and each w_ih with w_hh beside it."""
    directions = range(kind.directions)
    starts = [to.at_first_step(x, h0, d, kind.reverse or d == 1, lengths) for d in directions]
    beside = [[own[1] if n == d else to.zeros_like(own[1]) for n in directions] for d, own in enumerate(weights)]
    return to.cat([x, *starts], -1), [to.cat([own[0], *more], 1) for own, more in zip(weights, beside, strict=True)]


class TorchOps:
    """Operations as torch's, in a graph that torch.export makes."""

    cat = staticmethod(torch.cat)
    stack = staticmethod(torch.stack)
    product = staticmethod(torch.matmul)
    zeros_like = staticmethod(torch.zeros_like)

    @staticmethod
    def int32(x: Tensor) -> Tensor:
        return x.to(torch.int32)

    @staticmethod
    def rows(w: Tensor, first: int, count: int) -> Tensor:
        return w.narrow(0, first, count)

    @staticmethod
    def project(m: Tensor, w_hr: Tensor) -> Tensor:
        """``[T,D,B,H]`` or ``[D,B,H]`` by each direction's ``[P,H]``."""
        return m @ w_hr.transpose(1, 2)

    @staticmethod
    def beside(y: Tensor) -> Tensor:
        """``[T,D,B,P]`` as ``[T,B,D*P]``."""
        return y.transpose(1, 2).flatten(2)

    @staticmethod
    def where_empty(lengths: Tensor, given: Tensor, s: Tensor) -> Tensor:
        """``given`` for sequences of length 0, else s; states ``[D,B,H]``."""
        return torch.where((lengths == 0)[:, None].expand_as(s), given, s)

    @staticmethod
    def at_first_step(x: Tensor, h0: Tensor, direction: int, last: bool, lengths: Tensor | None) -> Tensor:
        """``h0[direction]`` at the step where its walk begins, the ``last`` or the first; else 0: ``[T,B,P]``."""
        steps = torch.arange(x.shape[0], device=x.device)[:, None, None]
        begin = 0 if not last else x.shape[0] - 1 if lengths is None else (lengths - 1)[:, None]
        return torch.where(steps == begin, h0[direction], 0)

    @staticmethod
    def node(kind: Layer, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Y, Y_h and an LSTM's Y_c."""
        x = inputs[0]
        assert x is not None
        state = (kind.directions, x.shape[1], kind.hidden)
        shapes = [(x.shape[0], *state), state, *(state,) * kind.has_c]
        return torch.onnx.ops.symbolic_multi_out(
            OPERATOR[kind.cell], inputs, kind.attributes(), dtypes=len(shapes) * [x.dtype], shapes=shapes
        )


def stack(call: RecurrentCall) -> Result:
    """y, h_n, c_n and every c_t of a call, as nodes of ONNX in the graph that is being exported."""
    dtype = call.x.dtype
    wide = torch.promote_types(dtype, torch.float32)  # as the kernels compute, and as runtimes have these operators
    x, h0, c0 = call.x.to(wide), *(None if s is None else s.to(wide) for s in (call.h0, call.c0))
    weights = [[w.to(wide) for w in call.weights_of(n) if w is not None] for n in range(call.rows)]
    kind = Layer(call.cell, call.hidden, call.directions)
    found: list[Sequence[Tensor]] = []
    all_c = None
    for first in range(0, call.rows, call.directions):
        rows = slice(first, first + call.directions)
        if first and call.dropout and call.training:
            x = F.dropout(x, call.dropout, True)
        h, c = (None if s is None else s[rows] for s in (h0, c0))
        plain = call.reset is None and call.state_mask is None and call.norm is None and not any(call.zoneout)
        if plain and not call.want_states:
            x, *last = layer(TorchOps, kind, weights[rows], x, h, c, call.lengths)
        else:
            walks = [_walk(call, first + n, x, h, c, weights[first + n]) for n in range(call.directions)]
            ys, *states = zip(*walks, strict=True)
            x, *last = torch.cat(ys, -1), *(torch.stack(s) for s in states[: 1 + kind.has_c])
            all_c = torch.cat(states[2], -1) if call.want_states else None
        found.append(last)
    h_n, *c_n = (torch.cat(list(parts)).to(dtype) for parts in zip(*found, strict=True))
    return x.to(dtype), h_n, c_n[0] if c_n else None, all_c


def _walk(
    call: RecurrentCall, row: int, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """y, h_n, an LSTM's c_n and every c_t of one layer and direction as ONNX's Scan, which can do at each step what its
    recurrent operators cannot. By torch's operator for it, a prototype: where that fails, so does the export."""
    from torch._higher_order_ops.scan import scan_op

    cell, direction = call.cell, row % call.directions
    w_ih, w_hh, *more = weights
    b_ih, b_hh = more[:2] if call.has_biases else (None, None)
    w_hr = more[-1] if call.projected else None
    mask = None if call.state_mask is None else call.state_mask[row].to(x.dtype)
    of_reset = [None if s is None else s[row].to(x.dtype) for s in (call.reset_h, call.reset_c)]
    of_step: Any = functools.partial(reference.step, cell)
    own: Any = (w_hh, b_hh, w_hr, mask, *of_reset)
    sizes = (w_hh.shape[1], call.hidden)[: 1 + ops.HAS_C[cell]]
    start = [
        x.new_zeros(x.shape[1], size) if s is None else s[direction] for s, size in zip((h0, c0), sizes, strict=False)
    ]
    live = None
    if call.lengths is not None:
        live = (torch.arange(x.shape[0], device=x.device)[:, None] < call.lengths)[:, :, None]
    if call.norm is None:
        gates = F.linear(x, w_ih, b_ih)
    else:
        norms = [w.to(x.dtype) for w in normed.weights_of(call, row)]
        gates, *parameters = normed_reference.sides(x, w_ih, b_ih, b_hh, norms, call.norm)
        of_step, own = functools.partial(normed_reference.step, cell, call.norm), (w_hh, *parameters, mask, *of_reset)
    steps = {"gates": gates, "live": live}
    steps["keep"] = None if call.reset is None else ~call.reset[:, :, None]
    names = [name for name, s in steps.items() if s is not None]
    count = len(start)

    def step(*flat: Tensor) -> list[Tensor]:
        before, at = flat[:count], dict(zip(names, flat[count:], strict=False))
        given = iter(flat[count + len(names) :])
        *used, reset_h, reset_c = [None if w is None else next(given) for w in own]
        kept: Any = before
        if "keep" in at:
            put_in = zip(before, (reset_h, reset_c), strict=False)
            kept = [torch.where(at["keep"], s, 0 if r is None else r) for s, r in put_in]
        # In training each step would have its own shares.
        shares = [p or None for p in call.zoneout]
        h, c = of_step(at["gates"], kept[0], kept[1] if count > 1 else None, *used, *shares)
        after, y = [h] if c is None else [h, c], h
        if "live" in at:
            y = torch.where(at["live"], y, 0)
            after = [torch.where(at["live"], new, old) for new, old in zip(after, before, strict=True)]
        return [*after, y.clone(), *(s.clone() for s in after[1:])]  # no two results may be one tensor

    inputs = [s for s in steps.values() if s is not None]
    inputs = [s.flip(0) for s in inputs] if direction else inputs
    found = scan_op(step, start, inputs, tuple(w for w in own if w is not None))
    last, outputs = found[:count], found[count:]
    y, *all_c = [s.flip(0) for s in outputs] if direction else outputs
    return y, *last, *all_c

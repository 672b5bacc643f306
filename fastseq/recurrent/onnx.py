"""A recurrent layer as ONNX's LSTM, GRU or RNN, one node for both directions.

While ``torch.onnx.export`` traces a model, a call of a stack becomes such nodes by torch's own interface for that,
``torch.onnx.ops.symbolic_multi_out``. :mod:`fastseq.integrations.onnx` builds the same from our operators, in a program
that was exported before. What differs between the two is how an operation is written: :class:`TorchOps` here, and a
class with the same methods there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import ops
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

Value = Any
"""A torch tensor, or a value of an ONNX graph."""


def attributes(cell: str, hidden: int, directions: int, reverse: bool) -> dict[str, Any]:
    """Those of the node of a layer."""
    direction = "bidirectional" if directions == 2 else "reverse" if reverse else "forward"
    found: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if cell == "rnn_relu":
        found["activations"] = directions * ["Relu"]
    elif cell == "lstm_coupled":
        found["input_forget"] = 1
    elif cell == "gru":
        found["linear_before_reset"] = 1
    return found


def layer(
    to: Any, cell: str, weights: Sequence[Sequence[Value]], reverse: bool, x: Value, h0: Value, c0: Value, lengths: Value
) -> tuple[Value, ...]:
    """y ``[T,B,D*P]``, h_n ``[D,B,P]`` and an LSTM's c_n of one layer.

    Args:
        to: builds operations, a :class:`TorchOps`.
        weights: of each direction, in torch's order: w_ih, w_hh, with biases b_ih, b_hh, with a projection w_hr.
        x: ``[T,B,I]``, float32 or float64.
        h0, c0, lengths: ``[D,B,P]``, ``[D,B,H]``, int64 ``[B]``, or None.
    """
    directions, width = len(weights), len(weights[0])
    w_ih, w_hh = ([own[n] for own in weights] for n in (0, 1))
    w_hr = to.stack([own[-1] for own in weights]) if width % 2 else None
    start = h0
    if w_hr is not None:
        # ONNX has no projection. h = W_hr m with m = o * tanh(c), so the same layer without one has m for its output
        # and W_hh W_hr for its recurrent weight. h0 may be no such product: it comes in at the first step, as input.
        w_hh, own_w_hh = [to.product(w, own[-1]) for w, own in zip(w_hh, weights, strict=True)], w_hh
        if h0 is not None:
            last = [direction == 1 or reverse for direction in range(directions)]
            x = to.cat([x, *(to.at_first_step(x, h0, d, last[d], lengths) for d in range(directions))], -1)
            for d in range(directions):
                beside = [own_w_hh[d] if n == d else to.zeros_like(own_w_hh[d]) for n in range(directions)]
                w_ih[d] = to.cat([w_ih[d], *beside], 1)
            start = None
    blocks, gates = BLOCKS[cell], ops.GATES[cell]
    w, r = (to.stack([to.blocks(m, gates, blocks) for m in each]) for each in (w_ih, w_hh))
    b = None
    if width >= 4:
        b = to.stack([to.cat([to.blocks(v, gates, blocks) for v in own[2:4]], 0) for own in weights])
    inputs = [x, w, r, b, None if lengths is None else to.int32(lengths), start]
    if ops.HAS_C[cell]:
        inputs.append(c0)
    y, *last_states = to.node(cell, inputs, directions, reverse)
    if w_hr is not None:
        y, last_states[0] = to.project(y, w_hr), to.project(last_states[0], w_hr)
    if lengths is not None:  # ONNX does not say what the state of an empty sequence is; here it stands still
        last_states = [
            s if given is None else to.where_empty(lengths, given, s)
            for s, given in zip(last_states, (h0, c0), strict=False)
        ]
    return to.beside(y), *last_states


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
    def blocks(w: Tensor, gates: int, order: Sequence[int]) -> Tensor:
        """w's blocks of rows in this order."""
        parts = w.chunk(gates)
        return torch.cat([parts[n] for n in order])

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
        return torch.where((lengths == 0)[:, None], given, s)

    @staticmethod
    def at_first_step(x: Tensor, h0: Tensor, direction: int, last: bool, lengths: Tensor | None) -> Tensor:
        """``h0[direction]`` at the step where its walk begins, the ``last`` or the first; else 0: ``[T,B,P]``."""
        steps = torch.arange(x.shape[0], device=x.device)[:, None, None]
        begin = 0 if not last else x.shape[0] - 1 if lengths is None else (lengths - 1)[:, None]
        return torch.where(steps == begin, h0[direction], 0)

    @staticmethod
    def node(cell: str, inputs: list[Tensor | None], directions: int, reverse: bool) -> Sequence[Tensor]:
        """Y, Y_h and an LSTM's Y_c."""
        x, r = inputs[0], inputs[2]
        assert x is not None
        assert r is not None
        hidden = r.shape[-1]
        state = (directions, x.shape[1], hidden)
        shapes = [(x.shape[0], *state), state, *(state,) * ops.HAS_C[cell]]
        return torch.onnx.ops.symbolic_multi_out(
            OPERATOR[cell], inputs, attributes(cell, hidden, directions, reverse),
            dtypes=len(shapes) * [x.dtype], shapes=shapes,
        )  # fmt: skip


OPERATOR = {name: "LSTM" if name.startswith("lstm") else name[:3].upper() for name in BLOCKS}

def stack(call: RecurrentCall) -> Result:
    """y, h_n, c_n and None of a call, as nodes of ONNX in the graph that is being exported."""
    x, dtype = call.x, call.x.dtype
    if call.reset is not None or call.want_states:
        what = "reset=" if call.reset is not None else "return_all_states=True"
        raise NotImplementedError(f"ONNX's recurrent operators have no {what}")
    wide = torch.promote_types(dtype, torch.float32)  # as the kernels compute, and as runtimes have these operators
    x, h0, c0 = (None if s is None else s.to(wide) for s in (x, call.h0, call.c0))
    weights = [[w.to(wide) for w in call.weights_of(n) if w is not None] for n in range(call.rows)]
    found: list[Sequence[Tensor]] = []
    for first in range(0, call.rows, call.directions):
        rows = slice(first, first + call.directions)
        if first and call.dropout and call.training:
            x = F.dropout(x, call.dropout, True)
        h, c = (None if s is None else s[rows] for s in (h0, c0))
        x, *states = layer(TorchOps, call.cell, weights[rows], False, x, h, c, call.lengths)
        found.append(states)
    h_n, *c_n = (torch.cat(list(parts)).to(dtype) for parts in zip(*found, strict=True))
    return x.to(dtype), h_n, c_n[0] if c_n else None, None

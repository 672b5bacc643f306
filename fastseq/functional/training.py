"""Training of one recurrent layer on the CPU: one native call forward and one back, with nothing between them.

A step of a small model is all call overhead, in training too. As in :mod:`fastseq.functional.inference`, the answer is
None whenever a question remains, and the caller takes the general way, which checks everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import autograd
from fastseq.functional import direct


class Layer(torch.autograd.Function):
    """A layer of one direction without a projection, or a cell; input, states and results as torch.nn lays them out.

    batch_first: None of a cell. Results: y; h_n, if not of a cell; an LSTM's c_n. None, all in all, where the native
    call declines.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor | None, c0: Tensor | None, cell: str, batch_first: bool | None, *weights: Tensor
    ) -> Any:
        w_ih, w_hh, *biases = weights
        b_ih, b_hh = biases or (None, None)
        made = direct.layer_forward(x, h0, c0, cell, batch_first, w_ih, w_hh, b_ih, b_hh)  # type: ignore[misc]
        if made is None:
            return None
        *results, states, tape = made
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, made[0], states, tape, *weights)
        ctx.cell, ctx.batch_first = cell, batch_first
        return tuple(t for t in results if t is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, h0, c0, y, states, tape, *weights = ctx.saved_tensors
        need, cell, batch_first = ctx.needs_input_grad, ctx.cell, ctx.batch_first
        dy, dh_n = grads[0], None if batch_first is None else grads[1]
        dc_n = grads[-1] if cell == "lstm" else None
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if plain and not any(d is not None and autograd.is_batched(d) for d in grads):
            found = direct.layer_gradient(  # type: ignore[misc]
                need, dy, dh_n, dc_n, x, h0, c0, y, states, tape, cell, batch_first, weights[0], weights[1]
            )
            if found is not None:
                return found
        layout = Layout(batch_first, x.dim())
        b_ih, b_hh = weights[2:] or (None, None)
        dx, dw_ih, dw_hh, db_ih, db_hh, _, dh0, dc0 = autograd.gradient(
            (layout.steps_in(dy), layout.state_in(dh_n), layout.state_in(dc_n), None),
            (layout.steps_in(x), *weights[:2], b_ih, b_hh, None, layout.state_in(h0), layout.state_in(c0)),
            None, None, layout.steps_in(y), states, tape, cell, False, "native",
            (need[0], *need[5:7], *(need[7:] or (False, False)), False, *need[1:3]),
        )  # fmt: skip
        found = layout.steps_out(dx), layout.state_out(dh0), layout.state_out(dc0)
        return (*found, None, None, *(dw_ih, dw_hh, db_ih, db_hh)[: len(weights)])


class Layout(NamedTuple):
    """How the caller lays out what the scan has as x and y ``[T,B,n]`` and states ``[B,n]``; None stays None."""

    batch_first: bool | None  # None: a cell
    rank: int  # of x

    def steps_in(self, x: Any) -> Any:
        """x or y, as the scan has it."""
        if x is None:
            return None
        if self.batch_first is None:
            return x[None, None] if self.rank == 1 else x.unsqueeze(0)
        return x.unsqueeze(1) if self.rank == 2 else x.transpose(0, 1) if self.batch_first else x

    def steps_out(self, x: Any) -> Any:
        """The way back."""
        if x is None:
            return None
        if self.batch_first is None:
            return x[0, 0] if self.rank == 1 else x[0]
        return x.squeeze(1) if self.rank == 2 else x.transpose(0, 1) if self.batch_first else x

    def state_in(self, s: Any) -> Any:
        """A state, as the scan has it."""
        return s if s is None or self.rank == 2 else s.unsqueeze(0) if self.rank == 1 else s[0]

    def state_out(self, s: Any) -> Any:
        """The way back."""
        return s if s is None or self.rank == 2 else s[0] if self.rank == 1 else s.unsqueeze(0)


_TENSORS = (Tensor, torch.nn.Parameter)
_apply = autograd.recorder(Layer)


def layer(
    x: Any,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    batch_first: bool | None,
) -> tuple[Tensor, ...] | None:
    """y, h_n and an LSTM's c_n of a layer of one direction, to be differentiated; with ``batch_first`` None the new h
    and c of a cell. None: take the general way. For a caller that has made sure of eager mode and the native scan."""
    if direct.layer_forward is None or not direct.undisturbed():  # type: ignore[misc]
        return None
    if type(x) not in _TENSORS or len(weights) not in (2, 4):
        return None
    if not autograd.wants_gradient((x, *weights, h0, c0)):
        return None
    return _apply(x, h0, c0, cell, batch_first, *weights)

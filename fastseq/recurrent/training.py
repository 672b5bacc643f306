"""Training of one recurrent layer on the CPU: one native call forward and one back, with nothing between them.

A step of a small model is mostly call overhead, in training too. The answer is None whenever a question remains, and
the caller takes the general path, which checks everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import autograd, direct


class Layer(torch.autograd.Function):
    """A layer of one direction without a projection, or a cell; input, states and results laid out as :class:`Layout`
    says.

    Results: y; h_n, if not of a cell; an LSTM's c_n. None, all in all, where the native call declines.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        cell: str,
        layout: str,
        reverse: bool,
        *weights: Tensor,
    ) -> Any:
        w_ih, w_hh, *biases = weights
        b_ih, b_hh = biases or (None, None)
        made = direct.layer_forward(x, h0, c0, cell, layout, reverse, w_ih, w_hh, b_ih, b_hh)  # type: ignore[misc]
        if made is None:
            return None
        *results, states, tape = made
        ctx.set_materialize_grads(False)
        y = made[0]
        one_step = layout == "cell" or y.shape[1 if layout == "batch_first" and y.dim() == 3 else 0] == 1
        need = ctx.needs_input_grad
        r_x, r_w_ih, r_w_hh, _, _, _, r_h0, r_c0, r_y = autograd.values_read(
            cell, one_step, need[0], need[6], need[7], need[1]
        )
        y = y if r_y else y.detach()  # else the result would hold its own graph
        read = (r_x, r_h0, r_c0, r_y, True, True, r_w_ih, r_w_hh, False, False)
        autograd.save(ctx, (x, h0, c0, y, states, tape, *weights), read)
        ctx.cell, ctx.layout, ctx.reverse = cell, layout, reverse
        return tuple(t for t in results if t is not None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        x, h0, c0, y, states, tape, *weights = autograd.saved(ctx)
        need, cell, layout, reverse = ctx.needs_input_grad, ctx.cell, ctx.layout, ctx.reverse
        dy, dh_n = grads[0], None if layout == "cell" else grads[1]
        dc_n = grads[-1] if cell == "lstm" else None
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if plain and not any(d is not None and autograd.is_batched(d) for d in grads):
            found = direct.layer_gradient(  # type: ignore[misc]
                need, dy, dh_n, dc_n, x, h0, c0, y, states, tape, cell, layout, reverse, *weights[:2]
            )
            if found is not None:
                return found
        of = Layout(layout, x.dim())
        b_ih, b_hh = weights[2:] or (None, None)
        dx, dw_ih, dw_hh, db_ih, db_hh, _, dh0, dc0 = autograd.gradient(
            (of.steps_in(dy), of.state_in(dh_n), of.state_in(dc_n), None),
            (of.steps_in(x), *weights[:2], b_ih, b_hh, None, of.state_in(h0), of.state_in(c0)),
            None, None, of.steps_in(y), states, tape, cell, reverse, "native",
            (need[0], *need[6:8], *(need[8:] or (False, False)), False, *need[1:3]),
        )  # fmt: skip
        found = of.steps_out(dx), of.state_out(dh0), of.state_out(dc0)
        return (*found, None, None, None, *(dw_ih, dw_hh, db_ih, db_hh)[: len(weights)])


class Layout(NamedTuple):
    """How the caller lays out what the scan has as x and y ``[T,B,n]`` and states ``[B,n]``; None stays None.

    ``scan``: so. ``layer``: x as well, or ``[T,n]`` of one sequence, states ``[1,B,n]`` or ``[1,n]``; ``batch_first``:
    but x ``[B,T,n]``. ``cell``: ``[B,n]`` or ``[n]``, states alike.
    """

    name: str
    rank: int  # of x

    def steps_in(self, x: Any) -> Any:
        """x or y, as the scan has it."""
        if x is None or self.name == "scan":
            return x
        if self.name == "cell":
            return x[None, None] if self.rank == 1 else x.unsqueeze(0)
        return x.unsqueeze(1) if self.rank == 2 else x.transpose(0, 1) if self.name == "batch_first" else x

    def steps_out(self, x: Any) -> Any:
        """The way back."""
        if x is None or self.name == "scan":
            return x
        if self.name == "cell":
            return x[0, 0] if self.rank == 1 else x[0]
        return x.squeeze(1) if self.rank == 2 else x.transpose(0, 1) if self.name == "batch_first" else x

    def state_in(self, s: Any) -> Any:
        """A state, as the scan has it."""
        if s is None or self.name == "scan" or self.rank == 2:
            return s
        return s.unsqueeze(0) if self.rank == 1 else s[0]

    def state_out(self, s: Any) -> Any:
        """The way back."""
        if s is None or self.name == "scan" or self.rank == 2:
            return s
        return s[0] if self.rank == 1 else s.unsqueeze(0)


_TENSORS = (Tensor, torch.nn.Parameter)
_apply = autograd.recorder(Layer)


def layer(
    x: Any,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    layout: str,
    reverse: bool = False,
) -> tuple[Tensor, ...] | None:
    """y, h_n and an LSTM's c_n of a layer of one direction, to be differentiated; of a cell the new h and c. None: take
    the general way. For a caller that has made sure of eager mode, of gradients being on, and of the native scan."""
    if direct.layer_forward is None or not direct.undisturbed():  # type: ignore[misc]
        return None
    if type(x) not in _TENSORS or len(weights) not in (2, 4):
        return None
    if not autograd.wants_gradient((x, *weights, h0, c0)):
        return None
    return _apply(x, h0, c0, cell, layout, reverse, *weights)

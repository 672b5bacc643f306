"""Recurrent layers with layer normalisation in eager torch: one layer, one direction, all time steps.

Forms: ``layer`` (Ba et al. 2016, https://arxiv.org/abs/1607.06450) and, of a GRU, ``joint`` (Hafner et al. 2020,
https://arxiv.org/abs/2010.02193).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.recurrent.reference import kept, loop

EPS = 1e-5
"""What is added to a variance, as ``torch.nn.LayerNorm`` does."""


def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    norms: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    state_mask: Tensor | None = None,
    *more: Tensor | None,
    cell: str,
    form: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Walk a cell over time; tensors and results as :func:`fastseq.recurrent.reference.scan`.

    Args:
        norms: ``layer``: the gains of W_ih x and of W_hh h, ``[G*H]`` each, and of an LSTM gain and shift of c, ``[H]``
            each; ``joint``: gain and shift of the sum, ``[3H]`` each.
        more: reset_h, reset_c, zoneout_h and zoneout_c, or nothing.
        cell: ``rnn_tanh``, ``rnn_relu``, ``lstm``, ``lstm_coupled`` or ``gru``.
        form: ``layer`` or ``joint``.
    """
    dtype = x.dtype
    compute = torch.promote_types(dtype, torch.float32)
    if lengths is not None:  # what lies in the padding has no influence, not even a NaN
        x = x.masked_fill((torch.arange(x.shape[0], device=x.device)[:, None] >= lengths)[:, :, None], 0)
    wide: Any = [None if w is None else w.to(compute) for w in (x, w_ih, b_ih, b_hh, *norms)]
    gates_x, *own = sides(wide[0], wide[1], wide[2], wide[3], wide[4:], form)
    given: Any = (w_hh, *own, h0, c0, lengths, reset, state_mask, *more)
    y, h_n, c_n, states = walk(gates_x, *given, cell=cell, form=form, reverse=reverse)
    return y.to(dtype), h_n.to(dtype), None if c_n is None else c_n.to(dtype), states


def sides(
    x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, norms: Sequence[Tensor], form: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The input's share of the gates ``[T, B, G*H]``, and what the recurrence is normalised with: gain and shift
    ``[G*H]`` and of an LSTM's c ``[H]``. What is added behind a normalisation is its shift."""
    if form == "joint":
        gain, shift = norms
        return F.linear(x, w_ih, None if b_ih is None or b_hh is None else b_ih + b_hh), gain, shift, None, None
    gates_x = F.linear(x, w_ih)
    gates_x = F.layer_norm(gates_x, gates_x.shape[-1:], norms[0], b_ih, EPS)
    gain_c, shift_c = norms[2:] if len(norms) == 4 else (None, None)
    return gates_x, norms[1], b_hh, gain_c, shift_c


def walk(
    gates_x: Tensor,
    w_hh: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    gain_c: Tensor | None,
    shift_c: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    state_mask: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    *,
    cell: str,
    form: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The recurrence from the input's share of the gates (see :func:`sides`); results as :func:`scan`'s, likewise
    computed in float32 of 16-bit arguments and rounded once, at the end."""
    dtype, (steps, batch), hidden = gates_x.dtype, gates_x.shape[:2], w_hh.shape[1]
    compute = torch.promote_types(dtype, torch.float32)
    given = (gates_x, w_hh, gain, shift, gain_c, shift_c, h0, c0, state_mask)
    wide: Any = [None if t is None else t.to(compute) for t in given]
    gates_x, w_hh, gain, shift, gain_c, shift_c, h0, c0, state_mask = wide
    h = gates_x.new_zeros(batch, hidden) if h0 is None else h0
    c = gates_x.new_zeros(batch, hidden) if c0 is None and cell.startswith("lstm") else c0
    put_in = [None if s is None else s.to(compute) for s in (reset_h, reset_c)]

    def advance(t: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kept_h, kept_c = (None if s is None else s[t].to(compute) for s in (zoneout_h, zoneout_c))
        return step(cell, form, gates_x[t], h, c, w_hh, gain, shift, gain_c, shift_c, state_mask, kept_h, kept_c)

    return loop(advance, steps, h, c, put_in, lengths, reset, reverse, dtype)


def step(
    cell: str,
    form: str,
    gates_x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_hh: Tensor,
    gain: Tensor,
    shift: Tensor | None,
    gain_c: Tensor | None = None,
    shift_c: Tensor | None = None,
    state_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step from ``gates_x [B, G*H]``; returns the new ``h`` and ``c``, of which zoneout's shares are the old
    ones."""
    new = _step(cell, form, gates_x, h, c, w_hh, gain, shift, gain_c, shift_c, state_mask)
    return kept(h, new[0], zoneout_h), None if c is None or new[1] is None else kept(c, new[1], zoneout_c)


def _step(
    cell: str, form: str, gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, gain: Tensor,
    shift: Tensor | None, gain_c: Tensor | None, shift_c: Tensor | None, state_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    product = F.linear(h if state_mask is None else h * state_mask, w_hh)  # of what the product reads of h
    if form == "joint":
        r, z, n = F.layer_norm(gates_x + product, product.shape[-1:], gain, shift, EPS).chunk(3, -1)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * torch.tanh(torch.sigmoid(r) * n), None
    hidden_side = F.layer_norm(product, product.shape[-1:], gain, shift, EPS)
    if cell == "gru":
        (x_r, x_z, x_n), (h_r, h_z, h_n) = gates_x.chunk(3, -1), hidden_side.chunk(3, -1)
        z = torch.sigmoid(x_z + h_z)
        return z * h + (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n), None
    pre = gates_x + hidden_side
    if cell in ("rnn_tanh", "rnn_relu"):
        return (torch.tanh(pre) if cell == "rnn_tanh" else torch.relu(pre)), None
    if cell not in ("lstm", "lstm_coupled"):
        raise ValueError(f"no normalised form of cell {cell!r}")
    assert c is not None
    gates = pre.chunk(4 if cell == "lstm" else 3, -1)
    i = torch.sigmoid(gates[0])
    f = torch.sigmoid(gates[1]) if cell == "lstm" else 1 - i
    c = f * c + i * torch.tanh(gates[-2])  # carried on as it is, not normalised
    return torch.sigmoid(gates[-1]) * torch.tanh(F.layer_norm(c, c.shape[-1:], gain_c, shift_c, EPS)), c

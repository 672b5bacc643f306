"""The recurrent scan in eager torch: one layer, one direction, all time steps; and a stack of such."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def scan(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    state_mask: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    *,
    cell: str,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Walk a cell over time.

    Args:
        x: input ``[T, B, I]``; any float dtype. 16-bit inputs are computed in float32 and rounded once, at the end.
        w_ih: ``[G*H, I]``, blocks in torch's order (LSTM i,f,g,o, coupled i,g,o; GRU r,z,n).
        w_hh: ``[G*H, P]``.
        b_ih, b_hh: ``[G*H]`` or None.
        w_hr: projection ``[P, H]`` (LSTM only) or None, and then P = H.
        h0: ``[B, P]``, or None for zeros.
        c0: ``[B, H]`` for an LSTM, or None for zeros.
        reset_h, reset_c: ``[B, P]`` and ``[B, H]``, or None for zeros: what takes the state's place at a reset.
        lengths: int ``[B]`` or None: from step ``lengths[b]`` on, y is 0 and the state stands still; a reverse scan
            of row b starts at ``lengths[b] - 1``.
        reset: bool ``[T, B]`` or None: where set, the state is replaced before that step.
        state_mask: ``[B, P]`` or None: what the products read of h_{t-1} is multiplied by it (Gal and Ghahramani 2016,
            https://arxiv.org/abs/1512.05287); what a GRU carries on of h_{t-1} is not, nor is c.
        zoneout_h, zoneout_c: ``[T, B, P]`` and ``[T, B, H]``, or None: the share of h_{t-1} and c_{t-1} that h_t and
            c_t keep (Krueger et al. 2017, https://arxiv.org/abs/1606.01305).
        cell: ``rnn_tanh``, ``rnn_relu``, ``lstm``, ``lstm_coupled`` (f = 1 - i, as Greff et al. 2017,
            https://arxiv.org/abs/1503.04069), ``gru`` (reset gate after the product, as torch and cuDNN) or
            ``gru_reset_before`` (before it, as Cho et al. 2014, https://arxiv.org/abs/1406.1078).
        reverse: walk from the last step to the first.

    Returns:
        ``y [T, B, P]``, ``h_n [B, P]``, and for an LSTM ``c_n [B, H]`` and every c_t as ``states [T, B, H]`` in the
        dtype computed in; else None and None.
    """
    dtype = x.dtype
    compute = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

    def widen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(compute)

    w_ih, w_hh, b_ih, b_hh, w_hr = (widen(w) for w in (w_ih, w_hh, b_ih, b_hh, w_hr))  # type: ignore[assignment]
    steps, batch = x.shape[:2]
    h, c, state_mask = widen(h0), widen(c0), widen(state_mask)
    shares = widen(zoneout_h), widen(zoneout_c)
    if h is None:
        h = w_hh.new_zeros(batch, w_hh.shape[1])
    if c is None and cell.startswith("lstm"):
        c = w_hh.new_zeros(batch, w_hh.shape[1] if w_hr is None else w_hr.shape[1])
    if lengths is not None:  # what lies in the padding has no influence, not even a NaN
        x = x.masked_fill((torch.arange(steps, device=x.device)[:, None] >= lengths)[:, :, None], 0)
    gates_x = F.linear(x.to(compute), w_ih, b_ih)

    def advance(t: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        kept_h, kept_c = (None if s is None else s[t] for s in shares)
        return step(cell, gates_x[t], h, c, w_hh, b_hh, w_hr, state_mask, kept_h, kept_c)

    after_reset = widen(reset_h), widen(reset_c)
    return loop(advance, steps, h, c, after_reset, lengths, reset, reverse, dtype)


def loop(
    advance: Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    steps: int,
    h: Tensor,
    c: Tensor | None,
    after_reset: Sequence[Tensor | None],
    lengths: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The results of :func:`scan`, y and last states in ``dtype``, from ``advance``, which makes the states of step t
    from those before. ``after_reset``: h and c, or None for zeros."""
    zero = torch.zeros((), dtype=h.dtype, device=h.device)
    put_in = [zero if s is None else s for s in after_reset]
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        h_prev, c_prev = h, c
        if reset is not None:
            keep = ~reset[t][:, None]
            h_prev = torch.where(keep, h_prev, put_in[0])
            c_prev = None if c_prev is None else torch.where(keep, c_prev, put_in[1])
        h_new, c_new = advance(t, h_prev, c_prev)
        y = h_new
        if lengths is not None:
            live = (t < lengths)[:, None]
            y = torch.where(live, h_new, 0)
            h_new = torch.where(live, h_new, h)
            c_new = None if c_new is None or c is None else torch.where(live, c_new, c)
        h, c = h_new, c_new
        outputs.append(y)
        if c is not None:
            states.append(c)
    if reverse:
        outputs.reverse()
        states.reverse()
    y = torch.stack(outputs).to(dtype)
    if c is None:
        return y, h.to(dtype), None, None
    return y, h.to(dtype), c.to(dtype), torch.stack(states)


def step(
    cell: str,
    gates_x: Tensor,
    h: Tensor,
    c: Tensor | None,
    w_hh: Tensor,
    b_hh: Tensor | None,
    w_hr: Tensor | None = None,
    state_mask: Tensor | None = None,
    zoneout_h: Tensor | float | None = None,
    zoneout_c: Tensor | float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One time step from the input's share of the gates, ``gates_x [B, G*H]``; returns the new ``h`` and ``c``, of
    which zoneout's shares are the old ones. The new h is of the c that keeps nothing."""
    h_new, c_new = _step(cell, gates_x, h, c, w_hh, b_hh, w_hr, state_mask)
    return kept(h, h_new, zoneout_h), None if c is None or c_new is None else kept(c, c_new, zoneout_c)


def kept(old: Tensor, new: Tensor, share: Tensor | float | None) -> Tensor:
    """A state after zoneout: the new one, with a share of the old."""
    return new if share is None else share * old + (1 - share) * new


def _step(
    cell: str, gates_x: Tensor, h: Tensor, c: Tensor | None, w_hh: Tensor, b_hh: Tensor | None, w_hr: Tensor | None,
    state_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    read = h if state_mask is None else h * state_mask  # by the products
    if cell in ("rnn_tanh", "rnn_relu"):
        pre = gates_x + F.linear(read, w_hh, b_hh)
        return (torch.tanh(pre) if cell == "rnn_tanh" else torch.relu(pre)), None

    if cell in ("lstm", "lstm_coupled"):
        assert c is not None
        pre = gates_x + F.linear(read, w_hh, b_hh)
        if cell == "lstm":
            i, f, g, o = pre.chunk(4, -1)
            i, f = torch.sigmoid(i), torch.sigmoid(f)
        else:
            i, g, o = pre.chunk(3, -1)
            i = torch.sigmoid(i)
            f = 1 - i
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (h if w_hr is None else F.linear(h, w_hr)), c

    x_r, x_z, x_n = gates_x.chunk(3, -1)
    if cell == "gru":
        h_r, h_z, h_n = F.linear(read, w_hh, b_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
    elif cell == "gru_reset_before":
        hidden = h.shape[-1]
        b_rz, b_n = (None, None) if b_hh is None else (b_hh[: 2 * hidden], b_hh[2 * hidden :])
        h_r, h_z = F.linear(read, w_hh[: 2 * hidden], b_rz).chunk(2, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + F.linear(r * read, w_hh[2 * hidden :], b_n))
    else:
        raise ValueError(f"unknown cell {cell!r}")
    return z * h + (1 - z) * n, None


def options_of(options: Sequence[Tensor | None], row: int) -> list[Tensor | None]:
    """Of a stack's options those of one layer and direction."""
    return [*options[:2], *(None if s is None else s[row] for s in options[2:])]


def layers(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    weights: Sequence[Tensor],
    options: Sequence[Tensor | None],
    cell: str,
    num_layers: int,
    bidirectional: bool,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """y, h_n; an LSTM's c_n and every c_t of the last layer's directions. Weights are flat, in torch's order; states
    have layers and directions in rows; ``options``: lengths and reset, then state_mask and zoneout's shares, which have
    such rows too; ``reverse``: a lone direction walks from the last step to the first."""
    directions = 2 if bidirectional else 1
    width = len(weights) // (num_layers * directions)
    h_n, c_n, states = list[Tensor](), list[Tensor](), list[Tensor]()
    for layer in range(num_layers):
        outputs, states = [], []
        for direction in range(directions):
            row = layer * directions + direction
            w_ih, w_hh, *more = weights[row * width : (row + 1) * width]
            b_ih, b_hh = more[:2] if width >= 4 else (None, None)
            states_in = (None if s is None else s[row] for s in (h0, c0, reset_h, reset_c))
            y, h, c, all_c = scan(
                x, w_ih, w_hh, b_ih, b_hh, more[-1] if width % 2 else None, *states_in, *options_of(options, row),
                cell=cell, reverse=reverse or direction == 1,
            )  # fmt: skip
            outputs.append(y)
            h_n.append(h)
            if c is not None and all_c is not None:
                c_n.append(c)
                states.append(all_c)
        x = torch.cat(outputs, -1)
    return (x, torch.stack(h_n), torch.stack(c_n), *states) if c_n else (x, torch.stack(h_n))

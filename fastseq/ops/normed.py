"""Fake kernels of a recurrence with layer normalisation, for ``fastseq.ops``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.recurrent.cells import CELLS


def fake_normed_forward(
    gates_x, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset, state_mask, cell, joint, reverse, save, states
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of ``schemas.NORMED_FORWARD``."""
    steps, batch, hidden, kind = gates_x.shape[0], gates_x.shape[1], w_hh.shape[1], CELLS[cell]
    wide = torch.promote_types(gates_x.dtype, torch.float32)
    blocks = kind.gates + (0 if kind.name.startswith("rnn") else kind.gates)

    def made(wanted: bool, *shape: Any, dtype: torch.dtype = gates_x.dtype) -> Tensor:
        return gates_x.new_empty(shape if wanted else 0, dtype=dtype)

    return (
        made(True, steps, batch, hidden),
        made(True, batch, hidden),
        made(kind.has_c, batch, hidden),
        made(kind.has_c and (save or states), steps, batch, hidden, dtype=wide),
        made(save, steps, batch, blocks * hidden),
        made(save, steps, batch, 3 if kind.has_c else 1, dtype=wide),
    )


def fake_normed_backward(
    dy, dh_n, dc_n, dstates, y, states, tape, stats, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset,
    state_mask, cell, joint, reverse,
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of ``schemas.NORMED_BACKWARD``."""
    gates = (y.shape[0], y.shape[1], w_hh.shape[0])
    given = (gain, shift, gain_c, shift_c, h0, c0)
    return (
        y.new_empty(0 if joint else gates),
        y.new_empty(gates),
        *(y.new_empty(0 if t is None else t.shape) for t in given),
    )

"""Fake kernels of a stack of recurrent layers in one call, for ``fastseq.ops``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.recurrent.cells import CELLS


def fake_layers_forward(
    x, weights, h0, c0, reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c, cell, num_layers,
    bidirectional, reverse, save, states,
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of ``schemas.LAYERS_FORWARD``."""
    steps, batch, outputs = x.shape[0], x.shape[1], weights[1].shape[1]
    kind, directions = CELLS[cell], 2 if bidirectional else 1
    hidden, rows, lstm = weights[1].shape[0] // kind.gates, num_layers * directions, kind.has_c
    wide = torch.promote_types(x.dtype, torch.float32)

    def y() -> Tensor:
        return x.new_empty(steps, batch, directions * outputs)

    return (
        y(),
        x.new_empty(rows, batch, outputs),
        x.new_empty((rows, batch, hidden) if lstm else 0),
        [y() for _ in range(num_layers - 1 if save else 0)],
        [x.new_empty(steps, batch, hidden, dtype=wide) for _ in range(lstm * (rows * save or directions * states))],
        [x.new_empty(steps, batch, kind.tape * hidden) for _ in range(rows if save and kind.tape else 0)],
    )


def fake_layers_backward(
    dy, dh_n, dc_n, dstates, x, weights, h0, c0, reset_h, reset_c, lengths, reset, state_mask, zoneout_h, zoneout_c,
    starts, ys, states, tapes, cell, num_layers, bidirectional, reverse, with_dx, with_weights,
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of ``schemas.LAYERS_BACKWARD``."""
    return (
        x.new_empty(x.shape if with_dx else 0),
        *(x.new_empty(0 if state is None else state.shape) for state in (h0, c0, reset_h, reset_c)),
        [x.new_empty(w.shape) for w in weights] if with_weights else [],
    )

"""The schemas of a stack of recurrent layers in one call.

Above the scan, and made of it. On CUDA what is independent runs side by side: layers in a wavefront over windows of
time, both directions at once, and in backward the gradients of the weights beside the walks. Letters as in
:mod:`fastseq.ops`; L layers, D directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.recurrent.cells import CELLS

# x [T,B,I], T, B and H above 0; weights flat, in torch's order (with w_hr on the CPU alone); h0 [L*D,B,P] and
# c0 [L*D,B,H], or None for zeros; lengths int64 [B], reset bool [T,B]; reverse: a lone direction walks from the last
# step to the first, on the CPU alone
# -> y [T,B,D*P], h_n [L*D,B,P], c_n [L*D,B,H] (empty unless LSTM); with save: the outputs of the layers below the
#    last; a layer and direction at a time, an LSTM's states and the tapes of a cell that has one, as SCAN_FORWARD has
#    them. With states alone: the last layer's states.
LAYERS_FORWARD = (
    "(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int cell, int num_layers, "
    "bool bidirectional, bool reverse, bool save, bool states) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor[] ys, Tensor[] states, Tensor[] tapes)"
)

# dstates: of the last layer's directions, or none; on CUDA x is 0 past the lengths, and starts int64 [1,B,1] tells
# where the reverse direction begins, with lengths; ys: of all layers; states and tapes: as the forward pass gave them
# -> dx, dh0, dc0 (each empty where unwanted or absent), the gradients of weights (none unless with_weights)
LAYERS_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor[] dstates, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
    "Tensor? lengths, Tensor? reset, Tensor? starts, Tensor[] ys, Tensor[] states, Tensor[] tapes, int cell, "
    "int num_layers, bool bidirectional, bool reverse, bool with_dx, bool with_weights) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)

NATIVE_SCAN_SCHEDULE = (
    "(bool backward, int steps, int layers, int directions, int beside, bool with_dx, bool with_weights, "
    "float products) -> str"
)
"""What of a stack runs beside what, where a device holds so many walks at once and products take so much of a walk's
time: a line with windows, walkers, lanes and slots; then a piece of work a line: its name, layer, direction, window,
lane, and the places of those it waits for."""

NATIVE_SCAN_WINDOWS = "(int windows, int walkers) -> int"
"""For tests and measurements: fixes the windows of time and the lanes that walk (0: as would be chosen)."""


def fake_layers_forward(
    x, weights, h0, c0, lengths, reset, cell, num_layers, bidirectional, reverse, save, states
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of :data:`LAYERS_FORWARD`."""
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
    dy, dh_n, dc_n, dstates, x, weights, h0, c0, lengths, reset, starts, ys, states, tapes, cell, num_layers,
    bidirectional, reverse, with_dx, with_weights,
) -> tuple[Any, ...]:  # fmt: skip
    """Shapes of :data:`LAYERS_BACKWARD`."""
    absent = x.new_empty(0)
    return (
        x.new_empty(x.shape if with_dx else 0),
        absent if h0 is None else x.new_empty(h0.shape),
        x.new_empty(0) if c0 is None else x.new_empty(c0.shape),
        [x.new_empty(w.shape) for w in weights] if with_weights else [],
    )

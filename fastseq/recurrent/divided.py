"""Which plain calls on the CPU go to the native kernels, where measurements send some of them elsewhere.

Nothing is checked before: what is odd about a call is left to the general path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import backend
from fastseq.calibration.calls import ScanShape
from fastseq.recurrent.call import RecurrentCall, shape_of
from fastseq.recurrent.cells import GATES


def takes_layers(
    x: Any, weights: Callable[[], Sequence[Tensor]], cell: str, layout: str, num_layers: int, bidirectional: bool
) -> bool:
    """Whether a layer's or cell's call without ``lengths`` and ``reset`` does; arguments as of
    ``fastseq.recurrent.stack.in_one_call``, the weights when they are asked for."""
    if not backend.divided("scan") or not isinstance(x, Tensor) or not 1 <= x.dim() <= 3:
        return False
    own = list(weights())
    training = torch.is_grad_enabled() and (x.requires_grad or own[0].requires_grad)

    def shape() -> ScanShape:
        steps, batch = (1, 1, *x.shape[:-1])[-2:]
        if layout == "batch_first" and x.dim() == 3:
            steps, batch = batch, steps
        elif layout != "cell" and x.dim() == 2:
            steps, batch = batch, 1
        call = RecurrentCall(
            cell, x, None, None, own, num_layers=num_layers, bidirectional=bidirectional,
            has_biases=len(own) // (num_layers * (1 + bidirectional)) >= 4,
            projected=own[1].shape[0] != own[1].shape[1] * GATES[cell],
        )  # fmt: skip
        return shape_of(call, steps, batch)

    key = cell, layout, num_layers, bidirectional, training, x.dtype, x.shape, own[1].shape, len(own)
    return backend.native_for(key, shape)

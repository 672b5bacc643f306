"""A call of RNN, GRU or LSTM as one object: its tensors, and how its layers are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq import ops
from fastseq.calibration.calls import DTYPE_NAMES, ScanShape

Result = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""y, h_n, an LSTM's c_n, and every c_t where asked for."""


@dataclass
class RecurrentCall:
    """Tensors as :func:`fastseq.functional.lstm` takes them; ``weights`` come flat, a layer and direction at a time, in
    torch's order: w_ih, w_hh, then b_ih, b_hh with biases, then w_hr with a projection."""

    cell: str
    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    lengths: Tensor | None = None
    reset: Tensor | None = None
    batch_sizes: Tensor | None = None
    want_states: bool = False
    num_layers: int = 1
    has_biases: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    projected: bool = False
    is_cell: bool = False
    state_mask: Tensor | None = None
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None
    recompute: bool = False
    norm: str | None = None
    norm_weights: Sequence[Tensor] = ()

    @property
    def draws_mask(self) -> bool:
        """Whether the call draws its state_mask itself."""
        return self.training and self.recurrent_dropout > 0.0

    @property
    def has_options(self) -> bool:
        """Whether the call needs kernels with a mask of the state, zoneout, a state to reset to, or normalisation."""
        given = self.state_mask is not None or self.reset_h is not None or self.norm is not None
        return given or self.draws_mask or any(self.zoneout)

    @property
    def draws(self) -> bool:
        """Whether the call draws random numbers."""
        return self.training and (self.dropout > 0.0 or self.recurrent_dropout > 0.0 or any(self.zoneout))

    def zoneout_shares(self, steps: int, batch: int, *rows: int) -> tuple[Tensor | None, ...]:
        """The shares of h_{t-1} and c_{t-1} that h_t and c_t keep, ``[*rows, steps, batch, P]`` and ``[.., H]``: 0 or 1
        in training, drawn here, else the probability; None where it is 0."""
        shares: list[Tensor | None] = []
        for p, size in zip(self.zoneout, (self.weights[1].shape[1], self.hidden), strict=True):
            shape = (*rows, steps, batch, size)
            share = None
            if p:
                share = self.x.new_empty(shape).bernoulli_(p) if self.training else self.x.new_full((), p).expand(shape)
            shares.append(share)
        return tuple(shares)

    @property
    def names(self) -> tuple[str, ...]:
        """What the weights of one layer and direction are called."""
        biases = ("bias_ih", "bias_hh") * self.has_biases
        return ("weight_ih", "weight_hh", *biases, *("weight_hr",) * self.projected)

    @property
    def layout(self) -> str:
        """How x is laid out (:mod:`fastseq.recurrent.layout`)."""
        return "batch_first" if self.batch_first else "layer"

    @property
    def directions(self) -> int:
        """1, or 2 where bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def rows(self) -> int:
        """Layers and directions, which the states have in rows."""
        return self.num_layers * self.directions

    @property
    def hidden(self) -> int:
        """Units of a layer and direction."""
        return self.weights[1].shape[0] // ops.GATES[self.cell]

    def weights_of(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh, w_hr of the ``index``-th layer and direction; None for those absent."""
        width = 2 + 2 * self.has_biases + self.projected
        w = self.weights[index * width : (index + 1) * width]
        b_ih, b_hh = w[2:4] if self.has_biases else (None, None)
        return w[0], w[1], b_ih, b_hh, w[-1] if self.projected else None


def shape_of(call: RecurrentCall, steps: int, batch: int) -> ScanShape:
    """The call as calibration knows it."""
    x, weights = call.x, call.weights
    return ScanShape(
        call.cell, DTYPE_NAMES.get(x.dtype, ""), steps, batch, x.shape[-1], call.hidden,
        projected=weights[1].shape[1] if call.projected else 0, layers=call.num_layers, directions=call.directions,
        biases=call.has_biases, lengths=call.lengths is not None or call.batch_sizes is not None,
        reset=call.reset is not None,
        training=torch.is_grad_enabled() and (x.requires_grad or weights[0].requires_grad),
    )  # fmt: skip

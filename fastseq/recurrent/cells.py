"""The table of cells. The operators take a cell as its number, everything above them as its name.

``csrc/recurrent/cells.h`` has the same table for C++. Operators take no text: torch's stable ABI leaks a copy of it at
each call.
"""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """What an operator's caller must know of a cell.

    ``gates``: G. Rows of ``w_ih`` and ``w_hh`` are G blocks of H, in torch's order.
    ``tape``: blocks of H that the tape keeps a step. LSTM i,f,g,o; GRU r,z,n,q with q = W_hn h + b_hn (reset after the
    product) or q = r * h_prev (reset before it). An RNN needs only its output.
    """

    name: str
    gates: int
    tape: int


CELLS = (
    Cell("rnn_tanh", 1, 0),
    Cell("rnn_relu", 1, 0),
    Cell("lstm", 4, 4),
    Cell("gru", 3, 4),
    Cell("gru_reset_before", 3, 4),
)
"""All cells; a cell's number is its place."""

NUMBER = {cell.name: number for number, cell in enumerate(CELLS)}
GATES = {cell.name: cell.gates for cell in CELLS}
TAPE = {cell.name: cell.tape for cell in CELLS}

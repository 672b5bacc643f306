"""The table of cells. The operators take a cell as its number, everything above them as its name.

``csrc/recurrent/cells.h`` has the same table for C++. Operators take no text: torch's stable ABI leaks a copy of it at
each call.
"""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """What an operator's caller must know of a cell.

    ``gates``: G. Rows of ``w_ih`` and ``w_hh`` are G blocks of H, in torch's order.
    ``tape``: blocks of H that the tape keeps a step. LSTM i,f,g,o, coupled i,g,o; GRU r,z,n,q with q = W_hn h + b_hn
    (reset after the product) or q = r * h_prev (reset before it). An RNN needs only its output.
    ``has_c``: whether it carries a c beside its h, as an LSTM does. h is then o * tanh(c), o is the last gate and the
    tape's last block, and h may be projected.
    ``not_in_torch``: why torch's own layers cannot run it; empty where they can.
    """

    name: str
    gates: int
    tape: int
    has_c: bool = False
    not_in_torch: str = ""


CELLS = (
    Cell("rnn_tanh", 1, 0),
    Cell("rnn_relu", 1, 0),
    Cell("lstm", 4, 4, True),
    Cell("gru", 3, 4),
    Cell(
        "gru_reset_before", 3, 4, False, "torch has no GRU with the reset gate before the product (reset_after=False)"
    ),
    Cell("lstm_coupled", 3, 3, True, "torch has no LSTM whose forget gate is 1 - i (input_forget=True)"),
)
"""All cells; a cell's number is its place."""

NUMBER = {cell.name: number for number, cell in enumerate(CELLS)}
GATES = {cell.name: cell.gates for cell in CELLS}
TAPE = {cell.name: cell.tape for cell in CELLS}
HAS_C = {cell.name: cell.has_c for cell in CELLS}
NOT_IN_TORCH = {cell.name: cell.not_in_torch for cell in CELLS}

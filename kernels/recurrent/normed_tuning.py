"""Tiles of the kernels of normalised layers, and which role a layer gets. Chosen by what compiles without spills.

Not yet timed.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import tuning

# Largest padded H of the sequence role by bytes of the dtype, forward and backward; above it the step role.
_LARGEST = {
    ("lstm", 2): (128, 128),
    ("gru", 2): (128, 128),
    ("lstm_coupled", 2): (128, 128),
    ("rnn_tanh", 2): (256, 256),
    ("rnn_relu", 2): (256, 256),
    ("lstm", 4): (64, 32),
    ("gru", 4): (64, 64),
    ("lstm_coupled", 4): (64, 64),
    ("rnn_tanh", 4): (64, 128),
    ("rnn_relu", 4): (64, 128),
}
CELLS = tuple(cell for cell in tuning.GATES if cell != "gru_reset_before")
FORMS = tuple((cell, joint) for cell in CELLS for joint in ((False, True) if cell == "gru" else (False,)))
"""Every cell that has a normalised form, and whether that is the joint one."""
ROW_BLOCK = 1024
"""Most units that a program of the step role takes at a time."""
GAIN_TILE, GAIN_PROGRAMS = (16, 64), 64
"""Rows and columns of a tile of gain_gradients, and the most programs that share a column."""


def tape_of(cell: str) -> int:
    """Blocks of the tape: the activated gates but an RNN's, which is its output, and those of LN(product)."""
    gates = tuning.GATES[cell]
    return gates if gates == 1 else 2 * gates


def stats_of(cell: str) -> int:
    """Numbers that are kept of a row and step: 1/std of the product, and of a c its mean and 1/std."""
    return 3 if tuning.HAS_C[cell] else 1


def sequence_bytes(cell: str, dtype: str, tile: tuning.Sequence, backward: bool) -> int:
    """Shared memory that the sequence role asks for, at most, as :func:`tuning.sequence_bytes` counts it."""
    size, gates = tuning.BYTES[dtype], tuning.GATES[cell]
    weights = gates * tile.units**2 * (2 if size == 2 else 8)
    narrow, wide, of_row = gates, 0, 0
    if backward:  # dy, the tape, and of an LSTM two c and their gradient, else an h; the statistics, and the reset
        narrow, wide = (1 + tape_of(cell), 3) if tuning.HAS_C[cell] else (2 + tape_of(cell), 0)
        of_row = 4 * (stats_of(cell) + 1)
    ahead = (tile.stages - 1) * ((narrow * size + wide * 4) * tile.units + of_row)
    exchanged = (8 if size == 4 else 2 * (gates + 1) if backward else 4) * tile.units
    return weights + tile.block_b * (ahead + exchanged)


def sequence(cell: str, dtype: str, hidden: int, shared: int, backward: bool) -> tuning.Sequence | str:
    """The tile of the sequence role, or why this device cannot run it; arguments as :func:`tuning.sequence`'s."""
    largest = _LARGEST[cell, tuning.BYTES[dtype]][backward]
    block_h = tuning.padded(hidden)
    if block_h > largest:
        return f"H = {hidden} is above {largest}, the most units of a normalised {cell} in {dtype} that one SM holds"
    needed = 0
    for stages in (2, 1):
        tile = tuning.Sequence(tuning.BLOCK_B, block_h, tuning._WARPS[tuning.BYTES[dtype]][block_h], stages)
        needed = sequence_bytes(cell, dtype, tile, backward)
        if needed <= shared:
            return tile
    return f"H = {hidden} ({cell}, {dtype}) needs {needed} bytes of shared memory a program; this device has {shared}"


def sequence_tiles(cell: str, dtype: str, shared: int, backward: bool) -> Iterator[tuning.Sequence]:
    """Every tile of the sequence role that a device with so much shared memory may be given, the narrow ones first."""
    tiles = (sequence(cell, dtype, hidden, shared, backward) for hidden in (16, 32, 64, 128, 256))
    yield from (tile for tile in tiles if isinstance(tile, tuning.Sequence))


def step(hidden: int) -> tuple[int, int]:
    """Units that a program of the step role takes at a time, and its warps."""
    block_n = min(max(32, tuning.padded(hidden)), ROW_BLOCK)
    return block_n, max(1, min(8, block_n // 128))

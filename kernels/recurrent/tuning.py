"""Tiles of the recurrent kernels, and which role a layer gets. Chosen by what compiles without spills; not yet timed.

The sequence role needs W_hh of a whole layer in the shared memory of one SM; how much there is, the device itself
says. Nothing here depends on T, and on B only whether it is above one tile: the variants that can be compiled are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

# name: G, blocks of the tape, whether there is a c, as fastseq/recurrent/cells.py has them; a test compares.
_CELLS = {
    "rnn_tanh": (1, 0, False),
    "rnn_relu": (1, 0, False),
    "lstm": (4, 4, True),
    "gru": (3, 4, False),
    "gru_reset_before": (3, 4, False),
    "lstm_coupled": (3, 3, True),
}
GATES = {name: gates for name, (gates, _, _) in _CELLS.items()}
TAPE = {name: tape for name, (_, tape, _) in _CELLS.items()}
HAS_C = {name: has_c for name, (_, _, has_c) in _CELLS.items()}
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Sequence:
    """One launch for all steps: rows of the batch and (padded) units a program owns; stages of its loop's pipeline.

    Units between two powers of two may be taken in two parts: ``block_h`` of them, and ``tail`` more.
    """

    block_b: int
    block_h: int
    num_warps: int
    stages: int
    tail: int = 0

    @property
    def units(self) -> int:
        return self.block_h + self.tail


@dataclass(frozen=True)
class Step:
    """One launch a step: rows and units a program owns, and how much of the product it takes at a time."""

    block_b: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Persistent(Step):
    """One launch for all steps of any H, whose programs wait for each other at every step: tiled as a step."""


# All that a thread can have with 8 warps. Left to itself ptxas stops at 128 here and there, and spills.
MAX_REGISTERS = 255
BLOCK_B = 16  # the smallest tile of a tensor core: more rows would be more programs' work in one

# Largest padded H by bytes of the dtype, in one part and in two; above it the step role.
_LARGEST = {
    ("lstm", 2): (128, 128 + 32),
    ("gru", 2): (128, 128 + 64),
    ("gru_reset_before", 2): (128, 128 + 64),
    ("lstm_coupled", 2): (128, 128 + 64),
    ("rnn_tanh", 2): (256, 256 + 64),
    ("rnn_relu", 2): (256, 256 + 64),
    ("lstm", 4): (64, 64),
    ("gru", 4): (64, 64),
    ("gru_reset_before", 4): (64, 64),
    ("lstm_coupled", 4): (64, 64),
    ("rnn_tanh", 4): (128, 128),
    ("rnn_relu", 4): (128, 128),
}
_TAILS = (32, 64)  # a product of 16 columns spills thousands of bytes
# Padded H to warps, by bytes of the dtype: as many as the registers of a row of every gate ask for.
_WARPS = {2: {16: 1, 32: 2, 64: 4, 128: 8, 256: 8}, 4: {16: 2, 32: 4, 64: 8, 128: 8}}


def padded(hidden: int) -> int:
    """The power of two, 16 or more, that holds so many units."""
    return max(16, 1 << (hidden - 1).bit_length())


def parts(cell: str, dtype: str, hidden: int, backward: bool, shares: int | None = None) -> list[tuple[int, int]]:
    """The tiles that hold so many units and do not spill, as (block_h, tail), the one to be tried first first; in one
    part where the call has options (``shares`` as :func:`sequence` has it), which find no room beside two."""
    one, two = _LARGEST[cell, BYTES[dtype]]
    if backward and cell == "lstm" and BYTES[dtype] == 4:
        one = two = 32
    if shares is not None:
        two = one
    whole = padded(hidden)
    found = [(whole, 0)] if whole <= one else []
    half = whole // 2
    tail = next((n for n in _TAILS if half + n >= hidden), half)
    if two > one and one >= half >= 64 and tail < half and half + tail <= two:
        found.append((half, tail))
    return found


def largest_sequence(cell: str, dtype: str, backward: bool, shares: int | None = None) -> int:
    """Most units of the sequence role whose kernel does not spill."""
    return max(h for h in range(16, 513, 16) if parts(cell, dtype, h, backward, shares))


def read_back(cell: str) -> tuple[int, int]:
    """What the backward walk reads a step, in tiles of x's dtype and of fp32, which the pipeline loads a step ahead: dy
    and the tape (but q of a reset before the product), and two c and their gradient, or an h."""
    narrow = 1 + TAPE[cell] - (cell == "gru_reset_before")
    return (narrow, 3) if HAS_C[cell] else (narrow + 1, 0)


def sequence_bytes(cell: str, dtype: str, tile: Sequence, backward: bool, shares: int | None = None) -> int:
    """Shared memory that the sequence role asks for, at most.

    W_hh (twice in fp32: its TF32 part and the rest), the tiles that the pipeline loads ahead, and room in which warps
    exchange tiles.
    """
    size, gates = BYTES[dtype], GATES[cell]
    weights = gates * tile.units**2 * (2 if size == 2 else 8)
    narrow, wide = read_back(cell) if backward else (gates, 0)
    narrow += shares or 0
    ahead = (tile.stages - 1) * (narrow * size + wide * 4) * tile.units
    exchanged = (8 if size == 4 else 2 * (gates + 1) if backward else 4) * tile.units
    if tile.tail and not backward:  # h, and what is turned beside it: gates that no pipeline loads, or r * h
        turned = tile.stages == 1 or cell == "gru_reset_before"
        exchanged = 2 * tile.units + (2 * tile.block_h if turned else 0)
    return weights + tile.block_b * (ahead + exchanged)


def sequence(
    cell: str, dtype: str, hidden: int, shared: int, backward: bool, shares: int | None = None
) -> Sequence | str:
    """The tile of the sequence role, or why this device cannot run it.

    Args:
        dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        shared: bytes of shared memory that a program may have.
        backward: of the walk back, which reads more a step.
        shares: of a call with a mask, zoneout or a state to reset to, how many of zoneout's shares a step reads; else
            None.
    """
    least = 0
    for block_h, tail in parts(cell, dtype, hidden, backward, shares):
        for stages in (2, 1):
            tile = Sequence(BLOCK_B, block_h, _WARPS[BYTES[dtype]][block_h], stages, tail)
            needed = sequence_bytes(cell, dtype, tile, backward, shares)
            if needed <= shared:
                return tile
            least = min(least or needed, needed)
    if least == 0:
        largest = largest_sequence(cell, dtype, backward, shares)
        beside = "" if shares is None else " beside a mask, zoneout or a state to reset to"
        return f"H = {hidden} is above {largest}, the most units of a {cell} in {dtype} that one SM holds{beside}"
    return f"H = {hidden} ({cell}, {dtype}) needs {least} bytes of shared memory a program; this device has {shared}"


# By whether the batch is above 16: a tile of 64 rows reads W_hh a quarter as often.
_STEP = {
    (2, False): Step(16, 16, 128, 4, 3),
    (2, True): Step(64, 16, 64, 4, 3),
    (4, False): Step(16, 16, 32, 4, 3),
    (4, True): Step(64, 16, 32, 4, 3),
}


def step(dtype: str, batch: int) -> Step:
    """The tile of the step role."""
    return _STEP[BYTES[dtype], batch > BLOCK_B]


# By whether a tile has 64 rows.
_PERSISTENT = {
    (2, False): Persistent(16, 16, 64, 4, 4),
    (2, True): Persistent(64, 16, 64, 4, 3),
    (4, False): Persistent(16, 32, 32, 8, 3),
    (4, True): Persistent(64, 16, 16, 4, 3),
}
PERSISTENT_FIRST = frozenset({(9, 0)})
"""Compute capabilities on which a layer that is too large for the sequence role takes the persistent one before the
step role: those of GPUs that were seen to be faster so. An H200 is level in a CUDA graph, and 1.2 to 3.5 times as fast
where the host launches each step, as it does in training, but for one plain RNN, 0.9 times
(bench/results/nvidia-h200-recurrent.json)."""


def _with_options(tile: Persistent, shares: int | None) -> Persistent:
    """The tile of a call with options (``shares`` as :func:`sequence` has it): with 4 warps 64 rows spilled."""
    return tile if shares is None or tile.block_b < 64 else replace(tile, num_warps=8)


def persistent(dtype: str, batch: int, hidden: int, processors: int, shares: int | None = None) -> Persistent | str:
    """The tile of the persistent role, or why this device cannot run it: all its programs must run at once.

    Args:
        processors: how many of them the device has; one program each is what surely fits.
    """
    for large in (False, True) if batch > BLOCK_B else (False,):
        tile = _PERSISTENT[BYTES[dtype], large]
        programs = -(-hidden // tile.block_n) * -(-batch // tile.block_b)
        if programs <= processors:
            return _with_options(tile, shares)
    return f"B = {batch}, H = {hidden} takes {programs} programs at once; this device has {processors} processors"


def sequence_tiles(cell: str, dtype: str, shared: int, backward: bool, shares: int | None = None) -> Iterator[Sequence]:
    """Every tile of the sequence role that a device with so much shared memory may be given, the narrow ones first."""
    tiles = (sequence(cell, dtype, hidden, shared, backward, shares) for hidden in range(16, 513, 16))
    yield from dict.fromkeys(tile for tile in tiles if isinstance(tile, Sequence))


def persistent_tiles(dtype: str, shares: int | None = None) -> Iterator[Persistent]:
    """Every tile of the persistent role."""
    yield from (_with_options(tile, shares) for (size, _), tile in _PERSISTENT.items() if size == BYTES[dtype])


def step_tiles(dtype: str) -> Iterator[Step]:
    """Every tile of the step role."""
    yield from (tile for (size, _), tile in _STEP.items() if size == BYTES[dtype])

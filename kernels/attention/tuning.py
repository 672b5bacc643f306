"""Tiles of the attention kernels: which sizes, warps and stages for which machine, role and head dimension.

On Hopper the tiles of half precision up to 256 features are the fastest of those that ``python -m bench tune`` tried on
an H200 (D 64 and 256 causal at 4k, D 128 at 8k, decoding 16 sequences of 8k and 64k; the figures are in
bench/results/tune/nvidia-h200-attention*.json); some spill around their loops, none within. The others are chosen by
what the compiler says of them ahead of time, and have not been timed: each fits the shared memory of its machine and
spills nothing in the cases that the tests compile. dk and dv of 128 features by pointers are one of them: the tile that
was faster, of 64 queries, spills in its loop where rows are not aligned, and under Triton 3.8 where they are.

One table serves every Triton from 3.6 on: a tile is in it if it is clean under 3.6 and under 3.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    registers: int = 0  # a thread may take; 0 leaves it to ptxas, which may spill a little to fit two programs on an SM
    tma: bool = False  # tiles come by TMA descriptors, where the tensors allow it
    persistent: int = 0  # programs a multiprocessor, each of which makes many tiles; 0: a program makes one
    ahead: bool = False  # forward: the scores of a tile are made while the one before is still multiplied by v
    programs: int = 0  # decoding: how many the splits of the keys are to make in all; 0: attention_problem.PROGRAMS


SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Machines, and the bytes of shared memory that a program may use there. sm_80 stands for every NVIDIA machine that is
not of the two later kinds: its tiles fit in what the smallest of those has."""

ROLES = ("forward", "backward_keys", "backward_queries", "backward_bias", "decode")
WIDTHS = (64, 128, 256, 512)
"""Features of a head, the larger of q's and v's, rounded up to one of these."""

Table = dict[str, tuple[Tile, ...]]  # by role, for each of WIDTHS; float32 has none of the last

# bfloat16 and float16. Limits (causal, window, lengths) and sinks cost few registers, so that tiles can be large.
_HALF: dict[str, Table] = {
    "sm_80": {
        "forward": (Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 1, 255)),
        "backward_keys": (Tile(32, 32, 4, 2), Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, 255)),
        "backward_queries": (Tile(128, 64, 8, 3), Tile(128, 16, 8, 3), Tile(32, 32, 8, 1), Tile(16, 16, 8, 2, 255)),
        "decode": (Tile(16, 64, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1, 255)),
    },
    "sm_90": {
        "forward": (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 32, 8, 1, 255)),
        "backward_keys": (Tile(32, 128, 8, 2), Tile(32, 128, 8, 2), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, 255)),
        "backward_queries": (
            Tile(128, 64, 8, 3),
            Tile(128, 64, 8, 3),
            Tile(128, 32, 8, 2),
            Tile(32, 16, 8, 1, 255),
        ),
        "decode": (Tile(16, 64, 4, 4), Tile(16, 64, 4, 4), Tile(16, 32, 4, 3), Tile(16, 16, 8, 1, 255)),
    },
    "sm_100": {
        "forward": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 32, 8, 2), Tile(32, 32, 8, 1, 255)),
        "backward_keys": (
            Tile(32, 64, 8, 2, 255),
            Tile(32, 64, 8, 1, 255),
            Tile(32, 32, 8, 1),
            Tile(16, 16, 8, 1, 255),
        ),
        "backward_queries": (
            Tile(128, 64, 8, 2, 255),
            Tile(128, 32, 8, 2, 255),
            Tile(128, 32, 8, 2),
            Tile(16, 16, 8, 2, 255),
        ),
        "decode": (Tile(16, 64, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1, 255)),
    },
}

# The same with a bias, mask, slopes, softcap or dropout, which all take registers for every pair of the tile.
_HALF_PAIRS: dict[str, Table] = {
    "sm_80": {
        "forward": (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1, 255), Tile(16, 16, 8, 1, 255)),
        "backward_keys": (
            Tile(32, 32, 8, 1, 255),
            Tile(32, 32, 8, 1),
            Tile(16, 16, 8, 1, 255),
            Tile(16, 16, 8, 1, 255),
        ),
        "backward_queries": (Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1, 255), Tile(16, 16, 8, 2, 255)),
        "backward_bias": (Tile(64, 32, 8, 1), *(Tile(64, 64, 8, 2, 255),) * 3),
        "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, 255)),
    },
    "sm_90": {
        "forward": (Tile(64, 64, 8, 2, 255), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1, 255)),
        "backward_keys": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1, 255), Tile(32, 16, 8, 1, 255)),
        "backward_queries": (Tile(64, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1, 255), Tile(16, 16, 8, 1, 255)),
        "backward_bias": (Tile(64, 64, 8, 2, 255),) * 4,
        "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, 255)),
    },
    "sm_100": {
        "forward": (Tile(64, 64, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1, 255)),
        "backward_keys": (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1, 255), Tile(16, 16, 8, 1, 255)),
        "backward_queries": (
            Tile(64, 32, 4, 1, 255),
            Tile(32, 32, 8, 1),
            Tile(32, 32, 8, 1, 255),
            Tile(16, 16, 8, 2, 255),
        ),
        "backward_bias": (Tile(64, 64, 8, 2, 255),) * 4,
        "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, 255)),
    },
}

# float32: tiles are of twice the bytes, and exact products are no work of tensor cores.
_SINGLE_LATER: Table = {
    "forward": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
    "backward_keys": (Tile(32, 32, 8, 1, 255), Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)),
    "backward_queries": (Tile(32, 32, 8, 1, 255), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1, 255)),
    "backward_bias": (Tile(32, 32, 8, 1),) * 3,
    "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
}
_SINGLE: dict[str, Table] = {
    "sm_80": {**_SINGLE_LATER, "backward_keys": (*(Tile(32, 32, 8, 1, 255),) * 2, Tile(16, 32, 16, 2))},
    "sm_90": _SINGLE_LATER,
    "sm_100": _SINGLE_LATER,
}
_SINGLE_LATER_PAIRS: Table = {
    **_SINGLE_LATER,
    "backward_keys": (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1)),
}
_SINGLE_PAIRS: dict[str, Table] = {
    "sm_80": {**_SINGLE_LATER, "backward_keys": (*(Tile(32, 32, 8, 1, 255),) * 2, Tile(16, 32, 8, 1, 255))},
    "sm_90": _SINGLE_LATER_PAIRS,
    "sm_100": _SINGLE_LATER_PAIRS,
}

_GFX942: Table = {
    "forward": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1)),
    "backward_keys": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    "backward_queries": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
    "backward_bias": (Tile(32, 32, 4, 1),) * 4,
    "decode": (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 16, 4, 1)),
}

# By TMA descriptors, which take fewer registers than pointers: where that makes a tile larger, or lets one be under way
# while another is computed. Of keys and values, of queries in "forward" too, and of queries and do for "backward_keys".
# None: pointers do as well. On Hopper two programs on a multiprocessor, one at its products while the other is at its
# exponentials, beat a larger tile: forward, D 128: 505 TFLOP/s, where 128 x 128 of 222 registers has 425.
_DESCRIBED: dict[str, dict[str, tuple[Tile | None, ...]]] = {
    "sm_90": {
        "forward": (
            Tile(128, 64, 4, 3, tma=True, ahead=True),
            Tile(128, 64, 8, 2, 128, tma=True),
            Tile(128, 64, 8, 2, tma=True, ahead=True),
            None,
        ),
        "backward_keys": (
            Tile(128, 64, 4, 2, tma=True),
            Tile(64, 64, 4, 2, tma=True),
            Tile(64, 64, 8, 2, tma=True),
            None,
        ),
        "backward_queries": (Tile(64, 64, 4, 3, tma=True), Tile(128, 64, 8, 3, tma=True), None, None),
    },
    "sm_100": {
        "forward": (
            Tile(128, 128, 8, 2, tma=True),
            Tile(128, 128, 8, 2, tma=True),
            Tile(128, 64, 8, 2, tma=True),
            None,
        ),
        "backward_keys": (None, Tile(32, 64, 8, 2, tma=True), None, None),
        "backward_queries": (None, Tile(128, 64, 8, 2, tma=True), None, None),
    },
}

_INTERPRETED = {
    "forward": Tile(32, 64, 4, 1),
    "backward_keys": Tile(64, 32, 4, 1),
    "backward_queries": Tile(32, 64, 4, 1),
    "backward_bias": Tile(32, 32, 4, 1),
    "decode": Tile(16, 64, 4, 1),
}


_forced: dict[str, Tile] = {}


@contextmanager
def forced(role: str, tile: Tile) -> Iterator[None]:
    """A role has this tile inside the ``with`` block, whatever the tables say."""
    before = dict(_forced)
    _forced[role] = tile
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def architecture(x: torch.Tensor) -> str:
    """The machine a tensor is on: a key of :data:`SHARED`, or ``interpreter``."""
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile(machine: str, role: str, dtype: torch.dtype, columns: int, pairs: bool, describable: bool = False) -> Tile:
    """The tile of a role on a machine, for heads of ``columns`` features at most; ``pairs``: something is computed or
    loaded for each pair of query and key besides their score; ``describable``: TMA can read the tensors."""
    if role in _forced:
        return _forced[role]
    if machine == "interpreter":
        return _INTERPRETED[role]
    width = next(n for n, w in enumerate(WIDTHS) if columns <= w)
    if machine == "gfx942":
        return _GFX942[role][width]
    if dtype == torch.float32:
        return (_SINGLE_PAIRS if pairs else _SINGLE)[machine][role][width]
    pairs = pairs or role == "backward_bias"
    described = _DESCRIBED.get(machine, {}).get(role, (None,) * len(WIDTHS))[width]
    if describable and described is not None and not pairs:
        return described
    return (_HALF_PAIRS if pairs else _HALF)[machine][role][width]

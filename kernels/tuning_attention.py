"""Tiles of the attention kernels: which sizes, warps and stages for which machine, role and head dimension.

Compiled ahead of time, none of these spills registers, and each fits the shared memory of its machine; the tests
compile them all. They have not been timed on hardware.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter")
"""sm_80 serves every NVIDIA machine that is not of the two later kinds: its tiles fit in 99 KiB."""

SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program may use."""

ROLES = ("forward", "backward_keys", "backward_queries", "backward_bias", "decode")

# By head dimension, the larger of q's and v's rounded up to 64, 128 or 256: bfloat16 and float16.
_HALF: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_80": {
        "forward": {64: Tile(128, 64, 8, 3), 128: Tile(64, 64, 4, 2), 256: Tile(64, 32, 8, 2)},
        "backward_keys": {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
        "backward_queries": {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
        "backward_bias": {64: Tile(64, 64, 8, 1), 128: Tile(64, 64, 8, 1), 256: Tile(32, 32, 4, 1)},
        "decode": {64: Tile(16, 64, 4, 3), 128: Tile(16, 64, 4, 2), 256: Tile(16, 32, 4, 2)},
    },
    "sm_90": {
        "forward": {64: Tile(128, 128, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
        "backward_keys": {64: Tile(64, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
        "backward_queries": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
        "backward_bias": {64: Tile(64, 64, 8, 1), 128: Tile(64, 64, 8, 1), 256: Tile(64, 64, 8, 1)},
        "decode": {64: Tile(16, 128, 4, 3), 128: Tile(16, 64, 4, 3), 256: Tile(16, 64, 4, 2)},
    },
    "gfx942": {
        "forward": {64: Tile(128, 64, 4, 1), 128: Tile(128, 32, 4, 1), 256: Tile(64, 32, 4, 1)},
        "backward_keys": {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
        "backward_queries": {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
        "backward_bias": {64: Tile(64, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
        "decode": {64: Tile(16, 64, 4, 1), 128: Tile(16, 64, 4, 1), 256: Tile(16, 32, 4, 1)},
    },
}
_HALF["sm_100"] = _HALF["sm_90"]

# float32, whose tiles are twice the bytes and whose exact products are no tensor core's work.
_SINGLE: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_80": {
        "forward": {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
        "backward_keys": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        "backward_queries": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        "backward_bias": {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
        "decode": {64: Tile(16, 32, 4, 1), 128: Tile(16, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    },
}
for _name in ("sm_90", "sm_100", "gfx942"):
    _SINGLE[_name] = _SINGLE["sm_80"]

_INTERPRETED = {
    "forward": Tile(32, 64, 4, 1),
    "backward_keys": Tile(64, 32, 4, 1),
    "backward_queries": Tile(32, 64, 4, 1),
    "backward_bias": Tile(32, 32, 4, 1),
    "decode": Tile(16, 64, 4, 1),
}


def architecture(x: torch.Tensor) -> str:
    """The name, of :data:`ARCHITECTURES`, of the machine that a tensor is on."""
    if x.device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(x.device)[0]
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def tile(machine: str, role: str, dtype: torch.dtype, columns: int) -> Tile:
    """The tile of a role on a machine of :data:`ARCHITECTURES`, for heads of ``columns`` features at most."""
    if machine == "interpreter":
        return _INTERPRETED[role]
    table = _SINGLE if dtype == torch.float32 else _HALF
    return table[machine][role][64 if columns <= 64 else 128 if columns <= 128 else 256]

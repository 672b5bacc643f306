"""How a caller lays out what the scan has as x and y ``[T,B,n]`` and states ``[B,n]``.

``scan``: so. ``layer``: x as well, or ``[T,n]`` of one sequence, states ``[1,B,n]`` or ``[1,n]``. ``batch_first``: as
``layer``, but x ``[B,T,n]``. ``cell``: ``[B,n]`` or ``[n]``, states alike. ``rank`` is x's; None stays None.
csrc/recurrent/inference.h has the same names.
"""

from __future__ import annotations

from typing import Any


def steps_in(layout: str, rank: int, x: Any) -> Any:
    """x or y, as the scan has it."""
    if x is None or layout == "scan":
        return x
    if layout == "cell":
        return x[None, None] if rank == 1 else x.unsqueeze(0)
    return x.unsqueeze(1) if rank == 2 else x.transpose(0, 1) if layout == "batch_first" else x


def steps_out(layout: str, rank: int, x: Any) -> Any:
    """The inverse of :func:`steps_in`."""
    if x is None or layout == "scan":
        return x
    if layout == "cell":
        return x[0, 0] if rank == 1 else x[0]
    return x.squeeze(1) if rank == 2 else x.transpose(0, 1) if layout == "batch_first" else x


def state_in(layout: str, rank: int, s: Any) -> Any:
    """A state, as the scan has it."""
    if s is None or layout == "scan" or rank == 2:
        return s
    return s.unsqueeze(0) if rank == 1 else s[0]


def state_out(layout: str, rank: int, s: Any) -> Any:
    """The inverse of :func:`state_in`."""
    if s is None or layout == "scan" or rank == 2:
        return s
    return s[0] if rank == 1 else s.unsqueeze(0)

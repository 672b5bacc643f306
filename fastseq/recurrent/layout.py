"""How a caller lays out what the kernels have as x and y ``[T,B,n]`` and states ``[rows,B,n]``.

``layer``: so, or ``[T,n]`` and ``[rows,n]`` of one sequence. ``batch_first``: as ``layer``, but x ``[B,T,n]``.
``cell``: ``[B,n]`` or ``[n]``, states alike. ``rank`` is x's; None stays None. csrc/recurrent/stack.h has the same
names.
"""

from __future__ import annotations

from typing import Any


def has_one_step(layout: str, x: Any) -> Any:
    """Whether x or y has one time step alone."""
    return layout == "cell" or x.shape[1 if layout == "batch_first" and x.dim() == 3 else 0] == 1


def steps_in(layout: str, rank: int, x: Any) -> Any:
    """x or y, as the kernels have it."""
    if x is None:
        return x
    if layout == "cell":
        return x[None, None] if rank == 1 else x.unsqueeze(0)
    return x.unsqueeze(1) if rank == 2 else x.transpose(0, 1) if layout == "batch_first" else x


def steps_out(layout: str, rank: int, x: Any) -> Any:
    """The inverse of :func:`steps_in`."""
    if x is None:
        return x
    if layout == "cell":
        return x[0, 0] if rank == 1 else x[0]
    return x.squeeze(1) if rank == 2 else x.transpose(0, 1) if layout == "batch_first" else x


def state_in(layout: str, rank: int, s: Any) -> Any:
    """A state, as the kernels have it."""
    if s is None or (layout != "cell" and rank == 3):
        return s
    return s.unsqueeze(1) if layout != "cell" else s[None, None] if rank == 1 else s.unsqueeze(0)


def state_out(layout: str, rank: int, s: Any) -> Any:
    """The inverse of :func:`state_in`."""
    if s is None or (layout != "cell" and rank == 3):
        return s
    return s.squeeze(1) if layout != "cell" else s[0, 0] if rank == 1 else s[0]

"""Attention over all keys, from attention over parts of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.checks import FLOATS, check_strided
from fastseq.checks import ArgumentError, sizes
from fastseq.ops.attention import laid_out_as


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention of the same queries over several parts of the keys, merged into attention over all of them.

    Part i has attended to some of the keys, o_i with lse_i, as ``attention(..., return_lse=True)`` returns them. Then
    lse = log Σ exp(lse_i) and o = Σ exp(lse_i − lse) o_i. A part in which a row saw no key has lse −inf there and
    counts for nothing, whatever its o holds; a row that saw no key in any part gives 0 and −inf, with zero gradients.
    Sinks belong into one part alone, as each part's lse counts them.

    Args:
        outputs: one part or more, each ``[B, H, T, D]``, or packed ``[total, H, D]``; float64, float32, bfloat16 or
            float16, all of one shape and dtype.
        lses: as many, each ``[B, H, T]``, or packed ``[H, total]``; float32 or float64.

    Returns:
        o, of the dtype and shape of the parts, its dimensions in memory in the order of the first one's; and lse,
        float32, or float64 where a part's is. Both have gradients, to any order.

    Raises:
        ArgumentError: numbers of parts, shapes, dtypes or devices that do not fit; the message names the argument.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
        >>> parts = [fastseq.attention(q, k[:, :, at], v[:, :, at], return_lse=True) for at in (slice(2), slice(2, 6))]
        >>> o, lse = fastseq.merge_attention(*zip(*parts))
        >>> torch.allclose(o, fastseq.attention(q, k, v), atol=1e-6)
        True
    """
    _check(outputs, lses)
    packed = outputs[0].dim() == 3
    stacked = torch.stack([lse.to(_wide(lses)) for lse in lses])
    # A row that saw nothing has −inf in all parts: its largest is taken for 0, so that no −inf − −inf is formed.
    largest = stacked.detach().amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    weights = (stacked - largest).exp()
    total = weights.sum(0)
    empty = total == 0.0
    total = total.masked_fill(empty, 1.0)
    unseen = stacked == -math.inf
    o: Any = 0
    for part, weight, hidden in zip(outputs, (weights / total).unbind(), unseen.unbind(), strict=True):
        weight, hidden = (_beside_features(x, packed) for x in (weight, hidden))
        o = o + part.masked_fill(hidden, 0.0) * weight
    lse = (largest + total.log()).masked_fill(empty, -math.inf)
    return laid_out_as(outputs[0], o.to(outputs[0].dtype)), lse


def _beside_features(x: Tensor, packed: bool) -> Tensor:
    """What is there for each row of an lse, as it broadcasts over the features of o."""
    return (x.transpose(0, 1) if packed else x).unsqueeze(-1)


def _wide(lses: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(lse.dtype == torch.float64 for lse in lses) else torch.float32


def _check(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name} must be a list of Tensors, one a part, got {type(parts).__name__}")
        for n, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(f"{name}[{n}] must be a Tensor, got {type(part).__name__}")
            check_strided(f"{name}[{n}]", part)
    if not outputs or len(outputs) != len(lses):
        raise ArgumentError(
            f"outputs and lses must have one entry a part, at least one, got {len(outputs)} and {len(lses)}; "
            "attention(..., return_lse=True) returns both"
        )
    o = outputs[0]
    if o.dim() not in (3, 4):
        raise ArgumentError(f"outputs[0] must be [B,H,T,D], or packed [total,H,D], got {sizes(o)}")
    if o.dtype not in FLOATS:
        raise ArgumentError(f"outputs[0] must be float64, float32, bfloat16 or float16, got {o.dtype}")
    layout, rows = ("[B,H,T]", o.shape[:3]) if o.dim() == 4 else ("[H,total]", (o.shape[1], o.shape[0]))
    for n, (part, lse) in enumerate(zip(outputs, lses, strict=True)):
        if part.shape != o.shape or part.dtype != o.dtype or part.device != o.device:
            raise ArgumentError(
                f"outputs must be of one shape, dtype and device, got {sizes(o)} {o.dtype} on {o.device} and, as "
                f"outputs[{n}], {sizes(part)} {part.dtype} on {part.device}; each part has all queries"
            )
        if tuple(lse.shape) != tuple(rows) or lse.device != o.device:
            raise ArgumentError(
                f"lses[{n}] must be {layout} = {list(rows)} on {o.device} for outputs of {sizes(o)}, "
                f"got {sizes(lse)} on {lse.device}"
            )
        if lse.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(
                f"lses[{n}] must be float32 or float64, got {lse.dtype}: an lse of 16 bits has lost its digits"
            )

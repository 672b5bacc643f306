"""How the results of attention lie in memory. csrc/attention/layout.h has the same rule for C++."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def order_of(x: Tensor) -> list[int]:
    """The dimensions of x in the order of memory, outermost first, as ``torch.empty_like`` has them; but the last, of
    features, is always innermost. A dimension along which x is broadcast has no place in memory: it keeps its place
    among the others."""
    sizes, strides, inward = x.shape, x.stride(), [x.dim() - 1]
    for d in reversed(range(x.dim() - 1)):
        place = len(inward)
        for n in range(len(inward) - 1, 0, -1):
            other = inward[n]
            if strides[d] == 0 or strides[other] == 0:
                continue
            if strides[d] > strides[other] or (strides[d] == strides[other] and sizes[d] >= sizes[other]):
                break
            place = n
        inward.insert(place, d)
    return inward[::-1]


def _inverse(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]


def empty_as(x: Tensor, features: int, make: Callable[..., Tensor] = torch.empty) -> Tensor:
    """A new tensor of x's sizes, but with ``features`` in its last dimension, that lies in memory as x does; in x's
    dtype and on its device."""
    order = order_of(x)
    sizes = (*x.shape[:-1], features)
    return make([sizes[d] for d in order], dtype=x.dtype, device=x.device).permute(_inverse(order))


def laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """The result, copied where it does not lie in memory as x does."""
    order = order_of(x)
    if order == list(range(len(order))):
        return result.contiguous()
    return result.permute(order).contiguous().permute(_inverse(order))

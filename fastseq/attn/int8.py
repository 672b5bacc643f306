"""Keys and values of 8 bits: a whole number for each feature, and a scale for each token and head."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall
from fastseq.checks import ArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What is quantised, and what may be a query beside it."""


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 numbers nearest to x / scale, and the scale: the largest magnitude of a token and head / 127.

    Args:
        x: ``[..., D]``, float32, bfloat16 or float16.

    Returns:
        int8 ``[..., D]`` and float32 ``[..., 1]``. Their product is within scale / 2 of x, up to float32's rounding. A
        row that holds an infinity or a NaN becomes NaN: zeros times such a scale.
    """
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    scale.clamp_min_(torch.finfo(torch.float32).tiny)
    return (x / scale).round_().nan_to_num_(0.0).to(torch.int8), scale


def widen(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    """The call with k and v as numbers of this type, for backends that read no int8; their pages were gathered."""
    assert call.k_scale is not None
    assert call.v_scale is not None
    k, v = ((x * scale).to(dtype) for x, scale in ((call.k, call.k_scale), (call.v, call.v_scale)))
    return call._replace(k=k, v=v, k_scale=None, v_scale=None)


def check_query(q: Tensor, k: Tensor) -> None:
    """Queries beside a cache of int8."""
    if not isinstance(q, Tensor):
        raise TypeError(f"q must be a Tensor, got {type(q).__name__}")
    if q.dtype not in FLOATS:
        raise ArgumentError(f"q must be float32, bfloat16 or float16 beside a cache of int8, got {q.dtype}; convert it")
    if q.device != k.device:
        raise ArgumentError(f"q is on {q.device} but the cache on {k.device}; move one with .to(device)")

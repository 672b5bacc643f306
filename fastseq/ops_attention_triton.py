"""The Triton implementations of the attention operators. Triton itself is imported when one is first called."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton reads this variable when it is imported: kernels are then run by its interpreter, on CPU tensors."""


def attention_reason(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """Why the Triton kernels cannot run heads of ``dim`` and ``dim_v`` features of a dtype; None where they can."""
    from fastseq.kernels import attention_launch

    return attention_launch.unsupported(dtype, dim, dim_v)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from fastseq.kernels import attention_launch

    return attention_launch.forward(q, k, v, *options)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels import attention_launch

    return attention_launch.backward(*arguments)


def register() -> None:
    """Implements ``attention_forward.triton`` and ``attention_backward.triton``, once their schemas are defined."""
    devices = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
    for device in devices:
        torch.library.impl("fastseq::attention_forward.triton", device)(_forward)
        torch.library.impl("fastseq::attention_backward.triton", device)(_backward)

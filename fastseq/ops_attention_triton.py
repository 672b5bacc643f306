"""The Triton implementations of attention: ``attention_forward.triton`` and ``attention_backward.triton``.

Triton and the kernels are imported when one first runs, so that ``import fastseq`` needs neither.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor


def interpreted() -> bool:
    """Whether this process runs Triton kernels under Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def reason(q: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot run attention of these queries and values; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    device = q.device.type
    if device == "cpu" and not interpreted():
        return "the Triton kernels run on a GPU; on the CPU only under Triton's interpreter, for tests"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA and ROCm GPUs, not on {device}"
    from fastseq.kernels import attention_launch

    return attention_launch.unsupported(q.dtype, q.shape[-1], v.shape[-1])


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels import attention_launch

    return attention_launch.forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels import attention_launch

    return attention_launch.backward(*args)


def register() -> None:
    """Give both operators their implementation; on the CPU only where the interpreter runs it."""
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    torch.library.impl("fastseq::attention_forward.triton", devices, _forward)
    torch.library.impl("fastseq::attention_backward.triton", devices, _backward)

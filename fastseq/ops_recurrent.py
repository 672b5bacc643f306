"""The Triton implementations of the scan: ``fastseq::scan_forward.triton`` and ``scan_backward.triton``.

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


def triton_missing(device: str) -> str | None:
    """Why no Triton kernel can run on a device type; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if device == "cpu" and not interpreted():
        return "the Triton kernels run on a GPU; on the CPU only under Triton's interpreter, for tests"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA and ROCm GPUs, not on {device}"
    return None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels import recurrent_launch

    return recurrent_launch.scan_forward(*args)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels import recurrent_launch

    return recurrent_launch.scan_backward(*args)


def register() -> None:
    """Give both operators their implementation; on the CPU only where the interpreter runs it."""
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    torch.library.impl("fastseq::scan_forward.triton", devices, _forward)
    torch.library.impl("fastseq::scan_backward.triton", devices, _backward)

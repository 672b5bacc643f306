"""The Triton implementations of the scan, of normalised layers and of attention: ``torch.ops.fastseq.*.triton``.

Triton and the kernels are imported when one first runs, so that ``import fastseq`` needs neither.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall
from fastseq.recurrent.cells import CELLS


def interpreted() -> bool:
    """Whether this process runs Triton kernels under Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def missing(device: str) -> str | None:
    """Why no Triton kernel can run on a device type; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if device == "cpu" and not interpreted():
        return "the Triton kernels run on a GPU; on the CPU only under Triton's interpreter, for tests"
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA and ROCm GPUs, not on {device}"
    return None


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo cannot trace the questions it asks


def attention_reason(q: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels cannot run attention of these queries and values; None where they can."""
    reason = missing(q.device.type)
    if reason is not None:
        return reason
    from fastseq.kernels.attention import launch as attention_launch

    return attention_launch.unsupported(q.dtype, q.shape[-1], v.shape[-1])


def _scan_forward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.recurrent import launch as recurrent_launch

    *tensors, cell, reverse, save, states = args
    return recurrent_launch.scan_forward(*tensors, CELLS[cell].name, reverse, save, states)


def _scan_backward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.recurrent import launch as recurrent_launch

    *tensors, cell, reverse = args
    return recurrent_launch.scan_backward(*tensors, CELLS[cell].name, reverse)


def _normed_forward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.recurrent import normed_launch

    *tensors, cell, joint, reverse, save, states = args
    return normed_launch.normed_forward(*tensors, _normed_cell(cell, joint), joint, reverse, save, states)


def _normed_backward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.recurrent import normed_launch

    *tensors, cell, joint, reverse = args
    return normed_launch.normed_backward(*tensors, _normed_cell(cell, joint), joint, reverse)


def _normed_cell(cell: int, joint: bool) -> str:
    name = CELLS[cell].name
    if name == "gru_reset_before" or (joint and name != "gru"):
        raise RuntimeError(f"scan: {name} has no {'joint ' if joint else ''}normalised form")
    return name


def _attention_forward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.attention import launch as attention_launch

    call = AttentionCall(*args)
    if call.block_table is not None:  # the kernels have a page's heads before its rows
        call = call._replace(k=call.k.transpose(1, 2), v=call.v.transpose(1, 2))
    return attention_launch.forward(*call)


def _attention_backward(*args: Any) -> tuple[Tensor, ...]:
    from fastseq.kernels.attention import launch as attention_launch

    return attention_launch.backward(*args)


def register() -> None:
    """Give the operators their implementation; on the CPU only where the interpreter runs it."""
    devices = ("cuda", "cpu") if interpreted() else ("cuda",)
    for name, implementation in (
        ("scan_forward", _scan_forward),
        ("scan_backward", _scan_backward),
        ("normed_forward", _normed_forward),
        ("normed_backward", _normed_backward),
        ("attention_forward", _attention_forward),
        ("attention_backward", _attention_backward),
    ):
        torch.library.impl(f"fastseq::{name}.triton", devices, implementation)

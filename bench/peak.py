"""Peak memory, measured in a process of its own.

On the CPU the system's high-water mark of resident memory is reset before the calls, and the peak is what the mark
rises above the memory resident before. Inputs and weights are not counted; gradients and everything saved are.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process, which ends after it.

    Raises:
        RuntimeError: the process was lost.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measurable(device: torch.device) -> bool:
    """Whether the system reports a peak; on the CPU only Linux does."""
    return device.type != "cpu" or CLEAR_REFS.exists()


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory rises during two calls, at most."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier is used again, and not counted
        before = _status("VmRSS")
        CLEAR_REFS.write_text("5")
    for _ in range(2):
        call()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")) - before


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

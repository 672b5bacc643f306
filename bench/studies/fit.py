"""Print the largest H that fits the CUDA C++ scan, by cell, dtype, and number of blocks that share W_hh.

Computed by the kernels' own plan (csrc/recurrent/cuda/plan.cpp) from a device's limits; docs/cuda-scan.md shows it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import torch

from fastseq import ops

DEVICES = {"H100, H200": [9, 132, 232448], "A100": [8, 108, 166912]}
"""Major compute capability, multiprocessors, bytes of shared memory that a block may have."""

CLUSTERS = (1, 2, 4, 8, 16)
CELLS = {"rnn_tanh": "RNN", "lstm": "LSTM", "gru": "GRU", "gru_reset_before": "GRU, reset before the product"}
DTYPES = {"bf16": "16 bits", "tf32": "float32 as TF32", "fp32": "float32"}
BATCH, STEP, LARGEST = 8, 8, 4096
COMMON_SIZES = (64, 128, 256, 512, 768, 1024, 1536, 2048)

Plan = Callable[[str, str, bool, int, int, list[int]], str]
"""``native_scan_plan``: cell, dtype, backward, hidden, batch, device."""
Role = Callable[[str, int, int, int], str]
"""``native_scan_role``: role, blocks, threads, rows."""


def largest(plan: Plan, cell: str, dtype: str, backward: bool, device: list[int]) -> int:
    """The largest H, a multiple of 8, that the role in force fits; 0 if none."""
    low, high = 0, LARGEST // STEP
    while low < high:
        middle = (low + high + 1) // 2
        if plan(cell, dtype, backward, middle * STEP, BATCH, device).startswith("role=step"):
            high = middle - 1
        else:
            low = middle
    return low * STEP


def table(plan: Plan, role: Role) -> Iterator[str]:
    """The tables as lines of Markdown."""
    yield f"Largest H that fits, forward / backward, with rows of the batch by {BATCH}:"
    yield ""
    names = [f"cluster of {n}" for n in CLUSTERS] + [f"grid, {name}" for name in DEVICES]
    yield f"| | {' | '.join(names)} |"
    yield "| --- |" + " ---: |" * len(names)
    for cell, name in CELLS.items():
        for dtype, bits in DTYPES.items():
            entries = []
            for wanted, blocks, device in [
                *(("cluster", n, DEVICES["H100, H200"]) for n in CLUSTERS),
                *(("grid", 0, device) for device in DEVICES.values()),
            ]:
                role(wanted, blocks, 0, 0)
                both = [largest(plan, cell, dtype, backward, device) for backward in (False, True)]
                entries.append(" / ".join(map(str, both)))
            yield f"| {name}, {bits} | {' | '.join(entries)} |"
    role("", 0, 0, 0)
    for name, device in DEVICES.items():
        yield ""
        yield f"What the plan takes on {name} at B = {BATCH}, forward / backward (c: blocks of a cluster; g: of a grid;"
        yield "\\*: one walk at a time, as half of the device does not hold it):"
        yield ""
        yield f"| | {' | '.join(f'H = {n}' for n in COMMON_SIZES)} |"
        yield "| --- |" + " --- |" * len(COMMON_SIZES)
        for cell, title in CELLS.items():
            for dtype, bits in DTYPES.items():
                entries = []
                for hidden in COMMON_SIZES:
                    entries.append(
                        " / ".join(_short(plan, cell, dtype, walk, hidden, device) for walk in (False, True))
                    )
                yield f"| {title}, {bits} | {' | '.join(entries)} |"


def _short(plan: Plan, cell: str, dtype: str, backward: bool, hidden: int, device: list[int]) -> str:
    major, multiprocessors, shared = device
    role, _, rest = plan(cell, dtype, backward, hidden, BATCH, device).removeprefix("role=").partition(" ")
    if role == "step":
        return role
    half = plan(cell, dtype, backward, hidden, BATCH, [major, multiprocessors // 2, shared])
    alone = "" if half.startswith(f"role={role} ") else "\\*"
    return role[0] + rest.removeprefix("blocks=").partition(" ")[0] + alone


def main(argv: list[str]) -> int:
    """Print the tables; needs the CUDA kernels built, but no GPU."""
    argparse.ArgumentParser(prog="python -m bench fit", description=(__doc__ or "").splitlines()[0]).parse_args(argv)
    if ops.NATIVE_CUDA_MISSING is not None:
        print(f"the CUDA kernels are not built: {ops.NATIVE_CUDA_MISSING}", file=sys.stderr)
        return 1
    print("\n".join(table(torch.ops.fastseq.native_scan_plan, torch.ops.fastseq.native_scan_role)))
    return 0

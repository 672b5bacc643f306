"""Peak memory of one training step, in a process of its own.

The kernel's high-water mark of resident memory is reset, two steps are made, and what the mark rose by above the
memory resident before is the peak: inputs and weights are not in it, gradients and everything saved are. The library
is warmed up beforehand on a case of two small steps, so that its code and thread stacks are not in it either.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path

from bench.cases import Case, Multihead, Recurrent, registry

CLEAR_REFS = Path("/proc/self/clear_refs")


def in_subprocess(case: Case, contestant: str, threads: int, backend: str | None) -> int | None:
    """Bytes; None where the system does not tell (it takes Linux) or the child failed."""
    if not CLEAR_REFS.exists():
        return None
    command = [sys.executable, "-m", "bench.peak", case.name, contestant, str(threads), backend or "auto"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return json.loads(child.stdout)["peak_bytes"] if child.returncode == 0 else None


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def miniature(case: Case) -> Case:
    """The same case on two steps, or 32 positions."""
    if isinstance(case, Recurrent):
        return dataclasses.replace(case, steps=2, batch=1)
    if isinstance(case, Multihead):
        return dataclasses.replace(case, steps=32, batch=1)
    return dataclasses.replace(case, batch=1, queries=32, keys=32)  # type: ignore[call-arg]


def child(name: str, contestant: str, threads: str, backend: str) -> int:
    """Peak of two calls of a contestant's first entrant."""
    import torch

    import fastseq
    from bench.peers import OURS, PEERS
    from bench.run import make_inputs

    torch.set_num_threads(int(threads))
    prepare = {OURS.name: OURS, **PEERS}[contestant].prepare
    with fastseq.use_backend(backend):
        small, case = miniature(registry()[name]), registry()[name]
        next(iter(prepare(small, make_inputs(small), int(threads)))).call()
        entrant = next(iter(prepare(case, make_inputs(case), int(threads))))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier is used again, and unseen
        before = status("VmRSS")
        CLEAR_REFS.write_text("5")
        for _ in range(2):
            entrant.call()
        return status("VmHWM") - before


if __name__ == "__main__":
    print(json.dumps({"peak_bytes": child(*sys.argv[1:5])}))

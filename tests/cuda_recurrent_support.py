"""The CUDA kernels of the scan on the emulated machine, as operators of torch: ``scan_forward.emulated`` on the CPU.

Everything but torch's own products and streams is what runs on a GPU: the operators, the plans, the launches and the
kernels. With ``--device cuda`` it is the real kernels, on the device as it is, that a test of these gets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from emulation import build

from fastseq import ops
from fastseq.ops import schemas

CUDA = build.ROOT / "csrc" / "recurrent" / "cuda"
TORCH = Path(torch.__file__).parent
# As setup.py compiles what talks to torch.
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000", f"-isystem{TORCH / 'include'}",
       f"-isystem{sysconfig.get_path('include')}"]  # fmt: skip


missing = pytest.mark.skipif(
    devices.DEVICE == "cpu" and (build.compiler() is None or ops.NATIVE_MISSING is not None),
    reason="needs a C++ compiler and the CPU extension",
)
emulation_only = pytest.mark.interpreter_only
"""Of tests that ask for a device of their making, or look at what only the machine shows."""


def hook(name: str) -> Any:
    """``torch.ops.fastseq.native_scan_<name>`` of the kernels under test."""
    if devices.DEVICE == "cpu":
        library()
    op = getattr(torch.ops.fastseq, f"native_scan_{name}")
    return op.default if devices.DEVICE == "cuda" else op.emulated


@functools.lru_cache
def library() -> ctypes.CDLL:
    """Builds and loads the emulated operators; defines their schemas."""
    folders = [build.HERE, build.ROOT, build.ROOT / "csrc"]
    jobs = [(path, ["-O1", *ABI]) for path in sorted(CUDA.glob("*.c*")) if path.suffix in (".cu", ".cpp")]
    jobs = [job for job in jobs if job[0].name != "lanes.cu"]  # streams, in whose place stands:
    jobs += [(build.HERE / name, ["-O1", *ABI]) for name in ("recurrent_library.cpp", "recurrent_lanes.cpp")]
    jobs += [(build.HERE / name, build.MACHINE) for name in build.RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: build.compile_one(*job, folders), jobs))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = build.BUILD / f"recurrent-{name}.so"
    if not target.exists():
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        build.run([str(build.compiler()), "-shared", "-pthread", *map(str, objects), *libraries], target)
    for op, schema in {
        "scan_forward": schemas.SCAN_FORWARD,
        "scan_backward": schemas.SCAN_BACKWARD,
        "layers_forward": schemas.LAYERS_FORWARD,
        "layers_backward": schemas.LAYERS_BACKWARD,
        "native_scan_plan": schemas.NATIVE_SCAN_PLAN,
        "native_scan_role": schemas.NATIVE_SCAN_ROLE,
        "native_scan_schedule": schemas.NATIVE_SCAN_SCHEDULE,
        "native_scan_windows": schemas.NATIVE_SCAN_WINDOWS,
    }.items():
        torch.library.define(f"fastseq::{op}.emulated", schema)
    torch.ops.load_library(str(target))
    return ctypes.CDLL(str(target))


@contextlib.contextmanager
def machine(
    role: str = "", blocks: int = 0, threads: int = 0, rows: int = 0, *, seed: int = 0, schedule: int = build.IN_ORDER,
    major: int = 0, multiprocessors: int = 0, shared: int = 0, windows: int = 0, walkers: int = 0,
) -> Iterator[None]:  # fmt: skip
    """The emulated device and its schedule, and what is fixed of the plan; of a real device, that alone."""
    if devices.DEVICE == "cuda":
        assert (major, multiprocessors, shared) == (0, 0, 0), "a device has what it has"
        with fixed(role, blocks, threads, rows, windows, walkers):
            yield
        return
    setter = library().fastseq_emulation_set
    setter.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    setter(seed, schedule, 0, major, multiprocessors, shared)
    try:
        with fixed(role, blocks, threads, rows, windows, walkers):
            yield
    finally:
        setter(0, build.IN_ORDER, 0, 0, 0, 0)


@contextlib.contextmanager
def fixed(role: str, blocks: int, threads: int, rows: int, windows: int, walkers: int) -> Iterator[None]:
    """What the plan and the division of a stack would else choose."""
    hook("role")(role, blocks, threads, rows)
    hook("windows")(windows, walkers)
    try:
        yield
    finally:
        hook("role")("", 0, 0, 0)  # and windows with it


def plan(cell: str, dtype: torch.dtype, hidden: int, batch: int, backward: bool = False) -> dict[str, str]:
    """What the plan says of a problem, on the device and with the wishes of :func:`machine`."""
    wide = "tf32" if torch.ops.fastseq.one_tf32_product() else "fp32"
    name = {torch.float32: wide, torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    line = hook("plan")(cell, name, backward, hidden, batch, [])
    line, _, reason = line.partition(" reason=")
    return {**dict(part.split("=") for part in line.split()), "reason": reason}

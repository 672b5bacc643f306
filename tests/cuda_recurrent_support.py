"""The CUDA kernels of the scan on the emulated machine, as operators of torch: ``scan_forward.emulated`` on the CPU.

Everything but torch's own products is what runs on a GPU: the operators, the plans, the launches and the kernels.
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

import torch
from emulation import build

from fastseq import ops

CUDA = build.ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
# As setup.py compiles what talks to torch.
ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000", f"-isystem{TORCH / 'include'}",
       f"-isystem{sysconfig.get_path('include')}"]  # fmt: skip


@functools.lru_cache
def library() -> ctypes.CDLL:
    """Builds and loads the emulated operators; defines their schemas."""
    folders = [build.HERE, build.ROOT, CUDA, build.ROOT / "csrc"]
    jobs = [(path, ["-O1", *ABI]) for path in sorted(CUDA.glob("recurrent*.c*")) if path.suffix in (".cu", ".cpp")]
    jobs += [(build.HERE / "recurrent_library.cpp", ["-O1", *ABI])]
    jobs += [(build.HERE / name, build.MACHINE) for name in build.RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: build.compile_one(*job, folders), jobs))
    name = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:20]
    target = build.BUILD / f"recurrent-{name}.so"
    if not target.exists():
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        build.run([str(build.compiler()), "-shared", "-pthread", *map(str, objects), *libraries], target)
    for op, schema in (("scan_forward", ops.SCAN_FORWARD), ("scan_backward", ops.SCAN_BACKWARD)):
        torch.library.define(f"fastseq::{op}.emulated", schema)
    torch.library.define("fastseq::native_scan_plan.emulated", ops.NATIVE_SCAN_PLAN)
    torch.library.define("fastseq::native_scan_role.emulated", ops.NATIVE_SCAN_ROLE)
    torch.ops.load_library(str(target))
    return ctypes.CDLL(str(target))


@contextlib.contextmanager
def machine(
    role: str = "", blocks: int = 0, threads: int = 0, rows: int = 0, *, seed: int = 0, schedule: int = build.IN_ORDER,
    major: int = 0, multiprocessors: int = 0, shared: int = 0,
) -> Iterator[None]:  # fmt: skip
    """The emulated device and its schedule, and what is fixed of the plan."""
    setter = library().fastseq_emulation_set
    setter.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    setter(seed, schedule, 0, major, multiprocessors, shared)
    torch.ops.fastseq.native_scan_role.emulated(role, blocks, threads, rows)
    try:
        yield
    finally:
        torch.ops.fastseq.native_scan_role.emulated("", 0, 0, 0)
        setter(0, build.IN_ORDER, 0, 0, 0, 0)


def plan(cell: str, dtype: torch.dtype, hidden: int, batch: int, backward: bool = False) -> dict[str, str]:
    """What the plan says of a problem, on the device and with the wishes of :func:`machine`."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    library()
    line = torch.ops.fastseq.native_scan_plan.emulated(cell, name, backward, hidden, batch, [])
    line, _, reason = line.partition(" reason=")
    return {**dict(part.split("=") for part in line.split()), "reason": reason}

"""What is in fastseq/_native_cuda.abi3.so: the kernels of each target, their machine code, and the compiler's remarks.

The library was just brought up to date with csrc, so that nothing need be compiled again to look at it.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

import fastseq
from fastseq import ops

LIBRARY = Path(fastseq.__file__).with_name("_native_cuda.abi3.so")
OBJECTS = Path(__file__).resolve().parents[1] / "build" / "native" / "cuda"
TARGETS = ("sm_80", "sm_90a", "sm_100")


class Kernel(NamedTuple):
    target: str
    function: str  # as C++ spells it
    registers: int
    stack: int  # bytes a thread, of which spilled registers are a part
    local: int


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = importlib.util.find_spec("triton")
    folders = [] if found is None or found.origin is None else [Path(found.origin).parent / "backends/nvidia/bin"]
    return shutil.which("cuobjdump") or next((shutil.which("cuobjdump", path=str(f)) for f in folders), None)


def _dump(*arguments: str) -> str:
    command = [str(cuobjdump()), *arguments, str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels() -> list[Kernel]:
    found, target = [], ""
    pattern = r"^arch = (\w+)|^ Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for arch, function, *numbers in re.findall(pattern, _dump("-res-usage"), re.MULTILINE):
        if arch:
            target = arch
        else:
            found.append(Kernel(target, function, *map(int, numbers)))
    return found


def machine_code(target: str, functions: list[str]) -> dict[str, list[str]]:
    """The instructions of each function."""
    listing = _dump("-sass", "-arch", target, "-fun", ",".join(functions))
    parts = (part.partition("\n") for part in listing.split("\tFunction : ")[1:])
    return {name: re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.MULTILINE) for name, _, body in parts}


def remarks() -> dict[str, str]:
    """By source: what its compiler said, of those that made it say something."""
    return {path.stem: path.read_text() for path in sorted(OBJECTS.glob("*.remarks"))}


needs_library = pytest.mark.skipif(
    ops.NATIVE_CUDA_MISSING is not None, reason=f"needs a build with FASTSEQ_BUILD=cuda: {ops.NATIVE_CUDA_MISSING}"
)
needs_cuobjdump = pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")

"""The CUDA kernels as they were compiled for GPUs that are not there: the scan's all there, without spills or stack."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import fastseq
from fastseq import ops

LIBRARY = Path(fastseq.__file__).with_name("_native_cuda.abi3.so")
TARGETS = ("sm_80", "sm_90a", "sm_100")
MOST_REGISTERS = 128  # as many as 512 threads of a block can have
# Walks: three exchanges, the four cells whose code differs, three dtypes and TF32; the role `step`, whose products are
# torch's; sums.
KERNELS = {"resident_forward": 48, "resident_backward": 48, "forward_step": 12, "backward_step": 12, "add": 3}


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    return found


@pytest.mark.skipif(ops.NATIVE_CUDA_MISSING is not None, reason=f"no CUDA kernels: {ops.NATIVE_CUDA_MISSING}")
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is not installed")
def test_every_kernel_is_there_and_none_spills() -> None:
    dump = subprocess.run([str(cuobjdump()), "-res-usage", str(LIBRARY)], capture_output=True, text=True, check=True)
    counts: Counter[tuple[str, str]] = Counter()
    target = ""
    pattern = r"^arch = (\w+)|^ Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    for arch, function, registers, stack, local in re.findall(pattern, dump.stdout, re.MULTILINE):
        if arch:
            target = arch
            continue
        for kernel in KERNELS:
            if f"{len(kernel)}{kernel}I" in function:  # as C++ spells a template's name
                counts[target, kernel] += 1
                assert (stack, local) == ("0", "0"), f"{function} spills on {target}"
                assert int(registers) <= MOST_REGISTERS, f"{function} takes {registers} registers on {target}"
    assert counts == {(target, kernel): number for target in TARGETS for kernel, number in KERNELS.items()}


@pytest.mark.skipif(ops.NATIVE_CUDA_MISSING is not None, reason=f"no CUDA kernels: {ops.NATIVE_CUDA_MISSING}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_nothing_in_the_library_ends_the_process() -> None:
    """Where a template's host code calls a __device__ function, nvcc puts exit(1) for it, without a word."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    imported = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    assert "PyModule_Create2" in imported  # so these are its imports
    assert not imported & {"exit", "_exit", "_Exit", "quick_exit", "abort"}

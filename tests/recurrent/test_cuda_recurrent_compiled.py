"""The CUDA kernels as they were compiled for GPUs that are not there: the scan's all there, without spills or stack."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter

import cuda_library
import pytest
from cuda_library import LIBRARY, TARGETS

MOST_REGISTERS = 128  # as many as 512 threads of a block can have
# Walks: three exchanges, and two of them with options, of the five cells whose code differs, three dtypes and TF32; the
# role `step`, whose products are torch's, with options and without; sums.
KERNELS = {"resident_forward": 100, "resident_backward": 100, "forward_step": 30, "backward_step": 30, "add": 3}


@cuda_library.needs_library
@cuda_library.needs_cuobjdump
def test_every_kernel_is_there_and_none_spills() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for target, function, registers, stack, local in cuda_library.kernels():
        for kernel in KERNELS:
            if f"{len(kernel)}{kernel}I" in function:  # as C++ spells a template's name
                counts[target, kernel] += 1
                assert (stack, local) == (0, 0), f"{function} spills on {target}"
                assert registers <= MOST_REGISTERS, f"{function} takes {registers} registers on {target}"
    assert counts == {(target, kernel): number for target in TARGETS for kernel, number in KERNELS.items()}


@cuda_library.needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_nothing_in_the_library_ends_the_process() -> None:
    """Where a template's host code calls a __device__ function, nvcc puts exit(1) for it, without a word."""
    listing = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], capture_output=True, text=True, check=True)
    imported = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    assert "PyModule_Create2" in imported  # so these are its imports
    assert not imported & {"exit", "_exit", "_Exit", "quick_exit", "abort"}

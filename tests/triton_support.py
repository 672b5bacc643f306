"""Compiling Triton kernels ahead of time, for GPUs that are not there, and reading what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from sass import unset_registers
from triton.backends.compiler import GPUTarget

INTERPRETED = bool(triton.knobs.runtime.interpret)
# An interpreted kernel patches triton.language for good, so that each process runs either kind of test.
needs_interpreter = pytest.mark.device("triton")  # or a GPU, with --device cuda
interpreter_only = pytest.mark.interpreter_only  # beside it: drives the interpreter itself, and has no place on a GPU
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="runs in the process that compiles")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA = ["sm_80", "sm_90", "sm_100"]
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
"""Bytes of shared memory that one program may have. sm_89 is there for what depends on that: its code is sm_80's."""

# What multiplies matrices on the tensor cores: mma.sync, Hopper's wgmma, Blackwell's tcgen05, AMD's mfma.
_PRODUCT = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma_\w+)")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel for one target."""

    target: str
    shared: int
    registers: int
    spilled: int
    products: tuple[str, ...]
    text: str
    unset: tuple[str, ...] = ()  # instructions that read a register before anything is in it

    def check(self, *, tensor_cores: bool) -> None:
        """No spills, shared memory within the target's limit, matrix products on tensor cores where expected, and no
        value that the assembler lost."""
        assert not self.unset, f"{self.target}: registers are read unset: {'; '.join(self.unset)}"
        assert self.spilled == 0, f"{self.target}: {self.spilled} bytes spilled ({self.registers} registers)"
        assert self.shared <= SHARED_LIMIT[self.target], f"{self.target}: {self.shared} bytes of shared memory"
        if tensor_cores:
            assert self.products, f"{self.target}: no matrix product on tensor cores"


def compile_for(
    target: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 2,
    **options: Any,
) -> Compiled:
    """Compile a ``triton.jit`` function for one of TARGETS.

    Args:
        types: of every run-time argument by name: ``"*bf16"``, ``"*fp32"``, ``"*i64"``, ``"*i1"``, ``"i32"``;
            ``":16"`` after it says that the pointer or number is divisible by 16, as a launch finds it to be.
        constants: the values of the ``tl.constexpr`` arguments, and None for pointers that are absent.
    """
    names = kernel.arg_names
    assert set(types) | set(constants) == set(names), f"missing: {set(names) - set(types) - set(constants)}"
    signature = {name: types[name].partition(":")[0] if name in types else "constexpr" for name in names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if types.get(name, "").endswith(":16")
    }
    source = triton.compiler.ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    made = triton.compile(
        source, target=TARGETS[target], options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    return read(target, made)


def read(target: str, made: Any) -> Compiled:
    """What ``triton.compile`` made for one of TARGETS."""
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        registers, unset = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1]), ()
        # Scalars that find no register go into lanes of vector registers, not to memory: no spill.
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    else:
        text = made.asm["ptx"]
        registers, spilled, unset = _of_machine_code(made.asm["cubin"])
    products = tuple(_PRODUCT.findall(text))
    return Compiled(target, made.metadata.shared, registers, spilled, products, text, unset)


def _of_machine_code(cubin: bytes) -> tuple[int, int, tuple[str, ...]]:
    """Registers a thread; bytes of its stack and local memory, which a kernel without spills has none of; what reads a
    register unset."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        found = subprocess.run([tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", found)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], tuple(unset_registers(found))

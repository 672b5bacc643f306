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
from devices import COUNTS
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
    spilled_in_loops: int = 0
    """Instructions of the innermost loops of products that touch what was spilled."""

    def check(self, *, tensor_cores: bool, spills_outside: bool = False) -> None:
        """No spills, or (``spills_outside``) none in the loops that multiply; shared memory within the target's limit;
        matrix products on tensor cores where expected; and no value that the assembler lost."""
        assert not self.unset, f"{self.target}: registers are read unset: {'; '.join(self.unset)}"
        bad = self.spilled_in_loops if spills_outside else self.spilled
        assert bad == 0, (
            f"{self.target}: {self.spilled} bytes spilled ({self.registers} registers), "
            f"{self.spilled_in_loops} uses in loops"
        )
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
    COUNTS[f"Triton kernels compiled for {target}"] += 1
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        registers, unset = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1]), ()
        # Scalars that find no register go into lanes of vector registers, not to memory: no spill.
        spilled = sum(int(n) for n in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    else:
        text = made.asm["ptx"]
        sass = _dump(made.asm["cubin"], "-res-usage", "-sass")
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", sass)}
        registers, spilled = usage["REG"], usage["STACK"] + usage["LOCAL"]  # a kernel without spills has no stack
        unset = tuple(unset_registers(sass))
    products = tuple(_PRODUCT.findall(text))
    touched = 0 if not spilled else spilled if target.startswith("gfx") else _spilled_in_loops(sass)
    return Compiled(target, made.metadata.shared, registers, spilled, products, text, unset, touched)


def _dump(cubin: bytes, *options: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


_ON_TENSOR_CORES = re.compile(r"\b(?:HMMA|HGMMA|QGMMA|UTC\w*MMA)\b")


def _spilled_in_loops(sass: str) -> int:
    """How many instructions of the innermost loops of products touch local memory; 0 of a kernel without products."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass, re.MULTILINE)
    code = [(int(place, 16), text) for place, text in lines]
    branches = ((place, re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", text)) for place, text in code)
    loops = {(int(to[1], 16), place) for place, to in branches if to and int(to[1], 16) < place}
    # What waits out of line, past a loop's end, and goes back into its middle is none of its own.
    loops = {(a, b) for a, b in loops if not any(first < a <= last < b for first, last in loops)}
    bodies = {ends: [text for place, text in code if ends[0] <= place <= ends[1]] for ends in loops}
    multiplying = {ends: body for ends, body in bodies.items() if any(_ON_TENSOR_CORES.search(text) for text in body)}
    products = any(_ON_TENSOR_CORES.search(text) for _, text in code)
    assert multiplying or not products, "no loop of products found in the machine code"
    inner = [
        body for ends, body in multiplying.items()
        if not any(other != ends and ends[0] <= other[0] and other[1] <= ends[1] for other in multiplying)
    ]  # fmt: skip
    return sum(bool(re.search(r"\b(STL|LDL)\b", text)) for body in inner for text in body)

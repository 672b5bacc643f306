"""What the compiler made of the CUDA kernels of attention, as they are in the library: registers of every variant.

``python tests/cuda_attention_resources.py`` writes the table in docs/cuda-attention.md anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import cuda_library
from cuda_library import TARGETS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "cuda-attention.md"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
BEGIN, END = "<!-- resources: written by tests/cuda_attention_resources.py -->\n", "<!-- end of resources -->\n"


# Kernels for sm_90a alone; on other targets they are compiled to a trap.
HOPPER = "hopper_"


class Variant(NamedTuple):
    kernel: str
    heads: tuple[int, ...]
    flag: bool  # of the general class; of the forward kernel for Hopper: the large of two tiles

    @property
    def kind(self) -> str:
        if not self.heads:
            return "any"
        if self.kernel.startswith(HOPPER):
            return "plain, large tile" if self.flag else "plain"
        return "general" if self.flag else "plain"


class Made(NamedTuple):
    """Of both dtypes, the worse."""

    registers: int
    spilled: int  # bytes


# A kernel's name as C++ spells it.
NAME = r"attention\d+([a-z_]+)_kernel"


def variant_of(name: str) -> Variant:
    kernel = re.search(NAME, name)
    assert kernel is not None, name
    heads = tuple(int(n) for n in re.findall(r"Li(\d+)E", name)[:2])
    flag = "ELb1E" in name
    if kernel[1] == "hopper_gradient":  # its flag says of what
        return Variant("hopper_keys" if flag else "hopper_queries", heads, False)
    return Variant(kernel[1], heads, flag or kernel[1] == "bias")


def variants(target: str) -> dict[Variant, Made]:
    """All that there is for a target."""
    found: dict[Variant, Made] = {}
    for kernel in cuda_library.kernels():
        if kernel.target == target and re.search(NAME, kernel.function):
            variant = variant_of(kernel.function)
            made = Made(kernel.registers, kernel.stack + kernel.local)
            found[variant] = Made(*map(max, made, found.get(variant, made)))
    return found


def machine_code(kernel: str, target: str) -> dict[Variant, list[str]]:
    """The instructions of every variant of a kernel whose name begins so, of bfloat16."""
    functions = [
        k.function
        for k in cuda_library.kernels()
        if k.target == target and "Bf16" in k.function and re.search(rf"attention\d+{kernel}", k.function)
    ]
    return {variant_of(name): code for name, code in cuda_library.machine_code(target, functions).items()}


def shared_bytes() -> dict[Variant, int]:
    """Dynamic shared memory, asked of the shapes in attention_table.cuh."""
    import ctypes

    from attention_emulated import library

    numbers = (ctypes.c_int64 * 1024)()
    entry = library("").native.attention_shared_entry
    entry((ctypes.c_void_p * 1)(ctypes.addressof(numbers)), None, None)
    found, at = {}, 0
    kernels = ("forward", "decode", "keys", "queries", "bias", "hopper_forward", "hopper_keys", "hopper_queries")
    while numbers[at]:
        kernel, dim, dim_v, flag, size = numbers[at : at + 5]
        found[Variant(kernels[kernel - 1], (dim, dim_v), bool(flag))] = size
        at += 5
    return found


def table() -> str:
    """The table as it stands in the document."""
    made = {target: variants(target) for target in TARGETS}
    shared = shared_bytes()
    lines = [f"| kernel | heads | class | shared, KiB | {' | '.join(f'registers, {t}' for t in TARGETS)} |\n"]
    lines.append("| --- | --- | --- | --- " + "| --- " * len(TARGETS) + "|\n")
    for variant in sorted(made[TARGETS[0]]):
        heads = "/".join(map(str, variant.heads)) or "any"
        size = f"{shared[variant] / 1024:.1f}" if variant in shared else "–"
        compiled = [t == "sm_90a" or not variant.kernel.startswith(HOPPER) for t in TARGETS]
        registers = " | ".join(
            str(made[target][variant].registers) if real else "–"
            for target, real in zip(TARGETS, compiled, strict=True)
        )
        lines.append(f"| {variant.kernel} | {heads} | {variant.kind} | {size} | {registers} |\n")
    return "".join(lines)


def write() -> None:
    head, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(head + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    write()

"""What the compiler made of the CUDA kernels of attention, as they are in the library: registers of every variant, and
what a step of each kernel for Hopper takes.

``python tests/cuda_attention_resources.py`` writes the tables in docs/cuda-attention.md anew.
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
MARKS = {
    name: (f"<!-- {name}: written by tests/cuda_attention_resources.py -->\n", f"<!-- end of {name} -->\n")
    for name in ("resources", "steps")
}


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
    """The instructions of every variant of a kernel whose name begins so, not those of float16."""
    functions = [
        k.function
        for k in cuda_library.kernels()
        if k.target == target and "Fp16" not in k.function and re.search(rf"attention\d+{kernel}", k.function)
    ]
    return {variant_of(name): code for name, code in cuda_library.machine_code(target, functions).items()}


def shared_bytes() -> dict[Variant, int]:
    """Dynamic shared memory, asked of the shapes in table.cuh."""
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


class Step(NamedTuple):
    """One pass of a kernel's loop for Hopper: a tile of rows of the other side, all warpgroups of a block. In cycles of
    a multiprocessor, each of 2048 multiply-adds, 128 bytes of shared memory, 16 exponentials, 4 instructions.
    """

    rows: int
    products: int
    shared: int  # operands, and the tile as it is brought; not what few loads and stores there are besides
    exponentials: int
    instructions: int


def step(variant: Variant, code: list[str]) -> Step:
    """Of the innermost loop in which products run under others' arithmetic, without the branch that hides scores of a
    tile that few see."""
    jumps = [
        (n, int(found[1], 16) // 16) for n, i in enumerate(code) if (found := re.search(r"\bBRA.* 0x(\w+)\s*$", i))
    ]
    loops = [code[to : n + 1] for n, to in jumps if to < n]
    loop = min((x for x in loops if any("DEPBAR.LE gsb0, 0x1" in i for i in x)), key=len)
    first = next(n for n in range(len(code)) if code[n : n + len(loop)] == loop)
    skipped = [code[n + 1 : to] for n, to in jumps if first <= n < to <= first + len(loop)]
    hidden = [len(x) for x in skipped if any("FSEL" in i for i in x) and not any("HGMMA" in i for i in x)]
    products = re.findall(r"HGMMA\.64x(\d+)x16\S* R\d+, (R|gdesc)", "\n".join(loop))
    (rows,) = {int(n) for n, a in products if a == "gdesc"}  # scores: both operands in shared memory
    groups = 3 if variant.flag and variant.heads[0] == 64 else 2
    operands = sum(32 * int(n) + (2048 if a == "gdesc" else 0) for n, a in products)
    return Step(
        rows,
        groups * sum(int(n) // 2 for n, _ in products),
        (groups * operands + 2 * rows * sum(variant.heads)) // 128,
        groups * 8 * sum("MUFU.EX2" in i for i in loop),
        groups * (len(loop) - max(hidden, default=0)),
    )


def steps_table() -> str:
    head = ["kernel", "heads", "class", "rows", *Step._fields[1:]]
    lines = [f"| {' | '.join(head)} |\n", "| --- " * len(head) + "|\n"]
    found = machine_code("hopper_forward", "sm_90a") | machine_code("hopper_gradient", "sm_90a")
    for variant, code in sorted(found.items()):
        name = [variant.kernel, "/".join(map(str, variant.heads)), variant.kind]
        lines.append(f"| {' | '.join(map(str, [*name, *step(variant, code)]))} |\n")
    return "".join(lines)


TABLES = {"resources": table, "steps": steps_table}


def documented(name: str) -> str:
    """A table as it stands in the document."""
    begin, end = MARKS[name]
    return DOCUMENT.read_text().partition(begin)[2].partition(end)[0]


def write() -> None:
    for name, make in TABLES.items():
        begin, end = MARKS[name]
        head, _, rest = DOCUMENT.read_text().partition(begin)
        DOCUMENT.write_text(head + begin + make() + end + rest.partition(end)[2])


if __name__ == "__main__":
    write()

"""What the compiler makes of the CUDA kernels of attention: registers, spills and warnings of every variant.

``python tests/cuda_attention_resources.py`` writes the table in docs/cuda-attention.md anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
DOCUMENT = ROOT / "docs" / "cuda-attention.md"
BUILD = ROOT / "build" / "ptxas"
TARGETS = ("sm_80", "sm_90a", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024, "sm_100": 227 * 1024}
SOURCES = sorted(CUDA.glob("attention*.cu"))
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
    spilled: int  # bytes, stores and loads


def nvcc() -> str | None:
    return shutil.which(os.environ.get("NVCC", "nvcc"))


def disassembler() -> str | None:
    """cuobjdump, of the toolkit or of Triton."""
    found = importlib.util.find_spec("triton")
    folders = [] if found is None or found.origin is None else [Path(found.origin).parent / "backends/nvidia/bin"]
    return shutil.which("cuobjdump") or next((shutil.which("cuobjdump", path=str(f)) for f in folders), None)


def machine_code(source: Path, target: str) -> dict[Variant, list[str]]:
    """The instructions of every variant, of bfloat16."""
    listing(source, target)
    command = [str(disassembler()), "-sass", str(kept_as(source, target).with_suffix(".cubin"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("\tFunction : ")[1:]:
        name, _, body = part.partition("\n")
        if "Bf16" in name:
            found[variant_of(name)] = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", body, re.MULTILINE)
    return found


def kept_as(source: Path, target: str) -> Path:
    digest = hashlib.sha256(f"{source.name} {target}".encode())
    for path in sorted([*CUDA.glob("attention*.cu*"), *CUDA.glob("attention*.h"), *CUDA.glob("primitives*")]):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILD / f"{source.stem}-{target}-{digest.hexdigest()[:20]}.txt"


def listing(source: Path, target: str) -> str:
    """What ptxas says of a source, kept in build/ptxas, beside its code, until a kernel's text changes."""
    kept = kept_as(source, target)
    if not kept.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            command = [
                str(nvcc()),
                "-std=c++17",
                "-O3",
                f"-I{ROOT / 'csrc'}",
                f"-arch={target}",
                "-cubin",
                "-Xptxas=-v",
            ]
            done = subprocess.run(
                [*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{source.name} for {target}: {done.stdout}{done.stderr}")
            Path(folder, "text").write_text(done.stdout + done.stderr)
            os.replace(Path(folder, "out.cubin"), kept.with_suffix(".cubin"))
            os.replace(Path(folder, "text"), kept)
    return kept.read_text()


def variant_of(name: str) -> Variant:
    kernel = re.search(r"attention\d+([a-z_]+)_kernel", name)
    assert kernel is not None, name
    heads = tuple(int(n) for n in re.findall(r"Li(\d+)E", name)[:2])
    flag = "ELb1E" in name
    if kernel[1] == "hopper_gradient":  # its flag says of what
        return Variant("hopper_keys" if flag else "hopper_queries", heads, False)
    return Variant(kernel[1], heads, flag or kernel[1] == "bias")


def read(text: str) -> dict[Variant, Made]:
    """Every kernel of a listing."""
    found: dict[Variant, Made] = {}
    pattern = r"entry function '(\S+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    for name, stores, loads, registers in re.findall(pattern, text, re.DOTALL):
        variant = variant_of(name)
        made = Made(int(registers), int(stores) + int(loads))
        found[variant] = Made(*map(max, made, found.get(variant, made)))
    return found


def everything(target: str) -> tuple[dict[Variant, Made], list[str]]:
    """All variants for a target, and the warnings that came with them."""
    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(lambda source: listing(source, target), SOURCES))
    variants: dict[Variant, Made] = {}
    for text in texts:
        variants |= read(text)
    return variants, [line for text in texts for line in text.splitlines() if "warning" in line or "C75" in line]


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
    made = {target: everything(target)[0] for target in TARGETS}
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

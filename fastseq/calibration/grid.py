"""Which calls are tried and timed: self-tests on small odd shapes, and calls that stand for their kinds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import product

from fastseq.backend import operator_reason
from fastseq.calibration.calls import AttentionShape, ScanShape, Shape
from fastseq.calibration.chosen import OURS
from fastseq.calibration.file import Trial
from fastseq.recurrent.cells import CELLS

FLOATS = ("float32", "bfloat16", "float16")


def ours(device: str, op: str) -> list[str]:
    """Our kernels that a type of device has for an operation."""
    return [name for name in OURS if operator_reason(name, device, op) is None]


# --- self-tests -------------------------------------------------------------------------------------------------------

_SCANS = (
    ScanShape("lstm", "float32", 7, 3, 5, 19, training=True),
    ScanShape("lstm", "float32", 1, 9, 24, 40, training=True),
    ScanShape("lstm", "float32", 21, 17, 32, 64, layers=2, directions=2, lengths=True, reset=True, training=True),
    ScanShape("lstm", "float32", 33, 2, 48, 160, biases=False),
)
_ATTENTION = (
    AttentionShape("float32", 2, 4, 2, 33, 47, 40, 40, causal=True, training=True),
    AttentionShape("float32", 1, 4, 1, 70, 70, 64, 64, causal=True, left=20, right=0, training=True),
    AttentionShape("float32", 2, 2, 2, 37, 65, 64, 32, mask="b11k", training=True),
    AttentionShape("float32", 2, 4, 2, 40, 40, 64, 64, softcap=True, sinks=True, bias="1hqk", training=True),
    AttentionShape("float32", 2, 4, 4, 24, 24, 16, 16, slopes=True, lengths=True, causal=True),
    AttentionShape("float32", 3, 4, 2, 50, 50, 128, 128, causal=True, packed=True, training=True),
    AttentionShape("float32", 2, 8, 2, 1, 600, 64, 64),
)


def self_tests(device: str, wanted: Collection[tuple[str, str]]) -> Iterator[Trial]:
    """All that must pass before a kernel of ours is chosen for an operation in a dtype, one after the other."""
    for op, dtype in wanted:
        for backend in ours(device, op):
            shapes: list[Shape] = [shape._replace(dtype=dtype) for shape in _ATTENTION]
            if op == "scan":
                scans = [shape._replace(dtype=dtype) for shape in _SCANS]
                shapes = [shape._replace(cell=cell.name) for cell in CELLS for shape in scans]
                if device != "cuda" or backend != "native":  # which have no projection
                    shapes.append(scans[0]._replace(projected=8))
            yield from (Trial(backend, shape) for shape in shapes)


# --- what is timed ----------------------------------------------------------------------------------------------------

_SCAN_SIZES = {
    "cpu": (
        (50, 32, 128, 128), (100, 1, 128, 128), (1, 1, 256, 256), (1, 32, 256, 256),
        (32, 64, 256, 256), (64, 4, 256, 256), (1, 1, 512, 512), (1, 64, 128, 128),
    ),
    "cuda": (
        (128, 64, 256, 256), (256, 4, 256, 256), (1, 1, 512, 512), (1, 64, 1024, 1024), (128, 64, 128, 128),
        (128, 16, 512, 512), (512, 1, 512, 512), (64, 32, 1024, 1024), (256, 2, 128, 128),
    ),
}  # fmt: skip
"""(T, B, I, H); the first of a kind is timed first."""

_HEADS = {
    "cpu": ((4, 8, 8, 128, 128, 64), (1, 8, 8, 1024, 1024, 64), (1, 8, 8, 1, 2048, 64), (4, 8, 2, 256, 256, 64)),
    "cuda": (
        (8, 16, 16, 512, 512, 64), (2, 16, 4, 2048, 2048, 128), (8, 32, 8, 1, 4096, 128), (4, 16, 16, 1024, 1024, 64),
    ),
}  # fmt: skip
"""(B, Hq, Hk, Tq, Tk, D)"""


def _scans(device: str) -> Iterator[ScanShape]:
    cells = [cell.name for cell in CELLS if not cell.not_in_torch or device == "cuda"]
    first = [cell for cell in ("lstm", "gru") if cell in cells]
    cells = first + [cell for cell in cells if cell not in first]
    for dtype, sizes, cell, training in product(FLOATS, _SCAN_SIZES[device], cells, (False, True)):
        yield ScanShape(cell, dtype, *sizes, training=training)
    for dtype, cell, training in product(FLOATS, cells, (False, True)):
        yield ScanShape(cell, dtype, *_SCAN_SIZES[device][0], lengths=True, training=training)
        if device == "cuda":  # two layers: no single one
            yield ScanShape(cell, dtype, *_SCAN_SIZES[device][0], layers=2, training=training)


def _attentions(device: str) -> Iterator[AttentionShape]:
    for dtype, sizes, training in product(FLOATS, _HEADS[device], (False, True)):
        queries = sizes[3]
        if training and queries == 1:
            continue
        yield AttentionShape(dtype, *sizes, sizes[-1], causal=queries > 1, training=training)
        if queries > 1:
            yield AttentionShape(dtype, *sizes, sizes[-1], causal=True, left=queries // 4, right=0, training=training)
            yield AttentionShape(dtype, *sizes, sizes[-1], mask="b11k", training=training)
        if queries == 1:
            yield AttentionShape(dtype, *sizes, sizes[-1], lengths=True)


def shapes(device: str, ops: Iterable[str]) -> list[Shape]:
    """Calls that stand for their kinds: first one of each, then the others; float32 before the 16-bit types."""
    found: list[Shape] = []
    for op in ops:
        found += _scans(device) if op == "scan" else _attentions(device)
    found.sort(key=lambda shape: FLOATS.index(shape.dtype))
    seen: dict[tuple[str, str], int] = {}
    turns: list[tuple[int, Shape]] = []
    for shape in found:
        key = shape.op, shape.kind(device)
        seen[key] = seen.get(key, 0) + 1
        turns.append((seen[key], shape))
    return [shape for turn, shape in sorted(turns, key=lambda pair: pair[0]) if turn <= 2]

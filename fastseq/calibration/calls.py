"""A call as calibration sees it: what it is made of, and the kind that it is of.

A kind here is finer than one of AUTO's: it has the dtype, and whether a gradient is wanted. A measurement of some calls
of a kind decides for all of it; one of a model's own calls decides for calls of the same shape. Of that, the numbers
of steps, sequences, queries and keys are rounded up to powers of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import auto
from fastseq.attn.call import AttentionCall
from fastseq.recurrent.cells import NUMBER

FEW_ROWS = 8
"""From so many sequences on, the products of a step are those of matrices."""

LARGEST = 1 << 40
DTYPES = ("float32", "bfloat16", "float16", "float64")
DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


class ScanShape(NamedTuple):
    """A stack of recurrent layers over ``steps`` and ``batch``. ``lengths``: also packed sequences."""

    cell: str
    dtype: str
    steps: int
    batch: int
    inputs: int
    hidden: int
    projected: int = 0
    layers: int = 1
    directions: int = 1
    biases: bool = True
    lengths: bool = False
    reset: bool = False
    training: bool = False

    @property
    def op(self) -> str:
        """``scan``, as AUTO names it."""
        return "scan"

    def autos_kind(self, device: str) -> str:
        """AUTO's own kind; on every GPU Hopper's, as it follows from what cuDNN does. ``device``: its type."""
        key, dtype, walks = auto.HOPPER if device == "cuda" else device, getattr(torch, self.dtype), self.walks
        return auto.scan_kind(
            key, self.cell, dtype, self.steps, self.batch, self.inputs, self.hidden, walks, self.lengths
        )

    @property
    def walks(self) -> int:
        """Layers times directions."""
        return self.layers * self.directions

    def kind(self, device: str) -> str:
        """The kind; ``device``: its type."""
        words = [self.cell, self.dtype]
        if self.training:
            words.append("training")
        autos = self.autos_kind(device)
        if autos:
            words.append(autos)
        if autos != auto.ONE_STEP and auto.holds(self.steps == 1):
            words.append(auto.ONE_STEP)
        if self.lengths:
            words.append("lengths")
        if auto.holds(self.batch < FEW_ROWS):
            words.append("few rows")
        return " ".join(words)

    def rounded(self) -> ScanShape:
        """The shape that stands for all with as many steps and sequences, rounded up to powers of two."""
        return self._replace(steps=_power_of_two(self.steps), batch=_power_of_two(self.batch))

    @property
    def name(self) -> str:
        """For tables."""
        more = {f"P{self.projected}": self.projected, f"L{self.layers}": self.layers > 1, "bi": self.directions > 1}
        more |= {"unbiased": not self.biases, "lengths": self.lengths, "reset": self.reset, "training": self.training}
        sizes = f"T{self.steps} B{self.batch} I{self.inputs} H{self.hidden}"
        return " ".join([self.cell, self.dtype, sizes, *(word for word, there in more.items() if there)])


class AttentionShape(NamedTuple):
    """A call of attention. ``mask``, ``bias``: which dimensions of ``[B, Hq, Tq, Tk]`` each has, as ``b11k``; empty
    where there is none. ``left``, ``right``: the window's limits, -1 for none. ``batch``: sequences, packed too."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    dim_v: int
    causal: bool = False
    bottom_right: bool = True
    left: int = -1
    right: int = -1
    softcap: bool = False
    sinks: bool = False
    slopes: bool = False
    mask: str = ""
    bias: str = ""
    lengths: bool = False
    packed: bool = False
    training: bool = False

    @property
    def op(self) -> str:
        """``attention``, as AUTO names it."""
        return "attention"

    @property
    def limits(self) -> bool:
        """Whether anything but ``causal`` and the mask says which keys are seen."""
        return self.left >= 0 or self.right >= 0 or self.lengths or self.packed

    @property
    def pairs(self) -> bool:
        """Whether something acts on single pairs of a query and a key."""
        return bool(self.mask or self.bias or self.slopes)

    def autos_kind(self, device: str) -> str:
        """AUTO's own kind, of devices on which attention has kinds. ``device``: its type."""
        if device != "cuda":
            return ""
        dtype = getattr(torch, self.dtype)
        return auto.attention_kind(dtype, self.queries, self.keys, self.pairs, self.limits, self.training)

    def kind(self, device: str) -> str:
        """The kind; it does not depend on the device."""
        words = [self.dtype]
        if self.training:
            words.append("training")
        if self.pairs:
            words.append("pairs")
        if self.limits:
            words.append(auto.LIMITS)
        if auto.holds(self.queries <= auto.FEW):
            words.append(auto.DECODING)
        elif auto.holds(self.keys < auto.LONG):
            words.append(auto.SHORT)
        return " ".join(words)

    def rounded(self) -> AttentionShape:
        """The shape that stands for all with as many sequences, queries and keys, rounded up to powers of two."""
        batch, queries, keys = map(_power_of_two, (self.batch, self.queries, self.keys))
        return self._replace(batch=batch, queries=queries, keys=keys)

    @property
    def name(self) -> str:
        """For tables."""
        more = {f"kv{self.kv_heads}": self.kv_heads != self.heads, f"Dv{self.dim_v}": self.dim_v != self.dim}
        more |= {name: getattr(self, name) for name in ("causal", "softcap", "sinks", "slopes", "lengths", "packed")}
        more |= {f"window {self.left},{self.right}": self.left >= 0 or self.right >= 0, "mask": bool(self.mask)}
        more |= {"bias": bool(self.bias), "training": self.training}
        sizes = f"B{self.batch} H{self.heads} Tq{self.queries} Tk{self.keys} D{self.dim}"
        return " ".join([self.dtype, sizes, *(word for word, there in more.items() if there)])


def attention_shape(call: AttentionCall, training: bool) -> AttentionShape | None:
    """A call of attention; None of those that are not timed: with dropout, pages, or lengths of prefixes."""
    if call.dropout_p > 0.0 or call.block_table is not None or call.prefix_lengths is not None:
        return None
    q, k, v = call.q, call.k, call.v
    packed = call.cu_seqlens_q is not None
    batch, queries, keys = q.shape[0], q.shape[-2], k.shape[-2]
    if call.cu_seqlens_q is not None:
        batch = max(1, call.cu_seqlens_q.shape[0] - 1)
        queries, keys = -(-q.shape[0] // batch), -(-k.shape[0] // batch)
    return AttentionShape(
        DTYPE_NAMES.get(q.dtype, ""), batch, q.shape[1], k.shape[1], queries, keys, q.shape[-1], v.shape[-1],
        causal=call.causal, bottom_right=call.bottom_right, left=call.window_left, right=call.window_right,
        softcap=call.softcap > 0.0, sinks=call.sinks is not None, slopes=call.alibi_slopes is not None,
        mask=_dimensions(call.mask), bias=_dimensions(call.bias),
        lengths=call.lengths_q is not None or call.lengths_k is not None, packed=packed, training=training,
    )  # fmt: skip


def _dimensions(pairs: Tensor | None) -> str:
    if pairs is None:
        return ""
    if torch.compiler.is_compiling():  # sizes may be open
        return "bhqk"
    return "".join("1" if size == 1 else letter for size, letter in zip(pairs.shape, "bhqk", strict=True))


Shape = ScanShape | AttentionShape
SHAPES: dict[str, type[Any]] = {"scan": ScanShape, "attention": AttentionShape}


def from_values(op: object, values: object) -> Shape:
    """The shape that ``list(shape)`` was.

    Raises:
        ValueError: no such shape.
    """
    of = SHAPES.get(op) if isinstance(op, str) else None
    if of is None or not isinstance(values, list) or len(values) != len(of._fields):
        raise ValueError(f"no call of {op!r}")
    for name, value in zip(of._fields, values, strict=True):
        annotation = of.__annotations__[name]
        wanted = str(getattr(annotation, "__forward_arg__", annotation))
        if type(value).__name__ != wanted or (type(value) is int and not -1 <= value <= LARGEST):
            raise ValueError(f"{op}: {name} is {value!r:.60}")
    shape: Shape = of(*values)
    if shape.dtype not in DTYPES or (isinstance(shape, ScanShape) and shape.cell not in NUMBER):
        raise ValueError(f"{op}: no such dtype or cell")
    return shape


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length() if size > 1 else size

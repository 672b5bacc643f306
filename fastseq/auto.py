"""AUTO: which backend comes first for a call that names none, by what was measured.

A call has a device key (``cpu``, ``cuda sm_90``), an operation (``scan``, ``attention``), and a kind: calls of a kind
are those among which the same backend is ahead. A kind is asked of shapes and types alone, never of data, so nothing
waits for a device; where ``torch.compile`` leaves a size open, what holds for every size counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from fastseq.recurrent.cells import NOT_IN_TORCH


@dataclass(frozen=True)
class Row:
    """One line of AUTO: calls of this kind (``""``: of any) run there, in this order, because of this."""

    device: str
    op: str
    kind: str
    order: tuple[str, ...]
    because: str

    @property
    def title(self) -> str:
        """What it is for, in one line."""
        return f"{self.device}, {self.op}" + f", {self.kind}" * bool(self.kind)


HOPPER = "cuda sm_90"

ONE_STEP = "one step"
"""On a GPU: a sequence of one step, so every cell and every model that streams."""

ON_CHIP = "on chip"
"""On a GPU: float16 and float32 layers for which torch takes cuDNN's persistent kernels, with the weights on the chip
(see :func:`cudnn_on_chip`)."""

LONE_FP32 = "lone float32"
"""On a GPU: one float32 layer, one direction, not packed. Ours keeps all digits, cuDNN those of TF32."""

OPTIONS = "options"
"""On a GPU: recurrent layers with a mask of the state, zoneout, a state to reset to, or normalisation."""

LIMITS = "limits"
"""Attention on a GPU with a window, lengths, or packed sequences: torch has these as a mask of all pairs, or not."""

UNTIMED = "not timed"
"""Attention on a GPU that has not been timed beside torch's: float32 and float64; what acts on single pairs (bias,
mask, slopes, dropout), for which Hopper has no kernels of its own; keys in pages."""

TRAINING = "training"
"""Attention on a GPU, a gradient wanted."""

DECODING = "decoding"
"""Attention on a GPU with few queries, at most ``FEW``."""

SHORT = "short"
"""Attention on a GPU over fewer than ``LONG`` keys."""

FEW, LONG = 16, 1024

_RECURRENT, _ATTENTION = (f"bench/results/nvidia-h200-{what}.json" for what in ("recurrent", "attention"))

AUTO: tuple[Row, ...] = (
    Row(
        "cpu",
        "scan",
        "",
        ("native", "torch", "reference"),
        "tested on every CPU run; at least as fast as torch in our benchmarks",
    ),
    Row(
        "cpu",
        "attention",
        "",
        ("native", "torch", "reference"),
        "tested on every CPU run; faster than torch in our benchmarks",
    ),
    Row(
        HOPPER,
        "scan",
        OPTIONS,
        ("torch", "reference"),
        "our kernels with these options are compiled, not yet run on such a GPU",
    ),
    Row(
        HOPPER,
        "scan",
        ONE_STEP,
        ("triton", "torch", "native", "reference"),
        f"one launch, product of x and all; ahead of cuDNN on an H200 ({_RECURRENT})",
    ),
    Row(
        HOPPER,
        "scan",
        ON_CHIP,
        ("torch", "native", "triton", "reference"),
        f"cuDNN's persistent kernels are ahead of ours on an H200 ({_RECURRENT})",
    ),
    Row(
        HOPPER,
        "scan",
        LONE_FP32,
        ("torch", "native", "triton", "reference"),
        f"cuDNN, in TF32 unless torch.backends.cudnn.allow_tf32 is off, is ahead of ours on an H200 ({_RECURRENT})",
    ),
    Row(
        HOPPER,
        "scan",
        "",
        ("native", "torch", "triton", "reference"),
        f"the weights stay on the chip for the whole sequence; ahead of cuDNN on an H200 ({_RECURRENT})",
    ),
    Row(
        HOPPER,
        "attention",
        UNTIMED,
        ("torch", "native", "triton", "reference"),
        "ours has not been timed beside torch's in such a call",
    ),
    Row(
        HOPPER,
        "attention",
        LIMITS,
        ("native", "torch", "triton", "reference"),
        f"torch would make a mask of all pairs, ours skips fully masked tiles; timed on an H200 ({_ATTENTION})",
    ),
    Row(
        HOPPER,
        "attention",
        TRAINING,
        ("torch", "native", "triton", "reference"),
        f"cuDNN's backward is ahead of ours on an H200 ({_ATTENTION})",
    ),
    Row(
        HOPPER,
        "attention",
        DECODING,
        ("torch", "native", "triton", "reference"),
        f"cuDNN is at least as fast as ours on an H200 ({_ATTENTION})",
    ),
    Row(
        HOPPER,
        "attention",
        SHORT,
        ("torch", "native", "triton", "reference"),
        f"cuDNN is ahead of ours on an H200 ({_ATTENTION})",
    ),
    Row(
        HOPPER,
        "attention",
        "",
        ("native", "torch", "triton", "reference"),
        f"ahead of cuDNN and flash attention on an H200 ({_ATTENTION})",
    ),
    Row("cuda", "scan", "", ("torch", "reference"), "our kernels are compiled, not yet run on such a GPU"),
    Row("cuda", "attention", "", ("torch", "reference"), "our kernels are compiled, not yet run on such a GPU"),
    Row("*", "scan", "", ("torch", "reference"), "no kernel of ours exists for this device"),
    Row("*", "attention", "", ("torch", "reference"), "no kernel of ours exists for this device"),
)
"""Measured facts, most specific first. A kernel of ours comes before torch only on a device whose files in
bench/results have its tests passed and this kind's cases no slower than the best peer's in their geometric mean:
``python -m bench auto`` lays both side by side, and a test holds the rows to it."""


def row(device: str, op: str, kind: str = "") -> Row:
    """AUTO's row for a device key, an operation (``scan`` or ``attention``) and a kind."""
    devices, kinds = (device, device.partition(" ")[0], "*"), (kind, "")
    return next(r for r in AUTO if r.op == op and r.device in devices and r.kind in kinds)


# --- devices ----------------------------------------------------------------------------------------------------------


def device_key(device: torch.device) -> str:
    """Where AUTO looks a device up: its type, and the compute capability of an NVIDIA GPU, ``cuda sm_90``."""
    return device.type if device.type != "cuda" else _cuda_key(device.index or 0)


def _cuda_key(index: int) -> str:
    found = capability(index)
    return "cuda" if found is None else f"cuda sm_{found[0]}{found[1]}"


_cuda_key._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def capability(index: int) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU, asked once; None for AMD's, and where tensors name a GPU that is not there
    (those of ``FakeTensorMode`` may)."""
    if torch.version.hip is not None or not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_capability(index)


# --- kinds ------------------------------------------------------------------------------------------------------------


def scan_kind(
    device: str,
    cell: str,
    dtype: torch.dtype,
    steps: int,
    batch: int,
    inputs: int,
    hidden: int,
    walks: int,
    packed: bool,
) -> str:
    """The kind of a stack of recurrent layers; ``walks``: its layers times directions."""
    if device != HOPPER:
        return ""
    if holds(steps == 1):
        return ONE_STEP
    if packed or NOT_IN_TORCH[cell]:  # for which cuDNN has nothing of the kind
        return ""
    if cudnn_on_chip(cell, dtype, batch, inputs, hidden, walks):
        return ON_CHIP
    return LONE_FP32 if dtype is torch.float32 and walks == 1 else ""


def cudnn_on_chip(cell: str, dtype: torch.dtype, batch: int, inputs: int, hidden: int, walks: int) -> bool:
    """Whether torch has cuDNN keep the weights of a layer that is not packed on the chip: small ones of float16 and
    float32; single ones of float16, of plain widths, a batch that 8 divides, and no GRU."""
    if dtype not in (torch.float16, torch.float32):
        return False
    if hidden <= (384 if cell.startswith("rnn") else 192):
        return True
    if dtype is torch.float32 or walks > 1 or cell.startswith("gru"):
        return False
    return hidden % 128 == inputs % 128 == 0 and hidden <= 1024 and holds(batch % 8 == 0) and holds(batch <= 128)


ATTENTION_KINDS = frozenset({HOPPER})
"""Devices on which attention has kinds."""


def attention_kind(dtype: torch.dtype, queries: int, keys: int, untimed: bool, limits: bool, training: bool) -> str:
    """The kind of a call of attention, where there are kinds.

    Args:
        untimed: it has a bias, mask, slopes, dropout or pages.
        limits: it has a window, lengths or packed sequences.
        training: a gradient is wanted.
    """
    if untimed or dtype not in (torch.bfloat16, torch.float16):
        return UNTIMED
    if limits:
        return LIMITS
    if training:
        return TRAINING
    if holds(queries <= FEW):
        return DECODING
    return SHORT if holds(keys < LONG) else ""


def holds(condition: bool) -> bool:
    """Whether it does; of a size that a traced call leaves open, whether it does for all: nothing is specialised."""
    if torch.compiler.is_compiling() or not isinstance(condition, bool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return condition

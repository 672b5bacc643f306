"""The CUDA C++ kernels of attention on the emulated machine, as operators: ``torch.ops.fastseq.attention_*.emulated``.
With ``--device cuda`` it is the real kernels, on the device as it is, that a test of these gets.

Everything from the operators down is what runs on a GPU: the checks of tensors, the plans, the launches, the kernels.
Where a test asks for what an operator would not choose, or for a sanitizer, the kernels are called past the operators.
``settings`` says how the next calls are scheduled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import devices
import torch
from cuda_recurrent_support import ABI, TORCH
from emulation import build
from torch import Tensor

from fastseq import ops
from fastseq.ops import attention as ops_attention
from fastseq.ops.define import define

CUDA = build.ROOT / "csrc" / "attention" / "cuda"
SOURCES = [
    *sorted(CUDA.glob("*.cu")),
    CUDA / "plan.cpp",
    build.HERE / "attention_entries.cpp",
]
NUMBERS = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass
class Settings:
    """Of the emulated machine, and of the choices that a call leaves open."""

    seed: int = 0
    schedule: int = build.IN_ORDER
    sanitizer: str = ""
    decode: bool = True  # whether few queries take the decoding kernel
    multiprocessors: int = 4  # few, so that work is shared as on a large machine
    major: int = 8  # compute capability: 9 takes the kernels for Hopper
    changed: build.Library | None = None  # kernels with a fault in them

    @property
    def past_operators(self) -> bool:
        return not self.decode or self.sanitizer != "" or self.changed is not None


settings = Settings()


@cache
def library(sanitizer: str) -> build.Library:
    return build.Library(SOURCES, sanitizer)


@cache
def operators() -> ctypes.CDLL:
    """Builds and loads the operators over emulated kernels, as overloads of their own."""
    folders = [build.HERE, build.ROOT, build.ROOT / "csrc"]
    jobs = [(path, ["-O1"]) for path in SOURCES[:-1]]
    facing_torch = (CUDA / "ops.cpp", CUDA.parent / "marshal.cpp", build.HERE / "attention_library.cpp")
    jobs += [(path, ["-O1", *ABI]) for path in facing_torch]
    jobs += [(build.HERE / name, build.MACHINE) for name in build.RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: build.compile_one(*job, folders), jobs))
    target = build.BUILD / f"attention-{hashlib.sha256(' '.join(o.name for o in objects).encode()).hexdigest()[:20]}.so"
    if not target.exists():
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        build.run([str(build.compiler()), "-shared", "-pthread", *map(str, objects), *libraries], target)
    for name in ("attention_forward", "attention_backward"):
        torch.library.define(f"fastseq::{name}.emulated_tensors", ops.SCHEMAS[f"{name}.native"])
    torch.ops.load_library(str(target))
    return ctypes.CDLL(str(target))


def through_operators(op: str, arguments: tuple) -> tuple[Tensor, ...]:
    setter = operators().fastseq_emulation_set
    setter.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
    setter(settings.seed, settings.schedule, 0, settings.major, settings.multiprocessors, 0)
    return getattr(torch.ops.fastseq, op).emulated_tensors(*arguments)


def span(x: Tensor | None) -> Tensor | None:
    """All memory from a tensor's first element to its last, as one row."""
    if x is None or x.numel() == 0:
        return None
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((size,), (1,))


def strides(x: Tensor | None) -> list[int]:
    """0 where there is one index only, whatever the tensor says."""
    return [] if x is None else [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]


def view(x: Tensor | None, packed: bool) -> tuple[Tensor | None, list[int]]:
    """[B,H,T,D] or packed [T,H,D]: where it lies, and strides of batch, head and row."""
    own = strides(x)
    return span(x), [0, 0, 0] if x is None else [0, own[1], own[0]] if packed else own[:3]


def row_view(x: Tensor | None, packed: bool) -> tuple[Tensor | None, list[int]]:
    """[B,H,T] or packed [H,T]."""
    own = strides(x)
    return span(x), [0, 0, 0] if x is None else [0, *own] if packed else own


def with_unit_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


class Arguments:
    """What an entry is called with, in the order in which attention_entries.cpp reads it."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor,
        bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, prefix_lengths, cu_seqlens_q, cu_seqlens_k,
        block_table, k_scale, v_scale, seed, scale: float, causal: bool, bottom_right: bool, window_left: int,
        window_right: int, softcap: float, dropout_p: float,
    ) -> None:  # fmt: skip
        self.packed = cu_seqlens_q is not None
        length = 0 if self.packed else 2
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.integers = [
            NUMBERS[q.dtype],
            *(NUMBERS[torch.float32 if x is None else x.dtype] for x in (bias, sinks)),
            batch, q.shape[1], k.shape[1], q.shape[length], k.shape[length], q.shape[-1], v.shape[-1],
            causal, bottom_right, window_left, window_right,
        ]  # fmt: skip
        self.pointers: list[Tensor | None] = []
        for x in (q, k, v):
            self.add(view(with_unit_rows(x), self.packed))
        for pairs in (bias, None if mask is None else mask.view(torch.uint8)):
            self.add((span(pairs), strides(pairs) or [0] * 4))
        self.pointers += [
            None if x is None else x.contiguous()
            for x in (sinks, alibi_slopes, lengths_q, lengths_k, prefix_lengths, cu_seqlens_q, cu_seqlens_k, seed)
        ]
        self.reals = [scale, softcap, dropout_p]

    def add(self, viewed: tuple[Tensor | None, list[int]]) -> None:
        self.pointers.append(viewed[0])
        self.integers += viewed[1]

    def call(self, entry: str) -> None:
        error = (settings.changed or library(settings.sanitizer)).call(
            entry, self.pointers, self.integers, self.reals, seed=settings.seed, schedule=settings.schedule
        )
        if error is not None:
            raise RuntimeError(error)


def forward_arguments(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Arguments, Tensor, Tensor]:
    x = Arguments(q, k, v, *options)
    o = ops_attention.empty_as(q, v.shape[-1])
    lse = torch.empty((q.shape[1], q.shape[0]) if x.packed else q.shape[:3], dtype=torch.float32)
    x.add(view(o, x.packed))
    x.add(row_view(lse, x.packed))
    x.integers += [settings.decode, settings.multiprocessors, 10 * settings.major]
    return x, o, lse


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if not settings.past_operators:
        return through_operators("attention_forward", (q, k, v, *options))
    x, o, lse = forward_arguments(q, k, v, *options)
    if lse.numel():
        x.call("attention_forward_entry")
    return o, lse


def hopper_refusal(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str | None:
    """Why the forward kernel for Hopper leaves a call to the portable one; None where it takes it."""
    try:
        forward_arguments(q, k, v, *options)[0].call("hopper_refusal_entry")
    except RuntimeError as reason:
        return str(reason)
    return None


def hopper_order(q: Tensor, k: Tensor, v: Tensor, *options: Any, gradients_of: str = "") -> list[list[tuple[int, int]]]:
    """Each block's tiles (head, tile) of 128 rows, in its order: of the forward kernel, or of the gradients of "keys"
    or "queries"."""
    x, _, _ = forward_arguments(q, k, v, *options)
    heads, length = (k.shape[1], k.shape[2]) if gradients_of == "keys" else (q.shape[1], q.shape[2])
    rounds = -(-q.shape[0] * heads * -(-length // 128) // settings.multiprocessors)
    order = torch.empty(settings.multiprocessors, rounds, 2, dtype=torch.int32)
    x.pointers.append(order)
    x.integers += [gradients_of != "", gradients_of == "keys"]
    x.call("hopper_order_entry")
    return [[(head, tile) for head, tile in block if head >= 0] for block in order.tolist()]


def backward(
    d_o: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    if not settings.past_operators:
        return through_operators("attention_backward", (d_o, dlse, q, k, v, o, lse, *rest))
    x, gradients = backward_arguments(d_o, dlse, q, k, v, o, lse, *rest)
    x.call("attention_backward_entry")
    return gradients


def backward_refusal(*arguments: Any) -> str | None:
    """Why the kernels for Hopper leave a call of ``backward`` to the portable ones."""
    try:
        backward_arguments(*arguments)[0].call("attention_backward_refusal_entry")
    except RuntimeError as reason:
        return str(reason)
    return None


def backward_arguments(
    d_o: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any
) -> tuple[Arguments, tuple[Tensor, ...]]:
    """What the entry is called with, and the gradients that it fills."""
    *options, bias_grad = rest
    bias, _, sinks = options[:3]
    x = Arguments(q, k, v, *options)
    for rows in (with_unit_rows(o), with_unit_rows(d_o)):
        x.add(view(rows, x.packed))
    x.add(row_view(lse.contiguous(), x.packed))
    x.add(row_view(None if dlse is None else dlse.contiguous(), x.packed))
    dq, dk, dv = (ops_attention.empty_as(t, t.shape[-1]) for t in (q, k, v))
    for gradient in (dq, dk, dv):
        x.add(view(gradient, x.packed))
    dbias = torch.empty(bias.shape, dtype=bias.dtype) if bias_grad else torch.empty(0, dtype=q.dtype)
    dsinks = torch.empty(0, dtype=q.dtype) if sinks is None else torch.empty(sinks.shape, dtype=sinks.dtype)
    x.pointers += [dbias if bias_grad else None, None if sinks is None else dsinks]
    x.integers += [*(dbias.shape if bias_grad else [0] * 4), settings.multiprocessors, 10 * settings.major]
    return x, (dq, dk, dv, dbias, dsinks)


@cache
def register() -> None:
    """Defines the operators; once a process."""
    for name, fake, run in (
        ("attention_forward", ops_attention.fake_attention_forward, forward),
        ("attention_backward", ops_attention.fake_attention_backward, backward),
    ):
        define(name, fake, None, ("emulated",))
        torch.library.impl(f"fastseq::{name}.emulated", "CPU", run)


@contextlib.contextmanager
def emulating(major: int) -> Iterator[None]:
    """The operators are there, of a machine of this compute capability; ``settings`` are put back afterwards."""
    if devices.DEVICE == "cpu":
        register()
    before = dict(vars(settings))
    settings.major = major
    yield
    vars(settings).update(before)

"""The attention kernels compiled as a launch would compile them, for GPUs that are not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from attention_operators import Options, arguments
from fastseq.kernels.attention import launch as attention_launch
from fastseq.kernels.attention.launch import Plan, Problem
from torch import Tensor
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton_support import TARGETS, Compiled, read


def specialized(x: Any, specialize: bool) -> tuple[Any, Any]:
    """The type of an argument and what a launch takes for a constant of the kernel, asked of Triton's own launcher."""
    return native_specialize_impl(CUDABackend, x, False, specialize, True)


def places(path: tuple[int, ...], kind: Any, key: Any) -> Iterator[tuple[tuple[int, ...], Any, Any]]:
    """Every leaf of an argument: its place, its type and its key."""
    if isinstance(kind, tuple):
        for n, element in enumerate(kind):
            yield from places((*path, n), element, key[n])
    else:
        yield path, kind, key


def signature(plan: Plan) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """The types of a launch's arguments by name, its constants and its attributes by place: what a variant is."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for n, parameter in enumerate(plan.kernel.params):
        x = plan.arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[(n,)] = "constexpr", x
            continue
        kind, key = specialized(x, not parameter.do_not_specialize)
        types[parameter.name] = kind
        for path, own, what in places((n,), kind, key):
            if own == "constexpr":
                constants[path] = what
            elif what == "D":
                attributes[path] = [["tt.divisibility", 16]]
    return types, constants, attributes


def variant(plan: Plan) -> tuple:
    """What tells one compiled kernel from another."""
    return plan.kernel.__name__, *map(repr, signature(plan)), repr(plan.options)


def compile_plan(target: str, plan: Plan) -> Compiled:
    source = triton.compiler.ASTSource(plan.kernel, *signature(plan))
    made = triton.compile(source, target=TARGETS[target], options=plan.options)
    return read(target, made)


_LABEL = re.compile(r"^\s*(\$L__BB\d+_\d+|\.LBB\d+_\d+):", re.MULTILINE)
_BRANCH = re.compile(r"(?:\bbra(?:\.uni)?|\bs_c?branch\w*)\s+(\$L__BB\d+_\d+|\.LBB\d+_\d+)")


def loops(text: str) -> list[str]:
    """The bodies of the loops in a listing: what lies between a label and a branch back to it."""
    places = {found[1]: found.start() for found in _LABEL.finditer(text)}
    backward = ((places[found[1]], found.start()) for found in _BRANCH.finditer(text) if found[1] in places)
    return [text[label:branch] for label, branch in backward if label < branch]


def plans(
    machine: str, dtype: torch.dtype, options: Options, dim: int, dim_v: int, *, queries: int = 256, keys: int = 256,
    batch: int = 2, heads: int = 4, heads_k: int = 2, backward: bool = True, pages: Tensor | None = None,
    describable: bool = True,
) -> list[Plan]:  # fmt: skip
    """Every launch of a forward and backward pass; nothing is computed. With ``pages``, a block_table, k and v are
    pools of pages of ``keys`` rows. ``describable``: whether TMA may read the tensors."""
    packed = options.get("cu_seqlens_q") is not None

    def make(heads: int, length: int, dim: int) -> Tensor:
        return torch.empty((length, heads, dim) if packed else (batch, heads, length, dim), dtype=dtype)

    q, k, v = make(heads, queries, dim), make(heads_k, keys, dim), make(heads_k, keys, dim_v)
    if pages is not None:
        k, v = (torch.empty(9, keys, heads_k, d, dtype=dtype).transpose(1, 2) for d in (dim, dim_v))
    x = Problem(q, k, v, *arguments({**options, "block_table": pages}), machine=machine)
    if not describable:
        x.describable = lambda *_: False  # type: ignore[method-assign]
    o = make(heads, queries, dim_v)
    lse = torch.empty(attention_launch.row_sizes(x))
    found = list(attention_launch.plan_forward(x, o, lse))
    if backward:
        out = attention_launch.allocate(x, options.get("bias") is not None)
        found += attention_launch.plan_backward(x, o, o, lse, None, out)
    return found

"""The attention kernels compiled as a launch would compile them, for GPUs that are not there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import triton
from attention_operators import Options, arguments
from fastseq.kernels import attention_launch
from fastseq.kernels.attention_launch import Plan, Problem
from torch import Tensor
from triton_support import _PRODUCT, TARGETS, Compiled, _resources

TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int8: "i8",
}  # fmt: skip


def type_of(x: Any) -> Any:
    """The type of an argument in a kernel's signature, as a launch without specialization finds it."""
    if isinstance(x, Tensor):
        return "*" + TYPES[x.dtype]
    if isinstance(x, tuple):
        return type(x)(*map(type_of, x)) if hasattr(x, "_fields") else tuple(map(type_of, x))
    if x is None:
        return "constexpr"
    if isinstance(x, float):
        return "fp32"
    assert isinstance(x, int)
    assert not isinstance(x, bool)
    return "i32" if -(2**31) <= x < 2**31 else "i64"


def absent(path: tuple[int, ...], x: Any) -> Iterator[tuple[int, ...]]:
    """Places of what is None, in tuples too."""
    if x is None:
        yield path
    elif isinstance(x, tuple):
        for n, element in enumerate(x):
            yield from absent((*path, n), element)


def signature(plan: Plan) -> tuple[dict[str, Any], dict[tuple[int, ...], Any]]:
    """The types of a launch's arguments by name, and its constants by place: together they say which variant it is."""
    types: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for n, parameter in enumerate(plan.kernel.params):
        x = plan.arguments[parameter.name]
        if parameter.is_constexpr:
            types[parameter.name], constants[(n,)] = "constexpr", x
        else:
            types[parameter.name] = type_of(x)
            constants |= dict.fromkeys(absent((n,), x))
    return types, constants


def variant(plan: Plan) -> tuple:
    """What tells one compiled kernel from another."""
    types, constants = signature(plan)
    return plan.kernel.__name__, repr(types), repr(sorted(constants.items())), repr(plan.options)


def compile_plan(target: str, plan: Plan) -> Compiled:
    types, constants = signature(plan)
    source = triton.compiler.ASTSource(plan.kernel, types, constants, {})
    made = triton.compile(source, target=TARGETS[target], options=plan.options)
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[-1])
        spilled = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
    else:
        text = made.asm["ptx"]
        registers, spilled = _resources(made.asm["cubin"])
    return Compiled(target, made.metadata.shared, registers, spilled, tuple(_PRODUCT.findall(text)), text)


def plans(
    machine: str, dtype: torch.dtype, options: Options, dim: int, dim_v: int, *, queries: int = 256, keys: int = 256,
    batch: int = 2, heads: int = 4, heads_k: int = 2, backward: bool = True,
) -> list[Plan]:  # fmt: skip
    """Every launch of a forward and backward pass; nothing is computed."""
    packed = options.get("cu_seqlens_q") is not None

    def make(heads: int, length: int, dim: int) -> Tensor:
        return torch.empty((length, heads, dim) if packed else (batch, heads, length, dim), dtype=dtype)

    q, k, v = make(heads, queries, dim), make(heads_k, keys, dim), make(heads_k, keys, dim_v)
    x = Problem(q, k, v, *arguments(options), machine=machine)
    o = make(heads, queries, dim_v)
    lse = torch.empty(attention_launch.row_sizes(x))
    found = list(attention_launch.plan_forward(x, o, lse))
    if backward:
        out = attention_launch.allocate(x, options.get("bias") is not None)
        found += attention_launch.plan_backward(x, o, o, lse, None, out)
    return found

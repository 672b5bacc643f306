"""How an operator is defined: its schema, a fake kernel and a vmap rule for each backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import OPTIONS_SCHEMA
from fastseq.ops import schemas

BACKENDS = ("native", "triton")
"""Backends that are operators of their own; ``reference`` and ``torch`` are made of torch's."""

SCHEMAS = schemas.of_the_cpu(OPTIONS_SCHEMA)
"""Of the operators that the CPU kernels implement, by name with overload; those of other backends are the same."""


def define(
    name: str,
    fake: Callable,
    rule: Callable[[Callable], Callable] | None,
    backends: Sequence[str] = BACKENDS,
) -> None:
    """Define ``fastseq::name.<backend>`` for every backend, with its fake kernel and its vmap rule (None: no vmap)."""
    for backend in backends:
        full = f"fastseq::{name}.{backend}"
        torch.library.define(full, SCHEMAS[f"{name}.native"], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(full, _refusing_mixed_devices(fake))
        if rule is not None:
            torch.library.register_vmap(full, rule(getattr(getattr(torch.ops.fastseq, name), backend)))


def _refusing_mixed_devices(fake: Callable) -> Callable:
    """The fake kernel, which torch also calls when one argument alone is on the meta device: what it returns then would
    be memory that nothing was written to."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
        devices = dict.fromkeys(str(t.device) for t in tensors)
        if "meta" in devices and len(devices) > 1:
            raise RuntimeError(f"all tensors must be on one device, got some on {' and some on '.join(devices)}")
        return fake(*args)

    return checked


def loop_over(op: Callable, size: int, in_dims: Sequence[int | None], args: Sequence[Any]) -> tuple[Any, Any]:
    """The vmap rule that always holds: one call a slice, results stacked along a new first dimension."""
    calls = []
    for index in range(size):
        slices = (a if d is None else a.select(d, index) for a, d in zip(args, in_dims, strict=True))
        calls.append(op(*slices))
    return tuple(torch.stack(out) for out in zip(*calls, strict=True)), (0,) * len(calls[0])


def fold_batch(op: Callable, axes: Sequence[int | None], out_axes: Sequence[int]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule that lays the mapped dimension into the batch.

    ``axes`` names each argument's batch dimension (None for an argument without one: where such an argument is
    mapped, weights for instance, the rule falls back to a loop); ``out_axes`` that of each result.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if any(d is not None and axis is None for d, axis in zip(in_dims, axes, strict=True)) or size == 0:
            return loop_over(op, size, in_dims, args)
        folded = []
        for arg, dim, axis in zip(args, in_dims, axes, strict=True):
            if axis is None or not isinstance(arg, Tensor) or arg.shape == (0,):
                folded.append(arg)
            elif dim is None:
                shape = (*arg.shape[:axis], size, *arg.shape[axis:])
                folded.append(arg.unsqueeze(axis).expand(shape).flatten(axis, axis + 1))
            else:
                folded.append(arg.movedim(dim, axis).flatten(axis, axis + 1))
        outs, dims = [], []
        for out, axis in zip(op(*folded), out_axes, strict=True):
            absent = out.shape == (0,)
            outs.append(out if absent else out.unflatten(axis, (size, out.shape[axis] // size)))
            dims.append(None if absent else axis)
        return tuple(outs), tuple(dims)

    return rule

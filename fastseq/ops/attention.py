"""The attention operators' fake kernels and vmap rules, for ``fastseq.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import OPTIONS, PER_SEQUENCE, AttentionCall
from fastseq.ops.define import loop_over


def empty_as(x: Tensor, features: int) -> Tensor:
    """A result [...,features] that lies in memory as x does: see kernels/attention/layout.py."""
    from fastseq.kernels.attention.layout import empty_as

    return empty_as(x, features)


def laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """The result, copied where it does not lie in memory as x does."""
    from fastseq.kernels.attention.layout import laid_out_as

    return laid_out_as(x, result)


def fake_attention_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*arguments)
    q = call.q
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return empty_as(q, call.v.shape[-1]), q.new_empty(rows, dtype=accumulator)


def fake_attention_backward(d_o, dlse, q, k, v, o, lse, *rest):
    *options, bias_grad = rest
    call = AttentionCall(q, k, v, *options)
    return (
        *(empty_as(x, x.shape[-1]) for x in (q, k, v)),
        q.new_empty(0) if call.bias is None or not bias_grad else call.bias.new_empty(call.bias.shape),
        q.new_empty(0) if call.sinks is None else call.sinks.new_empty(call.sinks.shape),
    )


def native_cuda_reason(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """Why the CUDA C++ kernels cannot run on heads of ``dim`` and ``dim_v`` features; None where they can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return "the CUDA C++ kernels of attention take bfloat16 and float16 alone"
    if max(dim, dim_v) > 256:
        return "the CUDA C++ kernels of attention take up to 256 features a head"
    return None


def attention_rule(leading: int, backward: bool) -> Callable[[Callable], Callable[..., tuple[Any, Any]]]:
    """The vmap rule of an operator with ``leading`` arguments before the options: the mapped dimension is laid into
    the batch where that means the same, else the slices are run one by one."""

    def of(op: Callable) -> Callable[..., tuple[Any, Any]]:
        def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
            options, dims = (dict(zip(OPTIONS, x[leading:], strict=False)) for x in (args, in_dims))
            packed = any(options[name] is not None for name in ("cu_seqlens_q", "block_table", "k_scale"))
            # Dropout's bits depend on the place in the batch, and sinks have one gradient a batch.
            one_by_one = packed or options["dropout_p"] > 0.0 or (backward and options["sinks"] is not None)
            if one_by_one or dims["sinks"] is not None or dims["alibi_slopes"] is not None:
                return loop_over(op, info.batch_size, in_dims, args)
            return _fold(op, info.batch_size, in_dims, args, leading, backward)

        return rule

    return of


def _fold(
    op: Callable, size: int, in_dims: Sequence[int | None], args: Sequence[Any], leading: int, backward: bool
) -> tuple[Any, Any]:
    bias_grad = backward and args[-1]
    q_place = 2 if backward else 0
    batch = args[q_place].shape[0 if in_dims[q_place] is None else int(in_dims[q_place] == 0)]
    bias, mask, *lengths = (leading + OPTIONS.index(n) for n in ("bias", "mask", *PER_SEQUENCE))
    folded = list(args)
    for place in (*range(leading), bias, mask, *lengths):
        arg, dim = args[place], in_dims[place]
        if arg is None:
            continue
        broadcasts = place in (bias, mask)
        if dim is not None:
            arg = arg.movedim(dim, 0)
        elif broadcasts and arg.shape[0] == 1 and not (place == bias and bias_grad):
            continue
        else:
            arg = arg.expand(size, *arg.shape)
        if broadcasts:
            arg = arg.expand(size, batch, *arg.shape[2:])
        folded[place] = arg.flatten(0, 1)
    outs = [out if out.shape == (0,) else out.unflatten(0, (size, batch)) for out in op(*folded)]
    if bias_grad:
        given, dim = args[bias], in_dims[bias]
        own = given.shape[0] if dim is None else given.movedim(dim, 0).shape[1]
        if own != batch:
            outs[3] = outs[3].sum(1, keepdim=True)
    return tuple(outs), tuple(None if out.shape == (0,) else 0 for out in outs)

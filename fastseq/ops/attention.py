"""The attention operators' fake kernels and vmap rules, for ``fastseq.ops``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.define import loop_over

# Places of arguments in ops._ATTENTION_OPTIONS, the same in both schemas once what comes before it is counted.
_BIAS, _MASK, _SINKS, _ALIBI, _LENGTHS_Q, _LENGTHS_K, _CU_SEQLENS_Q, _CU_SEQLENS_K, _SEED = range(9)
_DROPOUT_P = 15


def empty_as(x: Tensor, features: int) -> Tensor:
    """A result [...,features] that lies in memory as x does: see kernels/attention/layout.py."""
    from fastseq.kernels.attention.layout import empty_as

    return empty_as(x, features)


def laid_out_as(x: Tensor, result: Tensor) -> Tensor:
    """The result, copied where it does not lie in memory as x does."""
    from fastseq.kernels.attention.layout import laid_out_as

    return laid_out_as(x, result)


def fake_attention_forward(
    q, k, v, bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
    scale, causal, bottom_right, window_left, window_right, softcap, dropout_p,
):  # fmt: skip
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return empty_as(q, v.shape[-1]), q.new_empty(rows, dtype=accumulator)


def fake_attention_backward(
    d_o, dlse, q, k, v, o, lse, bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
    scale, causal, bottom_right, window_left, window_right, softcap, dropout_p, bias_grad,
):  # fmt: skip
    return (
        *(empty_as(x, x.shape[-1]) for x in (q, k, v)),
        bias.new_empty(bias.shape) if bias_grad else q.new_empty(0),
        q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape),
    )


def fake_attention_paged(
    q, k, v, block_table, bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q,
    scale, causal, bottom_right, window_left, window_right, softcap,
):  # fmt: skip
    return fake_attention_forward(
        q, k, v, bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, None, None,
        scale, causal, bottom_right, window_left, window_right, softcap, 0.0,
    )  # fmt: skip


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
            options, dims = args[leading:], in_dims[leading:]
            packed = options[_CU_SEQLENS_Q] is not None
            # Dropout's bits depend on the place in the batch, and sinks have one gradient a batch.
            one_by_one = packed or options[_DROPOUT_P] > 0.0 or (backward and options[_SINKS] is not None)
            if one_by_one or dims[_SINKS] is not None or dims[_ALIBI] is not None:
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
    with_a_batch = (*range(leading), *(leading + p for p in (_BIAS, _MASK, _LENGTHS_Q, _LENGTHS_K)))
    folded = list(args)
    for place in with_a_batch:
        arg, dim = args[place], in_dims[place]
        if arg is None:
            continue
        broadcasts = place in (leading + _BIAS, leading + _MASK)
        if dim is not None:
            arg = arg.movedim(dim, 0)
        elif broadcasts and arg.shape[0] == 1 and not (place == leading + _BIAS and bias_grad):
            continue
        else:
            arg = arg.expand(size, *arg.shape)
        if broadcasts:
            arg = arg.expand(size, batch, *arg.shape[2:])
        folded[place] = arg.flatten(0, 1)
    outs = [out if out.shape == (0,) else out.unflatten(0, (size, batch)) for out in op(*folded)]
    if bias_grad:
        bias, dim = args[leading + _BIAS], in_dims[leading + _BIAS]
        own = bias.shape[0] if dim is None else bias.movedim(dim, 0).shape[1]
        if own != batch:
            outs[3] = outs[3].sum(1, keepdim=True)
    return tuple(outs), tuple(None if out.shape == (0,) else 0 for out in outs)

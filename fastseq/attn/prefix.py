"""Keys that all sequences of a batch see before their own, read once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall
from fastseq.attn.merge import merge_attention
from fastseq.checks import ArgumentError, sizes


def check(prefix: Any, call: AttentionCall) -> None:
    """``prefix`` of :func:`fastseq.attention` beside a checked call."""
    if not isinstance(prefix, (tuple, list)) or len(prefix) != 2 or not all(isinstance(x, Tensor) for x in prefix):
        raise TypeError("prefix must be a pair of Tensors (k [Hk,P,D], v [Hk,P,Dv])")
    if call.alibi_slopes is not None:
        raise ArgumentError("alibi_slopes cannot be given with prefix: how far its keys are is not known")
    k, v = prefix
    heads = call.k.shape[1 if call.block_table is None else 2]
    for name, x, features in (("k", k, call.k.shape[-1]), ("v", v, call.v.shape[-1])):
        if x.dim() != 3 or x.shape[0] != heads or x.shape[2] != features or x.shape[1] != k.shape[1]:
            raise ArgumentError(
                f"prefix's {name} must be [{heads}, P, {features}], with the heads and features of {name}, and k and v "
                f"of the same P, got {sizes(x)}"
            )
        if x.dtype != call.q.dtype or x.device != call.q.device:
            raise ArgumentError(
                f"prefix's {name} must be {call.q.dtype} on {call.q.device} as q is, got {x.dtype} on {x.device}"
            )


def attend(
    call: AttentionCall, prefix: tuple[Tensor, Tensor], run: Callable[[AttentionCall], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """o and lse of a call with these keys before each sequence's own. ``run`` gives o and lse of a call."""
    k, v = (x.unsqueeze(0) for x in prefix)
    packed = call.cu_seqlens_q is not None
    heads_first = call.q.transpose(0, 1)  # [Hq,total,D], or [Hq,B,Tq,D]
    q = heads_first if packed else heads_first.flatten(1, 2)
    shared = AttentionCall(
        q.unsqueeze(0), k, v, seed=call.seed, scale=call.scale, softcap=call.softcap, dropout_p=call.dropout_p
    )  # fmt: skip
    o, lse = (x.squeeze(0) for x in run(shared))
    if packed:
        o = o.transpose(0, 1)
        assert call.cu_seqlens_q is not None
        absent = torch.arange(lse.shape[1], device=q.device) >= call.cu_seqlens_q[-1]
    else:
        shape = heads_first.shape[1:3]
        o, lse = (x.unflatten(1, shape).transpose(0, 1) for x in (o, lse))
        absent = None
        if call.lengths_q is not None:
            absent = (torch.arange(lse.shape[2], device=q.device) >= call.lengths_q[:, None])[:, None]
    if absent is not None:
        lse = lse.masked_fill(absent, -math.inf)
    own, own_lse = run(call)
    return merge_attention((own, o), (own_lse, lse))

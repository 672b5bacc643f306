"""The layer MultiheadAttention as functions of its inputs and parameters: its pieces, and the whole in one native call.

Without gradients the layer is one native call (csrc/attention/direct_multihead.cpp). With them, and where that call
does not take the arguments, the pieces are put together from operations that know their derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import direct
from fastseq.attn.functional import attention, attention_and_weights
from fastseq.backend import native_attention


def heads_of(x: Tensor, embed: int, heads: int, batch_first: bool) -> tuple[Tensor, ...]:
    """Views ``[N,heads,T,D]`` of one or more projections ``[...,embed]`` that lie side by side; N is 1 unbatched."""
    lead = x.shape[:-1] if x.dim() == 3 else (x.shape[0], 1)
    batch_first = batch_first and x.dim() == 3
    x = x.view(*lead, x.shape[-1] // embed, heads, embed // heads)
    return x.permute((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)).unbind()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    dropout_p: float,
    batched: bool,
    batch_first: bool,
    need_weights: bool,
    average: bool,
    weight: Tensor,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The layer from its heads ``[N,heads,T,D]`` on: output, and weights or None."""
    weights = None
    if need_weights:
        o, weights = attention_and_weights(q, k, v, bias=bias, mask=mask, causal=causal, dropout_p=dropout_p)
        weights = weights.mean(1) if average else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        o = attention(q, k, v, bias=bias, mask=mask, causal=causal, align="top_left", dropout_p=dropout_p)  # type: ignore[assignment]
    if not batched:
        o = o.squeeze(0).transpose(0, 1)  # [L,heads,D]
    else:
        o = o.transpose(1, 2) if batch_first else o.permute(2, 0, 1, 3)
    return F.linear(o.flatten(-2), weight, out_bias), weights


def in_one_call(
    parameters: dict[str, Any],
    out: dict[str, Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    heads: int,
    batch_first: bool,
    causal: bool,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """The whole layer in inference and without dropout, by its own parameters and those of its ``out_proj``; None where
    the native call does not take it. Nothing is checked before."""
    if direct.multihead is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or not native_attention():
        return None
    return direct.multihead(
        parameters, out, query, key, value, bias, mask, heads, batch_first, causal, need_weights, average
    )  # fmt: skip

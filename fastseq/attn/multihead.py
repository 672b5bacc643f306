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
from fastseq.attn import divided
from fastseq.attn.call import AttentionCall
from fastseq.attn.functional import attention, attention_and_weights
from fastseq.backend import native_attention


def heads_of(x: Tensor, embed: int, heads: int, batch_first: bool) -> tuple[Tensor, ...]:
    """Views ``[N,heads,T,D]`` of one or more projections ``[...,embed]`` that lie side by side; N is 1 unbatched."""
    lead = x.shape[:-1] if x.dim() == 3 else (x.shape[0], 1)
    batch_first = batch_first and x.dim() == 3
    x = x.view(*lead, x.shape[-1] // embed, heads, embed // heads)
    return x.permute((2, 0, 3, 1, 4) if batch_first else (2, 1, 3, 0, 4)).unbind()


def attend(
    call: AttentionCall, layer: torch.nn.MultiheadAttention, batched: bool, need_weights: bool, average: bool
) -> tuple[Tensor, Tensor | None]:
    """The layer from its heads ``[N,heads,T,D]`` on: output, and weights or None. Of the options it knows bias, mask,
    causal (top left) and dropout_p."""
    weights = None
    options: dict[str, Any] = {name: getattr(call, name) for name in ("bias", "mask", "causal", "dropout_p")}
    if need_weights:
        o, weights = attention_and_weights(call.q, call.k, call.v, **options)
        weights = weights.mean(1) if average else weights
        weights = weights if batched else weights.squeeze(0)
    else:
        o = attention(call.q, call.k, call.v, **options, align="top_left")
    if not batched:
        o = o.squeeze(0).transpose(0, 1)  # [L,heads,D]
    else:
        o = o.transpose(1, 2) if layer.batch_first else o.permute(2, 0, 1, 3)
    return F.linear(o.flatten(-2), layer.out_proj.weight, layer.out_proj.bias), weights


def in_one_call(*arguments: Any) -> tuple[Tensor, Tensor | None] | None:
    """The whole layer in inference and without dropout; None where the native call does not take it. Nothing is checked
    before. Arguments: the layer's own parameters and those of its ``out_proj``, each by name; query, key, value; bias,
    mask; heads, batch_first, causal, need_weights, and whether they are averaged over the heads."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if not native_attention() and not divided.takes_layer(*arguments[2:10]):
        return None
    return direct.multihead(*arguments)

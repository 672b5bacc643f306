"""The ``torch`` backend of attention: ``torch.nn.functional.scaled_dot_product_attention``, where it can express the
call, and corrected where a row sees no key."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.attn.autograd import call_reference
from fastseq.attn.call import AttentionCall, is_limited
from fastseq.attn.reference import visible_pairs
from fastseq.autograd import WithReference, functorch_active, needs_reference
from fastseq.backend import exporting_onnx
from fastseq.ops import attention as ops_attention


def torch_reason(call: AttentionCall, want_lse: bool) -> str | None:
    """Why torch's attention cannot run this call; None where it can."""
    if call.cu_seqlens_q is not None:
        return "torch's attention takes no packed sequences (cu_seqlens)"
    if call.softcap > 0.0:
        return "torch's attention has no softcap"
    if call.sinks is not None:
        return "torch's attention has no sinks"
    if want_lse:
        return "torch's attention does not return the log-sum-exp (return_lse=True)"
    if needs_reference():
        return "torch's attention has neither forward-mode nor nested derivatives"
    return None


def attention(call: AttentionCall) -> Tensor:
    """o; dropout draws from torch's own generator, not from ``seed``."""
    q, k, v, bias, mask, causal = call.q, call.k, call.v, call.bias, call.mask, call.causal
    bottom_right, queries, keys = call.bottom_right, q.shape[2], k.shape[2]
    plain_causal = causal and not is_limited(call) and bias is None and mask is None and call.alibi_slopes is None
    if plain_causal and bottom_right and queries != keys:  # a statement: the value of `and` may be a traced SymBool
        plain_causal = False
    if causal and bottom_right and queries == 1 and call.lengths_q is call.lengths_k is None:
        causal = False  # one query, aligned to the last key: it sees them all
    attn_mask: Tensor | None = None
    empty: Tensor | None = None
    if not plain_causal:
        at, visible = visible_pairs(**call._replace(causal=causal)._asdict())
        if call.alibi_slopes is not None:
            slopes = call.alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
            alibi = -slopes[:, None, None] * (at.i + at.shift - at.j).abs()
            bias = alibi if bias is None else bias + alibi
        if bias is not None:
            attn_mask = bias if visible is None else bias.masked_fill(~visible, -math.inf)
            empty = (attn_mask == -math.inf).all(-1, keepdim=True)
            attn_mask = attn_mask.masked_fill(empty, 0.0)
        elif visible is not None:
            empty = ~visible.any(-1, keepdim=True)
            attn_mask = visible | empty
    if attn_mask is not None and exporting_onnx():  # of ONNX's Attention, ONNX Runtime broadcasts only batch and heads
        attn_mask = attn_mask.expand(*attn_mask.shape[:-2], queries, keys)
    if keys == 0 or q.shape[1] == 0:  # without heads torch's backward divides by zero
        return call_reference(AttentionCall(q, k, v, bias, mask, scale=call.scale))[0]
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        dropout_p=call.dropout_p,
        is_causal=plain_causal,
        scale=call.scale,
        enable_gqa=True if q.shape[1] != k.shape[1] else False,  # noqa: SIM210 - it may be a traced SymBool
    )
    if (
        o.requires_grad
        and call.dropout_p == 0.0
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not functorch_active()
    ):
        is_bool = attn_mask is None or attn_mask.dtype == torch.bool
        bias, mask = (None, attn_mask) if is_bool else (attn_mask, None)
        settings: dict[str, Any] = {"scale": call.scale, "causal": plain_causal, "bottom_right": bottom_right}
        o = _with_second_derivative(o, AttentionCall(q, k, v, bias, mask, **settings))
    return ops_attention.laid_out_as(q, o if empty is None else o.masked_fill(empty, 0.0))


def attention_and_weights(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """o and the matrix of weights, by plain products: what torch itself does when it must return the matrix. Of a
    call's options it knows bias, mask, causal (top left) and dropout_p."""
    q, k, v, bias, mask = call.q, call.k, call.v, call.bias, call.mask
    if call.causal:
        below = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = below if mask is None else mask & below
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B,H,Tq,Tk]
    empty = None
    if bias is not None:
        bias = bias if mask is None else bias.masked_fill(~mask, -math.inf)
        empty = (bias == -math.inf).all(-1, keepdim=True)
        scores = scores + bias.masked_fill(empty, 0.0)
    elif mask is not None:
        empty = ~mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(mask | empty), -math.inf)
    weights = torch.softmax(scores, -1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    weights = F.dropout(weights, call.dropout_p).to(q.dtype)
    return weights @ v, weights


def _with_second_derivative(o: Tensor, call: AttentionCall) -> Tensor:
    """o, whose gradient goes on into torch's fused backward unless it must itself be differentiable, which that one
    cannot be: then it goes through the reference, past torch's node."""
    is_bool = call.bias is None

    def reference(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> tuple[Tensor]:
        bias, mask = (None, added) if is_bool else (added, None)
        return (call_reference(call._replace(q=q, k=k, v=v, bias=bias, mask=mask))[0],)

    tensors = call.q, call.k, call.v, call.mask if is_bool else call.bias, o
    inputs = 3 if is_bool else 4

    def identity(*t: Any) -> tuple[Tensor]:
        return (t[-1].view_as(t[-1]),)

    return WithReference.apply(identity, lambda d_o: (*4 * [None], d_o), reference, inputs, 4, *tensors)[0]

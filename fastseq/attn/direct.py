"""Attention past torch's operators, with and without gradients: one native call forward, one back.

The native calls are csrc/attention/direct.cpp's. Each asks what could make a tensor more than its numbers, and declines
with None; the caller then takes the operator. A gradient that is to be differentiated again takes the operator too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import direct
from fastseq.attn import autograd as autograd_attention
from fastseq.attn import divided
from fastseq.attn.call import AttentionCall, scale_of, with_four_dimensions
from fastseq.autograd import recorder
from fastseq.backend import native_attention


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, settings: tuple, kept: tuple = ()
) -> Tensor | None:  # fmt: skip
    """o of attention that is not checked; None where the fast path does not take the call.

    ``settings``: scale, causal, bottom_right, window, softcap, and whether k and v may have fewer heads. ``kept``:
    sinks, lengths_q, lengths_k, block_table, k_scale and v_scale, for a call without gradients.
    """
    if torch.compiler.is_compiling():
        return None
    if kept:
        return direct.attend_kept(q, k, v, bias, mask, settings, *kept) if native_attention() else None
    if not native_attention() and not divided.takes_attention(q, k, v, bias, mask, settings):
        return None
    if bias is not None and torch.is_grad_enabled() and getattr(bias, "requires_grad", True):
        return None
    made = direct.attend(q, k, v, bias, mask, settings)
    if type(made) is not tuple:  # it is o and lse where gradients are on
        return made
    if q.requires_grad or k.requires_grad or v.requires_grad:
        return _recorded(q, k, v, (bias, mask, made, settings))
    return made[0]


class Attended(torch.autograd.Function):
    """o, which is already computed, as a function of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, others: tuple) -> Tensor:
        bias, mask, (o, lse), ctx.settings = others
        ctx.save_for_backward(q, k, v, bias, mask, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple:
        saved = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        if not compiling and (found := direct.attend_backward(d_o, saved, ctx.settings)) is not None:
            return found
        q, k, v, bias, mask, o, lse = saved
        scale, causal, bottom_right, window, softcap, _ = ctx.settings
        left, right = window or (-1, -1)
        call = AttentionCall(
            q, k, v, with_four_dimensions(bias), with_four_dimensions(mask), scale=scale_of(q, scale), causal=causal,
            bottom_right=bottom_right, window_left=left, window_right=right, softcap=softcap,
        )  # fmt: skip
        return *autograd_attention.gradient(d_o, None, o, lse, call, False, "native")[:3], None


_recorded = recorder(Attended)

"""The layer MultiheadAttention as functions of its inputs and parameters: its pieces, and the short way through it.

Without gradients the layer is one native call (csrc/direct_multihead.cpp). With them it is one forward and one back
(csrc/direct_multihead_gradient.cpp), which compute no more than what wants a gradient. Where a call declines, and for a
gradient that is to be differentiated again, the pieces are put together from operations that know their derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.autograd import is_batched, recorder
from fastseq.backend import native_attention
from fastseq.functional import direct
from fastseq.functional.attention import attention, attention_and_weights


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


def short_way(
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
    """The whole layer without dropout, by its own parameters and those of its ``out_proj``; None where the short way is
    not to be taken. Nothing is checked before."""
    if direct.multihead is None or torch.compiler.is_compiling() or not native_attention():
        return None
    settings = (heads, batch_first, causal)
    if not torch.is_grad_enabled():
        return direct.multihead(
            parameters, out, query, key, value, bias, mask, *settings, need_weights, average
        )  # fmt: skip
    w_in, w_out = parameters.get("in_proj_weight"), out.get("weight")
    # The gradient of its product with a frozen weight needs no x, which must not be kept alive for it.
    if w_in is None or w_out is None or not w_in.requires_grad or (bias is not None and bias.requires_grad):
        return None
    made = direct.multihead_forward(  # type: ignore[misc]
        parameters, out, query, key, value, bias, mask, *settings, need_weights, average
    )
    if made is None:
        return None
    b_in, b_out = parameters["in_proj_bias"], out["bias"]
    others = (bias, mask, made, (*settings, need_weights, average))
    done = _recorded(
        query, None if key is query else key, None if value is key else value, w_in, b_in, w_out, b_out, others
    )  # fmt: skip
    return done if need_weights else (done, None)


class Multihead(torch.autograd.Function):
    """Output, and weights where they are needed, which are already computed, as a function of all that may learn.
    key and value are None where they are what stands before them."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        others: tuple,
    ) -> Any:
        bias, mask, (y, weights, q, k, v, o, lse), settings = others
        ctx.settings, ctx.options = settings[:3], settings[3:]
        # Only what the gradient multiplies with is saved: the rest may change until then.
        multiplied = any(ctx.needs_input_grad[:3])
        ctx.unsaved = [(x, x._version) for x in (None if multiplied else w_in, b_in) if x is not None]
        ctx.has_bias = b_in is not None
        ctx.save_for_backward(query, key, value, w_in if multiplied else None, w_out, bias, mask, q, k, v, o, lse)
        if weights is None:
            return y
        ctx.set_materialize_grads(False)
        return y, weights

    @staticmethod
    def backward(ctx: Any, d_y: Tensor | None, d_weights: Tensor | None = None) -> tuple:
        saved = ctx.saved_tensors
        if d_y is not None and d_weights is None and not (torch.compiler.is_compiling() or is_batched(d_y)):
            found = direct.multihead_backward(d_y, saved, ctx.settings, ctx.needs_input_grad)  # type: ignore[misc]
            if found is not None:
                return found
        return _general_gradient(ctx, saved, d_y, d_weights)


_recorded = recorder(Multihead)


def _general_gradient(ctx: Any, saved: tuple, d_y: Tensor | None, d_weights: Tensor | None) -> tuple:
    """The gradients by putting the layer together once more, differentiable where gradients are on."""
    differentiable, need = torch.is_grad_enabled(), ctx.needs_input_grad
    query, key, value, w_in, w_out, bias, mask, *_ = saved
    for x, version in ctx.unsaved:
        if x._version != version:
            raise RuntimeError("a parameter needed for gradient computation has been modified by an inplace operation")
    unsaved = [x for x, _ in ctx.unsaved]
    b_in = unsaved.pop() if ctx.has_bias else None
    w_in = unsaved.pop() if w_in is None else w_in
    (heads, batch_first, causal), (need_weights, average) = ctx.settings, ctx.options
    with torch.enable_grad(), torch.autocast(w_in.device.type, enabled=False):
        # Other names for the inputs: a gradient ends there even where one input was made from another.
        own: list[Any] = [
            x.view_as(x) if x is not None and needed else x
            for x, needed in zip((query, key, value, w_in, b_in, w_out), need, strict=False)
        ]
        query, key, value, w_in, b_in, w_out = own
        key = query if key is None else key
        value = key if value is None else value
        biases = (None,) * 3 if b_in is None else b_in.chunk(3)
        q, k, v = (
            heads_of(F.linear(x, w, b), w_in.shape[1], heads, batch_first)[0]
            for x, w, b in zip((query, key, value), w_in.chunk(3), biases, strict=True)
        )
        results = attend(
            q, k, v, bias, mask, causal, 0.0, query.dim() == 3, batch_first, need_weights, average, w_out, None
        )  # fmt: skip
        outputs = [(x, d) for x, d in zip(results, (d_y, d_weights), strict=True) if d is not None]
        found: list[Tensor | None] = [None] * 8
        wanted: dict[int, Tensor] = {n: x for n, x in enumerate(own) if x is not None and need[n]}
        if outputs:
            given = torch.autograd.grad(
                [x for x, _ in outputs if x is not None],
                list(wanted.values()),
                [d for _, d in outputs],
                create_graph=differentiable,
                allow_unused=True,
            )
            for n, gradient in zip(wanted, given, strict=True):
                found[n] = gradient
    if need[6] and d_y is not None:
        found[6] = d_y.sum(tuple(range(d_y.dim() - 1)))
    return tuple(found)

"""Attention as one differentiable function, on the fused operators.

The first derivative is a fused kernel. The second is rare, so it is not: :class:`AttentionGradient`, the gradient as
a function of its own, differentiates the reference when something reaches back through it, and only then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import ops
from fastseq.attn.reference import attention as reference_attention
from fastseq.autograd import apply, functorch_active, needs_reference
from fastseq.ops import attention as ops_attention

FORWARD = {name: getattr(torch.ops.fastseq.attention_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.attention_backward, name) for name in ops.BACKENDS}

# bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed
OPTIONAL = 9
# scale, causal, bottom_right, window_left, window_right, softcap, dropout_p
SETTINGS = 7


class Attention(torch.autograd.Function):
    """Arguments and results as ``ops.ATTENTION_FORWARD``, with the backend's name last."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q, k, v,
        bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
        scale, causal, bottom_right, window_left, window_right, softcap, dropout_p, backend,
    ):  # fmt: skip
        return FORWARD[backend](
            q, k, v,
            bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
            scale, causal, bottom_right, window_left, window_right, softcap, dropout_p,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[: 3 + OPTIONAL], *output)
        ctx.settings = inputs[3 + OPTIONAL : -1]
        ctx.backend = inputs[-1]

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, dlse: Tensor | None) -> tuple:
        *inputs, o, lse = ctx.saved_tensors
        q, k, v, *optional = inputs
        d_o = torch.zeros_like(o) if d_o is None else d_o
        bias_grad = ctx.needs_input_grad[3]
        dq, dk, dv, dbias, dsinks = gradient(
            d_o, dlse, q, k, v, o, lse, optional, ctx.settings, bias_grad, ctx.backend
        )  # fmt: skip
        return (
            dq,
            dk,
            dv,
            dbias if bias_grad else None,
            None,
            dsinks if optional[2] is not None else None,
            *(None,) * (OPTIONAL - 3 + SETTINGS + 1),
        )


class AttentionGradient(torch.autograd.Function):
    """Arguments and results as ``ops.ATTENTION_BACKWARD``, with the backend's name last."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        d_o, dlse, q, k, v, o, lse,
        bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
        scale, causal, bottom_right, window_left, window_right, softcap, dropout_p, bias_grad, backend,
    ):  # fmt: skip
        return BACKWARD[backend](
            d_o, dlse, q, k, v, o, lse,
            bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
            scale, causal, bottom_right, window_left, window_right, softcap, dropout_p, bias_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:5], *inputs[7 : 7 + OPTIONAL])  # o and lse follow from the rest
        ctx.settings = inputs[7 + OPTIONAL : -2]
        ctx.bias_grad = inputs[-2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        d_o, dlse, q, k, v, *optional = ctx.saved_tensors
        bias, mask, sinks, *rest = optional
        places = [n for n, t in enumerate((d_o, dlse, q, k, v, bias, sinks)) if t is not None]

        def first(*present: Tensor) -> tuple[Tensor, ...]:
            """The gradient as a function of all that it depends on; o and lse are themselves functions of these."""
            given = dict(zip(places, present, strict=True))
            options = (given.get(5), mask, given.get(6), *rest)
            return _gradient(
                given[0], given.get(1), given[2], given[3], given[4], options, ctx.settings, ctx.bias_grad
            )  # fmt: skip

        vjp: Any = torch.func.vjp(first, *(t for t in (d_o, dlse, q, k, v, bias, sinks) if t is not None))[1]
        found: list[Tensor | None] = [None] * 7
        for place, grad in zip(places, vjp(grads), strict=True):
            found[place] = grad
        # The places of o, lse and mask between them, and all that follows sinks.
        return (*found[:5], None, None, found[5], None, found[6], *(None,) * (OPTIONAL - 3 + SETTINGS + 2))


def gradient(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    optional: Any,
    settings: tuple,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Results as ``ops.ATTENTION_BACKWARD``, differentiable where gradients are on."""
    arguments = (d_o, dlse, q, k, v, o, lse, *optional, *settings, bias_grad)
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return BACKWARD[backend](*arguments)
    if needs_reference():
        return _gradient(d_o, dlse, q, k, v, optional, settings, bias_grad)
    return apply(AttentionGradient, *arguments, backend)


def _gradient(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    optional: Any,
    settings: tuple,
    bias_grad: bool,
) -> tuple[Tensor, ...]:
    """What ``ops.ATTENTION_BACKWARD`` computes, by the reference: differentiable, and of T x T memory."""
    bias, mask, sinks, *rest = optional
    extra = [t for t, wanted in ((bias, bias_grad), (sinks, sinks is not None)) if wanted]

    def forward(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        given = iter(extra)
        own_bias = next(given) if bias_grad else bias
        own_sinks = next(given) if sinks is not None else None
        o, lse = call_reference(q, k, v, own_bias, mask, own_sinks, *rest, *settings)
        return (o,) if dlse is None else (o, lse)

    vjp: Any = torch.func.vjp(forward, q, k, v, *extra)[1]
    dq, dk, dv, *others = vjp((d_o,) if dlse is None else (d_o, dlse))
    given = iter(others)
    dbias = next(given) if bias_grad else q.new_empty(0)
    dsinks = next(given) if sinks is not None else q.new_empty(0)
    return dq, dk, dv, dbias, dsinks


def call_reference(
    q, k, v,
    bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed,
    scale, causal, bottom_right, window_left, window_right, softcap, dropout_p,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The reference with the operator's argument list, and o in memory as q is."""
    o, lse = reference_attention(
        q, k, v,
        bias=bias, mask=mask, sinks=sinks, alibi_slopes=alibi_slopes, lengths_q=lengths_q, lengths_k=lengths_k,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seed=seed, scale=scale, causal=causal,
        bottom_right=bottom_right, window_left=window_left, window_right=window_right, softcap=softcap,
        dropout_p=dropout_p,
    )  # fmt: skip
    return ops_attention.laid_out_as(q, o), lse


def run(backend: str, arguments: tuple) -> tuple[Tensor, Tensor]:
    """o and lse on the reference or an operator backend; ``arguments`` in the operator's order."""
    if backend == "reference" or needs_reference():
        return call_reference(*arguments)
    if functorch_active():
        return apply(Attention, *arguments, backend)
    q, k, v, bias, _, sinks = arguments[:6]
    if differentiates(q, k, v, bias, sinks):
        return apply(Attention, *arguments, backend)
    return FORWARD[backend](*arguments)


def differentiates(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> bool:
    """Whether a gradient of one of these may be asked for."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def reads_pages(
    backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, dropout_p: float
) -> bool:
    """Whether the backend reads keys and values from their pages: Triton's does, for inference."""
    if backend != "triton" or dropout_p > 0.0 or needs_reference() or functorch_active():
        return False
    return not differentiates(q, k, v, bias, sinks)

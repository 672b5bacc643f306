"""Attention as one differentiable function, on the fused operators.

The first derivative is a fused kernel. The second is rare, and is the reference's
(:class:`fastseq.autograd.WithReference`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastseq import ops
from fastseq.attn.call import OPTIONS, TENSORS, AttentionCall, settings_of, tensors_of
from fastseq.attn.reference import attention as reference_attention
from fastseq.autograd import WithReference, apply, functorch_active, needs_reference
from fastseq.ops import attention as ops_attention

FORWARD = {name: getattr(torch.ops.fastseq.attention_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.attention_backward, name) for name in ops.BACKENDS}
_BIAS, _SINKS = map(AttentionCall._fields.index, ("bias", "sinks"))


class Attention(torch.autograd.Function):
    """Arguments: an :class:`AttentionCall`'s fields, and the backend's name. Results: ``schemas.ATTENTION_FORWARD``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return FORWARD[arguments[-1]](*arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.backend = inputs[-1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors_of(inputs), *output)
        ctx.settings = settings_of(inputs[:-1])

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, dlse: Tensor | None) -> tuple:
        *tensors, o, lse = ctx.saved_tensors
        call = AttentionCall(*tensors, *ctx.settings)
        d_o = torch.zeros_like(o) if d_o is None else d_o
        bias_grad = ctx.needs_input_grad[_BIAS]
        dq, dk, dv, dbias, dsinks = gradient(d_o, dlse, o, lse, call, bias_grad, ctx.backend)
        found = [dq, dk, dv, *(None,) * len(OPTIONS), None]
        if bias_grad:
            found[_BIAS] = dbias
        if call.sinks is not None:
            found[_SINKS] = dsinks
        return tuple(found)


def backward_arguments(
    d_o: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, fields: Sequence, bias_grad: bool
) -> tuple:
    """In the order of ``schemas.ATTENTION_BACKWARD``; ``fields`` are an :class:`AttentionCall`'s."""
    q, k, v, *options = fields
    return d_o, dlse, q, k, v, o, lse, *options, bias_grad


def gradient(
    d_o: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, call: AttentionCall, bias_grad: bool, backend: str
) -> tuple[Tensor, ...]:
    """Results as ``schemas.ATTENTION_BACKWARD``, differentiable where gradients are on."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return BACKWARD[backend](*backward_arguments(d_o, dlse, o, lse, call, bias_grad))
    if needs_reference():
        return _gradient(d_o, dlse, call, bias_grad)

    def rebuilt(tensors: Any) -> AttentionCall:
        return call._replace(**dict(zip(_ORDER, tensors, strict=True)))

    def kernel(d_o: Tensor, dlse: Tensor | None, *tensors: Any) -> tuple[Tensor, ...]:
        *fields, o, lse = tensors
        return BACKWARD[backend](*backward_arguments(d_o, dlse, o, lse, rebuilt(fields), bias_grad))

    def by_reference(d_o: Tensor, dlse: Tensor | None, *fields: Any) -> tuple[Tensor, ...]:
        return _gradient(d_o, dlse, rebuilt(fields), bias_grad)

    fields = (getattr(call, name) for name in _ORDER)
    counts = 2 + len(_DIFFERENTIABLE), 2 + len(_ORDER)  # o and lse follow from the rest
    return apply(WithReference, kernel, None, by_reference, *counts, d_o, dlse, *fields, o, lse)


_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_ORDER = (*_DIFFERENTIABLE, *(name for name in TENSORS if name not in _DIFFERENTIABLE))


def _gradient(d_o: Tensor, dlse: Tensor | None, call: AttentionCall, bias_grad: bool) -> tuple[Tensor, ...]:
    """What ``schemas.ATTENTION_BACKWARD`` computes, by the reference: differentiable, and of T x T memory."""
    names = ["q", "k", "v", *["bias"] * bias_grad, *["sinks"] * (call.sinks is not None)]

    def forward(*given: Tensor) -> tuple[Tensor, ...]:
        differentiated: dict[str, Any] = dict(zip(names, given, strict=True))
        o, lse = call_reference(call._replace(**differentiated))
        return (o,) if dlse is None else (o, lse)

    vjp: Any = torch.func.vjp(forward, *(getattr(call, name) for name in names))[1]
    found = dict(zip(names, vjp((d_o,) if dlse is None else (d_o, dlse)), strict=True))
    return tuple(found[n] if n in found else call.q.new_empty(0) for n in ("q", "k", "v", "bias", "sinks"))


def call_reference(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The reference's o and lse, o in memory as q is."""
    given = call._asdict()
    for name in ("block_table", "k_scale", "v_scale"):  # pages were gathered, and int8 was widened
        del given[name]
    o, lse = reference_attention(**given)
    return ops_attention.laid_out_as(call.q, o), lse


def run(backend: str, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """o and lse on the reference or an operator backend."""
    if backend == "reference" or needs_reference():
        return call_reference(call)
    if functorch_active() or differentiates(call):
        return apply(Attention, *call, backend)
    return FORWARD[backend](*call)


def differentiates(call: AttentionCall) -> bool:
    """Whether a gradient may be asked for."""
    bias, sinks = call.bias, call.sinks
    return torch.is_grad_enabled() and (
        call.q.requires_grad
        or call.k.requires_grad
        or call.v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    )


def reads_cache(backend: str, call: AttentionCall) -> bool:
    """Whether the backend reads keys and values from their pages, and of int8, as some do for inference."""
    reads = (backend == "triton" and call.k_scale is None) or (backend == "native" and call.q.is_cpu)
    if not reads or call.dropout_p > 0.0 or needs_reference() or functorch_active():
        return False
    return not differentiates(call)

"""Attention as one differentiable function, on the fused operators.

The first derivative is a fused kernel. The second is rare, and is the reference's
(:class:`fastseq.autograd.WithReference`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq import ops
from fastseq.attn.call import OPTIONS, TENSORS, AttentionCall, options_of, settings_of, tensors_of
from fastseq.attn.reference import attention as reference_attention
from fastseq.autograd import WithReference, apply, functorch_active, needs_reference
from fastseq.ops import attention as ops_attention

FORWARD = {name: getattr(torch.ops.fastseq.attention_forward, name) for name in ops.BACKENDS}
BACKWARD = {name: getattr(torch.ops.fastseq.attention_backward, name) for name in ops.BACKENDS}


class Attention(torch.autograd.Function):
    """Arguments: an :class:`AttentionCall`'s fields, and the backend's name. Results as ``ops.ATTENTION_FORWARD``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        *fields, backend = arguments
        return FORWARD[backend](*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *fields, ctx.backend = inputs
        call = AttentionCall(*fields)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors_of(call), *output)
        ctx.settings = settings_of(call)

    @staticmethod
    def backward(ctx: Any, d_o: Tensor | None, dlse: Tensor | None) -> tuple:
        *tensors, o, lse = ctx.saved_tensors
        call = AttentionCall(*tensors, *ctx.settings)
        d_o = torch.zeros_like(o) if d_o is None else d_o
        bias_grad = ctx.needs_input_grad[AttentionCall._fields.index("bias")]
        found = gradient(d_o, dlse, o, lse, call, bias_grad, ctx.backend)
        return *fields_of(found, call, bias_grad), None


def backward_arguments(
    d_o: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, call: AttentionCall, bias_grad: bool
) -> tuple:
    """In the order of ``ops.ATTENTION_BACKWARD``."""
    return d_o, dlse, call.q, call.k, call.v, o, lse, *options_of(call), bias_grad


def fields_of(gradients: tuple[Tensor, ...], call: AttentionCall, bias_grad: bool) -> tuple[Tensor | None, ...]:
    """Results of ``ops.ATTENTION_BACKWARD`` in the places of a call's fields, None for one without a gradient."""
    dq, dk, dv, dbias, dsinks = gradients
    of = {"bias": dbias if bias_grad else None, "sinks": dsinks if call.sinks is not None else None}
    return dq, dk, dv, *map(of.get, OPTIONS)


def gradient(
    d_o: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, call: AttentionCall, bias_grad: bool, backend: str
) -> tuple[Tensor, ...]:
    """Results as ``ops.ATTENTION_BACKWARD``, differentiable where gradients are on."""
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
    return apply(WithReference, kernel, by_reference, *counts, d_o, dlse, *fields, o, lse)


_DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
_ORDER = (*_DIFFERENTIABLE, *(name for name in TENSORS if name not in _DIFFERENTIABLE))


def _gradient(d_o: Tensor, dlse: Tensor | None, call: AttentionCall, bias_grad: bool) -> tuple[Tensor, ...]:
    """What ``ops.ATTENTION_BACKWARD`` computes, by the reference: differentiable, and of T x T memory."""
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
    o, lse = reference_attention(**call._asdict())
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
    if not torch.is_grad_enabled():
        return False
    return any(x is not None and x.requires_grad for x in (call.q, call.k, call.v, call.bias, call.sinks))


def reads_pages(backend: str, call: AttentionCall) -> bool:
    """Whether the backend reads keys and values from their pages: Triton's does, for inference."""
    if backend != "triton" or call.dropout_p > 0.0 or needs_reference() or functorch_active():
        return False
    return not differentiates(call)

"""What the autograd Functions of recurrent layers and attention share: modes, saved tensors, second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

is_batched = torch._C._functorch.is_legacy_batchedtensor  # of torch.autograd.grad(..., is_grads_batched=True)


def functorch_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) is being traced."""
    if torch.compiler.is_compiling():  # Dynamo runs its own account of transforms, and cannot trace these questions
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode() -> bool:
    """Whether tangents go along with tensors, which they do under ``torch.no_grad()`` too."""
    return torch.autograd.forward_ad._current_level >= 0


def wants_gradient(tensors: Sequence[Any]) -> bool:
    """Whether one of these, some of which may be None, has a gradient to be computed."""
    for t in tensors:  # noqa: SIM110 - a plain loop takes half the time of any() over a generator
        if t is not None and getattr(t, "requires_grad", False):  # what is no tensor is refused elsewhere
            return True
    return False


def is_differentiated(t: Tensor | None) -> bool:
    """Whether a gradient of the tensor is wanted, by a transform around it too: a vmap's wrapper does not tell."""
    while t is not None:
        if t.requires_grad:
            return True
        if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(t):
            return False
        t = torch._C._functorch.get_unwrapped(t)
    return False


def all_absent(grads: Sequence[Tensor | None]) -> bool:
    """Whether no result has a gradient, as where what came after returned none: then nothing has one."""
    for d in grads:  # noqa: SIM110 - as above
        if d is not None:
            return False
    return True


def needs_reference() -> bool:
    """Whether a transform is active that the fused operators do not have: forward mode, a nested gradient, or
    functionalization, which takes no Function."""
    if torch.compiler.is_compiling():
        return transform_is_traced()
    if forward_mode():
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return False
    kinds = [level.key() for level in stack]
    transform = torch._C._functorch.TransformType
    return transform.Jvp in kinds or transform.Functionalize in kinds or kinds.count(transform.Grad) > 1


def transform_is_traced() -> bool:
    """Whether a torch.func transform is active, asked while Dynamo traces: it enters transforms as it meets them, and
    takes this answer for a constant. It loses a Function's backward inside one, so the reference must run there."""
    return torch._C._functorch.peek_interpreter_stack() is not None


transform_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recorder(function: Any) -> Any:
    """``function.apply`` of a Function without default arguments, outside of transforms.

    torch.autograd.Function's own inspects the signature of ``forward`` at every call, to bind defaults: that costs more
    than a small layer's kernels.
    """
    return super(torch.autograd.Function, function).apply


def apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)`` by way of :func:`recorder`. What torch's own does besides is done here."""
    if torch.compiler.is_compiling():
        return function.apply(*distinct(args))
    if functorch_active():
        return function.apply(*args)
    return recorder(function)(*map(unwrapped, args))


def distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, with a view of a tensor that was there before: Dynamo gives a tensor that is several arguments of
    a Function the gradient of one of them alone."""
    out: list[Any] = []
    for x in args:
        out.append(x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in out) else x)
    return out


def unwrapped(x: Any) -> Any:
    """A tensor that outlived its transform without the transform's wrapper; everything else as it is."""
    return torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x


def save(ctx: Any, tensors: Sequence[Tensor | None], read: Sequence[bool] | None = None) -> None:
    """Save for the backward pass the tensors that are read there (None: all), and keep the others aside, for second
    derivatives. No output may be among those."""
    if read is None:
        ctx.save_for_backward(*tensors)
        ctx.aside = ()
        return
    kept: list[Tensor | None] = []
    aside: list[tuple[int, Tensor, int | None]] = []
    for n, t in enumerate(tensors):
        if t is None or read[n]:
            kept.append(t)
        else:
            kept.append(None)
            aside.append((n, t, None if t.is_inference() else t._version))
    ctx.save_for_backward(*kept)
    ctx.aside = aside


def saved(ctx: Any) -> list[Any]:
    """The tensors that :func:`save` was given."""
    tensors = list(ctx.saved_tensors)
    for n, tensor, version in ctx.aside:
        if torch.is_grad_enabled() and version is not None and tensor._version != version:
            raise RuntimeError(
                f"a tensor {list(tensor.shape)} that a second derivative needs was modified by an inplace operation: "
                f"it is at version {tensor._version}, expected {version}; give the layer a clone of it"
            )
        tensors[n] = tensor
    return tensors


def present(found: Sequence[Tensor | None], need: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients as a Function may return them: an empty tensor where there is none, or none is needed."""
    return tuple(like.new_empty(0) if d is None or not n else d for d, n in zip(found, need, strict=True))


def vjp(
    function: Callable, inputs: Sequence[Tensor | None], need: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of a function's inputs from those of its results, some of which may be None; differentiable. None where
    not needed."""
    wanted = [i for i, t in enumerate(inputs) if t is not None and need[i]]
    outputs = [i for i, d in enumerate(grads) if d is not None]

    def forward(*own: Tensor) -> tuple[Tensor, ...]:
        results = function(*(own[wanted.index(i)] if i in wanted else t for i, t in enumerate(inputs)))
        return tuple(results[i] for i in outputs)

    pull: Any = torch.func.vjp(forward, *(inputs[i] for i in wanted))[1]
    found = dict(zip(wanted, pull(tuple(d for d in grads if d is not None)), strict=True))
    return [found.get(i) for i in range(len(inputs))]


class WithReference(torch.autograd.Function):
    """A fused kernel, and behind it, for whoever differentiates its results, a reference that torch can differentiate.
    Second derivatives are rare, so nothing is computed for them until one is taken.

    Arguments: the kernel; its gradient, a function of the results' gradients to those of all tensors, for whoever
    differentiates no further (None: the reference's serves too); the reference, a function of the first ``kept``
    tensors to the same results; ``inputs``, how many of these are differentiated; ``kept``; then the kernel's tensors,
    some of which may be None.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        kernel: Callable,
        gradient: Callable | None,
        reference: Callable,
        inputs: int,
        kept: int,
        *tensors: Tensor | None,
    ) -> Any:
        return kernel(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, ctx.gradient, ctx.reference, ctx.inputs, kept, *tensors = inputs
        ctx.count = len(inputs)
        ctx.save_for_backward(*tensors[:kept])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        if ctx.gradient is not None and not torch.is_grad_enabled():
            return (*(None,) * 5, *ctx.gradient(*grads))
        tensors = list(ctx.saved_tensors)
        places = [n for n, t in enumerate(tensors[: ctx.inputs]) if t is not None]

        def first(*present: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(places, present, strict=True))
            return ctx.reference(*(given.get(n, t) for n, t in enumerate(tensors)))

        vjp: Any = torch.func.vjp(first, *(tensors[n] for n in places))[1]
        found: list[Tensor | None] = [None] * ctx.count
        for place, grad in zip(places, vjp(grads), strict=True):
            found[5 + place] = grad
        return tuple(found)

"""Argument errors: what came, what was expected, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. torch.nn raises ValueError for some of these and RuntimeError for others; this is both, so that
    handlers written for torch.nn keep working."""


def require(condition: bool, message: str) -> None:
    """Raise ArgumentError with this message unless the condition holds."""
    if not condition:
        raise ArgumentError(message)


def sizes(tensor: Tensor) -> str:
    """A shape as people write it: ``[3, 5]``."""
    return str(list(tensor.shape))


def check_float(name: str, tensor: Tensor) -> None:
    """The dtypes the layers work in."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    require(
        tensor.is_floating_point(),
        f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; convert it with .to(torch.float32)",
    )


def check_like(name: str, tensor: Tensor, reference: Tensor, of: str) -> None:
    """Same dtype and device as another argument."""
    require(
        tensor.dtype == reference.dtype,
        f"{name} is {tensor.dtype} but {of} {reference.dtype}; convert one with .to(dtype)",
    )
    require(
        tensor.device == reference.device,
        f"{name} is on {tensor.device} but {of} on {reference.device}; move one with .to(device)",
    )


def check_input(x: Tensor, w_ih: Tensor, batch_first: bool) -> None:
    """The input of a recurrent layer: ``[T, B, I]``, ``[B, T, I]`` with batch_first, or ``[T, I]`` unbatched."""
    check_float("input", x)
    layout = "[B, T, I]" if batch_first else "[T, B, I]"
    require(
        x.dim() in (2, 3),
        f"input must be 3-D {layout}, or 2-D [T, I] for one unbatched sequence, got {x.dim()}-D {sizes(x)}",
    )
    require(
        x.shape[-1] == w_ih.shape[1],
        f"input has {x.shape[-1]} features in its last dimension {sizes(x)}, but input_size is {w_ih.shape[1]}",
    )
    steps = x.shape[1 if batch_first and x.dim() == 3 else 0]
    require(steps > 0, f"input {sizes(x)} has no time steps; a sequence needs at least one")
    check_like("input", x, w_ih, "the weights are")


def check_state(name: str, state: Tensor, expected: Sequence[int], x: Tensor) -> None:
    """An initial state of exactly this shape."""
    if not isinstance(state, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(state).__name__}")
    require(
        list(state.shape) == list(expected),
        f"{name} must be [num_layers * directions, batch, size] = {list(expected)}, got {sizes(state)}"
        if len(expected) == 3
        else f"{name} must be {list(expected)} for this input, got {sizes(state)}",
    )
    check_like(name, state, x, "input is")


def check_lengths(lengths: Tensor, batch: int, steps: int, x: Tensor) -> None:
    """Valid steps of each row: int ``[B]``, each from 0 to T. Values are looked at only on the CPU, where that is free."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an int64 Tensor [B], got {type(lengths).__name__}; use torch.tensor(lengths)")
    require(
        not lengths.is_floating_point() and not lengths.is_complex() and lengths.dtype != torch.bool,
        f"lengths must hold integers, got {lengths.dtype}; convert with .long()",
    )
    require(tuple(lengths.shape) == (batch,), f"lengths must be [batch] = [{batch}], got {sizes(lengths)}")
    require(
        lengths.device == x.device,
        f"lengths is on {lengths.device} but input on {x.device}; move it with lengths.to({str(x.device)!r})",
    )
    if batch and lengths.device.type == "cpu" and _values_visible(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        require(
            low >= 0 and high <= steps,
            f"lengths must lie in 0..{steps} (the input's time steps), got values from {low} to {high}",
        )


def check_reset(reset: Tensor, expected: Sequence[int], x: Tensor) -> None:
    """Where the state is cleared: bool, shaped as the input's time and batch."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool Tensor, got {type(reset).__name__}")
    require(
        reset.dtype == torch.bool,
        f"reset must be bool (True clears the state before that step), got {reset.dtype}; convert with .bool()",
    )
    require(
        list(reset.shape) == list(expected),
        f"reset must be shaped as the input's time and batch {list(expected)}, got {sizes(reset)}",
    )
    require(reset.device == x.device, f"reset is on {reset.device} but input on {x.device}; move it with .to(device)")


def _values_visible(tensor: Tensor) -> bool:
    """False while a graph is traced or a transform maps over the tensor: it has no values to look at then."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not isinstance(tensor, torch._subclasses.FakeTensor)

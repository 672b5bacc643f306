"""Argument errors: what came, what was expected, and what to do about it."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. torch.nn raises ValueError for some of these and RuntimeError for others; this is both, so that
    handlers written for torch.nn keep working."""


def sizes(tensor: Tensor) -> str:
    """A shape as people write it: ``[3, 5]``."""
    return str(list(tensor.shape))


def check_tensor(name: str, tensor: object) -> None:
    """A Tensor, whatever is in it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")


def check_memory(name: str, tensor: Tensor) -> None:
    """A tensor on the CPU whose storage was not freed, of those that have one. A compiler's tensors have none."""
    if torch.compiler.is_compiling():
        return
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu
    if ordinary and tensor.numel() and tensor.untyped_storage().nbytes() == 0:
        raise ArgumentError(
            f"{name} {sizes(tensor)} has no memory: its storage was freed (untyped_storage().resize_(0))"
        )


def check_float(name: str, tensor: Tensor) -> None:
    """The dtypes the layers work in."""
    check_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise ArgumentError(
            f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; "
            f"convert it with .to(torch.float32)"
        )


def check_like(name: str, tensor: Tensor, reference: Tensor, of: str) -> None:
    """Same dtype and device as another argument."""
    if tensor.dtype != reference.dtype:
        raise ArgumentError(f"{name} is {tensor.dtype} but {of} {reference.dtype}; convert one with .to(dtype)")
    if tensor.device != reference.device:
        raise ArgumentError(f"{name} is on {tensor.device} but {of} on {reference.device}; move one with .to(device)")


def check_nonlinearity(name: str) -> None:
    """The RNN's activation."""
    if name not in ("tanh", "relu"):
        raise ArgumentError(f"nonlinearity must be 'tanh' or 'relu', got {name!r}")


def check_probability(name: str, p: object) -> None:
    """That of a dropout of states or weights, or of zoneout, as torch's layers check theirs; nothing is left at 1."""
    if isinstance(p, bool) or not isinstance(p, numbers.Real) or not 0 <= float(p) < 1:
        what = "a unit keeping its old value" if "zoneout" in name else "an element being zeroed"
        raise ArgumentError(f"{name} must be a number in [0, 1), the probability of {what}, got {p!r}")


def check_zoneout(zoneout: tuple[object, object]) -> None:
    """The probabilities of h and c."""
    for of, p in zip(("", "'s second, that of c,"), zoneout, strict=True):
        check_probability(f"zoneout{of}", p)


def check_input(x: Tensor, w_ih: Tensor, batch_first: bool) -> None:
    """The input of a recurrent layer: ``[T, B, I]``, ``[B, T, I]`` with batch_first, or ``[T, I]`` unbatched."""
    check_float("input", x)
    rank = x.dim()
    if rank != 3 and rank != 2:
        layout = "[B, T, I]" if batch_first else "[T, B, I]"
        raise ArgumentError(
            f"input must be 3-D {layout}, or 2-D [T, I] for one unbatched sequence, got {rank}-D {sizes(x)}"
        )
    if x.shape[-1] != w_ih.shape[1]:
        raise ArgumentError(
            f"input has {x.shape[-1]} features in its last dimension {sizes(x)}, but input_size is {w_ih.shape[1]}"
        )
    if x.shape[1 if batch_first and rank == 3 else 0] == 0:
        raise ArgumentError(f"input {sizes(x)} has no time steps; a sequence needs at least one")
    check_like("input", x, w_ih, "the weights are")


def check_weights(weights: Sequence[Tensor], names: Sequence[str], x: Tensor) -> None:
    """Every weight is of the input's dtype, on its device; ``names`` are those of one layer and direction."""
    for n, weight in enumerate(weights):
        if weight.dtype != x.dtype or weight.device != x.device:
            check_like("input", x, weight, f"{names[n % len(names)]} is")


def check_cell_input(x: Tensor, w_ih: Tensor) -> None:
    """The sizes of a cell's input: ``[B, I]``, or ``[I]`` unbatched. The scan asks for its dtype, after autocast."""
    check_float("input", x)
    if x.dim() not in (1, 2):
        raise ArgumentError(f"input of a cell must be [B, I] or [I], got {x.dim()}-D {sizes(x)}")
    if x.shape[-1] != w_ih.shape[1]:
        raise ArgumentError(
            f"input has {x.shape[-1]} features in its last dimension {sizes(x)}, but input_size is {w_ih.shape[1]}"
        )


def check_state(name: str, state: Tensor, expected: tuple[int, ...], x: Tensor) -> None:
    """An initial state of exactly this shape."""
    check_tensor(name, state)
    check_dense(name, state)
    if tuple(state.shape) != expected:
        what = "[num_layers * directions, batch, size] = " if len(expected) == 3 else ""
        raise ArgumentError(f"{name} must be {what}{list(expected)} for this input, got {sizes(state)}")
    check_like(name, state, x, "input is")


def zoneout_of(zoneout: Any, pair: bool = False) -> tuple[Any, Any]:
    """Zoneout's probabilities of h and c, from one number or with ``pair`` two, not checked yet."""
    if not isinstance(zoneout, (tuple, list)):
        return zoneout, zoneout if pair else 0.0
    if not pair or len(zoneout) != 2:
        accepted = "a number in [0, 1)" + " or a pair of them, for h and c" * pair
        raise ArgumentError(f"zoneout must be {accepted}, got {zoneout!r}")
    return zoneout[0], zoneout[1]


def lstm_state(hx: tuple[Tensor, Tensor] | None, name: str = "hx") -> tuple[Tensor | None, Tensor | None]:
    """h and c of an LSTM's ``hx``: both or neither."""
    if hx is None:
        return None, None
    stacked = isinstance(hx, Tensor) and hx.dim() > 0 and hx.shape[0] == 2  # which unpacks, as torch's layers do
    if not stacked and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        got = f"one Tensor {sizes(hx)}" if isinstance(hx, Tensor) else type(hx).__name__
        got += f" of {len(hx)}" if isinstance(hx, (tuple, list)) else ""
        raise ArgumentError(f"{name} of an LSTM must be a pair of tensors (h_0, c_0), got {got}; give both states")
    h, c = hx
    if (h is None) != (c is None):
        raise ArgumentError(f"{name} must be a pair of tensors (h_0, c_0), got one None")
    return h, c


def check_layers(num_layers: int, directions: int, weights: Sequence[Tensor], names: Sequence[str]) -> None:
    """There are as many weights as the layer's attributes say."""
    expected = num_layers * directions * len(names)
    if len(weights) != expected:
        raise ArgumentError(
            f"num_layers = {num_layers} in {directions} direction{'s' * (directions > 1)} needs {expected} weights "
            f"({', '.join(names)} each), but there are {len(weights)}; these attributes are set when a layer is made: "
            "make a new one to change them"
        )


def check_dense(name: str, tensor: Tensor) -> None:
    """One block of memory: neither sparse nor nested."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested Tensor" if tensor.is_nested else f"a Tensor of layout {tensor.layout}"
        fix = "torch.nested.to_padded_tensor" if tensor.is_nested else ".to_dense()"
        raise ArgumentError(f"{name} must be a dense Tensor, got {kind}; convert it with {fix}")


def check_lengths(lengths: Tensor, batch: int, steps: int, x: Tensor) -> None:
    """Valid steps of each row: int ``[B]``, each from 0 to T. Values are read only on the CPU, where that is free."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an int64 Tensor [B], got {type(lengths).__name__}; use torch.tensor(lengths)")
    check_dense("lengths", lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ArgumentError(f"lengths must hold integers, got {lengths.dtype}; convert with .long()")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ArgumentError(f"lengths must be [batch] = [{batch}], got {sizes(lengths)}")
    if lengths.device != x.device:
        raise ArgumentError(
            f"lengths is on {lengths.device} but input on {x.device}; move it with lengths.to({str(x.device)!r})"
        )
    if lengths.device.type == "cpu" and values_visible(lengths) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            raise ArgumentError(
                f"lengths must lie in 0..{steps} (the input's time steps), got values from {low} to {high}"
            )


def check_batch_sizes(batch_sizes: Tensor, x: Tensor, lengths: Tensor | None, reset: Tensor | None) -> None:
    """Sequences of each step of the packed batch x ``[rows, I]``, as a PackedSequence has them: int64 ``[T]``."""
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"batch_sizes must be an int64 Tensor [T], got {type(batch_sizes).__name__}")
    if lengths is not None or reset is not None:
        raise ArgumentError("batch_sizes stands in place of lengths and reset: give it alone")
    if x.dim() != 2:
        raise ArgumentError(f"input must be packed, [rows, I], where batch_sizes is given, got {x.dim()}-D {sizes(x)}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or batch_sizes.device.type != "cpu":
        raise ArgumentError(
            "batch_sizes must be int64 [T] on the CPU, as a PackedSequence has it, "
            f"got {batch_sizes.dtype} {sizes(batch_sizes)} on {batch_sizes.device}"
        )
    if torch.jit.is_tracing() or not values_visible(batch_sizes):
        return
    falls = not bool((batch_sizes[1:] > batch_sizes[:-1]).any())
    if not falls or int(batch_sizes[-1]) < 1 or int(batch_sizes.sum()) != x.shape[0]:
        raise ArgumentError(
            "batch_sizes must not grow from step to step, must end with at least 1, and must add up to the input's "
            f"{x.shape[0]} rows; take data and batch_sizes from torch.nn.utils.rnn.pack_sequence"
        )


def check_reset(reset: Tensor, x: Tensor) -> None:
    """Where the state is cleared: bool, shaped as the input's time and batch."""
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset must be a bool Tensor, got {type(reset).__name__}")
    check_dense("reset", reset)
    if reset.dtype != torch.bool:
        raise ArgumentError(
            f"reset must be bool (True clears the state before that step), got {reset.dtype}; convert with .bool()"
        )
    if reset.shape != x.shape[:-1]:
        raise ArgumentError(
            f"reset must be shaped as the input's time and batch {list(x.shape[:-1])}, got {sizes(reset)}"
        )
    if reset.device != x.device:
        raise ArgumentError(f"reset is on {reset.device} but input on {x.device}; move it with .to(device)")


def values_visible(tensor: Tensor) -> bool:
    """False while a graph is traced or a transform maps over the tensor: it has no values to look at then."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return not (isinstance(tensor, torch._subclasses.FakeTensor) or hasattr(tensor, "device_mesh"))  # a DTensor's are


def refuse_script(layer: object) -> NoReturn:
    """``__prepare_scriptable__`` of our layers: torch.jit.script calls it of a model and of every module inside."""
    raise RuntimeError(
        f"torch.jit.script cannot compile fastseq's {type(layer).__name__}: use torch.jit.trace or torch.export, or "
        "call fastseq.unpatch(model) before"
    )

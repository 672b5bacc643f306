"""The short way into the native kernels, past torch's operator dispatch: what a small model costs is mostly that.

Its functions are the compiled extension's (csrc/direct.cpp), or None where they must not be used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from fastseq import auto, ops
from fastseq.autograd import forward_mode

TESTED = ((2, 10), (2, 14))
"""Releases of torch, from the first on and before the last, with which the extension may look behind a Tensor's
``_cdata`` and make tensors itself. With others the operators are called: slower by some microseconds, the same
otherwise."""


def _questions() -> tuple[Callable[[], object], ...]:
    """What must all be false or None for a tensor to be no more than its numbers, first whether gradients are on. The
    extension asks at each call."""
    return (
        torch.is_grad_enabled,
        torch._C._functorch.peek_interpreter_stack,  # torch.func's transforms
        torch._C._len_torch_dispatch_stack,
        torch._C._len_torch_function_stack,
        torch._C._is_any_autocast_enabled,
        torch._C._is_tracing,
        torch.autograd._profiler_enabled,
    )


def plain() -> bool:
    """Whether a tensor is no more than its numbers here and now."""
    return not forward_mode() and not any(question() for question in _questions())


def _bind() -> tuple[Callable[..., Any] | None, ...]:
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if ops.NATIVE_MISSING is not None or not TESTED[0] <= release < TESTED[1]:
        return (None,) * len(_NAMES)
    import fastseq._native as native  # type: ignore[import-not-found]

    trial = torch.arange(6.0).view(2, 3)[:, 1:]
    if not native.bind(torch.Tensor, torch.nn.Parameter, _questions(), vars(forward_ad), auto.BF16_ROWS):
        return (None,) * len(_NAMES)
    address, shape, made, its = native.described(trial)
    if (address, shape) != (trial.data_ptr(), tuple(trial.shape)):
        return (None,) * len(_NAMES)
    if type(made) is not torch.Tensor or (made.data_ptr(), made.shape, made.dtype) != (its, shape, trial.dtype):
        return (None,) * len(_NAMES)
    return tuple(getattr(native, name) for name in _NAMES)


_NAMES = (
    *("stack", "layer", "cell", "cell_layer", "plan", "planned", "unchanged"),
    *("undisturbed", "layer_forward", "layer_gradient"),
    *("attend", "attend_forward", "attend_backward", "multihead", "multihead_forward", "multihead_backward"),
)
(
    stack, layer, cell, cell_layer, plan, planned, unchanged,
    undisturbed, layer_forward, layer_gradient,
    attend, attend_forward, attend_backward, multihead, multihead_forward, multihead_backward,
) = _bind()  # fmt: skip

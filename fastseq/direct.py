"""The fast path into the native kernels, past torch's dispatcher: what a small model costs is mostly that.

Its functions are the compiled extension's (csrc/recurrent/direct.cpp). Each returns None for a call that it does not
take, and so for every call where this fast path is off (:data:`MISSING`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastseq import ops


def _offset(samples: Sequence[Tensor], words: int, address: Callable[[Tensor], int], value: Callable) -> int | None:
    """The one place, in bytes, at which the memory at ``address`` of each sample, ``words`` words of 8 bytes, has the
    sample's ``value``; None where there is none, or more than one."""
    memory = [(ctypes.c_uint64 * words).from_address(address(sample)) for sample in samples]
    places = [i for i in range(words) if all(m[i] == value(s) for m, s in zip(memory, samples, strict=True))]
    return 8 * places[0] if len(places) == 1 else None


def _samples() -> tuple[Tensor, ...]:
    """Tensors of unlike dispatch keys."""
    x = torch.empty(2, 3)
    return (
        x, torch.nn.Parameter(x), torch.empty(2, dtype=torch.int64), torch._neg_view(x), torch.empty(2, device="meta"),
        torch._efficientzerotensor(2, 3), x.to_sparse(), torch.zeros(2, dtype=torch.complex64).conj(),
    )  # fmt: skip


def _keys(x: Tensor) -> int:
    return torch._C._dispatch_keys(x).raw_repr()


def _plain_keys() -> tuple[int, int]:
    """The dispatch keys of an ordinary CPU tensor, and of one made in inference mode."""
    with torch.inference_mode():
        inside = torch.empty(1)
    return _keys(torch.empty(1)), _keys(inside)


def _mode_keys() -> tuple[int, int]:
    """The dispatch key that inference mode leaves out, and those of autocast on all devices."""
    keys = {name: torch._C.DispatchKeySet(key).raw_repr() for name, key in torch._C.DispatchKey.__members__.items()}
    autocast = functools.reduce(int.__or__, (key for name, key in keys.items() if name.startswith("Autocast")))
    return keys["ADInplaceOrView"], autocast


@contextlib.contextmanager
def _between(enter: Callable[[], object], leave: Callable[[], object]) -> Iterator[None]:
    enter()
    try:
        yield
    finally:
        leave()


def _modes() -> tuple[tuple[str, contextlib.AbstractContextManager], ...]:
    """Torch's modes that change what a tensor means, but tracing."""
    functorch = torch._C._functorch
    transform = functools.partial(functorch._vmap_increment_nesting, 1, "error"), functorch._vmap_decrement_nesting
    profile = profiler._run_on_profiler_start, profiler._run_on_profiler_stop
    return (
        ("autocast", torch.autocast("cpu")), ("a profile", _between(*profile)), ("a transform", _between(*transform)),
        ("a dispatch mode", TorchDispatchMode()), ("a function mode", TorchFunctionMode()),
    )  # fmt: skip


def _mistaken(is_plain: Callable[[], bool]) -> str | None:
    """In which of torch's modes ``is_plain()`` has the wrong answer."""
    with ThreadPoolExecutor(1) as thread:
        if not thread.submit(is_plain).result():
            return "a thread without any mode"
    for name, mode in _modes():
        with mode:
            if is_plain():
                return name
    found: list[bool] = []
    if not torch.jit.is_tracing():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(lambda x: (found.append(is_plain()), x)[1], torch.ones(1), check_trace=False)  # type: ignore
    return "a trace" if any(found) else None


def _bind() -> str | None:
    """Tries what the extension assumes beyond torch's stable interface; None, or the first that does not hold."""
    if ops.NATIVE_MISSING is not None:
        return "the native kernels are missing"
    import fastseq._native as native  # type: ignore[import-not-found]

    if not hasattr(torch._C, "_dispatch_keys"):
        return "torch._C._dispatch_keys is missing"
    samples = _samples()
    impl_offset = _offset(samples, torch.Tensor.__basicsize__ // 8, id, lambda x: x._cdata)
    keys_offset = _offset(samples, _IMPL_WORDS, lambda x: x._cdata, _keys)
    if impl_offset is None or keys_offset is None:
        return "the address of a tensor's implementation, or its dispatch keys, are not found in its memory"
    plain = torch.Tensor, torch.nn.Parameter, torch._C._len_torch_function_stack, vars(forward_ad), vars(profiler)
    if not native.bind(*plain, impl_offset, keys_offset, _plain_keys(), *_mode_keys()):
        return "torch does not export THPVariable_Wrap"
    trial = torch.arange(6.0).view(2, 3)[:, 1:]
    for other in (torch._neg_view(trial), torch.empty(2, device="meta"), torch._efficientzerotensor(4)[1:]):
        if native.described(other) is not None:
            return "a tensor that is more than its numbers is taken for an ordinary one"
    address, shape, made, its = native.described(trial) or (None,) * 4
    if (address, shape) != (trial.data_ptr(), tuple(trial.shape)):
        return "a tensor's address and shape are not found"
    if type(made) is not torch.Tensor or (made.data_ptr(), made.shape, made.dtype) != (its, shape, trial.dtype):
        return "a new tensor is not what it should be"
    mistaken = _mistaken(native.is_plain)
    return None if mistaken is None else f"{mistaken} is taken for another"


_IMPL_WORDS = 26  # of 8 bytes, the length of a TensorImpl

MISSING: str | None = _bind()
"""None where the fast path is on; else which assumption does not hold. Calls then take the operators: slower by some
microseconds, the same otherwise."""


def _decline(*args: Any) -> Any:
    """What a function returns for a call that it does not take."""


_NATIVE = None if MISSING is not None else importlib.import_module("fastseq._native")
_NAMES = "infer unchanged is_plain layers_forward layers_backward attend attend_kept attend_backward multihead"
infer, unchanged, is_plain, layers_forward, layers_backward, attend, attend_kept, attend_backward, multihead = (
    getattr(_NATIVE, name, _decline) for name in _NAMES.split()
)

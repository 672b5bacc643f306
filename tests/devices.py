"""Where tensors that a test draws are made: on the CPU, or with ``--device cuda`` on a GPU.

The tests of GPU kernels draw as all others do, on torch's default device; ``--device`` sets that before any test is
imported. ``pretend`` is for a machine without a GPU: tensors say that they are on one and compute on the CPU, and what
mixes them with tensors of the CPU fails as it would there. Triton's interpreter stands in for the compiled kernels.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_flatten, tree_map_only

CHOICES = ("cpu", "cuda", "pretend")

DEVICE = "cpu"
"""The type of the device that tests draw on."""

KERNELS = "triton"
"""Whose kernels the suites of GPU kernels are about: ``triton``, or ``native``, which is CUDA C++ on a GPU."""

COUNTS: Counter[str] = Counter()
"""What the tests of kernels have done beside passing, for the end of a run: conftest.py adds it up over processes."""


LACKS = re.compile(
    r"the native (CUDA kernels have no|kernels read no) .*"
    r"|the CUDA C\+\+ kernels of attention take (bfloat16 and float16 alone|up to .*)"
)
"""What the CUDA C++ kernels say of a call that is not theirs by its nature, and Triton's to do."""


def use(device: str, kernels: str) -> None:
    """Draw on a device from now on, and send calls of the Triton operators to those of ``kernels``."""
    global DEVICE, KERNELS
    KERNELS = kernels
    DEVICE = "cpu" if device == "cpu" else "cuda"
    if device == "pretend":
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # there is no .data to put others into
        Pretend().__enter__()
    elif device != "cpu":  # a default device is a mode, even the CPU's: torch.compile and the shortest calls see it
        torch.set_default_device(device)


def operator(name: str, backend: str) -> Any:
    """``torch.ops.fastseq.<name>.<backend>``; that of --kernels where Triton's is asked for, and on a GPU the CUDA C++
    kernels themselves where their emulation is.

    What the CUDA C++ kernels lack skips a test that is about Triton's, with what they say of it: :data:`LACKS`.
    """
    chosen = KERNELS if backend == "triton" else "native" if backend == "emulated" and DEVICE == "cuda" else backend
    packet = getattr(torch.ops.fastseq, name)
    found = getattr(packet, chosen)
    if chosen == backend or backend == "emulated":
        return found

    def call(*arguments: Any) -> Any:
        try:
            return found(*arguments)
        except RuntimeError as error:
            if lacks := LACKS.search(str(error)):
                pytest.skip(lacks[0])
            raise

    return call


class OnGPU(Tensor):
    """A tensor that says it is on a GPU, and whose numbers are a tensor on the CPU."""

    inner: Tensor
    device = torch.device("cuda:0")  # for Python's eyes alone: torch itself would ask the driver for a stream
    is_cuda = True

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )
        self.inner = inner
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnGPU({self.inner!r})"

    def cpu(self) -> Tensor:
        return self.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        moves = function.overloadpacket in (torch.ops.aten.copy_, torch.ops.aten.index)
        if not moves and any(not isinstance(x, OnGPU) and x.dim() > 0 for x in tensors):
            raise RuntimeError(f"{function}: expected all tensors to be on one device, found cpu and cuda:0")
        ours = {id(x.inner): x for x in tensors if isinstance(x, OnGPU)}
        args, kwargs = tree_map_only(OnGPU, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, lambda x: ours[id(x)] if id(x) in ours else OnGPU(x), function(*args, **kwargs))


class Pretend(TorchFunctionMode):
    """Makes the tensors of every factory function OnGPU, unless it was told another device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in _device_constructors():
            return function(*args, **kwargs)
        if torch.device(kwargs.get("device") or "cuda").type != "cuda":
            return function(*args, **kwargs)
        kwargs["device"] = "cpu"
        wants_grad = kwargs.pop("requires_grad", False)

        def wrap(x: Tensor) -> Tensor:
            return x if isinstance(x, OnGPU) else OnGPU(x).requires_grad_(wants_grad)

        return tree_map_only(Tensor, wrap, function(*args, **kwargs))

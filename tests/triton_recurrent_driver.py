"""A GPU that is not there: Triton launches as it would on one, looks its variants up, and what arrives is written down.

Nothing is compiled and nothing computes; tensors lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction
from triton_recurrent_support import kernel_named
from triton_support import TARGETS

KERNELS = (
    "forward_sequence", "forward_step", "forward_projection", "forward_persistent",
    "backward_sequence", "backward_step", "backward_state", "backward_persistent",
    "normed_forward_sequence", "normed_forward_step", "normed_backward_sequence", "normed_backward_step",
    "gain_gradients",
)  # fmt: skip


@dataclass
class Device:
    """Triton's driver of a device, as far as launches ask for it."""

    target: str
    stream: int = 7

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> Any:
        return TARGETS[self.target]


@dataclass(eq=False)
class Made:
    """One variant of a kernel, as Triton would have compiled it."""

    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    log: Log
    function: str = "function"
    packed_metadata: tuple = ()

    __getitem__ = CompiledKernel.__getitem__

    def _init_handles(self) -> None:
        pass

    def launch_metadata(self, grid: tuple[int, ...], stream: int, *args: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, function: str, packed: Any, metadata: Any, enter: Any,
            leave: Any, *args: Any) -> None:  # fmt: skip
        names = list(self.signature)
        assert len(args) == len(names), f"{self.kernel}: {len(args)} arguments, {len(names)} expected"
        self.log.launches.append(Launch(self, (x, y, z), stream, dict(zip(names, args, strict=True)), (enter, leave)))


@dataclass
class Launch:
    made: Made
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, Any]  # tensors, or their addresses
    hooks: tuple[Any, Any]


@dataclass
class Log:
    """What was compiled, what was launched, how many launches went through Triton's own look-up."""

    made: list[Made] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    bound: int = 0


@contextmanager
def device(target: str = "sm_90") -> Iterator[Log]:
    """Inside the ``with`` block there is a GPU of one of TARGETS."""
    log = Log()

    def compile_nothing(self, key, signature, device, constexprs, options, attrs, warmup):
        names = list(signature)
        made = Made(self.__name__, signature, {names[i]: v for (i,), v in constexprs.items()}, attrs, options, log)
        self.device_caches[device][0][key] = made
        log.made.append(made)
        return made

    run = JITFunction.run

    def counted(self, *args, **kwargs):
        log.bound += 1
        return run(self, *args, **kwargs)

    driver, compile_ = triton.runtime.driver, JITFunction._do_compile
    before, driver._active = driver._active, Device(target)
    JITFunction._do_compile, JITFunction.run = compile_nothing, counted
    kernels = [kernel_named(name) for name in KERNELS]
    try:
        for kernel in kernels:
            kernel.device_caches.clear()
        yield log
    finally:
        JITFunction._do_compile, JITFunction.run = compile_, run
        driver._active = before
        for kernel in kernels:
            kernel.device_caches.clear()


class Operations(TorchDispatchMode):
    """Every operation of torch inside the ``with`` block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

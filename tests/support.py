"""What the tests share: the backends they run over, the error rule, and inputs of every recurrent cell."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq import direct, ops

needs_native = pytest.mark.skipif(
    ops.NATIVE_MISSING is not None, reason=f"the compiled extension is not installed: {ops.NATIVE_MISSING}"
)
NATIVE = pytest.param("native", marks=needs_native)
BACKENDS = ["reference", "torch", NATIVE]
CELLS = list(ops.GATES)
PROJECTED = [f"{cell}_projected" for cell in CELLS if ops.HAS_C[cell]]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def fill_new_memory_with_junk(on: bool) -> None:
    """Has torch fill all memory that it hands out on the CPU: what a kernel reads or returns unwritten shows.

    Done by the allocator's own debug switch, the one place that the outputs of native kernels go through too:
    torch.utils.deterministic.fill_uninitialized_memory covers torch.empty alone. The junk is 0x7fedbeef over and over,
    a NaN in float32, a NaN in every second element of 16 bits, and 1.7e308 in float64.
    """
    libc10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(libc10, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = on
    assert not on or torch.empty(3, device="cpu").isnan().all(), "the allocator does not poison"


FAST_PATHS = ("infer", "layers_forward", "layers_backward", "attend", "attend_kept", "attend_backward", "multihead")
"""The native calls past torch's dispatcher (fastseq/direct.py)."""


class Declined(AssertionError):
    """A native call past the dispatcher did not take a call that it should take."""


@contextmanager
def fast_paths(required: bool) -> Iterator[None]:
    """Native calls past the dispatcher: with ``required`` one that declines raises Declined; without, all decline."""

    def must(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = function(*args)
            if found is None:
                raise Declined(f"direct.{name} declined")
            return found

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in FAST_PATHS:
            patch.setattr(direct, name, must(name, getattr(direct, name)) if required else lambda *_: None)
        yield


def error(got: Tensor, truth: Tensor) -> float:
    """Largest absolute difference from the float64 truth."""
    if got.shape != truth.shape:
        raise AssertionError(f"shape {list(got.shape)} where {list(truth.shape)} was expected")
    difference = (got.detach().double() - truth.detach()).abs()
    return float(difference.nan_to_num(float("inf")).max()) if difference.numel() else 0.0


def assert_within_budget(
    ours: Tensor, peer: Tensor, truth: Tensor, what: str = "result", floor_ulps: float = 4
) -> None:
    """At most twice the error of a peer's answer in the same dtype, plus ``floor_ulps`` roundings of the largest value.

    The floor is there because a peer may be exact by luck: on T = 1, or where one product rounds the right way. In
    float64 the truth is itself rounded in float64, and the floor is 64.
    """
    if ours.dtype == torch.float64:
        floor_ulps = max(floor_ulps, 64)
    assert ours.dtype == peer.dtype, f"{what}: {ours.dtype} where {peer.dtype} was expected"
    scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
    budget = 2 * error(peer, truth) + floor_ulps * torch.finfo(ours.dtype).eps * scale
    found = error(ours, truth)
    assert found <= budget, f"{what}: error {found:.3g} over the budget of {budget:.3g} (largest value {scale:.3g})"


def cell_inputs(
    cell: str,
    steps: int,
    batch: int,
    features: int,
    hidden: int,
    *,
    projected: int = 0,
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor | None]:
    """x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0 for :func:`fastseq.recurrent.run.scan`."""
    gates, state = ops.GATES[cell], projected or hidden
    bound = hidden**-0.5

    def weight(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound)

    inputs: list[Tensor | None] = [
        torch.randn(steps, batch, features, dtype=torch.float64),
        weight(gates * hidden, features),
        weight(gates * hidden, state),
        weight(gates * hidden) if biases else None,
        weight(gates * hidden) if biases else None,
        weight(projected, hidden) if projected else None,
        torch.randn(batch, state, dtype=torch.float64).tanh(),
        torch.randn(batch, hidden, dtype=torch.float64) if ops.HAS_C[cell] else None,
    ]
    return [None if t is None else t.to(dtype).requires_grad_(requires_grad) for t in inputs]


def flat(result: object) -> list[Tensor]:
    """Every tensor of a layer's nested result, in order."""
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)] if isinstance(result, tuple | list) else []  # type: ignore[attr-defined]

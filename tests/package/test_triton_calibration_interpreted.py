"""The self-tests of a calibration, of the Triton kernels under Triton's interpreter: as on a GPU that is not here."""

from __future__ import annotations

from typing import Any

import pytest
from triton_support import needs_interpreter

from fastseq.calibration import grid, measure
from fastseq.calibration.calls import ScanShape, Shape
from fastseq.calibration.file import PASSED, WRONG

pytestmark = needs_interpreter

SMALL: list[Shape] = [
    ScanShape("lstm", "float32", 5, 3, 5, 19, training=True),
    ScanShape("gru", "bfloat16", 4, 3, 8, 16, lengths=True, reset=True, training=True),
    grid._ATTENTION[0]._replace(batch=1, training=True),
    grid._ATTENTION[3]._replace(dtype="float16", batch=1),
]


def outcome(shape: Shape) -> str:
    item = {"op": shape.op, "call": list(shape), "device": "cpu", "backends": ["triton"], "seconds": 0}
    verdict: Any = measure.examine(item)["out"]["triton"]
    return verdict.outcome + verdict.said * (verdict.outcome not in (PASSED, WRONG))


def test_the_triton_kernels_are_among_those_that_are_tried() -> None:
    tests = list(grid.self_tests("cpu", [("scan", "float32"), ("attention", "float32")]))
    assert {(test.backend, test.shape.op) for test in tests} >= {("triton", "scan"), ("triton", "attention")}


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_right_kernels_pass(shape: Shape) -> None:
    assert outcome(shape) == PASSED


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_a_fault_in_a_kernel_is_noticed(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.kernels.attention import launch as attention_launch
    from fastseq.kernels.recurrent import launch as recurrent_launch

    module, name = (recurrent_launch, "scan_forward") if shape.op == "scan" else (attention_launch, "forward")
    real = getattr(module, name)

    def wrong(*args: Any) -> Any:
        result = real(*args)
        result[0].view(-1)[-1] += 0.5  # one element
        return result

    monkeypatch.setattr(module, name, wrong)
    assert outcome(shape) == WRONG

"""Derivatives, torch.func and torch.compile over the Triton scan, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import test_recurrent_transforms as transforms
import torch
from fastseq.kernels.recurrent import launch as recurrent_launch
from recurrent_support import options_of
from support import CELLS, cell_inputs
from triton_recurrent_schedule import side_by_side
from triton_support import needs_interpreter

import fastseq
from fastseq import ops

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every call of the kernels' launches; each test makes some."""
    calls: list[str] = []

    def call(name, launch, *args):
        calls.append(name)
        return launch(*args)

    for name in ("scan_forward", "scan_backward"):
        monkeypatch.setattr(recurrent_launch, name, partial(call, name, getattr(recurrent_launch, name)))
    yield calls
    assert calls


@pytest.mark.parametrize("role", ["sequence", "step", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_func(cell: str, role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent_launch, "role", role)
    inputs = cell_inputs(cell, 3, 2, 2, 3, dtype=torch.float32)
    xs, ws = torch.randn(3, 3, 2, 2), torch.randn(3, *inputs[2].shape)

    def f(x, w, name="triton"):
        return sum(t.sin().sum() for t in transforms.call(name, [x, inputs[1], w, *inputs[3:]], cell))

    vmap, grad = torch.func.vmap, torch.func.grad
    cases = {
        "grad": lambda g: grad(g, (0, 1))(xs[0], ws[0]),
        "vmap": lambda g: vmap(g, (0, None))(xs, ws[0]),
        "per-sample gradient": lambda g: vmap(grad(g, (0, 1)), (0, None))(xs, ws[0]),
        "ensemble gradient": lambda g: vmap(grad(g, (0, 1)))(xs, ws),
    }
    if role == "sequence":
        cases |= {
            "jacrev": lambda g: torch.func.jacrev(g, 1)(xs[0], ws[0]),
            "hessian": lambda g: torch.func.hessian(g, 0)(xs[0], ws[0]),
        }
    with side_by_side(1):
        for name, case in cases.items():
            ours, truth = case(f), case(lambda x, w: f(x, w, "reference"))
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("cell", CELLS)
def test_second_derivatives_go_through_the_reference(cell: str, counted: list[str]) -> None:
    inputs = cell_inputs(cell, 3, 2, 3, 3, dtype=torch.float32, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        f = sum(t.sin().sum() for t in transforms.call(backend, inputs, cell))
        (first,) = torch.autograd.grad(f, inputs[2], create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), [inputs[0], inputs[2]])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    # The last is the first derivative's own gradient (cos y), backward through y.
    assert counted == ["scan_forward", "scan_backward", "scan_backward"]


SOME = [case if case[1].keys() <= {"reset_after"} else pytest.param(*case, marks=pytest.mark.full)
        for case in transforms.LAYERS]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), SOME, ids=str)
def test_compiles_whole_and_once_for_every_length(name: str, kwargs: dict) -> None:
    with fastseq.use_backend("triton"):
        transforms.test_compiles_whole_and_once_for_every_length(name, kwargs)


@pytest.mark.parametrize("name", ["GRUCell", "LSTMCell"])
def test_cells_compile_whole(name: str) -> None:
    with fastseq.use_backend("triton"):
        transforms.test_cells_compile_whole(name)


@pytest.mark.parametrize("projected", [0, 2])
def test_what_the_fake_kernels_promise_is_what_comes(projected: int) -> None:
    """Shapes, dtypes and strides, under every combination of what may be absent; backward too."""
    for cell in CELLS if not projected else filter(ops.HAS_C.get, CELLS):
        for save, states, absent in ((True, True, False), (False, True, True), (False, False, False)):
            inputs = cell_inputs(cell, 3, 2, 4, 5, projected=projected, dtype=torch.float16)
            if absent:
                inputs[6] = inputs[7] = None
            args = (*inputs, *options_of(), ops.NUMBER[cell], False, save, states)
            torch.library.opcheck(
                torch.ops.fastseq.scan_forward.triton, args, test_utils=("test_schema", "test_faketensor")
            )
            if not save:
                continue
            y, _, _, all_c, tape = torch.ops.fastseq.scan_forward.triton(*args)
            kept = (y, all_c if ops.HAS_C[cell] else None, tape if tape.dim() > 1 else None)
            back = (torch.randn_like(y), None, None, None, *kept, inputs[2], inputs[5], inputs[6], inputs[7])
            torch.library.opcheck(
                torch.ops.fastseq.scan_backward.triton, (*back, *options_of(), ops.NUMBER[cell], False),
                test_utils=("test_schema", "test_faketensor"),
            )  # fmt: skip

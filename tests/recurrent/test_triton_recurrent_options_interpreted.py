"""state_mask, zoneout and a state to reset to in the Triton scan, under Triton's interpreter, beside the reference.

Runs in a process of its own, with TRITON_INTERPRET=1: ``make test`` starts it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from fastseq.kernels.recurrent import launch, tuning
from recurrent_support import assert_within_budget, options, step_on_sides
from support import CELLS, PROJECTED, cell_inputs, flat
from torch import Tensor
from triton_recurrent_schedule import side_by_side
from triton_support import INTERPRETED, needs_interpreter

import fastseq
from fastseq import ops
from fastseq.recurrent import reference, run
from fastseq.recurrent.autograd import DIFFERENTIABLE, Inputs, Walk
from fastseq.recurrent.call import RecurrentCall

pytestmark = needs_interpreter

ROLES = ["sequence", "step", "persistent"]
WAYS = [*itertools.product(CELLS, ROLES), *((cell, "step") for cell in PROJECTED)]
EVERY = ("mask", "zoneout", "state")
QUICK = len(WAYS) + 6


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    launch.role = None


class Case:
    """A scan drawn from a number: the first ones have every cell in every role, with all options, in float32, whose
    budget hides no fault."""

    def __init__(self, number: int) -> None:
        draw = random.Random(number)
        torch.manual_seed(number)
        self.cell, self.role = WAYS[number % len(WAYS)]
        is_projected, self.cell = self.cell.endswith("_projected"), self.cell.removesuffix("_projected")
        first = number < len(WAYS)
        self.options = EVERY if first else tuple(o for o in EVERY if draw.random() < 0.6)
        self.dtype = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
        self.dtype = torch.float32 if first else self.dtype
        steps, batch = draw.choice([(3, 2), (4, 3), (5, 2), (1, 3)][: 3 if first else 4])
        hidden = draw.choice([5, 9, 17, 20])
        projected = max(1, hidden // 2) if is_projected else 0
        state = projected or hidden
        self.in_two_parts = self.role == "sequence" and draw.random() < 0.2
        self.reverse = draw.random() < 0.5
        lengths, reset, _ = options("lengths" * (draw.random() < 0.5) + "reset", steps, batch)
        if "state" not in self.options and draw.random() < 0.5:
            reset = None
        inputs = cell_inputs(
            self.cell, steps, batch, 3, hidden, projected=projected, biases=draw.random() < 0.8, dtype=self.dtype
        )
        if draw.random() < 0.3:
            inputs[6] = inputs[7] = None
        lstm = ops.HAS_C[self.cell]

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape).to(self.dtype)

        has_state, has_mask, has_zoneout = (o in self.options for o in ("state", "mask", "zoneout"))
        put_in = [drawn(batch, state) if has_state else None, drawn(batch, hidden) if has_state and lstm else None]
        mask = torch.nn.functional.dropout(torch.ones(batch, state), 0.4).to(self.dtype) if has_mask else None
        kind = draw.choice(["drawn", "number", "fraction"])
        if self.cell.startswith("rnn"):
            kind = "drawn"  # of fractions there is no gradient

        def shares(size: int) -> Tensor:
            if kind == "drawn":
                return torch.empty(steps, batch, size).bernoulli_(0.4).to(self.dtype)
            one = torch.rand((steps, batch, size) if kind == "fraction" else ()).to(self.dtype)
            return one.expand(steps, batch, size)

        alone = draw.choice([None, None, "h", "c"]) if lstm and not projected else None
        zoneout = [
            shares(state) if has_zoneout and alone != "c" else None,
            shares(hidden) if has_zoneout and lstm and not projected and alone != "h" else None,
        ]
        self.inputs = Inputs(*inputs, *put_in, lengths, reset, mask, *zoneout)  # type: ignore[arg-type]
        wanted = draw.choice([(True, True, True, False), (True, False, False, True), (True,) * 4])
        shapes = [(steps, batch, state), (batch, state), (batch, hidden), (steps, batch, hidden)]
        self.grads = [
            torch.randn(shape, dtype=torch.float64) if w and (lstm or i < 2) else None
            for i, (shape, w) in enumerate(zip(shapes, wanted, strict=True))
        ]

    def __repr__(self) -> str:
        x = self.inputs.x
        there = [name for name, t in zip(Inputs._fields, self.inputs, strict=True) if t is not None]
        return f"{self.cell} {self.role} {self.dtype} {list(x.shape)} reverse={self.reverse} {there}"

    def results(self, backend: str, dtype: torch.dtype) -> list[Tensor | None]:
        """y, h_n, c_n and states, then the gradients of the inputs that have some."""
        own: list[Any] = [None if t is None else t.to(dtype).detach() for t in self.inputs[:DIFFERENTIABLE]]
        beside = [None if t is None or not t.is_floating_point() else t.to(dtype) for t in self.inputs[DIFFERENTIABLE:]]
        beside[:2] = self.inputs[DIFFERENTIABLE : DIFFERENTIABLE + 2]
        leaves = [t.requires_grad_() for t in own if t is not None]
        out = run.scan(Walk(self.cell, self.reverse, backend), (*own, *beside))
        pairs = [(o, g.to(o.dtype)) for o, g in zip(out, self.grads, strict=True) if o is not None and g is not None]
        outs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outs, leaves, grads, materialize_grads=True))
        return [*out, *(None if t is None else next(found) for t in own)]

    def check(self) -> None:
        launch.role = self.role
        meeting = self.role == "persistent" and INTERPRETED
        with contextlib.ExitStack() as stack:
            if meeting:
                stack.enter_context(side_by_side(7))
            if self.in_two_parts and INTERPRETED:
                tile = tuning.Sequence(tuning.BLOCK_B, 16, 1, 1, 16)
                stack.enter_context(mock.patch.object(tuning, "sequence", return_value=tile))
            ours = self.results("triton", self.dtype)
        y = ours[0]
        assert y is not None

        def judged(dtype: torch.dtype) -> list[Tensor | None]:
            """Units of a ReLU that lie at its kink are held to the side that rounding put ours on."""
            sides = step_on_sides(y.detach() > 0, self.reverse, [])
            step = sides if self.cell == "rnn_relu" else reference._step
            with mock.patch.object(reference, "_step", step):
                return self.results("reference", dtype)

        names = ["y", "h_n", "c_n", "states", *(f"gradient of {name}" for name in Inputs._fields[:DIFFERENTIABLE])]
        floor = 8.0 if self.dtype is torch.float32 else 16.0
        for name, o, p, t in zip(names, ours, judged(self.dtype), judged(torch.float64), strict=True):
            assert (o is None) == (t is None), name
            if o is not None and p is not None and t is not None:
                assert_within_budget(o.detach().to(self.dtype), p.to(self.dtype), t, f"{name} of {self}", floor)


@pytest.mark.parametrize(
    "number", [*range(QUICK), *(pytest.param(n, marks=pytest.mark.full) for n in range(QUICK, 200))]
)
def test_values_and_gradients_match_the_reference(number: int) -> None:
    Case(number).check()


LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "LSTM": (fastseq.nn.LSTM, {}),
    "GRU": (fastseq.nn.GRU, {}),
    "before": (fastseq.nn.GRU, {"reset_after": False}),
    "projected": (fastseq.nn.LSTM, {"proj_size": 3}),
}


@pytest.mark.parametrize(
    ("name", "option"),
    [("LSTM", "recurrent_dropout"), ("GRU", "zoneout"), ("before", "reset_state"), ("projected", "recurrent_dropout")],
)
def test_stacks_reach_the_kernels(name: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of two directions: y, the last states, and the gradients of everything."""
    kind, kwargs = LAYERS[name]
    if option != "reset_state":
        kwargs = {**kwargs, option: 0.4}
    torch.manual_seed(3)
    layer = kind(4, 6, 2, bidirectional=True, **kwargs)
    x, reset = torch.randn(3, 2, 4, requires_grad=True), torch.rand(3, 2) < 0.4
    start = torch.randn(4, 2, 6, requires_grad=True)
    more = {"reset": reset, "reset_state": start} if option == "reset_state" else {}
    leaves = [x, *layer.parameters(), *([start] if more else [])]
    shares = torch.empty(3, 2, 6).bernoulli_(0.4)
    monkeypatch.setattr(RecurrentCall, "zoneout_shares", lambda call, *_: (shares if any(call.zoneout) else None, None))
    found = []
    for backend in ("reference", "triton"):
        torch.manual_seed(4)
        with fastseq.use_backend(backend), torch.profiler.profile() as profile:
            results = flat(layer(x, **more))
            total = sum(t.sin().sum() for t in results)
            found.append([*results, *torch.autograd.grad(total, leaves)])
        ran = {event.key for event in profile.key_averages()} & {"fastseq::scan_forward", "fastseq::scan_backward"}
        assert len(ran) == (2 if backend == "triton" else 0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_evaluation_keeps_one_number_of_every_unit(name: str) -> None:
    """And so do an RNN without a gradient, packed sequences, and a cell's step."""
    torch.manual_seed(5)
    layer = LAYERS[name][0](4, 6, zoneout=0.3).eval()
    rnn = fastseq.nn.RNN(4, 6, zoneout=0.3).eval()
    x, packed = torch.randn(3, 2, 4), torch.nn.utils.rnn.pack_sequence([torch.randn(n, 4) for n in (3, 1)])
    found = []
    for backend in ("reference", "triton"):
        with fastseq.use_backend(backend):
            y, state = layer(x)
            own = [
                y,
                *flat(state),
                *torch.autograd.grad(y.sin().sum(), list(layer.parameters())),
                layer(packed)[0].data,
            ]
            with torch.no_grad():
                own += [rnn(x)[0], rnn(x[:1])[0]]
            found.append(own)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_reasons_are_true() -> None:
    """What the kernels have no gradient of is refused, and explained."""
    x = torch.randn(3, 2, 4)
    with fastseq.use_backend("triton"):
        with pytest.raises(fastseq.BackendError, match="the Triton kernels have no zoneout and no reset_state beside"):
            fastseq.nn.GRU(4, 6, norm="layer", zoneout=0.5)(x)
        with pytest.raises(fastseq.BackendError, match="no gradient of an RNN with zoneout in evaluation"):
            fastseq.nn.RNN(4, 6, zoneout=0.3).eval()(x)
        with pytest.raises(fastseq.BackendError, match="no zoneout of c beside a projection"):
            fastseq.nn.LSTM(4, 6, proj_size=3, zoneout=(0.1, 0.1))(x)
        layer = fastseq.nn.GRU(4, 6, recurrent_dropout=0.5, zoneout=0.5)
        assert "the Triton kernels have no" not in fastseq.explain(layer, x)
    reason = launch.tile("lstm", torch.empty(9, 1, 1, dtype=torch.float16), 160, False, False, 2)[1]
    assert reason is not None
    assert "above 128, the most units of a lstm in fp16 that one SM holds beside a mask, zoneout" in reason


def test_states_to_reset_to_that_nothing_resets_to_have_no_gradient() -> None:
    inputs = cell_inputs("lstm", 3, 2, 4, 5, dtype=torch.float32)
    put_in = [torch.randn(2, 5), torch.randn(2, 5)]
    number = ops.NUMBER["lstm"]
    beside = (*put_in, None, None, None, None, None)
    y, _, _, states, tape = torch.ops.fastseq.scan_forward.triton(*inputs, *beside, number, False, True, True)
    assert torch.equal(y, torch.ops.fastseq.scan_forward.triton(*inputs, *7 * [None], number, False, True, True)[0])
    found = torch.ops.fastseq.scan_backward.triton(
        y, None, None, None, y, states, tape, inputs[2], None, inputs[6], inputs[7], *beside, number, False
    )
    assert [d.shape for d in found[4:]] == [(2, 5), (2, 5)]
    assert not any(d.any() for d in found[4:])
    projected = cell_inputs("lstm", 3, 2, 4, 5, projected=3, dtype=torch.float32)
    beside = (*6 * [None], torch.zeros(3, 2, 5))
    with pytest.raises(RuntimeError, match="no zoneout of c beside a projection"):
        torch.ops.fastseq.scan_forward.triton(*projected, *beside, number, False, False, False)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_what_the_fake_kernels_promise_is_what_comes(cell: str) -> None:
    case = Case(next(n for n in itertools.count() if WAYS[n % len(WAYS)] == (cell, "step")))
    args = (*case.inputs, ops.NUMBER[cell], case.reverse, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastseq.scan_forward.triton, args, test_utils=tests)
    y, _, _, states, tape = torch.ops.fastseq.scan_forward.triton(*args)
    kept = (y, states if ops.HAS_C[cell] else None, tape)
    back = (torch.randn_like(y), None, None, None, *kept, case.inputs.w_hh, *case.inputs[5:], *args[-4:-2])
    torch.library.opcheck(torch.ops.fastseq.scan_backward.triton, back, test_utils=tests)

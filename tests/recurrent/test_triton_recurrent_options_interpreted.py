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


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    launch.role = None


class Case:
    """A scan drawn from a number: the first ones have every cell in every role, with all options."""

    def __init__(self, number: int) -> None:
        draw = random.Random(number)
        torch.manual_seed(number)
        self.cell, self.role = WAYS[number % len(WAYS)]
        is_projected, self.cell = self.cell.endswith("_projected"), self.cell.removesuffix("_projected")
        first = number < len(WAYS)
        self.options = EVERY if first else tuple(o for o in EVERY if draw.random() < 0.6)
        self.dtype = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
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
                stack.enter_context(mock.patch.object(tuning, "sequence", lambda *_: tile))
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
    "number", [*range(len(WAYS)), *(pytest.param(n, marks=pytest.mark.full) for n in range(len(WAYS), 200))]
)
def test_values_and_gradients_match_the_reference(number: int) -> None:
    Case(number).check()

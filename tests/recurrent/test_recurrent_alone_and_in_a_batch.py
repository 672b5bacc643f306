"""Under torch.use_deterministic_algorithms a sequence's bits do not depend on what else is in the batch, on its place
there, or on the number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import needs_native
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import nn

pytestmark = needs_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": nn.LSTM,
    "projected": lambda *sizes, **more: nn.LSTM(*sizes, proj_size=sizes[1] // 2, **more),
    "GRU": nn.GRU,
    "reset before": lambda *sizes, **more: nn.GRU(*sizes, reset_after=False, **more),
    "RNN": nn.RNN,
}


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def first(result: Any) -> tuple[Tensor, ...]:
    """y and the states."""
    y, state = result
    return (y, *state) if isinstance(state, tuple) else (y, state)


def equal(own: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    for a, b in zip(own, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.full) for s in range(8, 40))])
def test_results_and_gradients_are_those_of_the_sequence_alone(kind: str, seed: int) -> None:
    """One, or many, with lengths= or packed; also of a single step."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, inputs, hidden = DTYPES[seed % 4], draw.choice([3, 40, 130]), draw.choice([4, 48, 150, 260])
    stack = {"num_layers": draw.choice([1, 2]), "bidirectional": draw.random() < 0.4}
    layer = LAYERS[kind](inputs, hidden, **stack, dtype=dtype)
    most = draw.choice([1, 1, 2, 12, 40])
    xs = [torch.randn(draw.randint(1, most), inputs).to(dtype) for _ in range(draw.choice([2, 3, 9, 40]))]
    chosen = draw.sample(range(len(xs)), 2)

    def alone(x: Tensor) -> tuple[Tensor, ...]:
        leaf = x[:, None].clone().requires_grad_()
        results = first(layer(leaf))
        results[0].square().sum().backward()
        assert leaf.grad is not None
        return (*(r.detach()[:, 0] for r in results), leaf.grad[:, 0])

    torch.set_num_threads(1)
    own = [alone(xs[b]) for b in chosen]
    torch.set_num_threads(draw.choice([2, 3]))
    lengths = torch.tensor([len(x) for x in xs])
    x = torch.nn.utils.rnn.pad_sequence(xs).requires_grad_()
    results = first(layer(x, lengths=lengths))
    results[0].square().sum().backward()
    packed = pack_sequence(xs, enforce_sorted=False)
    with torch.no_grad():
        y_packed, *states_packed = first(layer(packed))
        plain = first(layer(x, lengths=lengths))
    y_packed = torch.nn.utils.rnn.pad_packed_sequence(y_packed)[0]  # type: ignore[arg-type]
    assert x.grad is not None
    for own_results, b in zip(own, chosen, strict=True):
        n = len(xs[b])
        *forward, dx = own_results
        equal(forward, (results[0][:n, b], *(s[:, b] for s in results[1:])))
        equal(forward, (plain[0][:n, b], *(s[:, b] for s in plain[1:])))
        equal(forward, (y_packed[:n, b], *(s[:, b] for s in states_packed)))
        assert torch.equal(dx, x.grad[:n, b])


@pytest.mark.parametrize("how", ["weights", "compute"])
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_so_are_those_of_compressed_weights(kind: str, weights: str, how: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(getattr(torch.nn, kind)(40, 72))
    fastseq.patch(model, **{how: weights})  # type: ignore[arg-type]
    layer = model[0].eval()
    x = torch.randn(5, 31, 40)
    with torch.no_grad():
        results = first(layer(x))
        for count in (1, 2, 3, 7):
            got = first(layer(x[:, :count]))
            equal(got, tuple(r[:, :count] for r in results))


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_so_is_a_step_of_a_cell(kind: str) -> None:
    torch.manual_seed(0)
    cell = getattr(nn, kind)(40, 600)
    x, h = torch.randn(33, 40), torch.randn(33, 600)
    state = (h, h) if kind == "LSTMCell" else h
    with torch.no_grad():
        whole = cell(x, state)
        for b in (0, 13, 32):
            own = cell(x[b], (h[b], h[b]) if kind == "LSTMCell" else h[b])
            pairs = zip(own, whole, strict=True) if kind == "LSTMCell" else [(own, whole)]
            assert all(torch.equal(a, many[b]) for a, many in pairs)


def test_without_it_the_order_of_sums_may_follow_the_batch() -> None:
    """What the promise costs is not paid by others: a call of few rows reads weights unpacked."""
    torch.use_deterministic_algorithms(False)
    torch.manual_seed(0)
    layer = nn.LSTM(100, 300)
    x = torch.randn(4, 40, 100)
    with torch.no_grad():
        assert not torch.equal(layer(x)[0][:, :1], layer(x[:, :1])[0])

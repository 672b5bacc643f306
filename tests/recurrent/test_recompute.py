"""recompute=True: a training call that keeps the states at some steps, and walks again from there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loop_support import LAYERS, gradients
from support import NATIVE, flat, needs_native
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq.recurrent import recompute, stack

pytestmark = needs_native


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Parts of few steps; the steps that are walked, with a tape or without."""
    monkeypatch.setattr(recompute, "FEWEST_ROWS", 4)
    walked: list[int] = []
    forward = stack.FORWARD

    def counted(x: Tensor, *rest: Any) -> Any:
        walked.append(x.shape[0] * (1 if rest[-2] else -1))
        return forward(x, *rest)

    monkeypatch.setattr(stack, "FORWARD", counted)
    return walked


def pair(name: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """A layer, and the same that computes again."""
    layers = [LAYERS[name](*sizes, **options, recompute=again) for again in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    return layers[0], layers[1]


def both(layers: tuple[Any, Any], x: Tensor, hx: Any = None, leaves: Any = (), **call: Any) -> list[list[Tensor]]:
    found = []
    for layer in layers:
        torch.manual_seed(1)
        results = layer(x, hx, **call)
        found.append([*flat(results), *gradients(results, [x, *leaves, *layer.parameters()])])
    return found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_values_and_gradients_are_those_of_the_plain_layer(name: str, options: Any, parts: list[int]) -> None:
    torch.manual_seed(2)
    layers = pair(name, 5, 7, **options, dtype=torch.float64)
    x = torch.randn(30, 3, 5, dtype=torch.float64, requires_grad=True)
    rows, sizes = options.get("num_layers", 1) * (1 + options.get("bidirectional", 0)), [layers[0].proj_size or 7, 7]
    states = [torch.randn(rows, 3, n, dtype=torch.float64, requires_grad=True) for n in sizes]
    states = states[: 1 + (layers[0].mode == "LSTM")]
    state: Any = tuple(states) if len(states) > 1 else states[0]
    lengths, reset = torch.tensor([30, 0, 11]), torch.rand(30, 3) < 0.2
    for call in ({}, {"hx": state}, {"lengths": lengths, "hx": state}, {"reset": reset},
                 {"reset": reset, "reset_state": state, "lengths": lengths}):  # fmt: skip
        given = states if "hx" in call or "reset_state" in call else []
        parts.clear()
        plain, again = both(layers, x, leaves=given, **call)
        for a, b in zip(again, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        cut = [n for n in parts if abs(n) != 30]
        assert sum(cut) == 0, "each part is walked without a tape, and again with one"
        assert len(cut) == 16 * rows // (1 if options.get("bidirectional") else options.get("num_layers", 1))


def test_dropouts_and_zoneout_are_those_of_the_forward_pass(parts: list[int]) -> None:
    options = {"zoneout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3, "dropout": 0.3, "num_layers": 2}
    layer = fastseq.nn.LSTM(2, 3, bidirectional=True, recompute=True, **options).double()  # type: ignore[arg-type]
    x = torch.randn(9, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(7)
        return layer(x)[0]

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
    assert any(abs(n) < 9 for n in parts)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_and_gradients_of_many_outputs(name: str, parts: list[int]) -> None:
    torch.manual_seed(3)
    layers = pair(name, 2, 3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(9, 2, 2, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(3, 9, 2, 2 * (layers[0].proj_size or 3), dtype=torch.float64)
    found = []
    for layer in layers:
        y = layer(x)[0]
        many = torch.autograd.grad(y, [x, *layer.parameters()], grads, retain_graph=True, is_grads_batched=True)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([*many, *torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert any(abs(n) < 9 for n in parts)


def test_what_is_kept_is_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the passes: tensors that autograd holds, beside the input and the weights."""

    def held(layer: Any) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y, _ = layer(x)
        own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
        return sum(size for at, size in seen.items() if at not in own) // y.nbytes

    x = torch.randn(1000, 2, 16, requires_grad=True)
    for name, plain in (("LSTM", 6), ("GRU", 5), ("coupled", 5)):
        layers = pair(name, 16, 16)
        assert (held(layers[0]), held(layers[1])) == (plain, 0)


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_other_forms_of_a_call(backend: str, parts: list[int]) -> None:
    torch.manual_seed(4)
    layers = pair("GRU", 4, 6, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 4) for n in (2, 30, 1, 15)], enforce_sorted=False)
    x = torch.randn(20, 2, 4, requires_grad=True)
    with fastseq.use_backend(backend):
        found = []
        for layer in layers:
            results = layer(packed)
            found.append([results[0].data, *gradients((results[0].data, results[1]), list(layer.parameters()))])
        found += both(layers, x)
        for a, b in zip(found[0] + found[2], found[1] + found[3], strict=True):
            torch.testing.assert_close(a, b)
        lstm = fastseq.nn.LSTM(4, 6, recompute=True)
        assert lstm(x, return_all_states=True)[2].grad_fn is not None
        with torch.no_grad():
            parts.clear()
            lstm(x)
            assert parts == []


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_compiled_or_transformed_it_changes_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "FEWEST_ROWS", 4)
    layers, x = pair("GRU", 4, 6, bidirectional=True), torch.randn(20, 2, 4, requires_grad=True)
    with fastseq.use_backend(backend):
        compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layers[0](x))
        torch.testing.assert_close(
            torch.func.grad(lambda x: layers[1](x)[0].sum())(x), torch.func.grad(lambda x: layers[0](x)[0].sum())(x)
        )


def test_weights_that_need_no_gradient_get_none(parts: list[int]) -> None:
    layer = fastseq.nn.LSTM(4, 6, recompute=True)
    layer.weight_hh_l0.requires_grad_(False)
    x = torch.randn(20, 2, 4)
    layer(x)[0].sum().backward()
    assert layer.weight_hh_l0.grad is None
    assert layer.weight_ih_l0.grad is not None
    layer.requires_grad_(False)
    parts.clear()
    assert not layer(x)[0].requires_grad

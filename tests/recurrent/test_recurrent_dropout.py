"""state_mask and the two dropouts of a recurrence: recurrent_dropout, which draws such masks, and weight_dropout."""

from __future__ import annotations

import copy
import itertools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from loop_support import (
    LAYERS,
    assert_as_near,
    assert_gradients_of_many_are_those_of_each,
    by_loop,
    drawn,
    function_of,
    gradients,
    mask_of,
)  # fmt: skip
from recurrent_support import SHAPES, compare, draw, options, seed
from support import CELLS, DTYPES, ISAS, NATIVE, PROJECTED, flat, needs_native
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_map

import fastseq
from fastseq import functional
from fastseq.backend import BackendError
from fastseq.checks import ArgumentError

BOTH = ["reference", NATIVE]


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.full) for n in range(4, 8))])
def test_values_and_gradients_are_those_of_a_loop_over_cells(name: str, number: int, backend: str) -> None:
    layer, x, hx, lengths, reset, mask = drawn(name, number)
    leaves = [x, *flat(hx), *layer.parameters()]
    with fastseq.use_backend(backend):
        found = function_of(layer)(x, hx, lengths=lengths, reset=reset, state_mask=mask)
        found = [*flat(found), *gradients(found, leaves)]
        with torch.no_grad():
            same = flat(function_of(layer)(x, hx, lengths=lengths, reset=reset, state_mask=mask))
    want: list[Tensor] = by_loop(layer, x, hx, lengths, reset, mask)
    want += gradients(want, leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(same, want, strict=False):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-11)


@needs_native
@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=pytest.mark.full) if isa in ("avx2", "avx512") else isa for isa in ISAS],
    indirect=True,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", [*CELLS, *PROJECTED])
def test_the_native_kernels_are_as_near_the_truth_as_without(cell: str, dtype: torch.dtype, isa: str) -> None:
    plain, options_of = cell.removesuffix("_projected"), itertools.cycle(["plain", "lengths+reset+reverse", "reset"])
    for shape, threads in zip([*SHAPES[1:], (40, 9, 5, 20)], itertools.cycle([2, 1, 3]), strict=False):
        seed(cell, dtype, shape)
        torch.set_num_threads(threads)
        inputs = draw(plain, *shape, projected=max(1, shape[3] // 2) if cell != plain else 0, dtype=dtype)
        lengths, reset, reverse = options(next(options_of), *shape[:2])
        # Of 0 and 2, by which no product is rounded: h is rounded for the pairs of bfloat16, and judged step by step.
        mask = mask_of(shape[1], inputs[2].shape[1], dtype=dtype, p=0.5 if dtype is torch.bfloat16 else 0.4)
        compare(inputs, lengths, reset, plain, reverse, mask=mask)
        compare(inputs, lengths, reset, plain, reverse, mask=mask.t().contiguous().t())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYERS)
def test_the_gradients_of_a_stack_are_near_the_truth(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name](9, 40, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(12, 6, 9, dtype=torch.float64)
    mask = mask_of(4, 6, getattr(layer, "proj_size", 0) or 40, p=0.5)  # of 0 and 2, which no dtype rounds

    def found(dtype: torch.dtype, backend: str) -> list[Tensor]:
        own = copy.deepcopy(layer).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with fastseq.use_backend(backend):
            results = function_of(own)(leaf, None, state_mask=mask.to(dtype))
            return [*flat(results), *gradients(results, [leaf, *own.parameters()])]

    ways = found(dtype, "native"), found(dtype, "reference"), found(torch.float64, "reference")
    for each in zip(*ways, strict=True):
        assert_as_near(*each)


# --- Masks that the layers draw.


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_without_dropout_or_in_evaluation_a_layer_is_the_plain_one(name: str, backend: str) -> None:
    torch.manual_seed(2)
    plain = LAYERS[name](5, 8, num_layers=2, bidirectional=True)
    x = torch.randn(6, 3, 5)
    with fastseq.use_backend(backend):
        for own in (
            {"recurrent_dropout": 0.0, "weight_dropout": 0.0},
            {"recurrent_dropout": 0.5, "weight_dropout": 0.5},
        ):
            layer = LAYERS[name](5, 8, num_layers=2, bidirectional=True, **own)
            layer.load_state_dict(plain.state_dict())
            assert layer.state_dict().keys() == plain.state_dict().keys()
            layer.train(not any(own.values()))
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    for a, b in zip(flat(layer(x)), flat(plain(x)), strict=True):
                        assert torch.equal(a, b)
        layer.train()
        assert not torch.equal(layer(x)[0], plain(x)[0])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_mask_stays_for_all_steps_and_differs_elsewhere(backend: str, grad: bool) -> None:
    """h_t = m * h_{t-1}, by an identity for W_hh: y shows the powers of each mask."""
    layer = fastseq.nn.RNN(3, 50, 2, nonlinearity="relu", bias=False, bidirectional=True, recurrent_dropout=0.25)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.eye(50) if parameter.shape[0] == parameter.shape[1] else torch.zeros_like(parameter))
    layer.dropout = 0.0
    with fastseq.use_backend(backend), torch.set_grad_enabled(grad):
        _, h_n = layer(torch.zeros(1, 40, 3), torch.ones(4, 40, 50))
        y, again = layer(torch.zeros(3, 40, 3), torch.ones(4, 40, 50))
    assert {round(v, 4) for v in h_n.unique().tolist()} == {0.0, round(4 / 3, 4)}
    assert abs(float((h_n == 0).float().mean()) - 0.25) < 0.03
    masks = h_n.reshape(-1, 50)
    assert len({tuple(m.tolist()) for m in masks}) == len(masks), "each sequence, layer and direction its own"
    forth = y[..., :50]
    torch.testing.assert_close(forth[1], forth[0] ** 2)
    torch.testing.assert_close(forth[2], forth[0] ** 3)
    torch.testing.assert_close(y[0, :, 50:], y[2, :, 50:] ** 3)
    assert not torch.equal(again == 0, h_n == 0), "each call its own"


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("kwargs", [{"recurrent_dropout": 0.4}, {"weight_dropout": 0.4}], ids=str)
def test_the_seed_decides(kwargs: Any, backend: str) -> None:
    layer, x = fastseq.nn.GRU(4, 6, 2, **kwargs), torch.randn(5, 3, 4)

    def run(number: int) -> Tensor:
        torch.manual_seed(number)
        return layer(x)[0]

    with fastseq.use_backend(backend):
        assert torch.equal(run(3), run(3))
        assert not torch.equal(run(3), run(4))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("kwargs", [{"recurrent_dropout": 0.4}, {"weight_dropout": 0.4}], ids=str)
def test_backward_has_the_masks_of_forward(kwargs: Any, backend: str) -> None:
    layer = fastseq.nn.LSTM(2, 3, bidirectional=True, **kwargs).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(7)
        return layer(x)[0]

    with fastseq.use_backend(backend):
        assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_weight_dropout_drops_recurrent_weights_alone_and_its_gradient_reaches_them() -> None:
    layer = fastseq.nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, weight_dropout=0.5)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(5, 3, 4)
    torch.manual_seed(5)
    found = layer(x)
    found[0].sum().backward()
    torch.manual_seed(5)
    masks = {
        name: F.dropout(torch.ones_like(w), 0.5, True) for name, w in layer.named_parameters() if "weight_hh" in name
    }
    own = [(w * masks.get(name, 1)).detach().requires_grad_() for name, w in layer.named_parameters()]
    y, _ = functional.lstm(x, None, own, num_layers=2, bidirectional=True, projected=True)
    torch.testing.assert_close(found[0], y)
    for (name, w), d in zip(layer.named_parameters(), torch.autograd.grad(y.sum(), own), strict=True):
        torch.testing.assert_close(w.grad, d * masks.get(name, 1))
        assert torch.equal(w, before[name])
    assert all(0.2 < float((m == 0).float().mean()) < 0.8 for m in masks.values())


@pytest.mark.parametrize("backend", BOTH)
def test_dropouts_of_all_kinds_go_together_with_autocast(backend: str) -> None:
    everything: dict[str, Any] = {"dropout": 0.3, "recurrent_dropout": 0.3, "weight_dropout": 0.3}
    layer = fastseq.nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True, **everything)
    x = torch.randn(3, 5, 4)
    with fastseq.use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x, reset=torch.rand(3, 5) < 0.3)
        padded, _ = layer(x, lengths=torch.tensor([5, 0, 3]), reset=torch.rand(3, 5) < 0.3)
    assert y.dtype is torch.bfloat16
    assert not padded[1].any()
    (padded.sum() + y.float().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_keeps_its_mask_with_dropout_between_layers(name: str, backend: str) -> None:
    torch.manual_seed(13)
    layer = LAYERS[name](3, 4, 3, bidirectional=True)
    x, mask = torch.randn(5, 2, 3), mask_of(6, 2, getattr(layer, "proj_size", 0) or 4, dtype=torch.float32)
    with fastseq.use_backend(backend):
        want = function_of(layer)(x, None, state_mask=mask)
        layer.dropout = 1e-9  # which drops nothing, but has each layer run by itself
        found = function_of(layer)(x, None, state_mask=mask)
    for a, b in zip(flat(found), flat(want), strict=True):
        torch.testing.assert_close(a, b)


# --- Other forms of a call.


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("longest", [6, 300])  # of one part, and of several
def test_a_packed_batch_has_its_mask_in_its_own_order(name: str, longest: int, backend: str) -> None:
    torch.manual_seed(3)
    layer = LAYERS[name](4, 6, bidirectional=True)
    xs = [torch.randn(n, 4) for n in (longest, longest // 2, 3, 1)]
    packed = pack_sequence(xs)
    mask = mask_of(2, 4, getattr(layer, "proj_size", 0) or 6, dtype=torch.float32)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(packed)
    with fastseq.use_backend(backend):
        rows, last = layer._function(
            packed.data, None, batch_sizes=packed.batch_sizes, batch_first=False, state_mask=mask
        )
        want, states = function_of(layer)(padded, None, lengths=lengths, state_mask=mask)
        y, _ = nn.utils.rnn.pad_packed_sequence(PackedSequence(rows, packed.batch_sizes))
        for a, b in zip((y, *flat(last)), (want, *flat(states)), strict=True):
            torch.testing.assert_close(a, b)
        layer.recurrent_dropout = 0.5
        dropped = layer(pack_sequence(xs[::-1], enforce_sorted=False))[0]
        assert not torch.equal(dropped.data, layer(pack_sequence(xs[::-1], enforce_sorted=False))[0].data)


@pytest.mark.parametrize("backend", BOTH)
def test_one_sequence_without_a_batch_has_a_mask_without_one(backend: str) -> None:
    layer, x, mask = fastseq.nn.GRU(4, 6, 2), torch.randn(5, 4), mask_of(2, 6, dtype=torch.float32)
    with fastseq.use_backend(backend):
        found = layer._function(x, None, state_mask=mask)
        want = layer._function(x[:, None], None, state_mask=mask[:, None])
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b.squeeze(1))
        layer.recurrent_dropout = 0.5
        assert layer(x)[0].shape == (5, 6)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("make", [fastseq.nn.RNNCell, fastseq.nn.GRUCell, fastseq.nn.LSTMCell])
def test_a_cell_takes_a_mask(make: Any, backend: str) -> None:
    torch.manual_seed(4)
    cell, x, h = make(4, 6), torch.randn(3, 4), torch.randn(3, 6)
    hx = (h, torch.randn(3, 6)) if make is fastseq.nn.LSTMCell else h
    mask = mask_of(3, 6, dtype=torch.float32)
    layer = {"RNNCell": fastseq.nn.RNN, "GRUCell": fastseq.nn.GRU, "LSTMCell": fastseq.nn.LSTM}[make.__name__](4, 6)
    layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
    with fastseq.use_backend(backend):
        found = flat(cell(x, hx, state_mask=mask))
        want = by_loop(layer, x[None], tuple(s[None] for s in flat(hx)), None, None, mask[None])[1:]
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b[0])
        alone = flat(cell(x[0], tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0], mask[0]))
        for a, b in zip(alone, want, strict=True):
            torch.testing.assert_close(a, b[0, 0])


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("learned", [False, True], ids=["mask", "learned mask"])
def test_second_derivatives_go_through_the_mask(learned: bool, backend: str) -> None:
    """A mask that requires a gradient runs on the reference, of AUTO's choice."""
    torch.manual_seed(5)
    layer = fastseq.nn.GRU(2, 3, bidirectional=True).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    mask = mask_of(2, 2, 3).requires_grad_(learned)

    def run(x: Tensor, mask: Tensor, *_: Tensor) -> Tensor:
        return layer._function(x, None, state_mask=mask, reset=torch.tensor([[False, False]] * 2 + [[True, False]]))[0]

    with fastseq.use_backend(None if learned else backend):
        assert torch.autograd.gradcheck(run, (x, mask, *layer.parameters()))
        assert torch.autograd.gradgradcheck(run, (x, mask, *layer.parameters()))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_vmap_over_masks(name: str, backend: str) -> None:
    torch.manual_seed(6)
    layer = LAYERS[name](3, 4, bidirectional=True)
    own = dict(layer.named_parameters())
    x, masks = torch.randn(5, 2, 3), mask_of(4, 2, 2, getattr(layer, "proj_size", 0) or 4, dtype=torch.float32)

    def run(x: Tensor, own: dict[str, Tensor], mask: Tensor) -> Tensor:
        with mock.patch.object(layer, "_weights", return_value=list(own.values())):
            return layer._function(x, None, state_mask=mask)[0]

    gradient = torch.func.grad(lambda x, own, mask: run(x, own, mask).sum(), (0, 1))
    with fastseq.use_backend(backend):
        for function in (run, gradient):
            found = torch.func.vmap(function, (None, None, 0))(x, own, masks)
            want = [function(x, own, mask) for mask in masks]
            torch.testing.assert_close(found, tree_map(lambda *each: torch.stack(each), *want))


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_many_outputs_at_once_are_those_of_each(name: str, backend: str) -> None:
    torch.manual_seed(12)
    layer = LAYERS[name](3, 4, 2, bidirectional=True)
    x, leaves = torch.randn(5, 2, 3), list(layer.parameters())
    mask = mask_of(4, 2, getattr(layer, "proj_size", 0) or 4, dtype=torch.float32)
    with fastseq.use_backend(backend):
        y = function_of(layer)(x, None, state_mask=mask)[0]
        assert_gradients_of_many_are_those_of_each(y, leaves)


def test_a_transform_finds_the_gradient_of_a_mask() -> None:
    torch.manual_seed(11)
    layer, x, masks = fastseq.nn.LSTM(3, 4), torch.randn(5, 2, 3), torch.rand(4, 1, 2, 4)

    def loss(m: Tensor) -> Tensor:
        return layer._function(x, None, state_mask=m)[0].sum()

    want = torch.stack([torch.autograd.grad(loss(m), m)[0] for m in masks.clone().requires_grad_()])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(masks), want)
    torch.testing.assert_close(torch.func.grad(lambda m: torch.func.vmap(loss)(m).sum())(masks), want)
    tangent = torch.func.jvp(loss, (masks[0],), (torch.ones_like(masks[0]),))[1]
    torch.testing.assert_close(tangent, want[0].sum())


@pytest.mark.parametrize("backend", BOTH)
def test_compiles_whole_and_trains(backend: str) -> None:
    torch.manual_seed(7)
    layer = fastseq.nn.LSTM(4, 6, bidirectional=True, recurrent_dropout=0.4, weight_dropout=0.2)
    x = torch.randn(3, 3, 4, requires_grad=True)
    mask = mask_of(2, 3, 6, dtype=torch.float32)

    def masked(x: Tensor) -> Tensor:
        weights = layer._weights()
        return functional.lstm(x, None, weights, bidirectional=True, state_mask=mask)[0]

    with fastseq.use_backend(backend):
        for function in (layer, masked):
            found = []
            for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
                torch.manual_seed(8)
                y = flat(call(x))[0]
                found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()])])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BOTH)
def test_exports_and_copies(backend: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fastseq.nn.GRU(4, 6, recurrent_dropout=0.4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return functional.gru(x, None, self.layer._weights(), state_mask=mask)[0] + self.layer(x)[0]

    model, x, mask = Masked().eval(), torch.randn(5, 3, 4), mask_of(1, 3, 6, dtype=torch.float32)
    with fastseq.use_backend(backend):
        program = torch.export.export(model, (x, mask))
        torch.testing.assert_close(program.module()(x, mask), model(x, mask))
        assert "dropout" not in str(program.graph)
    other = copy.deepcopy(model.layer)
    assert (other.recurrent_dropout, other.weight_dropout) == (0.4, 0.0)
    assert repr(other) == "GRU(4, 6, recurrent_dropout=0.4)"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_has_the_bits_of_the_sequence_alone_under_deterministic_algorithms(
    name: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(9)
    torch.use_deterministic_algorithms(True)
    try:
        layer = LAYERS[name](11, 34, num_layers=2, bidirectional=True, dtype=dtype)
        for steps, batch, threads in ((9, 13, 2), (1, 3, 1), (2, 2, 3)):
            torch.set_num_threads(threads)
            x = torch.randn(steps, batch, 11).to(dtype).requires_grad_()
            mask = mask_of(4, batch, getattr(layer, "proj_size", 0) or 34, dtype=dtype)
            found = function_of(layer)(x, None, state_mask=mask)
            dx = torch.autograd.grad(found[0].square().sum(), x)[0]
            for b in range(min(batch, 3)):
                leaf = x[:, b : b + 1].detach().requires_grad_()
                alone = function_of(layer)(leaf, None, state_mask=mask[:, b : b + 1].clone())
                assert all(torch.equal(a[:, b : b + 1], o) for a, o in zip(flat(found), flat(alone), strict=True))
                assert torch.equal(torch.autograd.grad(alone[0].square().sum(), leaf)[0], dx[:, b : b + 1])
    finally:
        torch.use_deterministic_algorithms(False)


@needs_native
@pytest.mark.parametrize("name", ["RNN", "relu", "LSTM", "coupled", "projected"])  # a GRU carries its state on besides
def test_nothing_depends_on_what_was_dropped(name: str) -> None:
    """Units whose mask is 0 may hold any number before the first step: no product reads it."""
    torch.manual_seed(10)
    layer = LAYERS[name](3, 20)
    outputs = layer.proj_size or 20
    x, mask = torch.randn(4, 5, 3, requires_grad=True), mask_of(1, 5, outputs, dtype=torch.float32)
    h = torch.randn(1, 5, outputs)
    c = (torch.randn(1, 5, 20),) if isinstance(layer, fastseq.nn.LSTM) else ()
    found = []
    for start in (h, torch.where(mask == 0, 1e6 * h, h)):
        results = function_of(layer)(x, (start, *c) if c else start, state_mask=mask)
        found.append([*flat(results), *gradients(results, [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_unpatch_leaves_a_layer_whose_dropout_torch_does_not_have() -> None:
    report = fastseq.unpatch(nn.Sequential(fastseq.nn.GRU(3, 4, weight_dropout=0.5), fastseq.nn.GRU(4, 4)))
    assert [left.reason for left in report.left] == ["weight_dropout=0.5: torch.nn.GRU has no such option"]


# --- What does not fit.


@pytest.mark.parametrize("bad", [1, 1.0, -0.1, float("nan"), True, "0.5", None])
@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout"])
def test_a_probability_out_of_range_is_refused(name: str, bad: Any) -> None:
    for make in (fastseq.nn.RNN, fastseq.nn.GRU, fastseq.nn.LSTM):
        with pytest.raises(ValueError, match=rf"{name} must be a number in \[0, 1\), .* got "):
            make(3, 4, **{name: bad})


def test_a_probability_that_was_set_later_is_checked_too() -> None:
    layer = fastseq.nn.GRU(3, 4)
    for name in ("recurrent_dropout", "weight_dropout"):
        setattr(layer, name, 1.5)
        with pytest.raises(ValueError, match=f"{name} must be a number"):
            layer(torch.randn(2, 2, 3))
        setattr(layer, name, 0.0)


def test_wrong_masks_are_named() -> None:
    x, weights = torch.randn(5, 3, 4), [torch.randn(18, 4), torch.randn(18, 6)]

    def run(mask: Any, **more: Any) -> None:
        functional.gru(x, None, weights, has_biases=False, state_mask=mask, **more)

    with pytest.raises(ArgumentError, match=r"state_mask must be .*\[1, 3, 6\] for this input, got \[3, 6\]"):
        run(torch.ones(3, 6))
    with pytest.raises(ArgumentError, match=r"state_mask is torch.bool but input is torch.float32"):
        run(torch.ones(1, 3, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="state_mask must be a Tensor, got float"):
        run(0.5)
    with pytest.raises(ArgumentError, match="give one of the two alone"):
        run(torch.ones(1, 3, 6), recurrent_dropout=0.5, training=True)
    run(torch.ones(1, 3, 6), recurrent_dropout=0.5)  # which draws nothing in evaluation
    with pytest.raises(TypeError, match="state_mask must be a Tensor"):
        fastseq.nn.GRUCell(4, 6)(x[0], state_mask=0.5)
    with pytest.raises(ArgumentError, match="state_mask must be"):
        fastseq.nn.GRUCell(4, 6)(x[0], state_mask=torch.ones(3, 5))


@needs_native
def test_a_mask_that_was_changed_before_backward_is_noticed() -> None:
    mask = torch.ones(1, 3, 6)
    layer = fastseq.nn.GRU(4, 6)
    y, _ = layer._function(torch.randn(5, 3, 4), None, state_mask=mask)
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backends_without_masks_say_so() -> None:
    layer, x = fastseq.nn.GRU(4, 6, recurrent_dropout=0.5), torch.randn(5, 3, 4)
    said = fastseq.explain(layer, x)
    assert "torch: torch has no state_mask (recurrent_dropout)" in said
    with fastseq.use_backend("torch"), pytest.raises(BackendError, match="torch has no state_mask"):
        layer(x)
    assert "torch has no state_mask" not in fastseq.explain(layer.eval(), x)
    learned = torch.ones(1, 3, 6, requires_grad=True)
    for name in ("native", "triton"):
        with (
            fastseq.use_backend(name),
            pytest.raises(BackendError, match=f"(?i)the {name} .* no gradient of state_mask"),
        ):
            layer._function(x, None, state_mask=learned)

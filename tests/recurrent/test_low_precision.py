"""fastseq.patch(compute=): inference multiplies bfloat16 or int8 where the chip does. The truth is the same arithmetic
in float64: the reference with every product's operands rounded first."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import flat, needs_native
from test_compressed_weights import CELLS, LAYERS, LAYOUTS, double, meant, state_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.nn.compressed import KINDS
from fastseq.recurrent import reference

pytestmark = needs_native

MULTIPLY = ("avx512_bf16", "amx_bf16")
"""Instruction sets that multiply these types; the others widen the weights and multiply float32."""
STATED = {"bfloat16": 0.02, "int8": 0.02}
"""The most by which a state may differ from float32's, of layers as they are initialised, over a few steps."""


def patched(layer, **how):
    layer = copy.deepcopy(layer).eval()
    fastseq.patch(layer, **how)
    return layer


def rounded(rows, kind):
    """Activations ``[..., K]`` as products read them, in float64."""
    rows = rows.float()
    if kind == "bfloat16":
        return rows.bfloat16().double()
    peak = rows.abs().amax(-1, keepdim=True)
    return (rows * torch.where(peak > 0, 32639 / peak, 0.0)).round().double() * (peak / 32639).double()


@pytest.fixture
def narrow(monkeypatch):
    """``truth(layer, kind, *args, **kwargs)``: what a float32 layer's call gives in that arithmetic, in float64."""

    def truth(layer, kind, x, hx=None, **options):
        def linear(given, weight, bias=None):
            return F.linear(rounded(given, kind), weight, bias)

        with monkeypatch.context() as changed, torch.no_grad(), fastseq.use_backend("reference"):
            changed.setattr(reference, "F", SimpleNamespace(linear=linear))
            options |= {} if hx is None else {"hx": double(hx)}
            return flat(meant(layer, kind).eval()(x.double(), **options))

    return truth


def assert_is(found, truth, kind, layers=1):
    """Equal but for float32's rounding. A number that this moves across a step of the smaller type moves by that step,
    and all that follows in its sequence a little: few do in one layer."""
    for y, t in zip(found, truth, strict=True):
        assert y.dtype == torch.float32
        error = (y.double() - t).abs()
        assert error.max() < 0.2 * STATED[kind]
        assert error.median() < (5e-6 if layers == 1 else 1e-4)


def assert_is_near(found, full, kind):
    for y, other in zip(found, full, strict=True):
        assert (y - other).abs().max() < STATED[kind]
        assert y.numel() < 50 or not torch.equal(y, other), "the copies were not read"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_a_layer_computes_in_the_smaller_type(name, kwargs, layout, kind, isa, narrow):
    for features, hidden in ((17, 33), (64, 128)):
        layer = getattr(fastseq.nn, name)(features, hidden, **kwargs, **layout)
        small = patched(layer, compute=kind)
        for shape in ((1, 1, features), (3, features), (5, 3, features), (4, 40, features)):
            x, state = torch.randn(shape), state_of(layer, shape)
            for hx in (None, state):
                with torch.no_grad():
                    found, full = flat(small(x, hx)), flat(layer(x, hx))
                    wide = flat(patched(layer, weights=kind)(x, hx))
                if isa in MULTIPLY:
                    assert_is(found, narrow(layer, kind, x, hx), kind, layer.num_layers)
                    assert not torch.equal(found[0], wide[0])
                else:
                    assert all(torch.equal(a, b) for a, b in zip(found, wide, strict=True))
                assert_is_near(found, full, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "kwargs"), CELLS, ids=str)
def test_a_cell_computes_in_the_smaller_type(name, kwargs, kind, isa, narrow):
    for features, hidden in ((17, 33), (64, 300)):
        cell = getattr(fastseq.nn, name)(features, hidden, **kwargs)
        small = patched(cell, compute=kind)
        for shape in ((features,), (1, features), (3, features), (40, features)):
            x, state = torch.randn(shape), state_of(cell, shape)
            with torch.no_grad():
                found, full = flat(small(x, state)), flat(cell(x, state))
            if isa in MULTIPLY:
                assert_is(found, narrow(cell, kind, x, state), kind)
            assert_is_near(found, full, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_so_with_lengths_resets_and_packed_sequences(name, kwargs, kind, isa, narrow):
    layer = getattr(fastseq.nn, name)(17, 33, num_layers=2, bidirectional=True, **kwargs)
    small = patched(layer, compute=kind)
    x, lengths, reset = torch.randn(6, 5, 17), torch.tensor([6, 1, 3, 3, 5]), torch.rand(6, 5) < 0.3
    state = state_of(layer, x.shape)
    options = [{"lengths": lengths}, {"reset": reset}, {"lengths": lengths.int(), "reset": reset}]
    for given in options:
        with torch.no_grad():
            found = flat(small(x, state, **given))
        if isa in MULTIPLY:
            assert_is(found, narrow(layer, kind, x, state, **given), kind, layers=2)
        else:
            assert_is_near(found, flat(layer(x, state, **given)), kind)
    first = patched(getattr(fastseq.nn, name)(17, 33, batch_first=True, **kwargs), compute=kind)
    torch.use_deterministic_algorithms(True)  # sums do not depend on how many rows there are
    with torch.no_grad():
        y, last = small(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        whole, end = small(x, state, lengths=lengths)
        assert torch.equal(pad_packed_sequence(y)[0], whole)
        assert all(torch.equal(a, b) for a, b in zip(flat(last), flat(end), strict=True))
        swapped = first(x.transpose(0, 1), lengths=lengths, reset=reset.T)[0]
        alone = first(x[:3, 2:3].transpose(0, 1), reset=reset[:3, 2:3].T)[0]
    torch.use_deterministic_algorithms(False)
    assert torch.equal(swapped[2, :3], alone[0])
    assert not swapped[2, 3:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_the_bits_are_the_same_whatever_the_team(name, kwargs, kind, isa):
    layer = patched(getattr(fastseq.nn, name)(300, 257, **kwargs), compute=kind)
    for shape in ((1, 1, 300), (3, 2, 300), (2, 33, 300)):
        x, found = torch.randn(shape), []
        state = state_of(layer, shape)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(flat(layer(x, state)))
                torch.use_deterministic_algorithms(True)
                found.append(flat(layer(x, state)))
                torch.use_deterministic_algorithms(False)
        exact = kind == "int8" and isa in MULTIPLY  # then without asking for it
        for other in found if exact else found[1::2]:
            assert all(torch.equal(a, b) for a, b in zip(found[1], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_steps_one_by_one_are_the_sequence(name, kind, isa):
    layer = patched(getattr(fastseq.nn, name)(40, 65, num_layers=2), compute=kind)
    x, state, ys = torch.randn(5, 3, 40), None, []
    torch.use_deterministic_algorithms(True)
    with torch.no_grad():
        for step in x.split(1):
            y, state = layer(step, state)
            ys.append(y)
        whole, end = layer(x)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.cat(ys), whole)
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(end), strict=True))


@torch.no_grad()
def test_numbers_of_any_size_are_rounded_by_their_row(isa):
    """A row of small numbers beside large ones, of zeros, of NaN and of infinity; int8's scale is each row's own."""
    layer = fastseq.nn.RNN(40, 48, nonlinearity="relu", bias=False)
    small = patched(layer, compute="int8")
    sizes = torch.tensor([1e-20, 1e-3, 1, 1e5, 1e25])
    x = torch.randn(1, 1, 40) * sizes[:, None]
    y, full = small(x)[0][0] / sizes[:, None], layer(x)[0][0] / sizes[:, None]
    assert (y - full).abs().max() < 0.05
    for other in y[1:] if isa in MULTIPLY else ():
        torch.testing.assert_close(other, y[0], rtol=1e-5, atol=1e-6)
    x[0, 1] = 0
    assert not small(x)[0][0, 1].any()
    for value in (float("nan"), float("inf")):
        x[0, 2, 5] = value
        y = small(x)[0][0]
        assert not y[2].isfinite().all()
        assert y[:2].isfinite().all()
        assert y[3:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_sum_does_not_overflow(kind, isa):
    layer = fastseq.nn.RNN(70_000, 3, bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1e-5)
        y = patched(layer, compute=kind)(torch.ones(1, 1, 70_000))[0]
        torch.testing.assert_close(y, layer(torch.ones(1, 1, 70_000))[0], rtol=0.01, atol=0)
        wide = nn.RNN(65_536, 3, bias=False)
        wide.weight_ih_l0.fill_(1e-5)
        y = patched(wide, compute=kind)(torch.ones(1, 1, 65_536))[0]
        torch.testing.assert_close(y, wide(torch.ones(1, 1, 65_536))[0], rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_step_in_the_smaller_type(kind):
    layer = patched(fastseq.nn.LSTM(40, 65, num_layers=2), compute=kind)
    streams = fastseq.Streams(layer, 4)
    ids = torch.tensor([streams.open() for _ in range(4)])
    x, state = torch.randn(3, 4, 40), None
    with torch.no_grad():
        for rows in x:
            y, state = layer(rows[None], state)
            assert torch.equal(streams.step(rows, ids), y[0])


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_torch_compile_read_the_weights_themselves(kind):
    layer = fastseq.nn.GRU(5, 17)
    small, x = patched(layer, compute=kind), torch.randn(3, 5)
    assert torch.equal(small(x)[0], layer(x)[0])
    assert torch.equal(small(x, lengths=torch.tensor(3))[0], layer(x, lengths=torch.tensor(3))[0])
    with torch.no_grad():
        assert not torch.equal(small(x)[0], layer(x)[0])
        torch.testing.assert_close(torch.compile(small, backend="eager")(x)[0], layer(x)[0])
        with fastseq.use_backend("torch"):
            torch.testing.assert_close(small(x)[0], layer(x)[0])
    assert small.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_the_copies_follow_their_weights(kind):
    layer = patched(fastseq.nn.GRU(5, 17), compute=kind)
    x, lengths = torch.randn(4, 2, 5), torch.tensor([4, 2])
    with torch.no_grad():
        before = layer(x)[0], layer(x, lengths=lengths)[0]
        layer.weight_hh_l0.mul_(2)
        for old, new in zip(before, (layer(x)[0], layer(x, lengths=lengths)[0]), strict=True):
            assert not torch.equal(old, new)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x)[0], layer(x)[0])
            assert f"compute='{kind}' in inference" in repr(twin)


@pytest.mark.parametrize("kind", KINDS)
def test_patch_reports_and_unpatch_restores(kind):
    model = nn.ModuleDict({"a": nn.LSTM(5, 7), "b": nn.GRU(5, 7).double(), "c": nn.GRUCell(5, 7)})
    x = torch.randn(3, 5)
    with torch.no_grad():
        before = model["a"](x)[0]
        report = fastseq.patch(model, compute=getattr(torch, kind))
        assert f"2 layers that multiply {kind} in inference; 1 layer not, having no float32 weights" in str(report)
        assert f"compute='{kind}' in inference" in repr(model["a"])
        assert f"from smaller copies: compute='{kind}'" in fastseq.explain(model["a"], x)
        assert not torch.equal(model["a"](x)[0], before)
        fastseq.patch(model, weights=kind)  # the last word holds
        assert f"weights='{kind}' in inference" in repr(model["a"])
        fastseq.unpatch(model)
        assert torch.equal(model["a"](x)[0], before)


def test_bad_values_are_refused():
    layer = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match=r"compute: got 'int4', accepted is one of None, 'bfloat16', 'int8'"):
        fastseq.patch(layer, compute="int4")
    with pytest.raises(ValueError, match="give one of them"):
        fastseq.patch(layer, compute="int8", weights="int8")
    assert type(layer) is nn.LSTM

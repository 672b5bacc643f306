"""Without gradients a stack or a cell is one native call: the same answers, and the same errors, as the general way."""

from __future__ import annotations

import pytest
import torch
from support import DTYPES, flat, needs_native
from torch.nn.utils.parametrize import register_parametrization

import fastseq
from fastseq import functional

pytestmark = needs_native

LAYERS = [
    ("RNN", {"nonlinearity": "relu"}),
    ("RNN", {}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 4}),
    ("LSTM", {"input_forget": True}),
    ("LSTM", {"input_forget": True, "proj_size": 4}),
]
LAYOUTS = [
    {},
    {"num_layers": 3, "bias": False},
    {"bidirectional": True, "batch_first": True},
    {"bidirectional": True, "num_layers": 2, "dropout": 0.5},
]
CELLS = [("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"}), ("GRUCell", {}), ("GRUCell", {"reset_after": False})]


@pytest.fixture
def only_native_calls(monkeypatch):
    """The general path is closed: what still answers came from one native call."""

    def closed(*args, **kwargs):
        raise AssertionError("took the general way")

    def close():
        for name in ("rnn", "gru", "lstm", "rnn_cell", "gru_cell", "lstm_cell"):
            monkeypatch.setattr(functional, name, closed)

    return close


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("name", "kwargs"), LAYERS, ids=str)
def test_stack_in_one_call_is_the_general_way(name, kwargs, layout, dtype, only_native_calls):
    layer = getattr(fastseq.nn, name)(5, 17, **kwargs, **layout).to(dtype).eval()
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    calls = []
    for shape in ((3, 7, 5), (1, 1, 5), (6, 5), (4, 0, 5)):
        x = torch.randn(shape).to(dtype)
        batch = () if x.dim() == 2 else (shape[0 if layer.batch_first else 1],)
        if layer.batch_first and shape == (4, 0, 5):
            continue  # no steps
        h = torch.randn(rows, *batch, layer.proj_size or 17).to(dtype)
        c = torch.randn(rows, *batch, 17).to(dtype)
        calls += [(x, None), (x, (h, c) if name == "LSTM" else h)]
    general = [flat(layer(*call)) for call in calls]  # gradients are on: every layer and direction by itself
    only_native_calls()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for call, expected in zip(calls, general, strict=True):
                for a, b in zip(flat(layer(*call)), expected, strict=True):
                    assert a.dtype == dtype
                    torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "kwargs"), [*CELLS, ("LSTMCell", {}), ("LSTMCell", {"input_forget": True})], ids=str)
def test_cell_in_one_call_is_the_general_way(name, kwargs, bias, dtype, only_native_calls):
    cell = getattr(fastseq.nn, name)(5, 17, bias=bias, **kwargs).to(dtype)
    calls = []
    for shape in ((3, 5), (1, 5), (5,), (0, 5)):
        h = torch.randn(*shape[:-1], 17).to(dtype)
        x = torch.randn(shape).to(dtype)
        calls += [(x, None), (x, (h, h.sin()) if name == "LSTMCell" else h)]
    general = [flat(cell(*call)) for call in calls]
    only_native_calls()
    with torch.no_grad():
        for call, expected in zip(calls, general, strict=True):
            for a, b in zip(flat(cell(*call)), expected, strict=True):
                torch.testing.assert_close(a, b.detach())


def test_strided_input_and_state():
    layer = fastseq.nn.LSTM(5, 17, num_layers=2)
    x = torch.randn(4, 3, 10)[:, :, ::2]
    h, c = torch.randn(2, 3, 34)[..., ::2], torch.randn(3, 2, 17).transpose(0, 1)
    expected = flat(layer(x, (h, c)))
    with torch.no_grad():
        for a, b in zip(flat(layer(x, (h, c))), expected, strict=True):
            torch.testing.assert_close(a, b.detach())


def test_a_stream_of_single_steps_is_the_whole_sequence():
    layer = fastseq.nn.LSTM(5, 17, num_layers=2)
    x = torch.randn(30, 2, 5)
    with torch.no_grad():
        whole, (h_n, c_n) = layer(x)
        hx, steps = None, []
        for t in range(30):
            y, hx = layer(x[t : t + 1], hx)
            steps.append(y)
    torch.testing.assert_close(torch.cat(steps), whole)
    torch.testing.assert_close(hx[0], h_n)
    torch.testing.assert_close(hx[1], c_n)


def test_dropout_in_training_takes_the_general_way():
    layer = fastseq.nn.GRU(5, 64, num_layers=2, dropout=1.0)
    with torch.no_grad():
        x = torch.randn(4, 3, 5)
        assert torch.equal(layer(x)[0], layer(x + 1)[0])


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("weights", [None, "bfloat16"])
@pytest.mark.parametrize("parameter", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_a_parametrised_parameter_of_a_layer_or_cell_is_used(name, parameter, weights):
    for kind, suffix, shape in ((name, "_l0", (4, 3, 5)), (name + "Cell", "", (3, 5))):
        ours, theirs, x = getattr(fastseq.nn, kind)(5, 6), getattr(torch.nn, kind)(5, 6), torch.randn(shape)
        theirs.load_state_dict(ours.state_dict())
        if weights is not None:
            fastseq.patch(ours, weights=weights)
        for each in (ours, theirs):
            register_parametrization(each, parameter + suffix, Doubled())
        with torch.no_grad():
            for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if weights is None else 2e-2)


def test_weights_changed_in_place_are_seen_at_once():
    layer = fastseq.nn.GRU(5, 17)
    x = torch.randn(40, 3, 5)
    with torch.no_grad():
        before = layer(x)[0]
        for change in (lambda p: p.mul_(2), lambda p: p.data.mul_(0.5), lambda p: p.numpy().fill(0.0)):
            for p in layer.parameters():
                change(p)
            torch.testing.assert_close(layer(x)[0], fastseq.functional.gru(x, None, layer._flat_weights)[0])
    assert not layer(x)[0].any()
    assert before.any()

"""Bad input gets an error that names the argument, says what came and what was expected, and harms nothing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq.checks import ArgumentError

x = torch.randn(4, 3, 5)
h = torch.zeros(1, 3, 7)

LAYER_CASES = {
    "feature size": (lambda m: m(torch.randn(4, 3, 6)), "input has 6 features.*input_size is 5"),
    "rank too high": (lambda m: m(torch.randn(2, 4, 3, 5)), r"input must be 3-D \[T, B, I\].*got 4-D \[2, 4, 3, 5\]"),
    "rank too low": (lambda m: m(torch.randn(5)), "input must be 3-D"),
    "no steps": (lambda m: m(torch.randn(0, 3, 5)), "no time steps"),
    "dtype": (lambda m: m(x.double()), "input is torch.float64 but the weights are torch.float32"),
    "integer input": (lambda m: m(torch.ones(4, 3, 5, dtype=torch.long)), r"input must be float64.*got torch.int64"),
    "device": (lambda m: m(x.to("meta")), "input is on meta but the weights are on cpu|input is on meta"),
    "hx batch": (lambda m: m(x, hx(m, torch.zeros(1, 2, 7))), r"\[1, 3, 7\].*got \[1, 2, 7\]"),
    "hx layers": (lambda m: m(x, hx(m, torch.zeros(2, 3, 7))), r"\[1, 3, 7\].*got \[2, 3, 7\]"),
    "hx rank": (lambda m: m(x, hx(m, torch.zeros(3, 7))), r"\[1, 3, 7\].*got \[3, 7\]"),
    "hx dtype": (lambda m: m(x, hx(m, h.double())), "torch.float64 but input is torch.float32"),
    "unbatched hx": (lambda m: m(x[:, 0], hx(m, h)), r"\[1, 7\].*got \[1, 3, 7\]"),
    "lengths too long": (lambda m: m(x, lengths=torch.tensor([5, 1, 1])), r"lengths must lie in 0\.\.4.*from 1 to 5"),
    "lengths negative": (lambda m: m(x, lengths=torch.tensor([-1, 1, 1])), r"lengths must lie in 0\.\.4.*from -1"),
    "lengths shape": (lambda m: m(x, lengths=torch.tensor([1, 1])), r"lengths must be \[batch\] = \[3\], got \[2\]"),
    "lengths dtype": (lambda m: m(x, lengths=torch.ones(3)), "lengths must hold integers, got torch.float32"),
    "lengths device": (lambda m: m(x, lengths=torch.ones(3, dtype=torch.long, device="meta")), "lengths is on meta"),
    "lengths sparse": (
        lambda m: m(x, lengths=torch.tensor([4, 1, 1]).to_sparse()),
        r"lengths must be a dense Tensor, got a Tensor of layout torch.sparse_coo; convert it with .to_dense\(\)",
    ),
    "lengths sparse, unbatched": (
        lambda m: m(x[:, 0], lengths=torch.tensor([4]).to_sparse()),
        "lengths must be a dense Tensor",
    ),
    "lengths nested": (
        lambda m: m(x, lengths=torch.nested.nested_tensor([torch.tensor([4, 1]), torch.tensor([1])])),
        "lengths must be a dense Tensor, got a nested Tensor; convert it with torch.nested.to_padded_tensor",
    ),
    "reset sparse": (lambda m: m(x, reset=torch.ones(4, 3).bool().to_sparse()), "reset must be a dense Tensor"),
    "reset shape": (lambda m: m(x, reset=torch.zeros(3, 4).bool()), r"reset must be shaped.*\[4, 3\], got \[3, 4\]"),
    "reset dtype": (lambda m: m(x, reset=torch.zeros(4, 3)), "reset must be bool.*got torch.float32"),
    "packed with lengths": (
        lambda m: m(pack_sequence([x[:, 0]]), lengths=torch.tensor([4])),
        "PackedSequence has its lengths",
    ),
}


def hx(module, state):
    return (state, state) if module.mode == "LSTM" else state


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("case", LAYER_CASES)
def test_layer_says_what_is_wrong(case, name):
    layer = getattr(fastseq.nn, name)(5, 7)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    call, message = LAYER_CASES[case]
    with pytest.raises(ArgumentError, match=message):
        call(layer)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert layer(x)[0].isfinite().all()  # and the layer works on


@pytest.mark.parametrize("state", [h, (h,), (h, h, h)], ids=["tensor", "one", "three"])
def test_an_lstms_hx_must_be_a_pair(state):
    for layer, of in ((fastseq.nn.LSTM(5, 7), x), (fastseq.nn.LSTMCell(5, 7), x[0])):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(ArgumentError, match=r"a pair of tensors.*got"):
                layer(of, state)


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_num_layers_cannot_change_after_construction(name):
    for before, after in ((1, 2), (2, 1), (2, 3)):
        layer = getattr(fastseq.nn, name)(5, 7, num_layers=before)
        layer.num_layers = after
        for gradients in (True, False):
            message = f"num_layers = {after}.*needs {4 * after} weights.*there are {4 * before}"
            with torch.set_grad_enabled(gradients), pytest.raises(ArgumentError, match=message):
                layer(x)


def test_argument_error_is_caught_by_handlers_written_for_torch():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, RuntimeError)


def test_things_that_are_no_tensors_are_type_errors():
    gru = fastseq.nn.GRU(5, 7)
    for call in (
        lambda: gru([1, 2]),
        lambda: gru(x, lengths=[4, 1, 1]),
        lambda: gru(x, [0.0]),
        lambda: gru(x, reset=[True]),
    ):
        with pytest.raises(TypeError, match="must be a"):
            call()


def test_cells_say_what_is_wrong():
    cell = fastseq.nn.GRUCell(5, 7)
    with pytest.raises(ArgumentError, match=r"input of a cell must be \[B, I\] or \[I\], got 3-D"):
        cell(x)
    with pytest.raises(ArgumentError, match="input has 6 features"):
        cell(torch.randn(3, 6))
    with pytest.raises(ArgumentError, match=r"got \[1, 2, 7\]|got \[2, 7\]"):
        cell(torch.randn(3, 5), torch.zeros(2, 7))


def test_constructors_refuse_what_torch_refuses():
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        fastseq.nn.RNN(5, 7, nonlinearity="gelu")
    for name in ("RNN", "GRU"):
        with pytest.raises(ValueError, match="proj_size"):
            getattr(fastseq.nn, name)(5, 7, proj_size=3)
    with pytest.raises(ValueError, match="hidden_size"):
        fastseq.nn.LSTM(5, 0)
    with pytest.raises(ValueError, match="dropout"):
        fastseq.nn.GRU(5, 7, dropout=2)


def test_a_named_backend_that_cannot_raises_with_the_reason():
    gru = fastseq.nn.GRU(5, 7, reset_after=False)
    with fastseq.use_backend("torch"), pytest.raises(fastseq.BackendError, match="reset gate before the product"):
        gru(x)
    for layer, given in (
        (fastseq.nn.LSTM(5, 7, input_forget=True), x),
        (fastseq.nn.LSTMCell(5, 7, input_forget=True), x[0]),
    ):
        with fastseq.use_backend("torch"), pytest.raises(fastseq.BackendError, match="input_forget=True"):
            layer(given)
    lstm = fastseq.nn.LSTM(5, 7)
    with fastseq.use_backend("torch"), pytest.raises(fastseq.BackendError, match="every c_t"):
        lstm(x, return_all_states=True)
    with fastseq.use_backend("torch"), pytest.raises(fastseq.BackendError, match="no reset="):
        lstm(x, reset=torch.zeros(4, 3).bool())
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        fastseq.use_backend("cuda")

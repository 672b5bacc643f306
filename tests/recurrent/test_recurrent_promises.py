"""What the mathematics of each cell promises (docs/mathematics.md), in value and in gradient, on every backend.

Gates are driven open or shut by large biases: sigmoid(+-1000) is 1 or 0 in every dtype.
"""

from __future__ import annotations

import devices
import pytest
import torch
from support import NATIVE

import fastseq
from fastseq.ops.triton import interpreted

T, B, I, H = 9, 4, 5, 7
OPEN, SHUT = 1000.0, -1000.0
# Triton's kernels are interpreted in a process of their own (test_triton_promises_interpreted.py), and know no float64.
INTERPRETED = interpreted() or devices.DEVICE == "cuda"
BACKENDS = [devices.KERNELS] if INTERPRETED else ["reference", "torch", NATIVE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = torch.float32 if INTERPRETED else torch.float64
DTYPES = DTYPES if INTERPRETED else [WIDE, *DTYPES]
LONG = 25 if interpreted() else 2000
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def layer(name: str, dtype: torch.dtype = WIDE, **kwargs):
    return getattr(fastseq.nn, name)(I, H, **kwargs).to(dtype)


def drive(module, **gates: float) -> None:
    """Set the bias of named gates, and cut their weights, so that they no longer depend on anything."""
    order = {"LSTM": "igo" if getattr(module, "input_forget", False) else "ifgo", "GRU": "rzn"}[module.mode]
    with torch.no_grad():
        for gate, value in gates.items():
            rows = slice(order.index(gate) * H, (order.index(gate) + 1) * H)
            module.weight_ih_l0[rows] = 0
            module.weight_hh_l0[rows] = 0
            module.bias_hh_l0[rows] = 0
            module.bias_ih_l0[rows] = value


def start(dtype: torch.dtype = WIDE) -> torch.Tensor:
    return torch.randn(1, B, H).tanh().to(dtype).requires_grad_()


def forms(backend: str) -> list[bool]:
    return [True] if backend == "torch" else [True, False]


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_without_recurrence_is_an_mlp_at_each_step(backend, nonlinearity):
    rnn = layer("RNN", nonlinearity=nonlinearity)
    with torch.no_grad():
        rnn.weight_hh_l0.zero_()
        rnn.bias_hh_l0.zero_()
    x = torch.randn(T, B, I).to(WIDE).requires_grad_()
    order = torch.randperm(T)
    with fastseq.use_backend(backend):
        y, permuted = rnn(x)[0], rnn(x[order])[0]
    torch.testing.assert_close(permuted, y[order])
    phi = getattr(torch, nonlinearity)
    torch.testing.assert_close(y, phi(torch.nn.functional.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0)))
    (grad,) = torch.autograd.grad(y[2].sum(), x)
    assert not grad[[t for t in range(T) if t != 2]].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_gate_at_one_keeps_the_state(backend, dtype):
    for reset_after in forms(backend):
        gru = layer("GRU", dtype, reset_after=reset_after)
        drive(gru, z=OPEN)
        x, h0 = torch.randn(T, B, I).to(dtype).requires_grad_(), start(dtype)
        with fastseq.use_backend(backend):
            y, h_n = gru(x, h0)
        if backend == "torch":  # computes n + z * (h - n), which rounds twice at each step
            torch.testing.assert_close(y, h0.expand(T, B, H), rtol=0, atol=2 * T * torch.finfo(dtype).eps)
        else:
            assert torch.equal(y, h0.expand(T, B, H))
            assert torch.equal(h_n, h0)
        dx, dh0 = torch.autograd.grad(h_n.sum(), [x, h0])
        assert not dx.any()
        assert torch.equal(dh0, torch.ones_like(h0))


def test_update_gate_at_zero_and_reset_gate_at_one_is_the_plain_rnn(backend):
    for reset_after in forms(backend):
        gru, rnn = layer("GRU", reset_after=reset_after), layer("RNN")
        drive(gru, z=SHUT, r=OPEN)
        rnn.load_state_dict({k: v[2 * H :] for k, v in gru.state_dict().items()})
        x, h0 = torch.randn(T, B, I).to(WIDE).requires_grad_(), start()
        with fastseq.use_backend(backend):
            y, z = gru(x, h0)[0], rnn(x, h0)[0]
        torch.testing.assert_close(y, z)
        for a, b in zip(*(torch.autograd.grad(v.sin().sum(), [x, h0]) for v in (y, z)), strict=True):
            torch.testing.assert_close(a, b)


def test_both_gates_at_zero_forget_the_past(backend):
    for reset_after in forms(backend):
        gru = layer("GRU", reset_after=reset_after)
        drive(gru, z=SHUT, r=SHUT)
        x, h0 = torch.randn(T, B, I).to(WIDE).requires_grad_(), start()
        with fastseq.use_backend(backend):
            y, _ = gru(x, h0)
        w, b = gru.weight_ih_l0[2 * H :], gru.bias_ih_l0[2 * H :]
        if not reset_after:
            b = b + gru.bias_hh_l0[2 * H :]
        torch.testing.assert_close(y, torch.tanh(torch.nn.functional.linear(x, w, b)))
        dx, dh0 = torch.autograd.grad(y[-1].sum(), [x, h0])
        assert not dx[:-1].any()
        assert not dh0.any()


def assert_c_is_carried(lstm, backend, dtype):
    """c comes out of a long walk as it went in, and so does its gradient; h has no part in it."""
    x = torch.randn(1, B, I).to(dtype).expand(LONG, B, I)
    c0 = (torch.randn(1, B, H) * 3).to(dtype).requires_grad_()
    h0 = start(dtype)
    with fastseq.use_backend(backend):
        _, (_, c_n) = lstm(x, (h0, c0))
    assert torch.equal(c_n, c0)
    dh0, dc0 = torch.autograd.grad(c_n.sum(), [h0, c0])
    assert torch.equal(dc0, torch.ones_like(c0))
    assert not dh0.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_open_forget_gate_carries_the_cell_for_thousands_of_steps(backend, dtype):
    lstm = layer("LSTM", dtype)
    drive(lstm, f=OPEN, i=SHUT)
    assert_c_is_carried(lstm, backend, dtype)


def test_shut_forget_and_input_gates_wipe_the_cell(backend):
    lstm = layer("LSTM")
    drive(lstm, f=SHUT, i=SHUT)
    h0, c0 = start(), torch.randn(1, B, H).to(WIDE).requires_grad_()
    with fastseq.use_backend(backend):
        y, (_, c_n) = lstm(torch.randn(T, B, I).to(WIDE), (h0, c0))
    assert not c_n.any()
    assert not y.any()
    assert not torch.autograd.grad(c_n.sum(), c0)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cell_takes_old_and_new_in_full_and_grows_without_clipping(backend, dtype):
    lstm = layer("LSTM", dtype)
    drive(lstm, f=OPEN, i=OPEN, g=OPEN, o=OPEN)
    steps = 8
    c0 = torch.full((1, B, H), 10000.0 if dtype != torch.bfloat16 else 9984.0, dtype=dtype)
    with fastseq.use_backend(backend):
        y, (h_n, c_n) = lstm(torch.randn(steps, B, I).to(dtype), (start(dtype), c0))
    truth = c0.double() + steps
    assert (c_n.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.max()
    assert (y.abs() <= 1).all()
    assert torch.equal(y[-1:], h_n)


def test_hidden_state_of_an_lstm_stays_below_one(backend):
    lstm = layer("LSTM")
    x = torch.randn(T, B, I).to(WIDE) * 10
    with fastseq.use_backend(backend):
        y, _ = lstm(x, (start(), torch.randn(1, B, H).to(WIDE) * 3))
    assert (y.abs() < 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shut_output_gate_hides_a_living_cell(backend, dtype):
    lstm = layer("LSTM", dtype)
    drive(lstm, f=OPEN, i=OPEN, o=SHUT)
    c0 = torch.randn(1, B, H).to(dtype)
    with fastseq.use_backend(backend):
        y, (h_n, c_n) = lstm(torch.randn(T, B, I).to(dtype), (start(dtype), c0))
    assert not y.any()
    assert not h_n.any()
    assert (c_n - c0).abs().max() > 0.1


def coupled(backend: str, dtype: torch.dtype = WIDE):
    if backend == "torch":
        pytest.skip("torch has no such LSTM")
    return layer("LSTM", dtype, input_forget=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coupled_gates_keep_the_cell_where_nothing_comes_in(backend, dtype):
    lstm = coupled(backend, dtype)
    drive(lstm, i=SHUT)
    assert_c_is_carried(lstm, backend, dtype)


def test_coupled_gates_forget_all_where_all_comes_in(backend):
    lstm = coupled(backend)
    drive(lstm, i=OPEN)
    h0, c0 = start(), torch.randn(1, B, H).to(WIDE).requires_grad_()
    with fastseq.use_backend(backend):
        y, (_, c_n) = lstm(torch.randn(T, B, I).to(WIDE), (h0, c0))
    assert not torch.autograd.grad(y.sum(), c0, retain_graph=True)[0].any()
    assert not torch.autograd.grad(c_n.sum(), c0)[0].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_of_coupled_gates_stays_between_the_old_and_the_new(backend, dtype):
    lstm = coupled(backend, dtype)
    x, c0 = (torch.randn(T, B, I) * 10).to(dtype), torch.full((1, B, H), 3.0, dtype=dtype)
    with fastseq.use_backend(backend):
        _, (_, c_n) = lstm(x, (start(dtype), c0))
        _, (_, low) = lstm(x, (start(dtype), torch.zeros_like(c0)))
    assert (c_n.abs() <= 3).all()
    assert (low.abs() <= 1).all()

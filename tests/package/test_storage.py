"""Results lie in memory of torch's own: their storage can be freed and grown; where there is no memory it is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq import nn, ops

LAYERS = {
    "rnn": lambda: nn.RNN(64, 128),
    "gru": lambda: nn.GRU(64, 128, num_layers=2),
    "lstm": lambda: nn.LSTM(64, 128, bidirectional=True, batch_first=True),
    "lstm_projected": lambda: nn.LSTM(64, 128, proj_size=96),
    "rnn_cell": lambda: nn.RNNCell(64, 128),
    "gru_cell": lambda: nn.GRUCell(64, 128),
    "lstm_cell": lambda: nn.LSTMCell(64, 128),
    "multihead": lambda: nn.MultiheadAttention(64, 4),
}


def tensors(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from tensors(part)


def call(name: str, layer: torch.nn.Module, x: Tensor) -> object:
    return layer(x, x, x) if name == "multihead" else layer(x)


def input_of(name: str) -> Tensor:
    return torch.randn(300, 64) if name.endswith("cell") else torch.randn(40, 30, 64)


def assert_resizes(t: Tensor, what: str) -> None:
    """As FSDP frees a tensor, and lets it have memory again."""
    t = t.detach()
    storage, size, want = t.untyped_storage(), t.untyped_storage().nbytes(), t.clone()
    assert storage.resizable(), what
    storage.resize_(0)
    assert storage.nbytes() == 0, what
    storage.resize_(size)
    t.copy_(want)
    assert torch.equal(t, want), what
    storage.resize_(2 * size)
    assert torch.equal(t, want), f"{what}: growing keeps what is there"


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_can_be_freed_and_grown(name: str) -> None:
    layer, x = LAYERS[name](), input_of(name)
    with torch.no_grad():
        for t in tensors(call(name, layer, x)):
            assert_resizes(t, f"{name}, inference")
    leaf = x.clone().requires_grad_()
    results = list(tensors(call(name, layer, leaf)))
    sum(t.sum() for t in results).backward()
    for t in results:
        assert_resizes(t, f"{name}, training")
    for parameter, p in (("x", leaf), *layer.named_parameters()):
        assert p.grad is not None
        assert_resizes(p.grad, f"{name}, gradient of {parameter}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_of_attention_can_be_freed_and_grown(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 4, 100, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    o = fastseq.scaled_dot_product_attention(q, k, v)
    o.sum().backward()
    for what, t in (("o", o), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
        assert t is not None
        assert_resizes(t, what)
    with torch.no_grad():
        for t in fastseq.attention(q, k, v, return_lse=True):
            assert_resizes(t, "o or lse, inference")


def many(*sizes: int, **settings: bool) -> Tensor:
    """A tensor of one row's memory."""
    return torch.zeros(*(1,) * (len(sizes) - 1), sizes[-1]).expand(*sizes).requires_grad_(**settings)


CALLS: dict[str, Callable[[bool], object]] = {
    "gru": lambda grad: nn.GRU(2, 3)(many(1 << 30, 1 << 20, 2, requires_grad=grad)),
    "lstm": lambda grad: nn.LSTM(2, 3, bidirectional=True)(many(1 << 30, 1 << 20, 2, requires_grad=grad)),
    "cell": lambda grad: nn.GRUCell(2, 3)(many(1 << 48, 2, requires_grad=grad)),
    "attention": lambda grad: fastseq.scaled_dot_product_attention(
        *(many(1 << 20, 1 << 20, n, 4, requires_grad=grad) for n in (1 << 8, 1, 1))
    ),
}


@pytest.mark.skipif(ops.NATIVE_MISSING is not None, reason="the messages are those of the native kernels")
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_allocated_is_told_in_bytes_without_a_trace(
    name: str, grad: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="memory") as raised:
        CALLS[name](grad)
    assert re.search(r"\d{13,} bytes", str(raised.value)), raised.value
    assert capfd.readouterr().err == ""

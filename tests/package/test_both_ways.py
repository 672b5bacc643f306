"""A call takes the native call past torch's dispatcher or the operator: both give the same bits, layouts and errors."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest
import torch
from fuzz_cases import FAMILIES, TOPICS, Case, draw
from fuzz_run import Answer, run
from support import Declined, fast_paths, flat, needs_native
from torch import Tensor, nn

import fastseq

pytestmark = needs_native

CASES = 24  # drawn for each family and topic


def described(answer: Answer) -> list[Any]:
    """All that a caller sees of an answer, but the bits."""

    def form(t: Tensor | None) -> Any:
        if t is None:
            return None
        layout = t.stride() if t.numel() else None  # of no elements any strides will do
        return t.dtype, t.device, tuple(t.shape), layout, t.requires_grad

    error = None if answer.error is None else (type(answer.error), str(answer.error))
    gradients = {name: form(t) for name, t in answer.gradients.items()}
    return [answer.structure, [form(t) for t in answer.outputs], gradients, answer.changed, error]


def same_bits(a: Tensor | None, b: Tensor | None, exact: bool) -> bool:
    if a is None or b is None or a.is_meta:
        return a is b or (a is not None and a.is_meta)
    if exact:
        return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    eps = 8 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_calls_are_the_same_both_ways(family: str, topic: str) -> None:
    generator = random.Random(zlib.crc32(f"{family} {topic}".encode()))
    for _ in range(CASES):
        case: Case = draw(family, topic, None, iter(generator.randbytes(400)))
        if topic == "zeros" and case["dtype"].endswith("16") and family == "layer":
            case["dtype"] = "float32"  # AUTO may take torch's own layers there, which read such tensors unwritten
        fast = run(case, "ours")
        with fast_paths(required=False):
            slow = run(case, "ours")
        assert described(fast) == described(slow), case
        # A whole MultiheadAttention in one call multiplies by other views of its weights, whose products may be summed
        # in another order; so may the parts of the gradient of a tensor that is given more than once.
        exact = family != "mha" and topic != "aliases"
        for a, b in zip(fast.outputs, slow.outputs, strict=True):
            assert same_bits(a, b, exact), case
        for name, a in fast.gradients.items():
            assert same_bits(a, slow.gradients[name], exact), (name, case)


LAYERS = {
    "RNN": lambda: fastseq.nn.RNN(5, 7),
    "GRU, two layers": lambda: fastseq.nn.GRU(5, 7, 2, bidirectional=True),
    "GRU, reset before": lambda: fastseq.nn.GRU(5, 7, reset_after=False),
    "LSTM, batch first": lambda: fastseq.nn.LSTM(5, 7, batch_first=True),
    "LSTM, no bias": lambda: fastseq.nn.LSTM(5, 7, bias=False),
    "LSTM, coupled": lambda: fastseq.nn.LSTM(5, 7, 2, bidirectional=True, input_forget=True),
    "RNNCell": lambda: fastseq.nn.RNNCell(5, 7),
    "GRUCell": lambda: fastseq.nn.GRUCell(5, 7),
    "LSTMCell": lambda: fastseq.nn.LSTMCell(5, 7, bias=False),
    "LSTMCell, coupled": lambda: fastseq.nn.LSTMCell(5, 7, input_forget=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_calls_that_people_make_often_take_the_fast_path(name: str, grad: bool) -> None:
    layer = LAYERS[name]()
    for shape in ((1, 1, 5), (4, 3, 5), (4, 5)) if "Cell" not in name else ((3, 5), (5,)):
        with fast_paths(required=True), torch.set_grad_enabled(grad):
            results = flat(layer(torch.randn(shape)))
            if grad:
                torch.autograd.backward(results, [torch.randn_like(t) for t in results])
    if grad:
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_layers_with_smaller_weights_take_the_fast_path(kind: str) -> None:
    for layer, shape in ((nn.LSTM(5, 7, 2), (4, 3, 5)), (nn.GRUCell(5, 7), (3, 5))):
        fastseq.patch(layer, weights=kind)
        with fast_paths(required=True), torch.no_grad():
            layer(torch.randn(shape))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_attention_takes_the_fast_path(grad: bool) -> None:
    q = torch.randn(2, 3, 4, 8, requires_grad=grad)
    mask = torch.rand(4, 4) > 0.5
    with fast_paths(required=True):
        results = [
            fastseq.scaled_dot_product_attention(q, q, q, is_causal=True),
            fastseq.scaled_dot_product_attention(q, q, q, mask),
            fastseq.attention(q, q, q, causal=True, window=(2, 0)),
        ]
        if grad:
            sum(o.sum() for o in results).backward()
            assert q.grad is not None


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_in_inference_takes_the_fast_path(need_weights: bool) -> None:
    layer, x = fastseq.nn.MultiheadAttention(8, 2), torch.randn(4, 3, 8)
    with fast_paths(required=True), torch.no_grad():
        layer(x, x, x, need_weights=need_weights)


def test_a_fast_path_that_stopped_working_is_noticed() -> None:
    with fast_paths(required=True), torch.no_grad(), pytest.raises(Declined, match="infer"):
        fastseq.nn.RNN(5, 7)(torch.randn(4, 3, 5, dtype=torch.float64))

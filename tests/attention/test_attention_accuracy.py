"""Attention's gradients where rounding is amplified: inputs with an offset, large scores, rows of masking biases.

The peer is torch's MATH path, which computes 16-bit inputs in float32. Torch's fused kernels share the weaknesses that
these inputs look for. What MATH cannot express is held to the reference in the inputs' own dtype, which does the same.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from attention_operators import assert_as_good_as, gradients, in_own_dtype, math_path, operator_gradients
from support import NATIVE
from torch import Tensor

SIXTEEN = [torch.bfloat16, torch.float16]
SHAPES = {
    "one tile": (2, 4, 2, 33, 65, 24, 17),
    "many tiles": (1, 4, 2, 70, 301, 24, 17),
    "one query": (2, 2, 2, 1, 150, 24, 17),
    "one query, grouped": (2, 4, 2, 1, 150, 24, 17),
    "one head": (1, 1, 1, 70, 301, 24, 17),
}
"""B, Hq, Hk, Tq, Tk, D, Dv."""


def drawn(shape: tuple[int, ...], dtype: torch.dtype, offsets: tuple[float, float, float] = (0, 0, 0)) -> list[Tensor]:
    b, hq, hk, tq, tk, d, dv = shape
    sizes = (b, hq, tq, d), (b, hk, tk, d), (b, hk, tk, dv)
    return [(torch.randn(s) + x).to(dtype) for s, x in zip(sizes, offsets, strict=True)]


def with_large_scores(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [x.sigmoid() * 18 - 9 for x in drawn((*shape[:5], 8, 8), dtype)]


OFFSETS = {"keys": (0, 20, 0), "values": (0, 0, 20), "all": (2, 20, 20), "keys far away": (0, 100, 0)}


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("backend", [NATIVE])
def test_an_offset_of_keys_or_values_does_not_spoil_gradients_of_16_bits(backend, offset, shape, causal, dtype):
    assert_as_good_as(math_path, lambda: drawn(SHAPES[shape], dtype, OFFSETS[offset]), {"causal": causal}, backend)


def features(name: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    b, hq, tq, _ = q.shape
    tk = k.shape[2]
    return {
        "window": {"window_left": 40, "window_right": 3},
        "mask": {"mask": torch.rand(b, 1, tq, tk) < 0.6},
        "bias": {"bias": torch.randn(1, hq, tq, tk)},
        "bias of keys": {"bias": torch.randn(b, 1, 1, tk)},
        "softcap": {"softcap": 3.0},
        "sinks": {"sinks": 2 * torch.randn(hq), "causal": True},
        "dropout": {"dropout_p": 0.3, "seed": torch.tensor([11])},
        "lengths": {"lengths_k": torch.randint(1, tk + 1, (b,)), "lengths_q": torch.randint(1, tq + 1, (b,))},
        "alibi": {"alibi_slopes": torch.rand(hq), "causal": True},
        "everything": {
            "mask": torch.rand(b, 1, tq, tk) < 0.7, "bias": torch.randn(b, 1, tq, tk), "softcap": 4.0,
            "sinks": torch.randn(hq), "causal": True, "dropout_p": 0.2, "seed": torch.tensor([5]),
        },
    }[name]  # fmt: skip


FEATURES = ["window", "mask", "bias", "bias of keys", "softcap", "sinks", "dropout", "lengths", "alibi", "everything"]


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", [NATIVE])
def test_an_offset_does_not_spoil_gradients_under_any_option(backend, feature, shape, dtype):
    offset = 5 if dtype == torch.float32 else 20  # there the rounding of large scores would drown what is looked for
    options = functools.partial(features, feature)
    assert_as_good_as(in_own_dtype, lambda: drawn(SHAPES[shape], dtype, (0, offset, offset)), options, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", [NATIVE])
def test_large_scores_do_not_spoil_gradients(backend, shape, causal, dtype):
    assert_as_good_as(math_path, lambda: with_large_scores(SHAPES[shape], dtype), {"causal": causal}, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", ["finfo.min", "-1e4", "-1e9"])
@pytest.mark.parametrize("backend", [NATIVE])
def test_a_row_of_finite_masking_biases_has_the_gradient_of_its_softmax(backend, level, shape, dtype):
    """The row's lse is too large to hold the logarithm of the number of keys."""
    q, k, v = drawn(SHAPES[shape], dtype)
    kind = torch.float32 if level == "-1e9" else dtype
    value = torch.finfo(kind).min if level == "finfo.min" else float(level)
    bias = torch.zeros(1, 1, q.shape[2], k.shape[2])
    bias[:, :, ::3] = value
    bias = bias.to(kind)
    options = {"scale": 0.2, "bias": bias}
    d_o = torch.randn(*q.shape[:-1], v.shape[-1]).to(dtype)
    ours = operator_gradients(q, k, v, options, d_o, backend)
    # In float64 the scores would still tell the keys apart: here they are what the sum with the bias leaves of them,
    # near -1e4 to about a hundredth.
    *_, truth = gradients(in_own_dtype, q, k, v, options, None, d_o, None)
    tolerance = max(1e-5 if abs(value) > 1e6 else 1e-2, 4 * torch.finfo(dtype).eps)
    for name, got, true in zip(("dq", "dk", "dv", "dbias"), ours, truth, strict=True):
        assert (got - true).abs().max() <= tolerance * true.abs().max(), name

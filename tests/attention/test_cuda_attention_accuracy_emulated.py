"""The CUDA C++ attention's gradients where rounding is amplified, emulated: see test_attention_accuracy.py."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import attention_emulated
import devices
import pytest
import torch
from attention_emulated import settings
from attention_operators import assert_as_good_as, gradients, in_own_dtype, math_path, operator_gradients
from cuda_recurrent_support import missing
from test_attention_accuracy import OFFSETS, SIXTEEN, drawn, features

pytestmark = [pytest.mark.device("native"), missing]

SHAPE = (1, 2, 1, 140, 301, 24, 16)  # several tiles in both directions, none of them full


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with attention_emulated.emulating(8):
        yield


@pytest.fixture(params=[8, 9] if devices.DEVICE == "cpu" else [0], ids={0: "device", 8: "portable", 9: "hopper"}.get)
def machine(request: pytest.FixtureRequest) -> None:
    """The emulated GPU's major compute capability: 9 takes the kernels for Hopper, for calls of the plain class."""
    settings.major = request.param


either = pytest.mark.usefixtures("machine")


@either
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_does_not_spoil_gradients(offset: str, causal: bool, dtype: torch.dtype) -> None:
    assert_as_good_as(math_path, lambda: drawn(SHAPE, dtype, OFFSETS[offset]), {"causal": causal}, "emulated")


def check(shape: tuple[int, ...], dtype: torch.dtype, values: float, options: str | dict[str, Any]) -> None:
    of: Any = functools.partial(features, options) if isinstance(options, str) else options
    assert_as_good_as(in_own_dtype, lambda: drawn(shape, dtype, (0, 100, values)), of, "emulated")


@either
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("values", [0, 20])
@pytest.mark.parametrize("feature", ["window", "sinks", "lengths"])
def test_an_offset_does_not_spoil_them_under_limits(feature: str, values: int, dtype: torch.dtype) -> None:
    check((2, *SHAPE[1:]), dtype, values, feature)


@either
@pytest.mark.parametrize("values", [0, 20])
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_an_offset_does_not_spoil_them_in_any_kind_of_heads(dim: int, values: int) -> None:
    check((1, 1, 1, 140, 140, dim, min(dim, 128) if dim < 256 else 256), torch.bfloat16, values, {"causal": True})


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("values", [0, 20])
@pytest.mark.parametrize("feature", ["mask", "bias", "softcap", "alibi", "dropout", "everything"])
def test_an_offset_does_not_spoil_them_where_single_pairs_count(feature: str, values: int, dtype: torch.dtype) -> None:
    check((1, 2, 1, 70, 131, 24, 17), dtype, values, feature)


def test_an_offset_does_not_spoil_them_where_a_mask_hides_whole_tiles() -> None:
    mask = torch.arange(301) < 100
    check(SHAPE, torch.bfloat16, 0, {"mask": mask.expand(1, 1, 1, 301)})
    check(SHAPE, torch.bfloat16, 0, {"mask": ~mask.expand(1, 1, 1, 301), "causal": True})


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("level", [-65504.0, -1e9])
def test_a_row_of_finite_masking_biases_has_the_gradient_of_its_softmax(level: float, dtype: torch.dtype) -> None:
    """The row's lse is too large to hold the logarithm of the number of keys."""
    q, k, v = drawn((1, 2, 1, 70, 131, 24, 17), dtype)
    bias = torch.zeros(1, 1, q.shape[2], k.shape[2])
    bias[:, :, ::3] = level
    options = {"scale": 0.2, "bias": bias}
    d_o = torch.randn(*q.shape[:-1], v.shape[-1]).to(dtype)
    *_, truth = gradients(in_own_dtype, q, k, v, options, None, d_o, None)
    ours = operator_gradients(q, k, v, options, d_o, "emulated")
    for name, got, true in zip(("dq", "dk", "dv", "dbias"), ours, truth, strict=True):
        tolerance = max(1e-5 if level < -1e6 else 1e-2, 4 * torch.finfo(dtype).eps)
        assert (got - true).abs().max() <= tolerance * true.abs().max(), name

"""The Triton attention's gradients where rounding is amplified, interpreted: see test_attention_accuracy.py."""

from __future__ import annotations

import functools

import pytest
import torch
from attention_operators import assert_as_good_as, gradients, in_own_dtype, math_path, operator_gradients
from test_attention_accuracy import OFFSETS, SIXTEEN, drawn, features, with_large_scores
from triton_support import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")]

SHAPE = (1, 2, 1, 35, 70, 24, 17)  # several tiles in both directions, none of them full


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_large_scores_do_not_spoil_gradients(causal: bool) -> None:
    # The interpreter's products are numpy's, and on a chip with 8 lanes less near the truth than the peer's, which are
    # torch's. Large scores multiply that.
    draw = functools.partial(with_large_scores, SHAPE, torch.float32)
    assert_as_good_as(math_path, draw, {"causal": causal}, "triton", times=3)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_does_not_spoil_gradients(offset: str, causal: bool, dtype: torch.dtype) -> None:
    assert_as_good_as(math_path, lambda: drawn(SHAPE, dtype, OFFSETS[offset]), {"causal": causal}, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("values", [0, 20])
@pytest.mark.parametrize("feature", ["window", "mask", "bias", "softcap", "sinks", "dropout", "everything"])
def test_an_offset_does_not_spoil_them_under_any_option(feature: str, values: int, dtype: torch.dtype) -> None:
    options = functools.partial(features, feature)
    assert_as_good_as(in_own_dtype, lambda: drawn(SHAPE, dtype, (0, 100, values)), options, "triton")


def test_an_offset_does_not_spoil_them_where_a_mask_hides_whole_tiles() -> None:
    def draw() -> list[torch.Tensor]:
        return drawn((1, 2, 1, 35, 300, 24, 17), torch.bfloat16, (0, 100, 0))

    mask = (torch.arange(300) < 100).expand(1, 1, 1, 300)
    assert_as_good_as(in_own_dtype, draw, {"mask": mask}, "triton")
    assert_as_good_as(in_own_dtype, draw, {"mask": ~mask, "causal": True}, "triton")


def test_a_row_of_finite_masking_biases_has_the_gradient_of_its_softmax() -> None:
    """The row's lse is too large to hold the logarithm of the number of keys."""
    q, k, v = drawn(SHAPE, torch.float32)
    bias = torch.zeros(1, 1, q.shape[2], k.shape[2])
    bias[:, :, ::3] = -1e9
    options = {"scale": 0.2, "bias": bias}
    d_o = torch.randn(*q.shape[:-1], v.shape[-1])
    *_, truth = gradients(in_own_dtype, q, k, v, options, None, d_o, None)
    for got, true in zip(operator_gradients(q, k, v, options, d_o, "triton"), truth, strict=True):
        assert (got - true).abs().max() <= 1e-5 * true.abs().max()

"""The Triton attention's gradients where rounding is amplified, interpreted: see test_attention_accuracy.py.

Not held: dq in 16 bits where keys or values have an offset. Its kernel sums ds with the delta of a rounded o.
"""

from __future__ import annotations

import pytest
import torch
from attention_operators import assert_as_good_as, gradients, in_own_dtype, math_path, operator_gradients
from test_attention_accuracy import OFFSETS, drawn, features
from triton_support import needs_interpreter

pytestmark = [needs_interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")]

SHAPE = (1, 2, 1, 35, 70, 24, 17)  # several tiles in both directions, none of them full


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_large_scores_do_not_spoil_gradients(causal: bool) -> None:
    q, k, v = (x.sigmoid() * 18 - 9 for x in drawn((*SHAPE[:5], 8, 8), torch.float32))
    assert_as_good_as(math_path, q, k, v, {"causal": causal}, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", OFFSETS)
def test_an_offset_does_not_spoil_gradients_of_keys_and_values(offset: str, dtype: torch.dtype) -> None:
    assert_as_good_as(math_path, *drawn(SHAPE, dtype, OFFSETS[offset]), {}, "triton", but="dq")


@pytest.mark.parametrize("feature", ["window", "bias", "softcap", "sinks", "dropout", "everything"])
def test_an_offset_does_not_spoil_them_under_any_option(feature: str) -> None:
    q, k, v = drawn(SHAPE, torch.float16, (0, 20, 20))
    assert_as_good_as(in_own_dtype, q, k, v, features(feature, q, k), "triton", but="dq")


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

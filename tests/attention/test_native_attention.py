"""The native attention on the CPU against the reference: features, dtypes, instruction sets, odd shapes and strides."""

from __future__ import annotations

import math
import random
import zlib

import pytest
import torch
from attention_operators import (
    FEATURES,
    PLAIN,
    Options,
    arguments,
    assert_past_a_length_is_never_read,
    assert_right,
    backward,
    dense,
    draw,
    feature,
    forward,
    packed,
)
from support import DTYPES, needs_native

from fastseq.attn.random import keep_mask
from fastseq.attn.reference import attention as reference

pytestmark = needs_native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_alone(name: str, dtype: torch.dtype, isa: str) -> None:
    assert_right(*dense(dtype=dtype), feature(name, dtype))


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_with_few_queries(name: str, isa: str) -> None:
    shape = (2, 6, 2, 3, 301, 33, 40)
    for dtype in (torch.float32, torch.bfloat16):
        assert_right(*dense(shape, dtype), feature(name, dtype, shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(dtype: torch.dtype, isa: str) -> None:
    q, k, v, cu = packed([1, 0, 70, 33], [65, 7, 129, 0], dtype, spare=2)
    for more in ({}, {"causal": True}, {"window_left": 5, "bottom_right": False}, {"sinks": torch.randn(4)}):
        assert_right(q, k, v, {**cu, **more})
    assert_right(q, k, v, {**cu, "causal": True, "prefix_lengths": torch.tensor([3, 7, 100, 0])}, with_dlse=True)
    q, k, v, cu = packed([1, 3, 2], [300, 1, 40], dtype)
    assert_right(q, k, v, {**cu, "causal": True, "dropout_p": 0.2, "seed": torch.tensor([5])})


@pytest.mark.parametrize("length", [1, 2, 8, 9, 33, 64, 65, 257])
def test_odd_shapes(length: int, isa: str) -> None:
    for dim, dim_v, keys in [(1, 1, length), (7, 3, 129), (17, 65, 1), (64, 64, 300), (33, 16, length + 1)]:
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(*dense((1, 2, 1, length, keys, dim, dim_v), dtype), {"scale": dim**-0.5, "causal": True})


@pytest.mark.parametrize("dim", [127, 256, 512])
def test_wide_heads(dim: int, isa: str) -> None:
    for dtype in DTYPES:
        for queries in (2, 70):
            assert_right(*dense((1, 2, 2, queries, 150, dim, dim), dtype), {"scale": dim**-0.5})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_together(dtype: torch.dtype, isa: str) -> None:
    for case in range(15):
        rng = random.Random(zlib.crc32(f"{case} {dtype}".encode()))
        torch.manual_seed(case)
        torch.set_num_threads(rng.choice([1, 2, 3]))
        q, k, v, options = draw(rng, dtype)
        assert_right(q, k, v, options, with_dlse=case % 3 == 0)


def test_any_number_of_threads(threads: int) -> None:
    for shape in [(1, 1, 1, 130, 700, 16, 16), (1, 4, 2, 3, 5000, 16, 16), (3, 2, 1, 65, 65, 24, 17)]:
        for dtype in (torch.float32, torch.bfloat16):
            assert_right(*dense(shape, dtype), feature("sinks in float32", dtype, shape))


def test_the_number_of_threads_changes_no_bit_of_the_forward() -> None:
    q, k, v = dense((2, 4, 2, 200, 515, 64, 64))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward(q, k, v, {"causal": True}))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("far", "growing"), [(0, [0, 3, 6, 9, 30]), (1, [0, 28, 32, 36, 36]), (-1, [-60, -40, -36, -32, -32])]
)
def test_scores_that_grow_from_block_to_block(far: int, growing: list[int], dtype: torch.dtype, isa: str) -> None:
    """By less and by more than a kernel may leave unscaled, also across the size from which it subtracts scores before
    it scales them, 2^20 ln 2 = 726817. Every dtype has these numbers and their products."""
    q = torch.tensor([1024, 1024, 1], dtype=dtype).repeat(1, 1, 40, 1)
    k = torch.tensor([704 * far, 5.75 * far, 0], dtype=dtype).repeat(1, 1, 1280, 1)
    k[..., 2] = torch.tensor(growing).repeat_interleave(256)
    v = torch.randn(1, 1, 1280, 8).to(dtype)
    o, lse = forward(q, k, v, {"scale": 1.0})
    scores = q.double() @ k.double().mT
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-5)
    # Far away a float32 holds a score to 1 / 32, which is 3% of a weight: here of the mean of 256 values.
    limit = 2e-3 if far else 0.0
    want = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(o.double(), want, rtol=1e-5, atol=limit + 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("queries", [3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hidden_key_has_no_influence_at_all(dtype: torch.dtype, queries: int, isa: str) -> None:
    shape = (2, 2, 1, queries, 150, 24, 24)
    q, k, v = dense(shape, dtype)
    hidden = torch.rand(2, 1, 1, 150) < 0.4
    huge = 3e4 if dtype == torch.float16 else 1e30
    d_o = torch.randn(2, 2, queries, 24).to(dtype)
    results = []
    for junk in (0.0, huge, -huge):
        k, v = (x.masked_fill(hidden.transpose(2, 3), junk) for x in (k, v))
        o, lse = forward(q, k, v, {"mask": ~hidden, "softcap": 3.0})
        results.append((o, lse, *backward(d_o, None, q, k, v, o, lse, {"mask": ~hidden, "softcap": 3.0})[:3]))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("queries", [2, 40])
def test_what_lies_past_a_length_is_never_read(queries: int, isa: str) -> None:
    for dtype in DTYPES:
        assert_past_a_length_is_never_read(queries, dtype)


@pytest.mark.parametrize("queries", [2, 40])
def test_a_row_that_sees_nothing_is_zero(queries: int, isa: str) -> None:
    nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    for dtype in DTYPES:
        q, k, v = dense((1, 2, 2, queries, 70, 16, 16), dtype)
        d_o = torch.randn(1, 2, queries, 16).to(dtype)
        o, lse = forward(q, k, v, {"mask": nothing})
        assert not o.any()
        assert (lse == -math.inf).all()
        assert not any(x.any() for x in backward(d_o, torch.ones_like(lse), q, k, v, o, lse, {"mask": nothing})[:3])
        sinks = torch.tensor([0.5, -3.0])
        o, lse = forward(q, k, v, {"mask": nothing, "sinks": sinks})
        assert not o.any()
        torch.testing.assert_close(lse, sinks[None, :, None].expand(1, 2, queries).to(lse.dtype))
        grads = backward(d_o, torch.ones_like(lse), q, k, v, o, lse, {"mask": nothing, "sinks": sinks})
        assert not any(x.any() for x in grads[:3])
        torch.testing.assert_close(grads[4], torch.full((2,), float(queries)))


@pytest.mark.parametrize("queries", [2, 40])
def test_nan_in_a_query_stays_in_its_row(queries: int, isa: str) -> None:
    for dtype in DTYPES:
        q, k, v = dense((1, 2, 2, queries, 70, 16, 16), dtype)
        clean = forward(q, k, v, {})
        q[0, 1, 1, 3] = math.nan
        for got, before in zip(forward(q, k, v, {}), clean, strict=True):
            assert got[0, 1, 1].isnan().all()
            got[0, 1, 1] = before[0, 1, 1]
            assert torch.equal(got, before)


@pytest.mark.parametrize("queries", [2, 40])
def test_dropout_keeps_what_the_reference_keeps_and_leaves_lse(queries: int, isa: str) -> None:
    q, k, _ = dense((2, 3, 1, queries, 150, 16, 16), torch.float64)
    v = torch.eye(150, dtype=torch.float64).expand(2, 1, 150, 150)  # o is the weights
    options: Options = {"dropout_p": 0.4, "seed": torch.tensor([-7])}
    o, lse = forward(q, k, v, options)
    b, h, i, j = (torch.arange(n) for n in o.shape)
    kept = keep_mask(options["seed"], 0.4, b[:, None, None, None], h[:, None, None], i[:, None], j)
    assert torch.equal(o != 0, kept)
    assert torch.equal(lse, forward(q, k, v, {})[1])
    assert not forward(q, k, v, {**options, "dropout_p": 1.0})[0].any()


@pytest.mark.parametrize("queries", [1, 2, 40])
@pytest.mark.parametrize("side", [2**40 + 1, 2**62, 2**63 - 1])
def test_a_window_of_any_size_is_no_limit(side: int, queries: int, isa: str) -> None:
    q, k, v = dense((1, 2, 2, queries, 70, 16, 16))
    for other in (-1, 3, side):
        for causal in (False, True):
            for sides in ((side, other), (other, side)):
                left, right = (-1 if n == side else n for n in sides)
                options = {"causal": causal, "bottom_right": queries != 2}
                given = {**options, "window_left": sides[0], "window_right": sides[1]}
                same = {**options, "window_left": left, "window_right": right}
                o, lse = forward(q, k, v, given)
                assert all(torch.equal(a, b) for a, b in zip((o, lse), forward(q, k, v, same), strict=True))
                assert_right(q, k, v, given, repeat=False)


def test_empty_inputs() -> None:
    for shape in [(0, 2, 1, 5, 7, 8, 8), (2, 2, 1, 0, 7, 8, 8), (2, 2, 1, 5, 0, 8, 8), (2, 2, 1, 50, 0, 8, 8)]:
        q, k, v = dense(shape)
        o, lse = forward(q, k, v, {})
        assert not o.any()
        assert (lse == -math.inf).all()
        grads = backward(torch.ones_like(o), None, q, k, v, o, lse, {})
        assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
        assert not any(g.any() for g in grads)


def test_a_gradient_of_stride_zero() -> None:
    q, k, v = (x.double().requires_grad_() for x in dense())
    o, lse = forward(q.detach(), k.detach(), v.detach(), {})
    grads = backward(torch.ones((), dtype=o.dtype).expand_as(o), None, q, k, v, o, lse, {})
    true_o, _ = reference(q, k, v, **PLAIN)
    for got, truth in zip(grads, torch.autograd.grad(true_o.sum(), (q, k, v)), strict=False):
        torch.testing.assert_close(got, truth)


def test_wrong_arguments_are_refused_before_they_do_harm() -> None:
    q, k, v = dense()
    for wrong in (
        {"lengths_k": torch.tensor([3, 66])},
        {"lengths_q": torch.tensor([1])},
        {"mask": torch.ones(1, 1, 33, 64, dtype=torch.bool)},
        {"bias": torch.randn(1, 1, 33, 65, dtype=torch.float64)},
        {"sinks": torch.randn(3)},
        {"dropout_p": 0.5},
    ):
        with pytest.raises(RuntimeError, match=next(iter(wrong)).split("_")[0]):
            forward(q, k, v, wrong)
    with pytest.raises(RuntimeError, match="k and v"):
        forward(q, k, v[:, :, 1:], {})
    q, k, v, cu = packed([3, 4], [5, 6], torch.float32)
    for offsets in ([0, 3, 8], [0, 5, 4], [1, 3, 7]):
        with pytest.raises(RuntimeError, match="cu_seqlens_q"):
            forward(q, k, v, {**cu, "cu_seqlens_q": torch.tensor(offsets, dtype=torch.int32)})
    for dense_only in ({"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, {"bias": torch.zeros(1, 1, 1, 1)}):
        with pytest.raises(RuntimeError, match="padded layout"):
            forward(q, k, v, {**cu, **dense_only})
    empty = torch.tensor([], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens_q is empty"):
        forward(q, k, v, {"cu_seqlens_q": empty, "cu_seqlens_k": empty})


def test_the_operators_pass_opcheck() -> None:
    utilities = ("test_schema", "test_faketensor")
    for options in (feature("sinks", torch.float32), feature("bias", torch.float32)):
        q, k, v = dense()
        torch.library.opcheck(
            torch.ops.fastseq.attention_forward.native, (q, k, v, *arguments(options)), test_utils=utilities
        )
        o, lse = forward(q, k, v, options)
        rest = (*arguments(options), options.get("bias") is not None)
        torch.library.opcheck(
            torch.ops.fastseq.attention_backward.native,
            (torch.randn_like(o), None, q, k, v, o, lse, *rest),
            test_utils=utilities,
        )

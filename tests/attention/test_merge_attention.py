"""Attention over parts of the keys, merged: the same as attention over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import vmap

import fastseq
from fastseq import ArgumentError, merge_attention


def inputs(batch=2, heads=4, kv_heads=2, queries=6, keys=9, dtype=torch.float64):
    q = torch.randn(batch, heads, queries, 5, dtype=dtype, requires_grad=True)
    k = torch.randn(batch, kv_heads, keys, 5, dtype=dtype, requires_grad=True)
    v = torch.randn(batch, kv_heads, keys, 3, dtype=dtype, requires_grad=True)
    return q, k, v


def in_parts(q, k, v, cuts, mask=None, sinks=None, **options):
    """Keys cut at ``cuts``, the sinks in the last part, merged."""
    bounds = list(zip((0, *cuts), (*cuts, k.shape[2]), strict=True))
    parts = []
    for n, (a, b) in enumerate(bounds):
        own = sinks if n == len(bounds) - 1 else None
        seen = None if mask is None else mask[..., a:b]
        parts.append(fastseq.attention(q, k[:, :, a:b], v[:, :, a:b], mask=seen, sinks=own, return_lse=True, **options))
    return merge_attention(*map(list, zip(*parts, strict=True)))


def gradients(results, tensors):
    """Through o and lse at once; rows without any key have no lse to follow."""
    o, lse = results
    weights = torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)
    seen = torch.where(torch.isfinite(lse), lse, 0.0)
    return torch.autograd.grad((o * weights).sum() + (seen * weights[..., 0]).sum(), tensors, create_graph=True)


def causal(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("cuts", [(4,), (1, 2, 8), (0, 5), ()], ids=["two", "four", "empty", "one"])
@pytest.mark.parametrize("limit", ["none", "causal", "some rows see nothing"])
def test_parts_of_the_keys_merge_into_attention_over_all(limit, cuts, with_sinks):
    q, k, v = inputs()
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    mask = None
    if limit != "none":
        mask = causal(6, 9)
    if limit == "some rows see nothing":
        mask = mask.clone()
        mask[2], mask[4, :4] = False, False
    tensors = [q, k, v, *[sinks] * with_sinks]
    whole = fastseq.attention(q, k, v, mask=mask, sinks=sinks, return_lse=True)
    merged = in_parts(q, k, v, cuts, mask, sinks)
    torch.testing.assert_close(merged, whole)
    ours, theirs = gradients(merged, tensors), gradients(whole, tensors)
    torch.testing.assert_close(ours, theirs)
    again = [torch.autograd.grad(sum(g.square().sum() for g in found), tensors) for found in (ours, theirs)]
    torch.testing.assert_close(*again)


def test_a_block_of_queries_under_a_causal_limit_sees_the_block_before_it_whole():
    """What context parallelism does: no mask is needed."""
    q, k, v = inputs(queries=8, keys=8)
    early, late = slice(0, 4), slice(4, 8)
    before = fastseq.attention(q[:, :, late], k[:, :, early], v[:, :, early], return_lse=True)
    own = fastseq.attention(q[:, :, late], k[:, :, late], v[:, :, late], causal=True, return_lse=True)
    merged = merge_attention(*zip(before, own, strict=True))
    whole = fastseq.attention(q, k, v, causal=True, return_lse=True)
    torch.testing.assert_close(merged, tuple(x[:, :, late] for x in whole))


@pytest.mark.parametrize("kind", ["grad", "gradgrad", "forward"])
def test_gradients_of_any_order_hold_where_parts_saw_nothing(kind):
    outputs = [torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64) for _ in range(3)]
    lses[0][0, 0, 0] = lses[1][0, 1] = -math.inf
    for lse in lses:
        lse[0, 0, 2] = -math.inf
    finite = [torch.isfinite(lse) for lse in lses]
    values = [torch.where(f, lse, 0.0).requires_grad_() for f, lse in zip(finite, lses, strict=True)]

    def function(*tensors):
        given = [torch.where(f, t, -math.inf) for f, t in zip(finite, tensors[3:], strict=True)]
        o, lse = merge_attention(tensors[:3], given)
        return o, torch.where(torch.isfinite(lse), lse, 0.0)

    if kind == "gradgrad":
        assert torch.autograd.gradgradcheck(function, (*outputs, *values))
    else:
        assert torch.autograd.gradcheck(function, (*outputs, *values), check_forward_ad=kind == "forward")


def test_a_part_that_saw_nothing_counts_for_nothing_whatever_its_o_holds():
    o = [torch.full((1, 1, 2, 3), math.nan, requires_grad=True), torch.ones(1, 1, 2, 3, requires_grad=True)]
    lse = [torch.full((1, 1, 2), -math.inf, requires_grad=True), torch.tensor([[[0.5, -math.inf]]], requires_grad=True)]
    merged, total = merge_attention(o, lse)
    assert merged.tolist() == [[[[1.0] * 3, [0.0] * 3]]]
    assert total.tolist() == [[[0.5, -math.inf]]]
    (merged.sum() + total[..., 0].sum()).backward()
    for x in (*o, *lse):
        assert torch.isfinite(x.grad).all()
    assert lse[1].grad.tolist() == [[[1.0, 0.0]]]


@settings(deadline=None, max_examples=30)
@given(
    parts=st.integers(1, 5), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    wide=st.booleans(), seed=st.integers(0, 2**31), unseen=st.sampled_from([0.0, 0.3, 0.9]), packed=st.booleans(),
)  # fmt: skip
def test_drawn_parts_merge_as_in_float64(parts, dtype, wide, seed, unseen, packed):
    torch.manual_seed(seed)
    shape = (7, 3, 4) if packed else (2, 3, 7, 4)
    rows = (3, 7) if packed else (2, 3, 7)
    outputs = [torch.randn(shape).to(dtype) for _ in range(parts)]
    lses = [torch.randn(rows, dtype=torch.float64 if wide else torch.float32) * 50 for _ in range(parts)]
    lses = [x.masked_fill(torch.rand(rows) < unseen, -math.inf) for x in lses]
    o, lse = merge_attention(outputs, lses)
    assert (o.dtype, lse.dtype) == (dtype, lses[0].dtype)
    stacked = torch.stack(lses).double()
    weights = torch.softmax(stacked, 0).nan_to_num(0.0)
    weights = (weights.transpose(1, 2) if packed else weights).unsqueeze(-1)
    torch.testing.assert_close(o.double(), (torch.stack(outputs).double() * weights).sum(0), **tolerance(dtype))
    torch.testing.assert_close(lse.double(), stacked.logsumexp(0), atol=1e-5, rtol=1e-6)


def tolerance(dtype):
    digits = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    return {"atol": 2 * digits, "rtol": digits}


def test_packed_parts_merge():
    q, k, v = (torch.randn(7, 2, 4) for _ in range(3))
    starts = torch.tensor([0, 3, 7], dtype=torch.int32)
    at = torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5, 6])
    counts = torch.tensor([0, 2, 4], dtype=torch.int32), torch.tensor([0, 1, 3], dtype=torch.int32)
    parts = [
        fastseq.attention(q, k[i], v[i], cu_seqlens_q=starts, cu_seqlens_k=n, return_lse=True)
        for i, n in zip(at, counts, strict=True)
    ]
    whole = fastseq.attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True)
    torch.testing.assert_close(merge_attention(*zip(*parts, strict=True)), whole)


def test_o_lies_in_memory_as_the_first_part():
    parts = [torch.randn(2, 7, 4, 5).transpose(1, 2) for _ in range(2)]
    o, _ = merge_attention(parts, [torch.randn(2, 4, 7)] * 2)
    assert o.stride() == parts[0].stride()
    o.transpose(1, 2).view(2, 7, 20)


def test_it_compiles_whole_and_maps():
    parts, lses = [torch.randn(3, 2, 4, 5, 6) for _ in range(2)], [torch.randn(3, 2, 4, 5) for _ in range(2)]
    mapped = vmap(lambda a, b, c, d: merge_attention([a, b], [c, d]))(*parts, *lses)
    singly = [merge_attention([x[n] for x in parts], [x[n] for x in lses]) for n in range(3)]
    torch.testing.assert_close(mapped, tuple(torch.stack(x) for x in zip(*singly, strict=True)))
    compiled = torch.compile(merge_attention, fullgraph=True, backend="aot_eager")
    given = [x[0].requires_grad_() for x in parts]
    ours, theirs = (f(given, [x[0] for x in lses]) for f in (compiled, merge_attention))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), given) for o, _ in (ours, theirs)))


O, LSE = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        (O, LSE, TypeError, "outputs must be a list of Tensors, one a part, got Tensor"),
        ([O], [None], TypeError, r"lses\[0\] must be a Tensor, got NoneType"),
        ([], [], ArgumentError, "one entry a part, at least one, got 0 and 0"),
        ([O, O], [LSE], ArgumentError, "got 2 and 1"),
        ([O[0, 0]], [LSE[0, 0]], ArgumentError, r"must be \[B,H,T,D\], or packed \[total,H,D\], got \[4, 5\]"),
        ([O.int()], [LSE], ArgumentError, r"outputs\[0\] must be float64, .* got torch.int32"),
        ([O, O[:, :, :2]], [LSE, LSE], ArgumentError, r"outputs\[1\], \[2, 3, 2, 5\]"),
        ([O, O.half()], [LSE, LSE], ArgumentError, r"outputs\[1\].*float16"),
        ([O, O], [LSE, LSE[..., :1]], ArgumentError, r"lses\[1\] must be \[B,H,T\] = \[2, 3, 4\]"),
        ([O[0]], [LSE[0]], ArgumentError, r"lses\[0\] must be \[H,total\] = \[4, 3\]"),
        ([O], [LSE.half()], ArgumentError, r"lses\[0\] must be float32 or float64, got torch.float16"),
    ],
)
def test_what_does_not_fit_is_told(outputs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_attention(outputs, lses)

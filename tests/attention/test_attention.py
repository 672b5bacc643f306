"""Attention over every backend: values and gradients within torch's own error, and what MATH.md promises."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_support import FEATURES, TORCH_LACKS, calls, options_of, peer
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from support import BACKENDS, DTYPES, NATIVE, assert_within_budget, needs_native
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import fastseq
from fastseq import BackendError, attention, scaled_dot_product_attention, use_backend
from fastseq.attn.reference import attention as reference

OPERATORS = ["reference", NATIVE]


def qkv(batch=2, heads=4, kv_heads=2, queries=17, keys=33, features=16, values=16, dtype=torch.float64):
    shapes = (batch, heads, queries, features), (batch, kv_heads, keys, features), (batch, kv_heads, keys, values)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def run(backend, inputs, options, *, lse=False):
    """o, lse where asked for, and the gradient of a fixed random projection of them in every floating input."""
    floating = {n: x for n, x in options.items() if n in ("bias", "sinks")}
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *floating.values())]
    options = {**options, **dict(zip(floating, leaves[3:], strict=True))}
    if backend == "peer":
        out = peer(*leaves[:3], **options)
    else:
        with use_backend(backend):
            out = attention(*leaves[:3], **options, return_lse=lse)
    out = out[: 1 + lse] if isinstance(out, tuple) else (out,)
    weigh = torch.Generator().manual_seed(1)
    total = sum(
        (x.masked_fill(x == -math.inf, 0) * torch.randn(x.shape, generator=weigh, dtype=torch.float64)).sum()
        for x in out
    )
    return [*out, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_within_twice_that_of_the_formula_in_the_same_dtype(backend, feature, dtype):
    inputs = qkv(queries=33, keys=65, features=17, values=7, dtype=dtype)
    options = options_of(feature, *inputs[:2])
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].to(dtype)
    lse = backend != "torch"
    if backend == "torch" and feature in TORCH_LACKS:
        with pytest.raises(BackendError, match="cannot run this attention: torch's attention has no"):
            run(backend, inputs, options)
        return
    wide = {n: x.double() if n in ("bias", "sinks") else x for n, x in options.items()}
    truth = run("reference", [x.double() for x in inputs], wide, lse=lse)
    ours, theirs = run(backend, inputs, options, lse=lse), run("peer", inputs, options, lse=lse)
    names = ["o", "lse"] if lse else ["o"]
    names += ["dq", "dk", "dv", *("d" + n for n in ("bias", "sinks") if n in options)]
    for name, got, other, true in zip(names, ours, theirs, truth, strict=True):
        if name == "lse":
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            blind = true == -math.inf
            assert torch.equal(got == -math.inf, blind)
            got, other, true = (x.masked_fill(blind, 0) for x in (got, other, true))
        # A sink's gradient is a sum over the batch and all queries, in which most cancels.
        assert_within_budget(got, other, true, name, floor_ulps=32 if name == "dsinks" else 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("queries", "keys", "features", "values"),
    [(1, 1, 1, 1), (1, 129, 64, 64), (3, 1000, 33, 17), (7, 7, 129, 3), (129, 65, 64, 128), (17, 33, 512, 512),
     (8, 257, 16, 24), (9, 200, 8, 40), (65, 64, 40, 40)],
)  # fmt: skip
def test_odd_shapes(backend, queries, keys, features, values):
    inputs = qkv(2, 6, 2, queries, keys, features, values, torch.float32)
    for options in ({}, {"causal": True}):
        truth = run("reference", [x.double() for x in inputs], options)
        # torch's own kernel sums in as many lanes as the chip has: with 8, sums of 512 products are not as near.
        floor = 8 if backend == "torch" else 4
        for got, other, true in zip(run(backend, inputs, options), run("peer", inputs, options), truth, strict=True):
            assert_within_budget(got, other, true, floor_ulps=floor)


@needs_native
@given(calls())
@hypothesis_settings(max_examples=100)
def test_native_is_the_reference_for_drawn_shapes_and_features(call):
    q, k, v, options = call
    window = (options.pop("window_left"), options.pop("window_right"))
    align = "bottom_right" if options.pop("bottom_right") else "top_left"
    options = {**options, "window": window, "align": align}
    with_lse = {"lse": True}
    for got, want in zip(
        run("native", (q, k, v), options, **with_lse), run("reference", (q, k, v), options, **with_lse), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@given(calls())
@hypothesis_settings(max_examples=60)
def test_torch_is_the_reference_where_it_can_express_the_call(call):
    q, k, v, options = call
    window = (options.pop("window_left"), options.pop("window_right"))
    align = "bottom_right" if options.pop("bottom_right") else "top_left"
    options = {**options, "window": window, "align": align, "softcap": 0.0}
    options.pop("sinks", None)
    for got, want in zip(run("torch", (q, k, v), options), run("reference", (q, k, v), options), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # its slopes are float32


# What MATH.md promises.


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_the_sequence_permutes_the_output_and_the_gradient(backend):
    x = torch.randn(2, 2, 37, 8, dtype=torch.float64)
    order = torch.randperm(37)
    o, *grads = run(backend, (x, x, x), {})
    weigh = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = x[:, :, order].requires_grad_()
    with use_backend(backend):
        permuted = attention(leaf, leaf, leaf)
    torch.testing.assert_close(permuted, o[:, :, order])
    (grad,) = torch.autograd.grad((permuted * weigh[:, :, order]).sum(), leaf)
    torch.testing.assert_close(grad, sum(grads)[:, :, order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_reaches_any_distance_at_equal_strength(backend):
    length = 2000
    q, k = torch.zeros(1, 1, length, 4, dtype=torch.float64), torch.randn(1, 1, length, 4, dtype=torch.float64)
    v = torch.randn(1, 1, length, 3, dtype=torch.float64, requires_grad=True)
    with use_backend(backend):
        o = attention(q, k, v)
    (dv,) = torch.autograd.grad(o[0, 0, -1].sum(), v)
    torch.testing.assert_close(dv, torch.full_like(dv, 1 / length))


HIDING = ["mask", "bias", "causal", "window", "lengths"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", HIDING)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_key_has_no_influence_at_all(backend, way, dtype):
    q, k, v = qkv(queries=30, keys=30, dtype=dtype)
    hidden = torch.zeros(30, dtype=torch.bool)
    hidden[20:] = True
    options = {
        "mask": {"mask": ~hidden},
        "bias": {"bias": torch.zeros(30).masked_fill(hidden, -math.inf)},
        "causal": {"causal": True, "align": "top_left"},
        "window": {"window": (-1, 0), "align": "top_left"},
        "lengths": {"lengths_k": torch.tensor([20, 20])},
    }[way]
    q = q[:, :, :20]  # causal and window: of the first 20 queries
    changed = [q, k.clone(), v.clone()]
    changed[1][:, :, 20:] = 1e4 * torch.randn_like(k[:, :, 20:])
    changed[2][:, :, 20:] = 1e4 * torch.randn_like(v[:, :, 20:])
    for before, after in zip(run(backend, (q, k, v), options), run(backend, changed, options), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("backend", OPERATORS)
def test_padding_may_be_nan(backend):
    q, k, v = qkv()
    lengths_q, lengths_k = torch.tensor([17, 5]), torch.tensor([9, 33])
    options = {"lengths_q": lengths_q, "lengths_k": lengths_k, "causal": True}
    clean = run(backend, (q, k, v), options)
    q[1, :, 5:], k[0, :, 9:], v[0, :, 9:] = math.nan, math.nan, math.nan
    for before, after in zip(clean, run(backend, (q, k, v), options), strict=True):
        assert torch.equal(before, after)
    assert torch.equal(clean[0][1, :, 5:], torch.zeros_like(q[1, :, 5:]))


@needs_native
def test_memory_grows_with_the_length_and_not_with_its_square():
    program = """
import resource, torch, fastseq
x = torch.randn(1, 1, 12000, 8, requires_grad=True)
keys = torch.rand(1, 1, 1, 12000) < 0.9
with fastseq.use_backend("native"):
    small = fastseq.attention(x[:, :, :64], x[:, :, :64], x[:, :, :64]).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fastseq.attention(x, x, x, mask=keys, causal=True, softcap=5.0).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, "MB; the matrix of scores would be 576"


# Rows, chance and order.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_that_sees_nothing_is_zero_with_finite_gradients(backend, dtype):
    inputs = qkv(dtype=dtype)
    blind = torch.ones(2, 1, 17, 33, dtype=torch.bool)
    blind[0, 0, 3], blind[1] = False, False
    for options in (
        {"mask": blind},
        {"bias": torch.zeros(blind.shape).masked_fill(~blind, -math.inf)},
        {"lengths_k": torch.tensor([33, 0])},
        {"mask": torch.zeros(1, dtype=torch.bool)},
    ):
        o, dq, *rest = run(backend, inputs, options)
        assert torch.equal(o[1], torch.zeros_like(o[1]))
        assert torch.equal(dq[1], torch.zeros_like(dq[1]))
        assert all(x.isfinite().all() for x in (o, dq, *rest))


@pytest.mark.parametrize("least", [False, True], ids=["-1e9", "least"])
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_whose_every_key_has_a_finite_masks_bias_is_its_softmax(backend, dtype, queries, least):
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [x.requires_grad_() for x in qkv(queries=queries, keys=300, dtype=dtype)]
    bias = torch.zeros(queries, 300, dtype=wide)
    bias[:, 200:] = bias[0] = torch.finfo(wide).min if least else -1e9
    found, expected = [], []
    for results, name in ((found, backend), (expected, "reference")):
        o = attention(*inputs, bias=bias, backend=name)
        others = torch.autograd.grad(o[:, :, 1:].double().sin().sum(), inputs, retain_graph=True)
        own = torch.autograd.grad(o[:, :, 0].double().sum(), inputs)
        assert all(g.isfinite().all() and g.abs().max() < 300 for g in own)  # lse cannot tell one key from 300
        results += [o, *others]
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_may_be_huge(backend, dtype, queries):
    q, k, v = qkv(queries=queries, keys=300, dtype=dtype)
    q, k = q * 1e9, k * 1e9
    found, expected = (attention(q, k, v, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_one_row_of_the_batch_stays_there(backend):
    inputs = qkv(batch=3, dtype=torch.float32)
    clean = run(backend, inputs, {"causal": True})
    for place in range(3):
        dirty = [x.clone() for x in inputs]
        dirty[place][1, 0, 2, 1] = math.nan
        for before, after in zip(clean, run(backend, dirty, {"causal": True}), strict=True):
            assert torch.equal(before[0], after[0])
            assert torch.equal(before[2], after[2])
        assert run(backend, dirty, {"causal": True})[0][1].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_same_after_the_same_seed(backend):
    inputs = qkv()
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        results.append(run(backend, inputs, {"dropout_p": 0.4}))
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[2][0])


@needs_native
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_native_drops_the_same_weights_as_the_reference(feature):
    inputs = qkv(queries=70, keys=131)
    options = {**options_of(feature, *inputs[:2]), "dropout_p": 0.3}
    results = []
    for backend in ("native", "reference"):
        torch.manual_seed(11)
        results.append(run(backend, inputs, options, lse=True))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(backend):
    inputs = qkv(queries=130, keys=200, dtype=torch.float32)
    options = options_of("bias-and-mask", *inputs[:2])
    options["bias"] = options["bias"].float()
    first = run(backend, inputs, options)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(backend, inputs, options), strict=True))


LIMITS = [(sys.maxsize, 2), (2, sys.maxsize), (sys.maxsize, sys.maxsize), (2**62, 0), (0, 2**63), (2**70, 2**70)]


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", LIMITS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_side_of_a_window_may_be_any_whole_number(backend, window, causal, align):
    """A side as long as any sequence limits nothing, as -1 does."""
    for queries, keys in ((1, 9), (9, 33), (33, 9)):
        inputs = qkv(queries=queries, keys=keys)
        options = {"causal": causal, "align": align}
        same = tuple(-1 if side > 100 else side for side in window)
        for got, want in zip(
            run(backend, inputs, {**options, "window": window}),
            run(backend, inputs, {**options, "window": same}),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
        with torch.no_grad(), use_backend(backend):
            got = attention(*inputs, **options, window=window)
            torch.testing.assert_close(got, attention(*inputs, **options, window=same))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_slopes_of_alibi_keep_the_precision_of_the_call(backend, queries, dtype):
    q, k, v = qkv(queries=queries)
    slopes = torch.rand(4, dtype=torch.float64).to(dtype)
    distance = (torch.arange(queries)[:, None] + 33 - queries - torch.arange(33)).abs()
    bias = -slopes.double()[:, None, None] * distance
    want = run("reference", (q, k, v), {"bias": bias})[:-1]
    for got, true in zip(run(backend, (q, k, v), {"alibi_slopes": slopes}), want, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-13)


# Layouts.


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    q, k, v = qkv()
    want = run(backend, (q, k, v), {"causal": True})
    strange = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((k, k), -1)[..., :16],
        v.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ]
    assert [x.is_contiguous() for x in strange] == [False] * 3
    with use_backend(backend):
        leaves = [x.requires_grad_() for x in strange]
        o = attention(*leaves, causal=True)
    torch.testing.assert_close(o, want[0])
    with use_backend(backend):  # a gradient of stride 0
        for got, true in zip(
            torch.autograd.grad(o.sum(), leaves, retain_graph=True),
            torch.autograd.grad(o, leaves, torch.ones(o.shape, dtype=o.dtype)),
            strict=True,
        ):
            torch.testing.assert_close(got, true)
    shared = torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(2, 4, 17, 16)
    with use_backend(backend):
        torch.testing.assert_close(attention(shared, k, v), attention(shared.contiguous(), k, v))


@pytest.mark.parametrize("backend", OPERATORS)
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_packed_is_the_padded_batch(backend, align):
    lengths_q, lengths_k = torch.tensor([9, 0, 17, 3]), torch.tensor([5, 4, 20, 0])
    cu_q, cu_k = (F.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (lengths_q, lengths_k))
    q, k, v = torch.randn(29, 4, 8).double(), torch.randn(29, 2, 8).double(), torch.randn(29, 2, 6).double()
    padded = [torch.zeros(4, x.shape[1], 20, x.shape[2], dtype=torch.float64) for x in (q, k, v)]
    for b in range(4):
        for x, p, cu in zip((q, k, v), padded, (cu_q, cu_k, cu_k), strict=True):
            p[b, :, : cu[b + 1] - cu[b]] = x[cu[b] : cu[b + 1]].transpose(0, 1)
    common = {
        "causal": True, "align": align, "window": (12, -1), "alibi_slopes": torch.rand(4), "sinks": torch.randn(4),
        "dropout_p": 0.2, "softcap": 4.0, "prefix_lengths": torch.tensor([2, 4, 9, 0]),
    }  # fmt: skip
    results = []
    for inputs, extra in (
        ((q, k, v), {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}),
        (padded, {"lengths_q": lengths_q, "lengths_k": lengths_k}),
    ):
        torch.manual_seed(5)
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_backend(backend):
            o, lse = attention(*leaves, **common, **extra, return_lse=True)
        loss = o.sin().sum() + lse.masked_fill(lse == -math.inf, 0).cos().sum() - (lse == -math.inf).sum() * 0
        loss = loss - (lse == -math.inf).sum()  # cos(0) of rows that are padding in one of the two
        results.append([o, *torch.autograd.grad(loss, leaves)])
    for x, p, cu in zip(*results, (cu_q, cu_q, cu_k, cu_k), strict=True):
        for b in range(4):
            torch.testing.assert_close(x[cu[b] : cu[b + 1]], p[b, :, : cu[b + 1] - cu[b]].transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_and_empty_sequences(backend):
    with use_backend(backend):
        for batch, queries, keys in ((0, 5, 7), (2, 0, 7), (2, 5, 0), (2, 0, 0)):
            leaves = [x.requires_grad_() for x in qkv(batch, queries=queries, keys=keys)]
            o = attention(*leaves, causal=True)
            assert o.shape == (batch, 4, queries, 16)
            assert torch.equal(o, torch.zeros_like(o)) or (queries and keys)
            assert [g.shape for g in torch.autograd.grad(o.sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("backend", OPERATORS)
def test_lse_is_the_denominator_and_has_a_gradient(backend):
    q, k, v = qkv()
    leaves = [x.requires_grad_() for x in (q, k)]
    with use_backend(backend):
        _, lse = attention(*leaves, v, scale=0.5, return_lse=True)
    scores = 0.5 * q @ k.repeat_interleave(2, 1).transpose(-2, -1)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    for got, want in zip(
        torch.autograd.grad(lse.sin().sum(), leaves),
        torch.autograd.grad(scores.logsumexp(-1).sin().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_bias_on_sixteen_bit_inputs(backend):
    inputs = qkv(dtype=torch.bfloat16)
    bias = torch.randn(1, 4, 17, 33)
    got = run(backend, inputs, {"bias": bias})
    truth = run("reference", [x.double() for x in inputs], {"bias": bias.double()})
    assert got[-1].dtype == torch.float32
    for value, true in zip(got, truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=0.05, atol=0.05)


# torch's function.

SHAPES = [
    ([5, 4], [7, 4], [7, 3], [5, 7], {}),
    ([5, 4], [7, 4], [7, 3], [7], {}),
    ([2, 5, 4], [2, 7, 4], [2, 7, 3], [2, 1, 7], {}),
    ([2, 5, 4], [2, 7, 4], [2, 7, 3], None, {"is_causal": True}),
    ([2, 3, 5, 4], [2, 3, 7, 4], [2, 3, 7, 3], [3, 1, 7], {"scale": 0.3}),
    ([2, 6, 5, 4], [2, 3, 7, 4], [2, 3, 7, 3], [6, 5, 7], {"enable_gqa": True}),
    ([2, 6, 5, 4], [2, 1, 7, 4], [2, 1, 7, 3], [2, 1, 5, 1], {}),
    ([2, 6, 5, 4], [7, 4], [2, 1, 7, 3], [6, 5, 7], {}),
    ([1, 1, 5, 4], [2, 6, 7, 4], [2, 6, 7, 3], [2, 1, 1, 7], {}),
    ([3, 2, 6, 5, 4], [3, 2, 6, 7, 4], [3, 2, 6, 7, 3], [2, 1, 1, 7], {}),
    ([3, 2, 6, 5, 4], [3, 2, 6, 7, 4], [3, 2, 6, 7, 3], [3, 1, 1, 1, 7], {}),
    ([3, 2, 6, 5, 4], [3, 1, 2, 7, 4], [3, 1, 2, 7, 3], [1, 1, 1, 5, 7], {"enable_gqa": True}),
    ([2, 3, 0, 4], [2, 3, 7, 4], [2, 3, 7, 3], None, {}),
    ([0, 3, 5, 4], [0, 3, 7, 4], [0, 3, 7, 3], [0, 1, 5, 7], {}),
]


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(("q", "k", "v", "mask", "options"), SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_dot_product_attention_is_torchs(backend, q, k, v, mask, options, kind):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (q, k, v)]
    if mask is not None and kind == "bool":
        mask = torch.rand(mask) < 0.7
        mask[..., 0] = True
    elif mask is not None:
        mask = torch.randn(mask, dtype=torch.float64)
    want = F.scaled_dot_product_attention(*inputs, mask, **options)
    with use_backend(backend):
        got = scaled_dot_product_attention(*inputs, mask, **options)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.sin().sum(), inputs), torch.autograd.grad(want.sin().sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaled_dot_product_attention_takes_torchs_causal_biases(backend):
    inputs = qkv(kv_heads=4, queries=5, keys=8)
    for bias in (causal_upper_left(5, 8), causal_lower_right(5, 8)):
        with use_backend(backend):
            got = scaled_dot_product_attention(*inputs, bias)
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*inputs, bias))


def test_nested_tensors_go_to_torch():
    nested = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    want = F.scaled_dot_product_attention(nested, nested, nested)
    got = scaled_dot_product_attention(nested, nested, nested)
    torch.testing.assert_close(got.to_padded_tensor(0.0), want.to_padded_tensor(0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_honoured(backend):
    inputs = qkv(kv_heads=4, dtype=torch.float32)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        o = scaled_dot_product_attention(*inputs)
        assert o.dtype == F.scaled_dot_product_attention(*inputs).dtype == torch.bfloat16
        assert attention(*(x.double() for x in inputs)).dtype == torch.float64
    truth, _ = reference(*(x.bfloat16() for x in inputs), scale=16**-0.5)
    torch.testing.assert_close(o, truth, rtol=0.02, atol=0.02)


def test_explain_names_the_backend_and_the_reasons():
    q, k, v = qkv()
    text = fastseq.explain(attention, q, k, v, softcap=2.0)
    assert text.startswith("attention on cpu runs on: ")
    assert "torch: torch's attention has no softcap" in text


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_argument_goes_before_the_context(backend):
    q, k, v = qkv()
    with use_backend("triton"), pytest.raises(BackendError, match="triton"):
        attention(q, k, v)
    with use_backend("triton"):
        assert attention(q, k, v, backend=backend).shape == q.shape


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_heads_give_no_elements(backend, grad):
    q = torch.zeros(2, 0, 4, 8, requires_grad=grad)
    k = torch.zeros(2, 0, 5, 8, requires_grad=grad)
    for attend in (attention, scaled_dot_product_attention):
        with use_backend(backend):
            o = attend(q, k, k)
        assert o.shape == q.shape
        if grad:
            assert [g.shape for g in torch.autograd.grad(o.sum(), (q, k))] == [q.shape, k.shape]

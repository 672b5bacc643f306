"""The native attention on the CPU against the reference: every feature, dtype, instruction set, odd shapes and strides.

The peer of the error rule is the formula as a user of torch would write it, in the inputs' own dtype.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from itertools import compress
from typing import Any

import pytest
import torch
from support import DTYPES, assert_within_budget, error, needs_native
from torch import Tensor

from fastseq.reference.attention import attention as reference
from fastseq.reference.random import keep_mask

pytestmark = needs_native

TENSORS = ("bias", "mask", "sinks", "alibi_slopes", "lengths_q", "lengths_k", "cu_seqlens_q", "cu_seqlens_k", "seed")
PLAIN: dict[str, Any] = {
    "scale": 0.25, "causal": False, "bottom_right": True, "window_left": -1, "window_right": -1, "softcap": 0.0,
    "dropout_p": 0.0,
}  # fmt: skip
DENSE = (2, 4, 2, 33, 65, 24, 17)  # B, Hq, Hk, Tq, Tk, D, Dv
Options = dict[str, Any]


def arguments(options: Options) -> list[Any]:
    return [*(options.get(name) for name in TENSORS), *({**PLAIN, **options}[name] for name in PLAIN)]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    return torch.ops.fastseq.attention_forward.native(q, k, v, *arguments(options))


def backward(d_o: Tensor, dlse: Tensor | None, q, k, v, o, lse, options: Options) -> tuple[Tensor, ...]:
    call = torch.ops.fastseq.attention_backward.native
    return call(d_o, dlse, q, k, v, o, lse, *arguments(options), options.get("bias") is not None)


def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """o, every step in q's dtype. Packed: one sequence at a time."""
    x = {**PLAIN, **options}
    if x.get("cu_seqlens_q") is not None:
        parts, ends_q, ends_k = [], x.pop("cu_seqlens_q").tolist(), x.pop("cu_seqlens_k").tolist()
        for b in range(len(ends_q) - 1):
            own_q, own_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            one = eager(*(t.transpose(0, 1)[None] for t in (q[own_q], k[own_k], v[own_k])), **x, batch=b)
            parts.append(one[0].transpose(0, 1))
        rest = q.new_zeros(q.shape[0] - ends_q[-1], q.shape[1], v.shape[2])
        return torch.cat([*parts, rest])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = x["lengths_q"][:, None, None, None] if x.get("lengths_q") is not None else q.shape[2]
    columns = x["lengths_k"][:, None, None, None] if x.get("lengths_k") is not None else k.shape[2]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    diagonal = i + (columns - rows if x["bottom_right"] else 0)
    visible = (i < rows) & (j < columns) & (x["mask"] if x.get("mask") is not None else True)
    if x["causal"]:
        visible = visible & (j <= diagonal)
    if x["window_left"] >= 0:
        visible = visible & (j >= diagonal - x["window_left"])
    if x["window_right"] >= 0:
        visible = visible & (j <= diagonal + x["window_right"])
    scores = q @ k.transpose(-2, -1) * x["scale"]
    if x["softcap"] > 0:
        scores = x["softcap"] * torch.tanh(scores / x["softcap"])
    if x.get("bias") is not None:
        visible = visible & (x["bias"] != -math.inf)
        scores = scores + x["bias"].masked_fill(x["bias"] == -math.inf, 0).to(q.dtype)
    if x.get("alibi_slopes") is not None:
        scores = scores - (x["alibi_slopes"][:, None, None] * (diagonal - j).abs()).to(q.dtype)
    least = -1e4 if q.dtype == torch.float16 else -1e30
    scores = scores.masked_fill(~visible, least)
    if x.get("sinks") is not None:
        sinks = x["sinks"].to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1) if scores.shape[-1] else scores
    weights = weights.masked_fill(~visible, 0)
    if x["dropout_p"] > 0:
        b = torch.arange(q.shape[0])[:, None, None, None] + x.get("batch", 0)
        h = torch.arange(q.shape[1])[:, None, None]
        kept = keep_mask(x["seed"], x["dropout_p"], b, h, i, j)
        weights = weights.masked_fill(~kept, 0) / (1 - x["dropout_p"])
    return weights @ v


def gradients(function: Any, q, k, v, options: Options, dtype: torch.dtype | None, d_o: Tensor, dlse: Tensor | None):
    """Outputs of a differentiable attention and its gradients of q, k, v, bias and sinks (those that there are)."""
    options = {**PLAIN, **options}
    leaves = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().to(dtype or x.dtype).requires_grad_())
        return leaves[-1]

    q, k, v = leaf(q), leaf(k), leaf(v)
    for name in ("bias", "sinks"):
        if options.get(name) is not None:
            options[name] = leaf(options[name])
    result = function(q, k, v, **options)
    o, lse = result if isinstance(result, tuple) else (result, None)
    loss = (o * d_o.to(o.dtype)).sum()
    if dlse is not None and lse is not None:
        real = lse.isfinite()
        loss = loss + (lse.where(real, 0) * dlse.to(lse.dtype).where(real, 0)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return o.detach(), None if lse is None else lse.detach(), grads


def assert_right(q: Tensor, k: Tensor, v: Tensor, options: Options, with_dlse: bool = False) -> None:
    """Outputs and gradients are within budget, finite, and the same bits when asked again."""
    o, lse = forward(q, k, v, options)
    d_o = torch.randn(o.shape, dtype=torch.float32).to(o.dtype)
    dlse = torch.randn(lse.shape, dtype=lse.dtype) if with_dlse else None
    true_o, true_lse, true_grads = gradients(reference, q, k, v, options, torch.float64, d_o, dlse)
    # Where lse takes part, the peer is the reference in q's dtype: eager torch has no lse to differentiate.
    peer_o, _, peer_grads = gradients(reference if with_dlse else eager, q, k, v, options, None, d_o, dlse)
    assert_within_budget(o, peer_o, true_o, "o")

    assert torch.equal(lse.isinf(), true_lse.isinf()), "lse: -inf in other places than the truth"
    half = q.dtype in (torch.bfloat16, torch.float16)
    real = true_lse.isfinite()
    floor = {torch.float64: 1e-13, torch.float32: 2e-6}.get(q.dtype, 2e-5) * (1 + true_lse[real].abs())
    assert ((lse[real].double() - true_lse[real]).abs() <= floor).all(), "lse"

    grads = backward(d_o, dlse, q, k, v, o, lse, options)
    wanted = [True] * 3 + [options.get(name) is not None for name in ("bias", "sinks")]
    names, ours = list(compress(("dq", "dk", "dv", "dbias", "dsinks"), wanted)), list(compress(grads, wanted))
    for name, got, peer, truth in zip(names, ours, peer_grads, true_grads, strict=True):
        assert got.dtype == peer.dtype
        # A gradient may be 0 by cancellation (of one key, of a bias that all keys share), and a peer's luckily exact.
        # The terms that cancel are of the order of 1 here, and those of a sum over rows err independently.
        terms = lse.numel() if name in ("dbias", "dsinks") else 1
        floor = (8 if half else 64) * torch.finfo(q.dtype).eps * max(1.0, float(truth.abs().max())) * math.sqrt(terms)
        budget = 2 * error(peer, truth) + (floor if got.dtype == q.dtype else max(floor, 1e-6))
        assert error(got, truth) <= budget, f"{name}: error {error(got, truth):.3g} over the budget of {budget:.3g}"
    again = backward(d_o, dlse, q, k, v, o, lse, options)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "another gradient the second time"
    assert all(torch.equal(a, b) for a, b in zip((o, lse), forward(q, k, v, options), strict=True))


def dense(shape=DENSE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hk, tq, tk, d, dv = shape
    sizes = (b, hq, tq, d), (b, hk, tk, d), (b, hk, tk, dv)
    return tuple(torch.randn(s, dtype=torch.float32).to(dtype) for s in sizes)  # type: ignore[return-value]


def packed(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, spare: int = 0):
    q = torch.randn(sum(lengths_q) + spare, 4, 24).to(dtype)
    k, v = torch.randn(sum(lengths_k) + spare, 2, 24).to(dtype), torch.randn(sum(lengths_k) + spare, 2, 17).to(dtype)
    cu = {n: torch.tensor([0, *x]).cumsum(0).int() for n, x in (("q", lengths_q), ("k", lengths_k))}
    return q, k, v, {"cu_seqlens_q": cu["q"], "cu_seqlens_k": cu["k"]}


def feature(name: str, dtype: torch.dtype, shape=DENSE) -> Options:
    b, hq, _, tq, tk, _, _ = shape
    mask = torch.rand(b, 1, tq, tk) < 0.6
    mask[0, 0, tq // 2] = False
    makers: dict[str, Callable[[], Options]] = {
        "plain": lambda: {},
        "negative scale": lambda: {"scale": -0.3},
        "causal": lambda: {"causal": True},
        "causal, top left": lambda: {"causal": True, "bottom_right": False},
        "window": lambda: {"window_left": 9, "window_right": 3},
        "window, causal": lambda: {"window_left": 9, "causal": True, "bottom_right": False},
        "softcap": lambda: {"softcap": 2.0},
        "bias": lambda: {"bias": torch.randn(b, hq, tq, tk).to(dtype)},
        "bias, broadcast over batch and queries": lambda: {"bias": torch.randn(1, hq, 1, tk)},
        "bias, broadcast over heads and keys": lambda: {"bias": torch.randn(b, 1, tq, 1).to(dtype)},
        "bias, one number": lambda: {"bias": torch.randn(1, 1, 1, 1), "mask": mask},
        "bias of -inf": lambda: {"bias": torch.randn(b, 1, tq, tk).masked_fill(~mask, -math.inf).to(dtype)},
        "mask": lambda: {"mask": mask},
        "mask of keys": lambda: {"mask": torch.rand(b, 1, 1, tk) < 0.6},
        "mask of queries": lambda: {"mask": torch.rand(1, hq, tq, 1) < 0.6},
        "mask, keys first in memory": lambda: {"mask": mask.transpose(2, 3).contiguous().transpose(2, 3)},
        "sinks": lambda: {"sinks": torch.randn(hq).to(dtype), "mask": mask},
        "sinks in float32": lambda: {"sinks": torch.randn(hq), "causal": True, "bottom_right": False},
        "alibi": lambda: {"alibi_slopes": torch.rand(hq)},
        "lengths": lambda: {
            "lengths_q": torch.randint(0, tq + 1, (b,)), "lengths_k": torch.randint(0, tk + 1, (b,)), "causal": True,
        },
        "dropout": lambda: {"dropout_p": 0.3, "seed": torch.tensor([0x1234567890ABCDEF])},
    }  # fmt: skip
    return makers[name]()


FEATURES = [
    "plain", "negative scale", "causal", "causal, top left", "window", "window, causal", "softcap", "bias",
    "bias, broadcast over batch and queries", "bias, broadcast over heads and keys", "bias, one number",
    "bias of -inf", "mask", "mask of keys", "mask of queries", "mask, keys first in memory", "sinks",
    "sinks in float32", "alibi", "lengths", "dropout",
]  # fmt: skip


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


def draw(rng: random.Random, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Options]:
    group, hk, b = rng.choice([1, 1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    tq, tk = rng.choice([1, 3, 7, 9, 33, 65, 130]), rng.choice([1, 2, 17, 64, 129, 259])
    d = rng.choice([1, 7, 16, 33, 64])
    shape = (b, hk * group, hk, tq, tk, d, rng.choice([d, 5, 48]))
    q, k, v = dense(shape, dtype)
    options: Options = {"scale": d**-0.5}
    for name in rng.sample(FEATURES, rng.choice([2, 3, 4])):
        options |= feature(name, dtype, shape)
    layouts = [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
               lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
               lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2]]  # fmt: skip
    return *(rng.choice(layouts)(x) for x in (q, k, v)), options


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
    options = {"lengths_q": torch.tensor([queries, queries - 1]), "lengths_k": torch.tensor([61, 0])}
    for dtype in DTYPES:
        q, k, v = dense((2, 2, 1, queries, 70, 16, 16), dtype)
        d_o = torch.randn(2, 2, queries, 16).to(dtype)
        results = []
        for junk in (0.0, math.nan, math.inf):
            q[1, :, queries - 1 :], d_o[1, :, queries - 1 :] = junk, junk
            k[0, :, 61:], v[0, :, 61:], k[1], v[1] = junk, junk, junk, junk
            o, lse = forward(q, k, v, options)
            results.append((o, lse, *backward(d_o, None, q, k, v, o, lse, options)[:3]))
        for result in results:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
        o, lse, dq, dk, dv = results[0]
        assert not o[1].any()
        assert (lse[1] == -math.inf).all()
        assert not any(x[1].any() for x in (dq, dk, dv))


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

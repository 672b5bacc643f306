"""``KVCache(dtype=torch.int8)``: how near it is to the keys and values that were appended, on every backend."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from attention_operators import PLAIN, eager
from attention_support import DecodingStep
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NATIVE, assert_within_budget, needs_native
from torch import Tensor

import fastseq
from fastseq.attn import int8
from fastseq.attn.call import AttentionCall
from fastseq.attn.reference import attention as reference
from fastseq.checks import ArgumentError

BATCH, HEADS, DIM, DIM_V = 3, 2, 24, 17
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {"capacity": 200},
    "contiguous that grows": {},
    "paged": {"capacity": 600, "page_size": 16},
    "paged that grows": {"page_size": 7},
    "ring": {"window": 30},
    "ring in small pages": {"window": 30, "page_size": 3},
}
WINDOW = 30
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(layout: str, **more: Any) -> fastseq.KVCache:
    sizes: dict[str, Any] = {"dim_v": DIM_V, "dtype": torch.int8, **LAYOUTS[layout], **more}
    return fastseq.KVCache(BATCH, HEADS, DIM, **sizes)


def drawn(t: int, dtype: torch.dtype = torch.float32, n: int = BATCH) -> tuple[Tensor, Tensor]:
    return torch.randn(n, HEADS, t, DIM).to(dtype), torch.randn(n, HEADS, t, DIM_V).to(dtype)


def as_kept(*rows: Tensor) -> list[Tensor]:
    """What a cache of int8 stands for, exactly."""
    return [numbers.double() * scale.double() for numbers, scale in map(int8.quantise, rows)]


@st.composite
def problems(draw: Any) -> dict[str, Any]:
    return {
        "shape": (draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.sampled_from([1, 3, 16, 33, 64, 128]))),
        "queries": draw(st.integers(1, 12)),
        "dtype": draw(st.sampled_from(TYPES)),
        "size": draw(st.sampled_from([1e-4, 1.0, 8.0])),
        "outlier": draw(st.booleans()),
        "scale": draw(st.sampled_from([0.05, 0.5, -0.2])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "backend": draw(st.sampled_from(["reference", *(["native"] * (fastseq.backends()["native"] is None))])),
        "seed": draw(st.integers(0, 999)),
    }


@given(x=problems())
@settings(max_examples=50, deadline=None)
def test_the_result_is_within_the_bound_that_is_stated(x):
    torch.manual_seed(x["seed"])
    batch, keys, dim = x["shape"]
    k, v = (x["size"] * torch.randn(batch, 1, keys, dim).to(x["dtype"]) for _ in range(2))
    if x["outlier"]:
        k[0, 0, 0, 0] *= 20
        v[0, 0, -1, 0] *= 20
    q = torch.randn(batch, 2, x["queries"], dim).to(x["dtype"])
    cache = fastseq.KVCache(batch, 1, dim, dtype=torch.int8)
    cache.append(k, v)
    options = {"scale": x["scale"], "softcap": x["softcap"]}
    o, lse = fastseq.attention(q, cache=cache, return_lse=True, backend=x["backend"], **options)
    true_o, true_lse = reference(q.double(), k.double(), v.double(), **{**PLAIN, **options})
    largest_k, largest_v = (float(t.double().abs().max()) for t in (k, v))
    e = abs(x["scale"]) * largest_k / 254 * q.double().abs().sum(-1)
    rounding = 8 * torch.finfo(x["dtype"]).eps
    steps = 1e-5 * (1 + abs(x["scale"]) * (q.double().abs().sum(-1) * largest_k))
    assert bool(((lse - true_lse).abs() <= e + steps + rounding * true_lse.abs()).all())
    bound = largest_v / 254 + torch.expm1(2 * (e + rounding * (e * 254).clamp(min=1))) * largest_v
    assert bool(((o - true_o).abs() <= bound.unsqueeze(-1) + rounding * largest_v).all())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (9, 0)},
    "softcap": {"causal": True, "softcap": 3.0},
    "sinks": {"causal": True, "sinks": torch.randn(2 * HEADS)},
    "slopes": {"causal": True, "alibi_slopes": torch.rand(2 * HEADS)},
    "negative scale": {"scale": -0.3},
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "torch", NATIVE])
def test_backends_give_what_the_numbers_and_scales_say(backend, options, dtype):
    given = OPTIONS[options]
    if backend == "torch" and {"softcap", "sinks"} & given.keys():
        pytest.skip("torch's attention has none of it")
    k, v = drawn(90, dtype)
    kept_k, kept_v = as_kept(k, v)
    for layout in LAYOUTS:
        for queries in (1, 5, 40):
            cache = made(layout)
            cache.append(k, v)
            q = torch.randn(BATCH, 2 * HEADS, queries, DIM).to(dtype)
            own = dict(given)
            got = fastseq.attention(q, cache=cache, backend=backend, **own)
            if cache.window is not None:
                left, right = own.get("window", (WINDOW - 1, -1))
                own["window"] = (left, right)
            left, right = own.pop("window", (-1, -1))
            call = {**PLAIN, "scale": DIM**-0.5, **own, "window_left": left, "window_right": right}
            truth = reference(q.double(), kept_k, kept_v, **{n: wide(x) for n, x in call.items()})[0]
            assert got.dtype == dtype
            peer = eager(q, kept_k.to(dtype), kept_v.to(dtype), **call)
            assert_within_budget(got, peer, truth, f"{layout}, {queries} queries")


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) else x


@needs_native
@pytest.mark.parametrize("dim", [1, 15, 16, 31, 64, 100, 128, 129])
def test_heads_of_every_width(dim):
    for dim_v in (dim, 5, 64):
        k, v = torch.randn(2, 3, 150, dim), torch.randn(2, 3, 150, dim_v)
        cache = fastseq.KVCache(2, 3, dim, dim_v=dim_v, dtype=torch.int8, page_size=16)
        cache.append(k, v)
        kept_k, kept_v = as_kept(k, v)
        for heads, queries in ((3, 1), (12, 1), (15, 2), (3, 20)):
            q = torch.randn(2, heads, queries, dim)
            got = fastseq.attention(q, cache=cache, causal=True, backend="native", return_lse=True)
            call = {**PLAIN, "scale": dim**-0.5, "causal": True}
            torch.testing.assert_close(got[0], reference(q.double(), kept_k, kept_v, **call)[0].float())
            torch.testing.assert_close(got[1], reference(q.double(), kept_k, kept_v, **call)[1].float())


@needs_native
def test_masks_and_biases_stand_beside_int8():
    cache = made("contiguous", capacity=90)
    k, v = drawn(90)
    cache.append(k, v)
    kept = [x.float() for x in as_kept(k, v)]
    for queries in (2, 20):
        q = torch.randn(BATCH, 2 * HEADS, queries, DIM)
        given = {"mask": torch.rand(BATCH, 1, queries, 90) < 0.6, "bias": torch.randn(1, 2 * HEADS, 1, 90)}
        got = fastseq.attention(q, cache=cache, backend="native", **given)
        torch.testing.assert_close(got, fastseq.attention(q, *kept, **given))


@pytest.mark.parametrize("backend", ["reference", NATIVE])
def test_packed_queries_on_pages_of_int8(backend):
    cache = made("paged")
    lengths = [41, 7, 32]
    rows = [drawn(n, n=1) for n in lengths]
    for b, (k, v) in enumerate(rows):
        cache.append(k, v, sequences=torch.tensor([b]))
    q, ends = torch.randn(7, 2 * HEADS, DIM), torch.tensor([0, 1, 1, 6])
    got = fastseq.attention(q, cache=cache, cu_seqlens_q=ends, causal=True, backend=backend)
    for b, (k, v) in enumerate(rows):
        own = q[ends[b] : ends[b + 1]].transpose(0, 1)[None]
        want = fastseq.attention(own, *(x.float() for x in as_kept(k, v)), causal=True)
        torch.testing.assert_close(got[ends[b] : ends[b + 1]], want[0].transpose(0, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_leave_the_numbers_that_all_at_once_leaves(layout):
    k, v = drawn(61)
    whole, pieces = made(layout), made(layout)
    whole.append(k, v)
    at = 0
    for t in (1, 1, 30, 0, 28, 1):
        pieces.append(k[:, :, at : at + t], v[:, :, at : at + t])
        at += t
    for backend in ("reference", *(["native"] * (fastseq.backends()["native"] is None))):
        q = torch.randn(BATCH, HEADS, 1, DIM)
        found = [fastseq.attention(q, cache=c, causal=True, backend=backend) for c in (whole, pieces)]
        torch.testing.assert_close(*found)
    if layout == "contiguous":
        assert all(torch.equal(x, whole.state_dict()[name]) for name, x in pieces.state_dict().items())


def test_it_takes_a_byte_a_feature_and_four_a_row():
    cache = made("contiguous")
    assert cache.nbytes == BATCH * HEADS * 200 * (DIM + DIM_V + 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_checkpoints_of_int8_go_on_where_the_cache_was(layout):
    cache = made(layout)
    cache.append(*drawn(70))
    other = made(layout)
    other.load_state_dict(cache.state_dict())
    twin = copy.deepcopy(cache)
    (k, v), q = drawn(40), torch.randn(BATCH, HEADS, 1, DIM)
    for one in (cache, other, twin):
        one.append(k, v)
    want = fastseq.attention(q, cache=cache)
    assert torch.equal(fastseq.attention(q, cache=other), want)
    assert torch.equal(fastseq.attention(q, cache=twin), want)
    with pytest.raises(RuntimeError, match="k_scale"):
        fastseq.KVCache(BATCH, HEADS, DIM, dim_v=DIM_V, **LAYOUTS[layout]).load_state_dict(cache.state_dict())


@pytest.mark.parametrize("layout", ["contiguous", "ring"])
def test_a_step_on_int8_compiles_whole_and_is_exported(layout):
    torch._dynamo.reset()
    with torch.no_grad():
        (k, v), q = drawn(1), torch.randn(BATCH, HEADS, 1, DIM)
        compiled = torch.compile(DecodingStep(made(layout)), fullgraph=True, backend="aot_eager")
        program, plain = torch.export.export(DecodingStep(made(layout)), (q, k, v)).module(), DecodingStep(made(layout))
        for _ in range(15):
            (k, v), q = drawn(1), torch.randn(BATCH, HEADS, 1, DIM)
            want = plain(q, k, v)
            torch.testing.assert_close(compiled(q, k, v), want)
            torch.testing.assert_close(program(q, k, v), want)


def test_a_row_with_a_nan_or_an_infinity_is_nan_and_no_other():
    for wrong in (math.nan, math.inf, -math.inf):
        cache = made("contiguous")
        k, v = drawn(20)
        v[1, 0, 3, 2] = wrong
        cache.append(k, v)
        o = fastseq.attention(torch.randn(BATCH, HEADS, 1, DIM), cache=cache)
        assert o[1, 0].isnan().all()
        assert o[[0, 2]].isfinite().all()
        assert o[1, 1].isfinite().all()


def test_zeros_and_the_least_numbers_are_kept():
    k, v = torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    v[0, 0, 1] = 1e-44
    v[0, 0, 2] = torch.tensor([3e38, -3e38, 0.0, 1.0])
    numbers, scale = int8.quantise(v)
    kept = numbers * scale
    assert not kept[0, 0, 0].any()
    assert bool(((kept - v).abs() <= scale / 2 * (1 + 1e-5)).all())
    cache = fastseq.KVCache(1, 1, 4, dtype=torch.int8)
    cache.append(k[:, :, :2], v[:, :, :2])
    assert not fastseq.attention(torch.randn(1, 1, 1, 4), cache=cache).any()


def test_autocast_and_conversion_leave_numbers_and_scales_alone():
    cache = made("contiguous")
    cache.append(*drawn(20))
    q = torch.randn(BATCH, HEADS, 3, DIM)
    want = fastseq.attention(q.bfloat16(), cache=cache, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fastseq.attention(q, cache=cache, causal=True), want)
    torch.nn.ModuleList([cache]).to(torch.bfloat16)
    assert torch.equal(fastseq.attention(q.bfloat16(), cache=cache, causal=True), want)
    cache.append(*drawn(1))


def test_queries_have_a_gradient_beside_int8():
    cache = made("paged")
    k, v = drawn(20)
    cache.append(k, v)
    q = torch.randn(BATCH, HEADS, 3, DIM, requires_grad=True)
    kept = [x.float() for x in as_kept(k, v)]
    got, want = fastseq.attention(q, cache=cache, causal=True), fastseq.attention(q, *kept, causal=True)
    torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), q)[0] for o in (got, want)))


def test_a_prefix_stands_before_int8():
    cache = made("paged")
    k, v = drawn(20)
    cache.append(k, v)
    q, prefix = torch.randn(BATCH, HEADS, 1, DIM), (torch.randn(HEADS, 9, DIM), torch.randn(HEADS, 9, DIM_V))
    kept = [x.float() for x in as_kept(k, v)]
    got = fastseq.attention(q, cache=cache, prefix=prefix)
    torch.testing.assert_close(got, fastseq.attention(q, *kept, prefix=prefix))


def test_a_full_cache_of_int8_stays_as_it_was():
    cache = made("paged", capacity=48)
    cache.append(*drawn(16))
    before = copy.deepcopy(cache.state_dict())
    with pytest.raises(ArgumentError, match="full: it has room for 48 positions"):
        cache.append(*drawn(1))
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


def test_what_int8_cannot_take_is_refused():
    cache = made("contiguous")
    cache.append(*drawn(4))
    for wrong in (torch.float64, torch.int8):
        k, v = (x.to(wrong) for x in drawn(1))
        with pytest.raises(ArgumentError, match=r"k is torch\.\w+; a cache of int8 makes its numbers of float32"):
            cache.append(k, v)
        with pytest.raises(ArgumentError, match="q must be float32, bfloat16 or float16 beside a cache of int8"):
            fastseq.attention(torch.zeros(BATCH, HEADS, 1, DIM, dtype=wrong), cache=cache)
    with pytest.raises(TypeError, match="q must be a Tensor, got list"):
        fastseq.attention([1.0], cache=cache)
    with pytest.raises(ArgumentError, match="batch"):
        fastseq.attention(torch.zeros(1, HEADS, 1, DIM), cache=cache)
    with pytest.raises(
        ArgumentError, match=r"dtype must be float64, float32, bfloat16, float16 or int8, got torch\.int32"
    ):
        fastseq.KVCache(1, 1, 4, dtype=torch.int32)
    assert cache.lengths.tolist() == [4] * BATCH


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"v_scale": None}, "k_scale and v_scale come together"),
    ({"k_scale": None, "v_scale": None}, "with k_scale k and v int8"),
    ({"k_scale": torch.ones(2, 1, 6, 1)}, "k_scale must be float32, one number for each row of k"),
    ({"v_scale": torch.ones(2, 1, 5, 1).double()}, "v_scale must be float32, one number for each row of v"),
    ({"q": torch.zeros(2, 1, 1, 4).double()}, "take no float64"),
    ({"k": torch.zeros(2, 1, 5, 4)}, "with k_scale k and v int8"),
]


@needs_native
@pytest.mark.parametrize(("change", "message"), WRONG, ids=[m for _, m in WRONG])
def test_the_operator_looks_at_scales(change, message):
    rows, scales = torch.zeros(2, 1, 5, 4, dtype=torch.int8), torch.ones(2, 1, 5, 1)
    call = AttentionCall(torch.zeros(2, 1, 1, 4), rows, rows, k_scale=scales, v_scale=scales)
    torch.ops.fastseq.attention_forward.native(*call)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastseq.attention_forward.native(*call._replace(**change))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_and_very_small_numbers_are_what_they_are(isa, dtype):
    k, v = drawn(70)
    k[..., 3] = torch.where(k[..., 3] < 0, -1.0, 1.0)  # an infinity times 0 is a NaN
    v *= 1e-34
    q = torch.randn(BATCH, 2 * HEADS, 1, DIM).to(dtype)
    q[0, 1, 0, 3], q[1, 0, 0, 3] = math.inf, -math.inf
    cache = made("contiguous")
    cache.append(k, v)
    with torch.no_grad():
        o, lse = fastseq.attention(q, cache=cache, scale=0.2, softcap=2.0, return_lse=True)
    true_o, true_lse = reference(q.double(), *as_kept(k, v), **{**PLAIN, "scale": 0.2, "softcap": 2.0})
    assert_within_budget(o, true_o.to(dtype), true_o)
    assert_within_budget(lse, true_lse.float(), true_lse)

"""``prefix_lengths``: every query sees a sequence's first keys, whatever causality and the window say (prefix-LM); and
``prefix``: keys that all sequences share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.checks import ArgumentError

BACKENDS = ["reference", "torch", "native"]
F64 = torch.float64
LIMITS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "causal, top left": {"causal": True, "align": "top_left"},
    "window": {"window": (7, 2)},
    "causal, far from the window": {"causal": True, "window": (3, -1), "align": "top_left"},
}


def draw(queries: int, keys: int, batch: int = 3) -> list[Tensor]:
    shapes = (batch, 4, queries, 24), (batch, 2, keys, 24), (batch, 2, keys, 17)
    return [torch.randn(shape, dtype=F64).requires_grad_() for shape in shapes]


def seen(queries: int, keys: int, prefix: Tensor, limits: dict[str, Any]) -> Tensor:
    """What the equation says, as a mask [B,1,Tq,Tk]."""
    shift = 0 if limits.get("align") == "top_left" else keys - queries
    ahead = torch.arange(keys) - torch.arange(queries)[:, None] - shift
    left, right = limits.get("window", (-1, -1))
    near = torch.ones(queries, keys, dtype=torch.bool)
    near &= (ahead <= 0) | (not limits.get("causal", False))
    near &= (ahead >= -left) | (left < 0)
    near &= (ahead <= right) | (right < 0)
    return near | (torch.arange(keys) < prefix[:, None, None, None])


def with_gradients(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    o = fastseq.attention(*inputs, **options)
    assert isinstance(o, Tensor)
    return [o, *torch.autograd.grad(o.sin().sum(), inputs)]


@pytest.mark.parametrize("queries", [1, 5, 70, 200])
@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_mask_that_the_equation_says(backend: str, limits: dict[str, Any], queries: int) -> None:
    inputs, prefix = draw(queries, 300), torch.tensor([0, 140, 300])
    found = with_gradients(inputs, **limits, prefix_lengths=prefix, backend=backend)
    wanted = with_gradients(inputs, mask=seen(queries, 300, prefix, limits), backend="reference")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_a_mask_hide_keys_of_the_prefix(backend: str) -> None:
    inputs, prefix, lengths = draw(9, 20), torch.tensor([15, 20, 3]), torch.tensor([12, 0, 20])
    mask = torch.rand(3, 1, 9, 20) < 0.7
    options = {"align": "top_left", "causal": True}
    found = with_gradients(inputs, **options, prefix_lengths=prefix, lengths_k=lengths, mask=mask, backend=backend)
    allowed = mask & seen(9, 20, prefix, options) & (torch.arange(20) < lengths[:, None, None, None])
    wanted = with_gradients(inputs, mask=allowed, backend="reference")
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prefix_of_nothing_is_none_and_one_of_all_keys_lifts_the_limits(backend: str) -> None:
    q, k, v = draw(40, 50)
    options = {"causal": True, "window": (8, 0), "backend": backend}
    none, all_keys = torch.zeros(3, dtype=torch.int32), torch.full((3,), 50)
    torch.testing.assert_close(
        fastseq.attention(q, k, v, prefix_lengths=none, **options), fastseq.attention(q, k, v, **options)
    )
    torch.testing.assert_close(
        fastseq.attention(q, k, v, prefix_lengths=all_keys, **options), fastseq.attention(q, k, v, backend=backend)
    )


def test_bits_are_the_same_with_a_prefix_of_nothing() -> None:
    q, k, v = (x.detach() for x in draw(70, 90))
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype) for x in (q, k, v)]
        with_prefix = fastseq.attention(*inputs, causal=True, prefix_lengths=torch.zeros(3, dtype=torch.int64))
        assert torch.equal(with_prefix, fastseq.attention(*inputs, causal=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_packed_sequences_have_one_each(backend: str) -> None:
    lengths_q, lengths_k, prefix = [3, 0, 70, 1], [9, 4, 80, 5], torch.tensor([4, 4, 66, 5])
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    q, k, v = (torch.randn(n, h, d, dtype=F64) for n, h, d in ((74, 4, 24), (98, 2, 24), (98, 2, 17)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    limits = {"causal": True, "window": (5, 0)}
    found = with_gradients(
        inputs, **limits, prefix_lengths=prefix, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend=backend
    )
    for b in range(4):
        own_q, own_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = [x.transpose(0, 1)[None] for x in (q[own_q], k[own_k], v[own_k])]
        mask = seen(lengths_q[b], lengths_k[b], prefix[b : b + 1], limits)
        for x, own, y in zip(found, (own_q, own_q, own_k, own_k), with_gradients(one, mask=mask), strict=True):
            torch.testing.assert_close(x[own], y[0].transpose(0, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_keys_in_pages(packed: bool) -> None:
    table, lengths, prefix = torch.tensor([[2, 0], [1, 3]]), torch.tensor([20, 31]), torch.tensor([18, 2])
    pools = [torch.randn(4, 16, 2, d) for d in (24, 17)]
    q = torch.randn(2, 4, 5, 24)
    k, v = (pool[table].flatten(1, 2).transpose(1, 2) for pool in pools)
    options: dict[str, Any] = {"causal": True, "window": (4, 0), "prefix_lengths": prefix, "lengths_k": lengths}
    wanted = fastseq.attention(q, k, v, **options)
    if not packed:
        torch.testing.assert_close(fastseq.attention(q, *pools, block_table=table, **options), wanted)
        return
    rows = q.transpose(1, 2).flatten(0, 1)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    found = fastseq.attention(rows, *pools, block_table=table, cu_seqlens_q=cu, **options)
    torch.testing.assert_close(found.view(2, 5, 4, 17).transpose(1, 2), wanted)


@pytest.mark.parametrize("fast_mode", [True, pytest.param(False, marks=pytest.mark.full)])
def test_second_derivatives(fast_mode: bool) -> None:
    inputs, prefix = draw(4, 6, batch=2), torch.tensor([2, 5])
    options = {"causal": True, "align": "top_left", "prefix_lengths": prefix, "backend": "native"}
    assert torch.autograd.gradgradcheck(lambda *x: fastseq.attention(*x, **options), inputs, fast_mode=fast_mode)


def test_it_compiles_whole_and_exports() -> None:
    class Prefixed(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
            return fastseq.attention(q, k, v, causal=True, prefix_lengths=prefix)

    q, k, v = (x.detach().float().requires_grad_() for x in draw(11, 13))
    prefix = torch.tensor([3, 0, 13])
    wanted = Prefixed()(q, k, v, prefix)
    compiled = torch.compile(Prefixed(), fullgraph=True, backend="aot_eager")(q, k, v, prefix)
    exported = torch.export.export(Prefixed(), (q, k, v, prefix)).module()(q, k, v, prefix)
    torch.testing.assert_close(compiled, wanted)
    torch.testing.assert_close(exported, wanted)
    for x, y in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (compiled, wanted)), strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_over_prefixes_and_over_all() -> None:
    q, k, v = (x.detach().float() for x in draw(7, 9))
    prefixes = torch.tensor([[0, 3, 9], [5, 5, 5]])

    def call(q: Tensor, prefix: Tensor) -> Tensor:
        return fastseq.attention(q, k, v, causal=True, prefix_lengths=prefix)

    one_by_one = torch.stack([call(q, prefix) for prefix in prefixes])
    torch.testing.assert_close(torch.vmap(call, (None, 0))(q, prefixes), one_by_one)
    torch.testing.assert_close(torch.vmap(call)(torch.stack([q, q]), prefixes), one_by_one)


def beside(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the prefix before each sequence's own."""
    return tuple(torch.cat((p.expand(x.shape[0], *p.shape), x), 2) for p, x in zip(prefix, (k, v), strict=True))


def visible(own: Tensor, prefix_length: int) -> Tensor:
    """A mask [..., Tq, P + Tk] of which the prefix is seen by all."""
    return torch.cat((own.new_ones(*own.shape[:-1], prefix_length), own), -1)


SHARED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 2.0, "scale": 0.7},
    "sinks": {"sinks": torch.randn(4)},
    "rows that see none of their own": {"mask": torch.tensor([[True] * 9, [False] * 9, [True] * 9])},
}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("options", SHARED)
def test_a_shared_prefix_equals_its_concatenation(backend: str, options: str) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    prefix = torch.randn(2, 6, 8), torch.randn(2, 6, 5)
    given = SHARED[options]
    own = given.get("mask", torch.ones(3, 9, dtype=torch.bool))
    own = own.tril(6) if given.get("causal") else own
    rest = {name: x for name, x in given.items() if name not in ("mask", "causal")}
    leaves = [x.requires_grad_() for x in (q, k, v, *prefix)]
    got = fastseq.attention(q, k, v, prefix=prefix, return_lse=True, backend=backend, **given)
    want = fastseq.attention(
        q, *beside(prefix, k, v), mask=visible(own, 6), return_lse=True, backend="reference", **rest
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    found, expected = (torch.autograd.grad(o.sin().sum() + lse.cos().sum(), leaves) for o, lse in (got, want))
    torch.testing.assert_close(found, expected)


def test_a_shared_prefix_before_padded_packed_and_cached_sequences() -> None:
    lengths_q, lengths_k = torch.tensor([3, 0, 2]), torch.tensor([0, 4, 9])
    q, k, v = torch.randn(3, 4, 3, 8), torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 5)
    prefix = torch.randn(2, 6, 8), torch.randn(2, 6, 5)
    whole = beside(prefix, k, v)
    want = fastseq.attention(q, *whole, lengths_q=lengths_q, lengths_k=lengths_k + 6, return_lse=True)
    got = fastseq.attention(q, k, v, prefix=prefix, lengths_q=lengths_q, lengths_k=lengths_k, return_lse=True)
    torch.testing.assert_close(got, want)

    def packed(x: Tensor, lengths: Tensor) -> Tensor:
        rows = [x[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths.tolist())]
        return torch.cat([*rows, torch.zeros(2, *rows[0].shape[1:])])  # and rows that are nobody's

    starts_q, starts_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in (lengths_q, lengths_k))
    got = fastseq.attention(
        packed(q, lengths_q), packed(k, lengths_k), packed(v, lengths_k), prefix=prefix, cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
    )  # fmt: skip
    torch.testing.assert_close(got, packed(want[0], lengths_q))

    cache = fastseq.KVCache(3, 2, 8, dim_v=5, page_size=4)
    cache.append(k, v)
    torch.testing.assert_close(fastseq.attention(q, cache=cache, prefix=prefix), fastseq.attention(q, *whole))


@pytest.mark.parametrize(
    ("prefix", "more", "message"),
    [
        (torch.zeros(2, 6, 8), {}, "pair of Tensors"),
        ((torch.zeros(2, 6, 8), torch.zeros(2, 5, 5)), {}, r"prefix's v must be \[2, P, 5\]"),
        ((torch.zeros(4, 6, 8), torch.zeros(4, 6, 5)), {}, r"prefix's k must be \[2, P, 8\]"),
        ((torch.zeros(2, 6, 8).double(), torch.zeros(2, 6, 5)), {}, "float64"),
        ((torch.zeros(2, 6, 8), torch.zeros(2, 6, 5)), {"alibi_slopes": torch.ones(4)}, "alibi_slopes cannot"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(prefix: Any, more: dict[str, Any], message: str) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    with pytest.raises((ArgumentError, TypeError), match=message):
        fastseq.attention(q, k, v, prefix=prefix, **more)

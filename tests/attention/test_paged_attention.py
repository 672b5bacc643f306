"""``attention`` on a cache of pages: every backend gives what it gives for the same keys in one tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support import needs_native
from torch import Tensor

import fastseq
from fastseq.attn import pages
from fastseq.attn.call import AttentionCall
from fastseq.checks import ArgumentError

TABLE, LENGTHS = torch.tensor([[5, 2, 8], [1, -9, 77], [6, 0, -1]]), torch.tensor([41, 7, 32])
BACKENDS = ["reference", "torch", "native"]


def pools(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Nine pages of 16 keys, 2 heads of 24 and 17 features; those that no sequence uses, and past its end, are NaN."""
    made = [torch.randn(9, 16, 2, d).to(dtype) for d in (24, 17)]
    for pool in made:
        pool[[3, 4, 7]] = math.nan
        pool[8, 41 - 32 :] = math.nan
        pool[1, 7:] = math.nan
    return made


def in_one(pool: Tensor) -> Tensor:
    """[B,H,48,D]; what is not a key is 0."""
    whole = pool.new_zeros(3, 48, *pool.shape[2:])
    for b, length in enumerate(LENGTHS.tolist()):
        for j in range(length):
            whole[b, j] = pool[TABLE[b, j // 16], j % 16]
    return whole.transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "more", [{}, {"causal": True, "window": (9, 0)}, {"mask": torch.rand(3, 1, 5, 48) < 0.7}],
    ids=["plain", "causal", "mask"],
)  # fmt: skip
def test_pages_hold_the_same_keys_as_a_tensor(backend: str, more: dict[str, Any]) -> None:
    k, v = pools()
    q = torch.randn(3, 6, 5, 24)
    options = {"lengths_k": LENGTHS, "backend": backend, **more}
    if backend == "torch":  # which multiplies what a mask hides by 0: no NaN there
        k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    got = fastseq.attention(q, k, v, block_table=TABLE, **options)
    torch.testing.assert_close(got, fastseq.attention(q, in_one(k), in_one(v), **options), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_packed_queries_on_pages(backend: str) -> None:
    k, v = pools()
    starts_q = torch.tensor([0, 1, 1, 6])
    q = torch.randn(7, 6, 24)  # the last row is nobody's
    got, lse = fastseq.attention(
        q, k, v, block_table=TABLE, lengths_k=LENGTHS, cu_seqlens_q=starts_q, causal=True, return_lse=True,
        backend=backend,
    )  # fmt: skip
    packed_k, packed_v = (
        torch.cat([in_one(x)[b, :, :n].transpose(0, 1) for b, n in enumerate(LENGTHS.tolist())]) for x in (k, v)
    )
    starts_k = torch.tensor([0, *LENGTHS]).cumsum(0)
    want = fastseq.attention(
        q, packed_k, packed_v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, causal=True, return_lse=True,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close((got, lse), want)
    assert not got[6].any()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("page", [1, 5, 16, 200])
@pytest.mark.parametrize("queries", [1, 8, 9, 70])
def test_native_kernels_read_pages_to_the_bits_of_a_tensor(
    queries: int, page: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "gather", None)  # nothing is copied before
    lengths = torch.tensor([300, 0, 131])
    count = -(-300 // page)
    table = torch.randperm(3 * count)[: 2 * count].reshape(2, count)[[0, 0, 1]]  # two sequences share theirs
    k, v = (torch.randn(3 * count, 2, page, d).to(dtype).transpose(1, 2) for d in (24, 17))  # [P,page,Hk,D]
    wholes = (x[table].flatten(1, 2).transpose(1, 2)[:, :, : count * page] for x in (k, v))
    q = torch.randn(3, 4, queries, 24, dtype=dtype)
    options = {"lengths_k": lengths, "causal": True, "window": (250, -1), "softcap": 5.0, "backend": "native"}
    with torch.no_grad():
        got = fastseq.attention(q, k, v, block_table=table, **options, return_lse=True)
        want = fastseq.attention(q, *wholes, **options, return_lse=True)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@needs_native
def test_the_operator_refuses_a_page_that_is_not_there() -> None:
    k, v = torch.randn(9, 16, 2, 24), torch.randn(9, 16, 2, 17)
    table = TABLE.clamp(0, 8).to(torch.int32)
    table[0, 2] = 9
    call = AttentionCall(torch.randn(3, 6, 5, 24), k, v, lengths_k=LENGTHS, block_table=table)
    with pytest.raises(RuntimeError, match=r"block_table\[0, 2\] is 9, outside 0\.\.8"):
        torch.ops.fastseq.attention_forward.native(*call)


def test_gradients_reach_the_pages_that_were_read() -> None:
    k, v = (x.nan_to_num(0.0).requires_grad_() for x in pools())
    q = torch.randn(3, 6, 5, 24)
    grads = torch.autograd.grad(fastseq.attention(q, k, v, block_table=TABLE, lengths_k=LENGTHS).square().sum(), (k, v))
    truth = torch.autograd.grad(fastseq.attention(q, in_one(k), in_one(v), lengths_k=LENGTHS).square().sum(), (k, v))
    torch.testing.assert_close(grads, truth)
    assert not any(g[[3, 4, 7]].any() for g in grads)
    assert all(g[5].any() for g in grads)


def test_the_call_compiles_in_one_graph() -> None:
    k, v = pools()
    q = torch.randn(3, 6, 1, 24)

    def call(q: Tensor, table: Tensor, lengths: Tensor) -> Any:
        return fastseq.attention(q, k, v, block_table=table, lengths_k=lengths)

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, TABLE, LENGTHS), call(q, TABLE, LENGTHS))


GOOD: dict[str, Any] = {"block_table": TABLE, "lengths_k": LENGTHS}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lengths_k": None}, "lengths_k is missing"),
    ({"cu_seqlens_k": torch.tensor([0, 1, 2, 3])}, "cu_seqlens_k cannot be given with block_table"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 2, 3])}, r"q must be \[total_q,Hq,D\]"),
    ({"block_table": TABLE[:2]}, r"block_table must be \[B,pages\] with B = 3, got \[2, 3\]"),
    ({"block_table": TABLE.float()}, "block_table must be int32 or int64"),
    ({"block_table": TABLE.tolist()}, "block_table must be an integer Tensor, got list"),
    ({"lengths_k": torch.tensor([41, 7, 49])}, r"lengths_k must lie in 0\.\.48"),
    ({"lengths_k": torch.tensor([41, 17, 32])}, r"pages from 0 to 8 .*, got -9 at \[1, 1\]"),
    ({"k": torch.randn(8, 16, 2, 24)}, "same number of pages and rows a page"),
    ({"k": torch.randn(9, 16, 2, 23)}, "same number of features"),
    ({"k": torch.randn(9, 16, 4, 24), "v": torch.randn(9, 16, 4, 17)}, "heads of k and v must divide"),
    ({"mask": torch.ones(3, 1, 5, 47, dtype=torch.bool)}, "mask .* does not broadcast"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    k, v = torch.randn(9, 16, 2, 24), torch.randn(9, 16, 2, 17)
    given = {"q": torch.randn(3, 6, 5, 24), "k": k, "v": v, **GOOD, **change}
    with pytest.raises((ArgumentError, TypeError), match=message):
        fastseq.attention(**given)

"""A sequence's bits do not depend on what else is in the batch, on its place there, or on the number of threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import needs_native
from torch import Tensor

import fastseq

pytestmark = needs_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def options_of(draw: random.Random, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": draw.random() < 0.6}
    if draw.random() < 0.3:
        options["window"] = (draw.choice([5, 100, 700]), draw.choice([0, 3]))
    if draw.random() < 0.3:
        options["softcap"] = 5.0
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(heads, dtype=dtype)
    if draw.random() < 0.3:
        options["alibi_slopes"] = torch.rand(heads, dtype=torch.promote_types(dtype, torch.float32))
    return options


def sequences(draw: random.Random, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """q [H, t, D], k, v of each sequence, lengths unlike."""
    keys, group, dim = draw.choice([1, 2]), draw.choice([1, 4]), draw.choice([16, 24, 64, 160])
    out = []
    for _ in range(draw.randint(2, 5)):
        t_q, t_k = draw.choice([1, 1, 2, 8, 9, 70]), draw.choice([1, 40, 300, 700, 2500])
        out.append(tuple(torch.randn(h, t, dim).to(dtype) for h, t in ((keys * group, t_q), (keys, t_k), (keys, t_k))))
    return out, keys * group  # type: ignore[return-value]


def padded(parts: list[Tensor]) -> Tensor:
    """[B, H, longest, D], junk past a length."""
    longest = max(x.shape[1] for x in parts)
    out = torch.full((len(parts), parts[0].shape[0], longest, parts[0].shape[2]), 7.5, dtype=parts[0].dtype)
    for row, x in zip(out, parts, strict=True):
        row[:, : x.shape[1]] = x
    return out


def lengths(parts: list[Tensor]) -> Tensor:
    return torch.tensor([x.shape[1] for x in parts])


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[total, H, D] and cu_seqlens."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths(parts).cumsum(0)]).int()
    return torch.cat([x.transpose(0, 1) for x in parts]), starts


def paged(parts: list[Tensor], page: int, table: Tensor) -> Tensor:
    pool = torch.full((int(table.max()) + 1, page, parts[0].shape[0], parts[0].shape[2]), 7.5, dtype=parts[0].dtype)
    for row, x in zip(table, parts, strict=True):
        for i in range(0, x.shape[1], page):
            pool[row[i // page], : min(page, x.shape[1] - i)] = x[:, i : i + page].transpose(0, 1)
    return pool


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(s, marks=pytest.mark.full) for s in range(24, 120))])
def test_results_are_those_of_the_sequence_alone(seed: int) -> None:
    """In every mode of torch, dense, packed or in pages."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 4]
    found, heads = sequences(draw, dtype)
    options = options_of(draw, heads, dtype)
    with threads(1):
        alone = [fastseq.attention(q[None], k[None], v[None], return_lse=True, **options) for q, k, v in found]
    for _ in range(2):
        order = draw.sample(range(len(found)), draw.randint(1, len(found)))
        q, k, v = ([found[b][i] for b in order] for i in range(3))
        with threads(draw.choice([1, 2, 3, 5])):
            o, lse = fastseq.attention(
                padded(q), padded(k), padded(v), lengths_q=lengths(q), lengths_k=lengths(k), return_lse=True, **options
            )
            (q_, cu_q), (k_, cu_k), (v_, _) = packed(q), packed(k), packed(v)
            cu = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
            o_packed, lse_packed = fastseq.attention(q_, k_, v_, return_lse=True, **cu, **options)
            pages = -(-max(x.shape[1] for x in k) // 32)
            table = torch.randperm(len(order) * pages).view(len(order), pages).int()
            cache = {"block_table": table, "lengths_k": lengths(k), "cu_seqlens_q": cu_q}
            o_paged, lse_paged = fastseq.attention(
                q_, paged(k, 32, table), paged(v, 32, table), return_lse=True, **cache, **options
            )
        for place, b in enumerate(order):
            n, rows = found[b][0].shape[1], slice(int(cu_q[place]), int(cu_q[place + 1]))
            for got, got_lse in (
                (o[place, :, :n], lse[place, :, :n]),
                (o_packed[rows].transpose(0, 1), lse_packed[:, rows]),
                (o_paged[rows].transpose(0, 1), lse_paged[:, rows]),
            ):
                assert torch.equal(alone[b][0][0], got)
                assert torch.equal(alone[b][1][0], got_lse)


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(s, marks=pytest.mark.full) for s in range(8, 40))])
def test_gradients_are_those_of_the_sequence_alone(seed: int, deterministic: None) -> None:
    """Under torch.use_deterministic_algorithms, for sequences of one length."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, batch, group = DTYPES[seed % 4], draw.randint(2, 4), draw.choice([1, 4])
    t_q, t_k = draw.choice([1, 3, 100]), draw.choice([1, 90, 700])
    given = [
        torch.randn(batch, h, t, 24).to(dtype) for h, t in ((2 * group, t_q), (2, t_k), (2, t_k), (2 * group, t_q))
    ]
    options = options_of(draw, 2 * group, dtype)

    def gradients(rows: slice) -> tuple[Tensor, ...]:
        *qkv, d_o = (x[rows] for x in given)
        leaves = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(fastseq.attention(*leaves, **options), leaves, d_o)

    with threads(draw.choice([2, 3, 5])):
        all_of_them = gradients(slice(None))
    for b in range(batch):
        for own, got in zip(gradients(slice(b, b + 1)), all_of_them, strict=True):
            assert torch.equal(own[0], got[b])

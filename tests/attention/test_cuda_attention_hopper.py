"""What the attention kernels for Hopper have alone, on the emulated machine: which calls they take, blocks that make
several tiles, tiles that reach into the next sequence, and faults planted in their pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attention_emulated
import devices
import pytest
import torch
from attention_emulated import SOURCES, hopper_order, hopper_refusal, settings
from attention_operators import arguments, dense, forward
from cuda_recurrent_support import emulation_only, missing
from emulation import build
from emulation.mutations import THREADS, Mutation, library, noticed
from torch import Tensor

from fastseq.attn.reference import attention as reference

pytestmark = [pytest.mark.device("native"), missing]


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with attention_emulated.emulating(9):
        yield


def why_not(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> str | None:
    """None on a GPU, which nobody can ask."""
    return hopper_refusal(q, k, v, *arguments(options)) if devices.DEVICE == "cpu" else None


@emulation_only
def test_which_calls_the_kernels_for_hopper_take() -> None:
    q, k, v = dense((2, 4, 2, 40, 70, 64, 40), torch.bfloat16)
    cu = {"cu_seqlens_q": torch.tensor([0, 40]).int(), "cu_seqlens_k": torch.tensor([0, 70]).int()}
    assert why_not(q, k, v) is None
    assert why_not(q, k, v, causal=True, bottom_right=False, window_left=3, sinks=torch.randn(4)) is None
    assert why_not(q, k, v, lengths_k=torch.tensor([3, 70])) is None
    assert why_not(*(x[0].transpose(0, 1) for x in (q, k, v)), **cu) is None
    assert why_not(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))) is None
    for q_, k_, v_, options, reason in (
        (q, k, v, {"mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, "single pairs"),
        (q, k, v, {"softcap": 1.0}, "single pairs"),
        (q, k, v, {"scale": -1.0}, "single pairs"),
        (q[..., :63], k[..., :63], v, {}, "16 bytes"),
        (q, torch.nn.functional.pad(k, (4, 4))[..., 4:-4], v, {}, "16 bytes"),
        (q, k[:, :1].expand(2, 2, 70, 64), v, {}, "broadcast"),
        (q, k, v[:1].expand(2, 2, 70, 40), {}, "broadcast"),
        (q, k[:, :, :0], v[:, :, :0], {}, "no keys"),
    ):
        assert reason in (why_not(q_, k_, v_, **options) or ""), reason
    settings.major = 10
    assert "9.0" in (why_not(q, k, v) or "")


@emulation_only
def test_what_is_taken_runs_in_another_kernel() -> None:
    """Which adds in another order: the last bits tell."""
    q, k, v = dense((1, 2, 1, 150, 390, 64, 64), torch.bfloat16)
    results = []
    for major in (8, 9, 10):
        settings.major = major
        results.append(forward(q, k, v, {"scale": 0.125}, "emulated"))
    portable, hopper, newer = results
    assert not torch.equal(hopper[0], portable[0])
    torch.testing.assert_close(hopper[0], portable[0], rtol=2**-6, atol=2**-8)
    assert all(map(torch.equal, newer, portable))


def truth(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference(q.double(), k.double(), v.double(), scale=0.125, **options)


def assert_near(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("multiprocessors", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_makes_many_tiles(causal: bool, multiprocessors: int) -> None:
    """In rounds that do not fill the grid, with tiles of keys more than there are buffers."""
    q, k, v = dense((2, 4, 2, 270, 700, 64, 64), torch.bfloat16)
    settings.multiprocessors, settings.schedule, settings.seed = multiprocessors, build.PRIORITY, multiprocessors
    assert why_not(q, k, v) is None
    assert_near(forward(q, k, v, {"scale": 0.125, "causal": causal}, "emulated"), truth(q, k, v, causal=causal))


# Batch, query and key heads, length, gradients of what, and the most that a block has of the mean.
EVEN = [
    (1, 64, 8, 8192, "", 1.01), (1, 64, 8, 8192, "keys", 1.01), (1, 64, 8, 8192, "queries", 1.01),
    (4, 64, 64, 2048, "", 1.01), (4, 64, 64, 2048, "keys", 1.04), (2, 16, 8, 4096, "", 1.01),
]  # fmt: skip


@emulation_only
@pytest.mark.parametrize(("batch", "heads_q", "heads_k", "length", "gradients_of", "most"), EVEN)
def test_the_longest_tiles_come_first_and_blocks_get_even_shares(
    batch: int, heads_q: int, heads_k: int, length: int, gradients_of: str, most: float
) -> None:
    """Under a causal limit, on the 132 multiprocessors of an H200. No number of the tensors is looked at."""
    q, k = (torch.zeros(64, dtype=torch.bfloat16).expand(batch, n, length, 64) for n in (heads_q, heads_k))
    settings.multiprocessors = 132
    blocks = hopper_order(q, k, k, *arguments({"causal": True}), gradients_of=gradients_of)
    tiles, heads = length // 128, batch * (heads_k if gradients_of == "keys" else heads_q)
    made = [tile for block in blocks for tile in block]
    assert sorted(made) == [(head, tile) for head in range(heads) for tile in range(tiles)]

    def work(tile: int) -> int:  # tiles of the other side that it meets
        return tiles - tile if gradients_of == "keys" else tile + 1

    shares = [sum(work(tile) for _, tile in block) for block in blocks]
    assert max(shares) <= most * sum(shares) / len(shares), max(shares) * len(shares) / sum(shares)
    seen: dict[int, int] = {}  # a head's tiles, round after round: none is longer than the one before it
    for n in range(max(map(len, blocks))):
        for head, tile in sorted((block[n] for block in blocks if n < len(block)), key=lambda made: -work(made[1])):
            assert work(tile) <= seen.get(head, tiles), (head, tile)
            seen[head] = work(tile)


@pytest.mark.parametrize("heads", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
def test_rows_without_keys_among_others(heads: tuple[int, int]) -> None:
    """More queries than keys, bottom right: whole tiles of rows see nothing, then rows of one tile."""
    q, k, v = dense((1, 2, 1, 260, 33, *heads), torch.float16)
    for sinks in (None, torch.tensor([0.5, -3.0])):
        options = {"causal": True, "sinks": sinks}
        got = forward(q, k, v, {"scale": 0.125, **options}, "emulated")
        assert not got[0][:, :, : 260 - 33].any()
        assert_near(got, truth(q, k, v, **options))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("heads", [(64, 64), (128, 128), (256, 256)], ids=str)
def test_a_tile_that_reaches_into_the_next_sequence_takes_nothing_from_there(
    heads: tuple[int, int], junk: float
) -> None:
    lengths_q, lengths_k = [70, 1, 0, 193], [65, 130, 9, 1]
    cu = {n: torch.tensor([0, *x]).cumsum(0).int() for n, x in (("q", lengths_q), ("k", lengths_k))}
    options = {"cu_seqlens_q": cu["q"], "cu_seqlens_k": cu["k"], "scale": 0.125}
    rows_q, rows_k = sum(lengths_q) + 3, sum(lengths_k) + 3
    sizes = (rows_q, 2, heads[0]), (rows_k, 1, heads[0]), (rows_k, 1, heads[1])
    q, k, v = (torch.randn(s).to(torch.bfloat16) for s in sizes)
    assert why_not(q, k, v, **options) is None
    o, lse = forward(q, k, v, options, "emulated")
    assert o.isfinite().all()
    for b in range(4):
        rows, keys = slice(*cu["q"][b : b + 2].tolist()), slice(*cu["k"][b : b + 2].tolist())
        others = [torch.full_like(x, junk) for x in (q, k, v)]
        for x, y, own in zip(others, (q, k, v), (rows, keys, keys), strict=True):
            x[own] = y[own]
        alone, alone_lse = forward(*others, options, "emulated")
        assert torch.equal(alone[rows], o[rows])
        assert torch.equal(alone_lse[:, rows], lse[:, rows])


FORWARD, TILE = "csrc/attention/cuda/hopper_forward.cu", "csrc/attention/cuda/hopper_tile.cuh"
V = "v_ring.full(), own.k_row + j0, h, b, "
FAULTS = [
    Mutation("k is read before it has come", FORWARD, "k_ring.wait_full();\n        take_turn", "take_turn"),
    Mutation("v is read before it has come", FORWARD, "v_ring.wait_full();\n      wg_fence", "wg_fence"),
    Mutation("q is read before it has come", FORWARD, "    q_ring.wait_full();\n", ""),
    Mutation("k's buffer is not released", FORWARD, "      k_ring.release();\n", ""),
    Mutation("v's buffer is released before the product", FORWARD, "      wg_wait<0>(numbers_of(acc));\n", ""),
    Mutation("s is read before the product", FORWARD, "        wg_wait<1>(numbers_of(s));\n", ""),
    Mutation(
        "p is overwritten before its product",
        FORWARD,
        "        weigh(j0, a);\n        finish_acc();\n",
        "        weigh(j0, a);\n        round_fragment<T>(p, s);\n        finish_acc();\n",
    ),
    Mutation("k's buffer is filled before it is empty", FORWARD, "        k_ring.wait_empty();\n", ""),
    Mutation("q's buffer is filled before o has left it", FORWARD, "      q_ring.wait_empty();\n", ""),
    Mutation("no fence before a product", FORWARD, "      wg_fence();\n      multiply_rows", "      multiply_rows"),
    Mutation("the next sequence's values are left", FORWARD, V + "end - j0,", V + "kUnlimited,"),
    Mutation("a turn is not passed on", FORWARD, "        pass_turn(group);\n", ""),
    Mutation(
        "no fence after zeros", TILE, "  fence_proxy_async();\n  sync_warp();\n  if", "  sync_warp();\n  if", (THREADS,)
    ),
    Mutation("a lane is left behind", TILE, "parity ^ 1);\n    sync_warp();", "parity ^ 1);"),
]


@emulation_only
@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Mutation) -> None:
    (by,) = fault.caught_by
    # ThreadSanitizer takes a later copy by TMA for a fence: for it there is one tile, and no copy after it.
    shape = (1, 1, 1, 30, 100, 64, 64) if by == THREADS else (2, 1, 1, 200, 390, 64, 64)
    q, k, v = dense(shape, torch.bfloat16)
    v[-1, :, 70:] = math.nan
    options = {"scale": 0.125, "lengths_k": torch.tensor([390, 70])[-shape[0] :]}
    settings.multiprocessors = 1
    expected = forward(q, k, v, options, "emulated")
    assert expected[0].isfinite().all()

    def run(kernels: build.Library, machine: dict[str, int]) -> str | None:
        settings.changed = kernels
        settings.schedule, settings.seed = machine["schedule"], machine["seed"]
        try:
            got = forward(q, k, v, options, "emulated")
        except RuntimeError as seen:
            return str(seen)
        return None if all(map(torch.equal, got, expected)) else "other bits"

    assert noticed(run, library(fault, SOURCES, "thread" if by == THREADS else "")), f"by {by}"

"""Which tiles the Triton attention visits, and in which order: fully masked ones never, the longest first."""

from __future__ import annotations

import math
from typing import Any

import devices
import pytest
import torch
import triton
import triton.language as tl
from attention_operators import Options, arguments, dense
from fastseq.kernels.attention import launch as attention_launch
from fastseq.kernels.attention.problem import Problem
from fastseq.kernels.attention.ranges import find_program
from torch import Tensor
from triton_support import needs_interpreter

from fastseq.attn.reference import visible_pairs

pytestmark = [
    needs_interpreter,
    pytest.mark.skipif(devices.KERNELS != "triton", reason="it is about the tiles of the Triton kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning"),
]

LIMITS: dict[str, Options] = {
    "causal": {"causal": True},
    "causal, top left": {"causal": True, "bottom_right": False},
    "window": {"window_left": 40, "window_right": 9},
    "window, top left": {"window_left": 20, "window_right": 5, "bottom_right": False},
    "causal window": {"causal": True, "window_left": 70},
    "lengths": {"lengths_q": [60], "lengths_k": [100], "causal": True},
    "prefix": {"causal": True, "bottom_right": False, "prefix_lengths": [70]},
    "causal with a bias": {"causal": True, "bias": True},
    "window with a bias, top left": {"window_left": 20, "bottom_right": False, "bias": True},
}


def blocks(q: Tensor, k: Tensor, v: Tensor, options: Options) -> dict[str, tuple[int, int]]:
    """Queries and keys of a tile, by kernel."""
    x = Problem(q, k, v, *arguments(options))
    o, lse = torch.empty(*q.shape[:-1], v.shape[-1]), torch.empty(attention_launch.row_sizes(x))
    out = attention_launch.allocate(x, options.get("bias") is not None)
    plans = [*attention_launch.plan_forward(x, o, lse), *attention_launch.plan_backward(x, o, o, lse, None, out)]
    made = {plan.kernel.__name__: plan.arguments for plan in plans if "BLOCK_N" in plan.arguments}
    if "attention_decode" in made:
        made["attention_decode"] = {**made["attention_decode"], "BLOCK_M": q.shape[2]}
    return {name.removeprefix("attention_"): (some["BLOCK_M"], some["BLOCK_N"]) for name, some in made.items()}


def shown(seen: Tensor, block_m: int, block_n: int) -> Tensor:
    """[tiles of queries, tiles of keys]: whether any of a tile's pairs is visible."""
    tall, wide = -(-seen.shape[0] // block_m) * block_m, -(-seen.shape[1] // block_n) * block_n
    padded = torch.zeros(tall, wide, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    return padded.view(tall // block_m, block_m, wide // block_n, block_n).any(3).any(1)


def spoiled(x: Tensor, tiles: Tensor, block: int) -> Tensor:
    """x [B,H,T,D] with NaN in the rows of ``tiles``: 0 times one of those is no 0."""
    rows = tiles.repeat_interleave(block)[: x.shape[2]]
    return x.masked_fill(rows[:, None], math.nan)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("name", "queries", "keys"),
    [("causal", 70, 130), ("window", 70, 130), ("window", 4, 130), ("lengths", 70, 130), ("lengths", 4, 130),
     ("prefix", 130, 130),
     # Keys that only queries past the last would see, and queries that only keys past the last would: the last tile of
     # the other side, which is not full, is no more theirs than any before it.
     ("causal, top left", 70, 130), ("window, top left", 130, 70),
     pytest.param("causal, top left", 64, 130, marks=FULL), pytest.param("causal window", 70, 130, marks=FULL),
     pytest.param("causal with a bias", 70, 130, marks=FULL),
     pytest.param("window with a bias, top left", 130, 70, marks=FULL)],
)  # fmt: skip
def test_a_tile_that_nobody_sees_is_never_visited(name: str, queries: int, keys: int) -> None:
    """What a tile of rows gets is the same when all that it is not to visit is NaN."""
    q, k, v = dense((1, 1, 1, queries, keys, 24, 16))
    options = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in LIMITS[name].items()}
    if "lengths_q" in options:
        options["lengths_q"] = options["lengths_q"].clamp(max=queries)
    if "bias" in options:
        options["bias"] = torch.randn(1, 1, queries, keys)
    _, found = visible_pairs(q, k, **options)
    assert found is not None
    seen = found.expand(1, 1, queries, keys)[0, 0]
    tiles = blocks(q, k, v, options)
    o, lse = attention_launch.forward(q, k, v, *arguments(options))
    d_o = torch.randn_like(o)

    def back(kernel: str, d_o: Tensor, q: Tensor, k: Tensor, v: Tensor) -> attention_launch.Gradients:
        x = Problem(q, k, v, *arguments(options))
        out = attention_launch.allocate(x, "bias" in options)
        for plan in attention_launch.plan_backward(x, o, d_o, lse, None, out):
            if plan.kernel.__name__ in ("attention_delta", f"attention_{kernel}"):
                plan.run()
        return out

    for kernel, (block_m, block_n) in tiles.items():
        hidden = ~shown(seen, block_m, block_n)
        assert hidden.any(), kernel
        clean = back(kernel, d_o, q, k, v)
        of_keys = kernel == "backward_keys"
        for n, away in enumerate(hidden.T if of_keys else hidden):
            own = slice(n * block_n, (n + 1) * block_n) if of_keys else slice(n * block_m, (n + 1) * block_m)
            if of_keys:
                got = back(kernel, spoiled(d_o, away, block_m), spoiled(q, away, block_m), k, v)
                pairs = [(got.dk, clean.dk), (got.dv, clean.dv)]
            elif kernel in ("forward", "decode"):
                far = (spoiled(x, away, block_n) for x in (k, v))
                pairs = list(zip(attention_launch.forward(q, *far, *arguments(options)), (o, lse), strict=True))
            else:
                got = back(kernel, d_o, q, spoiled(k, away, block_n), spoiled(v, away, block_n))
                pairs = [(got.dq, clean.dq)] if kernel == "backward_queries" else [(got.bias[0], clean.bias[0])]
            assert all(torch.equal(x[:, :, own], y[:, :, own]) for x, y in pairs), f"{kernel}, tile {n}"


@triton.jit(do_not_specialize=["call", "heads", "together"])
def programs(out, call, heads, together, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """Which (sequence, head, tile) each program has."""
    program = tl.program_id(0)
    b, h, tile = find_program(program, call, heads, together, BLOCK, OF_KEYS)
    tl.store(out + 3 * program, b)
    tl.store(out + 3 * program + 1, h)
    tl.store(out + 3 * program + 2, tile)


@pytest.mark.parametrize("of_keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("together", [1, 2, 4, 100])
def test_every_tile_has_one_program_and_the_longest_come_first(together: int, of_keys: bool) -> None:
    """In a group of heads that share the cache; under a causal limit the last queries see the most keys, and the first
    keys are seen by the most queries."""
    batch, heads, queries, keys, block = 2, 3, 70, 54, 16
    x: Any = Problem(*dense((batch, heads, heads, queries, keys, 16, 16)), *arguments({"causal": True}))
    visits = shown(torch.ones(queries, keys).tril(keys - queries).bool(), block, block).sum(0 if of_keys else 1)
    tiles = len(visits)
    out = torch.full((tiles * batch * heads, 3), -1, dtype=torch.int32)
    programs[(out.shape[0],)](out, x.call, heads, together, block, of_keys)
    order = out.tolist()
    assert sorted(order) == [[b, h, t] for b in range(batch) for h in range(heads) for t in range(tiles)]
    for first in range(0, batch * heads, together):
        group = order[first * tiles : (first + together) * tiles]
        lengths = [int(visits[t]) for _, _, t in group]
        assert len(set(lengths)) == tiles
        assert lengths == sorted(lengths, reverse=True)
        assert len({(b, h) for b, h, _ in group}) == min(together, batch * heads - first)

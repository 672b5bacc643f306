"""From tensors to kernel launches: attention forward and backward as plans that are run, or compiled without a device.

Nothing here waits for the device or looks at a tensor's values, so a call can be captured in a CUDA graph. Scratch is
linear in the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import (
    backward as attention_backward,
)
from . import (
    bias as attention_bias,
)
from . import (
    decode as attention_decode,
)
from . import (
    forward as attention,
)
from . import (
    tuning as tuning_attention,
)
from .layout import empty_as
from .problem import HALF_WIDEST, INTERPRETED, NARROWEST, PROGRAMS, Problem, power_of_two, with_unit_rows
from .problem import unsupported as unsupported
from .tiles import ROW_BLOCK as _ROW_BLOCK
from .tiles import Rows, hidden

ROW_BLOCK = _ROW_BLOCK.value  # queries a program of attention_delta
MERGED = 16  # splits that attention_merge takes at a time


class Plan(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        if self.grid > 0:
            launch = partial(self.kernel[(self.grid,)], **self.arguments, **self.options)
            if self.arguments.get("TMA"):
                copy_context().run(with_descriptors, launch)  # whatever allocator the user has set stays set
            else:
                launch()


def with_descriptors(launch: Callable[[], None]) -> None:
    """A launch whose programs make descriptors, which lie in memory of torch's: a CUDA graph can capture that."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    launch()


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def plan_forward(x: Problem, o: Tensor, lse: Tensor) -> Iterator[Plan]:
    """Launches that fill o and lse."""
    if x.few > 0:
        yield from plan_decode(x, o, lse)
        if not x.packed:
            return
    align = x.align(x.q, x.k, x.v, o)
    describable = x.describable(align, x.q, x.k, x.v)
    tile = x.tile("forward", describable)
    least = x.least_columns(align)
    if least > NARROWEST:  # addresses of plain loads take the registers of half a tile
        tile = tile._replace(block_n=min(tile.block_n, 64))
    tiles, heads, together = x.grid(False, tile.block_m)
    yield Plan(
        attention.attention_forward,
        min(tiles, tile.persistent * multiprocessors(x.q.device)) if tile.persistent else tiles,
        {
            "q": x.view(x.q, align), "k": x.view(x.k, align), "v": x.view(x.v, align), "o": x.view(o, align),
            "lse": x.row_view(lse), "call": x.call, "heads": heads, "together": together, "few": x.few,
            "tiles": tiles, **x.shared(least), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ALIGN": align,
            "FOLD": x.folds, "TMA": tile.tma and describable, "AHEAD": tile.ahead, "PERSISTENT": tile.persistent > 0,
        },
        options_of(tile),
    )  # fmt: skip


def plan_decode(x: Problem, o: Tensor, lse: Tensor) -> Iterator[Plan]:
    """Launches that fill o and lse of the sequences of few queries: splits of the keys, and what merges them."""
    align = x.align(x.q, x.k, x.v)
    describable = x.describable(align, x.k, x.v)
    tile = x.tile("decode", describable)
    rows = x.batch * x.heads * x.few
    splits, least = x.splits(tile.block_n, tile.programs)
    o_split = torch.empty((rows, splits, x.dim_v), dtype=torch.float32, device=o.device)
    lse_split = torch.empty((rows, splits), dtype=torch.float32, device=o.device)
    yield Plan(
        attention_decode.attention_decode,
        x.batch * x.heads_k * splits,
        {
            "q": x.view(x.q, align), "k": x.view(x.k, align), "v": x.view(x.v, align), "o": o_split, "lse": lse_split,
            "call": x.call, "heads_k": x.heads_k, "queries": x.few, "splits": splits, "least": least, **x.shared(),
            "BLOCK_M": max(tile.block_m, power_of_two(x.heads // x.heads_k * x.few)), "BLOCK_N": tile.block_n,
            "ALIGN": align, "FOLD": x.folds, "TMA": tile.tma and describable,
        },
        options_of(tile),
    )  # fmt: skip
    yield Plan(
        attention_decode.attention_merge,
        rows,
        {
            "o_split": o_split, "lse_split": lse_split, "o": x.view(o, 1), "lse": x.row_view(lse), "call": x.call,
            "heads": x.heads, "queries": x.few, "splits": splits, "DV": x.dim_v, "BLOCK_DV": x.columns()["BLOCK_DV"],
            "CHUNK": MERGED, "WIDEN": INTERPRETED,
        },
        {"num_warps": 4, "num_stages": 1},
    )  # fmt: skip


def options_of(tile: tuning_attention.Tile) -> dict[str, int]:
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **limit}


class Gradients(NamedTuple):
    """What the backward pass fills. Scratch: the three of Rows; sinks [tiles, Hq]; bias [splits, bias's own sizes]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    log: Tensor
    delta: Tensor
    share: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    splits: int


def plan_backward(
    x: Problem, o: Tensor, d_o: Tensor, lse: Tensor, dlse: Tensor | None, out: Gradients
) -> Iterator[Plan]:
    """Launches that fill ``out``, to run in this order."""
    align = x.align(x.q, x.k, x.v, o, d_o, out.dq, out.dk, out.dv)
    q, k, v, d_view = (x.view(t, align) for t in (x.q, x.k, x.v, d_o))
    scratch = Rows(out.log, out.delta, out.share, hidden(out.log.shape[-1] // ROW_BLOCK))
    grid, heads, together = x.grid(False, ROW_BLOCK)
    if not x.empty:
        yield Plan(
            attention_backward.attention_delta,
            grid,
            {
                "o": x.view(o, align), "d_o": d_view, "lse": x.row_view(lse),
                "scratch": scratch, "call": x.call, "heads": heads, "together": together,
                "DV": x.dim_v, "BLOCK_DV": min(x.columns()["BLOCK_DV"], 128 // o.element_size()), "ALIGN": align,
            },
            {"num_warps": 16, "num_stages": 1},
        )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v, "d_o": d_view, "scratch": scratch, "call": x.call}
    keys: list[dict[str, Tensor | None]] = [{"dk": out.dk, "dv": out.dv}]
    wide = max(x.dim, x.dim_v) * x.q.element_size() > 2 * HALF_WIDEST  # both sums are more than a program's registers
    if wide:
        keys = [{"dk": out.dk, "dv": None}, {"dk": None, "dv": out.dv}]
    launches: list[tuple[str, Any, bool, dict[str, Tensor | None]]] = [
        ("backward_queries", attention_backward.attention_backward_queries, False, {"dq": out.dq}),
        *(("backward_keys", attention_backward.attention_backward_keys, True, some) for some in keys),
    ]
    for role, kernel, of_keys, results in launches:
        describable = x.describable(align, x.q, d_o) if of_keys else x.describable(align, x.k, x.v)
        tile = x.tile(role, describable)
        alone = x.dtype == torch.float32 and results.get("dk", out.dq) is None  # dv
        if alone and not (x.packed and x.dim_v <= 128) and x.machine in ("sm_80", "sm_90", "sm_100"):
            tile = tile._replace(registers=255)  # ptxas would spill some to fit programs in, of dk not
        grid, heads, together = x.grid(of_keys, tile.block_n if of_keys else tile.block_m)
        yield Plan(
            kernel,
            grid,
            {
                **inputs, **{name: None if t is None else x.view(t, align) for name, t in results.items()},
                **({} if of_keys else {"dlse": None if dlse is None else x.row_view(dlse)}),
                "heads": heads, "together": together, **x.shared(), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
                "ALIGN": align, "TMA": tile.tma and describable,
            },
            options_of(tile),
        )  # fmt: skip
    if out.sinks is not None and not x.empty:
        grid, heads, together = x.grid(False, ROW_BLOCK)
        yield Plan(
            attention_backward.attention_backward_sinks,
            grid,
            {"scratch": scratch, "dsinks": out.sinks, "call": x.call, "heads": heads, "together": together},
            {"num_warps": 4, "num_stages": 1},
        )
    if out.bias is not None and not x.empty:
        yield plan_bias(x, inputs, align, out)


def plan_bias(x: Problem, inputs: dict[str, Any], align: int, out: Gradients) -> Plan:
    assert x.bias is not None
    assert out.bias is not None
    tile = x.tile("backward_bias")
    own, sums, tiles = bias_tiles(x)
    return Plan(
        attention_bias.attention_backward_bias,
        own * out.splits,
        {
            **inputs, "dbias": out.bias, "heads": x.heads, "sum_batch": x.batch if sums[0] else 1,
            "sum_heads": x.heads if sums[1] else 1, "tiles_i": tiles[0], "tiles_j": tiles[1],
            "size": x.bias.numel(), "splits": out.splits, "SUM_I": sums[2], "SUM_J": sums[3], **x.shared(),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ALIGN": align,
        },
        options_of(tile),
    )  # fmt: skip


def bias_tiles(x: Problem) -> tuple[int, list[bool], tuple[int, int]]:
    """Tiles that the bias itself has; which of its dimensions are sums; tiles of queries and of keys."""
    assert x.bias is not None
    tile = x.tile("backward_bias")
    tiles = (-(-x.length_q // tile.block_m), -(-x.length_k // tile.block_n))
    sums = [n == 1 for n in x.bias.shape]
    counts = (x.batch, x.heads, *tiles)
    return math.prod(1 if s else n for s, n in zip(sums, counts, strict=True)), sums, tiles


def bias_splits(x: Problem) -> int:
    """Programs that share a tile of the bias: enough to fill the machine, never more than there is work for."""
    own, _, tiles = bias_tiles(x)
    terms = x.batch * x.heads * tiles[0] * tiles[1] // max(own, 1)
    return max(1, min(terms, PROGRAMS // max(own, 1)))


def run(plans: Iterator[Plan], device: torch.device) -> None:
    """Launch on ``device``, which need not be the current one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        for plan in plans:
            plan.run()


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Arguments and results as the operator ``attention_forward``; but with a block_table k and v are pools of pages
    [P,Hk,page,D] and [P,Hk,page,Dv]."""
    x = Problem(q, k, v, *options)
    o = empty_as(q, v.shape[-1])
    lse = torch.empty(row_sizes(x), dtype=torch.float32, device=q.device)
    if not x.empty:
        run(plan_forward(x, o, lse), q.device)
    return o, lse


def row_sizes(x: Problem) -> tuple[int, ...]:
    return (x.heads, x.length_q) if x.packed else (x.batch, x.heads, x.length_q)


def backward(
    d_o: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """Arguments and results as the operator ``attention_backward``."""
    *options_, bias_grad = options
    x = Problem(q, k, v, *options_)
    if o.shape != d_o.shape or o.dtype != d_o.dtype or o.dtype != q.dtype or lse.shape != row_sizes(x):
        raise RuntimeError("attention: o, its gradient and lse must be as the forward pass gave them")
    out = allocate(x, bias_grad)
    dlse = None if dlse is None else dlse.contiguous()
    run(plan_backward(x, with_unit_rows(o), with_unit_rows(d_o), lse.contiguous(), dlse, out), q.device)
    dbias, dsinks = q.new_empty(0), q.new_empty(0)
    if out.bias is not None:
        assert x.bias is not None
        if x.empty:
            out.bias.zero_()
        dbias = (out.bias[0] if out.splits == 1 else out.bias.sum(0)).to(x.bias.dtype)
    if out.sinks is not None:
        dsinks = out.sinks.sum(0).to(x.call.sinks.dtype)  # type: ignore[attr-defined]
    return out.dq, out.dk, out.dv, dbias, dsinks


def allocate(x: Problem, bias_grad: bool, empty: Callable[..., Tensor] = torch.empty) -> Gradients:
    device = x.q.device
    dq, dk, dv = (empty_as(t, t.shape[-1], empty) for t in (x.q, x.k, x.v))
    size = (x.length_q // ROW_BLOCK + x.batch + 1 if x.packed else -(-x.length_q // ROW_BLOCK)) * ROW_BLOCK
    log, delta, share = (empty((*row_sizes(x)[:-1], size), dtype=torch.float32, device=device) for _ in range(3))
    sinks = bias = None
    splits = 1
    if x.call.sinks is not None:
        tiles = x.grid(False, ROW_BLOCK)[0] // max(x.heads, 1)
        # A packed batch has more slots than tiles, and those left over are nobody's.
        make = torch.zeros if x.packed or x.empty else empty
        sinks = make((tiles, x.heads), dtype=torch.float32, device=device)
    if x.bias is not None and bias_grad:
        splits = bias_splits(x)
        dtype = x.bias.dtype if splits == 1 else torch.float32
        bias = empty((splits, *x.bias.shape), dtype=dtype, device=device)
    return Gradients(dq, dk, dv, log, delta, share, sinks, bias, splits)

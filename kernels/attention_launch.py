"""From tensors to kernel launches: attention forward and backward as plans that are run, or compiled without a device.

Nothing here waits for the device or looks at a tensor's values, so a call can be captured in a CUDA graph. Scratch is
linear in the lengths. Lengths, strides and batch are run-time arguments: a kernel is compiled anew only for another
dtype, head dimension or set of features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import attention, attention_backward, attention_bias, attention_decode, tuning_attention
from .attention_scores import ROW_BLOCK as _ROW_BLOCK
from .attention_scores import Call, Rows, View, hidden

INTERPRETED = bool(triton.knobs.runtime.interpret)

LOG2E = 1.4426950408889634
DROP_NONE = 1 << 39  # makes each threshold a number of 64 bits; the kernel takes the lower 32
UNLIMITED = 1 << 28  # no distance between two positions is larger
L2_BYTES = 32 << 20  # what programs that run together should read no more of than this, to find it in the cache again
PROGRAMS = 512  # about what fills a large machine
DECODE_QUERIES = 16  # up to so many, and DECODE_ROWS in a group of heads, attention is decoding
DECODE_ROWS = 64
FIXED_SPLIT = 512  # keys a split under torch.use_deterministic_algorithms
ROW_BLOCK = _ROW_BLOCK.value  # queries a program of attention_delta
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256


def unsupported(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """Why these kernels cannot run on heads of ``dim`` and ``dim_v`` features; None where they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, not in {dtype}"
    if max(dim, dim_v) > WIDEST:
        return f"the Triton kernels take up to {WIDEST} features a head, got {dim} and {dim_v}"
    return None


class Plan(NamedTuple):
    """One kernel launch."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        if self.grid > 0:
            self.kernel[(self.grid,)](**self.arguments, **self.options)


class Problem:
    """The tensors of a call laid out as the kernels want them: rows of unit stride, and everything else by strides."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor,
        bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
        lengths_q: Tensor | None, lengths_k: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
        seed: Tensor | None, scale: float, causal: bool, bottom_right: bool, window_left: int, window_right: int,
        softcap: float, dropout_p: float, machine: str | None = None,
    ) -> None:  # fmt: skip
        self.packed = cu_seqlens_q is not None
        self.machine = tuning_attention.architecture(q) if machine is None else machine
        self.q, self.k, self.v = with_unit_rows(q), with_unit_rows(k), with_unit_rows(v)
        rows, keys = (0, 0) if self.packed else (2, 2)
        self.heads, self.heads_k, self.length_q, self.length_k = q.shape[1], k.shape[1], q.shape[rows], k.shape[keys]
        self.dim, self.dim_v, self.dtype = q.shape[-1], v.shape[-1], q.dtype
        self.batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.bias, self.scale = bias, float(scale)
        self.check(bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, cu_seqlens_q, cu_seqlens_k, seed, dropout_p)
        right = min(window_right if window_right >= 0 else UNLIMITED, 0 if causal else UNLIMITED)
        self.call = Call(
            batch=hidden(self.batch),
            group=hidden(self.heads // max(self.heads_k, 1)),
            length_q=hidden(self.length_q),
            length_k=hidden(self.length_k),
            cu_q=None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            cu_k=None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
            lengths_q=None if lengths_q is None else lengths_q.contiguous(),
            lengths_k=None if lengths_k is None else lengths_k.contiguous(),
            bottom_right=hidden(int(bottom_right)),
            left=hidden(min(window_left, UNLIMITED)) if window_left >= 0 else None,
            right=hidden(right) if right < UNLIMITED else None,
            scale=self.scale,
            cap_in=scale / softcap if softcap > 0.0 else None,
            cap_out=softcap * LOG2E if softcap > 0.0 else None,
            pairs=None if bias is None and mask is None else 1,
            **pairs_of("bias", bias),
            **pairs_of("mask", None if mask is None else mask.view(torch.int8)),
            alibi=None if alibi_slopes is None else alibi_slopes.contiguous(),
            sinks=None if sinks is None else sinks.contiguous(),
            seed=seed if dropout_p > 0.0 else None,
            threshold=hidden(DROP_NONE + min(int(dropout_p * 4294967296.0), 0xFFFFFFFF)) if dropout_p > 0.0 else None,
            kept_scale=(1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0) if dropout_p > 0.0 else None,
        )

    def check(
        self, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
        lengths_q: Tensor | None, lengths_k: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
        seed: Tensor | None, dropout_p: float,
    ) -> None:  # fmt: skip
        """Refuses what would make a kernel read past a tensor's end, as far as shapes tell."""
        q, k, v = self.q, self.k, self.v
        reason = unsupported(q.dtype, self.dim, self.dim_v)
        if reason is not None:
            raise RuntimeError(f"attention: {reason}")
        rank = 3 if self.packed else 4
        if not (q.dim() == k.dim() == v.dim() == rank and q.dtype == k.dtype == v.dtype):
            raise RuntimeError(f"attention: q, k and v must have {rank} dimensions and one dtype")
        length = 0 if self.packed else 2
        if v.shape[1] != self.heads_k or v.shape[length] != self.length_k or k.shape[-1] != self.dim:
            raise RuntimeError("attention: k and v differ in heads or length, or q and k in features")
        if self.heads % max(self.heads_k, 1) != 0 or (self.heads_k == 0 and self.heads > 0):
            raise RuntimeError(f"attention: {self.heads} query heads cannot share {self.heads_k} key heads")
        if not self.packed and not (k.shape[0] == v.shape[0] == self.batch):
            raise RuntimeError("attention: q, k and v differ in batch size")
        if (cu_q is None) != (cu_k is None):
            raise RuntimeError("attention: cu_seqlens_q and cu_seqlens_k come together")
        dense_only = (bias, mask, lengths_q, lengths_k)
        if self.packed and any(x is not None for x in dense_only):
            raise RuntimeError("attention: bias, mask and lengths belong to the padded layout, not to cu_seqlens")
        vectors = {
            "lengths_q": (lengths_q, torch.int64, self.batch),
            "lengths_k": (lengths_k, torch.int64, self.batch),
            "cu_seqlens_q": (cu_q, torch.int32, self.batch + 1),
            "cu_seqlens_k": (cu_k, torch.int32, self.batch + 1),
            "alibi_slopes": (alibi_slopes, torch.float32, self.heads),
            "sinks": (sinks, None, self.heads),
        }
        for name, (x, dtype, size) in vectors.items():
            if x is not None and (x.shape != (size,) or (dtype is not None and x.dtype != dtype)):
                raise RuntimeError(f"attention: {name} must be {dtype or 'floating'} of shape [{size}]")
        shape = (self.batch, self.heads, self.length_q, self.length_k)
        for name, pairs in (("bias", bias), ("mask", mask)):
            if pairs is None:
                continue
            fits = pairs.dim() == 4 and all(n in (1, m) for n, m in zip(pairs.shape, shape, strict=True))
            if not fits or (
                pairs.dtype != torch.bool if name == "mask" else pairs.dtype not in (q.dtype, torch.float32)
            ):
                raise RuntimeError(f"attention: {name} {list(pairs.shape)} must broadcast to {list(shape)}")
        if dropout_p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64):
            raise RuntimeError("attention: dropout_p > 0 needs a seed, an int64 tensor of shape [1]")

    @property
    def empty(self) -> bool:
        return (self.batch == 0 and not self.packed) or self.heads == 0 or self.length_q == 0

    @property
    def decodes(self) -> bool:
        """Whether the queries are so few that splits of the keys are what keeps the machine busy."""
        rows = self.length_q * (self.heads // max(self.heads_k, 1))
        return not self.packed and self.length_q <= DECODE_QUERIES and rows <= DECODE_ROWS

    def split_keys(self, block: int) -> int:
        """Keys a split, a multiple of ``block``: enough splits to fill the machine, or always as many keys."""
        if torch.are_deterministic_algorithms_enabled():
            return FIXED_SPLIT
        wanted = max(1, PROGRAMS // max(1, self.batch * self.heads_k))
        return max(2, -(-self.length_k // (wanted * block))) * block

    @property
    def folds(self) -> bool:
        """Whether the scale may be multiplied after the maximum is taken: it is positive, and nothing comes between."""
        call = self.call
        return self.scale > 0.0 and call.cap_in is None and call.bias is None and call.alibi is None

    def tile(self, role: str) -> tuning_attention.Tile:
        call = self.call
        by_pair = (call.bias, call.mask, call.alibi, call.cap_in, call.seed)
        pairs = any(x is not None for x in by_pair)
        return tuning_attention.tile(self.machine, role, self.dtype, max(self.dim, self.dim_v), pairs)

    def align(self, *tensors: Tensor) -> int:
        """How many elements every row of these begins at a multiple of: what 16 bytes hold, or 1."""
        unit = 16 // tensors[0].element_size()
        for x in tensors:
            if x.data_ptr() % 16 != 0 or any(
                n > 1 and s % unit for n, s in zip(x.shape[:-1], x.stride(), strict=False)
            ):
                return 1
        return unit

    def view(self, x: Tensor, align: int) -> View:
        """[B,H,T,D] or packed [T,H,D], strides in units of ``align``."""
        first, second, third = (hidden(s // align) for s in x.stride()[:3])
        return View(x, hidden(0), second, first) if self.packed else View(x, first, second, third)

    def row_view(self, x: Tensor) -> View:
        """[B,H,T] or packed [H,T], contiguous."""
        strides = [hidden(s) for s in x.stride()]
        return View(x, hidden(0), *strides) if self.packed else View(x, *strides)

    def columns(self) -> dict[str, int]:
        """D as two powers of two, the second 0 where one is as good; and DV as one."""
        whole = max(16, power_of_two(self.dim))
        first, second = whole, 0
        if whole > 64 and self.dim <= whole // 2 + whole // 4:
            first = whole // 2
            second = max(16, power_of_two(self.dim - first))
        return {"D": self.dim, "DV": self.dim_v, "D1": first, "D2": second,
                "BLOCK_DV": max(16, power_of_two(self.dim_v))}  # fmt: skip

    def shared(self) -> dict[str, Any]:
        """The constants that all kernels of products take."""
        exact = self.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
        return {**self.columns(), "PRECISION": "ieee" if exact else "tf32", "WIDEN": INTERPRETED}

    def grid(self, of_keys: bool, block: int) -> tuple[int, int, int]:
        """(programs, heads, heads that run together) of a kernel over tiles of queries or of keys."""
        length, heads = (self.length_k, self.heads_k) if of_keys else (self.length_q, self.heads)
        group = self.heads // max(self.heads_k, 1)
        bytes_of_head = (self.length_q if of_keys else self.length_k) * (self.dim + self.dim_v) * self.q.element_size()
        at_once = max(1, L2_BYTES // max(1, bytes_of_head))
        together = max(1, at_once // group) if of_keys else at_once * group
        if self.packed:
            return (length // block + self.batch + 1) * heads, heads, together
        return -(-length // block) * self.batch * heads, heads, together


def with_unit_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def pairs_of(name: str, x: Tensor | None) -> dict[str, Any]:
    """The fields of :class:`Call` that describe a bias or a mask."""
    batch: int | None = None
    head: int | None = None
    row: int | None = None
    step: int | None = None
    if x is not None:
        strides = [0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
        batch, head, row, step = (hidden(s) for s in strides)
        row, step = row if strides[2] else None, None if strides[3] == 1 else step
    return {name: x, f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row, f"{name}_step": step}


def plan_forward(x: Problem, o: Tensor, lse: Tensor) -> Iterator[Plan]:
    """Launches that fill o and lse."""
    if x.decodes:
        yield from plan_decode(x, o, lse)
        return
    tile = x.tile("forward")
    grid, heads, together = x.grid(False, tile.block_m)
    align = x.align(x.q, x.k, x.v, o)
    call = x.call
    yield Plan(
        attention.attention_forward,
        grid,
        {
            "q": x.view(x.q, align), "k": x.view(x.k, align), "v": x.view(x.v, align), "o": x.view(o, align),
            "lse": x.row_view(lse), "call": call, "heads": heads, "together": together, **x.shared(),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ALIGN": align, "FOLD": x.folds,
        },
        options_of(tile),
    )  # fmt: skip


def plan_decode(x: Problem, o: Tensor, lse: Tensor) -> Iterator[Plan]:
    """Launches that fill o and lse for few queries: splits of the keys, and what merges them."""
    tile = x.tile("decode")
    rows = x.batch * x.heads * x.length_q
    size = x.split_keys(tile.block_n)
    splits = max(1, -(-x.length_k // size))
    o_split = torch.empty((rows, splits, x.dim_v), dtype=torch.float32, device=o.device)
    lse_split = torch.empty((rows, splits), dtype=torch.float32, device=o.device)
    align = x.align(x.q, x.k, x.v)
    yield Plan(
        attention_decode.attention_decode,
        x.batch * x.heads_k * splits,
        {
            "q": x.view(x.q, align), "k": x.view(x.k, align), "v": x.view(x.v, align), "o": o_split, "lse": lse_split,
            "call": x.call, "heads_k": x.heads_k, "splits": splits, "split_keys": size, **x.shared(),
            "BLOCK_M": max(tile.block_m, power_of_two(x.heads // x.heads_k * x.length_q)), "BLOCK_N": tile.block_n,
            "ALIGN": align, "FOLD": x.folds,
        },
        options_of(tile),
    )  # fmt: skip
    yield Plan(
        attention_decode.attention_merge,
        rows,
        {
            "o_split": o_split, "lse_split": lse_split, "o": o, "lse": lse, "call": x.call, "heads": x.heads,
            "splits": splits, "DV": x.dim_v, "BLOCK_DV": x.columns()["BLOCK_DV"], "WIDEN": INTERPRETED,
        },
        {"num_warps": 1, "num_stages": 1},
    )  # fmt: skip


def options_of(tile: tuning_attention.Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


class Gradients(NamedTuple):
    """What the backward pass fills. Scratch: the two of Rows; sinks [tiles, Hq]; bias [splits, bias's own sizes]."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    log: Tensor
    delta: Tensor
    sinks: Tensor | None
    bias: Tensor | None
    splits: int


def plan_backward(
    x: Problem, o: Tensor, d_o: Tensor, lse: Tensor, dlse: Tensor | None, out: Gradients
) -> Iterator[Plan]:
    """Launches that fill ``out``, to run in this order."""
    align = x.align(x.q, x.k, x.v, o, d_o, out.dq, out.dk, out.dv)
    q, k, v, d_view = (x.view(t, align) for t in (x.q, x.k, x.v, d_o))
    scratch = Rows(out.log, out.delta, hidden(out.log.shape[-1] // ROW_BLOCK))
    grid, heads, together = x.grid(False, ROW_BLOCK)
    if not x.empty:
        yield Plan(
            attention_backward.attention_delta,
            grid,
            {
                "o": x.view(o, align), "d_o": d_view, "lse": x.row_view(lse),
                "dlse": None if dlse is None else x.row_view(dlse), "scratch": scratch, "dsinks": out.sinks,
                "call": x.call, "heads": heads, "together": together,
                "DV": x.dim_v, "BLOCK_DV": x.columns()["BLOCK_DV"], "ALIGN": align,
            },
            {"num_warps": 16, "num_stages": 1},
        )  # fmt: skip
    inputs = {"q": q, "k": k, "v": v, "d_o": d_view, "scratch": scratch, "call": x.call}
    for role, kernel, of_keys, results in (
        ("backward_keys", attention_backward.attention_backward_keys, True, {"dk": out.dk, "dv": out.dv}),
        ("backward_queries", attention_backward.attention_backward_queries, False, {"dq": out.dq}),
    ):
        tile = x.tile(role)
        grid, heads, together = x.grid(of_keys, tile.block_n if of_keys else tile.block_m)
        yield Plan(
            kernel,
            grid,
            {
                **inputs, **{name: x.view(t, align) for name, t in results.items()}, "heads": heads,
                "together": together, **x.shared(), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "ALIGN": align,
            },
            options_of(tile),
        )  # fmt: skip
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
    """Arguments and results as the operator ``attention_forward``."""
    x = Problem(q, k, v, *options)
    o = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
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
    dq, dk, dv = (empty(t.shape, dtype=x.dtype, device=device) for t in (x.q, x.k, x.v))
    size = (x.length_q // ROW_BLOCK + x.batch + 1 if x.packed else -(-x.length_q // ROW_BLOCK)) * ROW_BLOCK
    log, delta = (empty((*row_sizes(x)[:-1], size), dtype=torch.float32, device=device) for _ in range(2))
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
    return Gradients(dq, dk, dv, log, delta, sinks, bias, splits)

"""The tensors of an attention call, laid out and checked as the kernels want them; what a kernel is compiled for.

Nothing here waits for the device or looks at a tensor's values. Lengths, strides and batch are run-time arguments: a
kernel is compiled anew only for another dtype, head dimension or set of features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..precision import one_tf32_product
from . import tuning as tuning_attention
from .layout import laid_out_as
from .tiles import Pages, Pairs, View, hidden

INTERPRETED = bool(triton.knobs.runtime.interpret)

LOG2E = 1.4426950408889634
DROP_NONE = 1 << 39  # makes each threshold a number of 64 bits; the kernel takes the lower 32
UNLIMITED = 1 << 28  # no distance between two positions is larger
L2_BYTES = 32 << 20  # what programs that run together should read no more of than this, to find it in the cache again
PROGRAMS = 512  # about what fills a large machine
DECODE_QUERIES = 16  # up to so many, and DECODE_ROWS in a group of heads, attention is decoding
DECODE_ROWS = 64
DECODE_TILE = 16  # rows of a packed batch's decoding tile, where the heads that share a key are fewer
DECODE_MEAN = 128  # a packed batch of more queries a sequence than this is taken to have no short one
FIXED_SPLITS = 32  # splits of a sequence under torch.use_deterministic_algorithms,
FIXED_LEAST = 256  # and the keys that one has at least: a multiple of every tile
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = tuning_attention.WIDTHS[-1]
NARROWEST = 16  # columns that one product takes at least
ALIKE = 64  # columns of 16 bits from which on every tile has the same layout in the shared memory of sm_90
HALF_WIDEST = 256  # features that one product takes at most; and a head of float32, for want of shared memory


class Call(NamedTuple):
    """What a call asks for. Fields are run-time numbers (whole ones :func:`hidden`), pointers, or
    None for a feature that is off."""

    batch: object
    group: object  # query heads that share a key head
    length_q: object  # Tq; packed: rows of q in all
    length_k: object
    cu_q: object  # int32 [B+1]
    cu_k: object
    lengths_q: object  # int64 [B]
    lengths_k: object
    prefix: object  # int64 [B]: keys that every query sees, whatever left and right
    bottom_right: object  # 0 or 1
    left: object  # keys j >= i + shift - left
    right: object  # keys j <= i + shift + right; causal is 0
    scale: object
    cap_in: object  # scale / softcap
    cap_out: object  # softcap * log2(e)
    pairs: object  # 1 where there is a bias or a mask
    bias: object  # Pairs
    mask: object  # Pairs of int8
    pages: object  # Pages
    alibi: object  # float32 [Hq]
    sinks: object  # [Hq]
    seed: object  # int64 [1]
    threshold: object  # a weight whose word is below is dropped
    kept_scale: object  # 1 / (1 - dropout_p)


def unsupported(dtype: torch.dtype, dim: int, dim_v: int) -> str | None:
    """Why these kernels cannot run on heads of ``dim`` and ``dim_v`` features; None where they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels compute in float32, not in {dtype}"
    widest = WIDEST if dtype != torch.float32 else HALF_WIDEST
    if max(dim, dim_v) > widest:
        return f"the Triton kernels take up to {widest} features a head in {dtype}, got {dim} and {dim_v}"
    return None


class Problem:
    """A call: rows of unit stride, and everything else by strides. With ``block_table`` k and v are pools
    [pages, Hk, rows a page, D], and ``length_k`` is what the table has room for."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor,
        bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
        lengths_q: Tensor | None, lengths_k: Tensor | None, prefix_lengths: Tensor | None,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, block_table: Tensor | None,
        k_scale: Tensor | None, v_scale: Tensor | None, seed: Tensor | None, scale: float, causal: bool,
        bottom_right: bool, window_left: int, window_right: int, softcap: float, dropout_p: float,
        machine: str | None = None,
    ) -> None:  # fmt: skip
        if not (k_scale is v_scale is None):
            raise RuntimeError("attention: the Triton kernels read no int8 keys (k_scale)")
        self.packed, self.paged = cu_seqlens_q is not None, block_table is not None
        self.machine = tuning_attention.architecture(q) if machine is None else machine
        self.q, self.k, self.v = with_unit_rows(q), with_unit_rows(k), with_unit_rows(v)
        self.dim, self.dim_v, self.dtype = q.shape[-1], v.shape[-1], q.dtype
        self.heads, self.heads_k = q.shape[1], k.shape[1]
        self.length_q, self.length_k = q.shape[-3 if self.packed else -2], k.shape[-2 if k.dim() == 4 else -3]
        if block_table is not None:
            self.length_k = block_table.shape[-1] * k.shape[2]
        self.batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        self.bias, self.scale = bias, float(scale)
        self.check(
            bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, prefix_lengths, cu_seqlens_q, cu_seqlens_k, seed,
            dropout_p, block_table,
        )  # fmt: skip
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
            prefix=None if prefix_lengths is None else prefix_lengths.contiguous(),
            bottom_right=hidden(int(bottom_right)),
            left=hidden(min(window_left, UNLIMITED)) if window_left >= 0 else None,
            right=hidden(right) if right < UNLIMITED else None,
            scale=self.scale,
            cap_in=scale / softcap if softcap > 0.0 else None,
            cap_out=softcap * LOG2E if softcap > 0.0 else None,
            pairs=None if bias is None and mask is None else 1,
            bias=pairs_of(bias),
            mask=pairs_of(None if mask is None else mask.view(torch.int8)),
            pages=pages_of(block_table, self.k),
            alibi=None if alibi_slopes is None else alibi_slopes.contiguous(),
            sinks=None if sinks is None else sinks.contiguous(),
            seed=seed if dropout_p > 0.0 else None,
            threshold=hidden(DROP_NONE + min(int(dropout_p * 4294967296.0), 0xFFFFFFFF)) if dropout_p > 0.0 else None,
            kept_scale=(1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0) if dropout_p > 0.0 else None,
        )

    def check(
        self, bias: Tensor | None, mask: Tensor | None, sinks: Tensor | None, alibi_slopes: Tensor | None,
        lengths_q: Tensor | None, lengths_k: Tensor | None, prefix_lengths: Tensor | None,
        cu_q: Tensor | None, cu_k: Tensor | None,
        seed: Tensor | None, dropout_p: float, block_table: Tensor | None,
    ) -> None:  # fmt: skip
        """Refuses what would make a kernel read past a tensor's end, as far as shapes tell."""
        q, k, v = self.q, self.k, self.v
        reason = unsupported(q.dtype, self.dim, self.dim_v)
        if reason is not None:
            raise RuntimeError(f"attention: {reason}")
        rank, rank_k = 3 if self.packed else 4, 3 if self.packed and not self.paged else 4
        if not (q.dim() == rank and k.dim() == v.dim() == rank_k and q.dtype == k.dtype == v.dtype):
            raise RuntimeError(f"attention: q, k and v must have {rank} and {rank_k} dimensions and one dtype")
        length = 0 if rank_k == 3 else 2
        if v.shape[1] != self.heads_k or v.shape[length] != k.shape[length] or k.shape[-1] != self.dim:
            raise RuntimeError("attention: k and v differ in heads or length, or q and k in features")
        if self.heads % max(self.heads_k, 1) != 0 or (self.heads_k == 0 and self.heads > 0):
            raise RuntimeError(f"attention: {self.heads} query heads cannot share {self.heads_k} key heads")
        if rank_k == 4 and (k.shape[0] != v.shape[0] or (not self.paged and k.shape[0] != self.batch)):
            raise RuntimeError("attention: q, k and v differ in batch size, or the pools of k and v in pages")
        if self.paged and (lengths_k is None or cu_k is not None or dropout_p > 0.0):
            raise RuntimeError("attention: block_table needs lengths_k, and takes neither cu_seqlens_k nor dropout")
        if not self.paged and (cu_q is None) != (cu_k is None):
            raise RuntimeError("attention: cu_seqlens_q and cu_seqlens_k come together")
        dense_only = (bias, mask, lengths_q, None if self.paged else lengths_k)
        if self.packed and any(x is not None for x in dense_only):
            raise RuntimeError("attention: bias, mask and lengths belong to the padded layout, not to cu_seqlens")
        vectors = {
            "lengths_q": (lengths_q, torch.int64, self.batch),
            "lengths_k": (lengths_k, torch.int64, self.batch),
            "prefix_lengths": (prefix_lengths, torch.int64, self.batch),
            "cu_seqlens_q": (cu_q, torch.int32, self.batch + 1),
            "cu_seqlens_k": (cu_k, torch.int32, self.batch + 1),
            "alibi_slopes": (alibi_slopes, torch.float32, self.heads),
            "sinks": (sinks, None, self.heads),
        }
        for name, (x, dtype, size) in vectors.items():
            if x is not None and (x.shape != (size,) or (dtype is not None and x.dtype != dtype)):
                raise RuntimeError(f"attention: {name} must be {dtype or 'floating'} of shape [{size}]")
        if block_table is not None and (
            block_table.dim() != 2 or block_table.shape[0] != self.batch or block_table.dtype != torch.int32
        ):
            raise RuntimeError(f"attention: block_table must be int32 of shape [{self.batch}, pages]")
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
    def few(self) -> int:
        """Queries of a sequence up to which it decodes: splits of the keys are what keeps the machine busy then.
        0: none does."""
        group = self.heads // max(self.heads_k, 1)
        if not self.packed:
            decodes = self.length_q <= DECODE_QUERIES and self.length_q * group <= DECODE_ROWS
            return self.length_q if decodes else 0
        # Lengths are not known here, so short sequences are told from long ones on the device, each by its own length.
        if group > DECODE_ROWS or self.batch == 0:
            return 0
        looks = torch.are_deterministic_algorithms_enabled() or self.length_q <= DECODE_MEAN * self.batch
        return max(1, DECODE_TILE // group) if looks else 0

    def splits(self, block: int, programs: int = 0) -> tuple[int, int]:
        """Splits of each sequence's keys, and the keys that one has at least: enough to fill the machine, or always
        the same."""
        wanted, least = (programs or PROGRAMS) // max(1, self.batch * self.heads_k), 2 * block
        if torch.are_deterministic_algorithms_enabled():
            wanted, least = FIXED_SPLITS, FIXED_LEAST
        return max(1, min(wanted, -(-self.length_k // least))), least

    @property
    def folds(self) -> bool:
        """Whether the scale may be multiplied after the maximum is taken: it is positive, and nothing comes between."""
        call = self.call
        return self.scale > 0.0 and call.cap_in is None and self.bias is None and call.alibi is None

    def tile(self, role: str, describable: bool = False) -> tuning_attention.Tile:
        call: Any = self.call
        by_pair = (call.bias.ptr, call.mask.ptr, call.alibi, call.cap_in, call.seed)
        pairs = any(x is not None for x in by_pair)
        return tuning_attention.tile(self.machine, role, self.dtype, max(self.dim, self.dim_v), pairs, describable)

    def align(self, *tensors: Tensor) -> int:
        """How many elements every row of these begins at a multiple of: what 16 bytes hold, or 1."""
        unit = 16 // tensors[0].element_size()
        for x in tensors:
            if x.data_ptr() % 16 != 0 or any(
                n > 1 and s % unit for n, s in zip(x.shape[:-1], x.stride(), strict=False)
            ):
                return 1
        return unit

    def describable(self, align: int, *tensors: Tensor) -> bool:
        """Whether TMA can read the rows of these: each begins at a multiple of 16 bytes, none overlaps the next, and
        none is looked up in a table of pages."""
        row = 0 if self.packed else 2
        apart = all(x.shape[row] <= 1 or x.stride(row) >= x.shape[-1] for x in tensors)
        return align > 1 and apart and not self.paged

    def view(self, x: Tensor, align: int) -> View:
        """[B,H,T,D] or packed [T,H,D], strides in units of ``align``."""
        first, second, third = (hidden(s // align) for s in x.stride()[:3])
        return View(x, hidden(0), second, first) if x.dim() == 3 else View(x, first, second, third)

    def row_view(self, x: Tensor) -> View:
        """[B,H,T] or packed [H,T], contiguous."""
        strides = [hidden(s) for s in x.stride()]
        return View(x, hidden(0), *strides) if self.packed else View(x, *strides)

    def columns(self, least: int = NARROWEST) -> dict[str, int]:
        """D as two powers of two, the second 0 where one is as good; and DV as one."""
        whole = max(least, power_of_two(self.dim))
        first, second = whole // 2, max(least, power_of_two(self.dim - whole // 2))
        splittable = whole > 64 and (whole < HALF_WIDEST or self.dtype != torch.float32)  # wide float32 would spill
        if whole <= HALF_WIDEST and not (splittable and first + second < whole):
            first, second = whole, 0
        return {"D": self.dim, "DV": self.dim_v, "D1": first, "D2": second,
                "BLOCK_DV": max(least, power_of_two(self.dim_v))}  # fmt: skip

    def shared(self, least: int = NARROWEST) -> dict[str, Any]:
        """The constants that all kernels of products take; a tile has ``least`` columns or more."""
        rounds = self.dtype == torch.float32 and one_tf32_product()
        return {**self.columns(least), "PRECISION": "tf32" if rounds else "ieee", "WIDEN": INTERPRETED}

    def least_columns(self, align: int) -> int:
        """Columns of a forward tile at least: what one product takes, or so many that keys and values have one layout
        in the shared memory of sm_90. Without asynchronous copies they follow each other through one place there, and
        if their layouts differ, the ptxas of CUDA 12.8, which is Triton 3.6's, loses the address of the values."""
        return ALIKE if self.machine == "sm_90" and align == 1 and self.dtype != torch.float32 else NARROWEST

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
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else laid_out_as(x, x)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def pairs_of(x: Tensor | None) -> Pairs:
    """A bias or a mask [B|1,Hq|1,Tq|1,Tk|1] as the kernels take it."""
    if x is None:
        return Pairs(None, None, None, None, None, None)
    *strides, step = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    even = step == 1 and x.shape[3] % 16 == 0 and all(s % 16 == 0 for s in strides) and x.data_ptr() % 16 == 0
    batch, head, row = (hidden(s // 16 if even else s) for s in strides)
    return Pairs(x, batch, head, row if strides[2] else None, None if step == 1 else hidden(step), 1 if even else None)


def pages_of(table: Tensor | None, k: Tensor) -> Pages:
    """``block_table`` [B, pages of the longest] and its pool [pages, Hk, rows a page, D]."""
    if table is None:
        return Pages(None, None, None)
    table = table if table.stride(-1) == 1 or table.shape[-1] <= 1 else table.contiguous()
    return Pages(table, hidden(table.stride(0)), hidden(k.shape[2]))

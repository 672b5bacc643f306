"""Argument errors of attention. Everything here looks at shapes and dtypes, which is free on every device; values are
looked at on the CPU only, where that needs no synchronisation.

Attention is called for single tokens, so the checks are plain conditions: a message is built only to be raised.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastseq.attn.call import TENSORS
from fastseq.checks import ArgumentError, sizes, values_visible

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
_EVERYWHERE = 2**62  # a side of a window from here on limits nothing, and 2**63 is no integer of an operator


_MASK = "use mask= (bool, True: may look) or bias= (floating, added to the scores)"
_HEADS = "leave it out: heads of k and v that are fewer than q's are shared"
MEANT_FOR_ATTENTION = {
    "attn_mask": _MASK,
    "attn_bias": "use bias=",
    "is_causal": 'use causal=, and align="top_left" for the alignment of torch\'s is_causal',
    "dropout": "use dropout_p=",
    "enable_gqa": _HEADS,
    "num_kv_heads": _HEADS,
    "key_padding_mask": "use lengths_k=, or mask=~key_padding_mask[:, None, None, :]",
    "need_weights": "use fastseq.nn.MultiheadAttention, which returns the weights",
    "softmax_scale": "use scale=",
    "window_size": "use window=",
    "logits_soft_cap": "use softcap=",
    "key_lengths": "use lengths_k=",
}
"""What users of torch, and of other attention packages, type for a keyword of ``attention``."""
MEANT_FOR_TORCH = {
    **dict.fromkeys(("window", "softcap", "backend", *TENSORS), "use fastseq.attention"),
    "mask": "use attn_mask=",
    "bias": "use attn_mask=",
    "attn_bias": "use attn_mask=",
    "causal": "use is_causal=",
    "dropout": "use dropout_p=",
    "key_padding_mask": "use attn_mask=~key_padding_mask[:, None, None, :]",
}
"""Likewise for a keyword of ``scaled_dot_product_attention``."""


def refuse_keyword(function: str, unknown: Mapping[str, Any], meant: Mapping[str, str]) -> NoReturn:
    """Python's own error for a keyword that there is not, with the one that was meant."""
    name = next(iter(unknown))
    hint = f"; {meant[name]}" if name in meant else ""
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def hide_unknown(function: Callable) -> None:
    """Leaves ``**unknown``, which is there to be refused, out of what ``help`` and ``inspect`` show."""
    shown = inspect.signature(function)
    kept = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    function.__signature__ = shown.replace(parameters=kept)  # type: ignore[attr-defined]


def check_tensors(names: tuple[str, str, str], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Three floating tensors of one dtype on one device."""
    for name, x in zip(names, (q, k, v), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        check_strided(name, x)
    dtype, device = q.dtype, q.device
    if dtype not in FLOATS:
        raise ArgumentError(
            f"{names[0]} must be float64, float32, bfloat16 or float16, got {dtype}; convert it with .to(dtype)"
        )
    if k.dtype == v.dtype == dtype and k.device == v.device == device:
        return
    for name, x in zip(names[1:], (k, v), strict=True):
        if x.dtype != dtype:
            raise ArgumentError(f"{name} is {x.dtype} but {names[0]} is {dtype}; convert one with .to(dtype)")
        if x.device != device:
            raise ArgumentError(f"{name} is on {x.device} but {names[0]} on {device}; move one with .to(device)")


def check_strided(name: str, x: Tensor) -> None:
    """An ordinary dense tensor without names."""
    if x.is_nested:
        raise ArgumentError(f"{name} must be a dense tensor, got a nested one; pad it with .to_padded_tensor(0)")
    if x.layout is not torch.strided:
        raise ArgumentError(f"{name} must be a dense tensor, got layout {x.layout}; convert it with .to_dense()")
    if _NAMES and not torch.compiler.is_compiling() and x.has_names():
        raise ArgumentError(
            f"{name} has named dimensions {tuple(x.names)}, which attention does not carry on; "
            "drop them with .rename(None)"
        )


_NAMES = hasattr(Tensor, "has_names")  # torch 2.14 has tensors without names only


def check_sizes(names: tuple[str, str, str], q: Tensor, k: Tensor, v: Tensor) -> None:
    """The last two dimensions, alike for every layout in which they are [T,D]."""
    if q.shape[-1] != k.shape[-1]:
        raise ArgumentError(
            f"{names[0]} and {names[1]} must have the same number of features (last dimension), "
            f"got {sizes(q)} and {sizes(k)}"
        )
    if q.shape[-1] == 0:
        raise ArgumentError(f"{names[0]} {sizes(q)} has no features; its last dimension must be at least 1")
    if k.shape[-2] != v.shape[-2]:
        raise ArgumentError(
            f"{names[1]} and {names[2]} must have the same length (second last dimension): each key has one value; "
            f"got {sizes(k)} and {sizes(v)}"
        )


def check_dense(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv]."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        hint = "; a packed batch [total,H,D] needs cu_seqlens_q and cu_seqlens_k" if q.dim() == 3 else ""
        raise ArgumentError(
            "q, k and v must be 4-D [B,Hq,Tq,D], [B,Hk,Tk,D] and [B,Hk,Tk,Dv], "
            f"got {sizes(q)}, {sizes(k)} and {sizes(v)}{hint}"
        )
    check_sizes(("q", "k", "v"), q, k, v)
    if k.shape[0] != q.shape[0] or v.shape[0] != q.shape[0]:
        raise ArgumentError(
            "q, k and v must have the same batch (first dimension), "
            f"got {sizes(q)}, {sizes(k)} and {sizes(v)}; expand the smaller ones"
        )
    check_heads(q.shape[1], k.shape[1], v.shape[1])


def check_heads(heads_q: int, heads_k: int, heads_v: int) -> None:
    """Query heads share key heads in equal groups."""
    if heads_k != heads_v:
        raise ArgumentError(f"k and v must have the same number of heads, got {heads_k} and {heads_v}")
    if heads_q % heads_k != 0 if heads_k else heads_q != 0:
        raise ArgumentError(
            f"the heads of k and v must divide those of q, got {heads_k} and {heads_q}; "
            "with grouped heads each of k's serves the same number of q's"
        )


def check_no_dense(**dense_only: Any) -> None:
    """What a packed batch cannot be given."""
    for name, given in dense_only.items():
        if given is not None:
            raise ArgumentError(f"{name} cannot be given with cu_seqlens: it belongs to the padded layout [B,H,T,D]")


def check_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, **dense_only: Any
) -> None:
    """q [total_q,Hq,D], k [total_k,Hk,D], v [total_k,Hk,Dv] and where each sequence begins."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ArgumentError(
            f"{missing} is missing: a packed batch needs both cu_seqlens (in self-attention the same tensor)"
        )
    check_no_dense(**dense_only)
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ArgumentError(
            "with cu_seqlens q, k and v must be 3-D [total_q,Hq,D], [total_k,Hk,D] and [total_k,Hk,Dv], "
            f"got {sizes(q)}, {sizes(k)} and {sizes(v)}"
        )
    if k.shape[0] != v.shape[0]:
        raise ArgumentError(
            "k and v must have the same length (first dimension): each key has one value; "
            f"got {sizes(k)} and {sizes(v)}"
        )
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ArgumentError(
            f"q and k must have the same number of features (last dimension), at least 1, got {sizes(q)} and {sizes(k)}"
        )
    check_heads(q.shape[1], k.shape[1], v.shape[1])
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k, q)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentError(
            "cu_seqlens_q and cu_seqlens_k must name the same number of sequences, "
            f"got shapes {sizes(cu_seqlens_q)} and {sizes(cu_seqlens_k)}"
        )


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, x: Tensor, q: Tensor) -> None:
    """Running sums [B+1] of the lengths of the sequences packed in ``x``."""
    _check_integers(name, cu_seqlens, q)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ArgumentError(f"{name} must be 1-D [B+1], got {sizes(cu_seqlens)}")
    if cu_seqlens.device.type == "cpu" and values_visible(cu_seqlens):
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] > x.shape[0] or any(a > b for a, b in pairwise(starts)):
            raise ArgumentError(
                f"{name} must begin with 0, never decrease, and end at or before {name[-1]}'s {x.shape[0]} rows, "
                f"got {starts if len(starts) <= 8 else f'{starts[:4]} ... {starts[-4:]}'}; "
                "it is the running sum of the lengths, with 0 before it"
            )


def check_paged(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, lengths_k: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, by_cache: bool = False,
) -> None:  # fmt: skip
    """k [P,page,Hk,D], v [P,page,Hk,Dv] and block_table [B,pages]; q [B,Hq,Tq,D], or packed [total_q,Hq,D]. A table
    that a cache made is not looked into."""
    if cu_seqlens_k is not None:
        raise ArgumentError("cu_seqlens_k cannot be given with block_table: keys are counted by lengths_k")
    if lengths_k is None:
        raise ArgumentError("lengths_k is missing: block_table needs it, [B], to know how many keys of its pages count")
    rank, layout = (4, "[B,Hq,Tq,D]") if cu_seqlens_q is None else (3, "[total_q,Hq,D] (with cu_seqlens_q)")
    if q.dim() != rank or k.dim() != 4 or v.dim() != 4:
        raise ArgumentError(
            f"with block_table q must be {layout}, k and v pools of pages [P,page,Hk,D] and [P,page,Hk,Dv], "
            f"got {sizes(q)}, {sizes(k)} and {sizes(v)}"
        )
    if k.shape[:2] != v.shape[:2] or k.shape[0] == 0 or k.shape[1] == 0:
        raise ArgumentError(
            "k and v must have the same number of pages and rows a page (first two dimensions), at least 1 each, "
            f"got {sizes(k)} and {sizes(v)}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ArgumentError(
            f"q and k must have the same number of features (last dimension), at least 1, got {sizes(q)} and {sizes(k)}"
        )
    check_heads(q.shape[1], k.shape[2], v.shape[2])
    _check_integers("block_table", block_table, q)
    batch = q.shape[0]
    if cu_seqlens_q is not None:
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, q)
        batch = cu_seqlens_q.shape[0] - 1
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise ArgumentError(f"block_table must be [B,pages] with B = {batch}, got {sizes(block_table)}")
    if by_cache:
        return
    check_lengths("lengths_k", lengths_k, q, block_table.shape[1] * k.shape[1], batch)
    if batch and block_table.device.type == "cpu" and values_visible(block_table) and values_visible(lengths_k):
        block_table = block_table[:, : -(-int(lengths_k.max()) // k.shape[1])]
        used = torch.arange(block_table.shape[1]) * k.shape[1] < lengths_k[:, None]
        wrong = used & ((block_table < 0) | (block_table >= k.shape[0]))
        if wrong.any():
            b, page = wrong.nonzero()[0].tolist()
            raise ArgumentError(
                f"block_table must name pages from 0 to {k.shape[0] - 1} wherever lengths_k counts keys, "
                f"got {int(block_table[b, page])} at [{b}, {page}]"
            )


def _check_integers(name: str, x: Any, q: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an integer Tensor, got {type(x).__name__}; use torch.tensor({name})")
    check_strided(name, x)
    if x.dtype not in INTEGERS:
        raise ArgumentError(f"{name} must be int32 or int64, got {x.dtype}; convert it with .to(torch.int32)")
    _check_device(name, x, q)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ArgumentError(f"{name} is on {x.device} but q on {q.device}; move it with .to({str(q.device)!r})")


def check_lengths(name: str, lengths: Any, q: Tensor, longest: int, batch: int | None = None) -> None:
    """Integers [B], each from 0 to the tensor's own length; B is q's first dimension where it is not given."""
    _check_integers(name, lengths, q)
    batch = q.shape[0] if batch is None else batch
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ArgumentError(f"{name} must be [B] = [{batch}], got {sizes(lengths)}")
    if lengths.shape[0] and lengths.device.type == "cpu" and values_visible(lengths):
        found = lengths.tolist()
        if min(found) < 0 or max(found) > longest:
            raise ArgumentError(f"{name} must lie in 0..{longest}, got values from {min(found)} to {max(found)}")


def check_pairs(name: str, x: Any, q: Tensor, shape: tuple[int, ...], is_bool: bool) -> None:
    """A mask or a bias: something for each pair of query and key, broadcastable to ``shape``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
    check_strided(name, x)
    if is_bool and x.dtype != torch.bool:
        raise ArgumentError(
            f"{name} must be bool (True: may look), got {x.dtype}; convert it with .bool(), or give it as bias= if it "
            "is to be added"
        )
    if not is_bool and x.dtype not in (q.dtype, torch.float32):
        hint = "; a bool mask goes into mask=" if x.dtype == torch.bool else ""
        raise ArgumentError(f"{name} must be {q.dtype} as q, or torch.float32, got {x.dtype}{hint}")
    _check_device(name, x, q)
    fits = x.dim() <= len(shape)
    if fits:
        for have, want in zip(reversed(x.shape), reversed(shape), strict=False):
            if have != 1 and have != want:
                fits = False
    if not fits:
        layout = "[B,Hq,Tq,Tk]" if len(shape) == 4 else "[...,Tq,Tk]"
        raise ArgumentError(
            f"{name} {sizes(x)} does not broadcast to {layout} = {list(shape)}: each dimension, counted from the last, "
            "must be 1 or that size"
        )


def check_per_head(name: str, x: Any, q: Tensor, heads: int) -> None:
    """One floating number a query head."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a Tensor [Hq], got {type(x).__name__}")
    check_strided(name, x)
    if x.dtype not in (q.dtype, torch.float32):
        raise ArgumentError(f"{name} must be {q.dtype} as q, or torch.float32, got {x.dtype}")
    _check_device(name, x, q)
    if x.dim() != 1 or x.shape[0] != heads:
        raise ArgumentError(f"{name} must be [Hq] = [{heads}], got {sizes(x)}")


def check_alibi(slopes: Tensor) -> None:
    """Slopes are constants: nothing computes a gradient for them."""
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "alibi_slopes has no gradient; detach it, or give slopes that are learned as "
            "bias=-slopes[:, None, None] * distance"
        )


def check_numbers(scale: Any, softcap: Any, dropout_p: Any) -> None:
    """Ranges of the scalars."""
    if scale is not None and not -math.inf < scale < math.inf:
        raise ArgumentError(f"scale must be a finite number, or None for 1/sqrt(D), got {scale!r}")
    if not 0.0 <= softcap < math.inf:
        raise ArgumentError(f"softcap must be a finite number, at least 0 (0: no cap), got {softcap!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p must lie in [0, 1], got {dropout_p!r}")


def check_align(align: Any) -> bool:
    """Whether it is ``bottom_right``."""
    if align == "bottom_right":
        return True
    if align == "top_left":
        return False
    raise ArgumentError(f"align must be 'bottom_right' or 'top_left', got {align!r}")


def check_window(window: Any) -> tuple[int, int]:
    """(left, right), each -1 or a number of positions."""
    if window is None:
        return -1, -1
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) or side < -1 for side in window)
    ):
        raise ArgumentError(
            f"window must be a pair (left, right) of integers, each -1 for no limit or at least 0, got {window!r}; "
            "the last n keys up to the query itself are (n - 1, 0)"
        )
    left, right = (-1 if side >= _EVERYWHERE else side for side in window)
    return left, right

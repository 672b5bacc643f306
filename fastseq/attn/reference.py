"""Attention as its formula reads: the oracle of every kernel, in eager torch, differentiable to any order.

    s[i,j] = scale * q[i]·k[j];  softcap * tanh(s / softcap);  + bias[i,j];  - alibi * |i + shift - j|
    lse[i] = log( sum over visible j of exp s[i,j]  +  exp sink )
    o[i]   = sum over visible j of  exp(s[i,j] - lse[i]) * v[j]

The matrix of scores is stored, so memory grows as Tq * Tk; a packed batch is computed as one block-diagonal matrix.
Positions past a length are never met: whatever lies there, NaN included, changes neither value nor gradient.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .random import keep_mask


class Positions(NamedTuple):
    """Where rows and columns of the scores [B,Hq,Tq,Tk] stand in their own sequences (packed: B is 1)."""

    b: Tensor  # [B,1,1,1], packed [Tq,1]: number of the row's sequence
    i: Tensor  # [Tq,1]
    j: Tensor  # [Tk], packed [1,Tk]
    shift: Tensor | int  # the diagonal is j = i + shift; [B,1,1,1], packed [Tq,1]
    row_is_real: Tensor | None  # [B,1,Tq,1], packed [Tq,1]; None: all are
    column_is_real: Tensor | None  # [B,1,Tk,1], packed [Tk,1]
    same_sequence: Tensor | None  # packed [Tq,Tk]


def dense_positions(
    q: Tensor, k: Tensor, lengths_q: Tensor | None, lengths_k: Tensor | None, bottom_right: bool
) -> Positions:
    """Positions of q [B,Hq,Tq,D] and k [B,Hk,Tk,D]."""
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    b = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
    rows: Tensor | int = q.shape[2] if lengths_q is None else lengths_q[:, None, None, None]
    columns: Tensor | int = k.shape[2] if lengths_k is None else lengths_k[:, None, None, None]
    return Positions(
        b=b,
        i=i,
        j=j,
        shift=columns - rows if bottom_right else 0,
        row_is_real=None if lengths_q is None else i < rows,
        column_is_real=None if lengths_k is None else j[:, None] < columns,
        same_sequence=None,
    )


def _packed_positions(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, bottom_right: bool
) -> Positions:
    sequences = cu_seqlens_q.shape[0] - 1

    def locate(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's sequence, its place in it, and the lengths of all sequences."""
        cu_seqlens = cu_seqlens.to(torch.int64)
        place = torch.arange(total, device=q.device)
        sequence = (place[:, None] >= cu_seqlens[1:]).sum(-1)  # == sequences past the last one
        return sequence, place - cu_seqlens[sequence], cu_seqlens.diff()

    row_sequence, i, rows = locate(cu_seqlens_q, q.shape[2])
    column_sequence, j, columns = locate(cu_seqlens_k, k.shape[2])
    row_is_real, column_is_real = row_sequence < sequences, column_sequence < sequences
    shift: Tensor | int = 0
    if bottom_right and sequences > 0:
        shift = (columns - rows)[row_sequence.clamp(max=sequences - 1)][:, None]
    return Positions(
        b=row_sequence[:, None],
        i=i[:, None],
        j=j[None, :],
        shift=shift,
        row_is_real=row_is_real[:, None],
        column_is_real=column_is_real[:, None],
        same_sequence=row_sequence[:, None] == column_sequence[None, :],
    )


def visible_pairs(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    bottom_right: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    **_others: Any,
) -> tuple[Positions, Tensor | None]:
    """Which key each query may look at: bool that broadcasts to [B,Hq,Tq,Tk]; None: every one at all of them.

    q [B,Hq,Tq,D], k [B,Hk,Tk,D] (packed: B is 1). Options that say nothing of this may be given too.
    """
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        at = _packed_positions(q, k, cu_seqlens_q, cu_seqlens_k, bottom_right)
    else:
        at = dense_positions(q, k, lengths_q, lengths_k, bottom_right)
    diagonal = at.i + at.shift
    ahead = at.j - diagonal  # a difference of positions cannot overflow, whatever the sides of the window
    limits = _all_of(
        ahead <= 0 if causal else None,
        ahead >= -window_left if window_left >= 0 else None,
        ahead <= window_right if window_right >= 0 else None,
    )
    if prefix_lengths is not None and limits is not None:
        limits = limits | (at.j < F.pad(prefix_lengths, (0, 1))[at.b])  # rows of no sequence have no prefix
    real = None if at.column_is_real is None else at.column_is_real.transpose(-2, -1)
    return at, _all_of(at.row_is_real, real, at.same_sequence, mask, limits)


def _all_of(*conditions: Tensor | None) -> Tensor | None:
    """Where all of them hold; None stands for everywhere."""
    result = None
    for condition in conditions:
        if condition is not None:
            result = condition if result is None else result & condition
    return result


def _without_padding(x: Tensor, is_real: Tensor | None) -> Tensor:
    """``x`` [B,H,T,D] with the rows past its length zeroed: 0 * NaN would carry them into every sum."""
    return x if is_real is None else x.masked_fill(~is_real, 0.0)


def _heads_of_query(x: Tensor, q: Tensor) -> Tensor:
    """``x`` [B,Hk,T,D] with each head repeated for the Hq / Hk query heads that share it."""
    if x.shape[1] == q.shape[1]:
        return x
    group = q.shape[1] // x.shape[1]
    return x.index_select(1, torch.arange(q.shape[1], device=x.device) // group)


def _own_dtypes(q: Tensor) -> AbstractContextManager:
    """Keeps autocast from rounding what is computed inside."""
    return nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)


class _Softmax(NamedTuple):
    weights: Tensor  # [B,Hq,Tq,Tk], after dropout
    lse: Tensor  # [B,Hq,Tq]
    empty: Tensor  # [B,Hq,Tq,1]: rows in which nothing is visible
    at: Positions


def _softmax(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    seed: Tensor | None = None,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    **limits: Any,
) -> _Softmax:
    """All but the product with v, in the accumulator's dtype; q [B,Hq,Tq,D], k [B,Hk,Tk,D] (packed: B is 1), and the
    options of :func:`visible_pairs`."""
    at, visible = visible_pairs(q, k, **limits)
    q, k = _without_padding(q, at.row_is_real), _without_padding(k, at.column_is_real)
    k = _heads_of_query(k, q)
    scores = scale * (q @ k.transpose(-2, -1))  # [B,Hq,Tq,Tk]
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        hidden = bias == -math.inf  # a mask in a bias's clothes; finite from here on, so that derivatives are
        visible = ~hidden if visible is None else visible & ~hidden
        scores = scores + bias.masked_fill(hidden, 0.0)
    if alibi_slopes is not None:
        distance = (at.i + at.shift - at.j).abs()
        scores = scores - alibi_slopes.detach().to(scores.dtype)[:, None, None] * distance

    # The largest score is only a common factor of numerator and denominator: a constant to every derivative.
    seen = scores if visible is None else scores.masked_fill(~visible, -math.inf)
    if seen.shape[-1] > 0:
        largest = seen.detach().amax(-1, keepdim=True)
    else:
        largest = seen.new_full((*seen.shape[:-1], 1), -math.inf)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.detach()[:, None, None])
    largest = largest.masked_fill(largest == -math.inf, 0.0)
    if visible is None:
        numerator = torch.exp(scores - largest)
    else:
        numerator = torch.exp(torch.where(visible, scores, largest) - largest).masked_fill(~visible, 0.0)
    denominator = numerator.sum(-1, keepdim=True)
    if sinks is not None:
        sink = torch.exp(sinks[:, None, None] - largest)
        denominator = denominator + _without_padding(sink, at.row_is_real)
    empty = denominator == 0.0
    denominator = denominator.masked_fill(empty, 1.0)
    weights = numerator / denominator
    lse = (largest + torch.log(denominator)).masked_fill(empty, -math.inf).squeeze(-1)
    if dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed: dropout_p > 0 needs a seed, an int64 tensor of shape [1]")
        h = torch.arange(q.shape[1], device=q.device)[:, None, None]
        kept = keep_mask(seed, dropout_p, at.b, h, at.i, at.j)
        weights = weights.masked_fill(~kept, 0.0) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    return _Softmax(weights, lse, empty, at)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ) v and the logarithm of its denominator.

    Args:
        q: [B,Hq,Tq,D], or packed [total_q,Hq,D] with ``cu_seqlens_q``.
        k: [B,Hk,Tk,D], or packed [total_k,Hk,D]; Hk divides Hq.
        v: [B,Hk,Tk,Dv], or packed [total_k,Hk,Dv].
        bias: floating, broadcastable to [B,Hq,Tq,Tk]; -inf hides a pair as ``mask`` does.
        mask: bool, broadcastable to [B,Hq,Tq,Tk]; True: may look.
        sinks: [Hq], one more logit in each denominator.
        alibi_slopes: [Hq]; no gradient reaches them.
        lengths_q, lengths_k: integer [B].
        cu_seqlens_q, cu_seqlens_k: integer [B+1], first 0, non-decreasing.
        seed: int64 [1], the key of the dropout mask.
        scale, causal, bottom_right, window_left, window_right, softcap, dropout_p: see ``fastseq.attention``.

    Returns:
        o as q with Dv features, 0 in a row that sees no key; lse [B,Hq,Tq] (packed [Hq,total_q]) in float32, or in
        float64 for float64 inputs, -inf where a row sees neither key nor sink, and past ``lengths_q``.

    Inputs of 16 bits are computed in float32 throughout, and o rounded once.
    """
    dtype, accumulator = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    with _own_dtypes(q):
        softmax = _softmax(
            q.to(accumulator),
            k.to(accumulator),
            bias=None if bias is None else bias.to(accumulator),
            sinks=None if sinks is None else sinks.to(accumulator),
            cu_seqlens_q=cu_seqlens_q,
            **options,
        )
        v = _heads_of_query(_without_padding(v.to(accumulator), softmax.at.column_is_real), q)
        o = (softmax.weights @ v).masked_fill(softmax.empty, 0.0).to(dtype)
    if packed:
        return o.squeeze(0).transpose(0, 1), softmax.lse.squeeze(0)
    return o, softmax.lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    scale: float,
    causal: bool = False,
    bottom_right: bool = True,
    dropout_p: float = 0.0,
) -> Tensor:
    """The matrix that multiplies v, [B,Hq,Tq,Tk] in q's dtype, after dropout; arguments as ``attention``'s."""
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    with _own_dtypes(q):
        softmax = _softmax(
            q.to(accumulator),
            k.to(accumulator),
            bias=None if bias is None else bias.to(accumulator),
            mask=mask,
            seed=seed,
            scale=scale,
            causal=causal,
            bottom_right=bottom_right,
            dropout_p=dropout_p,
        )
    return softmax.weights.to(q.dtype)

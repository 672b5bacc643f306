"""softmax(Q Kᵀ) V for a few queries against many keys, where reading K and V is all the work.

The query heads that share a key head, times the queries, are the rows of one tile, so each key is read once. The keys
that a sequence's queries see are cut into splits, a program each, and what they found is merged by their lse:

    o = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m),   m = max_s lse_s

in the order of the splits; one that sees nothing changes no bit of the sum. Where a sequence is cut depends on its own
length, on ``splits`` and on ``least`` alone: with these fixed an answer does not depend on the rest of the batch. In a
packed batch this is for the sequences of up to ``queries`` queries; attention_forward makes the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import attend_all
from .ranges import key_range, sequence
from .scores import LN2, LOG2E
from .tiles import described, head_of, head_of_keys, load_rows, narrow, number


@triton.jit(do_not_specialize=["q", "k", "v", "o", "lse", "call", "heads_k", "queries", "splits", "least"])
def attention_decode(
    q, k, v, o, lse, call, heads_k, queries, splits, least,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One split of one key head: o float32 [B,Hq,queries,splits,DV] and lse [B,Hq,queries,splits] in units of log 2,
    without the sinks; 0 and -inf where the split shows a row nothing. A split has ``least`` keys or more."""
    program = tl.program_id(0)
    split = program % splits
    head = program // splits % heads_k
    b = program // splits // heads_k
    q_row, _, tq, k_row, _, tk, shift = sequence(call, b)
    if tq <= queries:
        row = tl.arange(0, BLOCK_M)
        inside = row < number(call.group) * queries
        i = tl.where(inside, row % queries, 0)
        h = head * number(call.group) + tl.where(inside, row // queries, 0)
        begin, whole_begin, whole_end, end = key_range(call, b, 0, tq - 1, tk, shift, BLOCK_N)
        share = tl.maximum(tl.cdiv(tl.maximum(end - begin, 0), splits), least)
        first = begin + split * (tl.cdiv(share, BLOCK_N) * BLOCK_N)
        last = first + tl.cdiv(share, BLOCK_N) * BLOCK_N
        begin = tl.maximum(begin, first)
        end = tl.minimum(end, last)
        whole_begin = tl.minimum(tl.maximum(whole_begin, first), last)
        whole_end = tl.maximum(tl.minimum(whole_end, last), whole_begin)

        q_head = head_of(q, b, head * number(call.group), q_row, ALIGN)
        offset = (h - head * number(call.group)) * number(q.head) + i * number(q.row)
        q1 = load_rows(q_head, offset, inside & (i < tq), D, 0, D1, ALIGN)
        q2 = q1
        if D2 > 0:
            q2 = load_rows(q_head, offset, inside & (i < tq), D, D1, D2, ALIGN)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        key = head_of_keys(k, call.pages, b, head, k_row, ALIGN)
        value = head_of_keys(v, call.pages, b, head, k_row, ALIGN)
        k_head = described(key, number(k.row), tk, D, BLOCK_N, D1, ALIGN, TMA)
        k_more = described(key, number(k.row), tk, D, BLOCK_N, D2, ALIGN, TMA and D2 > 0)
        v_head = described(value, number(v.row), tk, DV, BLOCK_N, BLOCK_DV, ALIGN, TMA)
        acc, m, l = attend_all(
            acc, m, l, q1, q2, k, v, k_head, k_more, v_head,
            begin, whole_begin, whole_end, end, call, b, h[:, None], i[:, None], 0, tq, tk, shift,
            D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, False,
        )  # fmt: skip
        empty = (l == 0.0) | (i >= tq)
        l = tl.where(empty, 1.0, l)
        share_of_key = 1.0 / l
        if call.seed is not None:
            share_of_key = share_of_key * call.kept_scale
        acc = tl.where(empty[:, None], 0.0, acc * share_of_key[:, None])
        place = ((tl.cast(b, tl.int64) * heads_k * number(call.group) + h) * queries + i) * splits + split
        column = tl.arange(0, BLOCK_DV)
        tl.store(o + place[:, None] * DV + column[None, :], acc, mask=inside[:, None] & (column < DV)[None, :])
        tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log2(l)), mask=inside)


@triton.jit(do_not_specialize=["o_split", "lse_split", "o", "lse", "call", "heads", "queries", "splits"])
def attention_merge(
    o_split, lse_split, o, lse, call, heads, queries, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One row of o and of lse from its splits, CHUNK of them at a time, and the sink."""
    row = tl.cast(tl.program_id(0), tl.int64)
    b = row // queries // heads
    h = row // queries % heads
    i = row % queries
    q_row, rows, tq, _, _, _, _ = sequence(call, b)
    if (i < rows) & (tq <= queries):
        column = tl.arange(0, BLOCK_DV)
        acc = tl.zeros([BLOCK_DV], tl.float32)
        m = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
        l = tl.max(tl.zeros([1], tl.float32), 0)
        if call.sinks is not None:
            sink = tl.load(call.sinks + h).to(tl.float32) * LOG2E
            m = tl.where(i < tq, sink, m)
            l = tl.where(m == float("-inf"), 0.0, 1.0)
        for first in range(0, splits, CHUNK):
            split = first + tl.arange(0, CHUNK)
            log = tl.load(lse_split + row * splits + split, mask=split < splits, other=float("-inf"))
            place = o_split + ((row * splits + split) * DV)[:, None] + column[None, :]
            value = tl.load(place, mask=(split < splits)[:, None] & (column < DV)[None, :], other=0.0)
            m_new = tl.maximum(m, tl.max(log, 0))
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
            before = tl.exp2(m - base)
            weight = tl.exp2(log - base)
            acc = acc * before + tl.sum(value * weight[:, None], 0)
            l = l * before + tl.sum(weight, 0)
            m = m_new
        empty = l == 0.0
        l = tl.where(empty, 1.0, l)
        acc = tl.where(empty, 0.0, acc / l)
        tl.store(head_of(o, b, h, q_row + i, 1) + column, narrow(acc, o.ptr.dtype.element_ty, WIDEN), mask=column < DV)
        tl.store(head_of(lse, b, h, q_row, 1) + i, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2))

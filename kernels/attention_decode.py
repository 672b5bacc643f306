"""softmax(Q Kᵀ) V for a few queries against many keys, where reading K and V is all the work.

The query heads that share a key head, times the queries, are the rows of one tile, so each key is read once. The keys
are cut into splits, a program each, and what they found is merged by their lse:

    o = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m),   m = max_s lse_s

in the order of the splits. A split begins at a multiple of ``split_keys`` whatever the lengths are, and one that sees
nothing changes no bit of the sum: with a fixed ``split_keys`` an answer does not depend on the rest of the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention import attend_all
from .attention_scores import LN2, LOG2E, head_of, key_range, narrow, number, sequence


@triton.jit
def load_rows(base, offset, inside, D: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """[ROWS, COLUMNS]: features FIRST.. of rows at ``offset`` [ROWS], 0 where not ``inside``."""
    column = FIRST + tl.arange(0, COLUMNS)
    pointers = base + (offset[:, None] * ALIGN + column[None, :])
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["q", "k", "v", "o", "lse", "call", "heads_k", "splits", "split_keys"])
def attention_decode(
    q, k, v, o, lse, call, heads_k, splits, split_keys,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """One split of one key head: o float32 [B,Hq,Tq,splits,DV] and lse [B,Hq,Tq,splits] in units of log 2, without the
    sinks; 0 and -inf where the split shows a row nothing."""
    program = tl.program_id(0)
    split = program % splits
    head = program // splits % heads_k
    b = program // splits // heads_k
    _, _, tq, _, _, tk, shift = sequence(call, b)
    row = tl.arange(0, BLOCK_M)
    inside = row < number(call.group) * number(call.length_q)
    i = tl.where(inside, row % number(call.length_q), 0)
    h = head * number(call.group) + tl.where(inside, row // number(call.length_q), 0)
    begin, whole_begin, whole_end, end = key_range(call, 0, tq - 1, tk, shift, BLOCK_N)
    first = split * split_keys
    last = first + split_keys
    begin = tl.maximum(begin, first)
    end = tl.minimum(end, last)
    whole_begin = tl.minimum(tl.maximum(whole_begin, first), last)
    whole_end = tl.maximum(tl.minimum(whole_end, last), whole_begin)

    q_head = head_of(q, b, head * number(call.group), 0, ALIGN)
    offset = (h - head * number(call.group)) * number(q.head) + i * number(q.row)
    q1 = load_rows(q_head, offset, inside & (i < tq), D, 0, D1, ALIGN)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q_head, offset, inside & (i < tq), D, D1, D2, ALIGN)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc, m, l = attend_all(
        acc, m, l, q1, q2, head_of(k, b, head, 0, ALIGN), head_of(v, b, head, 0, ALIGN), number(k.row), number(v.row),
        begin, whole_begin, whole_end, end, call, b, h[:, None], i[:, None], 0, tq, tk, shift,
        D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN,
    )  # fmt: skip
    empty = (l == 0.0) | (i >= tq)
    l = tl.where(empty, 1.0, l)
    share = 1.0 / l
    if call.seed is not None:
        share = share * call.kept_scale
    acc = tl.where(empty[:, None], 0.0, acc * share[:, None])
    place = ((tl.cast(b, tl.int64) * heads_k * number(call.group) + h) * number(call.length_q) + i) * splits + split
    column = tl.arange(0, BLOCK_DV)
    tl.store(o + place[:, None] * DV + column[None, :], acc, mask=inside[:, None] & (column < DV)[None, :])
    tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log2(l)), mask=inside)


@triton.jit(do_not_specialize=["o_split", "lse_split", "o", "lse", "call", "heads", "splits"])
def attention_merge(
    o_split, lse_split, o, lse, call, heads, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One row of o, contiguous [B,Hq,Tq,DV], and of lse, from its splits and the sink."""
    row = tl.cast(tl.program_id(0), tl.int64)
    b = row // number(call.length_q) // heads
    h = row // number(call.length_q) % heads
    i = row % number(call.length_q)
    _, _, tq, _, _, _, _ = sequence(call, b)
    column = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    m = tl.max(tl.full([1], float("-inf"), tl.float32), 0)
    l = tl.max(tl.zeros([1], tl.float32), 0)
    if call.sinks is not None:
        sink = tl.load(call.sinks + h).to(tl.float32) * LOG2E
        m = tl.where(i < tq, sink, m)
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    for split in range(0, splits):
        log = tl.load(lse_split + row * splits + split)
        value = tl.load(o_split + (row * splits + split) * DV + column, mask=column < DV, other=0.0)
        m_new = tl.maximum(m, log)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        before = tl.exp2(m - base)
        weight = tl.exp2(log - base)
        acc = acc * before + value * weight
        l = l * before + weight
        m = m_new
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc = tl.where(empty, 0.0, acc / l)
    tl.store(o + row * DV + column, narrow(acc, o.dtype.element_ty, WIDEN), mask=column < DV)
    tl.store(lse + row, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2))

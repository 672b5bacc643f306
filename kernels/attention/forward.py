"""softmax(Q Kᵀ) V, forward: one pass over the keys with a running maximum, the scores never stored.

    m' = max(m, max_j s[j]);  a = 2^(m - m');  p[j] = 2^(s[j] - m')
    l' = a l + sum_j p[j];    acc' = a acc + sum_j p[j] v[j]

and in the end o = acc / l, lse = ln 2 * (m + log2 l). Dropout acts on what reaches acc, not on l.
A program makes BLOCK_M rows of o. Keys that no row sees are not visited; those that all rows see need no mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import find_program, key_range, sequence, visible
from .scores import LN2, LOG2E, biased, kept, logits
from .tiles import described, dot, dot_add, head_of, head_of_keys, load_halves, load_keys, narrow, number, store_tile


@triton.jit
def products(
    q1, q2, k, k_head, k_more, call, b, start, tk,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """q[i]·k[j] of the keys from ``start`` on, [BLOCK_M, BLOCK_N]."""
    k1 = load_keys(k, k_head, call.pages, b, start, tk, D, 0, BLOCK_N, D1, ALIGN, CHECKED)  # [BLOCK_N, D1]
    qk = dot(q1, tl.trans(k1), PRECISION, WIDEN)
    if D2 > 0:
        k2 = load_keys(k, k_more, call.pages, b, start, tk, D, D1, BLOCK_N, D2, ALIGN, CHECKED)
        qk = dot_add(q2, tl.trans(k2), qk, PRECISION, WIDEN)
    return qk


@triton.jit
def attend(
    acc, m, l, ahead, q1, q2, k, v, k_head, k_more, v_head, begin, end, call, b, h, i, i0, tq, tk, shift,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, AHEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from ``begin`` to ``end``; h, i and tq may be columns [BLOCK_M, 1].

    AHEAD: q·k of a tile is made in the iteration before, and handed on as ``ahead``. Then the tensor cores are still at
    p v of one tile while p of the next is computed: Triton only waits for a product where it is next used, and for all
    of them behind one whose result the same iteration needs."""
    for start in tl.range(begin, end, BLOCK_N):
        if AHEAD:
            qk = ahead
        else:
            qk = products(q1, q2, k, k_head, k_more, call, b, start, tk, D, D1, D2, BLOCK_N, ALIGN, PRECISION, WIDEN,
                          MASKED)  # fmt: skip
        j = start + tl.arange(0, BLOCK_N)[None, :]
        if FOLD:  # the scale is positive and nothing is added: it commutes with the maximum, and fuses into the exp2
            factor = call.scale * LOG2E
            if MASKED:
                qk = tl.where(visible(call, b, h, i, j, i0, start, tq, tk, shift, True), qk, float("-inf"))
            m_new = tl.maximum(m, tl.max(qk, 1) * factor)
            s = qk * factor
        else:
            s = logits(qk, call, q1.dtype == tl.float32)
            s = biased(s, call, b, h, i, j, i0, start, tq, tk, shift, MASKED, True)
            m_new = tl.maximum(m, tl.max(s, 1))
        base = m_new
        if MASKED:
            base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - base[:, None])
        factor_old = tl.exp2(m - base)
        l = l * factor_old + tl.sum(p, 1)
        if call.seed is not None:
            p = tl.where(kept(call, b, h, i, start, BLOCK_M, BLOCK_N), p, 0.0)
        if AHEAD:  # the last of all is of a tile past the end, of zeros, and nobody's
            ahead = products(q1, q2, k, k_head, k_more, call, b, start + BLOCK_N, tk, D, D1, D2, BLOCK_N, ALIGN,
                             PRECISION, WIDEN, True)  # fmt: skip
        acc = acc * factor_old[:, None]
        values = load_keys(
            v, v_head, call.pages, b, start, tk, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, MASKED
        )  # [BLOCK_N, DV]
        acc = dot_add(narrow(p, values.dtype, WIDEN), values, acc, PRECISION, WIDEN)
        m = m_new
    return acc, m, l, ahead


@triton.jit
def attend_all(
    acc, m, l, q1, q2, k, v, k_head, k_more, v_head, begin, whole_begin, whole_end, end,
    call, b, h, i, i0, tq, tk, shift,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The keys of :func:`key_range`: tiles with masks, without, and with; a loop not needed is no code."""
    ahead = m
    if AHEAD:
        ahead = products(q1, q2, k, k_head, k_more, call, b, begin, tk, D, D1, D2, BLOCK_N, ALIGN, PRECISION, WIDEN,
                         True)  # fmt: skip
    if call.pairs is None:
        if call.left is not None:
            acc, m, l, ahead = attend(
                acc, m, l, ahead, q1, q2, k, v, k_head, k_more, v_head, begin, whole_begin,
                call, b, h, i, i0, tq, tk, shift,
                D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, AHEAD, True,
            )  # fmt: skip
        acc, m, l, ahead = attend(
            acc, m, l, ahead, q1, q2, k, v, k_head, k_more, v_head, whole_begin, whole_end,
            call, b, h, i, i0, tq, tk, shift,
            D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, AHEAD, False,
        )  # fmt: skip
    acc, m, l, _ = attend(
        acc, m, l, ahead, q1, q2, k, v, k_head, k_more, v_head, whole_end, end, call, b, h, i, i0, tq, tk, shift,
        D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, AHEAD, True,
    )  # fmt: skip
    return acc, m, l


@triton.jit
def make_rows(
    program, q, k, v, o, lse, call, heads, together, few,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The tile of queries of one head that is number ``program``."""
    b, h, tile = find_program(program, call, heads, together, BLOCK_M, OF_KEYS=False)
    q_row, rows, tq, k_row, _, tk, shift = sequence(call, b)
    i0 = tile * BLOCK_M
    if (i0 < rows) & ((tq > few) | (tq == 0)):
        i = i0 + tl.arange(0, BLOCK_M)[:, None]
        last = tl.minimum(i0 + BLOCK_M, tq) - 1
        begin, whole_begin, whole_end, end = key_range(call, b, i0, last, tk, shift, BLOCK_N)
        q_head = head_of(q, b, h, q_row, ALIGN)
        key = head_of_keys(k, call.pages, b, h // number(call.group), k_row, ALIGN)
        value = head_of_keys(v, call.pages, b, h // number(call.group), k_row, ALIGN)
        k_head = described(key, number(k.row), tk, D, BLOCK_N, D1, ALIGN, TMA)
        k_more = described(key, number(k.row), tk, D, BLOCK_N, D2, ALIGN, TMA and D2 > 0)
        v_head = described(value, number(v.row), tk, DV, BLOCK_N, BLOCK_DV, ALIGN, TMA)
        q_more = described(q_head, number(q.row), tq, D, BLOCK_M, D2, ALIGN, TMA and D2 > 0)
        q_head = described(q_head, number(q.row), tq, D, BLOCK_M, D1, ALIGN, TMA)
        q1, q2 = load_halves(q_head, q_more, number(q.row), i0, tq, D, D1, D2, BLOCK_M, ALIGN)  # [BLOCK_M, D1], [, D2]
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        if call.sinks is not None:  # a key of value 0, met before all others
            sink = tl.load(call.sinks + h).to(tl.float32) * LOG2E
            m = tl.maximum(m, sink)
            l += tl.where(sink == float("-inf"), 0.0, 1.0)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        acc, m, l = attend_all(
            acc, m, l, q1, q2, k, v, k_head, k_more, v_head, begin, whole_begin, whole_end, end,
            call, b, h, i, i0, tq, tk, shift,
            D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, AHEAD,
        )  # fmt: skip
        row = i0 + tl.arange(0, BLOCK_M)
        empty = (l == 0.0) | (row >= tq)
        l = tl.where(empty, 1.0, l)
        share = 1.0 / l
        if call.seed is not None:
            share = share * call.kept_scale
        acc = tl.where(empty[:, None], 0.0, acc * share[:, None])
        store_tile(acc, head_of(o, b, h, q_row, ALIGN), number(o.row), i0, rows, DV, 0, BLOCK_M, BLOCK_DV, ALIGN, WIDEN)
        log = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2)
        tl.store(head_of(lse, b, h, q_row, 1) + row, log, mask=row < rows)


@triton.jit(do_not_specialize=["q", "k", "v", "o", "lse", "call", "heads", "together", "few", "tiles"])
def attention_forward(
    q, k, v, o, lse, call, heads, together, few, tiles,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr, PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Tiles of queries: q, k, v, o, lse :class:`View`, call :class:`Call`. D features of q and k are taken as D1 + D2
    columns, powers of two. Rows past a length get 0 and -inf. Sequences of up to ``few`` queries are left to the
    decoding kernel. A program makes one tile, or (PERSISTENT) one in so many of ``tiles``."""
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
            make_rows(
                tile, q, k, v, o, lse, call, heads, together, few,
                D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, TMA, AHEAD,
            )  # fmt: skip
    else:
        make_rows(
            tl.program_id(0), q, k, v, o, lse, call, heads, together, few,
            D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, FOLD, PRECISION, WIDEN, TMA, AHEAD,
        )  # fmt: skip

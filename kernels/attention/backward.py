"""softmax(Q Kᵀ) V, backward: P is made anew from lse, tile by tile, and each sum has one owner, so no atomics.

    p = share 2^(s - lse);  dp[i,j] = do[i]·v[j];  delta[i] = do[i]·o[i] - dlse[i];  ds = p (dp - delta)
    dv[j] = sum_i p do[i];  dk[j] = scale sum_i ds q[i];  dq[i] = scale sum_j ds k[j];  dbias = ds
    dsink = - sum_i share exp(sink - lse[i]) delta[i]

Without rounding, share is 1. But a large lse holds little of its sum's logarithm, and an o of 16 bits gives a wrong
delta. The kernel that makes dq meets all keys of its rows, and so it runs first: share and delta come from sums over
these keys. What is made after it uses both. dq has been summed with the wrong delta by then, and from ds of 16 bits,
so that what all keys have in common has been multiplied by a sum of ds that is wrong by ``left``:

    dq[i] = scale share (sum_j ds k[j]  -  left[i] mean[i])

The exact mean is that of the keys by p (under a softcap, by p times its slope). That of one tile has the same offset,
and the row's p of that tile keep hidden keys out of it: so one tile is met again, and, where ``left`` is large beside
the root of the sum of the rows' ds², as values with an offset make it, all of them: :func:`take_back`.

With dropout p reaches o as m p / (1 - rate), so dv and dp take it masked and scaled alike; delta needs no change. Under
a softcap ds is multiplied by the cap's slope before it reaches q and k. A row that sees nothing has lse = -inf: it is
read as +inf, which makes its p, and with delta = 0 all of its gradients, 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import find_program, key_range, query_range, sequence
from .scores import LOG2E, biased, cap_slope, kept, logits
from .tiles import (
    ROW_BLOCK,
    described,
    dot,
    dot_add,
    head_of,
    load_halves,
    load_rows,
    load_tile,
    load_vector,
    narrow,
    number,
    rows_of,
    store_tile,
)


@triton.jit(do_not_specialize=["o", "d_o", "lse", "scratch", "call", "heads", "together"])
def attention_delta(
    o, d_o, lse, scratch, call, heads, together,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows ``scratch`` of a tile of queries, as lse and o have them."""
    b, h, tile = find_program(tl.program_id(0), call, heads, together, ROW_BLOCK, OF_KEYS=False)
    q_row, rows, tq, _, _, _, _ = sequence(call, b)
    i0 = tile * ROW_BLOCK
    if i0 < rows:
        row = i0 + tl.arange(0, ROW_BLOCK)
        o_head = head_of(o, b, h, q_row, ALIGN)
        d_head = head_of(d_o, b, h, q_row, ALIGN)
        delta = tl.zeros([ROW_BLOCK], tl.float32)
        place = tl.cast(row, tl.int64)
        for first in range(0, DV, BLOCK_DV):
            o_tile = load_rows(o_head, place * number(o.row), row < tq, DV, first, BLOCK_DV, ALIGN)
            d_tile = load_rows(d_head, place * number(d_o.row), row < tq, DV, first, BLOCK_DV, ALIGN)
            delta += tl.sum(o_tile.to(tl.float32) * d_tile.to(tl.float32), 1)
        log = tl.load(head_of(lse, b, h, q_row, 1) + row, mask=row < tq, other=float("-inf"))
        empty = log == float("-inf")
        delta = tl.where(empty, 0.0, delta)
        base = rows_of(call, scratch, b, h, q_row, heads)
        tl.store(scratch.log + base + row, tl.where(empty, float("inf"), log * LOG2E))
        tl.store(scratch.delta + base + row, delta)
        tl.store(scratch.share + base + row, tl.where(empty, 0.0, 1.0))


@triton.jit(do_not_specialize=["scratch", "dsinks", "call", "heads", "together"])
def attention_backward_sinks(scratch, dsinks, call, heads, together):
    """A tile of queries' part of the sinks' gradient, into dsinks [tiles, Hq]."""
    b, h, tile = find_program(tl.program_id(0), call, heads, together, ROW_BLOCK, OF_KEYS=False)
    q_row, rows, _, _, _, _, _ = sequence(call, b)
    i0 = tile * ROW_BLOCK
    if i0 < rows:
        base = rows_of(call, scratch, b, h, q_row, heads)
        sink = tl.load(call.sinks + h).to(tl.float32)
        weight = tl.exp2(sink * LOG2E - load_vector(scratch.log + base, i0, ROW_BLOCK))
        weight = weight * load_vector(scratch.share + base, i0, ROW_BLOCK)
        if call.cu_q is None:
            place = b * tl.cdiv(number(call.length_q), ROW_BLOCK) + tile
        else:  # the slot, as find_tile counts them
            place = q_row // ROW_BLOCK + b + tile
        part = tl.sum(weight * load_vector(scratch.delta + base, i0, ROW_BLOCK), 0)
        tl.store(dsinks + tl.cast(place, tl.int64) * heads + h, -part)


@triton.jit
def products(
    near1, near2, far, far_more, stride, start, count,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """q[i]·k[j] of a tile of one of them, in halves, with the other's rows from ``start`` on, as columns; and these
    rows' halves, [ROWS, D1] and [ROWS, D2]."""
    far1 = load_tile(far, stride, start, count, D, 0, ROWS, D1, ALIGN, CHECKED)
    product = dot(near1, tl.trans(far1), PRECISION, WIDEN)
    far2 = far1
    if D2 > 0:
        far2 = load_tile(far_more, stride, start, count, D, D1, ROWS, D2, ALIGN, CHECKED)
        product = dot_add(near2, tl.trans(far2), product, PRECISION, WIDEN)
    return product, far1, far2


@triton.jit
def add_queries(
    dk1, dk2, dv, k1, k2, v_tile, k_head, v_head, k_row, v_row,
    q_head, q_more, d_head, log_head, delta_head, share_head, q_row, d_row, begin, end,
    call, b, h, j, j0, tq, tk, shift,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dk (if KEYS) and dv (if VALUES) of a tile of keys what queries from ``begin`` to ``end`` send them.

    All tiles are transposed, [BLOCK_N, BLOCK_M], so that p and ds enter the products as they are. Keys past the last
    need no mask: each has rows of its own, which end as zeros; queries past the last are rows of 0 with log = +inf,
    which add nothing. Keys and values of more than 256 features are more than the registers hold from one tile to the
    next: they are read anew."""
    for start in tl.range(begin, end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        if D > 256:
            k1, k2 = load_halves(k_head, k_head, k_row, j0, tk, D, D1, D2, BLOCK_N, ALIGN)
        if DV > 256:
            v_tile = load_tile(v_head, v_row, j0, tk, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, True)
        s, q1, q2 = products(
            k1, k2, q_head, q_more, q_row, start, tq, D, D1, D2, BLOCK_M, ALIGN, PRECISION, WIDEN, True
        )
        s = logits(s, call, q1.dtype == tl.float32)
        i = row[None, :]
        log = load_vector(log_head, start, BLOCK_M)
        p = tl.exp2(biased(s, call, b, h, i, j, start, j0, tq, tk, shift, MASKED, False) - log[None, :])
        if k1.dtype == tl.float32 or call.bias.ptr is not None:
            p = p * load_vector(share_head, start, BLOCK_M)[None, :]
        d_tile = load_tile(d_head, d_row, start, tq, DV, 0, BLOCK_M, BLOCK_DV, ALIGN, True)  # [BLOCK_M, DV]
        if KEYS and k1.dtype == tl.float32:  # no tensor cores: else ptxas holds the operands of two products at once
            tl.debug_barrier()
        reaching = p
        if call.seed is not None:
            keep = tl.trans(kept(call, b, h, row[:, None], j0, BLOCK_M, BLOCK_N))
            reaching = tl.where(keep, p * call.kept_scale, 0.0)
        if KEYS:
            dp = dot(v_tile, tl.trans(d_tile), PRECISION, WIDEN)  # [BLOCK_N, BLOCK_M]
            if call.seed is not None:
                dp = tl.where(keep, dp * call.kept_scale, 0.0)
            ds = p * (dp - load_vector(delta_head, start, BLOCK_M)[None, :])
        if VALUES:
            dv = dot_add(narrow(reaching, d_tile.dtype, WIDEN), d_tile, dv, PRECISION, WIDEN)
        if KEYS:
            if call.cap_in is not None:
                ds = ds * cap_slope(s, call)
            ds = narrow(ds, q1.dtype, WIDEN)
            dk1 = dot_add(ds, q1, dk1, PRECISION, WIDEN)
            if D2 > 0:
                dk2 = dot_add(ds, q2, dk2, PRECISION, WIDEN)
    return dk1, dk2, dv


@triton.jit(do_not_specialize=["q", "k", "v", "d_o", "scratch", "dk", "dv", "call", "heads", "together"])
def attention_backward_keys(
    q, k, v, d_o, scratch, dk, dv, call, heads, together,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dk and dv (either may be None) of one tile of keys of one key head, summed over the query heads that share it."""
    KEYS: tl.constexpr = dk is not None
    VALUES: tl.constexpr = dv is not None
    b, head, tile = find_program(tl.program_id(0), call, heads, together, BLOCK_N, OF_KEYS=True)
    q_row, _, tq, k_row, keys, tk, shift = sequence(call, b)
    j0 = tile * BLOCK_N
    if j0 < keys:
        j = j0 + tl.arange(0, BLOCK_N)[:, None]
        last = tl.minimum(j0 + BLOCK_N, tk) - 1
        begin, whole, end = query_range(call, b, j0, last, tq, shift, BLOCK_M)
        k_head = head_of(k, b, head, k_row, ALIGN)
        k1, k2 = load_halves(k_head, k_head, number(k.row), j0, tk, D, D1, D2, BLOCK_N, ALIGN)  # [BLOCK_N, D1], [, D2]
        row_k = number(k.row)
        row_v = number(v.row)
        row_q = number(q.row)
        row_d = number(d_o.row)
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dk2 = dk1
        if D2 > 0:
            dk2 = tl.zeros([BLOCK_N, D2], tl.float32)
        v_head = head_of(v, b, head, k_row, ALIGN)
        v_tile = load_tile(v_head, number(v.row), j0, tk, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, True)  # [BLOCK_N, DV]
        dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        for h in range(head * number(call.group), head * number(call.group) + number(call.group)):
            query = head_of(q, b, h, q_row, ALIGN)
            q_head = described(query, row_q, tq, D, BLOCK_M, D1, ALIGN, TMA)
            q_more = described(query, row_q, tq, D, BLOCK_M, D2, ALIGN, TMA and D2 > 0)
            d_head = described(head_of(d_o, b, h, q_row, ALIGN), row_d, tq, DV, BLOCK_M, BLOCK_DV, ALIGN, TMA)
            base = rows_of(call, scratch, b, h, q_row, heads * number(call.group))
            log_head = scratch.log + base
            delta_head = scratch.delta + base
            share_head = scratch.share + base
            if call.pairs is not None or call.left is not None:
                dk1, dk2, dv_acc = add_queries(
                    dk1, dk2, dv_acc, k1, k2, v_tile, k_head, v_head, row_k, row_v,
                    q_head, q_more, d_head, log_head, delta_head, share_head, row_q, row_d,
                    begin, end, call, b, h, j, j0, tq, tk, shift,
                    D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, KEYS, VALUES, True,
                )  # fmt: skip
            else:
                if call.right is not None:
                    dk1, dk2, dv_acc = add_queries(
                        dk1, dk2, dv_acc, k1, k2, v_tile, k_head, v_head, row_k, row_v,
                        q_head, q_more, d_head, log_head, delta_head, share_head, row_q, row_d,
                        begin, whole, call, b, h, j, j0, tq, tk, shift,
                        D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, KEYS, VALUES, True,
                    )  # fmt: skip
                dk1, dk2, dv_acc = add_queries(
                    dk1, dk2, dv_acc, k1, k2, v_tile, k_head, v_head, row_k, row_v,
                    q_head, q_more, d_head, log_head, delta_head, share_head, row_q, row_d,
                    whole, end, call, b, h, j, j0, tq, tk, shift,
                    D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, KEYS, VALUES, False,
                )  # fmt: skip
        counted = j < tk  # past its length a key gets 0, whatever its row of the sums has taken in
        if KEYS:
            dk_head = head_of(dk, b, head, k_row, ALIGN)
            dk1 = tl.where(counted, dk1, 0.0)
            store_tile(dk1 * call.scale, dk_head, number(dk.row), j0, keys, D, 0, BLOCK_N, D1, ALIGN, WIDEN)
            if D2 > 0:
                dk2 = tl.where(counted, dk2, 0.0)
                store_tile(dk2 * call.scale, dk_head, number(dk.row), j0, keys, D, D1, BLOCK_N, D2, ALIGN, WIDEN)
        if VALUES:
            dv_head = head_of(dv, b, head, k_row, ALIGN)
            dv_acc = tl.where(counted, dv_acc, 0.0)
            store_tile(dv_acc, dv_head, number(dv.row), j0, keys, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, WIDEN)


@triton.jit
def weights(
    product, log, call, b, h, i, i0, j0, tq, tk, shift,
    BLOCK_N: tl.constexpr, PRECISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p of a tile, [BLOCK_M, BLOCK_N], from q·k; and the capped scores before bias, for the cap's slope."""
    s = logits(product, call, PRECISE)
    j = j0 + tl.arange(0, BLOCK_N)[None, :]
    return tl.exp2(biased(s, call, b, h, i, j, i0, j0, tq, tk, shift, MASKED, True) - log[:, None]), s


@triton.jit
def scores_gradient(p, dp, delta, call, b, h, i, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """ds of a tile from do·v, [BLOCK_M, BLOCK_N]."""
    if call.seed is not None:
        dp = tl.where(kept(call, b, h, i, j0, BLOCK_M, BLOCK_N), dp * call.kept_scale, 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def add_keys(
    dq1, dq2, total, excess, rounded, sloped, spread, q1, q2, d_tile, log, delta,
    k_head, k_more, v_head, k_row, v_row,
    begin, end, call, b, h, i, i0, tq, tk, shift,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to dq of a tile of queries what keys from ``begin`` to ``end`` send it, their p to ``total`` and their ds,
    without the cap's slope, to ``excess``; in 16 bits also ds as the product reads it to ``rounded``, and to ``spread``
    the squares of its sums by tiles, which stand for those of ds and cost nothing. Under a cap ``rounded`` is without
    ds before rounding, and ``sloped`` is p by the slope. In 16 bits ``total`` is left out where there is no bias, as
    scores are not that large, and ``excess`` where what was rounded is exact enough."""
    for start in tl.range(begin, end, BLOCK_N):
        v_tile = load_tile(v_head, v_row, start, tk, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, MASKED)
        product, k1, k2 = products(
            q1, q2, k_head, k_more, k_row, start, tk, D, D1, D2, BLOCK_N, ALIGN, PRECISION, WIDEN, MASKED
        )
        precise: tl.constexpr = q1.dtype == tl.float32
        p, s = weights(product, log, call, b, h, i, i0, start, tq, tk, shift, BLOCK_N, precise, MASKED)
        dp = dot(d_tile, tl.trans(v_tile), PRECISION, WIDEN)
        ds = scores_gradient(p, dp, delta, call, b, h, i, start, BLOCK_M, BLOCK_N)
        if precise or call.bias.ptr is not None:
            total += tl.sum(p, 1)
        if precise or call.bias.ptr is not None or call.sinks is not None or call.cap_in is not None:
            excess += tl.sum(ds, 1)
        if call.cap_in is not None:
            slope = cap_slope(s, call)
            ds = ds * slope
            if not precise:
                rounded -= tl.sum(ds, 1)
                sloped += tl.sum(p * slope, 1)
        ds = narrow(ds, q1.dtype, WIDEN)
        if not precise:
            part = tl.sum(ds.to(tl.float32), 1)
            rounded += part
            spread += part * part
        dq1 = dot_add(ds, k1, dq1, PRECISION, WIDEN)
        if D2 > 0:
            dq2 = dot_add(ds, k2, dq2, PRECISION, WIDEN)
    return dq1, dq2, total, excess, rounded, sloped, spread


@triton.jit
def take_back(
    dq1, dq2, left, total, everywhere, q1, q2, log, k_head, k_more, k_row, start, begin,
    call, b, h, i, i0, tq, tk, shift,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dq less ``left`` [BLOCK_M] times a mean of keys: by a row's weights, of all tiles, whose sum is ``total``, if
    ``everywhere``; else of the tile at ``start`` or, where it has none there, of the next one before it. In the product
    the weights sum to 1 or so, and dq is in units of a power of 2 near ``left``: p by ``left`` may be too small for
    float16."""
    while (start >= begin) & (tl.max(tl.abs(left), 0) > 0.0):
        product, k1, k2 = products(
            q1, q2, k_head, k_more, k_row, start, tk, D, D1, D2, BLOCK_N, ALIGN, PRECISION, WIDEN, True
        )
        p, s = weights(product, log, call, b, h, i, i0, start, tq, tk, shift, BLOCK_N, False, True)
        if call.cap_in is not None:
            p = p * cap_slope(s, call)
        own = tl.where(everywhere, total, tl.sum(p, 1))
        taken = (own > 1e-30) & (tl.abs(left) > 1e-30)
        unit = tl.where(taken, left, 1.0).to(tl.int32, bitcast=True) & 0x7F800000
        less = (0x7F000000 - unit).to(tl.float32, bitcast=True)
        more = unit.to(tl.float32, bitcast=True)
        root = tl.rsqrt(tl.where(taken, own, 1.0))
        p = narrow(p * tl.where(taken, -left * less * root * root, 0.0)[:, None], q1.dtype, WIDEN)
        dq1 = dot_add(p, k1, dq1 * less[:, None], PRECISION, WIDEN) * more[:, None]
        if D2 > 0:
            dq2 = dot_add(p, k2, dq2 * less[:, None], PRECISION, WIDEN) * more[:, None]
        left = tl.where((own > 1e-30) & (not everywhere), 0.0, left)
        start -= BLOCK_N
    return dq1, dq2


@triton.jit(do_not_specialize=["q", "k", "v", "d_o", "dlse", "scratch", "dq", "call", "heads", "together"])
def attention_backward_queries(
    q, k, v, d_o, dlse, scratch, dq, call, heads, together,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head, and the share and delta of its rows."""
    b, h, tile = find_program(tl.program_id(0), call, heads, together, BLOCK_M, OF_KEYS=False)
    q_row, rows, tq, k_row, _, tk, shift = sequence(call, b)
    i0 = tile * BLOCK_M
    if i0 < rows:
        i = i0 + tl.arange(0, BLOCK_M)[:, None]
        last = tl.minimum(i0 + BLOCK_M, tq) - 1
        begin, whole_begin, whole_end, end = key_range(call, b, i0, last, tk, shift, BLOCK_N)
        q_head = head_of(q, b, h, q_row, ALIGN)
        q1, q2 = load_halves(q_head, q_head, number(q.row), i0, tq, D, D1, D2, BLOCK_M, ALIGN)
        d_head = head_of(d_o, b, h, q_row, ALIGN)
        d_tile = load_tile(d_head, number(d_o.row), i0, tq, DV, 0, BLOCK_M, BLOCK_DV, ALIGN, True)
        base = rows_of(call, scratch, b, h, q_row, heads)
        log = load_vector(scratch.log + base, i0, BLOCK_M)
        delta = load_vector(scratch.delta + base, i0, BLOCK_M)
        row_k = number(k.row)
        row_v = number(v.row)
        key = head_of(k, b, h // number(call.group), k_row, ALIGN)
        value = head_of(v, b, h // number(call.group), k_row, ALIGN)
        k_head = described(key, row_k, tk, D, BLOCK_N, D1, ALIGN, TMA)
        k_more = described(key, row_k, tk, D, BLOCK_N, D2, ALIGN, TMA and D2 > 0)
        v_head = described(value, row_v, tk, DV, BLOCK_N, BLOCK_DV, ALIGN, TMA)
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
        dq2 = dq1
        if D2 > 0:
            dq2 = tl.zeros([BLOCK_M, D2], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        excess = total
        rounded = total
        sloped = total
        spread = total
        if dlse is not None:
            row = i0 + tl.arange(0, BLOCK_M)
            more = tl.load(head_of(dlse, b, h, q_row, 1) + row, mask=row < tq, other=0.0)
            more = tl.where(log == float("inf"), 0.0, more)
            delta -= more
        if call.pairs is None:
            if call.left is not None:
                dq1, dq2, total, excess, rounded, sloped, spread = add_keys(
                    dq1, dq2, total, excess, rounded, sloped, spread, q1, q2, d_tile, log, delta,
                    k_head, k_more, v_head, row_k, row_v, begin, whole_begin, call, b, h, i, i0, tq, tk, shift,
                    D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, True,
                )  # fmt: skip
            dq1, dq2, total, excess, rounded, sloped, spread = add_keys(
                dq1, dq2, total, excess, rounded, sloped, spread, q1, q2, d_tile, log, delta, k_head, k_more, v_head,
                row_k, row_v, whole_begin, whole_end, call, b, h, i, i0, tq, tk, shift,
                D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, False,
            )  # fmt: skip
        dq1, dq2, total, excess, rounded, sloped, spread = add_keys(
            dq1, dq2, total, excess, rounded, sloped, spread, q1, q2, d_tile, log, delta,
            k_head, k_more, v_head, row_k, row_v, whole_end, end, call, b, h, i, i0, tq, tk, shift,
            D, DV, D1, D2, BLOCK_DV, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN, True,
        )  # fmt: skip
        # All of dp - delta, by p, is dlse, with a sink's own p in both sums.
        weighed: tl.constexpr = q1.dtype == tl.float32 or call.bias.ptr is not None
        if not weighed and call.sinks is None and call.cap_in is None:
            excess = rounded
        weight = tl.zeros([BLOCK_M], tl.float32)
        if call.sinks is not None:
            weight = tl.exp2(tl.load(call.sinks + h).to(tl.float32) * LOG2E - log)
        wrong = excess - weight * delta
        row = tl.arange(0, BLOCK_M)
        share = tl.full([BLOCK_M], 1.0, tl.float32)
        if weighed:
            whole = total + weight
            share = tl.where(whole == 0.0, 0.0, 1.0 / tl.where(whole == 0.0, 1.0, whole))
            wrong *= share
            tl.store(scratch.share + base + i0 + row, share)
        else:
            total = 1.0 - weight
        if dlse is not None:
            wrong -= more
        delta += wrong
        tl.store(scratch.delta + base + i0 + row, delta)
        if q1.dtype != tl.float32:
            # q and log again: held until here they would take registers from the loops.
            log = load_vector(scratch.log + base, i0, BLOCK_M)
            q1, q2 = load_halves(q_head, q_head, number(q.row), i0, tq, D, D1, D2, BLOCK_M, ALIGN)
            if call.cap_in is not None:
                total = sloped
                left = rounded + wrong * total
            else:
                left = rounded - excess + wrong * total
            # About 6 roundings of the dtype, squared. Where values have no offset, left is far below; beyond it, what
            # a tile's mean differs by from that of all keys comes near the bound on dq's error.
            large: tl.constexpr = 2.0**-15 if q1.dtype == tl.float16 else 2.0**-9
            everywhere = tl.max(left * left, 0) > large * tl.max(spread, 0)
            one = (whole_begin < whole_end) & (not everywhere)
            start = tl.where(one, whole_end, tl.cdiv(end, BLOCK_N) * BLOCK_N) - BLOCK_N
            dq1, dq2 = take_back(
                dq1, dq2, left, total, everywhere, q1, q2, log, k_head, k_more, row_k, start, begin,
                call, b, h, i, i0, tq, tk, shift,
                D, D1, D2, BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN,
            )  # fmt: skip
        dq1 = dq1 * share[:, None]
        dq_head = head_of(dq, b, h, q_row, ALIGN)
        store_tile(dq1 * call.scale, dq_head, number(dq.row), i0, rows, D, 0, BLOCK_M, D1, ALIGN, WIDEN)
        if D2 > 0:
            dq2 = dq2 * share[:, None]
            store_tile(dq2 * call.scale, dq_head, number(dq.row), i0, rows, D, D1, BLOCK_M, D2, ALIGN, WIDEN)

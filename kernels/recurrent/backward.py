"""The scan backward: from the last step to the first, gradients of the gates and the running dh = dgates · W_hh.

The roles of recurrent.py. *sequence*: one launch, dh and dc in registers, W_hh on the chip. *step*: one launch a step,
which multiplies the dgates of the step walked before by W_hh, adds what reached h beside that product (``carry``), and
makes its own dgates from it; gru_reset_before and a projection take two. Nothing is added atomically: each element
has one owner, so the bits are the same every time. dx, dW and db are products over all steps, made afterwards.

The kernels walk back: "later" is the step that the forward walk took after this one, "before" the one it took before.
What reaches a state that a reset put in (reset_h, reset_c) is summed over the steps that were cleared: in registers
where one launch walks all steps, else in place.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_backward_blend, gru_backward_reset, lstm_backward, lstm_state, rnn_backward
from .forward import (
    C0,
    H0,
    LENGTHS,
    RESET,
    SHARES_C,
    SHARES_H,
    VARYING,
    dot,
    gates_of,
    has_c,
    is_gru,
    parts_of,
    put_in_of,
    scale_of,
    share_of,
    tape_of,
    through,
)

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, var-annotated"

# Further bits of `given`: which gradients came or have been made.
DY, DSTATES, CARRY, DC, LATER = (tl.constexpr(1 << bit) for bit in range(7, 12))


@triton.jit
def load(at, mask):
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def cleared(reset, t, rows, B, given, reset_t, reset_b):
    """Whether the state was cleared before step t: [BLOCK_B]."""
    mask = (rows < B) & ((given & RESET) != 0)
    return tl.load(reset + t * reset_t + rows.to(tl.int64) * reset_b, mask=mask, other=0).to(tl.int1)


@triton.jit
def block(w, outputs, inputs, N, K, UPCAST: tl.constexpr):
    """A block of w [N, K], not transposed: [outputs, inputs]."""
    at = w + outputs[:, None] * K + inputs[None, :]
    tile = tl.load(at, mask=(outputs < N)[:, None] & (inputs < K)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def lstm_gradient(
    kept, c_at, c_before, c_start, has_before, put_in, out, H, total, dc, zoneout_c, own, has_shares, live, clear, mask,
    CELL: tl.constexpr,
):
    """One step's dgates, stored at ``out`` and returned in their dtype, a tuple, and the gradient of c_prev.

    ``total`` and ``dc`` are the gradients of h_t and c_t; ``c_start`` is c_prev where no step came before, ``put_in``
    after a reset; ``own`` is where zoneout's shares are.
    """
    dtype = out.dtype.scalar.element_ty
    c_prev = tl.where(has_before, load(c_before, mask & has_before), c_start)
    gates = ()
    for g in tl.static_range(gates_of(CELL)):
        gates += (load(kept + g * H, mask),)
    c_prev = tl.where(clear, put_in, c_prev)
    if zoneout_c is None:
        d, dc_prev = lstm_backward(gates, c_prev, load(c_at, mask), total, dc, CELL)
    else:  # h was made of the c that keeps nothing
        passed = dc * share_of(zoneout_c, own, mask, has_shares)
        d, dc_prev = lstm_backward(gates, c_prev, lstm_state(gates, c_prev, CELL), total, dc - passed, CELL)
        dc_prev += passed
    a = ()
    for g in tl.static_range(gates_of(CELL)):
        a += (tl.where(live, d[g], 0.0).to(dtype),)
    for g in tl.static_range(gates_of(CELL)):
        tl.store(out + g * H, a[g], mask=mask)
    return a, dc_prev


@triton.jit
def rnn_gradient(h_at, out, total, live, mask, RELU: tl.constexpr):
    d = tl.where(live, rnn_backward(load(h_at, mask), total, RELU), 0.0).to(out.dtype.scalar.element_ty)
    tl.store(out, d, mask=mask)
    return d


@triton.jit
def back_through(dh, a, w, gate: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """dh += a · W of one gate: ``a`` by parts of the gate's units, ``dh`` by parts of the state's."""
    found = ()
    for p in tl.static_range(len(dh)):
        found += (through(a, w[p][gate], dh[p], PRECISION, UPCAST),)
    return found


@triton.jit(do_not_specialize=VARYING)
def backward_sequence(
    dy, dh_n, dc_n, dstates,  # [T,B,H] by rows x_t, x_b; fp32 [B,H] twice; fp32 [T,B,H]
    y, states, tape, w_hh, h0, c0, lengths, reset,
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c,  # as forward_sequence
    dgates, dhidden, dh0, dc0,  # [T,B,G*H], [T,B,H], [B,H] twice
    dreset_h, dreset_c,  # [B,H] twice, or None
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    PARTS: tl.constexpr = 2 if TAIL else 1
    dtype = y.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    wide = rows.to(tl.int64)
    units = parts_of(BLOCK_H, TAIL)
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    begin = tl.where(direction > 0, 0, length - 1)[:, None]  # the step with which each row began
    # Of each part of the units: its mask and place in [B,H], dh, dc, h0 or c0, and W_hh by gate and part of its units.
    mask, state, dh, dc, start, w = (), (), (), (), (), ()
    scale, put_in, to_reset_h, to_reset_c = (), (), (), ()
    for p in tl.static_range(PARTS):
        mask += ((rows < B)[:, None] & (units[p] < H)[None, :],)
        state += (wide[:, None] * H + units[p][None, :],)  # [BLOCK_B, BLOCK_H or TAIL]
        dh += (load(dh_n + state[p], mask[p] & ((given & CARRY) != 0)),)
        if has_c(CELL):
            dc += (load(dc_n + state[p], mask[p] & ((given & DC) != 0)),)
            start += (load(c0 + state[p], mask[p] & ((given & C0) != 0)),)
            put_in += (put_in_of(reset_c, state[p], mask[p]),)
        elif is_gru(CELL):
            start += (load(h0 + state[p], mask[p] & ((given & H0) != 0)),)
            put_in += (put_in_of(reset_h, state[p], mask[p]),)
        scale += (scale_of(state_mask, state[p], mask[p]),)
        if reset_h is not None:
            to_reset_h += (tl.zeros_like(dh[p]),)
        if reset_c is not None:
            to_reset_c += (tl.zeros_like(dh[p]),)
        w_p = ()
        for gate in tl.static_range(G):
            w_g = ()
            for k in tl.static_range(PARTS):
                w_g += (block(w_hh + gate * H * H, units[k], units[p], H, H, UPCAST),)
            w_p += (w_g,)
        w += (w_p,)

    for step in tl.range(0, T, num_stages=STAGES):
        t = (first + (T - 1 - step) * direction).to(tl.int64)
        row = t * B + wide
        live = (t < length)[:, None]
        clear = cleared(reset, t, rows, B, given, reset_t, reset_b)[:, None]
        product, a, a_0, a_1, a_2, dc_prev = (), (), (), (), (), ()  # a by part and gate; the others by part
        beside, given_h, given_c = (), (), ()
        if is_gru(CELL):
            r, h_prev = (), ()
        for p in tl.static_range(PARTS):
            at = row[:, None] * H + units[p][None, :]
            before = at - direction.to(tl.int64) * B * H
            kept = tape + row[:, None] * (tape_of(CELL) * H) + units[p][None, :]
            out = dgates + row[:, None] * (G * H) + units[p][None, :]
            dy_at = dy + (t * x_t + wide * x_b)[:, None] * H + units[p][None, :]
            total = dh[p] + load(dy_at, mask[p] & live & ((given & DY) != 0))
            if zoneout_h is None:
                passed = tl.zeros_like(total)
            else:
                passed = total * share_of(zoneout_h, at, mask[p], given & SHARES_H)
                total -= passed
            if has_c(CELL):
                dc_p = dc[p] + load(dstates + at, mask[p] & ((given & DSTATES) != 0))
                d, d_c = lstm_gradient(
                    kept, states + at, states + before, start[p], step < T - 1, put_in[p], out, H, total, dc_p,
                    zoneout_c, at, given & SHARES_C, live, clear, mask[p], CELL,
                )
                a += (d,)
                if reset_c is not None:
                    given_c += (to_reset_c[p] + tl.where(live & clear, d_c, 0.0),)
                dc_prev += (tl.where(live, tl.where(clear, 0.0, d_c), dc_p),)
                beside += (passed,)
            elif is_gru(CELL):
                r_p, z, n = load(kept, mask[p]), load(kept + H, mask[p]), load(kept + 2 * H, mask[p])
                h_p = load(y + before, mask[p] & (t != begin) & (step < T - 1))
                h_p = tl.where(clear, put_in[p], tl.where(t == begin, start[p], h_p))
                dz, dn = gru_backward_blend(z, n, h_p, total)
                d_n = tl.where(live, dn, 0.0).to(dtype)
                d_z = tl.where(live, dz, 0.0).to(dtype)
                if CELL == "gru":
                    dq = tl.where(live, dn * r_p, 0.0).to(dtype)
                    tl.store(dhidden + at, dq, mask=mask[p])
                    d_r = tl.where(live, gru_backward_reset(r_p, load(kept + 3 * H, mask[p]), dn), 0.0).to(dtype)
                    tl.store(out, d_r, mask=mask[p])
                    a_0 += (d_r,)
                    a_2 += (dq,)
                else:
                    r += (r_p,)
                    h_prev += (h_p,)
                    a_2 += (d_n,)
                tl.store(out + H, d_z, mask=mask[p])
                tl.store(out + 2 * H, d_n, mask=mask[p])
                a_1 += (d_z,)
                if zoneout_h is None:
                    beside += (total * z,)
                else:
                    beside += (passed + total * z,)
            else:
                a_0 += (rnn_gradient(y + at, out, total, live, mask[p], CELL == "rnn_relu"),)
                beside += (passed,)
        if CELL == "gru_reset_before":
            through_r = ()
            for p in tl.static_range(PARTS):
                dq = through(a_2, w[p][2], tl.zeros_like(dh[p]), PRECISION, UPCAST) * scale[p]
                d_r = tl.where(live, gru_backward_reset(r[p], h_prev[p], dq), 0.0).to(dtype)
                tl.store(dgates + row[:, None] * (G * H) + units[p][None, :], d_r, mask=mask[p])
                a_0 += (d_r,)
                through_r += (beside[p] + dq * r[p],)
            beside = through_r
        # What passes beside the products joins their sum at once; where a mask lies between, after it.
        for p in tl.static_range(PARTS):
            if state_mask is None:
                product += (beside[p],)
            else:
                product += (tl.zeros_like(dh[p]),)
        if CELL == "gru":
            product = back_through(product, a_2, w, 2, PRECISION, UPCAST)
        if has_c(CELL):
            for gate in tl.static_range(G):
                a_g = ()
                for p in tl.static_range(PARTS):
                    a_g += (a[p][gate],)
                product = back_through(product, a_g, w, gate, PRECISION, UPCAST)
            dc = dc_prev
        else:
            product = back_through(product, a_0, w, 0, PRECISION, UPCAST)
            if is_gru(CELL):
                product = back_through(product, a_1, w, 1, PRECISION, UPCAST)
        dh_prev = ()
        for p in tl.static_range(PARTS):
            if state_mask is None:
                reached = product[p]
            else:
                reached = beside[p] + product[p] * scale[p]
            if reset_h is not None:
                given_h += (to_reset_h[p] + tl.where(live & clear, reached, 0.0),)
            dh_prev += (tl.where(live, tl.where(clear, 0.0, reached), dh[p]),)
        dh = dh_prev
        if reset_h is not None:
            to_reset_h = given_h
        if reset_c is not None:
            to_reset_c = given_c

    for p in tl.static_range(PARTS):
        tl.store(dh0 + state[p], dh[p].to(dtype), mask=mask[p] & ((given & H0) != 0))
        if has_c(CELL):
            tl.store(dc0 + state[p], dc[p].to(dtype), mask=mask[p] & ((given & C0) != 0))
        if reset_h is not None:
            tl.store(dreset_h + state[p], to_reset_h[p].to(dtype), mask=mask[p])
        if reset_c is not None:
            tl.store(dreset_c + state[p], to_reset_c[p].to(dtype), mask=mask[p])


@triton.jit
def product_of(
    acc, a, rows, w, units, K, N, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    CACHE: tl.constexpr,
):
    """acc += a · w; a [BLOCK_B, K] at its row pointers, zeros where ``rows`` is off; w [K, N] at ``units``."""
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        a_k = tl.load(
            a + inputs[None, :], mask=rows[:, None] & (inputs < K)[None, :], other=0.0, cache_modifier=CACHE
        )
        acc = dot(a_k, block(w, inputs, units, K, N, UPCAST), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def add_to(total, at, value, mask):
    """total += value; each element has one owner."""
    tl.store(total + at, tl.load(total + at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def state_gradient(
    carry, dgates, dhidden, w_hh, reset, state_mask, dreset_h, lengths, later, rows, units, mask, B, given, reset_t,
    reset_b, H, P, CELL: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    """The gradient that reaches h_t from the step ``later``: through the product with W_hh, and beside it."""
    G: tl.constexpr = gates_of(CELL)
    # Rows of W_hh that meet h itself with dgates: of a GRU those of r and z.
    DIRECT: tl.constexpr = 2 if is_gru(CELL) else G
    has_later = (given & LATER) != 0
    if dreset_h is None:
        known = (rows < B) & has_later & ~cleared(reset, later, rows, B, given, reset_t, reset_b)
    else:
        known = (rows < B) & has_later
    beside = load(carry + rows.to(tl.int64)[:, None] * P + units[None, :], mask & ((given & CARRY) != 0))
    if state_mask is None:
        dh = beside
    else:
        dh = tl.zeros_like(beside)
    row = later * B + rows
    dh = product_of(
        dh, dgates + (row * (G * H))[:, None], known, w_hh, units, DIRECT * H * has_later, P, BLOCK_K, PRECISION,
        UPCAST, "",
    )
    if CELL == "gru":
        dh = product_of(
            dh, dhidden + (row * H)[:, None], known, w_hh + 2 * H * P, units, H * has_later, P, BLOCK_K, PRECISION,
            UPCAST, "",
        )
    state = rows.to(tl.int64)[:, None] * P + units[None, :]
    if state_mask is not None:
        dh = beside + dh * scale_of(state_mask, state, mask)
    if dreset_h is not None:
        length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=later + 1)
        cut = cleared(reset, later, rows, B, given, reset_t, reset_b)
        given_up = (cut & has_later & (later < length))[:, None]
        add_to(dreset_h, state, dh, mask & given_up)
        dh = tl.where(given_up, 0.0, dh)
    return dh


@triton.jit(do_not_specialize=VARYING)
def backward_state(
    dy, w_hh, lengths, reset, state_mask, zoneout_h, dgates, dhidden, carry, dh0, dreset_h,
    t, later, B, given, x_t, x_b, reset_t, reset_b, H, P,
    CELL: tl.constexpr, FINAL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The gradient of the state alone: of h0, which ends the walk (FINAL), or of a projected h_t, into dhidden."""
    t, later = t.to(tl.int64), later.to(tl.int64)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = rows.to(tl.int64)
    mask = (rows < B)[:, None] & (units < P)[None, :]
    state = wide[:, None] * P + units[None, :]
    dh = state_gradient(
        carry, dgates, dhidden, w_hh, reset, state_mask, dreset_h, lengths, later, rows, units, mask, B, given, reset_t,
        reset_b, H, P, CELL, BLOCK_K, PRECISION, UPCAST,
    )
    if FINAL:
        tl.store(dh0 + state, dh.to(dh0.dtype.element_ty), mask=mask)
    else:
        length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=t + 1)
        live = (t < length)[:, None]
        dy_at = dy + (t * x_t + wide * x_b)[:, None] * P + units[None, :]
        total = dh + load(dy_at, mask & live & ((given & DY) != 0))
        own = (t * B + wide)[:, None] * P + units[None, :]
        passed = tl.zeros_like(dh)
        if zoneout_h is not None:
            passed = total * share_of(zoneout_h, own, mask, given & SHARES_H)
            if dreset_h is None:
                cut = cleared(reset, t, rows, B, given, reset_t, reset_b)[:, None]
                passed, total = tl.where(cut, 0.0, passed), total - passed
            else:
                total -= passed
        tl.store(dhidden + own, tl.where(live, total, 0.0).to(dhidden.dtype.element_ty), mask=mask)
        tl.store(carry + state, tl.where(live, passed, dh), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def backward_step(
    dy, dstates, y, states, tape, w_hh, w_hr, h0, c0, lengths, reset,
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c,  # as forward_step
    dgates, dhidden, carry, dc_carry,  # fp32 [B,H] twice: what reaches h beside the product; the gradient of c
    dreset_h, dreset_c,  # fp32 [B,P] and [B,H], sums; or None
    t, later, B, given, first, direction, x_t, x_b, reset_t, reset_b, T, H, P,
    CELL: tl.constexpr, PHASE: tl.constexpr, PROJECTED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    dtype = y.dtype.element_ty
    t, later = t.to(tl.int64), later.to(tl.int64)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    wide = rows.to(tl.int64)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    state = wide[:, None] * H + units[None, :]  # [BLOCK_B, BLOCK_N]
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    live = (t < length)[:, None]
    begin = tl.where(direction > 0, 0, length - 1)[:, None]
    clear = cleared(reset, t, rows, B, given, reset_t, reset_b)[:, None]
    row = t * B + wide
    at = row[:, None] * H + units[None, :]
    before = at - direction.to(tl.int64) * B * H
    has_before = t != first
    kept = tape + row[:, None] * (tape_of(CELL) * H) + units[None, :]
    out = dgates + row[:, None] * (G * H) + units[None, :]
    if is_gru(CELL):
        h_prev = tl.where(
            t == begin, load(h0 + state, mask & (t == begin) & ((given & H0) != 0)),
            load(y + before, mask & (t != begin) & has_before),
        )
        h_prev = tl.where(clear, put_in_of(reset_h, state, mask), h_prev)
        r = load(kept, mask)

    if PHASE == 1:  # gru_reset_before's second launch: through W_n, of all units at once, to r
        dq = product_of(
            tl.zeros((BLOCK_B, BLOCK_N), tl.float32), dgates + (row * (G * H) + 2 * H)[:, None], rows < B,
            w_hh + 2 * H * P, units, H, P, BLOCK_K, PRECISION, UPCAST, "",
        ) * scale_of(state_mask, state, mask)
        tl.store(out, tl.where(live, gru_backward_reset(r, h_prev, dq), 0.0).to(dtype), mask=mask)
        dh = load(carry + state, mask)
        reached = dh + dq * r
        if reset_h is None:
            reached = tl.where(clear, 0.0, reached)
        tl.store(carry + state, tl.where(live, reached, dh), mask=mask)
    else:
        if PROJECTED:
            dh = product_of(
                tl.zeros((BLOCK_B, BLOCK_N), tl.float32), dhidden + (row * P)[:, None], rows < B, w_hr, units, P, H,
                BLOCK_K, PRECISION, UPCAST, "",
            )
            total = dh
        else:
            dh = state_gradient(
                carry, dgates, dhidden, w_hh, reset, state_mask, dreset_h, lengths, later, rows, units, mask, B, given,
                reset_t, reset_b, H, P, CELL, BLOCK_K, PRECISION, UPCAST,
            )
            dy_at = dy + (t * x_t + wide * x_b)[:, None] * H + units[None, :]
            total = dh + load(dy_at, mask & live & ((given & DY) != 0))
        beside = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
        if zoneout_h is not None and not PROJECTED:  # of a projected h it acts in backward_state
            beside = total * share_of(zoneout_h, at, mask, given & SHARES_H)
            total -= beside
            if reset_h is None:
                beside = tl.where(clear, 0.0, beside)
        if has_c(CELL):
            dc = load(dc_carry + state, mask & ((given & DC) != 0))
            dc += load(dstates + at, mask & ((given & DSTATES) != 0))
            c_start = load(c0 + state, mask & ((t == first) & ((given & C0) != 0)))
            _, dc_prev = lstm_gradient(
                kept, states + at, states + before, c_start, has_before, put_in_of(reset_c, state, mask), out, H,
                total, dc, zoneout_c, at, given & SHARES_C, live, clear, mask, CELL,
            )
            if dreset_c is not None:
                add_to(dreset_c, state, dc_prev, mask & live & clear)
            tl.store(dc_carry + state, tl.where(live, tl.where(clear, 0.0, dc_prev), dc), mask=mask)
        elif is_gru(CELL):
            z, n = load(kept + H, mask), load(kept + 2 * H, mask)
            dz, dn = gru_backward_blend(z, n, h_prev, total)
            if CELL == "gru":
                tl.store(dhidden + at, tl.where(live, dn * r, 0.0).to(dtype), mask=mask)
                dr = gru_backward_reset(r, load(kept + 3 * H, mask), dn)
                tl.store(out, tl.where(live, dr, 0.0).to(dtype), mask=mask)
            direct = total * z
            if CELL == "gru" and reset_h is None:  # else the second launch, or the step before, clears it
                direct = tl.where(clear, 0.0, direct)
            if zoneout_h is None:
                beside = direct
            else:
                beside += direct
            tl.store(out + H, tl.where(live, dz, 0.0).to(dtype), mask=mask)
            tl.store(out + 2 * H, tl.where(live, dn, 0.0).to(dtype), mask=mask)
        else:
            rnn_gradient(y + at, out, total, live, mask, CELL == "rnn_relu")
        if not PROJECTED:
            tl.store(carry + state, tl.where(live, beside, dh), mask=mask)

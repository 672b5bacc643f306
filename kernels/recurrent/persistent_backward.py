"""The walk back in the role of recurrent_persistent.py: a program owns BLOCK_N units of the state, and their columns of
W_hh. What the programs tell each other is dgates itself, which none of them stores twice, so a step needs no other
place than its own; of a reset before the product dn comes first, then dr, through which it passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_backward_blend, gru_backward_reset, lstm_backward, lstm_state, rnn_backward
from .backward import CARRY, DC, DSTATES, DY, cleared, load, product_of
from .forward import (
    C0,
    H0,
    LENGTHS,
    SHARES_C,
    SHARES_H,
    VARYING,
    gates_of,
    has_c,
    is_gru,
    put_in_of,
    scale_of,
    share_of,
    tape_of,
)
from .persistent import arrive, wait

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, misc"


@triton.jit
def through_w_hh(
    beside, dgates, dhidden, row, known, w_hh, units, H, state_mask, scale,
    CELL: tl.constexpr, DIRECT: tl.constexpr, G: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """beside + dgates · W_hh of the rows ``row``, where ``known``, times the mask; DIRECT: gates that met h itself, of
    a GRU r and z."""
    if state_mask is None:
        dh = beside
    else:
        dh = tl.zeros_like(beside)
    dh = product_of(
        dh, dgates + (row * (G * H))[:, None], known, w_hh, units, DIRECT * H, H, BLOCK_K, PRECISION, UPCAST, ".cg"
    )
    if CELL == "gru":
        dh = product_of(
            dh, dhidden + (row * H)[:, None], known, w_hh + 2 * H * H, units, H, H, BLOCK_K, PRECISION, UPCAST, ".cg"
        )
    if state_mask is not None:
        dh = beside + dh * scale
    return dh


@triton.jit
def read_step(
    dy, tape, y, states, t, wide, units, length, begin, has_before, mask, B, given, direction, x_t, x_b, H,
    CELL: tl.constexpr,
):
    """What a step reads of its own, unchanged: dy_t, the tape's blocks, and c_{t-1} (LSTM), h_{t-1} (GRU) or h_t."""
    live = (t < length)[:, None]
    dy_t = tl.load(
        dy + (t * x_t + wide * x_b)[:, None] * H + units[None, :], mask=mask & live & ((given & DY) != 0), other=0.0
    )
    row = t * B + wide
    at = row[:, None] * H + units[None, :]
    before = at - tl.cast(direction, tl.int64) * B * H
    if has_c(CELL):
        state = tl.load(states + before, mask=mask & has_before, other=0.0)
    elif is_gru(CELL):
        state = tl.load(y + before, mask=mask & (t != begin) & has_before, other=0.0)
    else:
        state = tl.load(y + at, mask=mask, other=0.0)
    kept = tape + row[:, None] * (tape_of(CELL) * H) + units[None, :]
    blocks = ()
    for k in tl.static_range(tape_of(CELL)):
        blocks += (tl.load(kept + k * H, mask=mask, other=0.0),)
    return dy_t, blocks, state


@triton.jit(do_not_specialize=VARYING)
def backward_persistent(
    dy, dh_n, dc_n, dstates,  # as backward_sequence
    y, states, tape, w_hh, h0, c0, lengths, reset,
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c,
    dgates, dhidden, dh0, dc0, dreset_h, dreset_c,
    arrived,  # int32 [tiles of the batch, 32], zeros
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    DIRECT: tl.constexpr = 2 if is_gru(CELL) else G
    MEETINGS: tl.constexpr = 2 if CELL == "gru_reset_before" else 1
    dtype = y.dtype.element_ty
    programs = tl.num_programs(0)
    arrived += tl.program_id(1) * 32
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (rows < B)[:, None] & (units < H)[None, :]
    wide = rows.to(tl.int64)
    state = wide[:, None] * H + units[None, :]  # [BLOCK_B, BLOCK_N]
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    begin = tl.where(direction > 0, 0, length - 1)[:, None]  # the step with which each row began
    dh = load(dh_n + state, mask & ((given & CARRY) != 0))
    scale = scale_of(state_mask, state, mask)
    if reset_h is not None:
        to_reset_h, to_reset_c = tl.zeros_like(dh), tl.zeros_like(dh)
        given_up = rows < 0  # rows whose state before the step walked before was one that a reset put in
    last = (first + (T - 1) * direction).to(tl.int64)
    if is_gru(CELL):
        h_start = load(h0 + state, mask & ((given & H0) != 0))
    if has_c(CELL):
        dc = load(dc_n + state, mask & ((given & DC) != 0))
        c_start = load(c0 + state, mask & ((given & C0) != 0))
        c_t = load(states + (last * B + wide)[:, None] * H + units[None, :], mask)
    dy_t, kept, kept_state = read_step(
        dy, tape, y, states, last, wide, units, length, begin, T > 1, mask, B, given, direction, x_t, x_b, H, CELL
    )

    known = rows < 0  # rows that the step walked before reached from this one: none yet
    for step in tl.range(0, T, num_stages=1):  # no load may be moved over the wait
        t = (first + (T - 1 - step) * direction).to(tl.int64)
        row = t * B + wide
        live = (t < length)[:, None]
        cut = cleared(reset, t, rows, B, given, reset_t, reset_b)
        clear = cut[:, None]
        at = row[:, None] * H + units[None, :]
        out = dgates + row[:, None] * (G * H) + units[None, :]
        if has_c(CELL):
            dc += load(dstates + at, mask & ((given & DSTATES) != 0))
        if zoneout_h is not None:
            share_h = share_of(zoneout_h, at, mask, given & SHARES_H)
        if zoneout_c is not None:
            share_c = share_of(zoneout_c, at, mask, given & SHARES_C)

        wait(arrived, programs * step * MEETINGS)
        dh = through_w_hh(
            dh, dgates, dhidden, (t + direction) * B + wide, known, w_hh, units, H, state_mask, scale,
            CELL, DIRECT, G, BLOCK_K, PRECISION, UPCAST,
        )
        if reset_h is not None:
            to_reset_h += tl.where(given_up[:, None], dh, 0.0)
            dh = tl.where(given_up[:, None], 0.0, dh)
        total = dh + dy_t.to(tl.float32)
        beside = tl.zeros_like(dh)
        if zoneout_h is not None:
            beside = total * share_h
            total -= beside
        if has_c(CELL):
            c_before = tl.where(step < T - 1, kept_state, c_start)
            gates = ()
            for g in tl.static_range(G):
                gates += (kept[g].to(tl.float32),)
            c_prev = tl.where(clear, put_in_of(reset_c, state, mask & clear), c_before)
            if zoneout_c is None:
                d, dc_prev = lstm_backward(gates, c_prev, c_t, total, dc, CELL)
            else:  # h was made of the c that keeps nothing
                passed = dc * share_c
                d, dc_prev = lstm_backward(gates, c_prev, lstm_state(gates, c_prev, CELL), total, dc - passed, CELL)
                dc_prev += passed
            if reset_c is not None:
                to_reset_c += tl.where(live & clear, dc_prev, 0.0)
            c_t = c_before
            for g in tl.static_range(G):
                tl.store(out + g * H, tl.where(live, d[g], 0.0).to(dtype), mask=mask)
            dc = tl.where(live, tl.where(clear, 0.0, dc_prev), dc)
        elif is_gru(CELL):
            r, z, n = kept[0].to(tl.float32), kept[1].to(tl.float32), kept[2].to(tl.float32)
            h_prev = tl.where(t == begin, h_start, kept_state.to(tl.float32))
            h_prev = tl.where(clear, put_in_of(reset_h, state, mask & clear), h_prev)
            dz, dn = gru_backward_blend(z, n, h_prev, total)
            tl.store(out + H, tl.where(live, dz, 0.0).to(dtype), mask=mask)
            tl.store(out + 2 * H, tl.where(live, dn, 0.0).to(dtype), mask=mask)
            if zoneout_h is None:
                beside = total * z
            else:
                beside += total * z
            if CELL == "gru":
                tl.store(dhidden + at, tl.where(live, dn * r, 0.0).to(dtype), mask=mask)
                dr = gru_backward_reset(r, kept[3].to(tl.float32), dn)
            else:
                arrive(arrived)
                wait(arrived, programs * (1 + step * MEETINGS))
                dq = product_of(
                    tl.zeros_like(dh), dgates + (row * (G * H) + 2 * H)[:, None], rows < B, w_hh + 2 * H * H, units,
                    H, H, BLOCK_K, PRECISION, UPCAST, ".cg",
                ) * scale
                dr = gru_backward_reset(r, h_prev, dq)
                beside += dq * r
            tl.store(out, tl.where(live, dr, 0.0).to(dtype), mask=mask)
        else:
            d = rnn_backward(kept_state.to(tl.float32), total, CELL == "rnn_relu")
            tl.store(out, tl.where(live, d, 0.0).to(dtype), mask=mask)
        arrive(arrived)

        # The next step's own reads pass while the others arrive.
        if reset_h is None:
            dh = tl.where(live, tl.where(clear, 0.0, beside), dh)
            known = (rows < B) & ~cut
        else:
            dh = tl.where(live, beside, dh)
            known = rows < B
            given_up = cut & (t < length)
        after = (first + tl.maximum(T - 2 - step, 0) * direction).to(tl.int64)
        dy_t, kept, kept_state = read_step(
            dy, tape, y, states, after, wide, units, length, begin, step + 2 < T, mask, B, given, direction,
            x_t, x_b, H, CELL,
        )

    if (given & H0) != 0:
        wait(arrived, programs * T * MEETINGS)
        dh = through_w_hh(
            dh, dgates, dhidden, tl.cast(first, tl.int64) * B + wide, known, w_hh, units, H, state_mask, scale,
            CELL, DIRECT, G, BLOCK_K, PRECISION, UPCAST,
        )
        if reset_h is not None:  # with which the launch gives an h0 in any case
            tl.store(dreset_h + state, (to_reset_h + tl.where(given_up[:, None], dh, 0.0)).to(dtype), mask=mask)
            dh = tl.where(given_up[:, None], 0.0, dh)
        tl.store(dh0 + state, dh.to(dtype), mask=mask)
    if has_c(CELL):
        tl.store(dc0 + state, dc.to(dtype), mask=mask & ((given & C0) != 0))
        if reset_c is not None:
            tl.store(dreset_c + state, to_reset_c.to(dtype), mask=mask)

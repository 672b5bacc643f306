"""The recurrence of normalised layers forward (norm="layer", norm="joint"), in two roles.

u = gain * LN(W_hh (m * h_{t-1})) + shift, LN over the G*H gates of a row; with JOINT, of a GRU, LN of the sum of that
product and gates_x. Then the gates. An LSTM's h is o * tanh(gain_c * LN(c) + shift_c).

*sequence*: one launch walks all steps, as forward.py's does: a program owns BLOCK_B rows and all H <= BLOCK_H units, so
that a row's statistics are sums inside it. *step*: torch multiplies, and one launch a step does the rest: a program
owns a row, and takes its units BLOCK_N at a time, once for the mean, once for the variance, and once for the gates.

What varies from call to call is a run-time number, as in forward.py. An absent state_mask is None, and takes no code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_blend, lstm_forward, rnn_forward, sigmoid, tanh
from . import tuning
from .forward import (
    C0,
    H0,
    LENGTHS,
    RESET,
    STATES,
    VARYING,
    bias,
    dot,
    gates_of,
    given_gate,
    has_c,
    is_gru,
    keep,
    weight,
)

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, misc"

EPS = tl.constexpr(1e-5)
# Further bits of `given`, past those of forward.py and backward.py.
SHIFT, PRODUCT = (tl.constexpr(1 << bit) for bit in (24, 25))


# Of a cell: blocks of the tape before those of LN(product); all of its blocks; the numbers that `stats` has of a row.
@triton.constexpr_function
def activated_of(cell):
    return 0 if tuning.GATES[cell] == 1 else tuning.GATES[cell]


@triton.constexpr_function
def blocks_of(cell):
    return activated_of(cell) + tuning.GATES[cell]


@triton.constexpr_function
def stats_of(cell):
    return 3 if tuning.HAS_C[cell] else 1


@triton.jit
def inverse_std(squares, count):
    return 1.0 / tl.sqrt_rn(squares / count + EPS)


@triton.jit
def standardised(u, known, H):
    """LN of each row over the units of all parts of ``u``, 0 where a unit is not ``known``; the mean, and 1/std."""
    total = u[0]  # 0 past H
    for g in tl.static_range(1, len(u)):
        total += u[g]
    mean = tl.sum(total, 1)[:, None] / (len(u) * H)
    apart, squares = (), tl.zeros_like(total)
    for g in tl.static_range(len(u)):
        d = tl.where(known, u[g] - mean, 0.0)
        apart += (d,)
        squares += d * d
    scale = inverse_std(tl.sum(squares, 1)[:, None], len(u) * H)
    x = ()
    for g in tl.static_range(len(u)):
        x += (apart[g] * scale,)
    return x, mean, scale


@triton.jit
def activate(x, u, prev, CELL: tl.constexpr, JOINT: tl.constexpr):
    """The activated gates, and an LSTM's c or another cell's h, whose old one is ``prev``. ``x``: gates_x by gate, of
    which JOINT has nothing, as ``u`` holds them."""
    if has_c(CELL):
        made = ()
        for g in tl.static_range(len(u)):
            made += (x[g] + u[g],)
        gates, new, _ = lstm_forward(made, prev, CELL)
    elif is_gru(CELL):
        if JOINT:
            r, z = sigmoid(u[0]), sigmoid(u[1])
            n = tanh(r * u[2])
        else:
            r, z = sigmoid(x[0] + u[0]), sigmoid(x[1] + u[1])
            n = tanh(x[2] + r * u[2])
        gates = (r, z, n)
        new = gru_blend(z, n, prev)
    else:
        gates = ()
        new = rnn_forward(x[0] + u[0], CELL == "rnn_relu")
    return gates, new


@triton.jit(do_not_specialize=VARYING)
def normed_forward_sequence(
    gates_x, w_hh, gain, shift, gain_c, shift_c,  # [T,B,G*H] by rows x_t, x_b; [G*H,H]; [G*H] twice; [H] twice
    h0, c0, lengths, reset, state_mask,  # [B,H] twice; [B]; [T,B]; [B,H] or None
    y, h_n, c_n, states, tape, stats,  # [T,B,H], [B,H] twice, fp32 [T,B,H], [T,B,blocks*H], fp32 [T,B,1 or 3]
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, JOINT: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    dtype = y.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    wide = rows.to(tl.int64)
    units = tl.arange(0, BLOCK_H)
    known = (units < H)[None, :]
    mask = (rows < B)[:, None] & known  # [BLOCK_B, BLOCK_H]
    state = wide[:, None] * H + units[None, :]
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    h = tl.load(h0 + state, mask=mask & ((given & H0) != 0), other=0.0).to(tl.float32)
    if has_c(CELL):
        c = tl.load(c0 + state, mask=mask & ((given & C0) != 0), other=0.0).to(tl.float32)
        g_c, s_c = bias(gain_c, 0, units, H, True), bias(shift_c, 0, units, H, True)
    if state_mask is not None:
        m = tl.load(state_mask + state, mask=mask, other=0.0).to(tl.float32)
    w, gains, shifts = (), (), ()
    for g in tl.static_range(G):
        w += (weight(w_hh, g, units, units, H, H, UPCAST),)
        gains += (bias(gain, g, units, H, True),)
        shifts += (bias(shift, g, units, H, (given & SHIFT) != 0),)

    for step in tl.range(0, T, num_stages=STAGES):
        t = (first + step * direction).to(tl.int64)
        at_x = gates_x + (t * x_t + wide * x_b)[:, None] * (G * H)
        clear = tl.load(
            reset + t * reset_t + wide * reset_b, mask=(rows < B) & ((given & RESET) != 0), other=0
        ).to(tl.int1)[:, None]
        live = (t < length)[:, None]
        row = t * B + wide
        kept = tape + row[:, None] * (blocks_of(CELL) * H) + units[None, :]
        at = row[:, None] * H + units[None, :]
        h_prev = tl.where(clear, 0.0, h)
        if state_mask is not None:
            a = (h_prev * m).to(dtype)
        else:
            a = h_prev.to(dtype)
        x, product = (), ()
        for g in tl.static_range(G):
            if JOINT:
                start = given_gate(at_x, g, units, H, mask)
            else:
                x += (given_gate(at_x, g, units, H, mask),)
                start = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            product += (dot(a, w[g], start, PRECISION, UPCAST),)
        normal, _, scale = standardised(product, known, H)
        u = ()
        for g in tl.static_range(G):
            u += (normal[g] * gains[g] + shifts[g],)
        if has_c(CELL):
            gates, c_new = activate(x, u, tl.where(clear, 0.0, c), CELL, JOINT)
            of_c, mean_c, scale_c = standardised((c_new,), known, H)
            h_new = gates[G - 1] * tanh(of_c[0] * g_c + s_c)
            c = tl.where(live, c_new, c)
            tl.store(states + at, c, mask=mask & ((given & STATES) != 0))
        else:
            gates, h_new = activate(x, u, h_prev, CELL, JOINT)
        if SAVE:
            if activated_of(CELL) > 0:
                keep(kept, H, live, mask, gates)
            keep(kept + activated_of(CELL) * H, H, live, mask, normal)
            of_row = stats + row[:, None] * stats_of(CELL)
            tl.store(of_row, tl.where(live, scale, 0.0), mask=(rows < B)[:, None])
            if has_c(CELL):
                tl.store(of_row + 1, tl.where(live, mean_c, 0.0), mask=(rows < B)[:, None])
                tl.store(of_row + 2, tl.where(live, scale_c, 0.0), mask=(rows < B)[:, None])
        h = tl.where(live, h_new, h)
        tl.store(y + at, tl.where(live, h_new, 0.0).to(dtype), mask=mask)

    tl.store(h_n + state, h.to(dtype), mask=mask)
    if has_c(CELL):
        tl.store(c_n + state, c.to(dtype), mask=mask)


@triton.jit
def of_row(at, gate, units, H, there):
    """A row's number of some units of a gate, in float32; 0 past H, or where ``there`` is off."""
    return tl.load(at + gate * H + units, mask=(units < H) & there, other=0.0).to(tl.float32)


@triton.jit
def multiplied(product, x, gate, units, H, there, JOINT: tl.constexpr):
    """What is normalised: the row's product with W_hh, with JOINT and its gates_x."""
    p = of_row(product, gate, units, H, there)
    if JOINT:
        p += of_row(x, gate, units, H, True)
    return p


@triton.jit(do_not_specialize=VARYING)
def normed_forward_step(
    gates_x, product, gain, shift, gain_c, shift_c,  # fp32 product [B,G*H]: W_hh times the operand of the step before
    h_in, lengths, reset, state_mask,  # fp32 [1 or 2,B,H]: h, and an LSTM's c
    y, operand, h_out, states, tape, stats,  # operand [B,H]: what W_hh is multiplied by next
    t, B, given, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, JOINT: tl.constexpr, SAVE: tl.constexpr, BLOCK_N: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    t = t.to(tl.int64)
    b = tl.program_id(0).to(tl.int64)
    live = t < tl.load(lengths + b, mask=(given & LENGTHS) != 0, other=t + 1)
    clear = tl.load(reset + t * reset_t + b * reset_b, mask=(given & RESET) != 0, other=0).to(tl.int1)
    there = ((given & PRODUCT) != 0) & ~clear  # W_hh times zeros is 0
    has_shift = (given & SHIFT) != 0
    row = t * B + b
    product += b * (G * H)
    x = gates_x + (t * x_t + b * x_b) * (G * H)
    h_in += b * H
    h_out += b * H
    operand += b * H
    of_c = B.to(tl.int64) * H  # from a row's h to its c
    kept = tape + row * (blocks_of(CELL) * H)

    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, H, BLOCK_N):
        units = start + tl.arange(0, BLOCK_N)
        for g in tl.static_range(G):
            sums += multiplied(product, x, g, units, H, there, JOINT)
    mean = tl.sum(sums, 0) / (G * H)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, H, BLOCK_N):
        units = start + tl.arange(0, BLOCK_N)
        for g in tl.static_range(G):
            d = tl.where(units < H, multiplied(product, x, g, units, H, there, JOINT) - mean, 0.0)
            squares += d * d
    scale = inverse_std(tl.sum(squares, 0), G * H)

    sums = tl.zeros((BLOCK_N,), tl.float32)  # of c
    for start in range(0, H, BLOCK_N):
        units = start + tl.arange(0, BLOCK_N)
        known = units < H
        given_x, normal, u = (), (), ()
        for g in tl.static_range(G):
            n = tl.where(known, (multiplied(product, x, g, units, H, there, JOINT) - mean) * scale, 0.0)
            normal += (n,)
            u += (n * of_row(gain, g, units, H, True) + of_row(shift, g, units, H, has_shift),)
            if not JOINT:
                given_x += (of_row(x, g, units, H, True),)
        if has_c(CELL):
            c = of_row(h_in + of_c, 0, units, H, True)
            gates, c_new = activate(given_x, u, tl.where(clear, 0.0, c), CELL, JOINT)
            sums += c_new  # 0 past H
            c = tl.where(live, c_new, c)
            tl.store(h_out + of_c + units, c, mask=known)
            tl.store(states + row * H + units, c, mask=known & ((given & STATES) != 0))
        else:
            h = of_row(h_in, 0, units, H, True)
            gates, h_new = activate(given_x, u, tl.where(clear, 0.0, h), CELL, JOINT)
            hand_on(h, h_new, live, y + row * H, operand, h_out, state_mask, b, units, H)
        if SAVE:
            if activated_of(CELL) > 0:
                keep(kept + units, H, live, known, gates)
            keep(kept + activated_of(CELL) * H + units, H, live, known, normal)
    if SAVE:
        tl.store(stats + row * stats_of(CELL), tl.where(live, scale, 0.0))

    if has_c(CELL):
        mean_c = tl.sum(sums, 0) / H
        tl.debug_barrier()  # c was stored by other threads
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, H, BLOCK_N):
            units = start + tl.arange(0, BLOCK_N)
            d = tl.where(units < H, of_row(h_out + of_c, 0, units, H, True) - mean_c, 0.0)
            squares += d * d
        scale_c = inverse_std(tl.sum(squares, 0), H)
        for start in range(0, H, BLOCK_N):
            units = start + tl.arange(0, BLOCK_N)
            n = (multiplied(product, x, G - 1, units, H, there, JOINT) - mean) * scale
            u = n * of_row(gain, G - 1, units, H, True) + of_row(shift, G - 1, units, H, has_shift)
            o = sigmoid(of_row(x, G - 1, units, H, True) + u)
            normal_c = (of_row(h_out + of_c, 0, units, H, True) - mean_c) * scale_c
            squashed = tanh(normal_c * of_row(gain_c, 0, units, H, True) + of_row(shift_c, 0, units, H, True))
            h = of_row(h_in, 0, units, H, True)
            hand_on(h, o * squashed, live, y + row * H, operand, h_out, state_mask, b, units, H)
        if SAVE:
            tl.store(stats + row * stats_of(CELL) + 1, tl.where(live, mean_c, 0.0))
            tl.store(stats + row * stats_of(CELL) + 2, tl.where(live, scale_c, 0.0))


@triton.jit
def hand_on(h, h_new, live, y, operand, h_out, state_mask, b, units, H):
    """Stores a row's new h: as a result, as the next step's state, and as its product reads it."""
    dtype = y.dtype.element_ty
    known = units < H
    tl.store(y + units, tl.where(live, h_new, 0.0).to(dtype), mask=known)
    h = tl.where(live, h_new, h)
    tl.store(h_out + units, h, mask=known)
    if state_mask is not None:
        h *= of_row(state_mask + b * H, 0, units, H, True)
    tl.store(operand + units, h.to(dtype), mask=known)

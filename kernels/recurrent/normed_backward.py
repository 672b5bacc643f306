"""The recurrence of normalised layers backward, in the roles of normed.py, and the gradients of gains and shifts.

With x = LN(p), u = gain * x + shift and d = gain * du, the gradient of p is (d - mean(d) - x mean(d x)) / std.
*sequence*: one launch, dh and dc in registers. *step*: torch multiplies dproduct of the step walked before by W_hh, and
one launch a step does the rest, a program a row: an LSTM's sums over its c, those over its gates, then the results.

Both leave the gradients of u of all steps in memory, from which gain_gradients sums those of gains and shifts: each
program its own rows of the batch and of time, torch what the programs found. Nothing is added atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_backward_blend, gru_backward_reset, rnn_backward, tanh
from .backward import CARRY, DC, DSTATES, DY, LATER, block, cleared, load
from .forward import C0, H0, LENGTHS, VARYING, bias, gates_of, has_c, is_gru, through
from .normed import SHIFT, activated_of, blocks_of, of_row, stats_of

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, misc"


@triton.jit
def through_norm(du, gains, x, scale, known, H):
    """The gradient of what was normalised, by parts, from ``du``, that of gain * x + shift; 0 past H."""
    d, total, with_x = (), tl.zeros_like(du[0]), tl.zeros_like(du[0])
    for g in tl.static_range(len(du)):
        d_g = du[g] * gains[g]  # 0 past H, as gains are
        d += (d_g,)
        total += d_g
        with_x += d_g * x[g]
    mean = tl.sum(total, 1)[:, None] / (len(du) * H)
    mean_x = tl.sum(with_x, 1)[:, None] / (len(du) * H)
    found = ()
    for g in tl.static_range(len(du)):
        found += (tl.where(known, (d[g] - mean - x[g] * mean_x) * scale, 0.0),)
    return found


@triton.jit
def lstm_hidden_back(o, squashed, dh):
    """Of h = o * tanh(v), squashed = tanh(v): the gradients of v and of o's pre-activation."""
    return dh * o * (1.0 - squashed * squashed), dh * squashed * o * (1.0 - o)


@triton.jit
def gates_back(gates, q, prev, h, dh, d_o, dc, live, CELL: tl.constexpr):
    """The gradients of gates_x and of u by gate, 0 where not ``live``, and what reaches the state before beside the
    product: an LSTM's dc_prev, a GRU's share of dh_prev.

    ``q``: a GRU's u of n; ``prev``: c_{t-1} or h_{t-1}; ``h``: an RNN's h_t; ``d_o`` and ``dc`` an LSTM's alone.
    """
    if has_c(CELL):
        if CELL == "lstm_coupled":
            i, g = gates[0], gates[1]
            f = 1.0 - i
            d = (dc * (g - prev) * i * f, dc * i * (1.0 - g * g), d_o)
        else:
            i, f, g = gates[0], gates[1], gates[2]
            d = (dc * g * i * (1.0 - i), dc * prev * f * (1.0 - f), dc * i * (1.0 - g * g), d_o)
        of_u, beside = d, dc * f
    elif is_gru(CELL):
        r, z, n = gates[0], gates[1], gates[2]
        dz, dn = gru_backward_blend(z, n, prev, dh)
        dr = gru_backward_reset(r, q, dn)
        d, of_u, beside = (dr, dz, dn), (dr, dz, dn * r), dh * z
    else:
        d = (rnn_backward(h, dh, CELL == "rnn_relu"),)
        of_u, beside = d, tl.zeros_like(dh)
    of_x, of_norm = (), ()
    for g in tl.static_range(len(d)):
        of_x += (tl.where(live, d[g], 0.0),)
        of_norm += (tl.where(live, of_u[g], 0.0),)
    return of_x, of_norm, beside


@triton.jit(do_not_specialize=VARYING)
def normed_backward_sequence(
    dy, dh_n, dc_n, dstates,  # [T,B,H] by rows x_t, x_b; fp32 [B,H] twice; fp32 [T,B,H]
    y, states, tape, stats, w_hh, gain, shift, gain_c, shift_c, h0, c0, lengths, reset, state_mask,
    dgates, dproduct, dnormal_c, dh0, dc0,  # [T,B,G*H] twice: of gates_x (JOINT: of u), of the product; [T,B,H]; [B,H]
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, JOINT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
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
    begin = tl.where(direction > 0, 0, length - 1)[:, None]  # the step with which each row began
    dh = load(dh_n + state, mask & ((given & CARRY) != 0))
    if has_c(CELL):
        dc = load(dc_n + state, mask & ((given & DC) != 0))
        start = load(c0 + state, mask & ((given & C0) != 0))
        g_c, s_c = bias(gain_c, 0, units, H, True), bias(shift_c, 0, units, H, True)
    elif is_gru(CELL):
        start = load(h0 + state, mask & ((given & H0) != 0))
        shift_n = bias(shift, 2, units, H, (given & SHIFT) != 0)
    if state_mask is not None:
        m = load(state_mask + state, mask)
    w, gains = (), ()
    for g in tl.static_range(G):
        w += (block(w_hh + g * H * H, units, units, H, H, UPCAST),)
        gains += (bias(gain, g, units, H, True),)

    for step in tl.range(0, T, num_stages=STAGES):
        t = (first + (T - 1 - step) * direction).to(tl.int64)
        row = t * B + wide
        live = (t < length)[:, None]
        clear = cleared(reset, t, rows, B, given, reset_t, reset_b)[:, None]
        at = row[:, None] * H + units[None, :]
        before = at - direction.to(tl.int64) * B * H
        kept = tape + row[:, None] * (blocks_of(CELL) * H) + units[None, :]
        out = row[:, None] * (G * H) + units[None, :]
        of_row = stats + row[:, None] * stats_of(CELL)
        in_batch = (rows < B)[:, None]
        total = dh + load(dy + (t * x_t + wide * x_b)[:, None] * H + units[None, :], mask & live & ((given & DY) != 0))
        gates, x = (), ()
        for g in tl.static_range(G):
            if activated_of(CELL) > 0:
                gates += (load(kept + g * H, mask),)
            x += (load(kept + (activated_of(CELL) + g) * H, mask),)
        if has_c(CELL):
            c = load(states + at, mask)
            scale_c = load(of_row + 2, in_batch)
            x_c = (c - load(of_row + 1, in_batch)) * scale_c
            of_v, d_o = lstm_hidden_back(gates[G - 1], tanh(x_c * g_c + s_c), total)
            of_v = tl.where(live, of_v, 0.0)
            tl.store(dnormal_c + at, of_v.to(dtype), mask=mask)
            of_c = through_norm((of_v,), (g_c,), (x_c,), scale_c, known, H)
            dc += load(dstates + at, mask & ((given & DSTATES) != 0))
            c_prev = tl.where(step < T - 1, load(states + before, mask & (step < T - 1)), start)
            of_x, of_norm, dc_prev = gates_back(
                gates, None, tl.where(clear, 0.0, c_prev), None, total, d_o, dc + of_c[0], live, CELL
            )
            dc = tl.where(live, tl.where(clear, 0.0, dc_prev), dc)
            beside = tl.zeros_like(total)
        elif is_gru(CELL):
            h_prev = load(y + before, mask & (t != begin) & (step < T - 1))
            h_prev = tl.where(clear, 0.0, tl.where(t == begin, start, h_prev))
            q = x[2] * gains[2] + shift_n
            of_x, of_norm, beside = gates_back(gates, q, h_prev, None, total, None, None, live, CELL)
        else:
            of_x, of_norm, beside = gates_back(gates, None, None, load(y + at, mask), total, None, None, live, CELL)
        d = through_norm(of_norm, gains, x, load(of_row, in_batch), known, H)
        a = ()
        for g in tl.static_range(G):
            a += (tl.where(live, d[g], 0.0).to(dtype),)
            tl.store(dproduct + out + g * H, a[g], mask=mask)
            if JOINT:
                tl.store(dgates + out + g * H, of_norm[g].to(dtype), mask=mask)
            else:
                tl.store(dgates + out + g * H, of_x[g].to(dtype), mask=mask)
        back = through(a, w, tl.zeros_like(total), PRECISION, UPCAST)
        if state_mask is not None:
            back *= m
        dh = tl.where(live, tl.where(clear, 0.0, back + beside), dh)

    tl.store(dh0 + state, dh.to(dtype), mask=mask & ((given & H0) != 0))
    if has_c(CELL):
        tl.store(dc0 + state, dc.to(dtype), mask=mask & ((given & C0) != 0))


@triton.jit
def received(h_in, back, state_mask, b, units, H, there):
    """The gradient of a row's h_t from the step walked before: beside the product, and through it (``there``)."""
    through = of_row(back + b * H, 0, units, H, there)
    if state_mask is not None:
        through *= of_row(state_mask + b * H, 0, units, H, True)
    return of_row(h_in, 0, units, H, True) + through


@triton.jit(do_not_specialize=VARYING)
def normed_backward_step(
    dy, dstates, y, states, tape, stats, back,  # fp32 back [B,H]: dproduct of the step `later` times W_hh
    gain, shift, gain_c, shift_c, h0, c0, lengths, reset, state_mask,
    h_in, dgates, dproduct, dnormal_c, h_out,  # fp32 h_in, h_out [1 or 2,B,H]: of h beside the product; of an LSTM's c
    t, later, B, given, first, direction, x_t, x_b, reset_t, reset_b, T, H,
    CELL: tl.constexpr, JOINT: tl.constexpr, BLOCK_N: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    dtype = y.dtype.element_ty
    t, later = t.to(tl.int64), later.to(tl.int64)
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + b, mask=(given & LENGTHS) != 0, other=T).to(tl.int64)
    live = t < length
    begins = t == tl.where(direction > 0, 0, length - 1)
    clear = cleared(reset, t, b, B, given, reset_t, reset_b)
    has_later = (given & LATER) != 0
    there = has_later & ~cleared(reset, tl.where(has_later, later, t), b, B, given, reset_t, reset_b)
    has_before = t != first
    has_dy = live & ((given & DY) != 0)
    row = t * B + b
    before = row - direction.to(tl.int64) * B
    kept = tape + row * (blocks_of(CELL) * H)
    normal = kept + activated_of(CELL) * H
    dy += (t * x_t + b * x_b) * H
    h_in += b * H
    h_out += b * H
    of_c = B.to(tl.int64) * H  # from a row's h to its c
    scale = tl.load(stats + row * stats_of(CELL))

    if has_c(CELL):
        mean_c, scale_c = tl.load(stats + row * stats_of(CELL) + 1), tl.load(stats + row * stats_of(CELL) + 2)
        total, with_x = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, H, BLOCK_N):
            units = start + tl.arange(0, BLOCK_N)
            dh = received(h_in, back, state_mask, b, units, H, there) + of_row(dy, 0, units, H, has_dy)
            g_c = of_row(gain_c, 0, units, H, True)
            x_c = (of_row(states + row * H, 0, units, H, True) - mean_c) * scale_c
            squashed = tanh(x_c * g_c + of_row(shift_c, 0, units, H, True))
            of_v, _ = lstm_hidden_back(of_row(kept, G - 1, units, H, True), squashed, dh)
            total += of_v * g_c
            with_x += of_v * g_c * x_c
        mean_d, mean_dx = tl.sum(total, 0) / H, tl.sum(with_x, 0) / H

    total, with_x = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    mean, mean_x = 0.0, 0.0
    for last in tl.static_range(2):  # first the sums of the row, then what is made with them
        for start in range(0, H, BLOCK_N):
            units = start + tl.arange(0, BLOCK_N)
            known = units < H
            dh_in = received(h_in, back, state_mask, b, units, H, there)
            dh = dh_in + of_row(dy, 0, units, H, has_dy)
            gates, x, gains = (), (), ()
            for g in tl.static_range(G):
                if activated_of(CELL) > 0:
                    gates += (of_row(kept, g, units, H, True),)
                x += (of_row(normal, g, units, H, True),)
                gains += (of_row(gain, g, units, H, True),)
            if has_c(CELL):
                g_c = of_row(gain_c, 0, units, H, True)
                x_c = (of_row(states + row * H, 0, units, H, True) - mean_c) * scale_c
                squashed = tanh(x_c * g_c + of_row(shift_c, 0, units, H, True))
                of_v, d_o = lstm_hidden_back(gates[G - 1], squashed, dh)
                dc_in = of_row(h_in + of_c, 0, units, H, True)
                dc_in += of_row(dstates + row * H, 0, units, H, (given & DSTATES) != 0)
                dc = dc_in + (of_v * g_c - mean_d - x_c * mean_dx) * scale_c
                prev = of_row(states + before * H, 0, units, H, has_before & ~clear)
                prev += of_row(c0 + b * H, 0, units, H, ~has_before & ~clear & ((given & C0) != 0))
                of_x, of_norm, beside = gates_back(gates, None, prev, None, dh, d_o, dc, live, CELL)
                if last == 1:
                    tl.store(dnormal_c + row * H + units, tl.where(live, of_v, 0.0).to(dtype), mask=known)
                    dc_prev = tl.where(live, tl.where(clear, 0.0, beside), dc_in)
                    tl.store(h_out + of_c + units, dc_prev, mask=known)
                    beside = tl.zeros_like(dh)
            elif is_gru(CELL):
                prev = of_row(y + before * H, 0, units, H, ~begins & has_before & ~clear)
                prev += of_row(h0 + b * H, 0, units, H, begins & ~clear & ((given & H0) != 0))
                q = x[2] * gains[2] + of_row(shift, 2, units, H, (given & SHIFT) != 0)
                of_x, of_norm, beside = gates_back(gates, q, prev, None, dh, None, None, live, CELL)
            else:
                h = of_row(y + row * H, 0, units, H, True)
                of_x, of_norm, beside = gates_back(gates, None, None, h, dh, None, None, live, CELL)
            for g in tl.static_range(G):
                d = of_norm[g] * gains[g]  # 0 past H, as gains are
                if last == 1:
                    out = row * (G * H) + g * H + units
                    of_product = tl.where(live, (d - mean - x[g] * mean_x) * scale, 0.0)
                    tl.store(dproduct + out, of_product.to(dtype), mask=known)
                    if JOINT:
                        tl.store(dgates + out, of_norm[g].to(dtype), mask=known)
                    else:
                        tl.store(dgates + out, of_x[g].to(dtype), mask=known)
                else:
                    total += d
                    with_x += d * x[g]
            if last == 1:
                tl.store(h_out + units, tl.where(live, tl.where(clear, 0.0, beside), dh_in), mask=known)
        if last == 0:
            mean, mean_x = tl.sum(total, 0) / (G * H), tl.sum(with_x, 0) / (G * H)


@triton.jit(do_not_specialize=["R"])
def gain_gradients(
    d, normal, stats, r, found,  # d [R,N]; found fp32 [programs,2,N]: of the gain, of the shift
    R, N, H, width,
    OF_C: tl.constexpr, RESET_GATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Sums over rows r of d x and of d, R of them at a distance of ``width`` in ``normal``, which holds x, or (OF_C) an
    LSTM's c, whose x follows from ``stats``. RESET_GATE: the candidate's d, the last H columns, is to be multiplied by
    the reset gate, the tape's first block (at ``r``)."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    of_gain, of_shift = tl.zeros((BLOCK_R, BLOCK_N), tl.float32), tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_R, R, tl.num_programs(1) * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = (rows < R)[:, None] & (columns < N)[None, :]
        d_r = load(d + rows[:, None] * N + columns[None, :], mask)
        x = load(normal + rows[:, None] * width + columns[None, :], mask)
        if OF_C:
            in_rows = (rows < R)[:, None]
            x = (x - load(stats + rows[:, None] * 3 + 1, in_rows)) * load(stats + rows[:, None] * 3 + 2, in_rows)
        if RESET_GATE:
            candidate = (columns >= N - H)[None, :]
            at_r = r + rows[:, None] * width + columns[None, :] - (N - H)
            d_r *= tl.load(at_r, mask=mask & candidate, other=1.0).to(tl.float32)
        of_gain += d_r * x
        of_shift += d_r
    at = found + tl.program_id(1).to(tl.int64) * (2 * N) + columns
    tl.store(at, tl.sum(of_gain, 0), mask=columns < N)
    tl.store(at + N, tl.sum(of_shift, 0), mask=columns < N)

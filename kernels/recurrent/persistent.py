"""The scan in its third role, *persistent*: one launch walks all steps of any H, over tiles of units and of the batch.

A program owns BLOCK_B rows of the batch and BLOCK_N units of every gate, keeps its h and c in registers, and streams
its slice of W_hh from L2 at every step. What the programs need of each other (h_t; of a reset before the product
r * h_prev too) goes through global memory: a program stores its part, counts itself in (``arrive``, a release), and
reads the others' once all have (``wait``, an acquire). Those of one tile of the batch wait for each other alone. All of
them must run at the same time: the launch is cooperative, which the driver refuses where they cannot.

``exchange`` has two places for h, by the parity of the step: who stores h_t over h_{t-2} has seen that all others
stored h_{t-1}, for which they had to have read h_{t-2}.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_blend, lstm_forward, rnn_forward, sigmoid, tanh, zoneout
from .forward import (
    BIAS,
    C0,
    H0,
    LENGTHS,
    RESET,
    SHARES_C,
    SHARES_H,
    STATES,
    VARYING,
    bias,
    gates_of,
    has_c,
    is_gru,
    keep,
    products,
    put_in_of,
    scale_of,
    share_of,
    tape_of,
)

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, misc"


@triton.jit
def arrive(arrived):
    """Count this program in: what it has stored before is there for whoever sees the count."""
    tl.debug_barrier()  # the stores of all its threads, before the one thread that counts
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def wait(arrived, count):
    """Until so many programs have been counted in. A plain load would be lifted out of the loop."""
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < count:
        pass


@triton.jit
def read_gates(gates_x, t, wide, x_t, x_b, units, H, mask, G: tl.constexpr):
    """One step's share of gates_x, a gate [BLOCK_B, BLOCK_N], in a tuple."""
    at = gates_x + (t * x_t + wide * x_b)[:, None] * (G * H) + units[None, :]
    x = ()
    for g in tl.static_range(G):
        x += (tl.load(at + g * H, mask=mask, other=0.0),)
    return x


@triton.jit(do_not_specialize=VARYING)
def forward_persistent(
    gates_x, w_hh, b_hh, h0, c0, lengths, reset,  # as forward_sequence
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c, put_in,  # put_in [B,H]: reset_h times the mask, or None
    y, h_n, c_n, states, tape,
    exchange, arrived,  # x's dtype [3,B,H]; int32 [tiles of the batch, 32], zeros: one count a line of the cache
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    # How often a step all wait for each other.
    MEETINGS: tl.constexpr = 2 if CELL == "gru_reset_before" else 1
    dtype = y.dtype.element_ty
    programs = tl.num_programs(0)
    arrived += tl.program_id(1) * 32
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (rows < B)[:, None] & (units < H)[None, :]
    wide = rows.to(tl.int64)
    state = wide[:, None] * H + units[None, :]  # [BLOCK_B, BLOCK_N]
    all_units = (wide * H)[:, None]
    place = tl.cast(B, tl.int64) * H  # what one place of the exchange takes
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    h = tl.load(h0 + state, mask=mask & ((given & H0) != 0), other=0.0).to(tl.float32)
    scale = scale_of(state_mask, state, mask)
    tl.store(exchange + state, (h * scale).to(dtype), mask=mask)
    arrive(arrived)
    has_bias = (given & BIAS) != 0
    b = ()
    for g in tl.static_range(G):
        b += (bias(b_hh, g, units, H, has_bias),)
    if has_c(CELL):
        c = tl.load(c0 + state, mask=mask & ((given & C0) != 0), other=0.0).to(tl.float32)
    x = read_gates(gates_x, tl.cast(first, tl.int64), wide, x_t, x_b, units, H, mask, G)

    for step in tl.range(0, T, num_stages=1):  # no load may be moved over the wait
        t = (first + step * direction).to(tl.int64)
        clear = tl.load(
            reset + t * reset_t + wide * reset_b, mask=(rows < B) & ((given & RESET) != 0), other=0
        ).to(tl.int1)
        if reset_h is None:
            known = (rows < B) & ~clear
        else:
            known = rows < B
        clear = clear[:, None]
        live = (t < length)[:, None]
        h_prev = tl.where(clear, 0.0, h)
        row = t * B + wide
        own = row[:, None] * H + units[None, :]
        if zoneout_h is not None:
            share_h = share_of(zoneout_h, own, mask, given & SHARES_H)
        if zoneout_c is not None:
            share_c = share_of(zoneout_c, own, mask, given & SHARES_C)
        kept = tape + row[:, None] * (tape_of(CELL) * H) + units[None, :]
        p = ()
        for g in tl.static_range(G):
            if CELL == "gru" and g == 2:  # the reset gate multiplies only the hidden side
                p += (tl.zeros_like(h) + b[g],)
            else:
                p += (x[g].to(tl.float32) + b[g],)
        if CELL == "gru_reset_before":  # whose candidate takes another product
            candidate = (p[2],)
            p = (p[0], p[1])
        wait(arrived, programs * (1 + step * MEETINGS))
        read = exchange + (step % 2) * place + all_units
        if reset_h is not None:
            read = tl.where(clear, put_in + all_units, read)
        p = products(
            p, read, known, w_hh, 0, units, H, H,
            BLOCK_K, PRECISION, UPCAST, ".cg",
        )
        if reset_h is not None:  # after the product, beside which it would take registers
            h_prev = tl.where(clear, put_in_of(reset_h, state, mask & clear), h)
        if has_c(CELL):
            c_prev = tl.where(clear, put_in_of(reset_c, state, mask & clear), c)
            gates, c_new, h_new = lstm_forward(p, c_prev, CELL)
            if zoneout_c is not None:
                c_new = zoneout(c_prev, c_new, share_c)
            c = tl.where(live, c_new, c)
        elif is_gru(CELL):
            r, z = sigmoid(p[0]), sigmoid(p[1])
            if CELL == "gru":
                q = p[2]
                n = tanh(x[2].to(tl.float32) + r * q)
            else:
                q = r * h_prev * scale
                tl.store(exchange + 2 * place + state, q.to(dtype), mask=mask)
                arrive(arrived)
                wait(arrived, programs * (2 + step * MEETINGS))
                candidate = products(
                    candidate, exchange + 2 * place + all_units, rows < B, w_hh, 2, units, H, H,
                    BLOCK_K, PRECISION, UPCAST, ".cg",
                )
                n = tanh(candidate[0])
            h_new = gru_blend(z, n, h_prev)
        else:
            h_new = rnn_forward(p[0], CELL == "rnn_relu")
        if zoneout_h is not None:
            h_new = zoneout(h_prev, h_new, share_h)
        h = tl.where(live, h_new, h)
        tl.store(exchange + ((step + 1) % 2) * place + state, (h * scale).to(dtype), mask=mask)
        arrive(arrived)

        # All below, and the loads of the next step's gates, pass while the others arrive.
        tl.store(y + row[:, None] * H + units[None, :], tl.where(live, h_new, 0.0).to(dtype), mask=mask)
        if has_c(CELL):
            tl.store(states + row[:, None] * H + units[None, :], c, mask=mask & ((given & STATES) != 0))
            if SAVE:
                keep(kept, H, live, mask, gates)
        if is_gru(CELL) and SAVE:
            keep(kept, H, live, mask, (r, z, n, q))
        after = (first + tl.minimum(step + 1, T - 1) * direction).to(tl.int64)
        x = read_gates(gates_x, after, wide, x_t, x_b, units, H, mask, G)

    tl.store(h_n + state, h.to(dtype), mask=mask)
    if has_c(CELL):
        tl.store(c_n + state, c.to(dtype), mask=mask)

"""The scan forward: h_t = cell(gates_x_t, W_hh h_{t-1} + b_hh), every cell of gates.py, in two roles.

*sequence*: one launch walks all steps; a program owns BLOCK_B rows of the batch and all H <= BLOCK_H + TAIL units, and
keeps W_hh on its chip, h and c in registers. Tiles have powers of two: units whose number lies between two may come in
two parts, W_hh in four blocks a gate, and a tuple has what there is for each part.
*step*: one launch a step; a program owns BLOCK_B rows and BLOCK_N units of every gate, and streams W_hh through. Reset
before the product (gru_reset_before) needs all of r * h_prev for the candidate, and a projection all of o * tanh(c):
there a step takes two launches.

gates_x = W_ih x + b_ih is one product for all steps, made before; a single step (FUSE_X) makes it itself.
What varies from call to call (T, B, the direction, which optional tensors are there) is a run-time number, so that
neither another T nor another B compiles anything. An absent tensor's pointer is never followed: its loads are masked
off by a bit of ``given``. The options of few calls (state_mask, zoneout, a state to reset to) are None where they are
absent, constants to the compiler, and no code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gates import gru_blend, lstm_forward, rnn_forward, sigmoid, tanh, zoneout
from . import tuning

# fmt: off
# Tuples grow in these kernels.
# mypy: disable-error-code="assignment, misc"

# Bits of `given`: which optional tensors there are.
BIAS, H0, C0, LENGTHS, RESET, STATES, LAST = (tl.constexpr(1 << bit) for bit in range(7))
# Zoneout has a share for each unit of h, of c; else one number for all. (The bits between are those of backward.py.)
SHARES_H, SHARES_C = (tl.constexpr(1 << bit) for bit in (12, 13))

# Numbers that are never compiled in; H, P and I are, where they are 1, and as multiples of 16.
VARYING = ["T", "B", "t", "later", "given", "first", "direction", "x_t", "x_b", "reset_t", "reset_b"]


# Of a cell, by the table in tuning.py: G, the blocks of its tape, whether it has a c.
@triton.constexpr_function
def gates_of(cell):
    return tuning.GATES[cell]


@triton.constexpr_function
def tape_of(cell):
    return tuning.TAPE[cell]


@triton.constexpr_function
def has_c(cell):
    return tuning.HAS_C[cell]


@triton.constexpr_function
def is_gru(cell):
    return cell in ("gru", "gru_reset_before")


@triton.jit
def weight(w, gate, units, inputs, H, K, UPCAST: tl.constexpr, SHARED: tl.constexpr = False):
    """One gate's block of a weight [G*H, K], transposed: [inputs, units].

    SHARED: kept in shared memory whatever its shape. 16 bytes at a time, a block of 32 inputs lies in the registers as
    a product wants it, and would stay in them; 8 at a time, it does not.
    """
    at = w + (gate * H + units)[None, :] * K + inputs[:, None]
    if SHARED:
        at = tl.max_contiguous(at, (4, 1))
    tile = tl.load(at, mask=(units < H)[None, :] & (inputs < K)[:, None], other=0.0)
    if UPCAST:  # the interpreter multiplies the bit patterns of 16-bit numbers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def bias(b, gate, units, H, mask):
    """One gate's share of a bias [G*H], as a row [1, units]; 0 where ``mask`` is off."""
    return tl.load(b + gate * H + units, mask=mask & (units < H), other=0.0).to(tl.float32)[None, :]


@triton.jit
def dot(a, w, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(tl.float32)
    return tl.dot(a, w, acc, input_precision=PRECISION)


@triton.jit
def keep(tape, H, live, mask, blocks):
    """Blocks of one step's tape, those from ``tape`` on; 0 past the lengths."""
    dtype = tape.dtype.scalar.element_ty
    for k in tl.static_range(len(blocks)):
        tl.store(tape + k * H, tl.where(live, blocks[k], 0.0).to(dtype), mask=mask)


@triton.jit
def put_in_of(reset_state, at, mask):
    """What a reset puts in a state's place: zeros where ``reset_state`` is None."""
    if reset_state is None:
        found = 0.0
    else:
        found = tl.load(reset_state + at, mask=mask, other=0.0)
    return found


@triton.jit
def scale_of(state_mask, at, mask):
    """What the products read a state times: 1 where ``state_mask`` is None."""
    if state_mask is None:
        found = 1.0
    else:
        found = tl.load(state_mask + at, mask=mask, other=0.0)
    return found


@triton.jit
def share_of(shares, at, mask, has_shares):
    """The share of a state that zoneout keeps, at some units; or the one number that stands for all of them."""
    number = tl.load(shares, mask=has_shares == 0, other=0.0)
    return tl.load(shares + at, mask=mask & (has_shares != 0), other=number)


@triton.jit
def kept_of(old, new, shares, at, mask, has_shares):
    """A state after zoneout, where there is any."""
    if shares is not None:
        new = zoneout(old, new, share_of(shares, at, mask, has_shares))
    return new


@triton.jit
def leave_read(read_out, state_mask, state, h, mask):
    """h_t times the mask, which the products of the next step read, where there is a mask."""
    if read_out is not None:
        scale = scale_of(state_mask, state, mask)
        tl.store(read_out + state, (h.to(tl.float32) * scale).to(read_out.dtype.element_ty), mask=mask)


@triton.jit
def parts_of(BLOCK_H: tl.constexpr, TAIL: tl.constexpr):
    """The units: BLOCK_H of them, and TAIL more where that is not 0."""
    if TAIL:
        units = (tl.arange(0, BLOCK_H), BLOCK_H + tl.arange(0, TAIL))
    else:
        units = (tl.arange(0, BLOCK_H),)
    return units


@triton.jit
def given_gate(x, gate, units, H, mask):
    """One gate's share of gates_x at some units, by its row pointers."""
    return tl.load(x + gate * H + units[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def through(a, w, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc += a · w, summed over the parts of both."""
    for part in tl.static_range(len(a)):
        acc = dot(a[part], w[part], acc, PRECISION, UPCAST)
    return acc


@triton.jit
def keep_state(states, c, t, B, units, H, wanted, BLOCK_B: tl.constexpr):
    """One step's c, the upper half of the rows and then the lower: its store passes through shared memory, of which a
    half in float32 takes no more than a whole tile of 16 bits, and W_hh leaves little; for two barriers more."""
    upper, lower = tl.split(tl.permute(tl.reshape(c, [2, BLOCK_B // 2, c.shape[1]]), [1, 2, 0]))
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B // 2)
    below = rows + BLOCK_B // 2
    known = (units < H)[None, :] & wanted
    tl.store(states + (t * B + rows)[:, None] * H + units[None, :], upper, mask=(rows < B)[:, None] & known)
    tl.store(states + (t * B + below)[:, None] * H + units[None, :], lower, mask=(below < B)[:, None] & known)


@triton.jit(do_not_specialize=VARYING)
def forward_sequence(
    gates_x, w_hh, b_hh, h0, c0, lengths, reset,  # [T,B,G*H] by rows x_t, x_b; [G*H,H]; [G*H]; [B,H] twice; [B]; [T,B]
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c,  # [B,H]; [T,B,H] or one number, twice; [B,H] twice; or None
    y, h_n, c_n, states, tape,  # [T,B,H], [B,H] twice, [T,B,H], [T,B,TAPE*H]
    T, B, given, first, direction, x_t, x_b, reset_t, reset_b, H,
    CELL: tl.constexpr, SAVE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, TAIL: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    PARTS: tl.constexpr = 2 if TAIL else 1
    dtype = y.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    wide = rows.to(tl.int64)
    units = parts_of(BLOCK_H, TAIL)
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=T)
    has_bias = (given & BIAS) != 0
    mask, state, h, c, w, b = (), (), (), (), (), ()  # w by part of h_t, gate and part of h_{t-1}; b by part and gate
    scale, put_in_h, put_in_c = (), (), ()
    for p in tl.static_range(PARTS):
        mask += ((rows < B)[:, None] & (units[p] < H)[None, :],)
        state += (wide[:, None] * H + units[p][None, :],)  # [BLOCK_B, BLOCK_H or TAIL]
        h += (tl.load(h0 + state[p], mask=mask[p] & ((given & H0) != 0), other=0.0).to(tl.float32),)
        if has_c(CELL):
            c += (tl.load(c0 + state[p], mask=mask[p] & ((given & C0) != 0), other=0.0).to(tl.float32),)
            put_in_c += (put_in_of(reset_c, state[p], mask[p]),)
        put_in_h += (put_in_of(reset_h, state[p], mask[p]),)
        scale += (scale_of(state_mask, state[p], mask[p]),)
        w_p, b_p = (), ()
        for gate in tl.static_range(G):
            w_g = ()
            for k in tl.static_range(PARTS):
                w_g += (weight(w_hh, gate, units[p], units[k], H, H, UPCAST, PARTS > 1),)
            w_p += (w_g,)
            b_p += (bias(b_hh, gate, units[p], H, has_bias),)
        w += (w_p,)
        b += (b_p,)

    for step in tl.range(0, T, num_stages=STAGES):
        t = (first + step * direction).to(tl.int64)
        x = gates_x + (t * x_t + wide * x_b)[:, None] * (G * H)
        clear = tl.load(
            reset + t * reset_t + wide * reset_b, mask=(rows < B) & ((given & RESET) != 0), other=0
        ).to(tl.int1)[:, None]
        live = (t < length)[:, None]
        row = t * B + wide
        kept = tape + row[:, None] * (tape_of(CELL) * H)
        h_prev, a, h_next, c_next = (), (), (), ()
        for p in tl.static_range(PARTS):
            h_prev += (tl.where(clear, put_in_h[p], h[p]),)
            a += ((h_prev[p] * scale[p]).to(dtype),)
        if CELL == "gru_reset_before":  # the candidate needs r * h_prev of all units
            z, r_h = (), ()
            for p in tl.static_range(PARTS):
                r = sigmoid(through(a, w[p][0], given_gate(x, 0, units[p], H, mask[p]) + b[p][0], PRECISION, UPCAST))
                update = through(a, w[p][1], given_gate(x, 1, units[p], H, mask[p]) + b[p][1], PRECISION, UPCAST)
                z += (sigmoid(update),)
                q = r * h_prev[p] * scale[p]
                r_h += (q.to(dtype),)
                if SAVE:
                    keep(kept + units[p][None, :], H, live, mask[p], (r, z[p]))
                    keep(kept + units[p][None, :] + 3 * H, H, live, mask[p], (q,))
        for p in tl.static_range(PARTS):
            if has_c(CELL):
                made = ()
                for gate in tl.static_range(G):
                    x_g = given_gate(x, gate, units[p], H, mask[p]) + b[p][gate]
                    made += (through(a, w[p][gate], x_g, PRECISION, UPCAST),)
                c_prev = tl.where(clear, put_in_c[p], c[p])
                gates, c_new, h_new = lstm_forward(made, c_prev, CELL)
                own = row[:, None] * H + units[p][None, :]
                c_new = kept_of(c_prev, c_new, zoneout_c, own, mask[p], given & SHARES_C)
                c_next += (tl.where(live, c_new, c[p]),)
                if PARTS > 1:
                    keep_state(states, c_next[p], t, B, units[p], H, (given & STATES) != 0, BLOCK_B)
                else:
                    at = states + row[:, None] * H + units[p][None, :]
                    tl.store(at, c_next[p], mask=mask[p] & ((given & STATES) != 0))
                if SAVE:
                    keep(kept + units[p][None, :], H, live, mask[p], gates)
            elif CELL == "gru":
                r = sigmoid(through(a, w[p][0], given_gate(x, 0, units[p], H, mask[p]) + b[p][0], PRECISION, UPCAST))
                z = sigmoid(through(a, w[p][1], given_gate(x, 1, units[p], H, mask[p]) + b[p][1], PRECISION, UPCAST))
                q = through(a, w[p][2], tl.zeros_like(h[p]) + b[p][2], PRECISION, UPCAST)
                n = tanh(given_gate(x, 2, units[p], H, mask[p]) + r * q)
                h_new = gru_blend(z, n, h_prev[p])
                if SAVE:
                    keep(kept + units[p][None, :], H, live, mask[p], (r, z, n, q))
            elif CELL == "gru_reset_before":
                n = tanh(through(r_h, w[p][2], given_gate(x, 2, units[p], H, mask[p]) + b[p][2], PRECISION, UPCAST))
                h_new = gru_blend(z[p], n, h_prev[p])
                if SAVE:
                    keep(kept + units[p][None, :] + 2 * H, H, live, mask[p], (n,))
            else:
                made = through(a, w[p][0], given_gate(x, 0, units[p], H, mask[p]) + b[p][0], PRECISION, UPCAST)
                h_new = rnn_forward(made, CELL == "rnn_relu")
            own = row[:, None] * H + units[p][None, :]
            h_new = kept_of(h_prev[p], h_new, zoneout_h, own, mask[p], given & SHARES_H)
            h_next += (tl.where(live, h_new, h[p]),)
            at = y + row[:, None] * H + units[p][None, :]
            tl.store(at, tl.where(live, h_new, 0.0).to(dtype), mask=mask[p])
        h = h_next
        if has_c(CELL):
            c = c_next

    for p in tl.static_range(PARTS):
        tl.store(h_n + state[p], h[p].to(dtype), mask=mask[p])
        if has_c(CELL):
            tl.store(c_n + state[p], c[p].to(dtype), mask=mask[p])


@triton.jit
def products(
    p, a, rows, w, gate, units, H, K,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, CACHE: tl.constexpr,
):
    """p_g += a · w_gᵀ for gates from ``gate`` on, a tuple; a [BLOCK_B, K] at its row pointers, 0 where ``rows`` is off.

    ``CACHE``: ".cg" where other programs store ``a`` while this one runs: the caches before L2 know nothing of that.
    """
    for k in range(0, K, BLOCK_K):
        inputs = k + tl.arange(0, BLOCK_K)
        a_k = tl.load(
            a + inputs[None, :], mask=rows[:, None] & (inputs < K)[None, :], other=0.0, cache_modifier=CACHE
        )
        sums = ()
        for g in tl.static_range(len(p)):
            sums += (dot(a_k, weight(w, gate + g, units, inputs, H, K, UPCAST), p[g], PRECISION, UPCAST),)
        p = sums
    return p


@triton.jit
def add_biases(p, b, gate, units, H, mask):
    """p_g + b_g of gates from ``gate`` on, a tuple."""
    sums = ()
    for g in tl.static_range(len(p)):
        sums += (p[g] + bias(b, gate + g, units, H, mask),)
    return sums


@triton.jit(do_not_specialize=VARYING)
def forward_step(
    x, w_ih, b_ih,  # gates_x [T,B,G*H] by rows x_t, x_b; with FUSE_X x [1,B,I], w_ih, b_ih
    h_in, carry_in, w_hh, b_hh, lengths, reset,  # h_{t-1} [B,P]; its fp32 self (GRU) or c (LSTM) [B,H]; the weights
    state_mask, zoneout_h, zoneout_c, reset_h, reset_c,  # as forward_sequence
    read_in, read_out, put_in,  # [B,P]: h_{t-1} and h_t times the mask, for the products; what they read after a reset
    y, h_out, carry_out, c_n, states, tape,  # carry_out: absent where only the last step matters
    q, z,  # [B,H]: what the first launch of two leaves for the second: r * h_prev and z; o * tanh(c)
    t, B, given, x_t, x_b, reset_t, reset_b, I, H, P,
    CELL: tl.constexpr, PHASE: tl.constexpr, FUSE_X: tl.constexpr, SAVE: tl.constexpr, PROJECTED: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    G: tl.constexpr = gates_of(CELL)
    # The gates this launch makes: r and z, then n, of a reset before the product; else all.
    FROM: tl.constexpr = 2 if PHASE == 1 else 0
    MADE: tl.constexpr = 1 if PHASE == 1 else (2 if CELL == "gru_reset_before" else G)
    dtype = y.dtype.element_ty
    t = t.to(tl.int64)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BLOCK_B]
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    mask = (rows < B)[:, None] & (units < H)[None, :]
    wide = rows.to(tl.int64)
    state = wide[:, None] * H + units[None, :]  # [BLOCK_B, BLOCK_N]
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=t + 1)
    live = (t < length)[:, None]
    clear = tl.load(
        reset + t * reset_t + rows.to(tl.int64) * reset_b, mask=(rows < B) & ((given & RESET) != 0), other=0
    ).to(tl.int1)
    if reset_h is None:
        known = (rows < B) & ((given & H0) != 0) & ~clear
    else:
        known = (rows < B) & (((given & H0) != 0) | clear)
    clear = clear[:, None]
    has_bias = (given & BIAS) != 0

    p = ()  # by gate
    for g in tl.static_range(MADE):
        if FUSE_X:
            p += (tl.zeros((BLOCK_B, BLOCK_N), tl.float32),)
        else:
            at = x + (t * x_t + wide * x_b)[:, None] * (G * H) + (FROM + g) * H + units[None, :]
            p += (tl.load(at, mask=mask, other=0.0).to(tl.float32),)
    if FUSE_X:
        p = products(
            p, x + (wide * I)[:, None], rows < B, w_ih, FROM, units, H, I, BLOCK_K, PRECISION, UPCAST, "",
        )
        p = add_biases(p, b_ih, FROM, units, H, has_bias)
    if CELL == "gru":  # the reset gate multiplies only the hidden side
        x_n = p[2]
        p = (p[0], p[1], tl.zeros((BLOCK_B, BLOCK_N), tl.float32))
    p = add_biases(p, b_hh, FROM, units, H, has_bias)
    if PHASE == 1:
        p = products(
            p, q + (wide * H)[:, None], rows < B, w_hh, FROM, units, H, P, BLOCK_K, PRECISION, UPCAST, "",
        )
    else:
        if state_mask is None:
            read = h_in + (wide * P)[:, None]
        else:
            read = read_in + (wide * P)[:, None]
        if reset_h is not None:
            read = tl.where(clear, put_in + (wide * P)[:, None], read)
        p = products(
            p, read, known, w_hh, FROM, units, H, P, BLOCK_K, PRECISION, UPCAST, "",
        )

    row = t * B + wide
    kept = tape + row[:, None] * (tape_of(CELL) * H) + units[None, :]
    if has_c(CELL):
        c = tl.load(carry_in + state, mask=mask & ((given & C0) != 0), other=0.0).to(tl.float32)
        c_prev = tl.where(clear, put_in_of(reset_c, state, mask), c)
        gates, c_new, h_new = lstm_forward(p, c_prev, CELL)
        c_new = kept_of(c_prev, c_new, zoneout_c, row[:, None] * H + units[None, :], mask, given & SHARES_C)
        c = tl.where(live, c_new, c)
        if carry_out is not None:
            tl.store(carry_out + state, c, mask=mask)
        tl.store(c_n + state, c.to(dtype), mask=mask & ((given & LAST) != 0))
        tl.store(states + row[:, None] * H + units[None, :], c, mask=mask & ((given & STATES) != 0))
        if SAVE:
            keep(kept, H, live, mask, gates)
        if PROJECTED:
            tl.store(q + state, h_new.to(dtype), mask=mask)
        else:
            h = tl.load(h_in + state, mask=mask & ((given & H0) != 0), other=0.0)
            h_prev = tl.where(clear, put_in_of(reset_h, state, mask), h)
            h_new = kept_of(h_prev, h_new, zoneout_h, row[:, None] * H + units[None, :], mask, given & SHARES_H)
            tl.store(h_out + state, tl.where(live, h_new.to(dtype), h), mask=mask)
            leave_read(read_out, state_mask, state, tl.where(live, h_new, h), mask)
            tl.store(y + row[:, None] * H + units[None, :], tl.where(live, h_new, 0.0).to(dtype), mask=mask)
    elif is_gru(CELL):
        h = tl.load(carry_in + state, mask=mask & ((given & H0) != 0), other=0.0).to(tl.float32)
        h_prev = tl.where(clear, put_in_of(reset_h, state, mask), h)
        if PHASE == 0:
            r, update = sigmoid(p[0]), sigmoid(p[1])
            if CELL == "gru":
                product = p[2]
                n = tanh(x_n + r * product)
            else:
                product = r * h_prev * scale_of(state_mask, state, mask)
                tl.store(q + state, product.to(dtype), mask=mask)
                tl.store(z + state, update, mask=mask)
            if SAVE:
                tl.store(kept, tl.where(live, r, 0.0).to(dtype), mask=mask)
                tl.store(kept + H, tl.where(live, update, 0.0).to(dtype), mask=mask)
                tl.store(kept + 3 * H, tl.where(live, product, 0.0).to(dtype), mask=mask)
        else:
            update = tl.load(z + state, mask=mask, other=0.0)
            n = tanh(p[0])
        if CELL == "gru" or PHASE == 1:
            if SAVE:
                tl.store(kept + 2 * H, tl.where(live, n, 0.0).to(dtype), mask=mask)
            h_new = gru_blend(update, n, h_prev)
            h_new = kept_of(h_prev, h_new, zoneout_h, row[:, None] * H + units[None, :], mask, given & SHARES_H)
            h = tl.where(live, h_new, h)
            if carry_out is not None:
                tl.store(carry_out + state, h, mask=mask)
            tl.store(h_out + state, h.to(dtype), mask=mask)
            leave_read(read_out, state_mask, state, h, mask)
            tl.store(y + row[:, None] * H + units[None, :], tl.where(live, h_new, 0.0).to(dtype), mask=mask)
    else:
        h_new = rnn_forward(p[0], CELL == "rnn_relu")
        h = tl.load(h_in + state, mask=mask & ((given & H0) != 0), other=0.0)
        h_prev = tl.where(clear, put_in_of(reset_h, state, mask), h)
        h_new = kept_of(h_prev, h_new, zoneout_h, row[:, None] * H + units[None, :], mask, given & SHARES_H)
        tl.store(h_out + state, tl.where(live, h_new.to(dtype), h), mask=mask)
        leave_read(read_out, state_mask, state, tl.where(live, h_new, h), mask)
        tl.store(y + row[:, None] * H + units[None, :], tl.where(live, h_new, 0.0).to(dtype), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def forward_projection(
    m, w_hr, h_in, lengths, y, h_out,  # o * tanh(c) [B,H], [P,H], h_{t-1} [B,P], [B], y [T,B,P], h_t [B,P]
    reset, reset_t, reset_b, state_mask, zoneout_h, reset_h, read_out,  # as forward_step; resets for zoneout, or None
    t, B, given, H, P,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The second launch of a projected LSTM's step: h_t = W_hr m."""
    dtype = y.dtype.element_ty
    t = t.to(tl.int64)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = rows.to(tl.int64)
    mask = (rows < B)[:, None] & (units < P)[None, :]
    state = wide[:, None] * P + units[None, :]
    length = tl.load(lengths + rows, mask=(rows < B) & ((given & LENGTHS) != 0), other=t + 1)
    live = (t < length)[:, None]
    made = (tl.zeros((BLOCK_B, BLOCK_N), tl.float32),)
    made = products(made, m + (wide * H)[:, None], rows < B, w_hr, 0, units, P, H, BLOCK_K, PRECISION, UPCAST, "")
    p = made[0]
    h = tl.load(h_in + state, mask=mask & ((given & H0) != 0), other=0.0)
    if zoneout_h is not None:
        clear = tl.load(
            reset + t * reset_t + wide * reset_b, mask=(rows < B) & ((given & RESET) != 0), other=0
        ).to(tl.int1)[:, None]
        h_prev = tl.where(clear, put_in_of(reset_h, state, mask), h)
        p = kept_of(h_prev, p, zoneout_h, (t * B + wide)[:, None] * P + units[None, :], mask, given & SHARES_H)
    tl.store(h_out + state, tl.where(live, p.to(dtype), h), mask=mask)
    leave_read(read_out, state_mask, state, tl.where(live, p, h), mask)
    tl.store(y + (t * B + wide)[:, None] * P + units[None, :], tl.where(live, p, 0.0).to(dtype), mask=mask)

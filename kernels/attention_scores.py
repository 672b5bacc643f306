"""What every attention kernel shares: who looks at whom, the scores, dropout's generator, loads and products.

    s[i,j] = scale * q[i]·k[j];  softcap * tanh(s / softcap);  + bias[i,j];  - alibi * |i + shift - j|

Scores are kept in units of log 2, so that exp is one exp2; scale * log2(e) is folded into one multiplication. A feature
is a field of :class:`Call`, None where it is off: None is a constant to the compiler, and what it guards is gone.

In the kernels b is a sequence, h a query head, i a query, j a key; a tile is [BLOCK_M queries, BLOCK_N keys].
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROW_BLOCK = tl.constexpr(128)


class View(NamedTuple):
    """A tensor [B,H,T,D] (packed [T,H,D]: batch is 0) of unit stride in D, or [B,H,T] of unit stride in T."""

    ptr: object
    batch: object  # strides, hidden; of a [B,H,T,D] tensor in units of the kernel's ALIGN elements
    head: object
    row: object


class Rows(NamedTuple):
    """Two numbers for each row of o, float32, laid out for the backward pass: see :func:`rows_of`."""

    log: object  # lse in units of log 2; +inf for a row that sees nothing, and past the last row
    delta: object  # do·o - dlse; 0 there
    size: object  # numbers a head, in units of ROW_BLOCK


class Call(NamedTuple):
    """What a call asks for. Fields are run-time numbers (whole ones :func:`hidden`), pointers, or
    None for a feature that is off.

    bias and mask broadcast to [B,Hq,Tq,Tk]: their strides are 0 where they are broadcast. A row of None serves every
    query, a step (from key to key) of None is 1.
    """

    batch: object
    group: object  # query heads that share a key head
    length_q: object  # Tq; packed: rows of q in all
    length_k: object
    cu_q: object  # int32 [B+1]
    cu_k: object
    lengths_q: object  # int64 [B]
    lengths_k: object
    bottom_right: object  # 0 or 1
    left: object  # keys j >= i + shift - left
    right: object  # keys j <= i + shift + right; causal is 0
    scale: object
    cap_in: object  # scale / softcap
    cap_out: object  # softcap * log2(e)
    pairs: object  # 1 where there is a bias or a mask
    bias: object
    bias_batch: object
    bias_head: object
    bias_row: object
    bias_step: object
    mask: object  # int8
    mask_batch: object
    mask_head: object
    mask_row: object
    mask_step: object
    alibi: object  # float32 [Hq]
    sinks: object  # [Hq]
    seed: object  # int64 [1]
    threshold: object  # a weight whose word is below is dropped
    kept_scale: object  # 1 / (1 - dropout_p)


def hidden(n: int) -> int:
    """A number as the kernels' tuples carry it: never 1 nor a multiple of 16, for which Triton would compile anew."""
    return 2 * n + 3


@triton.jit
def number(x):
    """The inverse of :func:`hidden`."""
    return (x - 3) // 2


@triton.jit
def head_of(view, b, h, row, ALIGN: tl.constexpr):
    """Where row ``row`` of head h of sequence b begins."""
    offset = (
        tl.cast(b, tl.int64) * number(view.batch)
        + tl.cast(h, tl.int64) * number(view.head)
        + tl.cast(row, tl.int64) * number(view.row)
    ) * ALIGN
    return view.ptr + offset


@triton.jit
def load_tile(
    base, stride, start, count, D: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: features FIRST.. of the rows from ``start`` on, 0 past ``count`` rows or D features."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    base = base + tl.cast(start, tl.int64) * stride * ALIGN
    pointers = base + (row[:, None] * (stride * ALIGN) + (column[None, :] + FIRST))
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, (1, 16))
    if CHECKED:
        if FIRST + COLUMNS > D:
            return tl.load(pointers, mask=(start + row < count)[:, None] & (column + FIRST < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(start + row < count)[:, None], other=0.0)
    else:
        if FIRST + COLUMNS > D:
            return tl.load(pointers, mask=(column + FIRST < D)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def store_tile(
    tile, base, stride, start, count, D: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`load_tile`, rounding to the tensor's dtype."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    base = base + tl.cast(start, tl.int64) * stride * ALIGN
    pointers = base + (row[:, None] * (stride * ALIGN) + (column[None, :] + FIRST))
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, (1, 16))
    inside = (start + row < count)[:, None] & (column + FIRST < D)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty, WIDEN), mask=inside)


@triton.jit
def narrow(x, dtype: tl.constexpr, WIDEN: tl.constexpr):
    """float32 to ``dtype``, to nearest. Under the interpreter (WIDEN) its own cast to bfloat16 is not."""
    if WIDEN and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b in float32. The interpreter multiplies bfloat16 as integers: there the operands are widened first."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, c, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a b + c in float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    else:
        return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def rows_of(call, rows, b, h, q_row, heads):
    """Where the numbers of head h of sequence b begin in :class:`Rows`: each sequence at a multiple of ROW_BLOCK, so
    that a tile of them needs no mask and is aligned."""
    if call.cu_q is None:
        return (tl.cast(b, tl.int64) * heads + h) * number(rows.size) * ROW_BLOCK
    else:
        return (tl.cast(h, tl.int64) * number(rows.size) + q_row // ROW_BLOCK + b) * ROW_BLOCK


@triton.jit
def load_vector(base, start, SIZE: tl.constexpr):
    """Numbers of :class:`Rows` from ``start`` on."""
    return tl.load(tl.multiple_of(base + start + tl.arange(0, SIZE), 16))


@triton.jit
def find_tile(cu, slot, batch, BLOCK: tl.constexpr):
    """The sequence and the tile in it that a slot of a packed batch stands for.

    Sequence b owns the slots from cu[b] // BLOCK + b on, never fewer than it has tiles; the rows past the last one are
    sequence number ``batch``. So the grid is known without knowing the lengths.
    """
    low = tl.cast(slot, tl.int32) * 0
    high = low + batch
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(cu + middle) // BLOCK + middle <= slot
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle - 1)
    return low, slot - (tl.load(cu + low) // BLOCK + low)


@triton.jit
def find_program(call, cu, length, heads, together, BLOCK: tl.constexpr):
    """(sequence, head, tile) of this program.

    Programs run in groups of ``together`` heads, whose keys and values fit in the L2 cache; in a group the last tiles
    come first, which under a causal limit are the longest.
    """
    program = tl.program_id(0)
    if cu is None:
        tiles = tl.cdiv(length, BLOCK)
        units = number(call.batch) * heads
    else:
        tiles = length // BLOCK + number(call.batch) + 1
        units = heads
    first = program // (together * tiles) * together
    size = tl.minimum(together, units - first)
    index = program - first * tiles
    tile = tiles - 1 - index // size
    unit = first + index % size
    if cu is None:
        return unit // heads, unit % heads, tile
    else:
        b, tile = find_tile(cu, tile, number(call.batch), BLOCK)
        return b, unit, tile


@triton.jit
def sequence(call, b):
    """(first row in q, rows there, queries that count, first row in k, rows there, keys that count, shift)."""
    if call.cu_q is None:
        q_row = 0
        k_row = 0
        rows = number(call.length_q)
        keys = number(call.length_k)
        tq = rows
        tk = keys
        if call.lengths_q is not None:
            tq = tl.minimum(tl.maximum(tl.load(call.lengths_q + b), 0), rows).to(tl.int32)
        if call.lengths_k is not None:
            tk = tl.minimum(tl.maximum(tl.load(call.lengths_k + b), 0), keys).to(tl.int32)
    else:
        inside = b < number(call.batch)
        q_row = tl.load(call.cu_q + b)
        k_row = tl.load(call.cu_k + b)
        rows = tl.load(call.cu_q + b + 1, mask=inside, other=number(call.length_q)) - q_row
        keys = tl.load(call.cu_k + b + 1, mask=inside, other=number(call.length_k)) - k_row
        tq = tl.where(inside, rows, 0)
        tk = tl.where(inside, keys, 0)
    return q_row, rows, tq, k_row, keys, tk, number(call.bottom_right) * (tk - tq)


@triton.jit
def key_range(call, first, last, tk, shift, BLOCK: tl.constexpr):
    """Keys [begin, end) that queries first..last see, [whole_begin, whole_end) of them seen by each one: all but the
    last a multiple of BLOCK, and the loop over the middle needs no mask."""
    begin = tl.cast(tk, tl.int32) * 0
    whole_begin = begin
    end = begin + tk
    if call.left is not None:
        begin = tl.maximum(begin, first + shift - number(call.left))
        whole_begin = tl.maximum(whole_begin, last + shift - number(call.left))
    whole_end = end
    if call.right is not None:
        end = tl.minimum(end, last + shift + number(call.right) + 1)
        whole_end = tl.minimum(whole_end, first + shift + number(call.right) + 1)
    end = tl.where(first <= last, end, 0)
    whole_end = tl.where(first <= last, whole_end, 0)
    begin = begin // BLOCK * BLOCK
    whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK) * BLOCK, tl.maximum(begin, tl.cdiv(end, BLOCK) * BLOCK))
    whole_end = tl.maximum(whole_begin, tl.maximum(whole_end, 0) // BLOCK * BLOCK)
    if call.pairs is not None:  # each tile may hold a hidden pair
        whole_begin = begin
        whole_end = begin
    return begin, whole_begin, whole_end, end


@triton.jit
def query_range(call, first, last, tq, shift, BLOCK: tl.constexpr):
    """Queries [begin, end) that see any of keys first..last; those from ``whole`` on see all of these.

    One loop more than this would cost its registers, so under a left limit, a bias or a mask no tile is whole.
    """
    begin = tl.cast(tq, tl.int32) * 0
    whole = begin
    end = begin + tq
    if call.right is not None:
        begin = tl.maximum(begin, first - shift - number(call.right))
        whole = tl.maximum(whole, last - shift - number(call.right))
    if call.left is not None:
        end = tl.minimum(end, last - shift + number(call.left) + 1)
    end = tl.where(first <= last, end, 0)
    begin = begin // BLOCK * BLOCK
    whole = tl.minimum(tl.cdiv(whole, BLOCK) * BLOCK, tl.maximum(begin, tl.cdiv(end, BLOCK) * BLOCK))
    return begin, whole, end


@triton.jit
def load_pairs(pointer, batch, head, row, step, b, h, i, j, i0, j0, inside, other):
    """The tile of a bias or mask at heads h, queries i and keys j, which broadcast; i0 and j0 are where it begins."""
    base = pointer + (tl.cast(b, tl.int64) * number(batch) + tl.cast(h, tl.int64) * number(head))
    if row is not None:
        base += tl.cast(i0, tl.int64) * number(row)
    if step is not None:
        base += tl.cast(j0, tl.int64) * number(step)
        offset = (j - j0) * number(step)
    else:
        base += j0
        offset = j - j0
    if row is not None:
        offset = offset + (i - i0) * number(row)
    return tl.load(base + offset, mask=inside, other=other)


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """tanh, to 1e-7 absolutely; PRECISE: relatively too."""
    large = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if PRECISE:
        z = x * x
        tail = -0.3333333271 + z * (0.1333321084 + z * (-0.0539298632 + z * (0.0214438829 + z * -0.0068822555)))
        return tl.where(z < 0.25, x + x * z * tail, large)
    else:
        return large


@triton.jit
def logits(qk, call, PRECISE: tl.constexpr):
    """Scaled and capped scores, in units of log 2."""
    if call.cap_in is None:
        return qk * (call.scale * LOG2E)
    else:
        return tanh(qk * call.cap_in, PRECISE) * call.cap_out


@triton.jit
def cap_slope(s, call):
    """What the cap makes of a gradient, from :func:`logits`' result: 1 - tanh^2."""
    t = s / call.cap_out
    return 1.0 - t * t


@triton.jit
def biased(s, call, b, h, i, j, i0, j0, tq, tk, shift, MASKED: tl.constexpr, PAST_END: tl.constexpr):
    """Scores with bias and slopes added; -inf where the pair is hidden, which only happens in MASKED tiles.
    PAST_END: whether keys past the last are to be hidden too."""
    if call.bias is not None:
        bias = load_pairs(
            call.bias, call.bias_batch, call.bias_head, call.bias_row, call.bias_step,
            b, h, i, j, i0, j0, (i < tq) & (j < tk), 0.0,
        )  # fmt: skip
        s += bias.to(tl.float32) * LOG2E
    if call.alibi is not None:
        s -= tl.load(call.alibi + h) * LOG2E * tl.abs(i + shift - j).to(tl.float32)
    if MASKED:
        s = tl.where(visible(call, b, h, i, j, i0, j0, tq, tk, shift, PAST_END), s, float("-inf"))
    return s


@triton.jit
def visible(call, b, h, i, j, i0, j0, tq, tk, shift, PAST_END: tl.constexpr):
    """Whether query i may look at key j."""
    if PAST_END:
        seen = j < tk
    else:
        seen = (j == j) & (i == i)
    if call.left is not None:
        seen = seen & (j >= i + (shift - number(call.left)))
    if call.right is not None:
        seen = seen & (j <= i + (shift + number(call.right)))
    if call.mask is not None:
        mask = load_pairs(
            call.mask, call.mask_batch, call.mask_head, call.mask_row, call.mask_step,
            b, h, i, j, i0, j0, (i < tq) & (j < tk), 0,
        )  # fmt: skip
        seen = seen & (mask != 0)
    return seen


@triton.jit
def kept(call, b, h, i, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights dropout keeps, [BLOCK_M, BLOCK_N], of queries i [BLOCK_M, 1] and keys from ``start`` on.

    Philox-4x32-10 under the key ``seed`` at the counter (j // 4, i, h, b), word j % 4: the same bit in every kernel.
    """
    seed = tl.load(call.seed)
    quad = start // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, quad + zero, i + zero, h + zero, b + zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK_M, BLOCK_N])
    return words >= tl.cast(number(call.threshold), tl.uint32)

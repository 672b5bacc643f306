"""Which rows a program has, which tiles of the other side they meet, and who looks at whom: fully masked tiles are
skipped."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_pairs, number


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
def find_program(program, call, heads, together, BLOCK: tl.constexpr, OF_KEYS: tl.constexpr):
    """(sequence, head, tile) of a program whose rows are keys (OF_KEYS) or queries.

    Programs run in groups of ``together`` heads, so that what each of these reads fits in the L2 cache; in a group
    those come first that under a causal limit have the most to do: the first tiles of keys, the last of queries.
    """
    cu = call.cu_k if OF_KEYS else call.cu_q
    length = number(call.length_k if OF_KEYS else call.length_q)
    if cu is None:
        tiles = tl.cdiv(length, BLOCK)
        units = number(call.batch) * heads
    else:
        tiles = length // BLOCK + number(call.batch) + 1
        units = heads
    first = program // (together * tiles) * together
    size = tl.minimum(together, units - first)
    index = program - first * tiles
    tile = index // size
    if not OF_KEYS:
        tile = tiles - 1 - tile
    unit = first + index % size
    if cu is None:
        return unit // heads, unit % heads, tile
    else:
        b, tile = find_tile(cu, tile, number(call.batch), BLOCK)
        return b, unit, tile


@triton.jit
def sequence(call, b):
    """(first row in q, rows there, queries that count, first row in k, rows there, keys that count, shift)."""
    inside = b < number(call.batch)  # packed rows past the last sequence are one more, of which none counts
    q_row = 0
    k_row = 0
    rows = number(call.length_q)
    keys = number(call.length_k)
    if call.cu_q is not None:
        q_row = tl.load(call.cu_q + b)
        rows = tl.load(call.cu_q + b + 1, mask=inside, other=rows) - q_row
    if call.cu_k is not None:
        k_row = tl.load(call.cu_k + b)
        keys = tl.load(call.cu_k + b + 1, mask=inside, other=keys) - k_row
    tq = rows
    tk = keys
    if call.cu_q is not None:
        tq = tl.where(inside, rows, 0)
        tk = tl.where(inside, keys, 0)
    if call.lengths_q is not None:
        tq = tl.minimum(tl.maximum(tl.load(call.lengths_q + b), 0), rows).to(tl.int32)
    if call.lengths_k is not None:
        tk = tl.minimum(tl.maximum(tl.load(call.lengths_k + b, mask=inside, other=0), 0), keys).to(tl.int32)
    return q_row, rows, tq, k_row, keys, tk, number(call.bottom_right) * (tk - tq)


@triton.jit
def prefix_of(call, b):
    """The first keys of a sequence that every query sees, of a call with a prefix; may be more than there are."""
    if call.cu_q is None:
        return tl.load(call.prefix + b).to(tl.int32)
    else:
        return tl.load(call.prefix + b, mask=b < number(call.batch), other=0).to(tl.int32)


@triton.jit
def key_range(call, b, first, last, tk, shift, BLOCK: tl.constexpr):
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
    if call.prefix is not None:  # what is between the prefix and a window is visited, and hidden
        prefix = tl.minimum(prefix_of(call, b), tk)
        begin = tl.where(prefix > 0, 0, begin)
        end = tl.maximum(end, prefix)
        joined = whole_begin <= prefix
        whole_begin = tl.where(joined, 0, whole_begin)
        whole_end = tl.where(joined, tl.maximum(whole_end, prefix), whole_end)
    end = tl.where(first <= last, end, 0)
    whole_end = tl.where(first <= last, whole_end, 0)
    if call.left is not None:
        end = tl.where(begin < end, end, 0)  # rounded, a begin past the end would be before it
    begin = begin // BLOCK * BLOCK
    whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK) * BLOCK, tl.maximum(begin, tl.cdiv(end, BLOCK) * BLOCK))
    whole_end = tl.maximum(whole_begin, tl.maximum(whole_end, 0) // BLOCK * BLOCK)
    if call.pairs is not None:  # each tile may hold a hidden pair
        whole_begin = begin
        whole_end = begin
    return begin, whole_begin, whole_end, end


@triton.jit
def query_range(call, b, first, last, tq, shift, BLOCK: tl.constexpr):
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
    if call.prefix is not None:
        prefix = prefix_of(call, b)
        begin = tl.where(first < prefix, 0, begin)
        whole = tl.where(last < prefix, 0, whole)
        end = tl.where(first < prefix, tq, end)
    end = tl.where(first <= last, end, 0)
    stop = tl.cdiv(end, BLOCK) * BLOCK
    begin = tl.where(begin < end, begin // BLOCK * BLOCK, stop)  # rounded, a begin past the end would be before it
    whole = tl.minimum(tl.cdiv(whole, BLOCK) * BLOCK, stop)
    return begin, whole, end


@triton.jit
def visible(call, b, h, i, j, i0, j0, tq, tk, shift, PAST_END: tl.constexpr):
    """Whether query i may look at key j."""
    if call.right is not None:
        last = i + (shift + number(call.right))
        if PAST_END:
            last = tl.minimum(last, tk - 1)
        seen = j <= last
    elif PAST_END:
        seen = j < tk
    else:
        seen = (j == j) & (i == i)
    if call.left is not None:
        seen = seen & (j >= i + (shift - number(call.left)))
    if call.prefix is not None:
        prefix = prefix_of(call, b)
        if PAST_END:
            prefix = tl.minimum(prefix, tk)
        seen = seen | (j < prefix)
    if call.mask.ptr is not None:
        seen = seen & (load_pairs(call.mask, b, h, i, j, i0, j0, tq, tk, 0) != 0)
    return seen

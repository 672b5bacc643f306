"""The gradient of attention's bias: ds, summed over what the bias was broadcast along, without atomics.

A program owns a tile of the bias and meets, in order, all the tiles of scores that it was broadcast to. Where that
would leave the machine idle (a bias of few numbers) ``splits`` programs share them, and their sums are added later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import load_queries, scores_gradient
from .attention_ranges import key_range, sequence
from .attention_tiles import head_of, load_halves, load_tile, narrow, number


@triton.jit(
    do_not_specialize=[
        "q", "k", "v", "d_o", "scratch", "dbias", "call", "heads", "sum_batch", "sum_heads", "tiles_i", "tiles_j",
        "size", "splits",
    ]
)  # fmt: skip
def attention_backward_bias(
    q, k, v, d_o, scratch, dbias, call, heads, sum_batch, sum_heads, tiles_i, tiles_j, size, splits,
    SUM_I: tl.constexpr, SUM_J: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """dbias [splits, bias's own sizes], contiguous; ``size`` numbers a split. sum_batch and sum_heads: how many
    sequences and heads share a number (1, or all of them); SUM_I, SUM_J: whether the queries and the keys do."""
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits
    own_j = 1
    own_i = 1
    if not SUM_J:
        own_j = tiles_j
    if not SUM_I:
        own_i = tiles_i
    own_heads = heads // sum_heads
    tile_j = tile % own_j
    tile_i = tile // own_j % own_i
    own_h = tile // own_j // own_i % own_heads
    own_b = tile // own_j // own_i // own_heads
    terms = sum_batch * sum_heads * (tiles_i // own_i) * (tiles_j // own_j)
    share = tl.cdiv(terms, splits)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for term in range(split * share, tl.minimum(terms, split * share + share)):
        if SUM_J:
            tile_j = term % tiles_j
            term = term // tiles_j
        if SUM_I:
            tile_i = term % tiles_i
            term = term // tiles_i
        h = own_h + term % sum_heads
        b = own_b + term // sum_heads
        q_row, _, tq, k_row, _, tk, shift = sequence(call, b)
        i0 = tile_i * BLOCK_M
        j0 = tile_j * BLOCK_N
        begin, _before, _after, end = key_range(call, i0, tl.minimum(i0 + BLOCK_M, tq) - 1, tk, shift, BLOCK_N)
        if (j0 >= begin) & (j0 < end):
            q1, q2, d_tile, log, change = load_queries(
                q, d_o, scratch, call, b, h, heads, q_row, i0, tq, D, DV, D1, D2, BLOCK_DV, BLOCK_M, ALIGN
            )  # fmt: skip
            k_head = head_of(k, b, h // number(call.group), k_row, ALIGN)
            k1, k2 = load_halves(k_head, number(k.row), j0, tk, D, D1, D2, BLOCK_N, ALIGN, True)
            v_head = head_of(v, b, h // number(call.group), k_row, ALIGN)
            v_tile = load_tile(v_head, number(v.row), j0, tk, DV, 0, BLOCK_N, BLOCK_DV, ALIGN, True)
            i = i0 + tl.arange(0, BLOCK_M)[:, None]
            ds, _scores = scores_gradient(
                q1, q2, d_tile, log, change, k1, k2, v_tile, call, b, h, i, i0, j0, tq, tk, shift,
                D2, BLOCK_M, BLOCK_N, PRECISION, WIDEN, True,
            )  # fmt: skip
            acc += ds
    width = 1
    height = 1
    if not SUM_J:
        width = number(call.length_k)
    if not SUM_I:
        height = number(call.length_q)
    base = dbias + tl.cast(split, tl.int64) * size
    base += (tl.cast(own_b, tl.int64) * own_heads + own_h) * height * width
    dtype: tl.constexpr = dbias.dtype.element_ty
    i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM_I and SUM_J:
        tl.store(base, narrow(tl.sum(tl.sum(acc, 1), 0), dtype, WIDEN))
    elif SUM_I:
        tl.store(base + j, narrow(tl.sum(acc, 0), dtype, WIDEN), mask=j < width)
    elif SUM_J:
        tl.store(base + i, narrow(tl.sum(acc, 1), dtype, WIDEN), mask=i < height)
    else:
        base += tl.cast(tile_i, tl.int64) * BLOCK_M * width
        pointers = base + (i - tile_i * BLOCK_M)[:, None] * width + j[None, :]
        tl.store(pointers, narrow(acc, dtype, WIDEN), mask=(i < height)[:, None] & (j < width)[None, :])

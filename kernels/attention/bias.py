"""The gradient of attention's bias: ds, summed over what the bias was broadcast along, without atomics.

A program owns a tile of the bias and meets, in order, all the tiles of scores that it was broadcast to. Where that
would leave the machine idle (a bias of few numbers) ``splits`` programs share them, and their sums are added later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward import scores_gradient, weights
from .ranges import key_range, sequence
from .tiles import dot_add, head_of, load_rows, load_vector, narrow, number, rows_of


@triton.jit
def rows_product(
    x_head, x_row, i0, count_x, y_head, y_row, j0, count_y, D: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """x yᵀ of a tile of rows of each, [BLOCK_M, BLOCK_N], CHUNK of D features at a time: neither is needed again."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    x_head += tl.cast(i0, tl.int64) * x_row * ALIGN
    y_head += tl.cast(j0, tl.int64) * y_row * ALIGN
    for first in tl.range(0, D, CHUNK):
        x = load_rows(x_head, i * x_row, i0 + i < count_x, D, first, CHUNK, ALIGN)
        y = load_rows(y_head, j * y_row, j0 + j < count_y, D, first, CHUNK, ALIGN)
        product = dot_add(x, tl.trans(y), product, PRECISION, WIDEN)
    return product


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
        begin, _before, _after, end = key_range(call, b, i0, tl.minimum(i0 + BLOCK_M, tq) - 1, tk, shift, BLOCK_N)
        if (j0 >= begin) & (j0 < end):
            head = h // number(call.group)
            i = i0 + tl.arange(0, BLOCK_M)[:, None]
            base = rows_of(call, scratch, b, h, q_row, heads)
            product = rows_product(
                head_of(q, b, h, q_row, ALIGN), number(q.row), i0, tq, head_of(k, b, head, k_row, ALIGN), number(k.row),
                j0, tk, D, min(D1, 64), BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN,
            )  # fmt: skip
            log = load_vector(scratch.log + base, i0, BLOCK_M)
            precise: tl.constexpr = q.ptr.dtype.element_ty == tl.float32
            p, _scores = weights(product, log, call, b, h, i, i0, j0, tq, tk, shift, BLOCK_N, precise, True)
            p = p * load_vector(scratch.share + base, i0, BLOCK_M)[:, None]
            dp = rows_product(
                head_of(d_o, b, h, q_row, ALIGN), number(d_o.row), i0, tq, head_of(v, b, head, k_row, ALIGN),
                number(v.row), j0, tk, DV, min(BLOCK_DV, 64), BLOCK_M, BLOCK_N, ALIGN, PRECISION, WIDEN,
            )  # fmt: skip
            delta = load_vector(scratch.delta + base, i0, BLOCK_M)
            acc += scores_gradient(p, dp, delta, call, b, h, i, j0, BLOCK_M, BLOCK_N)
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

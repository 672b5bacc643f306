"""Where the numbers of a tile lie: tensors by strides, loads and stores of tiles, and their products.

A tile is [rows, columns] of a tensor's [T, D]. Strides are run-time numbers, so that no kernel is compiled for one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

ROW_BLOCK = tl.constexpr(128)


class View(NamedTuple):
    """A tensor [B,H,T,D] (packed [T,H,D]: batch is 0) of unit stride in D, or [B,H,T] of unit stride in T."""

    ptr: object
    batch: object  # strides, hidden; of a [B,H,T,D] tensor in units of the kernel's ALIGN elements
    head: object
    row: object


class Pairs(NamedTuple):
    """A bias or a mask, broadcast to [B,Hq,Tq,Tk]: strides are 0 where it is."""

    ptr: object  # None: there is none
    batch: object  # strides, hidden
    head: object
    row: object  # None: one row serves every query
    step: object  # from key to key; None: 1
    even: object  # 1 where step is None, 16 divides Tk, and every row begins at a multiple of 16 elements: the unit of
    # the other strides then. Else None.


class Pages(NamedTuple):
    """Which pages of a pool [pages, heads, rows, D] hold the keys and values of each sequence, in their order."""

    table: object  # int32 [B, pages of the longest]; None: keys and values are no pool
    row: object  # its stride
    size: object  # rows a page


class Rows(NamedTuple):
    """Three numbers for each row of o, float32, laid out for the backward pass: see :func:`rows_of`."""

    log: object  # lse in units of log 2; +inf for a row that sees nothing, and past the last row
    delta: object  # do·o, 0 there; once dq is made, what makes the row's ds sum to what it must
    share: object  # once dq is made, what makes the row's p sum to 1
    size: object  # numbers a head, in units of ROW_BLOCK


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
def tile_pointers(
    base, stride, start, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr
):
    """Features FIRST.. of the rows from ``start`` on, [ROWS, COLUMNS]."""
    base = base + tl.cast(start, tl.int64) * stride * ALIGN
    pointers = base + (tl.arange(0, ROWS)[:, None] * (stride * ALIGN) + (tl.arange(0, COLUMNS)[None, :] + FIRST))
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, (1, 16))
    return pointers


@triton.jit
def load_tile(
    base, stride, start, count, D: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS]: features FIRST.. of the rows from ``start`` on, 0 past ``count`` rows or D features. ``base`` is
    the first row of a head, or its descriptor by :func:`described`."""
    if isinstance(base, tl.tensor_descriptor):
        return base.load([tl.cast(start, tl.int32), FIRST])
    else:
        pointers = tile_pointers(base, stride, start, FIRST, ROWS, COLUMNS, ALIGN)
        row = tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
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
def described(
    head, stride, count, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """``head``, where its rows begin; or, under TMA, a descriptor of ``count`` of them, of D features, for tiles of
    [ROWS, COLUMNS]: zeros past either end, which is the sequence's own."""
    if TMA:
        return tl.make_tensor_descriptor(
            head, [tl.cast(count, tl.int32), D], [tl.cast(stride, tl.int64) * ALIGN, 1], [ROWS, COLUMNS]
        )
    else:
        return head


@triton.jit
def load_halves(
    base, more, stride, start, count, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """D features of rows as two tiles, [ROWS, D1] and [ROWS, D2]; the first twice where D2 is 0. ``base`` and ``more``
    are each half's: the same address, or a descriptor of its own."""
    first = load_tile(base, stride, start, count, D, 0, ROWS, D1, ALIGN, True)
    second = first
    if D2 > 0:
        second = load_tile(more, stride, start, count, D, D1, ROWS, D2, ALIGN, True)
    return first, second


@triton.jit
def load_rows(base, offset, inside, D: tl.constexpr, first, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """[ROWS, COLUMNS]: features first.. of rows at ``offset`` [ROWS], 0 where not ``inside``."""
    column = first + tl.arange(0, COLUMNS)
    pointers = base + (offset[:, None] * ALIGN + column[None, :])
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_tile(
    tile, base, stride, start, count, D: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """The inverse of :func:`load_tile`, rounding to the tensor's dtype."""
    pointers = tile_pointers(base, stride, start, FIRST, ROWS, COLUMNS, ALIGN)
    inside = (start + tl.arange(0, ROWS) < count)[:, None] & (tl.arange(0, COLUMNS) + FIRST < D)[None, :]
    tl.store(pointers, narrow(tile, base.dtype.element_ty, WIDEN), mask=inside)


@triton.jit
def head_of_keys(view, pages, b, h, row, ALIGN: tl.constexpr):
    """As :func:`head_of`, of keys or values; those in pages [pages, heads, rows, D] begin at page 0 for every b."""
    if pages.table is None:
        return head_of(view, b, h, row, ALIGN)
    else:
        return head_of(view, 0, h, 0, ALIGN)


@triton.jit
def load_keys(
    view, head, pages, b, start, count, D: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """As :func:`load_tile`, of keys or values that may lie in pages."""
    if pages.table is None:
        return load_tile(head, number(view.row), start, count, D, FIRST, ROWS, COLUMNS, ALIGN, CHECKED)
    else:
        row = start + tl.arange(0, ROWS)
        size = number(pages.size)
        places = pages.table + tl.cast(b, tl.int64) * number(pages.row) + row // size
        page = tl.load(places, mask=row < count, other=0)
        offset = tl.cast(page, tl.int64) * number(view.batch) + (row % size) * number(view.row)
        return load_rows(head, offset, row < count, D, FIRST, COLUMNS, ALIGN)


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
def load_pairs(x, b, h, i, j, i0, j0, tq, tk, other):
    """The tile of a bias or mask at heads h, queries i and keys j, of [1, BLOCK_N], [BLOCK_M, 1] or both; i0 and j0 are
    where it begins. ``other`` stands past the last query or key (where ``x.even``, past its 16 keys)."""
    unit: tl.constexpr = 1 if x.even is None else 16
    base = x.ptr + (tl.cast(b, tl.int64) * number(x.batch) + tl.cast(h, tl.int64) * number(x.head)) * unit
    along = j - j0
    if x.step is not None:
        pointers = base + tl.cast(j0, tl.int64) * number(x.step) + along * number(x.step)
    else:
        pointers = base + j0 + along
    if x.even is None:
        inside = along < tk - j0
    else:
        inside = along // 16 < tl.cdiv(tk - j0, 16)
    if x.row is not None:
        pointers += tl.cast(i0, tl.int64) * number(x.row) * unit + (i - i0) * (number(x.row) * unit)
        inside = inside & (i < tq)
    return tl.load(pointers, mask=inside, other=other)

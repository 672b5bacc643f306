"""A cache of the keys and values of sequences that are decoded a few positions at a time."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastseq import backend
from fastseq.attn import int8
from fastseq.attn.checks import FLOATS, check_window
from fastseq.checks import ArgumentError, sizes

_ROWS = 64  # a page, and a first allocation, where nobody says


class KVCache(nn.Module):
    """Keys and values of ``batch`` sequences, appended in place and read where they lie: ``attention(q, cache=cache)``.

    One of three layouts. *Contiguous*: room for ``capacity`` positions a sequence. *Paged*, with ``page_size``: one
    pool of pages that all sequences share, so that memory follows what is there rather than the longest sequence; Kwon
    et al. 2023. *Ring*, with ``window``: the newest ``window`` positions of each sequence, whatever its length, for
    models of sliding windows. Its queries are positions of the last append: keys that earlier ones saw are gone.

    *int8* numbers, with ``dtype=torch.int8``, are made by ``append``: of each token and head the nearest multiples of
    a scale, its largest magnitude / 127. The native kernels on the CPU read them where they lie, for queries of
    float32, bfloat16 or float16. With K and V the largest magnitudes in k and v, and e = |scale| · K / 254 · the sum
    of magnitudes of a query's features, its lse is within e of what exact keys and values give, and its result within
    V / 254 + (exp(2 e) − 1) · V, beside rounding.

    It is a module without parameters: its tensors are buffers, so ``state_dict``, ``deepcopy`` and ``to`` work. It is
    for inference: what is appended has no gradient. With a ``capacity`` a decoding step compiles whole, where a full
    cache is found by the bounds check of the compiled code.

    Args:
        batch, heads: sequences, and heads of k and v.
        dim, dim_v: features a head of k, and of v (by default the same).
        capacity: positions a sequence; with ``page_size`` those of all sequences together, rounded up to whole pages.
            None: the cache grows, and copies itself then. Not with ``window``.
        page_size: positions a page.
        window: keep that many positions a sequence.
        dtype, device: of k and v; by default torch's defaults. Floating, or int8.

    Raises:
        ArgumentError: sizes that make no cache.

    Example:
        >>> cache = KVCache(2, 4, 16, capacity=100)
        >>> for _ in range(3):
        ...     q, k, v = (torch.randn(2, 4, 1, 16) for _ in range(3))
        ...     cache.append(k, v)
        ...     o = fastseq.attention(q, cache=cache)
        >>> o.shape, cache.lengths
        (torch.Size([2, 4, 1, 16]), tensor([3, 3]))
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None  # float32, of int8: as k and v, with 1 feature
    v_scale: Tensor | None
    lengths: Tensor
    """int64 ``[batch]``: positions appended to each sequence since its reset."""
    table: Tensor | None  # int32 [batch, columns]: the pages of each sequence, of which those that hold something count
    first: Tensor  # int64 [batch]: pages that left a ring, whose successors are in the table's first column
    free: Tensor  # int32 [pages]: from `used` on the pages that no sequence has
    used: Tensor  # int64 []

    def __init__(
        self,
        batch: int,
        heads: int,
        dim: int,
        *,
        dim_v: int | None = None,
        capacity: int | None = None,
        page_size: int | None = None,
        window: int | None = None,
        dtype: torch.dtype | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.batch, self.heads, self.dim, self.dim_v = batch, heads, dim, dim if dim_v is None else dim_v
        for name, size in (("batch", batch), ("heads", heads), ("dim", dim), ("dim_v", self.dim_v)):
            _check_size(name, size)
        for name, given in (("capacity", capacity), ("page_size", page_size), ("window", window)):
            if given is not None:
                _check_size(name, given)
        if window is not None and capacity is not None:
            raise ArgumentError(f"capacity={capacity} goes without window={window}, which says what is kept")
        dtype = dtype or torch.get_default_dtype()
        if dtype not in (*FLOATS, torch.int8):
            raise ArgumentError(f"dtype must be float64, float32, bfloat16, float16 or int8, got {dtype}")
        self.capacity, self.window = capacity, window
        self.page_size = min(window, _ROWS) if window is not None and page_size is None else page_size
        numbers = {"dtype": torch.int64, "device": device}
        self.register_buffer("lengths", torch.zeros(batch, **numbers))
        table = None
        if self.page_size is None:
            shape = (batch, heads, _ROWS if capacity is None else capacity)
        else:
            if window is not None:  # one position more in each step needs a page more at most
                pages = batch * (_pages(window - 1 + self.page_size, self.page_size) + 1)
            else:
                pages = _pages(batch * _ROWS if capacity is None else capacity, self.page_size)
            shape = (pages, heads, self.page_size)
            columns = pages // batch if window is not None else pages
            own = torch.arange(pages, dtype=torch.int32, device=device)
            table = own.reshape(batch, columns) if window is not None else torch.zeros_like(own).repeat(batch, 1)
            self.register_buffer("first", torch.zeros(batch, **numbers))
            self.register_buffer("free", own.clone())
            self.register_buffer("used", torch.zeros((), **numbers))
        self.register_buffer("table", table)
        for name, features in (("k", dim), ("v", self.dim_v)):
            self.register_buffer(name, torch.zeros(*shape, features, dtype=dtype, device=device))
            scale = torch.zeros(*shape, 1, device=device, dtype=torch.float32) if dtype == torch.int8 else None
            self.register_buffer(f"{name}_scale", scale)

    def extra_repr(self) -> str:
        """The arguments that say how it lies."""
        return (
            f"batch={self.batch}, heads={self.heads}, dim={self.dim}, dim_v={self.dim_v}, capacity={self.capacity}, "
            f"page_size={self.page_size}, window={self.window}, dtype={self.k.dtype}"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values have, with their scales, whether positions are in use or not."""
        return sum(x.nbytes for x in self._rows().values())

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, *, sequences: Tensor | None = None) -> None:
        """Append new positions to all sequences, or to some.

        Args:
            k, v: ``[n, heads, t, dim]`` and ``[n, heads, t, dim_v]``, in the cache's dtype and on its device. Of int8
                they are float32, bfloat16 or float16.
            sequences: int64 ``[n]``: which ones, no one twice; all of them by default.

        Raises:
            ArgumentError: sizes, dtypes or sequences that do not fit; a cache that is full. It is then as it was.
        """
        self._check(k, v, sequences)
        if k.numel() == 0:
            return
        place = self._place(k.shape[2], sequences)
        new = {"k": k, "v": v}
        if self.k_scale is not None:
            (k, k_scale), (v, v_scale) = int8.quantise(k), int8.quantise(v)
            new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
        for name, x in self._rows().items():
            x[place] = new[name] if isinstance(place[0], slice) else new[name].transpose(1, 2)
        if sequences is None:
            self.lengths.add_(k.shape[2])
        else:
            self.lengths[sequences] += k.shape[2]

    @torch.no_grad()
    def reset(self, sequences: Tensor | None = None) -> None:
        """Forget all sequences, or some: int64 ``[n]``. Their pages go back to the pool; memory stays."""
        if sequences is not None:
            self._check_sequences(sequences)
        own = slice(None) if sequences is None else sequences
        if self.table is not None and self.window is None:
            page, columns = self._page_size(), torch.arange(self.table.shape[1], device=self.k.device)
            pages = self.table[own][columns < _pages(self.lengths[own], page)[:, None]]
            end = int(self.used)
            self.free[end - len(pages) : end] = pages
            self.used -= len(pages)
        if self.table is not None:
            self.first[own] = 0
        self.lengths[own] = 0

    def arguments(
        self, window: tuple[int, int] | None, given: dict[str, Any], of_positions: dict[str, Any]
    ) -> tuple[tuple[Any, ...], Tensor, Tensor | None, tuple[int, int] | None]:
        """k, v and their scales; lengths_k, block_table and window for :func:`fastseq.attention`.

        Args:
            window: as given there.
            given: what a cache stands for.
            of_positions: what counts positions from a sequence's begin, which a ring no longer has.
        """
        self._refuse(given, "the cache has the keys and their lengths")
        rows = self.k, self.v, self.k_scale, self.v_scale
        if self.table is None:
            return rows, self.lengths, None, window
        if self.window is not None:
            self._refuse(of_positions, "a cache with window= has forgotten where its sequences begin")
            left, right = (self.window - 1, -1) if window is None else check_window(window)
            if not 0 <= left < self.window:
                raise ArgumentError(
                    f"window={window}: the cache keeps {self.window} positions; left must be below that"
                )
            window = left, right
        pools = tuple(None if x is None else x.transpose(1, 2) for x in rows)
        lengths = self.lengths.clone() if self.window is None else self.lengths - self.first * self._page_size()
        return pools, lengths, self.table, window

    @staticmethod
    def _refuse(given: dict[str, Any], why: str) -> None:
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(f"{name} cannot be given with this cache: {why}")

    def _apply(self, fn: Any, recurse: bool = True) -> KVCache:
        """As any module; but scales stay float32 whatever the module around is converted to."""
        scales = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        super()._apply(fn, recurse)
        for name, scale in scales.items():
            if scale is not None:
                setattr(self, name, scale.to(self.k.device))
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Of a cache that had grown, too."""
        grows = dict.fromkeys(self._rows(), 2 if self.table is None else 0)
        grows |= {} if self.table is None else {"table": 1, "free": 0}
        for name, dim in grows.items() if self.capacity is None else ():
            own, other = getattr(self, name), state_dict.get(prefix + name)
            if other is not None and own.select(dim, 0).shape == other.select(dim, 0).shape:
                setattr(self, name, own.new_empty(other.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _rows(self) -> dict[str, Tensor]:
        """What has a row for each position: [batch, heads, positions, features], or pools [pages, heads, page, ...]."""
        rows = {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: x for name, x in rows.items() if x is not None}

    def _page_size(self) -> int:
        assert self.page_size is not None
        return self.page_size

    def _place(self, t: int, sequences: Tensor | None) -> tuple[Any, ...]:
        """Find places for t more positions, in new pages where those that sequences have do not suffice.

        Returns:
            The index of these rows in k and v: slices where one run is all of them; else tensors ``[n, 1]`` or
            ``[n, t]`` of sequences or pages and ``[n, t]`` of positions, with a slice between.
        """
        compiling = torch.compiler.is_compiling()
        before: Any = self.lengths if sequences is None else self.lengths[sequences]
        plain, steady = False, False
        if not compiling:
            known = before.tolist()
            steady = self._make_room(t, known, sequences)
            plain = self.lengths.is_cpu and not backend.tracing()
            run = self._run(t, known, sequences) if plain and steady else None
            if run is not None:
                return run
        # An operation of numpy on a few numbers takes a fraction of the time that torch's takes.
        seen: Any = Tensor.numpy if plain else _same
        arange = np.arange if plain else functools.partial(torch.arange, device=self.lengths.device)
        before, rows = seen(before), (arange(self.batch) if sequences is None else seen(sequences))[:, None]
        at = before[:, None] + arange(t)
        if self.table is not None:
            page, table = self._page_size(), seen(self.table)
            if not steady:
                (self._take if self.window is None else self._turn)(rows, before, t, seen, arange)
            column = at // page if self.window is None else at // page - seen(self.first)[rows]
            rows, at = table[rows, column], at % page
        return torch.as_tensor(rows).long(), slice(None), torch.as_tensor(at)

    def _run(self, t: int, before: list[int], sequences: Tensor | None) -> tuple[slice, ...] | None:
        """Slices of the rows for t positions after these; None where no slices are just these rows."""
        start, page = before[0], self.page_size
        if self.table is None and sequences is None and before.count(start) == len(before):
            return slice(None), slice(None), slice(start, start + t)
        if len(before) > 1 or (page is not None and start % page + t > page):
            return None
        row = 0 if sequences is None else int(sequences)
        if self.table is not None and page is not None:
            first = 0 if self.window is None else int(self.first.numpy()[row])
            row, start = int(self.table.numpy()[row, start // page - first]), start % page
        return slice(row, row + 1), slice(None), slice(start, start + t)

    def _turn(self, rows: Any, before: Any, t: int, seen: Any, arange: Any) -> None:
        """Turn the tables of a ring, so that pages that no later query sees come last, to be written again."""
        assert self.window is not None
        table, first = seen(self.table), seen(self.first)
        gone = (before - (self.window - 1)).clip(0)[:, None] // self._page_size()
        columns = table.shape[1]
        table[rows[:, 0]] = table[rows, (arange(columns) + (gone - first[rows])) % columns]
        first[rows] = gone

    def _take(self, rows: Any, before: Any, t: int, seen: Any, arange: Any) -> None:
        """Give sequences the pages that they need for t more positions."""
        table, free, used = seen(self.table), seen(self.free), seen(self.used)
        where: Any = torch.where if isinstance(table, Tensor) else np.where
        have, want = (_pages(n, self._page_size()) for n in (before, before + t))
        end = (want - have).cumsum(0) + used  # of the pages that each takes
        columns = have[:, None] + arange(min(_pages(t, self._page_size()), table.shape[1]))
        new = columns < want[:, None]
        place = where(new, (end - want)[:, None] + columns, 0)
        columns = columns % table.shape[1]  # those that are not new keep what they have
        table[rows, columns] = where(new, free[place], table[rows, columns])
        used[...] = end[-1]

    def _make_room(self, t: int, before: list[int], sequences: Tensor | None) -> bool:
        """Grow where the cache may; say that it is full where it may not. Returns whether tables stay as they are."""
        page = self.page_size
        if page is None:
            longest, room = max(before) + t, self.k.shape[2]
            if longest > room:
                self._full(longest, room, "positions a sequence")
                self._grow(max(longest, 2 * room) - room)
            return True
        if self.window is not None:
            assert self.table is not None
            missing = _pages(self.window - 1 + t + page - 1, page) - self.table.shape[1]
            if missing > 0:
                self._grow(self.batch * missing)
            first = self.first if sequences is None else self.first[sequences]
            return first.tolist() == [max(n - self.window + 1, 0) // page for n in before]
        wanted = sum(_pages(n + t, page) - _pages(n, page) for n in before)
        needed = int(self.used) + wanted
        if needed > len(self.k):
            self._full(needed * page, len(self.k) * page, "positions, in whole pages")
            self._grow(max(needed, 2 * len(self.k)) - len(self.k))
        return wanted == 0

    @torch.inference_mode(False)  # a cache that grew in inference mode takes appends outside of it too
    def _grow(self, more: int) -> None:
        """Give so many positions more to each sequence, or pages to the pool."""
        if self.table is None:
            for name, x in self._rows().items():
                setattr(self, name, nn.functional.pad(x, (0, 0, 0, more)))
            return
        pages = torch.arange(len(self.k), len(self.k) + more, dtype=torch.int32, device=self.k.device)
        if self.window is not None:  # after the pages in use, which the table has first
            self.table = torch.cat((self.table, pages.reshape(self.batch, -1)), 1)
        else:
            self.free = torch.cat((self.free, pages))
            self.table = nn.functional.pad(self.table, (0, more))
        for name, x in self._rows().items():
            setattr(self, name, torch.cat((x, x.new_zeros(more, *x.shape[1:]))))

    def _full(self, wanted: int, room: int, what: str) -> None:
        if self.capacity is not None:
            raise ArgumentError(f"the cache is full: it has room for {room} {what}, {wanted} are needed")

    def _check(self, k: Tensor, v: Tensor, sequences: Tensor | None) -> None:
        if sequences is not None:
            self._check_sequences(sequences)
        for name, x, features in (("k", k, self.dim), ("v", v, self.dim_v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
            n = self.batch if sequences is None else len(sequences)
            if x.dim() != 4 or x.shape[:2] != (n, self.heads) or x.shape[3] != features or x.shape[2] != k.shape[2]:
                raise ArgumentError(
                    f"{name} must be [{n}, {self.heads}, t, {features}], k and v of the same t, got {sizes(x)}"
                )
            if self.k_scale is not None and x.dtype not in int8.FLOATS:
                raise ArgumentError(
                    f"{name} is {x.dtype}; a cache of int8 makes its numbers of float32, bfloat16 or float16"
                )
            if (self.k_scale is None and x.dtype != self.k.dtype) or x.device != self.k.device:
                raise ArgumentError(
                    f"{name} is {x.dtype} on {x.device}, the cache {self.k.dtype} on {self.k.device}: convert one"
                )

    def _check_sequences(self, sequences: Tensor) -> None:
        if not isinstance(sequences, Tensor) or sequences.dtype != torch.int64 or sequences.dim() != 1:
            raise ArgumentError("sequences must be an int64 Tensor [n] of sequences' numbers")
        if torch.compiler.is_compiling():
            return
        found = sequences.tolist()
        if found and not 0 <= min(found) <= max(found) < self.batch:
            raise ArgumentError(f"sequences must lie in 0..{self.batch - 1}, got {found}")
        if len(set(found)) != len(found):
            raise ArgumentError(f"sequences names one twice: {found}")


def _pages(positions: Any, page: int) -> Any:
    """How many pages hold so many positions."""
    return (positions + page - 1) // page


def _same(x: Tensor) -> Tensor:
    return x


def _check_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"{name} must be a positive int, got {size!r}")

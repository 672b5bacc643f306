"""A cache of the keys and values of sequences that are decoded a few positions at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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
        if not torch.compiler.is_compiling():
            self._make_room(k.shape[2], sequences)
        own = slice(None) if sequences is None else sequences
        before = self.lengths[own]
        at = before[:, None] + torch.arange(k.shape[2], device=self.k.device)
        rows = (torch.arange(self.batch, device=self.k.device) if sequences is None else sequences)[:, None]
        if self.table is not None:
            page = self._page_size()
            if self.window is not None:
                self._leave(own, before)
            else:
                self._take(rows, before, k.shape[2])
            column = at // page - self.first[own][:, None]
            rows, at = self.table[rows, column].long(), at % page
        new = {"k": k, "v": v}
        if self.k_scale is not None:
            (k, k_scale), (v, v_scale) = int8.quantise(k), int8.quantise(v)
            new = {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}
        for name, x in self._rows().items():
            x[rows, :, at] = new[name].transpose(1, 2)
        self.lengths[own] = before + k.shape[2]

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
        return pools, self.lengths - self.first * self._page_size(), self.table, window

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

    def _leave(self, own: Any, before: Tensor) -> None:
        """Turn the tables of a ring, so that pages that no later query sees come last, to be written again."""
        assert self.window is not None
        assert self.table is not None
        first = (before - (self.window - 1)).clamp_min(0) // self._page_size()
        columns = torch.arange(self.table.shape[1], device=self.k.device) + (first - self.first[own])[:, None]
        self.table[own] = self.table[own].gather(1, columns % self.table.shape[1])
        self.first[own] = first

    def _take(self, rows: Tensor, before: Tensor, t: int) -> None:
        """Give sequences the pages that they need for t more positions."""
        assert self.table is not None
        have, want = (_pages(n, self._page_size()) for n in (before, before + t))
        end = (want - have).cumsum(0) + self.used  # of the pages that each takes
        most = min(_pages(t, self._page_size()), self.table.shape[1])
        columns = have[:, None] + torch.arange(most, device=self.k.device)
        new = columns < want[:, None]
        place = torch.where(new, (end - want)[:, None] + columns, 0)
        columns = columns % self.table.shape[1]  # those that are not new keep what they have
        self.table[rows, columns] = torch.where(new, self.free[place], self.table[rows, columns])
        self.used.copy_(end[-1])

    @torch.inference_mode(False)  # a cache that grew in inference mode takes appends outside of it too
    def _make_room(self, t: int, sequences: Tensor | None) -> None:
        """Grow where the cache may; say that it is full where it may not."""
        own = slice(None) if sequences is None else sequences
        before = self.lengths[own]
        if self.table is None:
            longest, room = int(before.max()) + t, self.k.shape[2]
            if longest > room:
                self._full(longest, room, "positions a sequence")
                rows = max(longest, 2 * room) - room
                for name, x in self._rows().items():
                    setattr(self, name, nn.functional.pad(x, (0, 0, 0, rows)))
            return
        page, columns = self._page_size(), self.table.shape[1]
        if self.window is not None:
            wanted = _pages(self.window - 1 + t + page - 1, page)
            if wanted > columns:
                own_pages = torch.arange(self.batch * (wanted - columns), dtype=torch.int32, device=self.k.device)
                pages = own_pages.reshape(self.batch, -1) + len(self.k)
                # After the pages in use, which the table has first.
                self.table = torch.cat((self.table, pages), 1)
                self._add_pages(pages.numel())
            return
        needed = int(self.used) + int((_pages(before + t, page) - _pages(before, page)).sum())
        if needed > len(self.k):
            self._full(needed * page, len(self.k) * page, "positions, in whole pages")
            more: int = max(needed, 2 * len(self.k)) - len(self.k)
            fresh = torch.arange(len(self.k), len(self.k) + more, dtype=torch.int32, device=self.k.device)
            self.free = torch.cat((self.free, fresh))
            self.table = nn.functional.pad(self.table, (0, more))
            self._add_pages(more)

    def _add_pages(self, count: int) -> None:
        for name, x in self._rows().items():
            setattr(self, name, torch.cat((x, x.new_zeros(count, *x.shape[1:]))))

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
        if sequences.numel() and not 0 <= int(sequences.min()) <= int(sequences.max()) < self.batch:
            raise ArgumentError(f"sequences must lie in 0..{self.batch - 1}, got {sequences.tolist()}")
        if len(sequences.unique()) != len(sequences):
            raise ArgumentError(f"sequences names one twice: {sequences.tolist()}")


def _pages(positions: Any, page: int) -> Any:
    """How many pages hold so many positions."""
    return (positions + page - 1) // page


def _check_size(name: str, size: int) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ArgumentError(f"{name} must be a positive int, got {size!r}")

"""Packed batches, cut along time into parts that need little padding.

The sequences of a pack are sorted by length. So those of a part are the first ones of the part before it, and the
states that one part ends with are those that its neighbour starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.autograd import functorch_active

FEW_ROWS = 256
"""Padding so many rows costs less than one more call."""

State = Tensor | None
Uneven = tuple[Tensor | None, Tensor | None]
"""Lengths and resets."""

Walk = Callable[[Tensor, Uneven, State, State], tuple[Tensor, Tensor, State, State]]
"""One layer and direction of steps: x, lengths and resets, and the initial states to y, h_n, c_n and all c_t."""


class Part(NamedTuple):
    """Some steps of a packed batch."""

    rows: int  # of the data
    batch_sizes: Tensor
    even: bool  # all sequences of the part are equally long

    def pad(self, data: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part's rows of the data as ``[t, b, N]``, and the lengths, int64 ``[b]`` on the CPU. Of an even part a
        view, and None."""
        steps = self.batch_sizes.shape[0]
        if self.even:
            return data.unflatten(0, (steps, -1)), None
        if functorch_active():  # torch's own reads batch_sizes through a pointer, which no wrapper has
            sizes = self.batch_sizes.tolist()
            lengths = torch.tensor([sum(size > b for size in sizes) for b in range(sizes[0])])
            padded = data.new_zeros(steps * sizes[0], data.shape[1]).index_copy(0, self.places(), data)
            return padded.unflatten(0, (steps, -1)), lengths
        return torch._VF._pad_packed_sequence(data, self.batch_sizes, False, 0.0, steps)

    def pack(self, padded: Tensor, lengths: Tensor | None) -> Tensor:
        """``[t, b, N]`` as rows of data again."""
        if lengths is None:
            return padded.flatten(0, 1)
        if functorch_active():
            return padded.flatten(0, 1).index_select(0, self.places())
        return torch._VF._pack_padded_sequence(padded, lengths, False)[0]

    def places(self) -> Tensor:
        """Where each row of the data lies in ``[t * b, N]``."""
        sizes = self.batch_sizes.tolist()
        return torch.tensor([step * sizes[0] + row for step, size in enumerate(sizes) for row in range(size)])


def sequences(batch_sizes: Tensor) -> int:
    """How many sequences a pack has; a number of the trace while torch.jit traces."""
    return batch_sizes[0] if torch.jit.is_tracing() else int(batch_sizes[0])  # type: ignore[return-value]


def whole(data: Tensor, batch_sizes: Tensor) -> list[Part]:
    """All of a packed batch as one part."""
    rows = data.shape[0]
    return [Part(rows, batch_sizes, batch_sizes.shape[0] * int(batch_sizes[0]) == rows)]


def cut(data: Tensor, batch_sizes: Tensor) -> list[Part]:
    """The parts of a packed batch, in the order of time.

    It is one part where padding at most doubles the rows. Otherwise a part ends where half of its sequences have ended,
    so the parts together are padded to less than twice the rows, and ``FEW_ROWS``.
    """
    if torch.jit.is_tracing():  # the graph must hold for other lengths too
        return [Part(data.shape[0], batch_sizes, False)]
    rows, steps, batch = data.shape[0], batch_sizes.shape[0], int(batch_sizes[0])
    if steps * batch <= 2 * rows + FEW_ROWS:
        return [Part(rows, batch_sizes, steps * batch == rows)]
    sizes: list[int] = batch_sizes.tolist()
    borders = [0]
    for step, size in enumerate(sizes):
        batch = sizes[borders[-1]]
        if 2 * size <= batch and (batch - size) * (steps - step) > FEW_ROWS:
            borders.append(step)
    return [
        Part(sum(sizes[start:end]), batch_sizes[start:end], sizes[start] == sizes[end - 1])
        for start, end in zip(borders, [*borders[1:], steps], strict=True)
    ]


def pad(parts: Sequence[Part], data: Tensor) -> list[tuple[Tensor, Tensor | None]]:
    """Each part of the data, padded, and its lengths."""
    pieces = data.split([part.rows for part in parts]) if len(parts) > 1 else (data,)
    return [part.pad(piece) for part, piece in zip(parts, pieces, strict=True)]


def chain(
    walk: Walk,
    xs: Sequence[Tensor],
    uneven: Sequence[Uneven],
    h0: State,
    c0: State,
    reverse: bool,
) -> tuple[list[Tensor], Tensor, State, list[State]]:
    """One layer and direction over the parts ``xs``: every part's y, h_n, c_n, every part's c_t."""
    h, c = (None, None) if reverse else (h0, c0)
    ended_h: list[Tensor] = []
    ended_c: list[Tensor] = []
    found: list[tuple[Tensor, State]] = []
    for n in reversed(range(len(xs))) if reverse else range(len(xs)):
        batch = xs[n].shape[1]
        if reverse:
            h, c = _grow(h, h0, batch), _grow(c, c0, batch)
        else:
            h, c = _shrink(h, batch, ended_h), _shrink(c, batch, ended_c)
        y, h, c, all_c = walk(xs[n], uneven[n], h, c)
        found.append((y, all_c))
    if reverse:
        found.reverse()
    assert h is not None
    last_h = torch.cat([h, *reversed(ended_h)]) if ended_h else h
    last_c = torch.cat([c, *reversed(ended_c)]) if c is not None and ended_c else c
    return [y for y, _ in found], last_h, last_c, [all_c for _, all_c in found]


def _shrink(state: State, batch: int, ended: list[Tensor]) -> State:
    """The state of the first ``batch`` sequences; the others have ended."""
    if state is None or state.shape[0] == batch:
        return state
    ended.append(state[batch:])
    return state[:batch]


def _grow(state: State, start: State, batch: int) -> State:
    """The state of ``batch`` sequences, of which those that it lacks begin."""
    if state is None:
        return None if start is None else start[:batch]
    have = state.shape[0]
    if have == batch:
        return state
    more = state.new_zeros(batch - have, *state.shape[1:]) if start is None else start[have:batch]
    return torch.cat([state, more])

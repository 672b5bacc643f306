"""What a mask of transformers says, without the matrix: limits and lengths that attention's kernels take.

transformers describes a mask by functions of one query's and one key's position, put together from a few known ones.
:func:`read` recognises those by their code; a function that it does not know stays a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

aten = torch.ops.aten


@dataclass(frozen=True)
class Pattern:
    """left, right: sides of a window, -1 for no limit. chunk: tokens attend within chunks of so many positions, counted
    from ``padding`` [B]. documents [B, T]: tokens attend where these numbers agree. positions [B, T]: of each token
    within its document. remapped: the limits were asked of these positions."""

    causal: bool = False
    left: int = -1
    right: int = -1
    chunk: int = 0
    padding: Tensor | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None


EVERYTHING = Pattern()


def _least(a: int, b: int) -> int:
    """The narrower of two sides of a window."""
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _both(parts: list[Pattern]) -> Pattern | None:
    """The intersection; None where a Pattern cannot say it."""
    found = EVERYTHING
    for part in parts:
        given = {n: getattr(part, n) for n in ("chunk", "padding", "documents", "positions") if _says(part, n)}
        if any(_says(found, name) for name in given):
            return None
        left, right = _least(found.left, part.left), _least(found.right, part.right)
        found = replace(found, causal=found.causal or part.causal, left=left, right=right, **given)
    return found


def _says(pattern: Pattern, name: str) -> bool:
    return getattr(pattern, name) is not getattr(EVERYTHING, name)


def _intersection(mask_functions: tuple[Callable, ...]) -> Pattern | None:
    parts = [read(function) for function in mask_functions]
    return None if None in parts else _both(parts)  # type: ignore[arg-type]


def _remapped(mask_function: Callable, position_ids: Tensor) -> Pattern | None:
    inner = read(mask_function)
    return None if inner is None else _both([inner, Pattern(positions=position_ids)])


_PLAIN = {
    masking_utils.causal_mask_function: Pattern(causal=True),
    masking_utils.bidirectional_mask_function: EVERYTHING,
}
_MADE: dict[Any, Callable[..., Pattern | None]] = {
    masking_utils.and_masks().__code__: _intersection,
    masking_utils.sliding_window_overlay(1).__code__: lambda sliding_window: Pattern(left=sliding_window - 1),
    masking_utils.sliding_window_bidirectional_overlay(1).__code__: lambda sliding_window: Pattern(
        left=sliding_window, right=sliding_window
    ),
    masking_utils.chunked_overlay(1, torch.zeros(1)).__code__: lambda chunk_size, left_padding: Pattern(
        chunk=chunk_size, padding=left_padding
    ),
    masking_utils.packed_sequence_mask_function(torch.zeros(1)).__code__: lambda packed_sequence_mask: Pattern(
        documents=packed_sequence_mask
    ),
    masking_utils.remap_positions_for_packed_sequence(max, torch.zeros(1)).__code__: _remapped,
}
"""What a mask function made by transformers means, by its code; called with the variables that it closes over."""


def read(function: Callable) -> Pattern | None:
    """What a mask function says; None if it is not put together from those known here."""
    if function in _PLAIN:
        return _PLAIN[function]
    code: Any = getattr(function, "__code__", None)
    if code not in _MADE:
        return None
    closed = zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    return _MADE[code](**dict(closed))


@dataclass(frozen=True)
class Limits:
    """A mask as arguments of ``fastseq.attention``. keys: how many of the keys any query sees, from the first on; the
    others are a cache's that are not filled yet. cu_seqlens: q, k and v are to be packed, row after row of the batch,
    and cut there."""

    options: dict[str, Any]
    keys: int
    cu_seqlens: Tensor | None = None


class LimitsMask(Tensor):
    """A bool mask [B, 1, Tq, Tk] that is kept as limits. Whatever reads it gets the matrix, made then, and from then
    on attention takes the matrix too, since the reader may have changed it."""

    limits: Limits | None
    _make: Callable[[], Any]
    _matrix: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[LimitsMask], limits: Limits, make: Callable[[], Any], shape: tuple[int, ...], device: torch.device
    ) -> LimitsMask:
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.limits, mask._make, mask._matrix = limits, make, None
        return mask

    def matrix(self) -> Tensor:
        if self._matrix is None:
            self._matrix = self._make()
        return self._matrix

    def __deepcopy__(self, memo: Any) -> Any:
        return self.detach()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default) and args[0].limits is not None:
            return LimitsMask(args[0].limits, args[0].matrix, tuple(args[0].shape), args[0].device)

        def read_out(x: Any) -> Any:
            if not isinstance(x, LimitsMask):
                return x
            x.limits = None
            return x.matrix()

        args, kwargs = torch.utils._pytree.tree_map(read_out, (args, kwargs or {}))
        return func(*args, **kwargs)


class TracedLimits:
    """The same in a graph that torch.compile traces, where no such tensor can be made: an object that is a bool tensor
    to whoever asks it for something."""

    def __init__(self, limits: Limits, make: Callable[[], Any], shape: tuple[int, ...]) -> None:
        self.limits, self.matrix, self.shape, self.ndim, self.dtype = limits, make, shape, len(shape), torch.bool

    def __getattr__(self, name: str) -> Any:
        return getattr(self.matrix(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.matrix()[index]


def read_traced(function: Callable, skips: tuple[bool, bool], local: int | None, config: Any) -> Pattern | None:
    """As :func:`read`, where torch.compile traces and does not show what a function closes over. ``skips``: whether a
    causal mask, or one that lets everything be seen, may be left out: transformers allows it where nothing was added
    to the mask. ``local``: its window, or its chunk."""
    if function in _PLAIN:
        return _PLAIN[function]
    if local is None or local != getattr(config, "sliding_window", None) or hasattr(config, "attention_chunk_size"):
        return None
    if skips[0]:
        return Pattern(causal=True, left=local - 1)
    return Pattern(left=local, right=local) if skips[1] else None


def traced_limits(
    pattern: Pattern, batch: int, lengths: tuple[int, int], offsets: tuple[int | Tensor, int], seen: Tensor | None
) -> Limits | None:
    """As :func:`limits`, from shapes alone: what a tensor holds is not known while a graph is made."""
    shift = offsets[0] - offsets[1]
    if pattern.documents is not None or pattern.chunk or pattern.positions is not None:
        return None
    options: dict[str, Any] = {}
    if pattern.causal or pattern.left >= 0 or pattern.right >= 0:
        options = {"causal": pattern.causal, "align": "bottom_right"}
        if pattern.left >= 0 or pattern.right >= 0:
            options["window"] = (pattern.left, pattern.right)
        if isinstance(shift, Tensor):
            options["lengths_k"] = (shift + lengths[0]).reshape(1).to(torch.int64).expand(batch)
        elif lengths[1] != lengths[0] + shift:
            return None
    if seen is not None:
        options["mask"] = seen[:, None, None, :]
    return Limits(options, lengths[1])


def limits(
    pattern: Pattern, batch: int, lengths: tuple[int, int], offsets: tuple[int | Tensor, int], seen: Tensor | None
) -> Limits | None:
    """What attention is to be told; None where only the matrix says it.

    Args:
        lengths: Tq, Tk.
        offsets: positions of the first query and of the first key.
        seen: bool [B, Tk], which keys are no padding; None: all.
    """
    tq, keys = lengths
    shift = offsets[0] - offsets[1]
    if pattern.documents is not None or pattern.chunk:
        return _segments(pattern, batch, lengths, offsets, seen)
    if pattern.positions is not None:
        return None
    options: dict[str, Any] = {}
    if isinstance(shift, Tensor):  # on another device, where reading it would wait
        if not pattern.causal:
            return None
        filled = (shift + tq).reshape(1).to(torch.int64).expand(batch)
        options = {"causal": True, "align": "bottom_right", "lengths_k": filled}
        if seen is not None:
            seen = seen | (torch.arange(keys, device=seen.device) >= filled[:, None])
        left = pattern.left
    elif pattern.causal or pattern.left >= 0 or pattern.right >= 0:
        if not 0 <= shift <= keys - tq:
            return None
        if pattern.causal:
            keys = shift + tq
        left = pattern.left if pattern.left < shift + tq - 1 else -1
        options = {"causal": pattern.causal and tq > 1, "align": "top_left" if shift == 0 else "bottom_right"}
        if not pattern.causal and shift not in (0, keys - tq):
            return None
    else:
        left = -1
    if left >= 0 or pattern.right >= 0:
        options |= {"causal": pattern.causal, "window": (left, pattern.right)}
    if seen is not None:
        seen = seen[:, :keys]
        sums = seen.sum(-1)
        prefix = (torch.arange(keys, device=seen.device) < sums[:, None]) == seen
        is_full, is_prefix = torch.stack([seen.all(), prefix.all()]).tolist()
        if is_prefix and not is_full and options.get("align") != "bottom_right":
            options["lengths_k"] = sums.expand(batch)
        elif not is_full:
            options["mask"] = seen[:, None, None, :]
    return Limits(options, keys)


def _segments(
    pattern: Pattern, batch: int, lengths: tuple[int, int], offsets: tuple[int | Tensor, int], seen: Tensor | None
) -> Limits | None:
    """Documents, or chunks, as sequences of a packed batch. Padding before and after a row's tokens needs no mask where
    attention is causal: tokens before it do not see it, and what is before it is a sequence of its own."""
    tq, tk = lengths
    if tq != tk or tq == 1 or isinstance(offsets[0], Tensor) or offsets[0] != 0 or offsets[1] != 0:
        return None
    if seen is not None:
        rises = F.pad(seen, (1, 0))
        if not pattern.causal or bool(((rises[:, 1:] & ~rises[:, :-1]).sum(-1) > 1).any()):
            return None  # padding between tokens
    marks = [x for x in (pattern.documents, seen) if x is not None]
    if pattern.chunk:
        positions = torch.arange(tq)[None] if pattern.positions is None else pattern.positions
        first = torch.zeros(1) if pattern.padding is None else pattern.padding
        marks.append((positions.to(first.device) - first[:, None]).div(pattern.chunk, rounding_mode="floor"))
    starts = torch.ones(batch, tq, dtype=torch.bool, device=marks[0].device)
    starts[:, 1:] = torch.stack([(m[:, 1:] != m[:, :-1]).expand(batch, -1) for m in marks]).any(0)
    options: dict[str, Any] = {"causal": pattern.causal}
    if pattern.left >= 0 or pattern.right >= 0:
        options["window"] = (pattern.left, pattern.right)
    begins = starts.flatten().nonzero().flatten()
    return Limits(options, tk, F.pad(begins, (0, 1), value=batch * tq).to(torch.int32))

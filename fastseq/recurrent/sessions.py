"""Calls of recurrent layers within a step of :class:`fastseq.Streams`: their states lie in blocks of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastseq import backend, direct
from fastseq.checks import ArgumentError, sizes

current: ContextVar[Step | None] = ContextVar("fastseq.streams", default=None)
"""The step in which this thread, or task, calls layers; None: calls are ordinary ones."""

used = False
"""Whether there has been any step: where there was none, no call needs to ask for ``current``."""


class Block:
    """The states of all sessions in one layer or cell, ``h [L, rows, P]`` and an LSTM's ``c [L, rows, H]``.

    Args:
        name: the layer's name in its model.
        layer: a layer or cell of ours.
        rows: how many states there are room for, zeros at first.
        has_c: whether it is an LSTM.
    """

    def __init__(self, name: str, layer: Any, rows: int, has_c: bool) -> None:
        self.name, self.layer = name, layer
        w_hh, layers = layer._weights()[1], getattr(layer, "num_layers", 1)
        options = {"dtype": w_hh.dtype, "device": w_hh.device}
        with torch.inference_mode(False):  # so that it may be written outside of inference mode too
            self.h = torch.zeros(layers, rows, w_hh.shape[1], **options)
            self.c = torch.zeros(layers, rows, layer.hidden_size, **options) if has_c else None

    def tensors(self) -> dict[str, Tensor]:
        """h, and an LSTM's c, by their names in a snapshot."""
        before = f"{self.name}." if self.name else ""
        return {f"{before}h": self.h} | ({} if self.c is None else {f"{before}c": self.c})

    @property
    def title(self) -> str:
        """How messages call the layer."""
        return repr(self.name) if self.name else f"the {type(self.layer).__name__}"


class Step:
    """One step of some sessions.

    Args:
        blocks: those of the model's layers, by the layer's ``id``.
        read: int64 ``[n]`` on the CPU: rows of the blocks at which the sessions' states lie.
        write: int64 ``[n]`` on the CPU: rows for their new states, distinct, and none of those that are read.
    """

    def __init__(self, blocks: Mapping[int, Block], read: Tensor, write: Tensor) -> None:
        self.blocks, self.read, self.write = blocks, read, write
        self._returned: dict[int, tuple[Tensor, Tensor | None]] = {}  # the last states, of the layers called so far

    def run(self, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
        """``forward(x)``, whose layers' calls are of this step.

        Raises:
            ArgumentError: a layer was called in a way that does not fit, or was not called.
        """
        global used
        used = True
        token = current.set(self)
        try:
            y = forward(x)
        finally:
            current.reset(token)
        missed = [block.title for key, block in self.blocks.items() if key not in self._returned]
        if missed:
            raise ArgumentError(
                f"the model did not call {', '.join(missed)} in this step, or where Streams does not see it: in "
                "compiled or scripted code, or in another thread. Every recurrent layer must run in every step"
            )
        return y

    def in_one_call(self, layer: Any, names: list[str], call: tuple) -> tuple:
        """y, h_n and an LSTM's c_n of a layer, of a cell the new h and c: in one native call where there is one.
        ``call``: what ``direct.infer`` takes from x to bidirectional."""
        x, h0, c0, _, layout, *_ = call
        block, first = self._check(layer, x, (h0, c0), layout)
        done = None
        if backend.native_scan():
            places = (block.h, block.c, self.read if first else None, self.write)
            if layer._compressed is not None:
                done = layer._compressed.infer(layer, *call, *places)
            else:
                done = direct.infer(layer._parameters, names, None, *call, 0, 0, False, None, None, *places)
        if done is None:
            y, last, *_ = self._by_copies(block, x, None if first else (h0, c0), {})
            done = (*y, *last)
        own = done[-1 if block.c is None else -2 :]
        self._returned[id(layer)] = own[0], own[1] if len(own) == 2 else None
        return done

    def call(self, layer: Any, x: Any, hx: Any, **options: Any) -> tuple:
        """What the layer's ``forward`` returns, with options that the native call does not take."""
        given = hx if isinstance(hx, (tuple, list)) else (hx, None)
        block, first = self._check(layer, x, tuple(given), "batch_first" if layer.batch_first else "layer")
        (y,), last, *more = self._by_copies(block, x, None if first else tuple(given), options)
        self._returned[id(layer)] = last[0], last[1] if len(last) == 2 else None
        return (y, last[0] if len(last) == 1 else tuple(last), *more)

    def _check(self, layer: Any, x: Any, given: tuple, layout: str) -> tuple[Block, bool]:
        """The layer's block, and whether its states come from there: the first call's do."""
        block = self.blocks.get(id(layer))
        if block is None:
            raise ArgumentError(
                f"this {type(layer).__name__} was not in the model when its Streams was made: make a new Streams"
            )
        n, rank = self.read.shape[0], 2 if layout == "cell" else 3
        batch = 1 if layout == "layer" else 0
        if not isinstance(x, Tensor) or x.dim() != rank or x.shape[batch] != n:
            got = sizes(x) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            want = {"layer": "[T, n, I]", "batch_first": "[n, T, I]", "cell": "[n, I]"}[layout]
            raise ArgumentError(
                f"{block.title} was called with {got}; in a step of n = {n} sessions its input must be {want}"
            )
        before = self._returned.get(id(layer))
        if given[0] is None and before is not None:
            raise ArgumentError(
                f"{block.title} was called twice in one step: call it once, or hand on the state that it returned"
            )
        if given[0] is not None and (before is None or not all(map(_same, given, before))):
            raise ArgumentError(
                f"{block.title} was called with a state of the model's own, whose place a session's state takes: "
                "call the layer without hx, or again with the state that it returned in this step"
            )
        return block, before is None

    def _by_copies(self, block: Block, x: Tensor, given: tuple | None, options: dict[str, Any]) -> tuple:
        """``([y], [h, c], *more)`` of an ordinary call (of a cell no y), on copies of the states; then copied back."""
        own = [t for t in (block.h, block.c) if t is not None]
        read, write = self.read.to(block.h.device), self.write.to(block.h.device)
        is_cell = isinstance(block.layer, torch.nn.RNNCellBase)
        states = given
        if states is None:
            states = tuple(t.index_select(1, read) for t in own)
            states = tuple(s[0] for s in states) if is_cell else states
        token = current.set(None)
        try:
            result = block.layer.forward(x, states[0] if block.c is None else states[:2], **options)
        finally:
            current.reset(token)
        y, last, *more = ((), result) if is_cell else ((result[0],), *result[1:])
        last = last if isinstance(last, tuple) else (last,)
        for t, state in zip(own, last, strict=True):
            if torch.promote_types(t.dtype, state.dtype) != t.dtype:
                raise ArgumentError(
                    f"{block.title} returned a state in {state.dtype}, which the block's {t.dtype} is not"
                )
            t.index_copy_(1, write, (state.unsqueeze(0) if is_cell else state).to(t.dtype))
        return (y, last, *more)


def _same(given: Tensor | None, returned: Tensor | None) -> bool:
    if given is None or returned is None:
        return given is returned
    return given.shape == returned.shape and given.data_ptr() == returned.data_ptr()

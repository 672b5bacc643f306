"""Many live sessions of one recurrent model, stepped together."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from fastseq.checks import ArgumentError, sizes
from fastseq.nn.cells import LSTMCell, _Cell
from fastseq.nn.recurrent import LSTM, _Recurrent
from fastseq.recurrent.sessions import Block, Step

_SLOT_BITS = 24
_SLOT = (1 << _SLOT_BITS) - 1  # an id is a serial number, and below it the session's place


class _Serials:
    """Numbers that no other call in this process gets; other processes begin elsewhere, drawn at random."""

    def __init__(self) -> None:
        self._lock, self._pid, self._next = threading.Lock(), 0, 0

    def draw(self, after: int = 0) -> int:
        """The next number, greater than ``after``."""
        if os.getpid() != self._pid:  # the first here, or a process that was forked: its lock may be held for ever
            self._lock, self._pid = threading.Lock(), os.getpid()
            self._next = 1 + int.from_bytes(os.urandom(4), "little") * 32
        with self._lock:
            self._next = max(self._next, after) + 1
            return self._next


_serials = _Serials()


class Streams:
    """The states of up to ``capacity`` live sessions of a recurrent model, of which any number steps in one call.

    The model is a recurrent layer or cell of fastseq, or a whole module with such layers inside (``fastseq.patch``
    makes them of torch's), in ``eval`` mode and unidirectional. The states of all sessions lie in one block a layer. A
    step runs the model's ``forward`` on the batch of the sessions that it names, and each layer in it that is called
    without a state reads its sessions' rows of the block and writes their new ones: on the CPU within its one native
    call. On other devices and backends the rows are copied by torch's operators, to the same results.

    Inference only: results have no gradient. Every recurrent layer must be called once in each step, without ``hx``, on
    a batch of the n sessions in their order; or again in the same step with the state that it returned, as in a loop
    over cells. Anything else raises, and so does whatever the model raises: all sessions then are as before.

    Threads may share a Streams: calls follow one another. A process that was forked cannot go on with its parent's: it
    makes its own, from a snapshot where it wants the sessions. The model may be called by itself at any time, by other
    threads too.

    Args:
        model: the layer, cell or module. It is not copied: changes of its weights are seen.
        capacity: sessions that may be open at once, 1 to 16,777,216. Their memory is taken now, twice a state each.

    Raises:
        TypeError: ``model`` is not a module.
        ArgumentError: a model without recurrent layers, or with one that is bidirectional or torch's own; a capacity
            out of range.

    Example:
        >>> import fastseq, torch
        >>> streams = fastseq.Streams(fastseq.nn.LSTM(8, 16).eval(), capacity=100)
        >>> alice, bob = streams.open(), streams.open()
        >>> y = streams.step(torch.randn(2, 8), torch.tensor([bob, alice]))
        >>> y = streams.step(torch.randn(1, 5, 8), torch.tensor([alice]))  # five steps of one
        >>> streams.close(bob)
        >>> y.shape, len(streams)
        (torch.Size([1, 5, 16]), 1)
    """

    def __init__(self, model: nn.Module, capacity: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Streams: model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(capacity, int) or not 0 < capacity <= _SLOT + 1:
            raise ArgumentError(f"capacity must be an int from 1 to {_SLOT + 1}, got {capacity!r}")
        self.model, self.capacity = model, capacity
        self._modules = dict(model.named_modules())
        # A session has two rows of each block, 2 * place and the one after, and its state lies in one of them: a step
        # reads that and writes the other, so that a step that fails has changed nothing.
        self._blocks = {
            id(layer): Block(name, layer, 2 * capacity, isinstance(layer, (LSTM, LSTMCell)))
            for name, layer in self._modules.items()
            if _is_streamed(name, layer)
        }
        if not self._blocks:
            raise ArgumentError(f"{type(model).__name__} has no recurrent layer that Streams could keep states for")
        self._vacant = np.zeros(capacity, np.int64)  # ids of no session: of another place than where they are
        self._vacant[0] = 1
        self._ids = self._vacant.copy()  # of the session in each place
        self._rows = np.arange(0, 2 * capacity, 2)  # at which row its state lies
        self._mark = np.zeros(capacity, np.int64)
        self._free = list(range(capacity - 1, -1, -1))
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._stepping = 0  # the thread that is in a step

    def __len__(self) -> int:
        """How many sessions are open."""
        return self.capacity - len(self._free)

    def __repr__(self) -> str:
        return f"Streams({type(self.model).__name__}, capacity={self.capacity}, open={len(self)})"

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the states have."""
        return sum(t.nbytes for block in self._blocks.values() for t in block.tensors().values())

    def open(self) -> int:
        """Begin a session, whose state is zeros. Returns its id, which no other session gets.

        Raises:
            ArgumentError: all are open.
        """
        with self._alone():
            if not self._free:
                raise ArgumentError(
                    f"all {self.capacity} sessions are open: close one, or make a Streams of more than "
                    f"capacity={self.capacity}"
                )
            slot = self._free.pop()
            self._clear(self._rows[slot : slot + 1])
            self._ids[slot] = id = _serials.draw() << _SLOT_BITS | slot
            return id

    def step(self, x: Tensor, ids: Tensor | Sequence[int]) -> Any:
        """Run the model on the next input of some sessions.

        Args:
            x: ``[n, I]``, one step of each session, or ``[n, T, I]``, T steps, for a layer or a cell. A whole module
                gets x as it is, ``[n, ...]``.
            ids: int64 ``[n]`` on the CPU, or a sequence of ints: whose they are, no one twice.

        Returns:
            Of a layer or a cell y, ``[n, H]`` or ``[n, T, H]`` as x; of a whole module what it returns.

        Raises:
            ArgumentError: an id that is not open here, or comes twice; sizes that do not fit; a model in training mode,
                or one that calls its layers in a way that the class's description excludes.
            RuntimeError: called within a step of the same Streams, or in a process that was forked.
        """
        with self._alone():
            slots = self._slots(ids)
            self._check(x, len(slots))
            read = self._rows[slots]
            write = read ^ 1
            step = Step(self._blocks, torch.from_numpy(read), torch.from_numpy(write))
            self._stepping = threading.get_ident()
            try:
                with torch.no_grad():
                    y = step.run(self._forward, x)
            finally:
                self._stepping = 0
            self._rows[slots] = write
            return y

    def reset(self, ids: Tensor | Sequence[int]) -> None:
        """Set the states of some sessions to zeros: int64 ``[n]``, no one twice. They stay open.

        Raises:
            ArgumentError: an id that is not open here, or comes twice; then none is reset.
        """
        with self._alone():
            self._clear(self._rows[self._slots(ids)])

    def close(self, id: int) -> None:
        """End a session. Its id is refused from then on.

        Raises:
            ArgumentError: it is not open here.
        """
        with self._alone():
            (slot,) = self._slots([id])
            self._ids[slot] = self._vacant[slot]
            self._free.append(int(slot))

    def state_dict(self) -> dict[str, Tensor]:
        """A snapshot of the open sessions, in memory of its own: ``ids`` int64 ``[m]``, and for each layer ``<name>.h``
        ``[L, m, P]`` and an LSTM's ``<name>.c`` ``[L, m, H]`` (of a model that is a layer ``h`` and ``c``)."""
        with self._alone():
            slots = np.flatnonzero(self._ids != self._vacant)
            rows = torch.from_numpy(self._rows[slots])
            state = {"ids": torch.from_numpy(self._ids[slots])}
            for block in self._blocks.values():
                state |= {name: t.index_select(1, rows.to(t.device)) for name, t in block.tensors().items()}
            return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot: its sessions, under their ids, take the place of all that are open here.

        The model must have the same layers. ``capacity`` must reach to the highest place in use when it was taken, and
        may differ otherwise, as may the process.

        Raises:
            ArgumentError: a snapshot that does not fit; then nothing has changed.
        """
        with self._alone():
            ids = self._check_snapshot(state)
            slots = ids & _SLOT
            rows = torch.from_numpy(self._rows[slots])
            for block in self._blocks.values():
                for name, t in block.tensors().items():
                    t.index_copy_(1, rows.to(t.device), state[name].detach().to(t.device))
            self._ids[:] = self._vacant
            self._ids[slots] = ids
            self._free = np.flatnonzero(self._ids == self._vacant)[::-1].tolist()
            _serials.draw(int(ids.max(initial=0)) >> _SLOT_BITS)

    def _alone(self) -> threading.Lock:
        """The lock, for a call that may have it."""
        if os.getpid() != self._pid:  # the lock may be held there by a thread that is not here
            raise RuntimeError(
                f"this Streams belongs to process {self._pid}, and this is process {os.getpid()}, forked from it: make "
                "a Streams here, and load the parent's state_dict() where its sessions are wanted"
            )
        if self._stepping == threading.get_ident():
            raise RuntimeError("called within a step of the same Streams, by the model or one of its hooks")
        return self._lock

    def _clear(self, rows: np.ndarray) -> None:
        """The states at these rows become zeros."""
        index = torch.from_numpy(rows)
        for block in self._blocks.values():
            for t in block.tensors().values():
                t.index_fill_(1, index.to(t.device), 0)

    def _slots(self, ids: Tensor | Sequence[int]) -> np.ndarray:
        """The places of these sessions, all of them open and no one twice."""
        if isinstance(ids, Tensor):
            if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_cpu:
                raise ArgumentError(f"ids must be int64 [n] on the CPU, got {ids.dtype} {sizes(ids)} on {ids.device}")
            own = ids.numpy()
        else:
            try:
                own = np.asarray(ids)
                own = own.astype(np.int64, casting="safe") if own.size else np.zeros(0, np.int64)
            except (TypeError, ValueError, OverflowError):
                own = np.zeros((1, 1))
            if own.ndim != 1:
                raise ArgumentError(f"ids must be int64 [n], as a Tensor or a sequence of ints, got {ids!r}")
        slots, order = own & _SLOT, np.arange(len(own))
        try:
            self._mark[slots] = order
            fine = ((self._ids[slots] == own) & (self._mark[slots] == order)).all()
        except IndexError:
            fine = False
        if not fine:
            self._refuse(own, slots)
        return slots

    def _refuse(self, ids: np.ndarray, slots: np.ndarray) -> NoReturn:
        """Says which of ids, of these places, cannot be."""
        closed = ~np.isin(ids, self._ids[self._ids != self._vacant])
        if closed.any():
            raise ArgumentError(
                f"id {ids[closed][0]} is not open here: it was closed, comes from another Streams, or never was one"
            )
        twice = self._mark[slots] != np.arange(len(ids))
        raise ArgumentError(
            f"id {ids[twice][0]} comes twice in one call; several steps of a session are x [n, T, I], or more calls"
        )

    def _check(self, x: Tensor, n: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
        layer = isinstance(self.model, (_Recurrent, _Cell))
        if x.dim() == 0 or x.shape[0] != n or (layer and x.dim() not in (2, 3)):
            want = f"[{n}, I] or [{n}, T, I]" if layer else f"[{n}, ...]"
            raise ArgumentError(f"x must be {want} for {n} ids, got {sizes(x)}")
        training = next((name for name, module in self._modules.items() if module.training), None)
        if training is not None:
            what = f"its {training!r}" if training else type(self.model).__name__
            raise ArgumentError(f"Streams is for inference, but {what} is in training mode: call model.eval()")

    def _check_snapshot(self, state: Mapping[str, Tensor]) -> np.ndarray:
        """The ids of a snapshot that fits."""
        own = {name: t for block in self._blocks.values() for name, t in block.tensors().items()}
        if {*state} != {"ids", *own}:
            raise ArgumentError(f"the snapshot has {sorted(state)}, but this model's has {sorted(['ids', *own])}")
        ids = state["ids"]
        if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.dim() != 1:
            raise ArgumentError("the snapshot's ids must be an int64 Tensor [m]")
        for name, t in own.items():
            got, want = state[name], (t.shape[0], len(ids), t.shape[2])
            if not isinstance(got, Tensor) or tuple(got.shape) != want or got.dtype != t.dtype:
                given = f"{got.dtype} {sizes(got)}" if isinstance(got, Tensor) else type(got).__name__
                raise ArgumentError(f"the snapshot's {name} must be {t.dtype} {list(want)}, got {given}")
        found = ids.detach().cpu().numpy().copy()
        slots = found & _SLOT
        if (found <= _SLOT).any() or len(np.unique(slots)) != len(slots):
            raise ArgumentError("the snapshot's ids are none of a Streams")
        if slots.max(initial=0) >= self.capacity:
            raise ArgumentError(
                f"the snapshot has a session in place {slots.max()}, beyond capacity={self.capacity}: make a Streams "
                f"of capacity={slots.max() + 1} or more"
            )
        return found

    def _forward(self, x: Tensor) -> Any:
        model: Any = self.model
        if isinstance(model, _Cell):
            if x.dim() == 2:
                return _h(model(x))
            ys, hx = [], None
            for x_t in x.unbind(1):
                hx = model(x_t, hx)
                ys.append(_h(hx))
            return torch.stack(ys, 1) if ys else model(x[:, 0])
        if not isinstance(model, _Recurrent):
            return model(x)
        if x.dim() == 2:
            return model(x.unsqueeze(1))[0][:, 0] if model.batch_first else model(x.unsqueeze(0))[0][0]
        return model(x)[0] if model.batch_first else model(x.transpose(0, 1))[0].transpose(0, 1)


def _h(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def _is_streamed(name: str, layer: nn.Module) -> bool:
    """Whether a module is a layer that keeps a state.

    Raises:
        ArgumentError: it is one whose state cannot be kept.
    """
    title = repr(name) if name else "the model"
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(layer, (_Recurrent, _Cell)):
        raise ArgumentError(
            f"{title} is torch's {type(layer).__name__}: call fastseq.patch(model) before, and see its report"
        )
    if isinstance(layer, _Recurrent) and layer.bidirectional:
        raise ArgumentError(
            f"{title} is bidirectional: its second direction begins at a sequence's end, which a stream has not got yet"
        )
    return isinstance(layer, (_Recurrent, _Cell))

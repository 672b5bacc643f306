"""Triton's interpreter with the programs of a launch side by side, for kernels whose programs wait for each other.

By itself the interpreter runs one program after the other, and a wait for a later one never ends. Here each has a
thread; one runs at a time, and whose turn it is changes, as drawn, before loads, stores and atomics. The memory is as
weak as a GPU's may be: what a program stores is there for the others only once it has released it (or has ended).
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from triton._C.libtriton import ir
from triton.runtime import interpreter

SPINS = 20_000
"""So many looks at a counter with nothing stored or counted in between are a deadlock."""


class Stopped(BaseException):
    """Ends the other programs of a launch when one has failed."""


class Program(threading.Thread):
    """One program of a launch: where in the grid it is, and what it has stored and not yet released."""

    def __init__(self, schedule: Schedule, place: tuple[int, ...], run: Callable[[], None]):
        super().__init__(daemon=True)
        self.schedule, self.place, self.body = schedule, place, run
        self.turn, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.stored: list[tuple[Any, Any, Any]] = []
        self.error: BaseException | None = None
        self.ended = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.schedule.stopping:
                self.body()
                self.release_stores()
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.paused.release()

    def step(self) -> None:
        """Let it run up to where it next pauses."""
        interpreter.interpreter_builder.grid_idx = self.place
        self.schedule.current = self
        self.turn.release()
        self.paused.acquire()
        self.schedule.current = None

    def pause(self) -> None:
        self.paused.release()
        self.turn.acquire()
        if self.schedule.stopping:
            raise Stopped

    def release_stores(self) -> None:
        for store in self.stored:
            interpreter._interpreter.store(*store)
        self.stored.clear()


class Schedule:
    """Runs launches; ``switches`` counts how often the turn changed."""

    def __init__(self, seed: int, restless: float = 0.3):
        self.random = random.Random(seed)
        self.restless = restless
        self.current: Program | None = None
        self.stopping = False
        self.waiting: list[Program] = []
        self.idle = self.switches = 0

    def collect(self, run: Callable[[], None]) -> None:
        """Take the interpreter's next program; with the last of the grid, run them all."""
        builder = interpreter.interpreter_builder
        self.waiting.append(Program(self, builder.grid_idx, run))
        if all(i == n - 1 for i, n in zip(builder.grid_idx, builder.grid_dim, strict=True)):
            programs, self.waiting = self.waiting, []
            self.run(programs)

    def run(self, programs: list[Program]) -> None:
        for program in programs:
            program.start()
        left = list(programs)
        self.idle, self.stopping = 0, False
        while left:
            chosen = self.random.choice(left)
            chosen.step()
            self.switches += 1
            if self.idle > SPINS and not self.stopping:
                chosen.error = chosen.error or AssertionError("deadlock: every program waits for another")
            self.stopping = self.stopping or chosen.error is not None
            if chosen.ended:
                left.remove(chosen)
        errors = [p.error for p in programs if p.error is not None]
        if errors:
            raise errors[0]

    def before(self, always: bool = False) -> None:
        if self.current is not None and (always or self.random.random() < self.restless):
            self.current.pause()


class SideBySide(interpreter.GridExecutor):
    schedule: Schedule

    def __init__(self, fn: Any, *args: Any, **kwargs: Any):
        super().__init__(fn, *args, **kwargs)
        self.fn = Collected(fn, self.schedule)


class Collected:
    """Looks like a kernel to the interpreter, and hands its programs to the schedule."""

    def __init__(self, fn: Any, schedule: Schedule):
        self.fn, self.schedule = fn, schedule
        self.__signature__ = inspect.signature(fn)
        self.__name__, self.__globals__, self.__annotations__ = fn.__name__, fn.__globals__, fn.__annotations__

    def __call__(self, **arguments: Any) -> None:
        self.schedule.collect(lambda: self.fn(**arguments))


@contextmanager
def side_by_side(seed: int, restless: float = 0.3) -> Iterator[Schedule]:
    """Inside the ``with`` block the programs of every launch run side by side, as drawn from ``seed``."""
    schedule = Schedule(seed, restless)
    builder = interpreter.interpreter_builder
    kind = type("SideBySide", (SideBySide,), {"schedule": schedule})
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def create_masked_load(ptrs, mask, *rest):
        schedule.before()
        found = load(ptrs, mask, *rest)
        for at, value, where in schedule.current.stored if schedule.current is not None else ():
            own = dict(zip(at[where].tolist(), value[where], strict=True))  # which it sees at once
            for place in zip(*np.nonzero(np.isin(ptrs.data, at[where]) & mask.data.astype(bool)), strict=True):
                found.data[place] = own[int(ptrs.data[place])]
        return found

    def create_masked_store(ptrs, value, mask, *rest):
        schedule.before()
        schedule.idle = 0
        if schedule.current is None:
            return store(ptrs, value, mask, *rest)
        schedule.current.stored.append((ptrs.data.copy(), value.data.copy(), mask.data.astype(bool)))
        return None

    def create_atomic_rmw(operation, ptr, value, mask, sem, scope):
        looks = sem == ir.MEM_SEMANTIC.ACQUIRE
        schedule.before(always=True)
        schedule.idle = schedule.idle + 1 if looks else 0
        if schedule.current is not None and sem in (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE):
            schedule.current.release_stores()
        return atomic(operation, ptr, value, mask, sem, scope)

    original = interpreter.GridExecutor
    ours = {f.__name__: f for f in (create_masked_load, create_masked_store, create_atomic_rmw)}
    interpreter.GridExecutor = kind
    for name, function in ours.items():
        setattr(builder, name, function)
    try:
        yield schedule
    finally:
        interpreter.GridExecutor = original
        for name in ours:
            delattr(builder, name)

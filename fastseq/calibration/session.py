"""A calibration: self-tests first, then our kernels beside torch's in turns, until the time is up.

Each result is written when it is there, so a run that was stopped is taken up by the next. The trials run in a child
process: a kernel that crashes or hangs is a line in the file.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastseq import backend as backends
from fastseq import children, cli
from fastseq.calibration import chosen, file, grid
from fastseq.calibration.calls import SHAPES, ScanShape, Shape
from fastseq.calibration.file import CANNOT, LOST, PASSED, Entry, Timed, Trial, Verdict
from fastseq.recurrent.cells import NOT_IN_TORCH

MINUTES = 6.0
SECONDS = 0.1
"""For each backend of a call that is timed."""
FOR_TESTS = 0.7
"""Of the time, at most, if anything is to be timed after it."""
PATIENCE = 180.0
"""Seconds that one trial may take; a GPU's kernels are compiled in it."""
EVERY = 1.0
"""Seconds between two times that the file is written."""
AT_ONCE = 40
"""Trials that a child is given: their text is one argument of a command."""

Item = dict[str, Any]
Work = Callable[[Sequence[Item]], Iterator[tuple[Item, dict[str, Any]]]]


class CalibrationError(RuntimeError):
    """A calibration cannot be made; the message says why."""


def in_children(items: Sequence[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Every item with its result, tried in child processes."""
    for start in range(0, len(items), AT_ONCE):
        part = items[start : start + AT_ONCE]
        for item, answer in children.each(["calibrate", "--try"], part, PATIENCE, "result"):
            yield item, answer.get("result", answer)


# --- progress ---------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on stderr: drawn over itself on a terminal, else a line now and then."""

    EVERY = 10.0
    WIDTH = 24

    def __init__(self, shown: bool) -> None:
        self.stream = sys.stderr if shown else None
        self.phase, self.total, self.done, self.last = "", 0, 0, -1e9

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A phase of so many steps, of which some were done before."""
        self.end()
        self.phase, self.total, self.done, self.last = phase, total, done, -1e9
        self.draw("")

    def step(self, name: str) -> None:
        """One more is done."""
        self.done += 1
        self.draw(name)

    def draw(self, name: str) -> None:
        """Shows it, where that is due."""
        if self.stream is None or not self.total:
            return
        now, live = time.monotonic(), self.stream.isatty()
        if not live and now - self.last < self.EVERY and self.done < self.total:
            return
        self.last = now
        filled = self.WIDTH * self.done // self.total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        text = f"{self.phase} [{bar}] {self.done}/{self.total} {name}"
        with contextlib.suppress(OSError, ValueError):  # a stream that is gone is no reason to stop
            self.stream.write(f"\r{text[:110]:<110}" if live else text.rstrip() + "\n")
            self.stream.flush()

    def end(self) -> None:
        """Leaves the bar's line."""
        if self.stream is not None and self.phase and self.stream.isatty():
            with contextlib.suppress(OSError, ValueError):
                self.stream.write("\n")
        self.phase = ""


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """One device's calibration.

    until: on ``time.monotonic``. wanted: calls of a model; None: those that stand for kinds. work: makes the trials; in
    children by default.
    unwritten: what is measured counts in this process alone where the file cannot be written; else that is an error.
    """

    device: torch.device
    until: float
    wanted: Sequence[Shape] | None = None
    progress: Progress = field(default_factory=lambda: Progress(False))
    work: Work | None = None
    unwritten: bool = False
    entry: Entry = field(init=False)
    refused: str = ""

    def __post_init__(self) -> None:
        machine = file.machine(self.device.type, self.device.index or 0)
        if machine is None:
            raise CalibrationError(f"no kernel of ours exists for {self.device}, or it is not here; give cpu or cuda")
        self.entry, self._news, self._saved = Entry(machine, today()), Entry(machine, today()), 0.0
        with contextlib.suppress(file.Broken, OSError):
            for known in file.read():
                if known.machine == machine:
                    self.entry.merge(known)
                    self.entry.date = today()

    @property
    def ops(self) -> list[str]:
        """Operations that our kernels have on this device and that are asked for."""
        asked = SHAPES if self.wanted is None else {shape.op for shape in self.wanted}
        return [op for op in SHAPES if op in asked and grid.ours(self.device.type, op)]

    @property
    def dtypes(self) -> list[tuple[str, str]]:
        """Each of these with each dtype that is asked for."""
        if self.wanted is None:
            return [(op, dtype) for dtype in grid.FLOATS for op in self.ops]
        return list(dict.fromkeys((shape.op, shape.dtype) for shape in self.wanted if shape.op in self.ops))

    def run(self) -> bool:
        """Make the trials that are not made yet; returns whether all were made before the time was up.

        Raises:
            CalibrationError: no kernel of ours is here, or another calibration of this device is running.
            CannotWrite: the file cannot be written.
        """
        if not grid.ours(self.device.type, "scan") and not grid.ours(self.device.type, "attention"):
            raise CalibrationError(f"no kernel of ours can run on {self.device}: python -m fastseq doctor says why")
        with self._alone():
            self._write()  # before all else it is known whether that can be done
            try:
                return self._test() and self._time()
            finally:
                self._write()
                self.progress.end()
                backends.measured_anew()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two runs on one device would disturb each other."""
        name = re.sub(r"[^a-z0-9]+", "-", f"{self.device} {self.entry.machine['device']}".lower())
        path = file.path()
        try:
            if path is None:
                raise OSError
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.with_name(f"calibrating-{name}.lock").open("a")
        except OSError:  # a cache that cannot be written
            yield
            return
        with stream:
            if not file.try_lock(stream):
                raise CalibrationError(f"another calibration of {self.device} is running; wait for its end")
            yield

    def _test(self) -> bool:
        every = list(grid.self_tests(self.device.type, self.dtypes))
        rest = [test for test in every if test not in self.entry.tests]
        self.progress.begin("self-tests", len(every), len(every) - len(rest))
        until = time.monotonic() + FOR_TESTS * (self.until - time.monotonic())
        self._mark_tested(every)
        for item, result in self._worked([self._item(test.shape, [test.backend], 0.0) for test in rest], until):
            test = Trial(item["backends"][0], self._shape(item))
            verdict = self._verdicts(item, result)[test.backend]
            self.entry.tests[test] = verdict
            self._mark_tested(every)
            self._save(Entry(self.entry.machine, self.entry.date, self.entry.tested, {test: verdict}))
            self.progress.step(test.shape.name)
        return all(test in self.entry.tests for test in every)

    def _mark_tested(self, tests: Iterable[Trial]) -> None:
        groups: dict[tuple[str, str, str], bool] = {}
        for test in tests:
            key = test.backend, test.shape.op, test.shape.dtype
            groups[key] = groups.get(key, True) and test in self.entry.tests
        self.entry.tested |= {key for key, done in groups.items() if done}

    def _time(self) -> bool:
        of_kind = self.wanted is None
        every = grid.shapes(self.device.type, self.ops) if self.wanted is None else list(dict.fromkeys(self.wanted))
        rest = [shape for shape in every if shape not in self.entry.timed]
        for shape in every:  # that was measured for a model, and now stands for its kind
            if of_kind and shape in self.entry.timed:
                self.entry.timed[shape].of_kind = True
        self.progress.begin("timing", len(every), len(every) - len(rest))
        bad = chosen.disqualified(self.entry)
        items = []
        for shape in rest:
            names = [n for n in grid.ours(self.device.type, shape.op) if (n, shape.op, shape.dtype) not in bad]
            items.append(self._item(shape, [*names, peer(shape)], SECONDS))
        for item, result in self._worked(items, self.until):
            shape = self._shape(item)
            out = self._verdicts(item, result)
            timed = Timed(of_kind, result.get("spread", 0.0), result.get("times", {}))
            timed.out = {name: verdict for name, verdict in out.items() if verdict.outcome != PASSED}
            self.entry.timed[shape] = timed
            self._save(Entry(self.entry.machine, self.entry.date, set(), {}, {shape: timed}))
            self.progress.step(shape.name)
        return all(shape in self.entry.timed for shape in every)

    def _item(self, shape: Shape, names: Sequence[str], seconds: float) -> Item:
        machine = self.entry.machine
        return {
            "op": shape.op, "call": list(shape), "device": str(self.device), "backends": list(names),
            "seconds": seconds, "threads": torch.get_num_threads(), "instructions": machine.get("instructions"),
        }  # fmt: skip

    @staticmethod
    def _shape(item: Item) -> Shape:
        found: Shape = SHAPES[item["op"]](*item["call"])
        return found

    @staticmethod
    def _verdicts(item: Item, result: dict[str, Any]) -> dict[str, Verdict]:
        """Of every backend of an item. A child that was lost blames the backend that it was at; what torch itself
        cannot do is nobody's fault."""
        out = {name: Verdict(*verdict) for name, verdict in result.get("out", {}).items()}
        for name in item["backends"]:
            if "lost" in result:
                if not result["at"]:
                    raise CalibrationError(f"no trial can be started: {result['lost']}")
                guilty = result["at"] in (name, "timing") and name in chosen.OURS
                out[name] = Verdict(LOST if guilty else CANNOT, result["lost"])
            out.setdefault(name, Verdict(CANNOT, result.get("failed", "not tried")))
        return out

    def _worked(self, items: Sequence[Item], until: float) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Items with their results, until the time is up."""
        if not items or time.monotonic() >= until:
            return
        with contextlib.closing((self.work or in_children)(items)) as working:  # type: ignore[type-var]
            for pair in working:
                yield pair
                if time.monotonic() >= until:
                    return

    def _save(self, news: Entry) -> None:
        """Writes what is new, unless something was written a moment ago: then it waits for more."""
        self._news.merge(news)
        if time.monotonic() - self._saved >= EVERY:
            self._write()

    def _write(self) -> None:
        news, self._news = self._news, Entry(self.entry.machine, self.entry.date)
        self._saved = time.monotonic()
        try:
            if not self.refused:
                file.update(news)
        except cli.CannotWrite as error:
            if not self.unwritten:
                raise
            self.refused = f"{file.path()}: {error.strerror}"
        if self.refused:
            chosen.keep(self.entry)


def peer(shape: Shape) -> str:
    """What ours are measured beside: torch, or the reference where torch has no such call."""
    if isinstance(shape, ScanShape):
        return "reference" if NOT_IN_TORCH[shape.cell] or shape.reset else "torch"
    return "reference" if shape.softcap or shape.sinks or shape.packed else "torch"


def today() -> str:
    """The date, as the file has it."""
    return datetime.date.today().isoformat()

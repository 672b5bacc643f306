"""Measuring one case: every contestant is checked, those that passed are timed.

Contestants take turns, a block of calls each, and the order shifts by one every round, so that a disturbance of the
machine affects all of them alike. The median over the rounds is reported. A contestant whose idle workers spin is timed
by itself; its workers end with it, and a short pause follows. So that it is measured at the same time as the others,
the whole is done in a few passes. Garbage collection is off while a block runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import torch

import fastseq
from bench import peak
from bench.cases import Case, Inputs, Model, Multihead, Recurrent, make_inputs, registry
from bench.check import Judge, errors
from bench.peers import OURS, PEERS, Contestant, Entrant, Unavailable

ROUNDS = 15
PASSES = 3
"""Of a case. In each pass, contestants that are timed alone and then the others get their share of the time."""
FEWEST_ROUNDS = 5
PATIENCE = 4
"""Rounds end early, after at least three of a pass, if they take this many times the time they were given."""
NOISY = 0.15
"""Spread (interquartile range over median) from which a time is marked as noisy."""


@dataclass(frozen=True)
class Options:
    """min_time: seconds given to each contestant of a case; pause: seconds of rest after one that is timed alone."""

    threads: int
    min_time: float = 1.0
    backend: str | None = None
    memory: bool = False
    pause: float = 0.1


@dataclass
class Timing:
    """Seconds of ``blocks``, each of so many ``calls``. The median is what is reported."""

    calls: int = 0
    blocks: list[float] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """Seconds a call, block by block."""
        return [seconds / self.calls for seconds in self.blocks]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def iqr(self) -> float:
        """Interquartile range."""
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return high - low


@dataclass
class Entry:
    """What became of a contestant: ``timed``, ``refused`` (wrong, or it raised) or ``unavailable``, and then why.

    timings: by setting; the fastest counts. errors: the largest over its settings, tensor by tensor.
    """

    status: str = "unavailable"
    reason: str = ""
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    backend: str | None = None
    peak_bytes: int | None = None

    @property
    def setting(self) -> str:
        return min(self.timings, key=lambda setting: self.timings[setting].median)

    @property
    def timing(self) -> Timing | None:
        return self.timings[self.setting] if self.status == "timed" else None


@dataclass
class Result:
    """A case and its entries by contestant; ``reason`` if the case itself could not be set up. ``ours``: which
    contestants are fastseq's; the others are peers."""

    case: Case
    budget: dict[str, float] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    reason: str = ""
    ours: frozenset[str] = frozenset([OURS.name])

    @property
    def failed(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.status == "refused"]

    @property
    def peers(self) -> list[str]:
        return [name for name in self.entries if name not in self.ours]

    def ratio(self, peer: str, ours: str = OURS.name) -> float | None:
        """The peer's time over ours: above 1 we are faster. ``best`` is the fastest peer here."""
        if peer == "best":
            return min((r for name in self.peers if (r := self.ratio(name, ours)) is not None), default=None)
        mine, theirs = (self.entries[name].timing if name in self.entries else None for name in (ours, peer))
        return theirs.median / mine.median if mine and theirs else None

    def ratios(self, ours: str = OURS.name) -> dict[str, float | None]:
        """To every peer, and to the best."""
        return {peer: self.ratio(peer, ours) for peer in (*self.peers, "best")}

    @property
    def noisy(self) -> bool:
        timed = [entry.timing for entry in self.entries.values() if entry.timing]
        return any(timing.iqr > NOISY * timing.median for timing in timed)


def geomean(ratios: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def block(call: Callable[[], object], calls: int) -> float:
    """Seconds of so many calls, without garbage collection."""
    return timeit.Timer(call).timeit(calls)


def calls_for(call: Callable[[], object], seconds: float) -> int:
    """How many calls take about this long; this also warms up. The faster of two tries is the cost of a call, so that
    one disturbance does not shorten every block."""
    calls = 1
    while True:
        took = min(block(call, calls), block(call, calls))
        cost = took / calls
        if took * 4 >= seconds:
            return max(1, round(seconds / cost))
        calls = max(2 * calls, min(100 * calls, round(seconds / max(cost, 1e-9) / 4)))


def time_in_turns(calls: Sequence[Callable[[], object]], min_time: float) -> list[Timing]:
    """Time closures in alternating blocks."""
    found = [Timing() for _ in calls]
    add_blocks(calls, found, min_time)
    return found


def add_blocks(
    calls: Sequence[Callable[[], object]], found: Sequence[Timing], min_time: float, passes: int = 1
) -> None:
    """Time closures in alternating blocks, in one of ``passes`` passes; the first decides how long a block is."""
    gc.collect()
    for call, own in zip(calls, found, strict=True):
        own.calls = own.calls or calls_for(call, min_time / ROUNDS)
    longest = max(block(call, own.calls) for call, own in zip(calls, found, strict=True))
    most, fewest = math.ceil(ROUNDS / passes), math.ceil(FEWEST_ROUNDS / passes)
    rounds = min(most, max(fewest, math.ceil(min_time / passes / longest)))
    deadline = time.monotonic() + PATIENCE * min_time / passes * len(calls)
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() > deadline:
            break
        for place in range(len(calls)):
            i = (place + turn) % len(calls)
            if found[i].calls > 1:
                calls[i]()  # brings its data back into the caches, which the others have used since
            found[i].blocks.append(block(calls[i], found[i].calls))


def measure(case: Case, contestants: Sequence[Contestant], options: Options, clock: bool = True) -> Result:
    """Check every contestant of a case and time those that passed; only check them if ``clock`` is false."""
    torch.set_num_threads(options.threads)
    inputs = make_inputs(case)
    judge = Judge.of(case, inputs)
    result = Result(case, judge.budget, {contestant.name: Entry() for contestant in contestants})
    no_grad = contextlib.nullcontext() if case.training else torch.inference_mode()

    def admitted(contestant: Contestant) -> list[Entrant]:
        return admit(contestant, case, inputs, judge, options, result.entries[contestant.name])

    with in_force(options.backend), no_grad:
        together = [(c.name, entrant) for c in contestants if not c.alone for entrant in admitted(c)]
        found: dict[tuple[str, str], Timing] = {}
        alone = [contestant for contestant in contestants if contestant.alone]
        for _ in range(PASSES if clock else 1):
            for contestant in tuple(alone):
                entrants = admitted(contestant)
                if not entrants:
                    alone.remove(contestant)  # what is missing or wrong now is not tried again
                elif clock:
                    for entrant in entrants:
                        own = found.setdefault((contestant.name, entrant.setting), Timing())
                        add_blocks([entrant.call], [own], options.min_time, PASSES)
                    del entrants, entrant  # its workers go with it
                    time.sleep(options.pause)
            if together and clock:
                shared = [found.setdefault((name, entrant.setting), Timing()) for name, entrant in together]
                add_blocks([entrant.call for _, entrant in together], shared, options.min_time, PASSES)
        for (name, setting), own in found.items():
            entry = result.entries[name]
            if entry.status != "refused":  # in a later pass than the first
                entry.status = "timed"
                entry.timings[setting] = own
    if options.memory and case.training and peak.measurable(torch.device("cpu")):
        for name, entry in result.entries.items():
            if entry.status == "timed":
                with contextlib.suppress(BrokenProcessPool):  # the system ended it, as when memory runs out
                    entry.peak_bytes = peak.in_a_process(peak_bytes, case.name, name, options)
    return result


def in_force(backend: str | None) -> contextlib.AbstractContextManager[object]:
    """fastseq's backend inside the ``with`` block; None: its own choice."""
    return fastseq.use_backend(backend) if backend else contextlib.nullcontext()


def admit(
    contestant: Contestant, case: Case, inputs: Inputs, judge: Judge, options: Options, entry: Entry
) -> list[Entrant]:
    """Prepare a contestant and compare its first answer with the truth. One wrong setting refuses it whole."""
    missing = contestant.missing()
    if missing is not None:
        entry.reason = f"the package {missing} is not installed"
        return []
    try:
        with torch.inference_mode(False):  # as models are made: torch is slower on weights that inference mode made
            entrants = list(contestant.prepare(case, inputs, options.threads))
        for entrant in entrants:
            if contestant.name == OURS.name:
                entry.backend = backend_of(entrant)
            found = errors(entrant.outputs(entrant.call()), judge.truth)
            entry.errors = {name: max(error, entry.errors.get(name, 0.0)) for name, error in found.items()}
    except Unavailable as reason:
        entry.reason = str(reason)
        return []
    except Exception as error:  # the contestant is refused, with the error as the reason; the others go on
        entry.status, entry.reason = "refused", f"{type(error).__name__}: {error}"
        return []
    fault = judge.fault(entry.errors)
    entry.status, entry.reason = ("checked", "") if fault is None else ("refused", fault)
    return [] if fault else entrants


def backend_of(entrant: Entrant) -> str:
    """Which of fastseq's backends the call will run on."""
    said = fastseq.explain(entrant.call)
    found = re.search(r"runs on: (\w+)", said)
    return found.group(1) if found else said.splitlines()[0]


def peak_bytes(name: str, contestant: str, options: Options) -> int:
    """Peak memory of two training steps of a contestant's first entrant. A small case before it warms up the library,
    so that its code and thread stacks are not counted."""
    torch.set_num_threads(options.threads)
    case, prepare = registry()[name], {OURS.name: OURS, **PEERS}[contestant].prepare
    with in_force(options.backend):
        for each in (miniature(case), case):
            entrant = next(iter(prepare(each, make_inputs(each), options.threads)))
            if each is not case:
                entrant.call()
        return peak.peak_of(entrant.call, torch.device("cpu"))


def miniature(case: Case) -> Case:
    """The same case on two steps, or 32 positions."""
    if isinstance(case, Recurrent):
        return dataclasses.replace(case, steps=2, batch=1)
    if isinstance(case, (Multihead, Model)):
        return dataclasses.replace(case, steps=32, batch=1)
    return dataclasses.replace(case, batch=1, queries=32, keys=32)  # type: ignore[call-arg]

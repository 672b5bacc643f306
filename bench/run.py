"""Measuring one case: every contestant is checked, those that passed are timed.

How: contestants take turns, a block of calls each, in an order that moves on by one every round, so that what disturbs
the machine disturbs them alike; the median over the rounds is quoted. A contestant whose idle workers spin is timed
before the others, by itself, and the machine is left alone for a moment after it. Collection of garbage is off.
"""

from __future__ import annotations

import contextlib
import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import torch

import fastseq
from bench import peak
from bench.cases import Case, Recurrent, attention_inputs, recurrent_inputs
from bench.check import Judge, errors
from bench.peers import OURS, Contestant, Entrant, Inputs, Unavailable

ROUNDS = 15
FEWEST_ROUNDS = 5
PATIENCE = 4
"""Rounds end early, after three at least, where they take this many times the time they were given."""
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
    """Seconds a call: median, interquartile range and least of ``rounds`` blocks of ``inner`` calls each. The median
    is what is quoted; the least tells what a busy machine could have done."""

    median: float
    iqr: float
    least: float
    rounds: int
    inner: int

    @property
    def spread(self) -> float:
        return self.iqr / self.median

    @classmethod
    def of(cls, seconds: Sequence[float], inner: int) -> Timing:
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, high - low, min(seconds), len(seconds), inner)


@dataclass
class Entry:
    """What became of a contestant: ``timed``, ``refused`` (wrong, or it raised) or ``unavailable``, and then why.

    timings: by setting; the fastest stands for the contestant. errors: the worst of its settings, tensor by tensor.
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
    """A case and its entries by contestant, fastseq's first."""

    case: Case
    budget: dict[str, float]
    entries: dict[str, Entry]

    @property
    def failed(self) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.status == "refused"]

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: above 1 we are ahead. ``best`` is the fastest peer here."""
        if peer == "best":
            ratios = [r for name in self.entries if name != OURS.name and (r := self.ratio(name)) is not None]
            return min(ratios, default=None)
        ours, theirs = self.entries[OURS.name].timing, self.entries[peer].timing if peer in self.entries else None
        return theirs.median / ours.median if ours and theirs else None

    @property
    def noisy(self) -> bool:
        return any(entry.timing.spread > NOISY for entry in self.entries.values() if entry.timing)


def geomean(ratios: Sequence[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def make_inputs(case: Case) -> Inputs:
    """The case's inputs, the same at each call."""
    return recurrent_inputs(case) if isinstance(case, Recurrent) else attention_inputs(case)  # type: ignore[arg-type]


# --- the clock ------------------------------------------------------------------------------------------------------


def block(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, over ``calls`` calls."""
    turns = repeat(None, calls)
    start = time.perf_counter_ns()
    for _ in turns:
        call()
    return (time.perf_counter_ns() - start) / calls / 1e9


def calls_for(call: Callable[[], object], seconds: float) -> int:
    """How many calls take about this long; warms up on the way. A call is taken to cost what the faster of two tries
    says, so that one hiccup does not shorten every block."""
    calls = 1
    while True:
        cost = min(block(call, calls), block(call, calls))
        if cost * calls * 4 >= seconds:
            return max(1, round(seconds / cost))
        calls = max(2 * calls, min(100 * calls, round(seconds / max(cost, 1e-9) / 4)))


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Garbage is collected before, and not during."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def time_in_turns(calls: Sequence[Callable[[], object]], min_time: float) -> list[Timing]:
    """Time closures in alternating blocks."""
    with no_collection():
        inner = [calls_for(call, min_time / ROUNDS) for call in calls]
        seconds: list[list[float]] = [[] for _ in calls]
        longest = max(block(call, n) * n for call, n in zip(calls, inner, strict=True))
        rounds = min(ROUNDS, max(FEWEST_ROUNDS, math.ceil(min_time / longest)))
        deadline = time.monotonic() + PATIENCE * min_time * len(calls)
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            for place in range(len(calls)):
                i = (place + turn) % len(calls)
                if inner[i] > 1:
                    calls[i]()  # its data back into the caches, which the others have used since
                seconds[i].append(block(calls[i], inner[i]))
    return [Timing.of(values, n) for values, n in zip(seconds, inner, strict=True)]


# --- one case -------------------------------------------------------------------------------------------------------


def measure(case: Case, contestants: Sequence[Contestant], options: Options, clock: bool = True) -> Result:
    """Check every contestant of a case and time those that passed; only check where ``clock`` is false."""
    torch.set_num_threads(options.threads)
    inputs = make_inputs(case)
    judge = Judge.of(case, inputs)
    result = Result(case, judge.budget, {contestant.name: Entry() for contestant in contestants})
    no_grad = contextlib.nullcontext() if case.training else torch.inference_mode()
    with fastseq.use_backend(options.backend) if options.backend else contextlib.nullcontext(), no_grad:
        for contestant in contestants:
            if contestant.alone:
                entrants = admit(contestant, case, inputs, judge, options, result.entries[contestant.name])
                for entrant in entrants if clock else ():
                    record(result.entries[contestant.name], entrant, *time_in_turns([entrant.call], options.min_time))
                if entrants and clock:
                    del entrants, entrant  # its workers go with it
                    time.sleep(options.pause)
        together = [
            (result.entries[contestant.name], entrant)
            for contestant in contestants
            if not contestant.alone
            for entrant in admit(contestant, case, inputs, judge, options, result.entries[contestant.name])
        ]
        if together and clock:
            timings = time_in_turns([entrant.call for _, entrant in together], options.min_time)
            for (entry, entrant), timing in zip(together, timings, strict=True):
                record(entry, entrant, timing)
    if options.memory and case.training:
        for name, entry in result.entries.items():
            if entry.status == "timed":
                entry.peak_bytes = peak.in_subprocess(case, name, options.threads, options.backend)
    return result


def admit(
    contestant: Contestant, case: Case, inputs: Inputs, judge: Judge, options: Options, entry: Entry
) -> list[Entrant]:
    """Prepare a contestant and compare its first answer with the truth. One wrong setting refuses it whole."""
    admitted = []
    missing = contestant.missing()
    if missing is not None:
        entry.reason = f"the package {missing} is not installed"
        return []
    try:
        for entrant in contestant.prepare(case, inputs, options.threads):
            if contestant.name == OURS.name:
                entry.backend = backend_of(entrant)
            found = errors(entrant.outputs(entrant.call()), judge.truth)
            entry.errors = {name: max(error, entry.errors.get(name, 0.0)) for name, error in found.items()}
            admitted.append(entrant)
    except Unavailable as reason:
        entry.reason = str(reason)
        return []
    except Exception as error:  # whatever it is, the contestant is out, the others are not, and the report says so
        entry.status, entry.reason = "refused", f"{type(error).__name__}: {error}"
        return []
    fault = judge.fault(entry.errors, contestant.looseness)
    if fault is not None:
        entry.status, entry.reason = "refused", fault
        return []
    entry.status = "checked"
    return admitted


def backend_of(entrant: Entrant) -> str:
    """Which of fastseq's backends the call will run on."""
    said = fastseq.explain(entrant.call)
    found = re.search(r"runs on: (\w+)", said)
    return found.group(1) if found else said.splitlines()[0]


def record(entry: Entry, entrant: Entrant, timing: Timing) -> None:
    entry.status = "timed"
    entry.timings[entrant.setting] = timing

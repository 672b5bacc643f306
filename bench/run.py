"""Measuring one case: every contestant is checked, those that passed are timed.

How: contestants take turns, a block of calls each, in an order that moves on by one every round, so that what disturbs
the machine disturbs them alike; the median over the rounds is quoted. A contestant whose idle workers spin is timed by
itself, its workers end with it, and the machine is left alone for a moment after it; so that it meets the same hours as
the others, the whole is done in a few passes. Collection of garbage is off.
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
from bench.cases import Case, Multihead, Recurrent, attention_inputs, multihead_inputs, recurrent_inputs
from bench.check import Judge, errors
from bench.peers import OURS, Contestant, Entrant, Inputs, Unavailable

ROUNDS = 15
PASSES = 3
"""Of a case: in each, those that are timed alone and then the others get their share of the time."""
FEWEST_ROUNDS = 5
PATIENCE = 4
"""Rounds end early, after three of a pass at least, where they take this many times the time they were given."""
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
    if isinstance(case, Recurrent):
        return recurrent_inputs(case)
    return multihead_inputs(case) if isinstance(case, Multihead) else attention_inputs(case)  # type: ignore[arg-type]


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


@dataclass
class Blocks:
    """What was timed of a contestant: seconds a call, of blocks of ``inner`` calls each."""

    seconds: list[float] = field(default_factory=list)
    inner: int = 0

    @property
    def timing(self) -> Timing:
        return Timing.of(self.seconds, self.inner)


def time_in_turns(calls: Sequence[Callable[[], object]], min_time: float) -> list[Timing]:
    """Time closures in alternating blocks."""
    blocks = [Blocks() for _ in calls]
    add_blocks(calls, blocks, min_time)
    return [own.timing for own in blocks]


def add_blocks(
    calls: Sequence[Callable[[], object]], blocks: Sequence[Blocks], min_time: float, passes: int = 1
) -> None:
    """Time closures in alternating blocks, for one of ``passes`` times; the first decides how long a block is."""
    with no_collection():
        for call, own in zip(calls, blocks, strict=True):
            own.inner = own.inner or calls_for(call, min_time / ROUNDS)
        longest = max(block(call, own.inner) * own.inner for call, own in zip(calls, blocks, strict=True))
        most, fewest = math.ceil(ROUNDS / passes), math.ceil(FEWEST_ROUNDS / passes)
        rounds = min(most, max(fewest, math.ceil(min_time / passes / longest)))
        deadline = time.monotonic() + PATIENCE * min_time / passes * len(calls)
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            for place in range(len(calls)):
                i = (place + turn) % len(calls)
                if blocks[i].inner > 1:
                    calls[i]()  # its data back into the caches, which the others have used since
                blocks[i].seconds.append(block(calls[i], blocks[i].inner))


# --- one case -------------------------------------------------------------------------------------------------------


def measure(case: Case, contestants: Sequence[Contestant], options: Options, clock: bool = True) -> Result:
    """Check every contestant of a case and time those that passed; only check where ``clock`` is false."""
    torch.set_num_threads(options.threads)
    inputs = make_inputs(case)
    judge = Judge.of(case, inputs)
    result = Result(case, judge.budget, {contestant.name: Entry() for contestant in contestants})
    no_grad = contextlib.nullcontext() if case.training else torch.inference_mode()
    with fastseq.use_backend(options.backend) if options.backend else contextlib.nullcontext(), no_grad:
        ready = {
            contestant.name: admit(contestant, case, inputs, judge, options, result.entries[contestant.name])
            for contestant in contestants
            if not contestant.alone
        }
        together = [(name, entrant) for name, entrants in ready.items() for entrant in entrants]
        blocks: dict[tuple[str, str], Blocks] = {}
        alone = [contestant for contestant in contestants if contestant.alone]
        for _ in range(PASSES if clock else 1):
            for contestant in tuple(alone):
                entrants = admit(contestant, case, inputs, judge, options, result.entries[contestant.name])
                if not entrants:
                    alone.remove(contestant)  # for good: what is missing or wrong now is not asked again
                elif clock:
                    for entrant in entrants:
                        own = blocks.setdefault((contestant.name, entrant.setting), Blocks())
                        add_blocks([entrant.call], [own], options.min_time, PASSES)
                    del entrants, entrant  # its workers go with it
                    time.sleep(options.pause)
            if together and clock:
                shared = [blocks.setdefault((name, entrant.setting), Blocks()) for name, entrant in together]
                add_blocks([entrant.call for _, entrant in together], shared, options.min_time, PASSES)
        for (name, setting), own in blocks.items():
            entry = result.entries[name]
            if entry.status != "refused":  # in a later pass than the first
                entry.status = "timed"
                entry.timings[setting] = own.timing
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
        with torch.inference_mode(False):  # as models are made: torch is slower on weights that inference mode made
            entrants = list(contestant.prepare(case, inputs, options.threads))
        for entrant in entrants:
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

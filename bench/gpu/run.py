"""One case on a GPU: every contestant checked, those that passed timed in turns.

As bench/run.py, with the clock of fastseq.calibrate: on a GPU events around blocks of calls, or, where the speed of
memory counts, around each call with the L2 cache overwritten before it. A contestant may take part twice: as called,
and captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fastseq
from bench.cases import Case
from bench.check import Judge
from bench.check import errors as errors_of
from bench.gpu import attention, recurrent
from bench.gpu.cases import Layers
from bench.peers import Entrant, Unavailable
from bench.run import Entry, Result, Timing, in_force
from fastseq.backend import operator_reason
from fastseq.calibration import measure
from fastseq.calibration.measure import Clock

ROUNDS, FEWEST = 9, 5
MOST_CALLS = 200


def clock_of(device: str) -> Clock:
    return measure.clock_of(torch.device(device))


Prepare = Callable[[Any, Any, str], Entrant]
MODULES: dict[str, Any] = {"recurrent": recurrent, "attention": attention}


@dataclass(frozen=True)
class Runner:
    """A contestant: ``backend`` of fastseq if it is one of ours, else a peer.

    prepare: by family of cases. role: of our scan, if it differs from that of the tables.
    """

    name: str
    label: str
    backend: str | None
    prepare: Mapping[str, Prepare]
    needs: str = ""
    role: str | None = None

    @contextlib.contextmanager
    def scope(self, case: Case) -> Iterator[None]:
        """The settings under which this contestant's calls are made."""
        with in_force(self.backend), recurrent.in_role(self.role), torch.set_grad_enabled(case.training):
            yield


def _sdpa(name: str, label: str, kernel: str) -> Runner:
    return Runner(name, f"SDPA, {label}", None, {"attention": attention.sdpa(kernel)})


_OURS: Mapping[str, Prepare] = {"recurrent": recurrent.ours, "attention": attention.ours}
RUNNERS = {
    runner.name: runner
    for runner in (
        Runner("triton", "fastseq, Triton", "triton", _OURS),
        Runner("native", "fastseq, C++", "native", _OURS),
        Runner("persistent", "Triton, persistent", "triton", {"recurrent": recurrent.persistent}, role="persistent"),
        Runner("barrier", "C++, cluster barrier", "native", {"recurrent": recurrent.barrier}, role=recurrent.BARRIER),
        Runner("reference", "fastseq, reference", "reference", _OURS),
        Runner("torch", "torch.nn", None, {"recurrent": recurrent.torch_entrant}),
        Runner("flashrnn", "FlashRNN", None, {"recurrent": recurrent.flashrnn_entrant}, "flashrnn"),
        _sdpa("cudnn", "cuDNN", "CUDNN_ATTENTION"),
        _sdpa("flash", "flash", "FLASH_ATTENTION"),
        _sdpa("math", "math", "MATH"),
        Runner("varlen", "varlen_attn", None, {"attention": attention.varlen_entrant}),
        Runner("flex", "FlexAttention", None, {"attention": attention.flex_entrant}),
    )
}
DEFAULT = {
    "cuda": ("triton", "native", "persistent", "barrier", "torch", "flashrnn", "cudnn", "flash", "varlen", "flex"),
    "cpu": ("native", "reference", "torch", "math"),
}
"""Contestants by device; on the CPU only to try the runner itself."""


@dataclass
class Bench:
    """How cases are measured. contestants: names in RUNNERS; clock: None only checks; min_time: seconds for each
    contestant in a case."""

    device: str
    contestants: Sequence[str]
    clock: Clock | None
    min_time: float = 0.12
    watch: Callable[[str], None] = lambda name: None
    """Called with the name of the contestant whose first calls follow, so that a crash can be attributed to it."""

    def measure(self, case: Case) -> Result:
        """Check and time; whatever a contestant does, the others go on, and the reason is kept."""
        found = Result(case, ours=frozenset(name for name, runner in RUNNERS.items() if runner.backend))
        module = MODULES["recurrent" if isinstance(case, Layers) else "attention"]
        try:
            self.watch("")
            given = module.inputs(case, self.device)
            judge = Judge.by(lambda dtype: module.answers(case, given, self.device, dtype), case)
            found.budget = judge.budget
        except Exception as error:
            found.reason = told(error)
            self.tidy(error)
            return found
        entrants: list[tuple[Runner, Entrant]] = []
        for runner in (RUNNERS[name] for name in self.contestants):
            if case.family in runner.prepare:
                entry = found.entries[runner.name] = Entry()
                entrants += [(runner, entrant) for entrant in self.admit(runner, case, given, judge, entry)]
                gc.collect()  # frees what a refused contestant held
        if entrants and self.clock is not None:
            del given, judge
            self.time(case, entrants, found, self.clock)
        return found

    def admit(self, runner: Runner, case: Case, given: Any, judge: Judge, entry: Entry) -> list[Entrant]:
        """Prepare a contestant and compare its answer with the truth."""

        def errors(entrant: Entrant) -> dict[str, float]:
            return errors_of(entrant.outputs(entrant.call()), judge.truth)

        if runner.needs and importlib.util.find_spec(runner.needs) is None:
            entry.reason = f"the package {runner.needs} is not installed"
            return []
        try:
            self.watch(runner.name)
            with runner.scope(case):
                reason = operator_reason(runner.backend or "", self.device)
                if reason is not None:
                    raise Unavailable(reason)
                entrants = [runner.prepare[case.family](case, given, self.device)]
                entry.backend = runner.backend
                wrong = [errors(entrants[0])]
                if (captured := self.captured(entrants[0], case)) is not None:
                    entrants.append(captured)
                    wrong.append(errors(captured))
                entry.errors = {name: max(each[name] for each in wrong) for name in judge.truth}
        except Exception as error:  # this contestant is out, the others are not
            refused = attention.unavailable(error) if isinstance(error, RuntimeError) else error
            known = isinstance(refused, Unavailable | fastseq.BackendError)
            entry.status, entry.reason = "unavailable" if known else "refused", told(error)
            self.tidy(error)
            return []
        fault = judge.fault(entry.errors)
        entry.status, entry.reason = ("checked", "") if fault is None else ("refused", fault)
        return [] if fault else entrants

    def captured(self, entrant: Entrant, case: Case) -> Entrant | None:
        """The same call as a CUDA graph, replayed; None if it cannot be captured."""
        if self.device != "cuda" or case.training:
            return None
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                entrant.call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                answer = entrant.call()
        except RuntimeError:
            torch.cuda.synchronize()  # raises if more than the capture is broken
            return None

        def replay() -> Any:
            graph.replay()
            return answer

        return Entrant(replay, entrant.outputs, "graph")

    def time(self, case: Case, going: Sequence[tuple[Runner, Entrant]], found: Result, clock: Clock) -> None:
        """Blocks in turns, in an order that shifts by one every round; the medians count."""
        cold = getattr(case, "kind", "") == "decode"
        timed = [Timing(1) for _ in going]
        out: dict[int, str] = {}

        def one(n: int, calls: int) -> float | None:
            runner, entrant = going[n]
            try:
                with runner.scope(case):
                    return clock(entrant.call, calls, cold)
            except Exception as error:
                out[n] = told(error)
                self.tidy(error)
                return None

        gc.collect()
        for n, (runner, _) in enumerate(going):
            self.watch(runner.name)
            one(n, 1)
            if (twice := one(n, 2)) is not None:
                calls = math.ceil(self.min_time / ROUNDS / max(twice / 2, 1e-7))
                timed[n].calls = max(1, min(MOST_CALLS, calls))
        slowest = max((one(n, 1) or 0.0) for n in range(len(going)))
        for turn in range(ROUNDS if slowest * ROUNDS <= 10 * self.min_time else FEWEST):
            for place in range(len(going)):
                n = (place + turn) % len(going)
                if n not in out and (seconds := one(n, timed[n].calls)) is not None:
                    timed[n].blocks.append(seconds)
        for n, (runner, entrant) in enumerate(going):
            entry = found.entries[runner.name]
            if n not in out:
                entry.status, entry.timings[entrant.setting] = "timed", timed[n]
            else:
                entry.reason = out[n]
                entry.status = "timed" if entry.status == "timed" else "refused"

    def tidy(self, error: BaseException) -> None:
        """Frees memory after a failure, and raises if the GPU itself no longer answers."""
        error.__traceback__ = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def told(error: BaseException) -> str:
    """An error in one line."""
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, Unavailable | fastseq.BackendError) else f"{kind}: {text[:300]}"

"""One case on a GPU: every contestant checked, those that passed timed in turns; and the process that does so.

As bench/run.py, with a GPU's clock: events around blocks of calls, or around each call with the L2 cache swept between
where memory's speed is what counts. A contestant may enter twice: as it is called, and captured in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

import fastseq
from bench.cases import Case
from bench.check import FLOOR, errors
from bench.gpu import attention as gpu_attention
from bench.gpu import recurrent as gpu_recurrent
from bench.gpu.cases import Heads, Layers
from bench.peers import Entrant, Outputs, Unavailable
from bench.run import Entry, Timing
from fastseq.backend import operator_reason

ROUNDS, FEWEST = 9, 5
SWEEP = 256 << 20
"""Bytes written between calls where the caches must be cold: several times the largest L2."""
MOST_CALLS = 200


class Clock(Protocol):
    """Seconds a call, of a block of calls; ``cold``: with caches swept before each."""

    def __call__(self, call: Callable[[], object], calls: int, cold: bool) -> float: ...


class EventClock:
    """Time by the GPU's own events."""

    def __init__(self) -> None:
        self._dirt: torch.Tensor | None = None

    def __call__(self, call: Callable[[], object], calls: int, cold: bool) -> float:
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(calls if cold else 1)]
        torch.cuda.synchronize()
        if cold:
            if self._dirt is None:
                self._dirt = torch.empty(SWEEP, dtype=torch.uint8, device="cuda")
            for start, end in pairs:
                self._dirt.zero_()
                start.record()
                call()
                end.record()
        else:
            pairs[0][0].record()
            for _ in range(calls):
                call()
            pairs[0][1].record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3


class HostClock:
    """Time by the host, for a run on the CPU."""

    def __call__(self, call: Callable[[], object], calls: int, cold: bool) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Runner:
    """Who takes part: ``backend`` of fastseq where it is one of ours, else a peer.

    ``role``: that of our scan, where it is not to be what the tables say.
    """

    name: str
    label: str
    backend: str | None
    prepare: dict[str, Callable[[Any, Any, str], Entrant]]
    needs: str = ""
    role: str | None = None


_OURS: dict[str, Callable[[Any, Any, str], Entrant]]
_OURS = {"recurrent": gpu_recurrent.ours, "attention": gpu_attention.ours}
RUNNERS = {
    runner.name: runner
    for runner in (
        Runner("triton", "fastseq, Triton", "triton", _OURS),
        Runner("native", "fastseq, C++", "native", _OURS),
        Runner(
            "persistent", "Triton, persistent", "triton", {"recurrent": gpu_recurrent.persistent}, role="persistent"
        ),
        Runner(
            "barrier", "C++, cluster barrier", "native", {"recurrent": gpu_recurrent.barrier}, role="cluster_barrier"
        ),
        Runner("reference", "fastseq, reference", "reference", _OURS),
        Runner("torch", "torch.nn", None, {"recurrent": gpu_recurrent.torch_entrant}),
        Runner("flashrnn", "FlashRNN", None, {"recurrent": gpu_recurrent.flashrnn_entrant}, "flashrnn"),
        Runner("cudnn", "SDPA, cuDNN", None, {"attention": gpu_attention.sdpa("CUDNN_ATTENTION")}),
        Runner("flash", "SDPA, flash", None, {"attention": gpu_attention.sdpa("FLASH_ATTENTION")}),
        Runner("math", "SDPA, math", None, {"attention": gpu_attention.sdpa("MATH")}),
        Runner("varlen", "varlen_attn", None, {"attention": gpu_attention.varlen_entrant}),
        Runner("flex", "FlexAttention", None, {"attention": gpu_attention.flex_entrant}),
    )
}
DEFAULT = {
    "cuda": ("triton", "native", "persistent", "barrier", "torch", "flashrnn", "cudnn", "flash", "varlen", "flex"),
    "cpu": ("native", "reference", "torch", "math"),
}
"""Who takes part by device; on the CPU only to try the runner itself."""


@dataclass
class Measured:
    """A case and what became of each contestant; ``reason`` where the case itself could not be set up."""

    case: Case
    budget: dict[str, float] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    reason: str = ""

    def ratio(self, ours: str, peer: str) -> float | None:
        """The peer's time over ours; ``best``: of the fastest peer there is."""
        if peer == "best":
            found = [self.ratio(ours, name) for name in self.entries if RUNNERS[name].backend is None]
            return min((ratio for ratio in found if ratio is not None), default=None)
        mine, theirs = (self.entries[name].timing if name in self.entries else None for name in (ours, peer))
        return theirs.median / mine.median if mine and theirs else None


@dataclass
class Bench:
    """How cases are measured. ``contestants``: names in RUNNERS; clock: None only
    checks; min_time: seconds for each contestant in a case."""

    device: str
    contestants: Sequence[str]
    clock: Clock | None
    min_time: float = 0.12
    graphs: bool = True
    watch: Callable[[str], None] = lambda name: None
    """Told whose call is about to run for the first times, so that a crash can be laid at its door."""

    def measure(self, case: Case) -> Measured:
        """Check and time; whatever a contestant does, the others go on, and the reason is kept."""
        found = Measured(case)
        family = case.family
        taking_part = [RUNNERS[name] for name in self.contestants if family in RUNNERS[name].prepare]
        try:
            self.watch("")
            given, truth, found.budget = self.set_up(case)
        except Exception as error:
            found.reason = told(error)
            self.tidy(error)
            return found
        entrants: list[tuple[Runner, Entrant]] = []
        for runner in taking_part:
            entry = found.entries[runner.name] = Entry()
            entrants += [(runner, entrant) for entrant in self.admit(runner, case, given, truth, found.budget, entry)]
            gc.collect()  # of what was refused
        if entrants and self.clock is not None:
            del given, truth
            self.time(case, entrants, found)
        return found

    def set_up(self, case: Case) -> tuple[Any, Outputs, dict[str, float]]:
        """Inputs, the truth in float64, and the error allowed: twice that of the formula in the case's own dtype."""
        module: Any = gpu_recurrent if isinstance(case, Layers) else gpu_attention
        given = module.inputs(case, self.device)
        truth = module.answers(case, given, self.device, torch.float64)
        own = errors(module.answers(case, given, self.device, case.torch_dtype), truth)
        return given, truth, {name: 2 * error + FLOOR[case.dtype] for name, error in own.items()}

    def admit(
        self, runner: Runner, case: Case, given: Any, truth: Outputs, budget: dict[str, float], entry: Entry
    ) -> list[Entrant]:
        """Prepare a contestant and hold its answer to the budget."""
        if runner.needs and importlib.util.find_spec(runner.needs) is None:
            entry.reason = f"the package {runner.needs} is not installed"
            return []
        try:
            self.watch(runner.name)
            with scope(runner, case):
                reason = operator_reason(runner.backend or "", self.device)
                if reason is not None:
                    raise Unavailable(reason)
                entrant = runner.prepare[case.family](case, given, self.device)
                entry.backend = runner.backend
                entry.errors = errors(entrant.outputs(entrant.call()), truth)
                captured = self.captured(entrant, case)
                if captured is not None:
                    again = errors(captured.outputs(captured.call()), truth)
                    entry.errors = {name: max(error, again[name]) for name, error in entry.errors.items()}
        except (Unavailable, fastseq.BackendError) as reason:
            entry.reason = told(reason)
            return []
        except Exception as error:  # it is out, the others are not
            refused = gpu_attention.unavailable(error) if isinstance(error, RuntimeError) else error
            entry.status = "unavailable" if isinstance(refused, Unavailable) else "refused"
            entry.reason = told(error)
            self.tidy(error)
            return []
        over = {name: error for name, error in entry.errors.items() if not error <= budget[name]}
        if over:
            name = max(over, key=lambda name: over[name] / budget[name])
            entry.status = "refused"
            entry.reason = f"{name} is off by {over[name]:.1e} of its largest value; {budget[name]:.1e} is allowed"
            return []
        entry.status = "checked"
        return [entrant] if captured is None else [entrant, captured]

    def captured(self, entrant: Entrant, case: Case) -> Entrant | None:
        """The same call as a CUDA graph, replayed; None where that cannot be."""
        if not self.graphs or self.device != "cuda" or case.training:
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
            torch.cuda.synchronize()  # raises where more than the capture is broken
            return None

        def replay() -> Any:
            graph.replay()
            return answer

        return Entrant(replay, entrant.outputs, "graph")

    def time(self, case: Case, entrants: Sequence[tuple[Runner, Entrant]], found: Measured) -> None:
        """Blocks in turns, in an order that moves on by one every round; the medians count."""
        cold = isinstance(case, Heads) and case.kind == "decode"
        going, seconds, inner = list(entrants), [[] for _ in entrants], [1 for _ in entrants]  # type: ignore[var-annotated]
        out: dict[int, str] = {}
        clock = self.clock
        assert clock is not None

        def block(n: int, calls: int) -> float | None:
            runner, entrant = going[n]
            try:
                with scope(runner, case):
                    return clock(entrant.call, calls, cold)
            except Exception as error:
                out[n] = told(error)
                self.tidy(error)
                return None

        gc.collect()
        for n, (runner, _) in enumerate(going):
            self.watch(runner.name)
            block(n, 1)
            once = block(n, 2)
            if once is not None:
                inner[n] = max(1, min(MOST_CALLS, math.ceil(self.min_time / ROUNDS / max(once, 1e-7))))
        slowest = max((block(n, 1) or 0.0) for n in range(len(going)))
        rounds = ROUNDS if slowest * ROUNDS <= 10 * self.min_time else FEWEST
        for turn in range(rounds):
            for place in range(len(going)):
                n = (place + turn) % len(going)
                if n not in out and (value := block(n, inner[n])) is not None:
                    seconds[n].append(value)
        for n, (runner, entrant) in enumerate(going):
            entry = found.entries[runner.name]
            if n in out:
                entry.reason = out[n]
                if entry.status != "timed":
                    entry.status = "refused"
            elif len(seconds[n]) >= 2:
                entry.status = "timed"
                entry.timings[entrant.setting] = Timing.of(seconds[n], inner[n])

    def tidy(self, error: BaseException) -> None:
        """Gives memory back after a failure, and raises where the GPU itself does not answer any more."""
        error.__traceback__ = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def scope(runner: Runner, case: Case) -> Iterator[None]:
    """The settings a contestant's calls are made under."""
    backend = fastseq.use_backend(runner.backend) if runner.backend else contextlib.nullcontext()
    with backend, gpu_recurrent.in_role(runner.role), torch.set_grad_enabled(case.training):
        yield


def told(error: BaseException) -> str:
    """An error in one line."""
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return text if isinstance(error, Unavailable | fastseq.BackendError) else f"{kind}: {text[:300]}"

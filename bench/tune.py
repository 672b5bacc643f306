"""Which tiles of the Triton attention kernels are the fastest on this GPU: candidates compiled, checked, and timed.

Processes on all processors compile candidates, the most promising of every role and width first; one more process
times what is compiled: each alone, after its answer was held against that of the tile in force. What does not compile,
does not fit or is wrong stays in the report with its reason. A process that crashes or hangs is begun anew. The tiles
themselves are in kernels/tuning_attention.py; nothing here changes them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench import gpu_attention
from bench.gpu_cases import Heads, decode, dense
from bench.gpu_report import surroundings
from bench.gpu_run import EventClock, HostClock, told
from bench.report import write_json

ROLES = ("forward", "backward_keys", "backward_queries", "decode")
WIDTHS = (64, 128, 256)
NO_GPU, INTERRUPTED = 2, 130
PRODUCTS = {"forward": 2, "backward_keys": 4, "backward_queries": 3, "decode": 2}
"""Products of tiles that a role's kernel makes."""
SPILLED = 256
"""Bytes that a thread may spill before a candidate is not worth timing."""
TOLERANCE = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 2.0**-18}
"""Difference from the answer of the tile in force, of its largest value."""
PATIENCE = {"compile": 60.0, "measure": 25.0}
"""Seconds after which a process that gives no answer is taken to hang."""


# --- candidates -------------------------------------------------------------------------------------------------------


def cases(role: str, width: int, tiny: bool) -> list[Heads]:
    """What a role is timed on."""
    mode = "backward" if role.startswith("backward") else "forward"
    if tiny:
        decoding = Heads("forward", "float32", "decode", 1, 4, 2, 1, 96, 16)
        return [decoding if role == "decode" else Heads(mode, "float32", "dense", 1, 2, 1, 40, 40, 16, True)]
    if role == "decode":
        return [decode("bfloat16", 16, length, width) for length in (8192, 65536) if length * width <= 65536 * 128]
    if width == 128:
        return [dense(mode, "bfloat16", 8192, 128, causal) for causal in (False, True)]
    return [dense(mode, "bfloat16", 4096, width, True)]


Row = tuple[int, ...]
"""Queries, keys, warps, stages; then registers, where they are limited."""

_FORWARD: dict[int, list[Row]] = {
    64: [(128, 128, 8, 2), (128, 128, 8, 3), (64, 128, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3),
         (128, 128, 8, 2, 128), (128, 64, 8, 3, 128), (128, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 4)],
    128: [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2, 128), (64, 128, 4, 2), (128, 64, 8, 4),
          (64, 64, 4, 3), (64, 64, 4, 2, 168), (128, 64, 4, 2), (128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 4, 3),
          (128, 32, 8, 4)],
    256: [(128, 64, 8, 2), (128, 32, 8, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2),
          (128, 64, 8, 1), (64, 64, 8, 2)],
}  # fmt: skip
_KEYS: dict[int, list[Row]] = {
    64: [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 8, 3), (128, 128, 8, 2),
         (32, 128, 4, 2), (64, 128, 4, 2), (32, 64, 4, 3), (128, 64, 4, 2)],
    128: [(64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2),
          (32, 64, 4, 2), (64, 64, 4, 1), (32, 64, 4, 3), (16, 128, 8, 3), (64, 64, 8, 3), (128, 64, 8, 2),
          (64, 128, 8, 3), (128, 64, 8, 1)],
    256: [(32, 64, 8, 2), (64, 64, 8, 1), (32, 64, 8, 1), (64, 64, 8, 2), (16, 64, 8, 2), (32, 64, 4, 1),
          (32, 128, 8, 1), (16, 64, 4, 2)],
}  # fmt: skip
_QUERIES: dict[int, list[Row]] = {
    64: [(128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 4),
         (64, 64, 4, 2), (128, 128, 8, 3)],
    128: [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
          (128, 32, 8, 3), (64, 32, 4, 3), (128, 128, 8, 1), (64, 128, 8, 2), (128, 64, 4, 2)],
    256: [(128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 1), (128, 32, 8, 1), (128, 64, 8, 1), (64, 64, 8, 2),
          (64, 32, 8, 3), (128, 64, 8, 2)],
}  # fmt: skip
_DECODE: list[Row] = [  # then: programs in all
    (16, 128, 4, 3, 512), (16, 64, 4, 3, 1024), (16, 64, 4, 4, 512), (16, 128, 4, 2, 512), (16, 64, 2, 3, 1024),
    (16, 32, 1, 4, 2048), (16, 128, 8, 3, 512), (16, 128, 4, 3, 1024), (16, 64, 4, 3, 2048), (16, 32, 2, 4, 1024),
    (16, 64, 4, 3, 512), (16, 128, 4, 4, 256), (16, 64, 2, 4, 2048), (16, 32, 4, 4, 1024), (16, 128, 4, 2, 1024),
    (16, 64, 2, 4, 1024), (16, 64, 4, 5, 512), (16, 32, 1, 6, 1024), (16, 128, 4, 4, 128), (16, 256, 8, 2, 256),
]  # fmt: skip


def candidates(role: str, width: int, tiny: bool) -> Iterator[dict[str, int]]:
    """Fields of tiles, the most promising first; the first of all, with none, is the tile in force."""
    yield {}
    if tiny:
        yield {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1}
        return
    names = ("block_m", "block_n", "num_warps", "num_stages", "registers")
    if role == "decode":
        for row, tma in product(_DECODE, (True, False)):
            yield dict(zip((*names[:4], "programs"), row, strict=True)) | {"tma": tma}
        return
    rows = {"forward": _FORWARD, "backward_keys": _KEYS, "backward_queries": _QUERIES}[role][width]
    ways: list[dict[str, int]] = [{"tma": True, "ahead": True}, {"tma": True}, {}]
    first = (len(rows) + 1) // 2
    for some, way in product((rows[:first], rows[first:]), ways):
        for row in some:
            yield dict(zip(names, row, strict=False)) | way
    if role == "forward":
        for row, ahead in product(rows[:3], (True, False)):
            yield dict(zip(names, row, strict=False)) | {"tma": True, "ahead": ahead, "persistent": 8 // row[2]}


@dataclasses.dataclass
class Candidate:
    """A tile of a role for heads of ``width`` features, and what became of it."""

    role: str
    width: int
    tile: dict[str, int]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def told(self) -> str:
        fields = {"block_m": "", "block_n": "x", "num_warps": " warps ", "num_stages": " stages ",
                  "registers": " registers ", "programs": " programs ", "persistent": " persistent "}  # fmt: skip
        tile = self.found.get("tile", self.tile)
        text = "".join(f"{label}{tile[name]}" for name, label in fields.items() if tile.get(name))
        text += " TMA" * bool(tile.get("tma")) + " ahead" * bool(tile.get("ahead"))
        return text + " (in force)" * (not self.tile)


# --- in the processes -------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Prepared:
    """A call, the launches of a role as its tile now is, what they fill, and that by the tile in force."""

    x: Any
    plans: Callable[[], list[Any]]
    results: list[torch.Tensor]
    truth: list[torch.Tensor] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        for plan in self.plans():
            plan.run()


class Bench:
    """What a process keeps from one request to the next: the inputs of every case it was asked about."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.clock = EventClock() if device == "cuda" else HostClock()
        self.kept: dict[tuple[str, str], Prepared] = {}

    def prepared(self, case: Heads, role: str) -> Prepared:
        if (role, case.name) not in self.kept:
            self.kept[role, case.name] = self.problem(case, role)
        return self.kept[role, case.name]

    def problem(self, case: Heads, role: str) -> Prepared:
        from fastseq.kernels import attention_launch as launch
        from fastseq.kernels.attention_problem import Problem

        given = gpu_attention.inputs(case, self.device)
        options: list[Any] = [*[None] * 9, case.dim**-0.5, case.causal, True, case.window or -1, -1, 0.0, 0.0]
        x = Problem(given.q, given.k, given.v, *options)
        o = torch.empty_like(given.q)
        lse = torch.empty(launch.row_sizes(x), dtype=torch.float32, device=self.device)
        if not case.training:
            return Prepared(x, lambda: list(launch.plan_forward(x, o, lse)), [o])
        for plan in launch.plan_forward(x, o, lse):
            plan.run()
        out = launch.allocate(x, False)
        delta, *_ = launch.plan_backward(x, o, given.d_o, lse, None, out)
        delta.run()

        def plans() -> list[Any]:
            made = list(launch.plan_backward(x, o, given.d_o, lse, None, out))
            return [plan for plan in made if plan.kernel.__name__ == f"attention_{role}"]

        return Prepared(x, plans, [out.dk, out.dv] if role == "backward_keys" else [out.dq])

    def tile(self, x: Any, role: str, fields: dict[str, int]) -> Any:
        from fastseq.kernels.tuning_attention import Tile

        return Tile(**fields) if fields else x.tile(role, True)  # type: ignore[arg-type]

    def compile(self, case: Heads, role: str, fields: dict[str, int]) -> dict[str, Any]:
        """Compile into the cache that launches read; what the compiler says."""
        from fastseq.kernels import tuning_attention

        if self.device != "cuda":
            return {}
        small = dataclasses.replace(case, batch=1, queries=min(case.queries, 256), keys=min(case.keys, 256))
        own = self.prepared(small, role)  # any length of a case has its code
        tile = self.tile(own.x, role, fields)
        found: dict[str, Any] = {"tile": tile._asdict()}
        begun = time.perf_counter()
        with tuning_attention.forced(role, tile):
            for plan in own.plans():
                if plan.kernel.__name__ == "attention_merge":
                    continue
                made = plan.kernel.warmup(grid=(plan.grid,), **plan.arguments, **plan.options)
                made._init_handles()
                found |= {"registers": made.n_regs, "spilled": made.n_spills, "shared": made.metadata.shared}
        found["seconds"] = time.perf_counter() - begun
        if found["spilled"] > SPILLED:
            found["reason"] = f"{found['spilled']} bytes spilled"
        return found

    def measure(self, case: Heads, role: str, fields: dict[str, int], min_time: float) -> dict[str, Any]:
        """Seconds of the role's launches, once their answer is that of the tile in force."""
        from fastseq.kernels import tuning_attention

        own = self.prepared(case, role)
        if not own.truth:
            own.run()
            own.truth = [t.clone() for t in own.results]
        tile = self.tile(own.x, role, fields)
        with tuning_attention.forced(role, tile):
            for result in own.results:
                result.fill_(torch.nan)
            own.run()
            for result, truth in zip(own.results, own.truth, strict=True):
                error = ((result.float() - truth.float()).abs().max() / truth.abs().max()).item()
                if not error <= TOLERANCE[case.dtype]:
                    return {"reason": f"off by {error:.1e} in {case.name}", "tile": tile._asdict()}
            call = self.captured(own.run)
            cold = case.kind == "decode" and self.device == "cuda"
            once = self.clock(call, 2, cold)
            calls = max(1, min(200, int(min_time / 3 / max(once, 1e-7))))
            seconds = sorted(self.clock(call, calls, cold) for _ in range(3))
        work = PRODUCTS[role] * 2 * case.dim * case.pairs * case.heads
        entry = {"seconds": seconds[1], "least": seconds[0], "tflops": work / seconds[1] / 1e12}
        if case.kind == "decode":
            entry["gb_s"] = case.bytes / seconds[1] / 1e9
        return {"tile": tile._asdict(), "cases": {case.name: entry}}

    def captured(self, run: Callable[[], None]) -> Callable[[], object]:
        """The launches without their host's time."""
        if self.device != "cuda":
            return run
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def serve(device: str, pipe: Connection) -> None:
    """Answer requests (what to do, its arguments) until there are no more, or the GPU does not answer."""
    torch.set_num_threads(1)
    bench = Bench(device)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            what, arguments = pipe.recv()
            try:
                answer = getattr(bench, what)(*arguments)
                broken = False
            except Exception as error:
                answer, broken = {"reason": told(error)}, "CUDA" in f"{type(error).__name__} {error}"
            pipe.send(answer)
            if broken:
                return


class Helper:
    """A process that answers one request at a time, and is begun anew when it was lost or hung."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.process: multiprocessing.process.BaseProcess | None = None

    def ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        if self.process is None or not self.process.is_alive():
            self.end()
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(self.device, theirs), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send((what, arguments))
            if self.pipe.poll(PATIENCE[what]):
                found: dict[str, Any] = self.pipe.recv()
                return found
            reason = f"no answer in {PATIENCE[what]:.0f} s"
        except (EOFError, OSError):
            reason = "the process was lost"
        self.end()
        return {"reason": f"{what}: {reason}"}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# --- the run ----------------------------------------------------------------------------------------------------------


def interleaved(roles: Sequence[str], widths: Sequence[int], tiny: bool) -> list[Candidate]:
    """All candidates, a few of each role and width at a time, so that a run that is cut short has tried each."""
    groups = [
        [Candidate(role, width, tile) for tile in candidates(role, width, tiny)]
        for width, role in product(widths, roles)
        if cases(role, width, tiny)
    ]
    pieces = [[group[n : n + 6] for n in range(0, len(group), 6)] for group in groups]
    return [one for turn in zip_longest(*pieces, fillvalue=[]) for piece in turn for one in piece]


def tune(options: argparse.Namespace, until: float, done: Callable[[Candidate], None]) -> bool:
    """Compile and time until the candidates or the time end; False where it was cut short."""
    planned = interleaved(options.role, options.width, options.tiny)
    waiting: queue.SimpleQueue[Candidate] = queue.SimpleQueue()
    compiled: queue.PriorityQueue[tuple[int, Candidate]] = queue.PriorityQueue()
    place = {id(candidate): n for n, candidate in enumerate(planned)}
    for candidate in planned:
        waiting.put(candidate)
    helpers = [Helper(options.device) for _ in range(options.jobs + 1)]

    def work(helper: Helper) -> None:
        with contextlib.suppress(queue.Empty):
            while time.monotonic() < until:
                candidate = waiting.get_nowait()
                case = cases(candidate.role, candidate.width, options.tiny)[0]
                candidate.found |= helper.ask("compile", case, candidate.role, candidate.tile)
                compiled.put((place[id(candidate)], candidate))
        helper.end()

    threads = [threading.Thread(target=work, args=(helper,), daemon=True) for helper in helpers[1:]]
    for thread in threads:
        thread.start()
    left = len(planned)
    try:
        while left and time.monotonic() < until:
            try:
                _, candidate = compiled.get(timeout=0.2)
            except queue.Empty:
                continue
            left -= 1
            for case in cases(candidate.role, candidate.width, options.tiny):
                if "reason" not in candidate.found and time.monotonic() < until:
                    answer = helpers[0].ask("measure", case, candidate.role, candidate.tile, options.min_time)
                    timings = candidate.found.get("cases", {}) | answer.pop("cases", {})
                    candidate.found |= answer | {"cases": timings}
            done(candidate)
    finally:
        for helper in helpers:
            with contextlib.suppress(Exception):
                helper.end()
    return not left


def report(tried: Sequence[Candidate], tiny: bool) -> list[str]:
    """For each role, width and case the tiles by their time, and what was not timed and why."""
    lines = []
    for role, width in dict.fromkeys((c.role, c.width) for c in tried):
        own = [c for c in tried if (c.role, c.width) == (role, width)]
        for case in cases(role, width, tiny):
            timed = [(c, c.found["cases"][case.name]) for c in own if case.name in c.found.get("cases", {})]
            lines.append(f"{role}, {case.name}")
            for c, entry in sorted(timed, key=lambda pair: pair[1]["seconds"]):
                rate = f"{entry['gb_s']:7.0f} GB/s" if "gb_s" in entry else f"{entry['tflops']:7.1f} TFLOP/s"
                used = f"{c.found.get('registers', 0)} registers, {c.found.get('shared', 0) >> 10} KiB"
                spilled = f", {c.found['spilled']} bytes spilled" if c.found.get("spilled") else ""
                lines.append(f"  {entry['seconds'] * 1e6:9.1f} µs {rate}  {c.told()}  [{used}{spilled}]")
        lines += [f"  not timed: {c.told()}: {c.found['reason']}" for c in own if "reason" in c.found]
    return lines


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m bench tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("what", choices=("attention",))
    out.add_argument("--role", nargs="+", choices=ROLES, default=ROLES, help="default: all of them")
    out.add_argument("--width", nargs="+", type=int, choices=WIDTHS, default=[128, 64, 256], help="features of a head")
    out.add_argument("--minutes", type=float, default=2.0, help="for all of it (default: %(default)s)")
    out.add_argument("--out", type=Path, metavar="FILE", help="write everything measured, as JSON")
    out.add_argument("--min-time", type=float, default=0.06, help="seconds for each candidate of a case")
    out.add_argument("--jobs", type=int, default=max(1, min(16, (os.cpu_count() or 2) - 1)), help="compile at a time")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                     help="cpu: to try the command itself, with TRITON_INTERPRET=1 and --tiny")  # fmt: skip
    out.add_argument("--tiny", action="store_true", help="two tiles on small cases")
    return out


def main(argv: list[str]) -> int:
    """Entry point; 2 without a GPU, 130 where it was stopped."""
    options = parser().parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("python -m bench tune: torch finds no GPU on this machine", file=sys.stderr)
        return NO_GPU
    until = time.monotonic() + 60 * options.minutes
    environment = surroundings(options.device, None)
    tried: list[Candidate] = []

    def write(complete: bool) -> None:
        if options.out is not None:
            results = [{"role": c.role, "width": c.width, "in_force": not c.tile, **c.found} for c in tried]
            write_json(options.out, {"environment": environment, "complete": complete, "results": results})

    def done(candidate: Candidate) -> None:
        tried.append(candidate)
        write(False)

    complete = interrupted = False
    try:
        complete = tune(options, until, done)
    except KeyboardInterrupt:
        interrupted = True
    write(complete)
    print("\n".join(report(tried, options.tiny)))
    if not complete:
        print("cut short: not every candidate was timed")
    return INTERRUPTED if interrupted else 0

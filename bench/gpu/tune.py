"""Which tiles of the Triton attention kernels are the fastest on this GPU: candidates compiled, checked, and timed.

Processes on all processors compile candidates, the most promising of every role and width first. One more process times
what is compiled, each candidate alone, after its answer was compared with that of the tile in force. A candidate that
does not compile, does not fit or is wrong stays in the report with its reason. A process that crashes or hangs is
replaced. The tiles in force are in kernels/attention/tuning.py; nothing here changes them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, TimeoutError, as_completed
from itertools import product, zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.gpu import attention
from bench.gpu.cases import Heads, decode, dense
from bench.gpu.report import surroundings
from bench.gpu.run import clock_of, told
from bench.report import write_json
from fastseq import cli
from fastseq.attn.call import AttentionCall

ROLES = ("forward", "backward_keys", "backward_queries", "decode")
WIDTHS = (64, 128, 256)
NO_GPU = 2
PRODUCTS = {"forward": 2, "backward_keys": 4, "backward_queries": 3, "decode": 2}
"""Products of tiles in a role's kernel."""
SPILLED = 256
"""Bytes that a thread may spill before a candidate is not worth timing."""
TOLERANCE = {"bfloat16": 2.0**-6, "float16": 2.0**-9, "float32": 2.0**-18}
"""Difference from the answer of the tile in force, of its largest value."""
PATIENCE = {"start": 120.0, "compile": 60.0, "measure": 25.0}
"""Seconds after which a process without an answer is assumed to hang."""


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


CANDIDATES: dict[tuple[str, int], str] = {
    ("forward", 64): """
        128x64 w4 s3 tma ahead; 128x64 w4 s3 tma; 64x64 w4 s3 tma ahead; 64x64 w4 s2 tma ahead; 128x64 w8 s2 r128 tma;
        128x64 w4 s2 tma ahead; 128x64 w4 s4 tma ahead; 64x128 w4 s2 tma ahead; 64x64 w4 s3 tma; 128x64 w4 s3 ahead;
        128x128 w8 s2 r128 tma; 128x64 w4 s4 tma; 128x128 w8 s3; 128x32 w4 s4 tma ahead; 64x64 w4 s3 r128 tma""",
    ("forward", 128): """
        128x64 w8 s2 r128 tma; 64x64 w4 s2 tma ahead; 64x64 w4 s2 r168 tma ahead; 64x32 w4 s3 tma ahead;
        128x64 w8 s2 r128 tma p2; 128x32 w8 s3 r128 tma; 128x64 w8 s3 tma ahead; 128x128 w8 s2 tma ahead;
        64x64 w4 s2 r168 tma; 64x32 w4 s4 tma; 128x64 w4 s2 tma ahead; 128x128 w8 s2 tma; 128x64 w8 s3 tma;
        128x64 w8 s3""",
    ("forward", 256): """
        128x64 w8 s2 tma ahead; 128x64 w8 s2 tma; 64x32 w4 s2 tma ahead; 64x32 w4 s2 tma;
        128x32 w8 s3 tma ahead; 128x32 w8 s3 tma; 64x64 w8 s2 tma""",
    ("backward_keys", 64): """
        64x64 w4 s3 tma; 64x64 w4 s2 tma; 128x64 w4 s2 tma; 64x64 w4 s3 r168 tma; 128x128 w8 s2 tma; 32x64 w4 s3 tma;
        64x128 w8 s3 tma; 64x64 w4 s3""",
    ("backward_keys", 128): """
        64x64 w4 s2 tma; 64x64 w4 s2; 32x64 w4 s3 tma; 64x128 w8 s2 tma; 64x128 w8 s3 tma; 64x64 w4 s3 tma;
        32x64 w4 s4 tma; 32x64 w4 s2 r168 tma; 64x128 w8 s2""",
    ("backward_keys", 256): """
        64x64 w8 s2 tma; 32x64 w8 s3 tma; 32x64 w8 s2 tma; 32x64 w8 s2; 32x32 w8 s3 tma; 32x32 w8 s1""",
    ("backward_queries", 64): """
        64x64 w4 s3 tma; 128x64 w8 s3 tma; 128x64 w4 s3 tma; 64x64 w4 s4 tma; 128x64 w8 s4 tma; 128x128 w8 s3 tma;
        64x64 w4 s2 tma; 64x128 w4 s3 tma; 128x64 w8 s2 r128 tma""",
    ("backward_queries", 128): """
        128x64 w8 s3 tma; 64x64 w4 s2 tma; 128x128 w8 s2 tma; 64x32 w4 s3 tma; 128x32 w8 s4 tma; 128x64 w8 s2 tma;
        64x64 w4 s2; 128x64 w8 s3; 128x32 w8 s2 r128 tma""",
    ("backward_queries", 256): """
        128x32 w8 s2; 128x32 w8 s2 tma; 64x64 w8 s2 tma; 64x32 w8 s3 tma; 64x32 w4 s2 tma; 128x64 w8 s1 tma;
        64x64 w4 s1 tma; 128x16 w8 s3 tma; 64x32 w4 s1 tma; 128x16 w8 s2""",
    ("decode", 64): """
        16x128 w4 s3 n384 tma; 16x128 w4 s3 n512; 16x64 w4 s4 n512 tma; 16x128 w4 s3 n512 tma; 16x64 w4 s4 n512;
        16x128 w4 s4 n256 tma; 16x256 w4 s2 n384 tma; 16x64 w4 s6 n512 tma; 16x64 w2 s4 n512 tma; 16x128 w4 s4 n384 tma;
        16x256 w8 s2 n256 tma; 16x128 w4 s2 n512 tma""",
    ("decode", 128): """
        16x64 w4 s4 n256 tma; 16x128 w4 s2 n384 tma; 16x64 w4 s3 n384 tma; 16x128 w4 s2 n512; 16x128 w4 s3 n512 tma;
        16x64 w4 s3 n512 tma; 16x64 w4 s5 n256 tma; 16x64 w4 s3 n384; 16x64 w4 s4 n256; 16x32 w1 s4 n512 tma;
        16x32 w4 s6 n256 tma; 16x64 w2 s4 n256 tma; 16x128 w8 s3 n128 tma; 16x128 w4 s2 n384; 16x64 w4 s3 n1024 tma""",
    ("decode", 256): """
        16x64 w4 s3 n128 tma; 16x32 w4 s4 n256 tma; 16x64 w4 s2 n384 tma; 16x64 w4 s4 n512; 16x128 w8 s2 n128 tma;
        16x64 w4 s3 n256 tma; 16x64 w8 s3 n256 tma; 16x32 w4 s3 n384 tma; 16x64 w4 s2 n384; 16x32 w4 s3 n512""",
}  # fmt: skip
"""Tiles to try, as :func:`tile_of` reads them, the most promising first."""

_NUMBERS = {"w": "num_warps", "s": "num_stages", "r": "registers", "p": "persistent", "n": "programs"}
_SWITCHES = ("tma", "ahead")


def tile_of(text: str) -> dict[str, int]:
    """``128x64 w8 s2 r128 tma ahead``: 128 queries, 64 keys, 8 warps, 2 stages, 128 registers, by TMA, scores ahead."""
    block, *words = text.split()
    block_m, _, block_n = block.partition("x")
    fields: dict[str, int] = {"block_m": int(block_m), "block_n": int(block_n)}
    for word in words:
        if word in _SWITCHES:
            fields[word] = True
        else:
            fields[_NUMBERS[word[0]]] = int(word[1:])
    return fields


def text_of(tile: dict[str, int]) -> str:
    """The inverse of :func:`tile_of`."""
    numbers = [f"{letter}{tile[name]}" for letter, name in _NUMBERS.items() if tile.get(name)]
    switches = [name for name in _SWITCHES if tile.get(name)]
    return " ".join([f"{tile['block_m']}x{tile['block_n']}", *numbers, *switches])


def candidates(role: str, width: int, options: argparse.Namespace) -> list[dict[str, int]]:
    """Fields of tiles; the first, with none, is the tile in force."""
    texts = options.tile or ("16x32 w4 s1" if options.tiny else CANDIDATES[role, width]).split(";")
    return [{}, *map(tile_of, texts)]


@dataclasses.dataclass
class Candidate:
    """A tile of a role for heads of ``width`` features, and what became of it."""

    role: str
    width: int
    tile: dict[str, int]
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def told(self) -> str:
        tile = self.found.get("tile", self.tile)
        return (text_of(tile) if tile else "the tile") + " (in force)" * (not self.tile)


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
        self.clock = clock_of(device)
        self.prepared = functools.cache(self.problem)

    def problem(self, case: Heads, role: str) -> Prepared:
        from fastseq.kernels.attention import launch
        from fastseq.kernels.attention.problem import Problem

        given = attention.inputs(case, self.device)
        call = AttentionCall(
            given.q, given.k, given.v, scale=case.dim**-0.5, causal=case.causal, bottom_right=True,
            window_left=case.window or -1,
        )  # fmt: skip
        x = Problem(*call)
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
        from fastseq.kernels.attention.tuning import Tile

        return Tile(**fields) if fields else x.tile(role, True)

    def compile(self, cases: list[Heads], role: str, fields: dict[str, int]) -> dict[str, Any]:
        """Compile into the cache that launches read; what the compiler says."""
        from fastseq.kernels.attention import tuning as tuning_attention

        if self.device != "cuda":
            return {}
        found: dict[str, Any] = {"registers": 0, "spilled": 0, "shared": 0}
        begun = time.perf_counter()
        for case in cases:
            small = dataclasses.replace(case, batch=1, queries=min(case.queries, 256), keys=min(case.keys, 256))
            own = self.prepared(small, role)  # any length of a case has its code
            tile = self.tile(own.x, role, fields)
            found["tile"] = tile._asdict()
            with tuning_attention.forced(role, tile):
                plans = [plan for plan in own.plans() if plan.kernel.__name__ != "attention_merge"]
            for plan in plans:
                made = plan.kernel.warmup(grid=(plan.grid,), **plan.arguments, **plan.options)
                made._init_handles()
                now = {"registers": made.n_regs, "spilled": made.n_spills, "shared": made.metadata.shared}
                found |= {name: max(value, found[name]) for name, value in now.items()}
        found["seconds"] = time.perf_counter() - begun
        if found["spilled"] > SPILLED:
            found["reason"] = f"{found['spilled']} bytes spilled"
        return found

    def measure(self, case: Heads, role: str, fields: dict[str, int], min_time: float) -> dict[str, Any]:
        """Seconds of the role's launches, once their answer is that of the tile in force."""
        from fastseq.kernels.attention import tuning as tuning_attention

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
            once = self.clock(call, 2, cold) / 2
            calls = max(1, min(200, int(min_time / 3 / max(once, 1e-7))))
            seconds = sorted(self.clock(call, calls, cold) / calls for _ in range(3))
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
        pipe.send({"reason": ""})  # it is ready
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
    """A process that answers one request at a time, and is replaced if it is lost or hangs."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.process: multiprocessing.process.BaseProcess | None = None

    def ask(self, what: str, *arguments: Any) -> dict[str, Any]:
        try:
            if self.process is None or not self.process.is_alive():
                self.end()
                context = multiprocessing.get_context("spawn")
                self.pipe, theirs = context.Pipe()
                self.process = context.Process(target=serve, args=(self.device, theirs), daemon=True)
                self.process.start()
                theirs.close()
                self.answer("start")
            self.pipe.send((what, arguments))
            return self.answer(what)
        except TimeoutError as error:
            reason = str(error)
        except (EOFError, OSError):
            reason = "the process was lost"
        self.end()
        return {"reason": f"{what}: {reason}"}

    def answer(self, what: str) -> dict[str, Any]:
        if not self.pipe.poll(PATIENCE[what]):
            raise TimeoutError(f"no answer in {PATIENCE[what]:.0f} s")
        found: dict[str, Any] = self.pipe.recv()
        return found

    def end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.join()


def interleaved(options: argparse.Namespace) -> list[Candidate]:
    """All candidates, a few of each role and width at a time, so that a run that is cut short has tried each."""
    groups = [
        [Candidate(role, width, tile) for tile in candidates(role, width, options)]
        for width, role in product(options.width, options.role)
    ]
    pieces = [[group[n : n + 6] for n in range(0, len(group), 6)] for group in groups]
    return [one for turn in zip_longest(*pieces, fillvalue=[]) for piece in turn for one in piece]


def tune(options: argparse.Namespace, until: float, done: Callable[[Candidate], None]) -> bool:
    """Compile and time until the candidates or the time end; False if it was cut short."""
    planned, left = interleaved(options), 0
    timing, compiling = Helper(options.device), [Helper(options.device) for _ in range(options.jobs)]
    free: queue.SimpleQueue[Helper] = queue.SimpleQueue()
    for helper in compiling:
        free.put(helper)

    def compiled(candidate: Candidate) -> Candidate:
        own, helper = cases(candidate.role, candidate.width, options.tiny), free.get()
        candidate.found |= helper.ask("compile", own, candidate.role, candidate.tile)
        free.put(helper)
        return candidate

    pool = ThreadPoolExecutor(options.jobs)
    try:
        going = [pool.submit(compiled, candidate) for candidate in planned]
        left = len(going)
        for future in as_completed(going, max(0.0, until - time.monotonic())):
            candidate = future.result()
            for case in cases(candidate.role, candidate.width, options.tiny):
                if "reason" not in candidate.found and time.monotonic() < until:
                    answer = timing.ask("measure", case, candidate.role, candidate.tile, options.min_time)
                    timings = candidate.found.get("cases", {}) | answer.pop("cases", {})
                    candidate.found |= answer | {"cases": timings}
            left -= 1
            done(candidate)
    except TimeoutError:
        return False
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for helper in (timing, *compiling):
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
    out.add_argument("--tile", nargs="+", metavar="TEXT", help="only these: '128x64 w8 s2 tma', as the report has them")
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

    def write(complete: bool, last: bool = True) -> None:
        if options.out is not None:
            results = [{"role": c.role, "width": c.width, "in_force": not c.tile, **c.found} for c in tried]
            write_json(options.out, {"environment": environment, "complete": complete, "results": results}, last)

    def done(candidate: Candidate) -> None:
        tried.append(candidate)
        write(False, last=False)

    complete = interrupted = False
    try:
        complete = tune(options, until, done)
    except KeyboardInterrupt:
        interrupted = True
    write(complete)
    print("\n".join(report(tried, options.tiny)))
    if not complete:
        print("cut short: not every candidate was timed")
    return cli.INTERRUPTED if interrupted else 0

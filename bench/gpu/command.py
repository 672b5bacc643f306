"""Tests, sanitizers and timings of the GPU kernels, in minutes; results in bench/results/<device>-*.json.

In this order: the numeric suites with ``--device cuda``, compute-sanitizer over small cases of the CUDA C++ kernels,
and the recurrent and attention cases, each checked before it is timed. Everything on the GPU runs in a process that may
crash, hang or run out of memory: what it was doing is noted, and the rest goes on. Results are written as they come.
Ctrl-C, SIGTERM and the end of the minutes leave whole files of what was done until then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.gpu.cases import FAMILIES, chosen
from bench.gpu.journal import Journal, end, last_line, supervise
from bench.gpu.report import beside_earlier, case_lost, earlier_cases, print_cases, slug, surroundings, timings_document
from bench.gpu.report import tests_document as document_of_tests
from bench.gpu.run import DEFAULT, RUNNERS
from bench.report import RESULTS, ROOT, Document, write_json
from fastseq import cli
from fastseq.backend import operator_reason

PHASES = ("tests", "sanitizer", *FAMILIES)
NO_GPU = 2
SHARE = {"tests": 0.33, "sanitizer": 0.1}
"""Of the time, at most. The timings share the rest equally, and a fifth of each share is for compiling."""
STALL = {"tests": 100.0, "recurrent": 60.0, "attention": 90.0}
"""Seconds of silence after which a child is assumed to hang: a first call may compile for long."""
TOOLS = ("memcheck", "racecheck", "synccheck")


@dataclass
class Run:
    """One run: where results go, until when, and whether it was asked to stop."""

    options: argparse.Namespace
    environment: Document
    until: float
    scratch: Path
    stop: bool = False
    files: list[Path] = field(default_factory=list)
    failed: bool = False

    def path(self, what: str) -> Path:
        return Path(self.options.out) / f"{slug(self.environment['device'])}-{what}.json"

    def write(self, what: str, document: Document) -> None:
        path = self.path(what)
        write_json(path, document)
        if path not in self.files:
            self.files.append(path)

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def supervise(
        self, command: list[str], journal: Journal, until: float, stall: float, changed: Callable[[], None],
        fine: Sequence[int] = (0,),
    ) -> str:  # fmt: skip
        log = journal.path.with_suffix(".log")
        return supervise(command, journal, log, until, stall, changed, lambda: self.stop, ROOT, fine)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A child that is not supervised."""
        with log.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=ROOT)

    def wait(self, children: Sequence[subprocess.Popen[bytes]], until: float) -> list[subprocess.Popen[bytes]]:
        """Until all have ended, or the time is up or the run is asked to stop; returns those ended then."""
        try:
            while any(child.poll() is None for child in children) and time.monotonic() < until and not self.stop:
                time.sleep(0.1)
        finally:
            late = [child for child in children if child.poll() is None]
            for child in late:
                end(child)
        return late


def suites() -> list[str]:
    """The test files that have something to run on a GPU; not those that schedule the interpreter's own programs."""
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text()
        marked = "needs_interpreter" in text or "mark.device" in text
        if marked and "_schedule import" not in text and file.name != "test_devices.py":
            found.append(str(file.relative_to(ROOT)))
    return found


def suites_of(kernels: str, device: str, files: Sequence[str]) -> list[str]:
    """Those of ``files`` whose operators ``kernels`` have on a device; the emulated suites are for CUDA C++ alone."""

    def there(file: str) -> bool:
        op = "attention_forward" if "attention" in file else "normed_forward" if "norm" in file else "scan_forward"
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastseq::{op}.{kernels}", device.upper())
        return registered and (kernels == "native" or "test_cuda_" not in file)

    return [file for file in files if there(file)]


def tests(run: Run, until: float) -> None:
    """Every suite, on each backend that is there, side by side: Triton's tests mostly wait for its compiler."""
    device = run.options.device
    parts: dict[str, Document] = {}
    lock = threading.Lock()

    def suite(kernels: str, share: float) -> None:
        files = suites_of(kernels, device, run.options.test or suites())
        if not files:
            parts[kernels] = {"reason": "their operators are not registered", "tests": {}, "lost": []}
            return
        journal = Journal(run.scratch / f"tests-{kernels}.jsonl")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-p", "bench.gpu.record", "--journal", str(journal.path), "--device", device, "--kernels", kernels]
        workers = min(10, int((os.cpu_count() or 2) * share))
        if importlib.util.find_spec("xdist") is not None and workers > 1:
            command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "20"]

        def changed() -> None:
            done = {name: line["outcome"] for name, line in journal.done().items()}
            failures = [line for line in journal.done().values() if line["outcome"] == "failed"]
            with lock:
                parts[kernels] = {"reason": "", "tests": done, "failures": failures, "lost": journal.lost()}
                run.write("tests", document_of_tests(parts, run.environment, False))

        fine = (0, 1, 5)  # pytest's statuses: all passed, some failed, none were left to run
        why = run.supervise([*command, *files], journal, until, STALL["tests"], changed, fine)
        with lock:
            parts.setdefault(kernels, {"tests": {}, "lost": []})["reason"] = why

    running = []
    for kernels, share in (("triton", 0.6), ("native", 0.35)):
        reason = operator_reason(kernels, device)
        if reason is not None:
            parts[kernels] = {"reason": reason, "tests": {}, "lost": []}
        else:
            running.append(threading.Thread(target=suite, args=(kernels, share)))
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    complete = not any(part["reason"] for part in parts.values() if "failures" in part)  # of those that are there
    document = document_of_tests(parts, run.environment, complete)
    run.write("tests", document)
    for name, part in document["kernels"].items():
        counts = ", ".join(f"{n} {outcome}" for outcome, n in part["counts"].items()) or "none run"
        print(f"tests of {name}: {counts}" + f" ({part['reason']})" * bool(part["reason"]), flush=True)
        for failure in part["failures"][:20]:
            print(f"  failed: {failure['name']}: {failure['reason'][:200]}")
        run.failed |= bool(part["failures"]) or part["reason"].startswith("the process ended")


def sanitizers(run: Run, until: float) -> None:
    """compute-sanitizer's tools over small cases of the CUDA C++ kernels, side by side."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    reason = operator_reason("native", "cuda") or (None if tool else "there is no compute-sanitizer")
    found: Document = {"reason": reason or "", "tools": {}}
    if reason is None:
        going: dict[tuple[str, str], Any] = {}
        options = {"case": [], "tiny": True, "check": True, "contestant": ["native"]}
        for name, family in product(TOOLS, FAMILIES):
            journal = Journal(run.scratch / f"{name}-{family}.jsonl")
            command = [str(tool), "--tool", name, "--error-exitcode", "99"]
            command += worker(run, family, journal.path, until, **options)
            going[name, family] = run.start(command, journal.path.with_suffix(".log")), journal
        ended = run.wait([child for child, _ in going.values()], until)
        for (name, family), (child, journal) in going.items():
            cases = [line["case"] for line in journal.done().values()]
            late = child in ended or (child.returncode == 0 and len(cases) < len(chosen(family, [], True)))
            wrong = [case["name"] for case in cases if case["contestants"]["native"]["status"] == "refused"]
            log = journal.path.with_suffix(".log")
            said = [line for line in log.read_text(errors="replace").splitlines() if "=====" in line]
            status = "out of time" if late else "clean" if child.returncode == 0 and not wrong else "errors"
            said = said[-12:] or [last_line(log)]
            found["tools"][f"{name}, {family}"] = {"status": status, "cases": len(cases), "wrong": wrong, "said": said}
            run.failed |= status == "errors"
    run.write("sanitizer", {"schema": 1, "environment": run.environment, **found})
    told = {name: tool["status"] for name, tool in found["tools"].items()}
    print(f"compute-sanitizer: {reason or told}", flush=True)


def worker(run: Run, family: str, journal: Path, until: float, **more: object) -> list[str]:
    """The command that measures cases of a family; ``more``: options that differ from the run's."""
    names = ("device", "case", "contestant", "min_time", "tiny")
    options = {name: getattr(run.options, name) for name in names} | {"check": False, "warm": ""}
    options |= {"family": family, "journal": str(journal), "until": time.time() + until - time.monotonic()}
    return [sys.executable, "-m", "bench.gpu.worker", json.dumps(options | more)]


def warm(run: Run, family: str, until: float) -> None:
    """Compile what the first cases will call, on all processors at once."""
    count = max(1, min(8, (os.cpu_count() or 2) // 2))
    children = []
    for n in range(count):
        command = worker(run, family, run.scratch / "warm.jsonl", until, warm=f"{n}/{count}")
        children.append(run.start(command, run.scratch / f"warm-{family}-{n}.log"))
    run.wait(children, until)


def timings(run: Run, family: str, until: float) -> None:
    """The cases of a family, in the plan's order."""
    if run.options.device == "cuda":
        warm(run, family, time.monotonic() + (until - time.monotonic()) / 5)
    journal = Journal(run.scratch / f"{family}.jsonl")
    planned = len(chosen(family, run.options.case, run.options.tiny))
    before = earlier_cases(run.path(family), run.environment)

    def cases() -> list[Document]:
        found = [line["case"] for line in journal.done().values()]
        known = {case["name"] for case in found}
        return found + [case_lost(line) for line in journal.lost() if line["name"] not in known]

    def write(why: str = "the run is not over") -> None:
        run.write(family, timings_document(beside_earlier(cases(), before), run.environment, planned, why))

    why = run.supervise(worker(run, family, journal.path, until), journal, until + 10, STALL[family], write)
    if not why and len(cases()) < planned:
        why = "out of time"
    write(why)
    done = timings_document(cases(), run.environment, planned, why)
    print_cases(done, {name: runner.label for name, runner in RUNNERS.items()})
    for case in done["cases"]:
        wrong = [name for name, entry in case["contestants"].items() if entry["status"] == "refused"]
        run.failed |= any(RUNNERS[name].backend is not None for name in wrong)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--only", nargs="+", choices=PHASES, default=PHASES, help="default: all of them")
    out.add_argument("--minutes", type=float, default=8.0, help="for all of it (default: %(default)s)")
    out.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    out.add_argument("--case", nargs="+", default=[], metavar="PART", help="only cases with one of these in their name")
    out.add_argument("--test", nargs="+", default=[], metavar="FILE", help="only these test files, or tests")
    out.add_argument("--contestant", nargs="+", choices=RUNNERS, help="default: all that are installed")
    out.add_argument("--min-time", type=float, default=0.12, help="seconds for each contestant of a case")
    out.add_argument("--plan", action="store_true", help="print the cases in their order and what they may need; end")
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command itself")
    out.add_argument("--tiny", action="store_true", help="a few small cases instead of the plan")
    out.add_argument("--commit", help="of the sources, where there is no repository to ask")
    return out


def print_plan(options: argparse.Namespace) -> None:
    """Each case and the time by which it should be done."""
    for family in [phase for phase in options.only if phase in FAMILIES]:
        share = sum(SHARE[phase] for phase in options.only if phase in SHARE)
        budget = options.minutes * 60 * (1 - share) / len([p for p in options.only if p in FAMILIES]) * 0.8
        at, inside = 0.0, 0
        cases: list[Any] = chosen(family, options.case, options.tiny)
        for n, case in enumerate(cases, 1):
            at += case.seconds
            inside += at <= budget
            print(f"{n:6} {at:7.0f} s {'' if at <= budget else 'later':6}{case.name}")
        print(f"{family}: {len(cases)} cases, of which about {inside} fit into {budget:.0f} s")


@contextlib.contextmanager
def signals(run: Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the run to stop; it then writes the results so far."""

    def stop(number: int, frame: FrameType | None) -> None:
        run.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str]) -> int:
    """Entry point; 2 without a GPU, 1 if a test failed or an answer was wrong, 130 if it was stopped."""
    options = parser().parse_args(argv)
    if options.plan:
        print_plan(options)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        said = "torch finds no GPU on this machine (torch.cuda.is_available() is False)"
        print(f"python -m bench gpu: {said}", file=sys.stderr)
        return NO_GPU
    options.contestant = options.contestant or DEFAULT[options.device]
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="fastseq-gpu-") as scratch:
        run = Run(options, surroundings(options.device, options.commit), until, Path(scratch))
        environment = run.environment
        print(f"{environment['device']}, driver {environment['driver']}, torch {environment['versions']['torch']}, "
              f"commit {environment['commit']}", flush=True)  # fmt: skip
        with signals(run):
            phases = [phase for phase in PHASES if phase in options.only]
            for n, phase in enumerate(phases):
                if run.stop or run.left < 5:
                    break
                begun = time.monotonic()
                if phase in SHARE:
                    alone = len(phases) == 1
                    own = run.until if alone else min(run.until, begun + SHARE[phase] * 60 * options.minutes)
                    (tests if phase == "tests" else sanitizers)(run, own)
                else:
                    timings(run, phase, begun + run.left / (len(phases) - n) - 5)
                print(f"{phase}: {time.monotonic() - begun:.0f} s", flush=True)
    for path in run.files:
        print(path)
    return cli.INTERRUPTED if run.stop else int(run.failed)

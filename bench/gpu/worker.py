"""The process that measures, and may be lost: ``python -m bench.gpu.worker``, which ``python -m bench gpu`` runs.

It takes the cases in the plan's order and writes each result to the journal. ``--warm I/N`` only calls every contestant
of every N-th case once, so that what is compiled at the first call is in the compilers' caches.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import FAMILIES, chosen
from bench.gpu.journal import Journal
from bench.gpu.run import DEFAULT, RUNNERS, Bench, EventClock, HostClock, Measured, gpu_attention, gpu_recurrent, scope
from bench.report import entry_document
from bench.run import Entry

TRIES = 3
"""How often a case is begun again, each time without the contestant that was running when it was lost."""


def given_up(lost: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Who takes no further part, and why: whoever hung once, which costs a minute a time, or was lost TRIES times."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lost:
        if line["at"]:
            found.setdefault(line["at"], []).append(line)
    return {
        name: f"left out since it was lost in {lines[-1]['name']}: {lines[-1]['reason']}"
        for name, lines in found.items()
        if len(lines) >= TRIES or any(line["hung"] for line in lines)
    }


def document(found: Measured) -> dict[str, Any]:
    """A result as plain data: as bench/report.py has it, with rates of each contestant and ratios of each of ours."""
    case: Any = found.case
    contestants = {}
    for name, entry in found.entries.items():
        contestants[name] = entry_document(entry)
        if entry.timing:
            contestants[name]["tflops"] = case.operations / entry.timing.median / 1e12
            if case.bytes is not None:
                contestants[name]["gb_s"] = case.bytes / entry.timing.median / 1e9
    peers = [name for name in found.entries if RUNNERS[name].backend is None]
    return {
        "name": case.name,
        "group": case.group,
        "family": case.family,
        "shape": dataclasses.asdict(case),
        "operations": case.operations,
        "bytes": case.bytes,
        "budget": {name: value if value < float("inf") else None for name, value in found.budget.items()},
        "reason": found.reason,
        "contestants": contestants,
        "ratios": {
            name: {peer: found.ratio(name, peer) for peer in (*peers, "best")}
            for name in found.entries
            if RUNNERS[name].backend is not None
        },
    }


def work(options: argparse.Namespace) -> None:
    """Measure until the time is up or the cases are."""
    journal = Journal(options.journal)
    finished, lost = journal.done(), journal.lost()
    left_out = given_up(lost)
    clock = None if options.check else EventClock() if options.device == "cuda" else HostClock()
    for case in chosen(options.family, options.case, options.tiny):
        if time.time() >= options.until:
            return
        gone = [line for line in lost if line["name"] == case.name]
        if case.name in finished or len(gone) >= TRIES or any(not line["at"] for line in gone):
            continue
        without = {line["at"]: Entry("refused", line["reason"]) for line in gone}
        without = {name: Entry("unavailable", why) for name, why in left_out.items()} | without
        journal.write("start", case.name)
        names = [name for name in options.contestant if name not in without]
        bench = Bench(options.device, names, clock, options.min_time, watch=journal.now_at)
        found = bench.measure(case)
        found.entries |= {name: entry for name, entry in without.items() if name in options.contestant}
        journal.write("done", case.name, case=document(found))


def warm(options: argparse.Namespace) -> None:
    """Call every contestant once, whatever comes of it."""
    first, step = map(int, options.warm.split("/"))
    module: Any = gpu_recurrent if options.family == "recurrent" else gpu_attention
    for case in chosen(options.family, options.case, options.tiny)[first::step]:
        given = module.inputs(case, options.device)
        for name in options.contestant:
            runner = RUNNERS[name]
            if time.time() >= options.until:
                return
            if case.family in runner.prepare and (runner.backend == "triton" or name == "flex"):
                try:
                    with scope(runner, case):
                        runner.prepare[case.family](case, given, options.device).call()
                except Exception as error:  # measured later, where it is reported
                    print(f"{case.name}, {name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench.gpu.worker", description=__doc__)
    out.add_argument("family", choices=FAMILIES)
    out.add_argument("--journal", type=Path, required=True)
    out.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    out.add_argument("--until", type=float, default=float("inf"), help="seconds since 1970")
    out.add_argument("--case", nargs="*", default=[])
    out.add_argument("--contestant", nargs="*", default=[])
    out.add_argument("--min-time", type=float, default=0.12)
    out.add_argument("--tiny", action="store_true", help="a few small cases instead of the plan")
    out.add_argument("--check", action="store_true", help="compare answers, and time nothing")
    out.add_argument("--warm", metavar="I/N")
    return out


if __name__ == "__main__":
    arguments = parser().parse_args()
    arguments.contestant = arguments.contestant or DEFAULT[arguments.device]
    torch.set_num_threads(max(1, min(4, torch.get_num_threads())))
    warm(arguments) if arguments.warm else work(arguments)

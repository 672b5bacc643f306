"""The process that measures, and may be lost: ``python -m bench gpu`` starts it with its options as JSON.

It takes the cases in the plan's order and writes each result to the journal. ``warm`` (``I/N``): it only calls every
contestant of every N-th case once, so that what is compiled at the first call is in the compilers' caches. ``check``:
it compares answers, and times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import chosen
from bench.gpu.journal import Journal
from bench.gpu.run import MODULES, RUNNERS, Bench, clock_of
from bench.report import Document, measured_case
from bench.run import Entry, Result

TRIES = 3
"""How often a case is started again, each time without the contestant that was running when it was lost."""


def given_up(lost: Sequence[Document]) -> dict[str, str]:
    """Who takes no further part, and why: a contestant that hung once, which costs a minute each time, or was lost
    TRIES times."""
    found: dict[str, list[Document]] = {}
    for line in lost:
        if line["at"]:
            found.setdefault(line["at"], []).append(line)
    return {
        name: f"left out since it was lost in {lines[-1]['name']}: {lines[-1]['reason']}"
        for name, lines in found.items()
        if len(lines) >= TRIES or any(line["hung"] for line in lines)
    }


def document(found: Result) -> Document:
    """A result as plain data, with rates of each contestant and ratios of each of ours."""
    case: Any = found.case
    out = measured_case(found) | {"operations": case.operations, "bytes": case.bytes, "reason": found.reason}
    for name, entry in found.entries.items():
        if entry.timing:
            out["contestants"][name]["tflops"] = case.operations / entry.timing.median / 1e12
            if case.bytes is not None:
                out["contestants"][name]["gb_s"] = case.bytes / entry.timing.median / 1e9
    return out | {"ratios": {name: found.ratios(name) for name in found.entries if name in found.ours}}


def work(options: argparse.Namespace) -> None:
    """Measure until the time is up or the cases are done."""
    journal = Journal(Path(options.journal))
    finished, lost = journal.done(), journal.lost()
    left_out = given_up(lost)
    clock = None if options.check else clock_of(options.device)
    for case in chosen(options.family, options.case, options.tiny):
        if time.time() >= options.until:
            return
        gone = [line for line in lost if line["name"] == case.name]
        if case.name in finished or len(gone) >= TRIES or any(not line["at"] for line in gone):
            continue
        without = {name: Entry("unavailable", why) for name, why in left_out.items()}
        without |= {line["at"]: Entry("refused", line["reason"]) for line in gone}
        journal.write("start", case.name)
        names = [name for name in options.contestant if name not in without]
        found = Bench(options.device, names, clock, options.min_time, journal.now_at).measure(case)
        found.entries |= {name: entry for name, entry in without.items() if name in options.contestant}
        journal.write("done", case.name, case=document(found))


def warm(options: argparse.Namespace) -> None:
    """Call every contestant that compiles once, and ignore errors: they are measured and reported later."""
    first, step = map(int, options.warm.split("/"))
    for case in chosen(options.family, options.case, options.tiny)[first::step]:
        given = MODULES[options.family].inputs(case, options.device)
        for runner in (RUNNERS[name] for name in options.contestant):
            if time.time() >= options.until:
                return
            if case.family in runner.prepare and (runner.backend == "triton" or runner.name == "flex"):
                try:
                    with runner.scope(case):
                        runner.prepare[case.family](case, given, options.device).call()
                except Exception as error:
                    print(f"{case.name}, {runner.name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)


if __name__ == "__main__":
    given = argparse.Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(max(1, min(4, torch.get_num_threads())))
    warm(given) if given.warm else work(given)

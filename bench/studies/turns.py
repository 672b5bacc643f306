"""What studies of calls in turns share: their command line, timing, and what they write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from bench.check import Judge
from bench.peers import Contestant
from bench.report import case_document, document, environment, write_json
from bench.run import Entry, Options, Result, Timing, admit, time_in_turns


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=description)
    made.add_argument("--case", nargs="+", default=["*"], metavar="GLOB", help="names of cases (default: all)")
    made.add_argument("--list", action="store_true", help="print the names of the cases chosen, and end")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    made.add_argument("--min-time", type=float, default=1.0, metavar="SECONDS", help="of a contestant of a case")
    made.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, case by case")
    return made


def chosen(given: argparse.Namespace, grid: Sequence[Any]) -> list[Any]:
    """The cases asked for, to be timed. Where they are to be listed, or none is left, that is all."""
    cases = [case for case in grid if any(fnmatchcase(case.name, pattern) for pattern in given.case)]
    if given.list or not cases:
        print("\n".join(case.name for case in cases) or f"no case matches {given.case}")
        raise SystemExit(0 if cases else 2)
    torch.set_num_threads(given.threads)
    return cases


def compare(
    case: Any, inputs: Any, judge: Judge, contestants: Sequence[Contestant], options: Options,
    *beside: Callable[[], Any],
) -> tuple[Result, list[Timing]]:  # fmt: skip
    """Every contestant checked and timed; and the times of the calls `beside` them."""
    result = Result(case, judge.budget, {c.name: Entry() for c in contestants})
    entrants = [(c, e) for c in contestants for e in admit(c, case, inputs, judge, options, result.entries[c.name])]
    timings = time_in_turns([*(entrant.call for _, entrant in entrants), *beside], options.min_time)
    for (contestant, entrant), timing in zip(entrants, timings, strict=False):
        entry = result.entries[contestant.name]
        entry.status, entry.timings[entrant.setting] = "timed", timing
    return result, timings[len(entrants) :]


def conclude(
    given: argparse.Namespace, options: Options, found: Sequence[Result], more: Sequence[dict[str, Any]] = ()
) -> int:
    """Tells of wrong answers and writes the file asked for, `more` being of each case; 1 where an answer was wrong."""
    refused = [(result, name) for result in found for name in result.failed]
    for result, name in refused:
        print(f"{result.case.name}: {name} is refused: {result.entries[name].reason}")
    if given.json is not None:
        documents = [case_document(result) for result in found]
        documents = [made | own for made, own in zip(documents, more, strict=True)] if more else documents
        write_json(given.json, document(documents, options, True, environment(given.threads)), True)
    return 1 if refused else 0

"""A run over many cases: measured one after another, written as they come, and reported at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.cases import Case
from bench.formats import time_of, times
from bench.peers import OURS, Contestant
from bench.progress import Progress
from bench.report import Document, case_document, document, environment, print_report, write_json
from bench.run import Options, measure
from fastseq import cli

REFUSED = 1
"""Exit status: a wrong answer or an error in some case."""


def run(
    cases: Sequence[Case], contestants: Sequence[Contestant], options: Options, json_path: Path | None = None
) -> int:
    """Measure all cases, then report; on Ctrl-C report what was measured. Returns the exit status."""
    environ = environment(options.threads)
    print(
        f"{environ['cpu']}, {environ['instruction_set'] or 'no native kernels'}, {options.threads} threads, "
        f"torch {environ['versions']['torch']}; {len(cases)} cases, each checked before it is timed"
    )
    if environ["load"] > 0.5 * environ["cpus"]:
        print(f"noise: other programs keep this machine busy (load {environ['load']:.1f} at the start)")
    found: list[Document] = []

    def write(last: bool) -> None:
        if json_path is not None:
            write_json(json_path, document(found, options, len(found) == len(cases), environ), last)

    try:
        with Progress(len(cases)) as progress:
            for case in cases:
                progress.begin(case.name)
                found.append(case_document(measure(case, contestants, options)))
                best = found[-1]["ratios"]["best"]
                told = f", {times(best)} the best peer's speed" if best else ""
                progress.done(time_of(found[-1]["contestants"][OURS.name]) + told)
                write(last=len(found) == len(cases))
    except KeyboardInterrupt:
        write(last=True)
    except cli.CannotWrite:
        print_report(document(found, options, False, environ))  # else these results are lost
        raise
    print_report(document(found, options, len(found) == len(cases), environ))
    if len(found) < len(cases):
        print(f"interrupted: {len(found)} of {len(cases)} cases were measured")
        return cli.INTERRUPTED
    refused = any(entry["status"] == "refused" for case in found for entry in case["contestants"].values())
    return REFUSED if refused else 0

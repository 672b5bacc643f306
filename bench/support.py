"""Writes the README's tables of GPUs, and those of docs/gpu.md, from the result files: ``python -m bench support``.

No file, no claim: a kernel of ours stands as run on a GPU only where bench/results holds that GPU's files, and says at
which commit, how many tests passed, and how fast beside the best peer.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import times
from fastseq import cli

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"
SPEED = ("<!-- gpu:begin -->", "<!-- gpu:end -->")
FLOORS = ("<!-- floors:begin -->", "<!-- floors:end -->")


@dataclass(frozen=True)
class Family:
    """Kernels that are claimed together; ``until_run`` is what can be said of them without a GPU."""

    label: str
    backend: str
    cases: str
    sources: str
    tests: str
    until_run: str


_TRITON, _CUDA = "interpreted and compiled", "emulated and compiled"
FAMILIES = (
    Family("Triton, recurrent scan", "triton", "recurrent", "kernels/recurrent*.py", "recurrent", _TRITON),
    Family("Triton, attention", "triton", "attention", "kernels/attention*.py", "attention", _TRITON),
    Family("CUDA C++, recurrent scan", "native", "recurrent", "csrc/cuda/recurrent*.cu", "recurrent", _CUDA),
    Family("CUDA C++, attention", "native", "attention", "csrc/cuda/attention*.cu", "attention", _CUDA),
)


def load(results: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Result files by GPU, and then by what they are: tests, recurrent, attention."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what in ("tests", "recurrent", "attention"):
        for path in sorted(results.glob(f"*-{what}.json")):
            document = json.loads(path.read_text())
            if document["environment"].get("driver") is not None:
                found.setdefault(document["environment"]["device"], {})[what] = document
    return found


def outcomes(tests: dict[str, Any] | None, backend: str, subject: str) -> dict[str, int]:
    """How the tests of a backend's ``recurrent`` or ``attention`` kernels came out, from a file of tests."""
    counts: dict[str, int] = {}
    suites = tests["kernels"].get(backend, {}).get("suites", {}) if tests else {}
    for suite, found in suites.items():
        if subject in suite or ("promises" in suite and subject == "recurrent"):
            for outcome, count in found.items():
                counts[outcome] = counts.get(outcome, 0) + count
    return counts


def cell(family: Family, documents: dict[str, dict[str, Any]]) -> str | None:
    """What the files of one GPU say about a family; None where they say nothing."""
    said = []
    counts = outcomes(documents.get("tests"), family.backend, family.tests)
    ran = {outcome: count for outcome, count in counts.items() if outcome != "skipped"}
    if ran:
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(ran.items(), reverse=True))
        said.append(f"tests: {shown} (at {commit(documents['tests'])})")
    timed = documents.get(family.cases)
    for line in timed["summary"] if timed else ():
        if (line["of"], line["backend"], line["peer"]) == (family.cases, family.backend, "best"):
            worst = f"{times(line['worst'])} `{line['worst_case']}`"
            said.append(
                f"{times(line['geomean'])} the best peer's speed over {line['count']} cases, worst {worst} "
                f"(at {commit(timed or {})}{earlier(timed or {})})"
            )
    return "; ".join(said) or None


def earlier(document: dict[str, Any]) -> str:
    """How many cases of a file were measured at other commits, where some were."""
    before = sum("commit" in case for case in document.get("cases", ()))
    return f", {before} cases at earlier ones" * (before > 0)


def commit(document: dict[str, Any]) -> str:
    """Its environment's, shortened."""
    commit = document["environment"]["commit"] or "an unknown commit"
    return f"{commit[:10]}{' with changes' if commit.endswith('+changes') else ''}"


def table(results: Path, root: Path = ROOT) -> str:
    """The text between the markers."""
    found = load(results)
    devices = sorted(found)
    out = ["| GPU kernels | " + " | ".join(devices or ["hardware"]) + " |"]
    out.append("| --- |" + " --- |" * max(1, len(devices)))
    for family in FAMILIES:
        written = any(root.glob(family.sources))
        nothing = f"{family.until_run}, not yet run on hardware" if written else "not written yet"
        cells = [cell(family, found[device]) or nothing for device in devices] or [nothing]
        out.append(f'| {family.label} (`backend="{family.backend}"`) | ' + " | ".join(cells) + " |")
    return "\n".join(out)


def written(text: str, markers: tuple[str, str], between: str) -> str:
    """``text`` with what is between the markers replaced."""
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    return f"{text[:begin]}\n{between}\n{text[end:]}"


def main(argv: list[str]) -> int:
    """Entry point; 2 where a file cannot be read."""
    from bench.gpu import speed as gpu_speed  # which is made of this

    parser = argparse.ArgumentParser(prog="python -m bench support", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "gpu.md")
    options = parser.parse_args(argv)
    try:
        readme = written(options.readme.read_text(), (BEGIN, END), table(options.results))
        readme = written(readme, SPEED, gpu_speed.speed(options.results))
        docs = written(options.docs.read_text(), FLOORS, gpu_speed.floors(options.results))
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench support: {error}", file=sys.stderr)
        return 2
    cli.write_text(options.readme, readme)
    cli.write_text(options.docs, docs)
    return 0

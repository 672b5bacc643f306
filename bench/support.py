"""Writes the README's table of GPU kernels from the result files: ``python -m bench support``.

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

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


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


def cell(family: Family, documents: dict[str, dict[str, Any]]) -> str | None:
    """What the files of one GPU say about a family; None where they say nothing."""
    said = []
    tests = documents.get("tests", {}).get("kernels", {}).get(family.backend, {})
    counts: dict[str, int] = {}
    for suite, outcomes in tests.get("suites", {}).items():
        if family.tests in suite or ("promises" in suite and family.tests == "recurrent"):
            for outcome, count in outcomes.items():
                counts[outcome] = counts.get(outcome, 0) + count
    ran = {outcome: count for outcome, count in counts.items() if outcome != "skipped"}
    if ran:
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(ran.items(), reverse=True))
        said.append(f"tests: {shown} (at {_commit(documents['tests'])})")
    timed = documents.get(family.cases)
    for line in timed["summary"] if timed else ():
        if (line["of"], line["backend"], line["peer"]) == (family.cases, family.backend, "best"):
            worst = f"{times(line['worst'])} `{line['worst_case']}`"
            said.append(
                f"{times(line['geomean'])} the best peer's speed over {line['count']} cases, worst {worst} "
                f"(at {_commit(timed or {})})"
            )
    return "; ".join(said) or None


def _commit(document: dict[str, Any]) -> str:
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


def main(argv: list[str]) -> int:
    """Entry point; 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench support", description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(argv)
    try:
        text, readme = table(options.results), options.readme.read_text()
        begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench support: {error}", file=sys.stderr)
        return 2
    options.readme.write_text(f"{readme[:begin]}\n{text}\n{readme[end:]}")
    return 0

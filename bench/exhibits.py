"""What a report shows: figures, each with its table, its words and its command; and the result files they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Document = dict[str, Any]

PLAIN_COMMAND = "python -m bench"


@dataclass
class Exhibit:
    """A figure and the same numbers as a table. ``alt`` describes the figure to readers who cannot see it.

    draw: makes the matplotlib Figure, inside ``plots.style``; None for a table alone.
    """

    name: str
    title: str
    alt: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    command: str
    draw: Callable[[], Any] | None = None
    note: str = ""


@dataclass
class Results:
    """Result files by what is in them: name of the file -> what it holds."""

    speed: dict[str, Document] = field(default_factory=dict)
    memory: dict[str, Document] = field(default_factory=dict)
    cost: dict[str, Document] = field(default_factory=dict)
    parallel: dict[str, Document] = field(default_factory=dict)
    regularise: dict[str, Document] = field(default_factory=dict)
    weights: dict[str, Document] = field(default_factory=dict)
    tests: dict[str, Document] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, Document]:
        studies = self.memory | self.cost | self.parallel | self.regularise
        return self.speed | studies | self.weights | self.tests


def measured(document: Document) -> int:
    """How many cases or units a file holds."""
    return len(document.get("results") or document.get("cases") or ())


def load(folder: Path) -> Results:
    """Every ``*.json`` of a folder. A file that cannot be read, or is of no known kind, is listed with the reason."""
    results = Results()
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text())
            kind = kind_of(document)
        except (OSError, ValueError) as error:
            results.unread[path.name] = str(error)
            continue
        found = by_backend(path.name, document) if kind == "speed" else {path.name: document}
        getattr(results, kind).update(found)
    return results


def by_backend(name: str, document: Document) -> dict[str, Document]:
    """A run that timed several of our backends side by side (on a GPU), as one document for each, in which that backend
    is fastseq and the others are left out; any other document unchanged."""
    backends = dict.fromkeys(b for case in document["cases"] for b, r in case["ratios"].items() if isinstance(r, dict))
    if not backends:
        return {name: document}
    found = {}
    for ours in backends:
        cases = []
        for case in document["cases"]:
            theirs = {n: entry for n, entry in case["contestants"].items() if n not in backends}
            if entry := case["contestants"].get(ours):
                theirs = {"fastseq": entry | {"backend": ours}, **theirs}
            cases.append(case | {"contestants": theirs, "ratios": case["ratios"].get(ours) or {}})
        found[f"{name} ({ours})"] = document | {"cases": cases, "backend": ours}
    return found


def kind_of(document: Any) -> str:
    """speed, memory, cost, parallel, regularise, weights or tests.

    Raises:
        ValueError: none of them.
    """
    if not isinstance(document, dict) or not isinstance(document.get("environment"), dict):
        raise ValueError("not a result file: it has no environment")
    command = re.match(rf"{PLAIN_COMMAND} (memory|cost|parallel|regularise)\b", str(document.get("command", "")))
    if command and "results" in document:
        return command[1]
    for key, kind in (("cases", "speed"), ("models", "weights"), ("kernels", "tests")):
        if key in document:
            return kind
    raise ValueError("a result file of no kind that the report knows")


def command_of(document: Document) -> str:
    """The command that made the file, without the folders of that machine; runs on a GPU do not name theirs."""
    return re.sub(r"(?<![^\s'=])/(?:[^\s'/]+/)*", "", str(document.get("command", "make gpu")))


def device_of(document: Document) -> str:
    """The hardware: a GPU's name if the file has one, else the CPU's."""
    environment = document["environment"]
    for place in (document, environment):
        for key in ("device", "gpu"):
            if isinstance(place.get(key), str) and place[key] != "cpu":
                return str(place[key])
    return str(environment.get("cpu", "unknown"))


def on_gpu(document: Document) -> bool:
    return device_of(document) != str(document["environment"].get("cpu", "unknown"))


def commit_of(document: Document) -> str:
    """Ten digits, and ``+changes`` if the tree was not clean; all commits if a file was made at several."""
    commits = [result.get("commit") for result in document.get("results", ())] or [
        document["environment"].get("commit")
    ]
    short = dict.fromkeys(c[:10] + "+changes" * c.endswith("+changes") if c else "unknown" for c in commits)
    return ", ".join(short)


def date_of(document: Document) -> str:
    return str(document["environment"].get("date", ""))[:10]


def outcomes(tests: Document | None, backend: str, subject: str) -> dict[str, int]:
    """How the tests of a backend's ``recurrent`` or ``attention`` kernels came out, from a file of tests."""
    counts: dict[str, int] = {}
    suites = tests["kernels"].get(backend, {}).get("suites", {}) if tests else {}
    for suite, found in suites.items():
        if subject in suite or ("promises" in suite and subject == "recurrent"):
            for outcome, count in found.items():
                counts[outcome] = counts.get(outcome, 0) + count
    return counts

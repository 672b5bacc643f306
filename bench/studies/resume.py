"""Long studies in short units: each one's result is on disk before the next begins, and is not measured again."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report import environment, write_json
from bench.run import Options
from fastseq import cli

Unit = Mapping[str, Any]
"""What tells a unit from all others: plain names and numbers."""


class OtherStudy(ValueError):
    """The file holds results of other settings: they cannot be continued, and are not overwritten."""


def key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


class Study:
    """The results so far, and their file. A result is ``{"unit": ..., "commit": ..., **what was measured}``."""

    def __init__(self, path: Path, command: str, protocol: dict[str, Any], threads: int, restart: bool = False) -> None:
        """Reads what ``path`` holds already.

        Raises:
            OtherStudy: the file was made with another protocol, or is no such file at all.
        """
        self.path = path
        self.environment = environment(Options(threads))
        self.protocol = json.loads(json.dumps(protocol))
        self.document: dict[str, Any] = {
            "schema": 1,
            "command": command,
            "complete": False,
            "environment": self.environment,
            "protocol": self.protocol,
            "results": [],
        }
        if path.is_file() and not restart:
            try:
                found = json.loads(path.read_text())
                same = found["command"] == command and found["protocol"] == self.protocol
                self.document |= {"results": list(found["results"]), "environment": found["environment"]}
            except (ValueError, KeyError, TypeError) as error:
                raise OtherStudy(f"{path} is not a result file of `{command}`: {error!r}") from None
            if not same:
                raise OtherStudy(
                    f"{path} was measured with other settings; give --json another path, or --restart to begin anew"
                )
        self.done = {key(result["unit"]): result for result in self.results}

    @property
    def results(self) -> list[dict[str, Any]]:
        return self.document["results"]

    def add(self, unit: Unit, measured: dict[str, Any]) -> None:
        """On disk when this returns, whole: a kill at any moment leaves the file as it was before or after."""
        self.results.append({"unit": dict(unit), "commit": self.environment["commit"], **measured})
        self.done[key(unit)] = self.results[-1]
        write_json(self.path, self.document, last=False)

    def run(self, plan: Sequence[Unit], measure: Callable[[Unit], dict[str, Any]]) -> bool:
        """Measure what is missing, in the order of ``plan``. False where Ctrl-C ended it."""
        left = [unit for unit in plan if key(unit) not in self.done]
        said = (
            f"{len(plan) - len(left)} of {len(plan)} units are in {self.path} already" if len(left) < len(plan) else ""
        )
        progress = Progress(len(plan), len(plan) - len(left), said)
        try:
            for unit in left:
                progress.begin(" ".join(str(value) for value in unit.values()))
                self.add(unit, measure(unit))
                progress.done()
        except KeyboardInterrupt:
            progress.end()
            if not cli.is_file(self.path):  # nothing was written yet
                write_json(self.path, self.document)
            print(f"interrupted; the same command goes on from here ({len(self.done)} units kept)", file=sys.stderr)
            return False
        progress.end()
        self.document["complete"] = True
        write_json(self.path, self.document)
        return True


class Progress:
    """A bar on a terminal where rich is installed, a line a unit elsewhere; on stderr."""

    def __init__(self, total: int, finished: int, said: str) -> None:
        self.total, self.finished, self.started, self.name = total, finished, time.monotonic(), ""
        self.bar: Any = None
        if said:
            print(said, file=sys.stderr)
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
                from rich.progress import Progress as Bar
            except ImportError:
                return
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1)
            self.task = self.bar.add_task("", total=total, completed=finished)
            self.bar.start()

    def begin(self, name: str) -> None:
        self.name = name
        if self.bar is not None:
            self.bar.update(self.task, description=name)

    def done(self) -> None:
        self.finished += 1
        if self.bar is not None:
            self.bar.advance(self.task)
        else:
            clock = time.monotonic() - self.started
            print(f"[{self.finished}/{self.total}, {clock:.0f} s] {self.name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()

"""Long studies in short units: each result is on disk before the next unit begins, and is not measured again."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.progress import Progress
from bench.report import environment, unwritable, write_json
from fastseq import cli

Unit = Mapping[str, Any]
"""Plain names and numbers that identify a unit."""


class OtherStudy(ValueError):
    """The file holds results of other settings: it cannot be continued, and is not overwritten."""


def key(unit: Unit) -> str:
    return json.dumps(unit, sort_keys=True)


class Study:
    """The results so far, and their file. A result is ``{"unit": ..., "commit": ..., **what was measured}``."""

    def __init__(self, path: Path, command: str, protocol: dict[str, Any], threads: int, restart: bool = False) -> None:
        """Reads what ``path`` holds already.

        Raises:
            OtherStudy: the file was made with another protocol, or is not a result file of this command.
        """
        self.path = path
        self.environment = environment(threads)
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
                    f"{path} was measured with other settings; give --json another path, or --restart to discard them"
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
        """Measure what is missing, in the order of ``plan``. False if Ctrl-C ended it."""
        left = [unit for unit in plan if key(unit) not in self.done]
        finished = len(plan) - len(left)
        if finished:
            print(f"{finished} of {len(plan)} units are in {self.path} already", file=sys.stderr)
        try:
            with Progress(len(plan), finished) as progress:
                for unit in left:
                    progress.begin(" ".join(str(value) for value in unit.values()))
                    self.add(unit, measure(unit))
                    progress.done()
        except KeyboardInterrupt:
            if not cli.is_file(self.path):  # nothing was written yet
                write_json(self.path, self.document)
            print(f"interrupted; the same command continues from here ({len(self.done)} units kept)", file=sys.stderr)
            return False
        self.document["complete"] = True
        write_json(self.path, self.document)
        return True


def arguments(name: str, description: str | None, quick: str, default: str) -> argparse.ArgumentParser:
    """The options that all studies have. ``quick`` is the help of --quick, ``default`` that of --json."""
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help=f"default: {default}")
    parser.add_argument("--restart", action="store_true", help="discard what the file holds")
    return parser


def conduct(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    path: Path,
    protocol: object,
    plan: Sequence[Unit],
    measure: Callable[[Study, Unit], dict[str, Any]],
) -> int:
    """Run a study by its options; returns the exit status: 2 on bad arguments, 130 if it was interrupted."""
    if options.threads < 1:
        parser.error("--threads must be positive")
    if refusal := unwritable(path):
        parser.error(f"--json {refusal}")
    torch.set_num_threads(options.threads)
    command = parser.prog + " --quick" * options.quick
    try:
        study = Study(path, command, dataclasses.asdict(protocol), options.threads, options.restart)  # type: ignore[call-overload]
    except OtherStudy as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return cli.USAGE
    return 0 if study.run(plan, lambda unit: measure(study, unit)) else cli.INTERRUPTED

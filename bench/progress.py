"""Progress of a long run on stderr: a bar on a terminal if rich is installed, else a line for each step."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """``with Progress(total) as progress``, then ``begin(name)`` and ``done(text)`` around each step."""

    def __init__(self, total: int, finished: int = 0) -> None:
        self.total, self.finished, self.started, self.name = total, finished, time.monotonic(), ""
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich import progress
                from rich.console import Console
            except ImportError:
                return self
            columns = (progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeRemainingColumn(),
                       progress.TextColumn("{task.description}"))  # fmt: skip
            # drawn by itself only rarely, because the bar's thread disturbs what is timed
            self.bar = progress.Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1)
            self.task = self.bar.add_task("", total=self.total, completed=self.finished)
            self.bar.start()
        return self

    def begin(self, name: str) -> None:
        self.name = name
        if self.bar is not None:
            self.bar.update(self.task, description=name)

    def done(self, text: str = "") -> None:
        self.finished += 1
        if self.bar is not None:
            self.bar.advance(self.task)
        else:
            clock = f"{time.monotonic() - self.started:.0f} s"
            said = f"{self.name}: {text}" if text else self.name
            print(f"[{self.finished}/{self.total}, {clock}] {said}", file=sys.stderr, flush=True)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

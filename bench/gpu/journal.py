"""Running what may crash or hang: a child writes what it finished, line by line; a supervisor starts it again.

A line is a JSON object with ``event``: ``start`` (about to do ``name``), ``done`` (``name``, and what it found) or
``lost`` (written by the supervisor: the child ended or ``hung`` in ``name``, at the part ``at`` of it).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds a child has to end when asked to."""


class Journal:
    """Lines of a file; a line cut short by a crash is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def write(self, event: str, name: str, **more: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "name": name, **more}) + "\n")

    def lines(self, first_bytes: int | None = None) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_bytes()[:first_bytes].splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def done(self) -> dict[str, dict[str, Any]]:
        """What was finished, by name; the last result of each."""
        return {line["name"]: line for line in self.lines() if line["event"] == "done"}

    def lost(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == "lost"]

    def open_(self) -> list[str]:
        """What was started, and neither finished nor lost."""
        going: dict[str, None] = {}
        for line in self.lines():
            if line["event"] == "start":
                going[line["name"]] = None
            else:
                going.pop(line["name"], None)
        return list(going)

    @property
    def _current(self) -> Path:
        return self.path.with_suffix(".current")

    def now_at(self, part: str) -> None:
        """Leave a note of the part that is about to run."""
        self._current.write_text(part)

    def at(self) -> str:
        return self._current.read_text() if self._current.exists() else ""


LOOK = 1.0
"""Seconds between two looks at a child that count as its silence, at most. If more time passed, the supervisor itself
was delayed, by a machine that was stopped or busy, which says nothing about the child."""


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a child and all that it started: SIGTERM, then SIGKILL; does not wait for one that no signal ends."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
            if how is signal.SIGTERM:
                with contextlib.suppress(ProcessLookupError):  # what it started may outlive it
                    os.killpg(process.pid, signal.SIGKILL)
            return


def supervise(
    command: Sequence[str],
    journal: Journal,
    log: Path,
    until: float,
    stall: float,
    changed: Callable[[], None] = lambda: None,
    stopped: Callable[[], bool] = lambda: False,
    folder: Path | None = None,
    fine: Sequence[int] = (0,),
) -> str:
    """Run ``command`` until it succeeds. If it dies, or writes nothing for ``stall`` seconds, note what is lost and run
    it again. Returns why the work is not complete, or "".

    Args:
        until: on the clock of ``time.monotonic``: a child that runs then is ended.
        changed: called when the journal has grown; stopped: asked several times a second.
        fine: the exit statuses with which the work is done.
    """
    empty_handed = 0
    while not stopped():
        if time.monotonic() >= until:
            return "out of time"
        before = len(journal.lines())
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, cwd=folder)
        size, silent, looked, why = -1, 0.0, time.monotonic(), ""
        try:
            while process.poll() is None and not why:
                time.sleep(0.1)
                now = time.monotonic()
                silent, looked = silent + min(now - looked, LOOK), now
                if (grown := journal.path.stat().st_size) != size:
                    size, silent = grown, 0.0
                    changed()
                if now >= until:
                    why = "out of time"
                elif stopped():
                    why = "stopped"
                elif silent > stall:
                    why = f"it wrote nothing for {stall:.0f} s"
        finally:
            if process.poll() is None:
                end(process)
        changed()
        if why in ("out of time", "stopped"):
            return why
        if not why and process.returncode in fine:
            return ""
        hung = bool(why)
        why = why or f"the process ended with status {process.returncode}: {last_line(log)}"
        for name in journal.open_():
            journal.write("lost", name, at=journal.at(), reason=why, hung=hung)
            changed()
        empty_handed = empty_handed + 1 if len(journal.lines()) == before else 0
        if empty_handed == 2:
            return why
    return "stopped"


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"

"""Trials in a process of their own, so that a kernel that crashes or hangs costs one trial."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any


def each(command: Sequence[str], items: Sequence[Any], patience: float, key: str) -> Iterator[tuple[Any, dict]]:
    """Every item with what became of it, in order. A child tries them in turn; when it dies or hangs, the item that it
    was at is to blame, and another child takes up after that. Closing the generator ends the child.

    Args:
        command: of ``python -m fastseq``, to which the items are added as JSON.
        patience: seconds that one item may take; the first includes importing torch on a busy machine.
        key: the first key of a line that answers an item. A line ``{"at": ...}`` says what the child is about to do.

    Yields:
        The item, and the child's answer, or ``{"lost": why, "at": what it was about to do}``.
    """
    rest = list(items)
    while rest:
        done = 0
        for result in _one_child(command, rest, patience, key):
            yield rest[done], result
            done += 1
        rest = rest[done:]


def _one_child(command: Sequence[str], items: Sequence[Any], patience: float, key: str) -> Iterator[dict]:
    """What became of at least the first of the items."""
    try:
        child = _started(command, items)
    except OSError as error:
        yield from ({"lost": f"cannot start a trial: {error}", "at": ""} for _ in items)
        return
    lines: queue.Queue[str | None] = queue.Queue()
    errors: list[str] = []
    assert child.stdout is not None
    assert child.stderr is not None
    threads = [
        threading.Thread(target=_forward, args=(child.stdout, lines.put), daemon=True),
        threading.Thread(target=_forward, args=(child.stderr, errors.append), daemon=True),
    ]
    for thread in threads:
        thread.start()
    done, end, at = 0, "", ""
    try:
        while done < len(items):
            line = lines.get(timeout=patience)
            if line is None:
                break
            if line.startswith('{"at"'):
                at = json.loads(line)["at"]
            elif line.startswith(f'{{"{key}"'):  # anything else was printed by something else
                yield json.loads(line)
                done += 1
    except queue.Empty:
        end = f"no answer within {patience:.0f} s"
    finally:
        child.kill()
        status = child.wait()
        for thread in threads:
            thread.join(5)
    if done == len(items):
        return
    if not end and status > 0:  # it could not even start: so would the next one
        yield from ({"lost": _death(status, errors), "at": at} for _ in items[done:])
    else:
        yield {"lost": end or _death(status, errors), "at": at}


def _started(command: Sequence[str], items: Sequence[Any]) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    root = Path(__file__).absolute().parent.parent
    if root.name not in ("site-packages", "dist-packages"):  # the child is to find this very package
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    whole = [sys.executable, "-m", "fastseq", *command, json.dumps(items)]
    return subprocess.Popen(
        whole, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def _forward(stream: Any, put: Callable[[Any], None]) -> None:
    for line in stream:
        put(line.strip())
    put(None)


def _death(status: int, errors: list[str]) -> str:
    if status < 0 and status != -signal.SIGKILL:
        return f"the trial died of {signal.Signals(-status).name}"
    said = [line for line in errors if line]
    return f"the trial ended: {said[-1] if said else 'no message'}"

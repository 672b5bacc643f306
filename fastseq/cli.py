"""What the command lines share: how they end, how they write files, and tables."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

USAGE, INTERRUPTED, NO_READER = 2, 130, 141
"""Exit statuses: bad arguments, or a result that cannot be written; Ctrl-C; the reader of the output has left. The last
two are those of a program that the signal ends (SIGINT, SIGPIPE)."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run(program: str, main: Callable[[], int]) -> int:
    """Run a command line; returns its exit status.

    A reader that leaves early (``| head``), a full device and Ctrl-C end it without a traceback.

    Args:
        program: its name, for messages.
        main: does the work and returns the exit status.
    """
    try:
        try:
            return main()
        finally:  # now, where an error can still be told
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _let_go()
        return NO_READER
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, CannotWrite) and error.errno not in _NO_ROOM:
            raise
        _let_go()
        print(f"{program}: cannot write {error.filename or 'the output'}: {error.strerror}", file=sys.stderr)
        return USAGE


def _let_go() -> None:
    """Python flushes its streams once more when it ends: what cannot be written goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class CannotWrite(OSError):
    """A file cannot be written; ``filename`` says which."""


def is_file(path: Path) -> bool:
    """Whether a path is, or would become, an ordinary file: no device, pipe or folder."""
    return path.is_file() or not path.exists()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8.

    A file is written whole or not at all: a run that is killed while writing leaves the file that was there before.
    Devices and pipes are written through.

    Raises:
        CannotWrite: there is no room, no permission, no such folder, or no reader.
    """
    beside = None
    try:
        if is_file(path):
            target = path.resolve()  # a link stays a link
            beside = target.with_name(target.name + ".part")
            beside.write_text(text, encoding="utf-8")
            beside.replace(target)
        else:
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise CannotWrite(error.errno, error.strerror, str(path)) from error


def table(rows: list[list[str]], styles: dict[str, str]) -> None:
    """Print rows under the first of them, in rich's colours where it is installed; ``styles`` goes by first words."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    drawn = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for row in rows[1:]:
        drawn.add_row(row[0], *(Text(cell, style=styles.get(cell.partition(" ")[0], "")) for cell in row[1:]))
    Console(soft_wrap=True).print(drawn)

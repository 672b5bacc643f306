"""What the demo shows while it runs: a progress bar by rich or tqdm on a terminal, else plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Update = Callable[[int, str], None]
"""Called with the steps done so far, and a short text to show beside them."""


@contextmanager
def progress(label: str, total: int) -> Iterator[Update]:
    """A progress bar of ``total`` steps around the ``with`` block."""
    if sys.stdout.isatty():
        with suppress(ImportError):
            import rich.progress  # noqa: F401

            with _rich(label, total) as update:
                yield update
            return
        with suppress(ImportError):
            import tqdm  # type: ignore[import-untyped]  # noqa: F401

            with _tqdm(label, total) as update:
                yield update
            return
    yield _plain(label, total)


@contextmanager
def _rich(label: str, total: int) -> Iterator[Update]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task(label, total=total, text="")
        yield lambda done, text: bar.update(task, completed=done, text=text)


@contextmanager
def _tqdm(label: str, total: int) -> Iterator[Update]:
    from tqdm import tqdm

    with tqdm(total=total, desc=f"  {label}", leave=False) as bar:

        def update(done: int, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        yield update


def _plain(label: str, total: int) -> Update:
    """Lines, at every fifth of the way and not more often than each second."""
    last = time.monotonic()
    shown = 0

    def update(done: int, text: str) -> None:
        nonlocal last, shown
        fifth = done * 5 // total
        if fifth > shown and time.monotonic() - last >= 1.0:
            print(f"  {label} {done}/{total}  {text}", flush=True)
            last, shown = time.monotonic(), fifth

    return update

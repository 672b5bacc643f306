"""Faults planted in copies of kernels, each of which the emulated machine must notice.

A fault is a text of a source file that occurs there once and what takes its place. Its copy lies in
build/emulation/mutants with all of csrc beside it, so that the changed header is the one that is included.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulation.build import BUILD, PRIORITY, ROOT, STICKY, Library

# What no schedule shows on a machine whose memory is in order, and what ThreadSanitizer has no notion of.
SCHEDULES = "schedules"
THREADS = "thread sanitizer"


@dataclass(frozen=True)
class Mutation:
    """``old`` in ``file`` (relative to the repository) becomes ``new``; ``caught_by`` are those that must see it."""

    name: str
    file: str
    old: str
    new: str
    caught_by: tuple[str, ...] = (SCHEDULES,)


def planted(mutation: Mutation) -> Path:
    """Writes the copy; returns the folder that stands in the repository's place."""
    text = (ROOT / mutation.file).read_text()
    count = text.count(mutation.old)
    assert count == 1, f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}"
    files = {path: path.read_text() for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()}
    files[ROOT / mutation.file] = text.replace(mutation.old, mutation.new)
    digest = hashlib.sha256(repr(sorted((str(p), t) for p, t in files.items())).encode()).hexdigest()[:20]
    folder = BUILD / "mutants" / digest
    for path, content in files.items():
        copy = folder / path.relative_to(ROOT)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(content)
    return folder


def library(mutation: Mutation, sources: Sequence[Path], sanitizer: str = "", flags: Sequence[str] = ()) -> Library:
    """The kernels with the fault in them."""
    folder = planted(mutation)
    copies = [folder / s.relative_to(ROOT) for s in map(Path, sources)]
    taken = [copy if copy.exists() else source for copy, source in zip(copies, sources, strict=True)]
    return Library(taken, sanitizer, flags, quote=[folder, folder / "csrc"])


def seeds(count: int = 4) -> list[dict[str, int]]:
    """The schedules that a kernel is run under: as many sticky ones as by random priorities."""
    return [{"seed": seed, "schedule": schedule} for seed in range(count) for schedule in (STICKY, PRIORITY)]


def noticed(run: Callable[[Library, dict[str, int]], str | None], kernels: Library, count: int = 4) -> list[str]:
    """Runs a case under every schedule, or under two with a sanitizer; returns what was found wrong, one a schedule.

    ``run`` calls an entry and compares; it returns None where all was well.
    """
    return [found for machine in seeds(1 if kernels.sanitizer else count) if (found := run(kernels, machine))]

"""The file of measurements in the user's cache folder: where it is, whose it is, how it is read and written.

It has one entry a machine: a device with its driver, and what runs there (torch, Triton, this build). An entry of any
other machine counts for nothing here. A file is written whole, beside the old one, and then takes its place; several
processes that write take turns.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastseq import auto, cli, ops
from fastseq.calibration.calls import DTYPES, SHAPES, Shape, from_values

FORMAT = "fastseq calibration 1"
LARGEST_FILE = 16 << 20
MOST_MACHINES = 32
PATIENCE = 5.0
"""Seconds to wait for another process that writes."""

BACKENDS = ("native", "triton", "torch", "reference")
PASSED, CANNOT, RAISED, WRONG, LOST = "passed", "cannot", "raised", "wrong", "lost"
OUTCOMES = (PASSED, CANNOT, RAISED, WRONG, LOST)
"""Of a trial: right; not for this backend; an error; a wrong number; the process died or hung."""

Machine = dict[str, Any]


class Broken(ValueError):
    """The file is not what was written."""


class Trial(NamedTuple):
    """A self-test: of this backend, on this call. ``shape.dtype`` and ``shape.op`` say what it vouches for."""

    backend: str
    shape: Shape


class Verdict(NamedTuple):
    """How a trial ended, and what is to be said of it."""

    outcome: str
    said: str = ""


@dataclass
class Timed:
    """A call that was measured: seconds by backend, and what became of those without a time. ``of_kind``: it stands for
    its kind; else only for its shape. ``spread``: what the ratio of two times may be off by, as the rounds have it."""

    of_kind: bool
    spread: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    out: dict[str, Verdict] = field(default_factory=dict)


@dataclass
class Entry:
    """What was measured on one machine. ``tested``: backend, operation and dtype of which all self-tests were made."""

    machine: Machine
    date: str = ""
    tested: set[tuple[str, str, str]] = field(default_factory=set)
    tests: dict[Trial, Verdict] = field(default_factory=dict)
    timed: dict[Shape, Timed] = field(default_factory=dict)

    def merge(self, newer: Entry) -> None:
        """Take over what another has; where both have it, the other's. What stood for its kind goes on doing so."""
        self.date = max(self.date, newer.date)
        self.tested |= newer.tested
        self.tests |= newer.tests
        for shape, timed in newer.timed.items():
            known = self.timed.get(shape)
            timed.of_kind |= known is not None and known.of_kind
            self.timed[shape] = timed


# --- where, and whose -------------------------------------------------------------------------------------------------


def path() -> Path | None:
    """``$XDG_CACHE_HOME/fastseq/calibration.json``, else in ``~/.cache``; None where there is no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    folder = named if os.path.isabs(named) else os.path.join(os.path.expanduser("~"), ".cache")
    return Path(folder, "fastseq", "calibration.json") if os.path.isabs(folder) else None


@functools.cache
def processor() -> str:
    """The processor's name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "processor unknown"


def machine(device: str, index: int) -> Machine | None:
    """What a measurement on this device depends on; None where there is no such device, or no kernel of ours for it."""
    if device == "cpu":
        own = {"device": processor(), "kind": "cpu", "threads": torch.get_num_threads(), "instructions": instructions()}
        return own | _software()
    found = gpu(index) if device == "cuda" else None
    if found is None:
        return None
    own = {
        "device": found.name, "kind": auto.device_key(torch.device("cuda", index)), "driver": _driver(),
        "multiprocessors": found.multi_processor_count, "memory": found.total_memory,
        "cuda": torch.version.cuda or torch.version.hip, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    return own | _software()


def instructions() -> str | None:
    """The instruction set of the native kernels."""
    return None if ops.NATIVE_MISSING is not None else str(torch.ops.fastseq.native_isa(""))


def gpu(index: int) -> Any:
    """What torch knows of a GPU; None where there is none."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return None
    return torch.cuda.get_device_properties(index)


def _software() -> Machine:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "triton": triton, "build": _build()}


def _driver() -> str | None:
    """The GPU driver's version, without asking a program."""
    for file in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            lines = Path(file).read_text(errors="replace").splitlines()
            if lines:
                return lines[0].strip()
    return None


@functools.cache
def _build() -> str:
    """A digest of our kernels: the compiled ones, and the sources of those that Triton compiles."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted([*package.glob("_native*.so"), *(package / "kernels").glob("**/*.py")]):
        with contextlib.suppress(OSError):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------------


def read() -> list[Entry]:
    """Every entry of the file; none where there is no file.

    Raises:
        Broken: the file is not what was written.
        OSError: it cannot be read.
    """
    file = path()
    if file is None or not file.exists():
        return []
    if not file.is_file():
        raise Broken("it is no file")
    if file.stat().st_size > LARGEST_FILE:
        raise Broken(f"it has more than {LARGEST_FILE >> 20} MiB")
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Broken(f"no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Broken(f"its format is not {FORMAT!r}")
    try:
        return [_entry(entry) for entry in document["machines"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from None


def _entry(document: dict[str, Any]) -> Entry:
    found = Entry(dict(document["machine"]), document["date"])
    time.strptime(found.date, "%Y-%m-%d")
    for backend, op, dtype in document["tested"]:
        found.tested.add((_known(backend, BACKENDS), _known(op, tuple(SHAPES)), _known(dtype, DTYPES)))
    for backend, op, values, outcome, said in document["tests"]:
        test = Trial(_known(backend, BACKENDS), from_values(op, values))
        found.tests[test] = _verdict(outcome, said)
    for op, values, of_kind, spread, times, out in document["timed"]:
        timed = Timed(of_kind is True, _positive(spread))
        for backend, seconds in times.items():
            timed.times[_known(backend, BACKENDS)] = _positive(seconds, least=1e-12)
        for backend, (outcome, said) in out.items():
            timed.out[_known(backend, BACKENDS)] = _verdict(outcome, said)
        found.timed[from_values(op, values)] = timed
    return found


def _positive(value: object, least: float = 0.0) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
        raise ValueError(f"{value!r:.40} is no time or spread")
    return float(value)


def _verdict(outcome: object, said: object) -> Verdict:
    if not isinstance(said, str):
        raise ValueError("a text was expected")
    return Verdict(_known(outcome, OUTCOMES), said)


def _known(value: object, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{value!r:.60} is none of {', '.join(names)}")
    return value


# --- writing ----------------------------------------------------------------------------------------------------------


def update(entry: Entry) -> None:
    """Write an entry into the file, merged with what is there of the same machine. A broken file is replaced.

    Raises:
        CannotWrite: the folder cannot be made, or the file not written.
    """

    def change(entries: list[Entry]) -> list[Entry]:
        same = next((known for known in entries if known.machine == entry.machine), None)
        if same is None:
            return [*entries, entry][-MOST_MACHINES:]
        same.merge(entry)
        return entries

    _rewrite(change)


def remove(machine: Machine | None) -> int:
    """Take the entry of a machine out of the file, or all of them; returns how many that were.

    Raises:
        CannotWrite: the file cannot be written.
    """
    removed = 0

    def change(entries: list[Entry]) -> list[Entry]:
        nonlocal removed
        kept = [known for known in entries if machine is not None and known.machine != machine]
        removed = len(entries) - len(kept)
        return kept

    file = path()
    if file is not None and file.exists():
        _rewrite(change)
    return removed


def _rewrite(change: Callable[[list[Entry]], list[Entry]]) -> None:
    file = path()
    if file is None:
        raise cli.CannotWrite(None, "there is no home folder; set XDG_CACHE_HOME to one that can be written")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file.with_suffix(".lock")):
            try:
                entries = read()
            except Broken:
                entries = []
            _write(file, change(entries))
    except OSError as error:
        said = f"{error.strerror}; XDG_CACHE_HOME names another cache folder"
        raise cli.CannotWrite(error.errno, said, str(file)) from error


def _write(file: Path, entries: list[Entry]) -> None:
    text = json.dumps({"format": FORMAT, "machines": [_document(entry) for entry in entries]}, separators=(",", ":"))
    handle, beside = tempfile.mkstemp(".part", file.name, file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(beside, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _document(entry: Entry) -> dict[str, Any]:
    return {
        "machine": entry.machine,
        "date": entry.date,
        "tested": sorted(entry.tested),
        "tests": [[test.backend, test.shape.op, list(test.shape), *verdict] for test, verdict in entry.tests.items()],
        "timed": [
            [s.op, list(s), timed.of_kind, timed.spread, timed.times, timed.out] for s, timed in entry.timed.items()
        ],
    }


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Holds a lock file. Goes on without, and yields False, where another process has it for too long or the system
    has no such locks."""
    with file.open("a") as stream:
        held, until = False, time.monotonic() + PATIENCE
        while not held and time.monotonic() < until:
            held = try_lock(stream)
            if not held:
                time.sleep(0.02)
        yield held


def try_lock(stream: Any) -> bool:
    """Whether this process now holds the lock of an open file; it is let go when the file is closed."""
    try:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True

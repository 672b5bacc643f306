"""What AUTO takes from the file of measurements: a row a kind, and a row a shape.

The file is read when the first call asks. A file that is broken, or made on another machine or for other software, is
ignored, with one line in the log.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fastseq import auto
from fastseq.calibration import file
from fastseq.calibration.calls import DTYPES, Shape
from fastseq.calibration.file import LOST, PASSED, RAISED, WRONG, Entry, Timed

AHEAD = 1.03
"""A backend must be this many times as fast as the one that AUTO's table names; and by more than the rounds spread."""

OURS = ("native", "triton")

log = logging.getLogger("fastseq")


@dataclass
class Book:
    """The rows that were measured on a device, by operation and kind, and by rounded shape."""

    date: str
    kinds: dict[tuple[str, str], auto.Row] = field(default_factory=dict)
    shapes: dict[Shape, auto.Row] = field(default_factory=dict)

    @property
    def rows(self) -> list[auto.Row]:
        """All of them."""
        return [*self.kinds.values(), *self.shapes.values()]


_unwritten: list[Entry] = []
"""What this process measured and could not write."""

_ignored = False


def ignore() -> None:
    """Has this process go by AUTO's table alone, as a benchmark of that does."""
    global _ignored
    _ignored = True
    forget()


# --- asked by AUTO ----------------------------------------------------------------------------------------------------


@functools.cache
def book(device: str, index: int) -> Book | None:
    """What was measured on a device (its type and index); None where nothing was. Reads the file at the first call."""
    entries, here = list(_unwritten), None
    if _ignored:
        return None
    try:
        entries += file.read()
    except file.Broken as error:
        text = f"the calibration in {file.path()} is ignored: {error}; make it anew with python -m fastseq calibrate"
        _say_once(logging.WARNING, text)
    except OSError as error:
        _say_once(logging.INFO, f"the calibration in {file.path()} cannot be read: {error.strerror}")
    if entries:  # else no library is looked at
        here = file.machine(device, index)
    if here is None:
        return None
    entry = next((entry for entry in entries if entry.machine == here), None)
    if entry is None:
        _say_outdated(entries, here)
        return None
    return book_of(entry, device)


def exists(device: str, index: int) -> bool:
    """Whether anything was measured on a device."""
    return device in ("cpu", "cuda") and book(device, index) is not None


def _order_of_kind(device: str, index: int, op: str, kind: str) -> str:
    """The order of a kind's row as one text, empty where there is none."""
    found = book(device, index)
    row = None if found is None else found.kinds.get((op, kind))
    return "" if row is None else " ".join(row.order)


exists._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo asks once, and traces neither
_order_of_kind._dynamo_marked_constant = True  # type: ignore[attr-defined]


def row(shape: Shape, device: torch.device) -> auto.Row | None:
    """What was measured for a call: for its shape, else for its kind; None where neither was."""
    try:
        return _known(shape, device.type, device.index or 0)
    except TypeError:  # a size that is open has no hash
        return _looked_up(shape, device.type, device.index or 0)


@functools.lru_cache(4096)
def _known(shape: Shape, device: str, index: int) -> auto.Row | None:
    return _looked_up(shape, device, index)


def _looked_up(shape: Shape, device: str, index: int) -> auto.Row | None:
    found = book(device, index)
    if found is None:
        return None
    if (
        found.shapes
        and all(type(size) in (int, str, bool) for size in shape)
        and (own := found.shapes.get(shape.rounded())) is not None
    ):
        return own
    return found.kinds.get((shape.op, shape.kind(device)))


def order(op: str, shape: Shape, device: torch.device) -> tuple[str, ...]:
    """That row's order, empty where there is none; in a compiled call the kind's, as sizes may be open. ``op``: the
    shape's, which torch 2.10 cannot ask a traced shape for."""
    if torch.compiler.is_compiling():
        return tuple(_order_of_kind(device.type, device.index or 0, op, shape.kind(device.type)).split())
    found = row(shape, device)
    return () if found is None else found.order


def native_first(op: str) -> bool:
    """Whether no measurement sends a call on the CPU anywhere but to the native kernels."""
    found = book("cpu", 0)
    return found is None or all(row.order[0] == "native" for row in found.rows if row.op == op)


def keep(entry: Entry) -> None:
    """Has an entry that cannot be written count in this process."""
    _unwritten[:] = [entry, *(known for known in _unwritten if known.machine != entry.machine)]


def forget() -> None:
    """Reads the file again at the next call."""
    book.cache_clear()
    _known.cache_clear()


_said: set[str] = set()


def _say_once(level: int, text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.log(level, text)


def _say_outdated(entries: Iterable[Entry], here: file.Machine) -> None:
    """Tells of the entry of this device that differs in the least from what is here."""
    differs = [
        (entry.date, {name for name in {*entry.machine, *here} if entry.machine.get(name) != here.get(name)}, entry)
        for entry in entries
        if entry.machine.get("device") == here["device"]
    ]
    if differs:
        date, names, entry = min(differs, key=lambda found: len(found[1]))
        changes = ", ".join(f"{name} {entry.machine.get(name)} then, {here.get(name)} now" for name in sorted(names))
        _say_once(logging.INFO, f"the calibration of {date} for {here['device']} is ignored: {changes}")


# --- from measurements to rows ----------------------------------------------------------------------------------------


def disqualified(entry: Entry) -> dict[tuple[str, str, str], str]:
    """Backend, operation and dtype that are not to be used, and why: all dtypes after a wrong number or a crash, one
    after an error."""
    found: dict[tuple[str, str, str], str] = {}
    trials = [(test.backend, test.shape, verdict) for test, verdict in entry.tests.items()]
    trials += [(name, shape, v) for shape, timed in entry.timed.items() for name, v in timed.out.items()]
    for backend, shape, verdict in trials:
        if verdict.outcome in (RAISED, WRONG, LOST) and backend in OURS:
            for dtype in DTYPES if verdict.outcome != RAISED else (shape.dtype,):
                found.setdefault((backend, shape.op, dtype), f"{shape.name}: {verdict.said}")
    return found


def book_of(entry: Entry, device: str) -> Book:
    """The rows that an entry supports; ``device``: the type of its device."""
    found = Book(entry.date)
    bad = disqualified(entry)
    groups: dict[tuple[str, str], list[tuple[Shape, Timed]]] = {}
    for shape, timed in entry.timed.items():
        if timed.of_kind:
            groups.setdefault((shape.op, shape.kind(device)), []).append((shape, timed))
        elif (made := _row(entry, [(shape, timed)], shape.name, bad)) is not None:
            found.shapes[shape.rounded()] = made
    for (op, kind), members in groups.items():
        made = _row(entry, members, kind, bad)
        if made is not None:
            found.kinds[op, kind] = made
    return found


def usual_of(entry: Entry, shape: Shape) -> auto.Row:
    """What AUTO's table has for a call on an entry's device."""
    key = str(entry.machine["kind"])
    kind = shape.autos_kind(key.partition(" ")[0]) if key in ("cpu", auto.HOPPER) else ""
    return auto.row(key, shape.op, kind)


def _row(
    entry: Entry, members: list[tuple[Shape, Timed]], kind: str, bad: dict[tuple[str, str, str], str]
) -> auto.Row | None:
    """The row of some calls: those that passed and were timed in all of them, the fastest first, but the backend of
    AUTO's table where none is ahead of it by enough; then the rest of AUTO's order, without what failed."""
    shape = members[0][0]
    usual = usual_of(entry, shape).order
    measured = [
        {name: seconds for name, seconds in timed.times.items() if _usable(entry, name, shape, bad)}
        for _, timed in members
    ]
    means = {name: _mean([each[name] for each in measured]) for name in set.intersection(*map(set, measured))}
    failed = [name for name in usual if (name, shape.op, shape.dtype) in bad]
    if not means or (len(means) == 1 and not failed):
        return None
    ranked = sorted(means, key=lambda name: means[name])
    incumbent = next((name for name in usual if name in means), ranked[0])
    spread = sum(timed.spread for _, timed in members) / len(members)
    if means[incumbent] < max(AHEAD, 1.0 + spread) * means[ranked[0]]:
        ranked.sort(key=lambda name: name != incumbent)
    rest = [name for name in usual if name not in ranked and name not in failed]
    order = [*ranked, *rest]
    if order[0] != "reference":  # it can do everything, and so comes last
        order.sort(key=lambda name: name == "reference")
    more = [f"{name} failed its tests" for name in failed]
    because = _because(entry, means, order[0], len(members), more)
    return auto.Row(str(entry.machine["kind"]), shape.op, kind, tuple(order), because)


def _usable(entry: Entry, name: str, shape: Shape, bad: Collection[tuple[str, str, str]]) -> bool:
    """Whether a backend may be chosen for an operation and dtype: a kernel of ours after all of its self-tests."""
    if name not in OURS:
        return True
    key = name, shape.op, shape.dtype
    proven = any(
        verdict.outcome == PASSED and (test.backend, test.shape.op, test.shape.dtype) == key
        for test, verdict in entry.tests.items()
    )
    return proven and key in entry.tested and key not in bad


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _because(entry: Entry, means: dict[str, float], first: str, calls: int, more: list[str]) -> str:
    said = [f"{means[name] / means[first]:.2f} times as fast as {name}" for name in means if name != first]
    shapes = f"{calls} shape" + "s" * (calls > 1)
    return "; ".join([f"measured on this machine on {entry.date}", f"{', '.join(said)} over {shapes}" if said else "",
                      *more])  # fmt: skip

"""What the file holds, as text."""

from __future__ import annotations

import itertools

import torch

from fastseq.calibration import chosen, file
from fastseq.calibration.file import CANNOT, PASSED, Entry


def one_line(error: BaseException) -> str:
    """An error's message, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def devices() -> list[torch.device]:
    """The devices that are here and that our kernels exist for."""
    gpus = itertools.takewhile(lambda index: file.gpu(index) is not None, itertools.count())
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)]


def used() -> list[tuple[torch.device, Entry]]:
    """Every device that is here with its entry; those without one are left out.

    Raises:
        Broken, OSError: as :func:`fastseq.calibration.file.read`.
    """
    entries = file.read()
    if not entries:
        return []
    machines = {device: file.machine(device.type, device.index or 0) for device in devices()}
    return [(device, entry) for device, here in machines.items() for entry in entries if entry.machine == here]


def in_one_line() -> str:
    """For the doctor."""
    try:
        found = [f"{device}: {told(entry)}" for device, entry in used()]
    except file.Broken as error:
        return f"ignored, {file.path()}: {error}; make it anew with python -m fastseq calibrate"
    except OSError as error:
        return f"cannot be read: {error}"
    return "; ".join(found) or "none for this machine: AUTO goes by its table (python -m fastseq calibrate measures)"


def told(entry: Entry) -> str:
    """An entry in one line."""
    rows = chosen.book_of(entry, kind_of(entry)).rows
    ours = sum(row.order[0] in chosen.OURS for row in rows)
    wrong = sorted({f"{backend} ({op})" for backend, op, _ in chosen.disqualified(entry)})
    passed = sum(verdict.outcome == PASSED for verdict in entry.tests.values())
    text = f"{entry.machine['device']}, {entry.date}: {passed} self-tests passed, {len(rows)} kinds and shapes measured"
    return f"{text}, ours first in {ours}" + (f"; FAILED: {', '.join(wrong)}" if wrong else "")


def kind_of(entry: Entry) -> str:
    """The type of an entry's device."""
    return str(entry.machine["kind"]).partition(" ")[0]


def table(entry: Entry) -> list[list[str]]:
    """Each kind and shape that decides: how long each backend took, and which is taken."""
    device = kind_of(entry)
    book = chosen.book_of(entry, device)
    rows = [["call", "of AUTO's table", "measured", "", "microseconds"]]
    for shape, timed in sorted(entry.timed.items(), key=lambda pair: (pair[0].op, pair[0].kind(device), pair[0].name)):
        row = book.kinds.get((shape.op, shape.kind(device))) if timed.of_kind else book.shapes.get(shape.rounded())
        usual = chosen.usual_of(entry, shape).order[0]
        first = "" if row is None else row.order[0]
        times = sorted(timed.times.items(), key=lambda pair: pair[1])
        texts = [f"{name} {seconds * 1e6:.1f}" for name, seconds in times]
        texts += [f"{name} {v.outcome}" for name, v in timed.out.items() if v.outcome not in (PASSED, CANNOT)]
        rows.append(
            [f"{shape.op} {shape.name}", usual, first, "" if first in ("", usual) else "changed", ", ".join(texts)]
        )
    return rows


def faults(entry: Entry) -> list[str]:
    """What failed, a line each."""
    return [f"{backend}, {op}, {dtype}: {why}" for (backend, op, dtype), why in chosen.disqualified(entry).items()]

"""``python -m fastseq calibrate``: measure on this machine which backend is ahead, for AUTO to go by."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable

import torch

from fastseq import cli
from fastseq.calibration import file, measure, shown
from fastseq.calibration.record import calibrate, indexed
from fastseq.calibration.session import MINUTES, CalibrationError, Progress, Session

FAILED, STOPPED = 1, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--minutes", type=_positive, default=MINUTES, help="for all of it (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default: the GPU, where there is one")
    parser.add_argument(
        "--model", metavar="MODULE:FUNCTION",
        help="measure the calls that this function makes, which takes no arguments and runs a model once, and not "
        "those that stand for kinds of calls",
    )  # fmt: skip
    parser.add_argument("--show", action="store_true", help="print what was measured on this machine, and where it is")
    parser.add_argument("--forget", action="store_true", help="remove what was measured on this machine")
    parser.add_argument("--try", dest="items", help=argparse.SUPPRESS)
    parser.epilog = (
        "First the kernels are tried beside float64, then they and torch's are timed in turns. Ctrl-C or the end of "
        "the minutes leaves what was measured by then; the same command goes on from there. Ends with status 0 where "
        "all was measured, 3 where some is left, 1 where a kernel of ours failed its tests, 2 where nothing can be "
        "measured."
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"more than 0 is needed, got {text}")
    return value


def main(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if options.items:
        return measure.answer_items(json.loads(options.items))
    try:
        if options.forget:
            return _forget(options)
        if options.show:
            return _show()
        return _measure(options)
    except CalibrationError as error:
        print(f"python -m fastseq calibrate: {error}", file=sys.stderr)
    except file.Broken as error:
        print(f"python -m fastseq calibrate: {file.path()}: {error}; --forget removes it", file=sys.stderr)
    return cli.USAGE


def _device(name: str | None) -> torch.device:
    try:
        return indexed(torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu")))
    except RuntimeError:
        raise CalibrationError(f"--device {name}: no such device; give cpu, cuda or cuda:1") from None


def _measure(options: argparse.Namespace) -> int:
    wanted = None
    device = _device(options.device)
    until = time.monotonic() + 60.0 * options.minutes
    if options.model:
        found = _recorded(options)
        if found is None:
            return cli.USAGE
        sessions = [(where, shapes) for where, shapes in found.items()]
    else:
        sessions = [(device, wanted)]
    complete, failed = True, False
    for place, (where, shapes) in enumerate(sessions):
        now = time.monotonic()
        session = Session(where, now + (until - now) / (len(sessions) - place), shapes, Progress(True))
        complete &= session.run()
        _print(where, session.entry)
        failed |= bool(shown.faults(session.entry))
    if not complete:
        print("\nThe time was up before all was measured: the same command goes on from here.")
    return FAILED if failed else 0 if complete else STOPPED


def _recorded(options: argparse.Namespace) -> dict | None:
    """The calls of --model, by device; None where the function could not be run, which was then said."""
    name, _, attribute = options.model.partition(":")
    if not name or not attribute:
        raise CalibrationError(f"--model must be MODULE:FUNCTION, got {options.model!r}")
    try:
        function: Callable[[], object] = getattr(importlib.import_module(name), attribute)
        recorder = calibrate(device=options.device)
        with recorder.recording() as recorded:
            function()
    except Exception:
        traceback.print_exc()
        print(f"python -m fastseq calibrate: {options.model} failed; nothing was measured", file=sys.stderr)
        return None
    return recorder.by_device(recorded)


def _print(device: torch.device, entry: file.Entry) -> None:
    rows = shown.table(entry)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows if len(rows) > 1 else []:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{device}: {shown.told(entry)}\nin {file.path()}")
    for fault in shown.faults(entry):
        print(f"NOT USED: {fault}")


def _show() -> int:
    try:
        found = shown.used()
    except OSError as error:
        raise CalibrationError(f"{file.path()} cannot be read: {error.strerror}") from None
    for device, entry in found:
        _print(device, entry)
    if not found:
        print(shown.in_one_line())
    return 0


def _forget(options: argparse.Namespace) -> int:
    machine = None
    if options.device:
        device = _device(options.device)
        machine = file.machine(device.type, device.index or 0)
        if machine is None:
            raise CalibrationError(f"--device {options.device} is not here")
    removed = file.remove(machine)
    print(f"{removed} calibration{'s' * (removed != 1)} removed from {file.path()}")
    return 0

"""``fastseq.calibrate``: measure kinds of calls, or the calls that a model makes."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from collections.abc import Iterator
from types import TracebackType

import torch

from fastseq import backend as backends
from fastseq.calibration import shown
from fastseq.calibration.calls import Shape
from fastseq.calibration.session import MINUTES, CalibrationError, Progress, Session

log = logging.getLogger("fastseq")


class calibrate:
    """Measure our kernels beside torch's on this machine; AUTO then takes what is at least 3% ahead.

    ``fastseq.calibrate().run()`` measures calls that stand for kinds of calls, as ``python -m fastseq calibrate`` does.
    ``with fastseq.calibrate(): model(x)`` lets the model run as ever and takes down what it calls; when the block ends
    without an exception, these calls are measured, and decide for calls of their shapes. A compiled model's calls are
    not seen: record them before ``torch.compile``.

    First the kernels are tried on small calls, beside float64; one that gives a wrong number, raises or crashes is not
    chosen. Trials run in child processes: a script that uses this needs no ``if __name__ == "__main__"``. Results go
    into one file in the user's cache folder, as they come; a run that was stopped is taken up by the next. Where the
    file cannot be written, what was measured counts in this process alone, and a warning says so.

    Args:
        minutes: how long it may take in all, more than 0; what is not measured by then is left to AUTO's table.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; of ``run`` the GPU by default where there is one, and of a
            ``with`` block every device that the model uses.
        progress: whether to show a bar on stderr.

    Attributes:
        report: what was measured, as text; empty before.
        complete: whether all of it was measured before the time was up.

    Raises:
        ValueError: ``minutes`` is not more than 0.
        CalibrationError: no kernel of ours can run on the device; another calibration of it is running; the block made
            no call that can be measured.

    Example:
        >>> import torch, fastseq
        >>> layer = fastseq.nn.LSTM(8, 16)
        >>> with fastseq.calibrate(minutes=1, progress=False):  # doctest: +SKIP
        ...     y, _ = layer(torch.randn(5, 3, 8))
        >>> print(fastseq.explain(layer, torch.randn(5, 3, 8)).splitlines()[0])  # doctest: +SKIP
        scan on cpu runs on: native (AUTO for cpu, scan, ...: measured on this machine on 2026-11-30; ...)
    """

    def __init__(
        self, minutes: float = MINUTES, *, device: str | torch.device | None = None, progress: bool = True
    ) -> None:
        if not minutes > 0.0:
            raise ValueError(f"minutes must be more than 0, got {minutes!r}")
        self.minutes, self.progress = float(minutes), progress
        self.device = None if device is None else indexed(torch.device(device))
        self.report, self.complete = "", True
        self._used = False

    def run(self) -> str:
        """Measure calls that stand for kinds of calls; returns the report."""
        self._used = True
        device = self.device
        if device is None:
            device = indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        self._measure({device: None})
        return self.report

    @contextlib.contextmanager
    def recording(self) -> Iterator[backends.Recorded]:
        """Takes down the calls inside the ``with`` block, and measures nothing."""
        self._used = True
        recorded = backends.Recorded()
        before = backends.listen(recorded)
        try:
            yield recorded
        finally:
            backends.listen(before)

    def __enter__(self) -> calibrate:
        self._open = self.recording()
        self._recorded = self._open.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(None, None, None)
        if kind is None:
            self._measure(self.by_device(self._recorded))

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            warnings.warn(
                "fastseq.calibrate() measured nothing: call .run() on it, or use it in a with statement", stacklevel=2
            )

    def by_device(self, recorded: backends.Recorded) -> dict[torch.device, list[Shape] | None]:
        """The calls that can be measured, by device."""
        found: dict[torch.device, list[Shape] | None] = {}
        left: set[str] = set()
        for shape, device in recorded.calls:
            if self.device not in (None, indexed(device)):
                continue
            if device.type in ("cpu", "cuda") and shape.dtype:
                shapes = found.setdefault(indexed(device), [])
                assert shapes is not None
                shapes.append(shape)
            else:
                left.add(str(device))
        if not found:
            where = f" on {self.device}" if self.device else f" on {', '.join(sorted(left))}" if left else ""
            raise CalibrationError(
                f"the block made no call that can be measured{where}: it must call layers or functions of fastseq, of "
                "which no backend is named, on a CPU or a CUDA device, and not compiled"
            )
        return found

    def _measure(self, wanted: dict[torch.device, list[Shape] | None]) -> None:
        end, reports = time.monotonic() + 60.0 * self.minutes, []
        for place, (device, shapes) in enumerate(wanted.items()):
            now = time.monotonic()
            until = now + (end - now) / (len(wanted) - place)
            session = Session(device, until, shapes, Progress(self.progress), unwritten=True)
            self.complete &= session.run()
            reports.append("\n".join([f"{device}: {shown.told(session.entry)}", *shown.faults(session.entry)]))
            if session.refused:
                warnings.warn(f"the calibration counts in this process alone: {session.refused}", stacklevel=3)
        self.report = "\n".join(reports)
        log.info("calibrated: %s", self.report)


def indexed(device: torch.device) -> torch.device:
    """A device with its number, where it is a GPU without one; the CPU without."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return device

"""Everything measured so far as one HTML page to look at; the same numbers as tables, as JSON, and as pictures.

ratio = peer's time / ours: above 1 fastseq is ahead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.peers import OURS, PEERS
from bench.run import NOISY, Entry, Options, Result, Timing, geomean
from fastseq import cli

SCHEMA = 1
"""Version of the JSON document's layout."""

RESULTS = Path(__file__).resolve().parent / "results"
"""Where the committed result files are."""

CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16")


# --- numbers --------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three digits: 1.23 µs, 45.6 µs, 789 µs, 12.3 ms, 1.00 s."""
    unit, factor = next(((u, f) for u, f in (("µs", 1e6), ("ms", 1e3)) if seconds * f < 999.5), ("s", 1.0))
    value = seconds * factor
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.1g}×"


@dataclasses.dataclass
class Summary:
    """A set of cases against one peer (or ``best``): geometric mean and lowest of the ratios, and where that is."""

    of: str
    peer: str
    count: int
    geomean: float
    worst: float
    worst_case: str


def summarize(results: Sequence[Result], peers: Sequence[str]) -> list[Summary]:
    """One line for each family and group, and each peer that has a ratio there; ``best`` first."""
    sets: dict[str, list[Result]] = {}
    for key in ("family", "group"):
        for result in results:
            if name := getattr(result.case, key):
                sets.setdefault(name, []).append(result)
    lines = []
    for name, members in sets.items():
        for peer in ("best", *peers):
            ratios = {r.case.name: ratio for r in members if (ratio := r.ratio(peer)) is not None}
            mean = geomean(list(ratios.values()))
            if mean is not None:
                worst = min(ratios, key=lambda case: ratios[case])
                lines.append(Summary(name, peer, len(ratios), mean, ratios[worst], worst))
    return lines


# --- tables ---------------------------------------------------------------------------------------------------------


class Printer:
    """Writes titled tables: by rich where it is installed, else plain. Cells of the first column are left-aligned."""

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file or sys.stdout
        try:
            from rich.console import Console

            console = Console(file=self.file, highlight=False)
            if not console.is_terminal:
                console = Console(file=self.file, highlight=False, width=200)
            self.console: Any = console
        except ImportError:
            self.console = None

    def line(self, text: str = "") -> None:
        if self.console is not None:
            self.console.print(text, markup=False)
        else:
            print(text, file=self.file)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self.console is not None:
            from rich import box
            from rich.table import Table
            from rich.text import Text

            table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
            for i, name in enumerate(header):
                table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell, style=_style(cell)) for cell in row))
            self.console.print(table)
            return
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        self.line(title)
        for row in (header, *rows):
            cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            self.line("  ".join(cells).rstrip())
        self.line()


def _style(cell: str) -> str:
    if cell == "refused":
        return "bold red"
    if cell.endswith("×"):
        return "green" if float(cell[:-1]) >= 1 else "red"
    return ""


def labels(results: Sequence[Result]) -> dict[str, str]:
    """Table heading of each contestant, fastseq's first, then those that have an entry."""
    names = list(dict.fromkeys(name for result in results for name in result.entries))
    return {name: OURS.label if name == OURS.name else PEERS[name].label for name in names}


def cell(entry: Entry | None) -> str:
    if entry is None or entry.status == "unavailable":
        return "–"
    return duration(entry.timing.median) if entry.timing else entry.status


def print_report(results: Sequence[Result], printer: Printer) -> None:
    """A table for each group, then the summary, then what was refused and why."""
    heads = labels(results)
    peers = [name for name in heads if name != OURS.name]
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.case.group, []).append(result)
    for group, members in groups.items():
        shown = [p for p in peers if any(r.entries[p].status != "unavailable" for r in members)]
        memory = any(e.peak_bytes is not None for r in members for e in r.entries.values())
        header = ["case", "backend", heads[OURS.name], *(heads[p] for p in shown), *(f"/ {heads[p]}" for p in shown)]
        header += ["spread"] + (["peak MiB: ours", *(heads[p] for p in shown)] if memory else [])
        rows = []
        for r in members:
            ours = r.entries[OURS.name]
            row = [r.case.name, ours.backend or "–", cell(ours), *(cell(r.entries[p]) for p in shown)]
            row += [times(r.ratio(p)) for p in shown]
            spreads = [e.timing.spread for e in r.entries.values() if e.timing]
            row.append(f"{max(spreads):.0%}{' !' if r.noisy else ''}" if spreads else "–")
            if memory:
                row += [_mebibytes(r.entries[p].peak_bytes) for p in (OURS.name, *shown)]
            rows.append(row)
        printer.table(group, header, rows)
    against = {(line.of, line.peer): line for line in summarize(results, peers)}
    rows = []
    for best in (line for line in against.values() if line.peer == "best"):
        others = (against.get((best.of, peer)) for peer in peers)
        row = [best.of, str(best.count), times(best.geomean), times(best.worst)]
        rows.append([*row, *(times(line.geomean if line else None) for line in others), best.worst_case])
    if rows:
        header = ["", "cases", "best peer", "worst", *(heads[peer] for peer in peers), "worst is at"]
        printer.table("time of peer / time of fastseq: geometric means", header, rows)
    for note in notes(results):
        printer.line(note)


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f}"


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know beside the numbers: noise, and every refusal with its reason."""
    lines = []
    noisy = sum(result.noisy for result in results)
    if noisy:
        lines.append(
            f"noise: {noisy} of {len(results)} cases have a contestant whose rounds spread (interquartile range over "
            f"median) by more than {NOISY:.0%}; they are marked '!'. Quiet the machine or raise --min-time."
        )
    for result in results:
        for name in result.failed:
            lines.append(f"refused: {name} on {result.case.name}: {result.entries[name].reason}")
    return lines


# --- JSON -----------------------------------------------------------------------------------------------------------


def environment(options: Options) -> dict[str, Any]:
    """Machine, software and commit: what a number means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    facts = described_cpu(cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_generation": generation(facts),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in f"{facts.get('flags')} {facts.get('Features')}".split()],
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "instruction_set": instruction_set(),
        "threads": options.threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in ("fastseq-kernels", "torch", "onnxruntime")},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def described_cpu(cpuinfo: str) -> dict[str, str]:
    """What Linux's ``/proc/cpuinfo`` says of a core."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def generation(facts: dict[str, str]) -> str | None:
    """Which design a core is, where its name does not tell: ``family 25, model 17``."""
    if "cpu family" not in facts or "model" not in facts:
        return None
    return f"family {facts['cpu family']}, model {facts['model']}"


def instruction_set() -> str | None:
    """The one fastseq's native kernels run with; None where they are not built."""
    import fastseq

    if fastseq.backends()["native"] is not None:
        return None
    return torch.ops.fastseq.native_isa("")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        where = ["git", "-C", str(Path(__file__).parent)]
        return subprocess.run([*where, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def document(results: Sequence[Result], options: Options, complete: bool, environ: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain data. Times are microseconds; ``complete`` is false where the run was cut short."""
    peers = [name for name in labels(results) if name != OURS.name]
    return {
        "schema": SCHEMA,
        "complete": complete,
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "environment": environ,
        "options": dataclasses.asdict(options),
        "cases": [_case_document(result) for result in results],
        "summary": [dataclasses.asdict(line) for line in summarize(results, peers)],
        "notes": notes(results),
    }


def _case_document(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "group": case.group,
        "family": case.family,
        "shape": dataclasses.asdict(case),
        "budget": result.budget,
        "contestants": {name: entry_document(entry) for name, entry in result.entries.items()},
        "ratios": {name: result.ratio(name) for name in (*result.entries, "best") if name != OURS.name},
        "noisy": result.noisy,
    }


def entry_document(entry: Entry) -> dict[str, Any]:
    document: dict[str, Any] = {"status": entry.status, "reason": entry.reason, "backend": entry.backend}
    document["errors"] = {name: error if error != float("inf") else None for name, error in entry.errors.items()}
    document["peak_bytes"] = entry.peak_bytes
    if entry.timing:
        document |= _timing_document(entry.timing) | {"setting": entry.setting}
        document["settings"] = {name: _timing_document(timing) for name, timing in entry.timings.items()}
    return document


def _timing_document(timing: Timing) -> dict[str, Any]:
    seconds = {"median_us": timing.median, "iqr_us": timing.iqr, "least_us": timing.least}
    return {name: value * 1e6 for name, value in seconds.items()} | {"rounds": timing.rounds, "inner": timing.inner}


def unwritable(path: Path) -> str | None:
    """Why no result can be written to a path, as far as it is known before the work; None where it can."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}"
    return f"{path}: this is a folder, expected a file" if path.is_dir() else None


def write_json(path: Path, data: dict[str, Any], last: bool = True) -> None:
    """Write a result file, by :func:`fastseq.cli.write_text`. Not the last of a run: into a file only, where the next
    one takes its place."""
    if last or cli.is_file(path):
        cli.write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


# --- pictures ------------------------------------------------------------------------------------------------------


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Bars of the ratio to each peer, a panel for each group, worst first; nothing where no case has a ratio."""
    from bench import speed_figures
    from fastseq.demo import plots

    cases = [_case_document(result) for result in results if result.ratio("best") is not None]
    if cases:
        with plots.style():
            speed_figures.groups(cases, title).savefig(path, dpi=150)


def main(argv: list[str]) -> int:
    """Entry point of ``python -m bench report``; 2 on bad arguments or where there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report", description="One HTML page of all result files, or the figures that docs use."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="PATH", help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="write docs/choosing.md and the figures of docs instead")
    options = parser.parse_args(argv)
    try:
        from bench import page
        from bench.studies import choosing

        if options.docs:
            written = choosing.write(options.results)
        else:
            command = shlex.join(["python", "-m", "bench", "report", *argv])
            text = page.render(options.results, command)
            cli.write_text(options.out, text)
            written = [options.out]
    except ImportError as error:
        print(f"python -m bench report needs the package {error.name}; pip install {error.name}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return 2
    print("wrote " + ", ".join(str(path) for path in written))
    return 0

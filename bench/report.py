"""The results of a run as a JSON document and as tables. ratio = peer's time / ours: above 1 fastseq is faster."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastseq
from bench.formats import NONE, time_of, times
from bench.peers import OURS, label
from bench.run import NOISY, Entry, Options, Result, Timing, geomean
from fastseq import cli

Document = dict[str, Any]

SCHEMA = 1
"""Version of the JSON document's layout."""

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
"""Where the committed result files are."""

CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16")


def environment(threads: int) -> Document:
    """Machine, software and commit, without which a number has no meaning."""
    cpuinfo = Path("/proc/cpuinfo")
    facts = described_cpu(cpuinfo.read_text() if cpuinfo.exists() else "")
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cpu_generation": generation(facts),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in f"{facts.get('flags')} {facts.get('Features')}".split()],
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "instruction_set": torch.ops.fastseq.native_isa("") if fastseq.backends()["native"] is None else None,
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions("fastseq-kernels", "torch", "onnxruntime"),
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def described_cpu(cpuinfo: str) -> dict[str, str]:
    """What Linux's ``/proc/cpuinfo`` says of a core."""
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def generation(facts: Mapping[str, str]) -> str | None:
    """Which design a core is, because its name may not tell: ``family 25, model 17``."""
    if "cpu family" not in facts or "model" not in facts:
        return None
    return f"family {facts['cpu family']}, model {facts['model']}"


def versions(*packages: str) -> dict[str, str | None]:
    """Of each package; None if it is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def document(cases: Sequence[Document], options: Options, complete: bool, environ: Document) -> Document:
    """Everything as plain data. Times are microseconds; ``complete`` is false if the run was cut short."""
    return {
        "schema": SCHEMA,
        "complete": complete,
        "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
        "environment": environ,
        "options": dataclasses.asdict(options),
        "cases": list(cases),
        "summary": summarize(cases),
        "notes": notes(cases),
    }


def case_document(result: Result) -> Document:
    """A result of this file's schema, with the ratios of fastseq to each peer."""
    return measured_case(result) | {"ratios": result.ratios(), "noisy": result.noisy}


def measured_case(result: Result) -> Document:
    """What every result file says of a case."""
    case = result.case
    return {
        "name": case.name,
        "group": case.group,
        "family": case.family,
        "shape": dataclasses.asdict(case),
        "budget": finite(result.budget),
        "contestants": {name: entry_document(entry) for name, entry in result.entries.items()},
    }


def entry_document(entry: Entry) -> Document:
    found: Document = {"status": entry.status, "reason": entry.reason, "backend": entry.backend}
    found |= {"errors": finite(entry.errors), "peak_bytes": entry.peak_bytes}
    if entry.timing:
        found |= _timing_document(entry.timing) | {"setting": entry.setting}
        found["settings"] = {name: _timing_document(timing) for name, timing in entry.timings.items()}
    return found


def _timing_document(timing: Timing) -> Document:
    """The least time shows what a busy machine could have done."""
    seconds = {"median_us": timing.median, "iqr_us": timing.iqr, "least_us": min(timing.times)}
    inner = {"rounds": len(timing.times), "inner": timing.calls}
    return {name: value * 1e6 for name, value in seconds.items()} | inner


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: value if value < float("inf") else None for name, value in values.items()}


def ratios_of(case: Document) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Each of our contestants with its ratios to the peers. A run on a GPU times several, a run on the CPU one."""
    several = any(isinstance(ratio, dict) for ratio in case["ratios"].values())
    yield from case["ratios"].items() if several else [(OURS.name, case["ratios"])]


def summarize(cases: Sequence[Document]) -> list[Document]:
    """For each family and each group: geometric mean and lowest of the ratios to each peer; ``best``: to the
    fastest."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for key in ("family", "group"):
        for case in cases:
            for ours, against in ratios_of(case):
                for peer, ratio in against.items():
                    if ratio is not None and case[key]:
                        found.setdefault((case[key], ours, peer), {})[case["name"]] = ratio
    lines = []
    for (of, ours, peer), ratios in found.items():
        worst = min(ratios, key=lambda name: ratios[name])
        lines.append(
            {"of": of, "backend": ours, "peer": peer, "count": len(ratios), "geomean": geomean(list(ratios.values())),
             "worst": ratios[worst], "worst_case": worst}
        )  # fmt: skip
    return lines


def notes(cases: Sequence[Document]) -> list[str]:
    """What a reader must know beside the numbers: noise, and every refusal with its reason."""
    noisy = sum(case["noisy"] for case in cases)
    spread = (
        f"noise: {noisy} of {len(cases)} cases have a contestant whose rounds spread (interquartile range over median) "
        f"by more than {NOISY:.0%}; they are marked '!'. Quiet the machine or raise --min-time."
    )
    return [spread] * (noisy > 0) + refusals(cases)


def refusals(cases: Sequence[Document]) -> list[str]:
    return [
        f"refused: {name} on {case['name']}: {entry['reason']}"
        for case in cases
        for name, entry in case["contestants"].items()
        if entry["status"] == "refused"
    ]


def unwritable(path: Path) -> str | None:
    """Why no result can be written to a path, as far as this is known before the work; None if it can."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}"
    return f"{path}: this is a folder, expected a file" if path.is_dir() else None


def write_json(path: Path, data: Document, last: bool = True) -> None:
    """Write a result file, by :func:`fastseq.cli.write_text`. ``last=False``: more results follow, so write only to an
    ordinary file, in which they replace these."""
    if last or cli.is_file(path):
        cli.write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(title)
    for row in (header, *rows):
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
    print()


def print_report(found: Document) -> None:
    """A table for each group, then the summary, then what was refused and why."""
    cases = found["cases"]
    peers = [name for name in dict.fromkeys(n for case in cases for n in case["contestants"]) if name != OURS.name]
    groups: dict[str, list[Document]] = {}
    for case in cases:
        groups.setdefault(case["group"], []).append(case)
    for group, members in groups.items():
        shown = [p for p in peers if any(c["contestants"][p]["status"] != "unavailable" for c in members)]
        everyone = [OURS.name, *shown]
        memory = any(entry["peak_bytes"] is not None for c in members for entry in c["contestants"].values())
        header = ["case", "backend", *map(label, everyone), *(f"/ {label(p)}" for p in shown), "spread"]
        header += ["peak MiB: ours", *map(label, shown)] if memory else []
        rows = []
        for case in members:
            entries = case["contestants"]
            row = [case["name"], entries[OURS.name]["backend"] or NONE, *(time_of(entries[n]) for n in everyone)]
            row += [times(case["ratios"][peer]) for peer in shown]
            spreads = [entry["iqr_us"] / entry["median_us"] for entry in entries.values() if "median_us" in entry]
            row.append(f"{max(spreads):.0%}{' !' if case['noisy'] else ''}" if spreads else NONE)
            peaks = (entries[name]["peak_bytes"] for name in everyone) if memory else ()
            rows.append([*row, *(NONE if peak is None else f"{peak / 2**20:.1f}" for peak in peaks)])
        print_table(group, header, rows)
    against = {(line["of"], line["peer"]): line for line in found["summary"]}
    rows = []
    for (of, peer), best in against.items():
        if peer == "best":
            means = (against.get((of, peer), {}).get("geomean") for peer in peers)
            row = [of, str(best["count"]), times(best["geomean"]), times(best["worst"]), *map(times, means)]
            rows.append([*row, best["worst_case"]])
    if rows:
        header = ["", "cases", "best peer", "worst", *map(label, peers), "worst is at"]
        print_table("time of peer / time of fastseq: geometric means", header, rows)
    for note in found["notes"]:
        print(note)

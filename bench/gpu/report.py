"""Results of a run on a GPU as plain data, as tables, and as the README's table of what ran where."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.report import SCHEMA, Printer, duration, environment, times
from bench.run import NOISY, Options, geomean

ROOT = Path(__file__).resolve().parents[2]


def slug(device: str) -> str:
    """A device's name in that of a file: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def sources() -> str:
    """A digest of all that is compiled or run: tells whether two runs had the same sources, with or without git."""
    digest = hashlib.sha256()
    for folder in ("csrc", "fastseq", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def surroundings(device: str, commit: str | None) -> dict[str, Any]:
    """The environment of bench/report.py, and the GPU's."""
    found = environment(Options(torch.get_num_threads()))
    found["commit"] = found["commit"] or commit
    found["sources"] = sources()
    versions: dict[str, Any] = {}
    for package in ("triton", "pytest", "flashrnn"):
        try:
            versions[package] = __import__("importlib.metadata").metadata.version(package)
        except Exception:
            versions[package] = None
    found["versions"] |= versions | {"cuda": torch.version.cuda}
    found |= {"device": found["cpu"], "driver": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory"] = properties.total_memory
        found["versions"]["cudnn"] = torch.backends.cudnn.version()
        found["tf32"] = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
        found["driver"] = _driver()
    return found


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return said.split()[0] if said.strip() else None


# --- documents --------------------------------------------------------------------------------------------------------


def case_lost(line: Mapping[str, Any]) -> dict[str, Any]:
    """A case whose process was lost, and which was not measured after that."""
    where = f" (at {line['at']})" if line.get("at") else ""
    return {"name": line["name"], "reason": f"{line['reason']}{where}", "contestants": {}, "ratios": {}}


def timings_document(
    cases: Sequence[dict[str, Any]], environ: dict[str, Any], planned: int, complete: bool, why: str
) -> dict[str, Any]:
    """``complete``: every case of the plan was measured; why not, is in ``stopped``. Times are microseconds."""
    return {
        "schema": SCHEMA,
        "complete": complete,
        "stopped": why,
        "planned": planned,
        "environment": environ,
        "cases": list(cases),
        "summary": summary(cases),
        "notes": notes(cases),
    }


def earlier(path: Path, environ: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of the file that is there, if of the same device, each with the commit at which it was measured."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["environment"]["device"] != environ["device"]:
        return []
    return [{"commit": before["environment"]["commit"], **case} for case in before["cases"]]


def beside_earlier(cases: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``cases``, and those of before that were not measured again: a run adds to what is known of a device."""
    names = {case["name"] for case in cases}
    return [*cases, *(case for case in before if case["name"] not in names)]


def summary(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each of our backends, in each group and in all: geometric mean and lowest of the ratios to each peer."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    for case in cases:
        for ours, against in case["ratios"].items():
            for peer, ratio in against.items():
                if ratio is not None:
                    for of in (case["family"], case["group"]):
                        ratios.setdefault((of, ours, peer), {})[case["name"]] = ratio
    lines = []
    for (of, ours, peer), found in ratios.items():
        worst = min(found, key=lambda name: found[name])
        lines.append(
            {"of": of, "backend": ours, "peer": peer, "count": len(found), "geomean": geomean(list(found.values())),
             "worst": found[worst], "worst_case": worst}
        )  # fmt: skip
    return lines


def notes(cases: Sequence[dict[str, Any]]) -> list[str]:
    """What went wrong, and where rounds spread."""
    found, noisy = [], 0
    for case in cases:
        if case["reason"]:
            found.append(f"not measured: {case['name']}: {case['reason']}")
        for name, entry in case["contestants"].items():
            if entry["status"] == "refused":
                found.append(f"refused: {name} on {case['name']}: {entry['reason']}")
            noisy += "iqr_us" in entry and entry["iqr_us"] > NOISY * entry["median_us"]
    old = Counter(case["commit"] for case in cases if "commit" in case)
    found += [f"{count} cases were measured at an earlier commit, {str(commit)[:10]}" for commit, count in old.items()]
    return found + [f"{noisy} times spread (interquartile range over median) by more than {NOISY:.0%}"] * (noisy > 0)


def tests_document(parts: Mapping[str, dict[str, Any]], environ: dict[str, Any], complete: bool) -> dict[str, Any]:
    """Counts by kernels and by file; every test that failed or was lost, with its reason."""
    kernels = {}
    for name, part in parts.items():
        lost = [
            {"name": line["name"], "outcome": "lost", "reason": line["reason"]}
            for line in part["lost"]
            if line["name"] not in part["tests"]
        ]
        files: dict[str, Counter[str]] = {}
        for node, outcome in [*part["tests"].items(), *((line["name"], "lost") for line in lost)]:
            files.setdefault(node.partition("::")[0], Counter())[outcome] += 1
        kernels[name] = {
            "reason": part["reason"],
            "counts": dict(sum(files.values(), Counter())),
            "suites": {file: dict(counts) for file, counts in sorted(files.items())},
            "failures": [*part.get("failures", []), *lost],
        }
    return {"schema": SCHEMA, "complete": complete, "environment": environ, "kernels": kernels}


# --- tables -----------------------------------------------------------------------------------------------------------


def print_cases(document: dict[str, Any], printer: Printer, labels: Mapping[str, str]) -> None:
    """A table of all cases, the means, and the notes."""
    cases = document["cases"]
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    shown = [n for n in names if any("median_us" in c["contestants"].get(n, {}) for c in cases)]
    rows = []
    for case in cases:
        row = [case["name"]]
        for name in shown:
            entry = case["contestants"].get(name, {})
            median = entry.get("median_us")
            row.append(duration(median / 1e6) if median else "refused" if entry.get("status") == "refused" else "–")
        rates = [f"{e['tflops']:.3g}" for n in shown if "tflops" in (e := case["contestants"].get(n, {}))]
        row.append(rates[0] if rates else "–")
        row += [times(against.get("best")) for against in case["ratios"].values()]
        rows.append(row + [""] * (len(shown) + 2 + len(_ours(cases)) - len(row)))
    header = ["case", *(labels.get(n, n) for n in shown), "TFLOP/s", *(f"{n} / best peer" for n in _ours(cases))]
    if rows:
        printer.table(f"{len(cases)} of {document['planned']} cases", header, rows)
    for line in document["summary"]:
        if line["peer"] == "best":
            mean, worst = times(line["geomean"]), times(line["worst"])
            printer.line(f"{line['of']}, {line['backend']}: {mean} the best peer's speed over {line['count']} cases, "
                         f"worst {worst} ({line['worst_case']})")  # fmt: skip
    for note in document["notes"]:
        printer.line(note)


def _ours(cases: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for case in cases for name in case["ratios"]))

"""Results of runs on a GPU: as plain data, as tables, and read from bench/results."""

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

from bench.formats import NONE, time_of, times
from bench.report import ROOT, SCHEMA, Document, environment, print_table, refusals, summarize, versions
from bench.run import NOISY


def slug(device: str) -> str:
    """A device's name in that of a file: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def sources() -> str:
    """A digest of all that is compiled or run: shows whether two runs had the same sources, with or without git."""
    digest = hashlib.sha256()
    for folder in ("csrc", "fastseq", "kernels"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def surroundings(device: str, commit: str | None) -> Document:
    """The environment of bench/report.py, and the GPU's."""
    found = environment(torch.get_num_threads())
    found["commit"] = found["commit"] or commit
    found["sources"] = sources()
    found["versions"] |= versions("triton", "pytest", "flashrnn") | {"cuda": torch.version.cuda}
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


def case_lost(line: Mapping[str, Any]) -> Document:
    """A case whose process was lost, and which was not measured after that."""
    where = f" (at {line['at']})" if line.get("at") else ""
    return {"name": line["name"], "reason": f"{line['reason']}{where}", "contestants": {}, "ratios": {}}


def timings_document(cases: Sequence[Document], environ: Document, planned: int, why: str) -> Document:
    """``why``: the reason for which not every case of the plan was measured, or "". Times are microseconds."""
    return {
        "schema": SCHEMA,
        "complete": not why,
        "stopped": why,
        "planned": planned,
        "environment": environ,
        "cases": list(cases),
        "summary": summarize(cases),
        "notes": notes(cases),
    }


def earlier_cases(path: Path, environ: Document) -> list[Document]:
    """The cases of an existing file, if of the same device, each with the commit at which it was measured."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["environment"]["device"] != environ["device"]:
        return []
    return [{"commit": before["environment"]["commit"], **case} for case in before["cases"]]


def beside_earlier(cases: Sequence[Document], before: Sequence[Document]) -> list[Document]:
    """``cases``, and those of before that were not measured again: a run adds to what is known of a device."""
    names = {case["name"] for case in cases}
    return [*cases, *(case for case in before if case["name"] not in names)]


def notes(cases: Sequence[Document]) -> list[str]:
    """What failed, how many times spread widely, and what was measured at another commit."""
    found = [f"not measured: {case['name']}: {case['reason']}" for case in cases if case["reason"]] + refusals(cases)
    old = Counter(case["commit"] for case in cases if "commit" in case)
    found += [f"{count} cases were measured at an earlier commit, {str(commit)[:10]}" for commit, count in old.items()]
    timed = [entry for case in cases for entry in case["contestants"].values() if "iqr_us" in entry]
    noisy = sum(entry["iqr_us"] > NOISY * entry["median_us"] for entry in timed)
    return found + [f"{noisy} times spread (interquartile range over median) by more than {NOISY:.0%}"] * (noisy > 0)


def tests_document(parts: Mapping[str, Document], environ: Document, complete: bool) -> Document:
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


def print_cases(document: Document, labels: Mapping[str, str]) -> None:
    """A table of all cases, the means, and the notes."""
    cases = document["cases"]
    names = dict.fromkeys(name for case in cases for name in case["contestants"])
    shown = [n for n in names if any("median_us" in c["contestants"].get(n, {}) for c in cases)]
    ours = list(dict.fromkeys(name for case in cases for name in case["ratios"]))
    rows = []
    for case in cases:
        entries = case["contestants"]
        rate = next((f"{entries[n]['tflops']:.3g}" for n in shown if "tflops" in entries.get(n, {})), NONE)
        best = [times(case["ratios"].get(n, {}).get("best")) for n in ours]
        rows.append([case["name"], *(time_of(entries.get(n)) for n in shown), rate, *best])
    header = ["case", *(labels.get(n, n) for n in shown), "TFLOP/s", *(f"{n} / best peer" for n in ours)]
    if rows:
        print_table(f"{len(cases)} of {document['planned']} cases", header, rows)
    for line in document["summary"]:
        if line["peer"] == "best":
            mean, worst = times(line["geomean"]), times(line["worst"])
            print(f"{line['of']}, {line['backend']}: {mean} the best peer's speed over {line['count']} cases, "
                  f"worst {worst} ({line['worst_case']})")  # fmt: skip
    for note in document["notes"]:
        print(note)


def load(results: Path) -> dict[str, dict[str, Document]]:
    """Result files by GPU, and then by what they are: tests, recurrent, attention."""
    found: dict[str, dict[str, Document]] = {}
    for what in ("tests", "recurrent", "attention"):
        for path in sorted(results.glob(f"*-{what}.json")):
            document = json.loads(path.read_text())
            if document["environment"].get("driver") is not None:
                found.setdefault(document["environment"]["device"], {})[what] = document
    return found


def commit(document: Document) -> str:
    """Its environment's, shortened, and how many cases were measured at others."""
    commit = document["environment"]["commit"] or "an unknown commit"
    changes = " with changes" if commit.endswith("+changes") else ""
    before = sum("commit" in case for case in document.get("cases", ()))
    return f"{commit[:10]}{changes}" + f", {before} cases at earlier ones" * (before > 0)


def best_peer(case: Document) -> tuple[str, float] | None:
    """The fastest contestant that is not ours, and its microseconds."""
    peers = {n: e["median_us"] for n, e in case["contestants"].items() if not e.get("backend") and "median_us" in e}
    return min(peers.items(), key=lambda pair: pair[1]) if peers else None

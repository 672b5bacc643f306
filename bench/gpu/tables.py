"""The tables of GPUs in docs, made from the result files: which kernels ran where, and how fast."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bench.exhibits import outcomes
from bench.formats import NONE, duration, markdown, time_of, times
from bench.gpu import auto
from bench.gpu.cases import FAMILIES
from bench.gpu.report import best_peer, commit, load, slug
from bench.report import Document

NOTHING = "No result file of a GPU is there yet."


class Kernels(NamedTuple):
    """Kernels of one backend and one family of cases; ``until_run``: how they are tested without a GPU."""

    label: str
    backend: str
    family: str
    until_run: str


_TRITON, _CUDA = "interpreted and compiled", "emulated and compiled"
KERNELS = (
    Kernels("Triton, recurrent scan", "triton", "recurrent", _TRITON),
    Kernels("Triton, attention", "triton", "attention", _TRITON),
    Kernels("CUDA C++, recurrent scan", "native", "recurrent", _CUDA),
    Kernels("CUDA C++, attention", "native", "attention", _CUDA),
)


def support(results: Path) -> str:
    """For each set of kernels and each GPU, how its tests came out, and its speed. A GPU without a result file has no
    column."""
    found = load(results)
    devices = sorted(found)
    rows = []
    for kernels in KERNELS:
        nothing = f"{kernels.until_run}, not yet run on hardware"
        cells = [_cell(kernels, found[device]) or nothing for device in devices]
        rows.append([f'{kernels.label} (`backend="{kernels.backend}"`)', *(cells or [nothing])])
    return "\n".join(markdown(["GPU kernels", *(devices or ["hardware"])], rows))


def _cell(kernels: Kernels, documents: Mapping[str, Document]) -> str:
    """What the files of one GPU say about these kernels."""
    said = []
    counts = outcomes(documents.get("tests"), kernels.backend, kernels.family)
    ran = {outcome: count for outcome, count in counts.items() if outcome != "skipped"}
    if ran:
        shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(ran.items(), reverse=True))
        said.append(f"tests: {shown} (at {commit(documents['tests'])})")
    timed = documents.get(kernels.family, {"summary": ()})
    for line in timed["summary"]:
        if (line["of"], line["backend"], line["peer"]) == (kernels.family, kernels.backend, "best"):
            worst = f"worst {times(line['worst'])} `{line['worst_case']}` (at {commit(timed)})"
            said.append(f"{times(line['geomean'])} the best peer's speed over {line['count']} cases, {worst}")
    return "; ".join(said)


def speed(results: Path) -> str:
    """For each GPU: AUTO's kinds of calls and our kernels' speed beside the best peer; folded, every case."""
    out: list[str] = []
    standings = auto.standings(results)
    for device, documents in load(results).items():
        timed = {family: documents[family] for family in FAMILIES if family in documents}
        if timed:
            out += [""] if out else []
            out += ["; ".join([_measured(device, timed), *(_file(device, *pair) for pair in timed.items())]) + ".", ""]
            kinds = [
                [f"{s.row.op}, {s.row.kind or 'all other'}", str(len(s.cases)), s.row.order[0], *s.shown()]
                for s in standings
                if s.device == device and s.cases
            ]
            means = ["C++: geometric mean", "worst", "Triton: geometric mean", "worst"]
            out += markdown(["calls", "cases", "AUTO takes", *means], kinds)
            out += ["", "<details><summary>Case by case</summary>", ""]
            rows = [_row(case) for document in timed.values() for case in document["cases"]]
            out += markdown(["", "best peer", "C++", "Triton", "C++ / best peer", "Triton / best peer"], rows)
            out += ["", "</details>"]
    return "\n".join(out) or NOTHING


def _measured(device: str, timed: Mapping[str, Document]) -> str:
    """Where and with what."""
    environment = next(iter(timed.values()))["environment"]
    versions = environment["versions"]
    cudnn = versions["cudnn"]
    return (
        f"Measured on {device} (driver {environment['driver']}), torch {versions['torch']}, "
        f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}, {environment['date'][:10]}"
    )


def _file(device: str, family: str, document: Document) -> str:
    """How many cases a file has, of which commit, and where it is."""
    name = f"{slug(device)}-{family}.json"
    count = sum(not case["reason"] for case in document["cases"])
    layers = "layers " * (family == "recurrent")
    return f"{count} cases of {family} {layers}at commit {commit(document)} in [{name}](../bench/results/{name})"


def _row(case: Document) -> list[str]:
    """A case in the folded table."""
    peer = best_peer(case)
    ours = [time_of(case["contestants"].get(name)) for name in auto.OURS]
    ratios = [times(case["ratios"].get(name, {}).get("best")) for name in auto.OURS]
    return [f"`{case['name']}`", f"{duration(peer[1] / 1e6)} {peer[0]}" if peer else NONE, *ours, *ratios]

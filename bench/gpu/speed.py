"""What bench/results says of speed on GPUs, as tables for the README and docs/gpu.md: ``python -m bench support``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench import support
from bench.cases import DTYPES
from bench.gpu import auto
from bench.gpu.cases import FAMILIES, Heads
from bench.gpu.report import slug
from bench.report import duration, times
from bench.studies import model, model_attention

Document = dict[str, Any]

NOUNS = {"recurrent": "layers ", "attention": ""}
NOTHING = "No result file of a GPU is there yet."


def speed(results: Path) -> str:
    """Of each GPU: AUTO's kinds of calls and how ours stand there beside the best peer; folded, every case."""
    out: list[str] = []
    for device, documents in support.load(results).items():
        timed = {family: documents[family] for family in FAMILIES if family in documents}
        if not timed:
            continue
        out += [""] if out else []
        out.append("; ".join([measured(device, timed), *(of(device, *pair) for pair in timed.items())]) + ".")
        out += ["", "| calls | cases | AUTO takes | C++: geometric mean | worst | Triton: geometric mean | worst |"]
        out += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for s in auto.standings(results):
            if s.device == device and s.cases:
                told = " | ".join((*s.told("native"), *s.told("triton")))
                name = f"{s.row.op}, {s.row.kind or 'all other'}"
                out.append(f"| {name} | {len(s.cases)} | {s.row.order[0]} | {told} |")
        out += ["", "<details><summary>Case by case</summary>", ""]
        out += ["| | best peer | C++ | Triton | C++ / best peer | Triton / best peer |"]
        out += ["| --- | --- | --- | --- | --- | --- |", *(line(c) for d in timed.values() for c in d["cases"])]
        out += ["", "</details>"]
    return "\n".join(out) or NOTHING


def measured(device: str, timed: Mapping[str, Document]) -> str:
    """Where and with what."""
    environment = next(iter(timed.values()))["environment"]
    versions = environment["versions"]
    cudnn = versions["cudnn"]
    return (
        f"Measured on {device} (driver {environment['driver']}), torch {versions['torch']}, "
        f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}, {environment['date'][:10]}"
    )


def of(device: str, family: str, document: Document) -> str:
    """Which cases a file has, of what commit, and where it is."""
    path = f"bench/results/{slug(device)}-{family}.json"
    cases = [case for case in document["cases"] if not case["reason"]]
    when = f"at commit {support.commit(document)}{support.earlier(document)}"
    return f"{len(cases)} cases of {family} {NOUNS[family]}{when} in [{path}]({path})"


def best_peer(case: Document) -> tuple[str, float] | None:
    """The fastest that is not ours, and its microseconds."""
    found = [
        (entry["median_us"], name)
        for name, entry in case["contestants"].items()
        if not entry.get("backend") and "median_us" in entry
    ]
    return (min(found)[1], min(found)[0]) if found else None


def line(case: Document) -> str:
    """A case as a row of the folded table."""
    peer = best_peer(case)
    shown = "–" if peer is None else f"{duration(peer[1] / 1e6)} {peer[0]}"
    ours = [_time(case, name) for name in auto.OURS]
    ratios = [times(case["ratios"].get(name, {}).get("best")) for name in auto.OURS]
    return f"| `{case['name']}` | {shown} | " + " | ".join(ours + ratios) + " |"


def _time(case: Document, name: str, parts: int = 1) -> str:
    entry = case["contestants"].get(name, {})
    if "median_us" in entry:
        return duration(entry["median_us"] / 1e6 / parts)
    return "refused" if entry.get("status") == "refused" else "–"


# --- beside the floors ------------------------------------------------------------------------------------------------


def floors(results: Path) -> str:
    """What was measured beside the floors of ``python -m bench model``, for the GPU that these are of."""
    documents = next((d for name, d in support.load(results).items() if model.H200.name in name), {})
    out = []
    steps = list(_steps(documents.get("recurrent", {"cases": []})))
    if steps:
        out += ["A step of a layer; the floor, that of the Triton role, has no product of x, the times have it:", ""]
        out += ["| | floor | C++ | Triton | best peer |", "| --- | ---: | ---: | ---: | ---: |", *steps, ""]
    calls = list(_calls(documents.get("attention", {"cases": []})))
    if calls:
        shares = " | of the floor | ".join(("C++", "Triton", "best peer"))
        out += ["A call of attention:", "", f"| | floor | bound by | {shares} | of the floor |"]
        out += ["| --- | ---: | --- |" + " ---: |" * 6, *calls]
    return "\n".join(out).strip() or NOTHING


def _steps(document: Document) -> Iterator[str]:
    for case in document["cases"]:
        shape = case.get("shape")
        if not shape or shape["mode"] != "inference" or shape["packed"]:
            continue
        if shape["layers"] > 1 or shape["bidirectional"]:
            continue
        cell = "rnn_tanh" if shape["cell"] == "rnn" else shape["cell"]
        floor = model.floor(cell, DTYPES[shape["dtype"]], shape["batch"], shape["hidden"])
        peer = best_peer(case)
        assert floor is not None
        shown = [duration(floor.step), *(_time(case, name, shape["steps"]) for name in auto.OURS)]
        shown.append("–" if peer is None else duration(peer[1] / 1e6 / shape["steps"]))
        yield f"| `{case['name']}` | " + " | ".join(shown) + " |"


def _calls(document: Document) -> Iterator[str]:
    names = {field.name for field in fields(Heads)}
    for case in document["cases"]:
        if "shape" not in case:
            continue
        floor = model_attention.floor(Heads(**{name: case["shape"][name] for name in names}))
        peer = best_peer(case)
        ours = [case["contestants"].get(name, {}).get("median_us") for name in auto.OURS]
        shown = []
        for median in (*ours, peer[1] if peer else None):
            shown += ["–", "–"] if median is None else [duration(median / 1e6), f"{1e8 * floor.seconds / median:.0f} %"]
        yield f"| `{case['name']}` | {duration(floor.seconds)} | {floor.bound} | " + " | ".join(shown) + " |"

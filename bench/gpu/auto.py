"""AUTO beside the result files: what bench/results says of each of its rows for a GPU, and whether it supports the row.

A row that puts a kernel of ours before torch needs result files of a device of the row's kind. In one, the tests of
that kernel passed; in another, it is no slower than the best peer, in the geometric mean over the row's cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.exhibits import outcomes
from bench.formats import NONE, times
from bench.gpu.report import best_peer, load
from bench.report import RESULTS, Document, print_table
from bench.run import geomean
from fastseq import auto

OURS = {"native": "C++", "triton": "Triton"}
FAMILIES = {"scan": "recurrent", "attention": "attention"}


def key_of(document: Document) -> str:
    """AUTO's key of the device that a file is of."""
    capability = document["environment"].get("capability")
    return f"cuda sm_{capability.replace('.', '')}" if capability else "cuda"


def kind_of(op: str, shape: Mapping[str, Any], device: str) -> str:
    """AUTO's kind of a case, from its ``shape``."""
    dtype = getattr(torch, shape["dtype"])
    if op == "scan":
        scans = shape["layers"] * (2 if shape["bidirectional"] else 1)
        sizes = (shape["steps"], shape["batch"], shape["hidden"], shape["hidden"], scans)
        cell = "rnn_tanh" if shape["cell"] == "rnn" else shape["cell"]
        return auto.scan_kind(device, cell, dtype, *sizes, shape["packed"])
    if device not in auto.ATTENTION_KINDS:
        return ""
    limits = shape["window"] > 0 or shape["kind"] == "varlen"
    training = shape["mode"] == "backward"
    return auto.attention_kind(dtype, shape["queries"], shape["keys"], False, limits, training)


@dataclass
class Standing:
    """What a device's files say of a row: its cases, and for each kernel of ours the ratios to the best peer, by case.

    alone: names of cases that a kernel of ours can run and no peer can.
    """

    row: auto.Row
    device: str
    cases: list[Document] = field(default_factory=list)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    alone: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, dict[str, int]] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        return geomean(list(self.ratios.get(name, {}).values()))

    def shown(self) -> list[str]:
        """Mean and worst of each kernel, for a table."""
        out = []
        for name in OURS:
            ratios = self.ratios.get(name)
            if ratios:
                out += [times(self.mean(name)), times(min(ratios.values()))]
            else:
                out += ["no peer" if self.alone.get(name) else NONE, NONE]
        return out

    @property
    def first(self) -> list[str]:
        """Kernels of ours that the row puts before torch."""
        order = self.row.order
        return [name for name in order[: order.index("torch")] if name in OURS]


def standing(row: auto.Row, device: str, documents: Mapping[str, Document]) -> Standing:
    """Gather it from one device's files."""
    found = Standing(row, device)
    found.outcomes = {name: outcomes(documents.get("tests"), name, FAMILIES[row.op]) for name in OURS}
    for case in documents.get(FAMILIES[row.op], {}).get("cases", ()):
        if "shape" not in case or kind_of(row.op, case["shape"], row.device) != row.kind:
            continue
        found.cases.append(case)
        for name in OURS:
            ratio = case["ratios"].get(name, {}).get("best")
            if ratio is not None:
                found.ratios.setdefault(name, {})[case["name"]] = ratio
            elif "median_us" in case["contestants"].get(name, {}) and best_peer(case) is None:
                found.alone.setdefault(name, []).append(case["name"])
    return found


def complaints(found: Standing) -> Iterator[str]:
    """Why the files do not support a row; nothing if they do."""
    for name in found.first:
        passed = found.outcomes[name].get("passed", 0)
        wrong = {outcome: n for outcome, n in found.outcomes[name].items() if outcome not in ("passed", "skipped")}
        if not passed or wrong:
            yield f"{name} comes first, but its tests there: {wrong or 'none'}"
        mean = found.mean(name)
        if mean is None and not found.alone.get(name):
            yield f"{name} comes first, but no case of this kind was timed there"
        if mean is not None and mean < 1.0:
            yield f"{name} comes first, but has {times(mean)} the best peer's speed there"


def standings(results: Path) -> list[Standing]:
    """Every row for GPUs of some capability, beside each device that has it, or beside "no device"."""
    devices = load(results)
    found = []
    for row in auto.AUTO:
        if row.device.startswith("cuda "):
            of = {name: d for name, d in devices.items() if row.device in map(key_of, d.values())}
            found += [standing(row, name, documents) for name, documents in (of or {"no device": {}}).items()]
    return found


def main(argv: list[str]) -> int:
    """Print the rows beside the files; 1 if these do not support a row."""
    parser = argparse.ArgumentParser(prog="python -m bench auto", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    found = standings(options.results)
    rows = [[s.row.title, s.device, str(len(s.cases)), " ".join(s.row.order), *s.shown()] for s in found]
    heads = (head for label in OURS.values() for head in (f"{label}: mean", "worst"))
    header = ["row", "device", "cases", "order", *heads]
    print_table("AUTO's rows, and ours beside the best peer", header, rows)
    wrong = [f"{s.row.title}: {complaint}" for s in found for complaint in complaints(s)]
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))

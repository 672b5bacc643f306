"""AUTO's rows for GPUs against the result files, and the tables that are made from these."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import readme
from bench.cases import Case
from bench.gpu import auto as beside
from bench.gpu import cases as gpu_cases
from bench.gpu import tables
from bench.studies import model, model_attention
from fastseq import auto

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
FIRST = auto.Row(auto.HOPPER, "scan", auto.ONE_STEP, ("triton", "torch", "reference"), "for this test")
STEP = gpu_cases.Layers("inference", "bfloat16", "gru", 1, 4, 64)


def measured(case: Case, ours: float | None, peer: float | None, backend: str = "triton") -> dict[str, Any]:
    """A case as a file has it; microseconds, None for who could not."""

    def entry(median: float | None, backend: str | None) -> dict[str, Any]:
        timed = {} if median is None else {"median_us": median}
        return {"status": "timed" if timed else "unavailable", "reason": "", "backend": backend, **timed}

    ratio = peer / ours if ours and peer else None
    return {
        "name": case.name, "family": case.family, "group": case.group, "shape": asdict(case), "reason": "",
        "contestants": {backend: entry(ours, backend), "torch": entry(peer, None)},
        "ratios": {backend: {"torch": ratio, "best": ratio}},
    }  # fmt: skip


def write(folder: Path, cases: list[dict[str, Any]], outcomes: dict[str, int], capability: str = "9.0") -> None:
    """Files of a GPU."""
    machine = {
        "device": "NVIDIA H200", "driver": "580", "commit": "c" * 40, "capability": capability, "date": "2026-11-26",
        "versions": {"torch": "2.11", "cudnn": 91900},
    }  # fmt: skip
    suites = {f"tests/test_triton_{family}_interpreted.py": outcomes for family in ("recurrent", "attention")}
    tests = {"environment": machine, "kernels": {"triton": {"suites": suites}, "native": {"suites": suites}}}
    (folder / "nvidia-h200-tests.json").write_text(json.dumps(tests))
    for family in gpu_cases.FAMILIES:
        own = [case for case in cases if case["family"] == family]
        document = {"environment": machine, "cases": own, "summary": [], "notes": [], "planned": len(own)}
        (folder / f"nvidia-h200-{family}.json").write_text(json.dumps(document))


@pytest.mark.parametrize("row", [r for r in auto.AUTO if r.device.startswith("cuda")], ids=lambda row: row.title)
def test_a_row_with_a_kernel_of_ours_first_has_the_results_to_show_for_it(row):
    found = [s for s in beside.standings(RESULTS) if s.row == row]
    for standing in found or [beside.Standing(row, "no device")]:
        assert list(beside.complaints(standing)) == []
        for file in re.findall(r"bench/results/[\w.-]+", row.because):
            assert (ROOT / file).exists()
            assert standing.cases
    assert found or row.device == "cuda"


@pytest.mark.parametrize(
    ("cases", "outcomes", "complaint"),
    [
        ([(10.0, 11.0)], {"passed": 3, "skipped": 1}, None),
        ([(10.0, 11.0), (10.0, 9.5)], {"passed": 3}, None),  # in the mean
        ([(10.0, 11.0), (10.0, 8.0)], {"passed": 3}, "0.94× the best peer's speed"),
        ([(10.0, 11.0)], {"passed": 3, "failed": 1}, "its tests there: {'failed': 1}"),
        ([(10.0, 11.0)], {"passed": 3, "lost": 1}, "its tests there: {'lost': 1}"),
        ([(10.0, 11.0)], {"skipped": 3}, "its tests there: none"),
        ([], {"passed": 3}, "no case of this kind was timed"),
        ([(None, 11.0)], {"passed": 3}, "no case of this kind was timed"),
        ([(10.0, None)], {"passed": 3}, None),  # which no peer can do
    ],
)
def test_what_is_missing_or_slow_is_complained_of(cases, outcomes, complaint, tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "AUTO", (FIRST,))
    shapes = [replace(STEP, hidden=64 * n) for n in range(1, len(cases) + 1)]
    write(tmp_path, [measured(shape, *pair) for shape, pair in zip(shapes, cases, strict=True)], outcomes)
    (standing,) = beside.standings(tmp_path)
    found = list(beside.complaints(standing))
    assert found == [] if complaint is None else complaint in found[0]
    assert beside.main(["--results", str(tmp_path)]) == (complaint is not None)


def test_files_of_another_kind_of_gpu_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(auto, "AUTO", (FIRST,))
    write(tmp_path, [measured(STEP, 10.0, 11.0)], {"passed": 3}, capability="8.0")
    (standing,) = beside.standings(tmp_path)
    assert standing.device == "no device"
    assert len(list(beside.complaints(standing))) == 2


@pytest.mark.parametrize(("op", "family"), beside.FAMILIES.items())
def test_every_planned_case_is_of_a_kind_and_nearly_every_kind_has_one(op, family):
    kinds = {beside.kind_of(op, asdict(case), auto.HOPPER) for case in gpu_cases.plan(family)}
    rows = {row.kind for row in auto.AUTO if row.op == op and row.device == auto.HOPPER}
    assert kinds == rows - {auto.UNTIMED, auto.OPTIONS}
    assert {beside.kind_of(op, asdict(case), "cuda") for case in gpu_cases.plan(family)} == {""}


def test_tables_of_speed_tell_kinds_cases_and_floors(tmp_path):
    call = gpu_cases.Heads("forward", "bfloat16", "dense", 1, 32, 8, 4096, 4096, 64)
    floor = model_attention.floor(call)
    cases = [measured(STEP, 10.0, 20.0), measured(call, 4e6 * floor.seconds, 2e6 * floor.seconds, "native")]
    write(tmp_path, cases, {"passed": 1})
    text = tables.speed(tmp_path)
    assert "NVIDIA H200 (driver 580), torch 2.11, cuDNN 9.19, 2026-11-26" in text
    assert "1 cases of recurrent layers at commit cccccccccc" in text
    triton = auto.row(auto.HOPPER, "scan", auto.ONE_STEP).order[0]
    assert f"| scan, {auto.ONE_STEP} | 1 | {triton} | – | – | 2.00× | 2.00× |" in text
    assert f"| `{STEP.name}` | 20.0 µs torch | – | 10.0 µs | – | 2.00× |" in text
    (line,) = [line for line in model.floors(tmp_path).splitlines() if call.name in line]
    assert " | 25 % | – | – | " in line
    assert line.endswith("| 50 % |")
    assert model.floors(tmp_path / "none") == tables.speed(tmp_path / "none") == tables.NOTHING


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [
        ("docs/gpu.md", "support", tables.support),
        ("docs/benchmarks.md", "gpu", tables.speed),
        ("docs/gpu.md", "floors", model.floors),
    ],
    ids=["support", "speed", "floors"],
)
def test_the_documents_say_what_the_files_say(file: str, name: str, made: Callable[[Path], str]):
    text = (ROOT / file).read_text()
    assert text == readme.replaced(text, name, made(RESULTS)), "run python -m bench support"

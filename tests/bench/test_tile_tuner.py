"""The tuner of the Triton attention's tiles, driven on the CPU: its candidates, its processes and what it reports."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu import tune

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("triton")


@pytest.mark.parametrize(("role", "width"), list(product(tune.ROLES, tune.WIDTHS)))
def test_candidates_are_tiles_and_the_one_in_force_comes_first(role: str, width: int) -> None:
    from fastseq.kernels.attention.tuning import Tile

    found = tune.candidates(role, width, argparse.Namespace(tile=None, tiny=False))
    assert found[0] == {}
    tiles = [Tile(**fields) for fields in found[1:]]  # type: ignore[arg-type]
    assert len(set(tiles)) == len(tiles) >= 6
    assert all(n & (n - 1) == 0 for tile in tiles for n in tile[:3])
    assert [tune.tile_of(tune.text_of(tile._asdict())) for tile in tiles] == found[1:]
    assert all(case.dim == width for case in tune.cases(role, width, False))


def test_a_forced_tile_is_that_of_its_role_alone() -> None:
    from fastseq.kernels.attention import tuning

    def now(role: str) -> Any:
        return tuning.tile("sm_90", role, torch.bfloat16, 128, False, True)

    before, other, tile = now("forward"), now("decode"), tuning.Tile(16, 16, 1, 1)
    with tuning.forced("forward", tile):
        assert now("forward") == tile
        assert now("decode") == other
    assert now("forward") == before


def test_a_run_checks_and_times_every_candidate(tmp_path: Path) -> None:
    out = tmp_path / "tune.json"
    command = [sys.executable, "-m", "bench", "tune", "attention", "--device", "cpu", "--tiny", "--jobs", "1"]
    command += ["--role", "decode", "backward_keys", "--width", "64", "--min-time", "0.01", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not timed" not in done.stdout
    document = json.loads(out.read_text())
    assert document["complete"]
    found = {(entry["role"], entry["in_force"]): entry for entry in document["results"]}
    assert set(found) == set(product(("decode", "backward_keys"), (True, False)))
    assert all(case["seconds"] > 0 for entry in found.values() for case in entry["cases"].values())
    assert done.stdout.count("(in force)") == 2


def test_a_wrong_answer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastseq.kernels.attention.tuning import Tile

    bench, result, value = tune.Bench("cpu"), torch.empty(3), 1.0
    launch = SimpleNamespace(run=lambda: result.fill_(value))
    prepared = tune.Prepared(None, lambda: [launch], [result])
    monkeypatch.setattr(bench, "prepared", lambda case, role: prepared)
    monkeypatch.setattr(bench, "tile", lambda x, role, fields: Tile(16, 16, 1, 1))
    case = tune.cases("forward", 64, True)[0]
    assert "cases" in bench.measure(case, "forward", {}, 1e-9)
    for wrong in (1.01, float("nan")):
        value = wrong
        assert "off by" in bench.measure(case, "forward", {}, 1e-9)["reason"]


def test_a_lost_process_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    case = tune.cases("decode", 64, True)[0]
    helper = tune.Helper("cpu")
    assert helper.ask("compile", [case], "decode", {}) == {}  # nothing is compiled for a CPU
    assert helper.process is not None
    helper.process.kill()
    helper.process.join()
    assert helper.ask("compile", [case], "decode", {}) == {}
    assert "reason" in helper.ask("measure", case, "decode", {"no_field": 1}, 0.01)
    helper.end()
    monkeypatch.setitem(tune.PATIENCE, "start", 0.0)  # less than a process takes to begin
    assert "no answer" in helper.ask("compile", [case], "decode", {})["reason"]
    assert helper.process is None

"""The doctor tells what works, tries it for real, and survives whatever is broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastseq
from fastseq import auto, cli, doctor, ops
from fastseq.__main__ import main


@pytest.fixture(scope="module")
def findings() -> doctor.Findings:
    return doctor.examine()


def test_every_layer_works_on_the_backends_of_this_machine(findings):
    for layer in doctor.LAYERS:
        row = findings.table["cpu"][layer]
        assert list(row) == list(doctor.BACKENDS)
        assert row["auto"] is row["reference"] is row["torch"] is None
        assert (row["native"] is None) == (ops.NATIVE_MISSING is None)
        assert "runs on: " in findings.runs_on["cpu"][layer]
    assert findings.works


def test_the_facts_are_there(findings):
    for name in (
        "Python",
        "torch",
        "threads",
        "native kernels",
        "instruction sets",
        "fast path",
        "Triton",
        "GPU",
        "C++ compiler",
        "transformers",
    ):
        assert findings.facts[name]
        assert "cannot tell" not in findings.facts[name]


def test_missing_kernels_come_with_the_command_that_builds_them(findings):
    told = [entry for entry in findings.problems if "native CPU kernels are missing" in entry["problem"]]
    assert bool(told) == (ops.NATIVE_MISSING is not None)
    assert all("pip install" in entry["fix"] for entry in told)


def test_the_exit_status_says_whether_the_layers_work(findings, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("The layers work here.")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["works"] is True

    broken = doctor.Findings(findings.facts, {"cpu": {"GRU": dict.fromkeys(doctor.BACKENDS, "WRONG: off by 1")}})
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "BROKEN [1]" in printed
    assert "do NOT work" in printed


def test_the_exit_status_says_whether_the_required_backend_is_there(findings, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert main(["doctor", "--require", "native"]) == (0 if ops.NATIVE_MISSING is None else 3)
    row = {**dict.fromkeys(doctor.BACKENDS), "native": "the compiled extension is not installed"}
    facts = {**findings.facts, "native kernels": "missing: there is no C++ compiler"}
    bare = doctor.Findings(facts, {"cpu": dict.fromkeys(doctor.LAYERS, row)})
    monkeypatch.setattr(doctor, "examine", lambda: bare)
    capsys.readouterr()
    assert main(["doctor"]) == 0
    assert (
        capsys.readouterr()
        .out.rstrip()
        .endswith("The layers work here, but without the native kernels: torch's are used instead.")
    )
    assert main(["doctor", "--require", "native"]) == 3
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith("Required, and not here: native on cpu: the compiled extension is not installed")
    assert main(["doctor", "--require", "native", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["required"] == {"native": "the compiled extension is not installed"}
    assert main(["doctor", "--require", "triton"]) == 3  # there is no GPU in this table
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--require", "fortran"])


def test_an_unbuilt_checkout_that_hides_the_installed_package_is_told(tmp_path):
    """As in the folder of the sources after ``pip install .``: Python finds this folder's package first."""
    site, checkout = tmp_path / "site", tmp_path / "checkout"
    for folder in (site, checkout):
        package = folder / "fastseq"
        shutil.copytree(
            Path(fastseq.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "_build.json", "kernels")
        )
    (site / "fastseq" / doctor.LIBRARY).write_bytes(b"")
    record = site / "fastseq_kernels-0.1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseq-kernels\nVersion: 0.1.0\n")
    code = (
        f"import sys; sys.path[1:1] = [{str(site)!r}]\n"
        # An editable installation would lend the extension of another folder.
        "sys.meta_path = [finder for finder in sys.meta_path if 'Editable' not in repr(finder)]\n"
        "from fastseq import doctor\n"
        "tried = lambda cell: {'reason': 'missing' if cell[2] == 'native' else None}\n"
        "doctor._try_all = lambda cells: {cell: tried(cell) for cell in cells}\n"
        "from fastseq.__main__ import main\n"
        "sys.exit(main(['doctor', '--require', 'native']))\n"
    )
    command = [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkout, env=environment)
    assert done.returncode == 3, done.stderr
    assert (
        f"the package in {checkout / 'fastseq'} is used, and hides the installed one in {site / 'fastseq'}"
        in done.stdout
    )
    assert f"the native CPU kernels are missing (they are in the hidden package, {site / 'fastseq'})" in done.stdout
    assert f"fix: cd /   # or any folder but {checkout}" in done.stdout
    assert "but without the native kernels" in done.stdout


def test_a_broken_probe_is_shown_and_stops_nothing(monkeypatch):
    def fails() -> str:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(doctor, "_torch", fails)
    monkeypatch.setattr(doctor, "_try_all", lambda cells: {})
    found = doctor.examine()
    assert found.facts["torch"] == "cannot tell: OSError: the disk is on fire"
    assert found.facts["Python"]
    assert not found.works


def child_that(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Make the doctor's trials run this code in place of the layers."""
    script = tmp_path / "child.py"
    script.write_text("import json, os, signal, sys, time\ncells = json.loads(sys.argv[1])\n" + code)
    popen = subprocess.Popen
    monkeypatch.setattr(
        doctor.subprocess, "Popen", lambda command, **rest: popen([sys.executable, script, command[-1]], **rest)
    )


CELLS = [("cpu", layer, "native") for layer in doctor.LAYERS]
ANSWER = "print(json.dumps({'reason': None}), flush=True)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_kernel_that_crashes_is_one_line_of_the_table(monkeypatch, tmp_path):
    code = "for cell in cells:\n    if cell[1] == 'GRU': os.kill(os.getpid(), signal.SIGILL)\n    " + ANSWER
    child_that(code, monkeypatch, tmp_path)
    results = doctor._try_all(CELLS)
    assert list(results) == CELLS
    assert [results[cell]["reason"] for cell in CELLS] == [None, "the trial died of SIGILL", None, None]


def test_a_kernel_that_hangs_is_one_line_of_the_table(monkeypatch, tmp_path):
    child_that("for cell in cells:\n    if cell[1] == 'LSTM': time.sleep(60)\n    " + ANSWER, monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "PATIENCE", 2.0)
    results = doctor._try_all(CELLS)
    assert [results[cell]["reason"] for cell in CELLS] == [None, None, "no answer within 2 s", None]


def test_a_package_that_cannot_be_imported_is_told_once(monkeypatch, tmp_path):
    child_that("raise ImportError('libtorch.so is gone')", monkeypatch, tmp_path)
    results = doctor._try_all(CELLS)
    assert {result["reason"] for result in results.values()} == {
        "the trial ended: ImportError: libtorch.so is gone",
    }


def test_wrong_answers_are_told(monkeypatch):
    from fastseq import nn

    right = nn.GRU.forward
    monkeypatch.setattr(nn.GRU, "forward", lambda self, x: (right(self, x)[0] * 1.01, None))
    assert doctor._try_cell("cpu", "GRU", "reference")["reason"].startswith("WRONG")
    assert doctor._try_cell("cpu", "LSTM", "reference")["reason"] is None


def test_a_backend_that_cannot_run_is_told_with_its_reason():
    results = doctor._try_all([("cpu", "GRU", "triton"), ("cpu", "GRU", "reference")])
    assert results["cpu", "GRU", "triton"]["reason"]
    assert "Traceback" not in results["cpu", "GRU", "triton"]["reason"]
    assert results["cpu", "GRU", "reference"]["reason"] is None


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_the_table_is_legible_with_and_without_rich(rich, monkeypatch, capsys):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    cli.table([["on cpu", "native"], ["GRU", "works"], ["MultiheadAttention", "no [1]"]], {"works": "green"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["on", "cpu", "native"], ["GRU", "works"], ["MultiheadAttention", "no", "[1]"]]


def test_the_environment_variable_is_obeyed(monkeypatch, tmp_path):
    environment = {**os.environ, "FASTSEQ_BACKEND": "reference"}
    command = [sys.executable, "-m", "fastseq", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["facts"]["FASTSEQ_BACKEND"] == "reference"
    assert all("runs on: reference" in text for text in found["runs_on"]["cpu"].values())


def test_a_gpu_without_its_kernels_comes_with_the_command_that_builds_them(findings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ops, "NATIVE_MISSING", None)
    for missing in ("there is no NVIDIA GPU here", None):
        monkeypatch.setattr(ops, "NATIVE_CUDA_MISSING", missing)
        found = doctor.Findings()
        doctor._problems(found, {})
        told = [entry["fix"] for entry in found.problems if "CUDA C++ kernels are missing" in entry["problem"]]
        assert [fix.startswith("FASTSEQ_BUILD=cuda ") for fix in told] == ([] if missing is None else [True])


@pytest.mark.parametrize(("capability", "told"), [((9, 0), "were timed on such a GPU"), ((8, 0), "have not run on")])
def test_a_gpu_is_told_with_what_is_known_of_its_kind(capability, told, monkeypatch):
    properties = SimpleNamespace(name="some GPU", major=capability[0], minor=capability[1], total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(auto, "capability", lambda index: capability)
    text = doctor._gpu()
    assert text.startswith(f"some GPU, sm_{capability[0]}{capability[1]}, 80 GiB; ")
    assert told in text

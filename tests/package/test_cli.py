"""How the command lines end, and how they write files: no traceback, and nothing replaced that is not a file."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq
from bench.__main__ import main as bench
from fastseq import cli
from fastseq.__main__ import main as demo
from fastseq.demo import models

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
CASE = "rnn-inference-T1-B1-I64-H64"
MEASURE = ["bench", "--case", CASE, "--peer", "torch", "--min-time", "0.001"]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of Unix")

needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="this system has no /dev/full")


def start(arguments: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, **settings)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What was said on stderr, without the line a case that tells of progress."""
    return [line for line in done.stderr.splitlines() if not line.startswith(("[1/1", "ONNX Runtime is left out"))]


def test_the_version_is_told_with_torchs() -> None:
    done = start(["fastseq", "--version"], stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"fastseq {fastseq.__version__}, torch {torch.__version__}\n"


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo([]) == cli.USAGE
    told = capsys.readouterr().err
    assert told.startswith("usage: python -m fastseq ")
    assert "doctor     what works on this machine" in told


def test_a_reader_that_leaves_early_ends_a_listing_in_silence() -> None:
    """As ``| head`` does; here it has left before the first line."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = start(["bench", "--list"], stdout=write)
    finally:
        os.close(write)
    assert done.returncode == cli.NO_READER
    assert lines_of(done) == []


def test_a_reader_that_leaves_early_ends_the_doctor_in_silence() -> None:
    code = (
        "import runpy, sys\n"
        "from fastseq import doctor\n"
        "doctor.examine = lambda: doctor.Findings({'Python': '3' * 100000})\n"
        "sys.argv = ['fastseq', 'doctor']\n"
        "runpy.run_module('fastseq', run_name='__main__')\n"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (cli.NO_READER, "")


@needs_full
def test_a_full_device_as_output_is_one_line() -> None:
    with FULL.open("w") as full:
        done = start(["bench", "--list"], stdout=full)
    assert done.returncode == cli.USAGE
    assert lines_of(done) == ["python -m bench: cannot write the output: No space left on device"]


@needs_full
def test_results_that_find_no_room_are_one_line_and_the_device_stays(tmp_path: Path) -> None:
    link = tmp_path / "full.json"  # a replaced link would be no loss
    link.symlink_to(FULL)
    done = start([*MEASURE, "--json", str(link)], stdout=subprocess.PIPE)
    assert done.returncode == cli.USAGE
    assert lines_of(done) == [f"python -m bench: cannot write {link}: No space left on device"]
    assert CASE in done.stdout  # what was measured is not lost
    assert link.is_symlink()
    assert FULL.is_char_device()
    assert os.listdir(tmp_path) == ["full.json"]


def test_results_go_through_a_pipe_once(tmp_path: Path) -> None:
    pipe, received = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    done = start([*MEASURE, "--json", str(pipe)], stdout=subprocess.PIPE)
    reader.join(20)
    assert done.returncode == 0, done.stderr
    assert pipe.is_fifo()
    document = json.loads(received[0])
    assert document["complete"]
    assert [case["name"] for case in document["cases"]] == [CASE]


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    for text in ("first", "second"):
        cli.write_text(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    cli.write_text(path, "before")

    def fails(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fails)
    with pytest.raises(cli.CannotWrite, match="No space left") as raised:
        cli.write_text(path, "after")
    assert raised.value.filename == str(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


@needs_full
def test_the_demo_that_finds_no_room_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.py", tmp_path / "out"
    text.write_text("for i in range(10):\n    print(i)\n" * 200)
    out.mkdir()
    (out / "results.json").symlink_to(FULL)
    kind = models.KINDS["gru"]
    build = partial(models.Recurrent, torch.nn.GRU, width=8)
    monkeypatch.setitem(models.KINDS, "gru", dataclasses.replace(kind, build=build, batch=2, length=16))
    arguments = ["demo", "--model", "gru", "--text", str(text), "--steps", "1", "--out", str(out)]
    assert cli.run("python -m fastseq", lambda: demo(arguments)) == cli.USAGE
    assert capsys.readouterr().err == (
        f"python -m fastseq: cannot write {out / 'results.json'}: No space left on device\n"
    )


@pytest.mark.parametrize(("name", "told"), [("fortran", "unknown backend 'fortran'"), ("triton", "backend 'triton'")])
def test_the_demo_under_a_backend_that_cannot_run_is_one_line(name: str, told: str, tmp_path: Path) -> None:
    environment = {**os.environ, "FASTSEQ_BACKEND": name, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    arguments = ["fastseq", "demo", "--model", "gru", "--steps", "2", "--out", str(tmp_path)]
    done = start(arguments, stdout=subprocess.PIPE, env=environment)
    (line,) = done.stderr.splitlines()
    assert line.startswith("fastseq demo: ")
    assert told in line
    assert done.returncode == cli.USAGE
    assert "VERDICT" not in done.stdout


def test_the_bench_under_an_unknown_backend_is_one_line() -> None:
    done = start(MEASURE, stdout=subprocess.PIPE, env={**os.environ, "FASTSEQ_BACKEND": "fortran"})
    assert lines_of(done) == [
        "python -m bench: FASTSEQ_BACKEND: unknown backend 'fortran'; choose one of reference, torch, native, triton"
    ]
    assert done.returncode == cli.USAGE


@pytest.mark.parametrize("arguments", [["--json"], ["cost", "--json"], ["memory", "--json"], ["weights", "--json"]])
def test_a_folder_in_place_of_a_result_file_is_told_before_the_work(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = bench([*arguments, str(tmp_path)])
    except SystemExit as error:
        status = error.code
    assert status == cli.USAGE
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{tmp_path}: this is a folder, expected a file")

"""The demo trains on real text, compares, writes what it promises, and ends well however it ends."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import demo
from fastseq.__main__ import main
from fastseq.demo import data, models, race

ROOT = Path(__file__).resolve().parents[2]
TEXT = "for i in range(10):\n    print(i, 'räksmörgås')\n" * 60


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's models, but small: what is tested here is the demo."""
    builds = {
        "gru": partial(models.Recurrent, torch.nn.GRU, width=24),
        "lstm": partial(models.Recurrent, torch.nn.LSTM, width=24),
        "attention": partial(models.Attention, width=24, heads=3, blocks=1, length=32),
    }
    for name, build in builds.items():
        kind = dataclasses.replace(models.KINDS[name], build=build, batch=4, length=32)
        monkeypatch.setitem(models.KINDS, name, kind)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


def start(kind: str, text: data.Text, steps: int) -> race.Race:
    return race.start(models.KINDS[kind], text, steps, torch.device("cpu"), seed=0)


@pytest.mark.parametrize("kind", models.KINDS)
def test_it_trains_both_and_writes_everything(kind, text_file, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--model", kind, "--text", str(text_file), "--steps", "7", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "losses agree" in printed
    assert "fastseq.patch(model) changed" in printed
    assert printed.splitlines()[-1].startswith(("VERDICT: same losses", "fastseq had none of its own kernels"))
    assert "nan" not in printed

    found = json.loads((out / "results.json").read_text())["models"][kind]
    assert found["steps"] == 7
    assert found["losses"]["torch.nn"] == pytest.approx(found["losses"]["fastseq"], rel=race.EARLY_TOLERANCE)
    assert found["losses"]["fastseq"][-1] < found["losses"]["fastseq"][0]
    assert len((out / f"sample-{kind}.txt").read_text(encoding="utf-8")) > 300
    pytest.importorskip("matplotlib")
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_two_sides_are_the_same_model_but_for_the_class(text_file):
    text = data.load(text_file, 128)
    result = start("gru", text, 1)
    assert type(result.theirs.model.layer) is torch.nn.GRU
    assert type(result.ours.model.layer) is fastseq.nn.GRU
    ours, theirs = result.ours.model.state_dict(), result.theirs.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_speeds_are_medians_of_turns_without_the_first(text_file):
    result = start("gru", data.load(text_file, 128), 30)
    result.theirs.turns = [9.0, 2.0, 2.0, 4.0, 2.0, 2.0]
    result.ours.turns = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert result.speedup[1] == 2.0
    assert result.tokens_per_second(result.ours) == result.kind.batch * result.kind.length
    result.ours.turns = result.ours.turns[:3]
    assert math.isnan(result.speedup[1])


@pytest.mark.parametrize(
    ("step", "loss", "agrees"),
    [
        (1, 2.001, True),  # within 0.1%
        (1, 2.01, False),
        (1, math.nan, False),
        (70, 2.1, True),  # 5%, but of one step late in training: 0.1% of the mean
        (70, 4.2, False),
        (99, math.inf, False),
    ],
)
def test_losses_agree_within_the_stated_tolerances(step, loss, agrees, text_file):
    result = start("lstm", data.load(text_file, 128), 100)
    result.theirs.losses, result.ours.losses = [2.0] * 100, [2.0] * 100
    result.ours.losses[step] = loss
    assert result.agrees is agrees
    assert ("same losses" in demo.verdict([result])) is agrees


def test_progress_shows_both_losses_at_the_same_step(text_file):
    text, told = data.load(text_file, 128), []
    result = start("gru", text, 12)
    race.run(result, text, 0, math.inf, lambda *now: told.append(now))
    pairs = set(zip(result.theirs.losses, result.ours.losses, strict=True))
    assert [steps for steps, _, _ in told] == list(range(1, 25))
    assert math.isnan(told[0][1])  # the other side has not begun
    assert {(theirs, ours) for _, theirs, ours in told[1:]} <= pairs


def test_it_stops_in_time_when_no_steps_were_asked_for(text_file):
    text = data.load(text_file, 128)
    result = start("gru", text, 1000)
    race.run(result, text, 0, 0.5, lambda *_: None)
    assert result.out_of_time
    assert 0 < result.done < 1000


@pytest.mark.parametrize("turn", [0, 1, 2, 3])
def test_ctrl_c_keeps_what_was_done(turn, text_file, tmp_path, monkeypatch, capsys):
    take, taken = race.Side.take_turn, []

    def interrupted(side, batches, tell):
        if len(taken) == turn:
            take(side, batches[:2], tell)
            raise KeyboardInterrupt
        taken.append(side)
        take(side, batches, tell)

    monkeypatch.setattr(race.Side, "take_turn", interrupted)
    out = tmp_path / "out"
    assert main(["demo", "--text", str(text_file), "--steps", "50", "--out", str(out)]) == 130
    printed = capsys.readouterr()
    assert "stopped by Ctrl-C" in printed.err
    assert "VERDICT" not in printed.out
    assert (out / "results.json").exists() is (turn > 0)
    if turn > 0:
        found = json.loads((out / "results.json").read_text())["models"]
        assert list(found) == ["gru"]
        assert found["gru"]["steps"] == {1: 1, 2: 1, 3: 3}[turn]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_real_ctrl_c_ends_with_status_130(tmp_path):
    command = [sys.executable, "-m", "fastseq", "demo", "--model", "lstm", "--steps", "100000", "--out", str(tmp_path)]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        for line in child.stdout:
            if "fastseq.patch(model)" in line:
                break
        time.sleep(2)
        child.send_signal(signal.SIGINT)
        printed, errors = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 130, errors
    assert "stopped by Ctrl-C" in errors
    assert "Traceback" not in errors + printed


@pytest.mark.parametrize("module", ["fastseq", "bench"])
def test_signals_have_a_stack_of_their_own(module):
    """Else Ctrl-C corrupts the heap now and then, where it meets oneDNN: a real one alone shows it too seldom."""
    code = (
        "import faulthandler, runpy, sys\n"
        f"sys.argv = [{module!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({module!r}, run_name='__main__')\n"
        "finally:\n"
        "    assert faulthandler.is_enabled()\n"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.returncode == 0, child.stderr


def test_missing_and_unusable_texts_are_told(tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "blank").write_text(" \n\n")
    (tmp_path / "short").write_text("too short")
    for name, said in {
        "absent": "no such file",
        "empty": "holds no text",
        "blank": "holds no text",
        "short": "too few",
        ".": "cannot be read",
    }.items():
        path = tmp_path / name
        assert main(["demo", "--text", str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert str(path) in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_utf8_is_replaced(tmp_path):
    path = tmp_path / "latin1"
    path.write_bytes(TEXT.encode("latin-1"))
    text = data.load(path, 128)
    assert text.symbols.endswith(data.UNKNOWN)
    assert text.symbols.count(data.UNKNOWN) == 1
    assert "ä" not in text.symbols


def test_rare_characters_share_one_symbol(tmp_path):
    path = tmp_path / "many"
    path.write_text("".join(chr(0x4E00 + i) for i in range(3000)) + "ab" * 2000, encoding="utf-8")
    text = data.load(path, 128)
    assert len(text.symbols) <= data.MOST_SYMBOLS
    assert int(text.train.max()) == len(text.symbols) - 1
    assert text.ids("ab\u3042").tolist()[2] == len(text.symbols) - 1


def test_the_standard_library_is_the_text_by_default():
    text = data.load(None, 128)
    assert len(text.train) > 500_000
    assert {"d", "e", "f", "(", "\n"} <= set(text.symbols)
    ids, following = text.batch(4, 9, torch.Generator().manual_seed(0))
    assert ids.shape == following.shape == (4, 9)
    assert torch.equal(ids[:, 1:], following[:, :-1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "at least 1"),
        (["--steps", "many"], "at least 1"),
        (["--model", "mamba"], "invalid choice"),
    ],
)
def test_bad_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", *options])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_device_that_is_not_here_is_told(tmp_path, capsys):
    for name in ("warp", "cuda:97"):
        assert main(["demo", "--device", name, "--out", str(tmp_path)]) == 2
        assert f"--device {name}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_told(text_file, capsys):
    assert main(["demo", "--text", str(text_file), "--out", str(text_file / "below")]) == 2
    assert "cannot make this folder" in capsys.readouterr().err


def test_without_matplotlib_there_are_numbers_and_advice(text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["demo", "--model", "gru", "--text", str(text_file), "--steps", "2", "--out", str(tmp_path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


def test_the_same_seed_gives_the_same_losses(text_file):
    text = data.load(text_file, 128)
    runs = []
    for _ in range(2):
        result = start("gru", text, 3)
        race.run(result, text, 0, math.inf, lambda *_: None)
        runs.append(result.theirs.losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)

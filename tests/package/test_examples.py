"""What the examples print: that they worked. tests/integrations has those of several processes, of streams, of C++."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
run = runpy.run_path(str(FOLDER / "run.py"))

ELSEWHERE = {"context_parallel.py", "distributed.py", "stream_server.py"}
"""Those that tests/integrations has."""

NOTEBOOKS = ["forecasting.ipynb", "tagger.ipynb"]


@pytest.fixture
def printed(monkeypatch, capsys):
    """Runs a script in this process, which has torch already, and returns what it prints."""

    def call(name: str, *arguments: str) -> str:
        for package in run["missing"](FOLDER / name):
            pytest.skip(f"{package} is not installed: pip install {package}")
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-\d+)?(?![\w.])", text)]


def test_the_loss_of_the_character_model_falls(printed):
    text = printed("characters.py", "--steps", "30", "--width", "64")
    assert "torch.nn.LSTM -> fastseq.nn.LSTM" in text
    first, last, steps = numbers(re.search(r"loss, .*", text)[0])
    assert steps == 30
    assert last < first - 1
    assert len(text.partition("\n\ndef ")[2]) >= 160  # what it wrote


def test_the_agent_with_a_memory_learns_to_remember(printed):
    found = [int(x) for x in re.findall(r"(\d+)% of \d+ answers are right", printed("recurrent_policy.py"))]
    assert len(found) == 3
    assert found[0] < 70
    assert found[-1] > 90


def test_the_vision_transformer_answers_as_before_and_learns(printed):
    text = printed("vision_transformer.py", "--steps", "40")
    assert text.count("calls fastseq.scaled_dot_product_attention") == 2
    assert float(re.search(r"answers: (\S+)", text)[1]) < 1e-5
    first, last = (float(x) for x in re.findall(r"loss (\S+)", text))
    assert last < first


def test_transformers_generates_the_same_tokens(printed):
    if importlib.util.find_spec("transformers"):
        from fastseq.integrations import transformers  # noqa: F401  in a checkout it hides our folder kernels
    text = printed("transformers_generate.py", "--tokens", "12")
    assert re.findall(r"(\d+) of (\d+) tokens are equal", text) == [("36", "36")] * 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_onnx_runtime_computes_the_same(printed):
    text = printed("onnx_round_trip.py")
    assert "2 LSTM nodes" in text
    errors = [float(x) for x in re.findall(r"largest difference (\S+)", text)]
    assert len(errors) == 3
    assert max(errors) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, monkeypatch, capsys):
    """Each ends with an assertion of its own that the model learned."""
    for package in run["missing"](FOLDER / name):
        pytest.skip(f"{package} is not installed: pip install {package}")
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(run["code"](FOLDER / name), {"__name__": "__main__"})
    assert "loss" in capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_what_it_printed_when_it_was_run(name):
    notebook = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert ("print(" in "".join(cell["source"])) == any(out["output_type"] == "stream" for out in cell["outputs"])
        assert all(out["output_type"] in ("stream", "display_data") for out in cell["outputs"])


def test_each_example_is_short_and_has_a_test():
    here = re.findall(r"\w+\.py(?=\")", Path(__file__).read_text(encoding="utf-8"))
    for path in run["examples"](FOLDER):
        assert path.name in {*ELSEWHERE, *NOTEBOOKS, *here}, f"{path.name} has no test"
        lines = (run["code"](path) if path.name in NOTEBOOKS else path.read_text(encoding="utf-8")).count("\n")
        assert path.name in ELSEWHERE or lines <= 100, path.name


def test_running_all_examples_tells_of_failures_and_of_missing_packages(tmp_path, capfd):
    (tmp_path / "broken.py").write_text("raise SystemExit('broken as planned')\n")
    (tmp_path / "right.ipynb").write_text(
        json.dumps({"cells": [{"cell_type": "code", "source": ["print('a cell', ", "1 + 1)"]}]})
    )
    (tmp_path / "lacking.py").write_text('"""pip install no_such_package ."""\nraise SystemExit(1)\n')
    assert run["main"]([], tmp_path) == 1
    out, err = capfd.readouterr()
    assert "a cell 2" in out
    assert "==> lacking.py: skipped; pip install no_such_package" in out
    assert "failed: broken.py" in err
    assert run["main"](["right"], tmp_path) == 0
    with pytest.raises(SystemExit) as ended:
        run["main"](["wrong"], tmp_path)
    assert ended.value.code == 2

"""What the README and the manual show is what happens."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastseq

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *("README.md", "docs/index.md", "docs/start.md", "docs/migrate.md", "docs/backends.md", "docs/export.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "recipes").glob("*.md")),
]
"""Pages whose examples are a program, from top to bottom."""


@pytest.mark.parametrize("page", PAGES)
def test_every_python_example_runs_and_prints_what_it_says(page, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    if page == "docs/export.md":
        pytest.importorskip("onnxscript", reason="torch's exporter to ONNX needs it")
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks or page == "docs/recipes/cpp.md"  # whose program the tests of examples/cpp build
    for block in blocks:
        exec(block, names)
        printed = capsys.readouterr().out.splitlines()
        for line in re.findall(r"^# (.*)", block, re.MULTILINE):
            assert line in printed


def test_the_readme_is_one_page():
    assert README.count("\n") <= 110


JOB = re.compile(r"^\| .* \| (\d+\.\d\d)× \| `([^`]+)` \(\[file\]\(([^)]+)\)\) \|$", re.MULTILINE)


def test_the_table_of_jobs_is_what_was_measured():
    rows = JOB.findall(README)
    assert len(rows) == README.count("× | `") >= 6
    for ratio, name, file in rows:
        (case,) = [each for each in json.loads((ROOT / file).read_text())["cases"] if each["name"] == name]
        assert not case["noisy"], name
        assert f"{case['ratios']['best']:.2f}" == ratio, name


def test_a_job_at_which_fastseq_is_slower_is_among_them():
    assert any(float(ratio) < 1 for ratio, _, _ in JOB.findall(README))


PROSE = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\((?!https?:|#)([^)\s#]+)", prose)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []


def test_every_page_is_in_the_manuals_navigation():
    listed = set(re.findall(r"^ +- (?:[^#\n]*: )?([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - listed == set()


def test_the_manual_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the packages of fastseq-kernels[docs]")
    pytest.importorskip("material", reason="needs the packages of fastseq-kernels[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    built = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html"))
    fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(?:https?:)?//", built)
    assert fetched == []
    for name in fastseq.__all__:
        assert f"fastseq.{name}" in built, f"{name} is not in the reference"


def test_the_version_is_told_alike_everywhere():
    for file in ("CITATION.cff", "CHANGELOG.md"):
        assert re.search(rf"(version: |## \[){re.escape(fastseq.__version__)}\b", (ROOT / file).read_text()), file


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", [fastseq.nn.GRU(3, 4), fastseq.nn.LSTM(3, 4)], ids=["gru", "lstm"])
def test_the_limits_are_still_limits(layer):
    with pytest.raises(Exception, match=r"."):
        torch.jit.script(layer)
    assert not isinstance(layer, (torch.nn.GRU, torch.nn.LSTM))
    assert isinstance(layer, torch.nn.RNNBase)
    with pytest.raises(TypeError, match="Proxy"):
        torch.fx.symbolic_trace(torch.nn.Sequential(layer))
    y, _ = layer(torch.randn(5, 2, 3))
    y.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["GRU", "LSTM", "LSTMCell"])
def test_a_graph_of_fx_is_patched_after_it_was_traced(name):
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(torch.nn, name)(3, 4)

        def forward(self, x):
            return self.layer(x)[0]

    traced, x = torch.fx.symbolic_trace(Model()), torch.randn(5, 3)
    before = traced(x)
    assert len(fastseq.patch(traced)) == 1
    torch.testing.assert_close(traced(x), before)

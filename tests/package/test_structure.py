"""The size and the shape of the middle layer, counted, so that it does not grow one fast path at a time.

``python tests/package/test_structure.py`` prints the counts.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}

PAST_THE_DISPATCHER = (
    "csrc/core/direct_objects.h",
    "csrc/recurrent/direct.cpp",
    *("csrc/attention/direct.cpp", "csrc/attention/direct.h", "csrc/attention/direct_multihead.cpp"),
    *("fastseq/direct.py", "fastseq/attn/direct.py"),
)
"""Files that exist to skip torch's dispatcher."""


def lines(*paths: Path) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def files(folder: str) -> list[Path]:
    return [p for p in (ROOT / folder).rglob("*") if p.suffix in CODE and not any(q.is_symlink() for q in p.parents)]


def functions() -> list[str]:
    """Every autograd Function of the package."""
    found = []
    for path in files("fastseq"):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any("autograd.Function" in ast.unparse(b) for b in node.bases):
                    found.append(node.name)
    return sorted(found)


def operators() -> list[str]:
    """Names of operators that compute something."""
    text = "".join(path.read_text() for path in files("fastseq/ops"))
    found = re.findall(r'^\s*define\(\s*"(\w+)"', text, re.M)
    if '"fastseq::feed_forward"' in text:  # of inference alone: it has neither a fake kernel nor a vmap rule
        found.append("feed_forward")
    return sorted(set(found))


def enums(pattern: str) -> list[str]:
    text = "".join(path.read_text() for path in files("csrc"))
    return sorted(set(re.findall(rf"enum class (\w*{pattern}\w*)", text)))


def counts() -> dict[str, object]:
    bench = [p for p in files("bench") if "studies" not in p.parts]
    source = [p for folder in ("fastseq", "kernels", "csrc", "bench") for p in files(folder)]
    return {
        "operators with numerics": operators(),
        "autograd Functions": functions(),
        "lines past torch's dispatcher": lines(*(ROOT / name for name in PAST_THE_DISPATCHER)),
        "dtype enums of C++": enums("(?:Dtype|Number)"),
        "lines of bench, without its studies": lines(*bench),
        "lines of source in all": lines(*source),
    }


def test_the_middle_layer_stays_small() -> None:
    found = counts()
    # With layer normalisation a step needs a row's statistics before any of its gates: another walk than the scan's.
    assert len(found["operators with numerics"]) <= 9, found  # type: ignore[arg-type]
    assert len(found["autograd Functions"]) <= 7, found  # type: ignore[arg-type]
    assert found["lines past torch's dispatcher"] <= 1000, found  # type: ignore[operator]
    assert found["dtype enums of C++"] == ["Dtype"], found
    # The loop over the equations of normalised layers is the truth of their cases, and a peer.
    assert found["lines of bench, without its studies"] <= 5060, found  # type: ignore[operator]


@pytest.mark.parametrize("page", ["docs/design.md", "CONTRIBUTING.md"])
def test_the_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"`((?:fastseq|csrc|kernels|tests|bench|docs)/[\w./*-]+)`", text)
    shown = [f"fastseq/{name}" for name in re.findall(r"(?<![\w/])((?:recurrent|attn|nn)/\w+\.py)\b", text)]
    assert len(quoted) > 10
    for name in {*quoted, *shown}:
        assert list(ROOT.glob(name.rstrip("/"))) or (ROOT / name).exists(), f"{page} names {name}"


if __name__ == "__main__":
    for what, value in counts().items():
        print(f"{what}: {len(value)} ({', '.join(value)})" if isinstance(value, list) else f"{what}: {value}")

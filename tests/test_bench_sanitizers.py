"""`make gpu` puts small cases through each tool of compute-sanitizer, and what one of them finds is in the file."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bench import gpu

TOOL = """#!/bin/sh
echo "$@" >>"$0.calls"
[ "$2" = racecheck ] || exit 0
echo "========= Error: Race reported between Write access and Read access"
exit 99
"""


def test_every_tool_looks_at_the_kernels_of_both_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "operator_reason", lambda *_: None)
    options = gpu.parser().parse_args(["--out", str(tmp_path)])
    run = gpu.Run(options, {"device": "some GPU"}, time.monotonic() + 60, tmp_path)
    gpu.sanitizers(run, run.until)

    found = json.loads(run.path("sanitizer").read_text())
    status = {"memcheck": "clean", "racecheck": "errors", "synccheck": "clean"}
    families = ("recurrent", "attention")
    assert {name: told["status"] for name, told in found["tools"].items()} == {
        f"{name}, {family}": status[name] for name in status for family in families
    }
    assert "Race reported" in found["tools"]["racecheck, recurrent"]["said"][0]
    assert run.failed
    calls = Path(f"{tool}.calls").read_text().splitlines()
    for name in status:
        for family in families:
            (line,) = (c for c in calls if c.startswith(f"--tool {name} ") and f"gpu_worker {family} " in c)
            assert "--error-exitcode 99" in line
            assert line.endswith("--tiny --check --contestant native")

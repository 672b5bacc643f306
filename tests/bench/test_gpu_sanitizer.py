"""compute-sanitizer in ``make gpu``, driven on the CPU with a tool in its place."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import cases as gpu_cases
from bench.gpu import command as gpu
from fastseq import ops

# As the tool is called: --tool NAME --error-exitcode 99 COMMAND. One finds nothing, one finds errors in a command that
# it never ends, one has no time for its command.
TOOL = """#!/bin/sh
echo "$@" >>"$0.calls"
[ "$1 $3 $4" = "--tool --error-exitcode 99" ] || exit 3
echo "========= COMPUTE-SANITIZER"
name=$2
shift 4
case $name in
  memcheck) "$@" && echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck) echo "========= Race reported between Write access and Read access"; exit 99 ;;
  synccheck) exit 0 ;;
esac
"""
TOOLS = ("memcheck", "racecheck", "synccheck")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu.Run:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(gpu, "operator_reason", lambda kernels, device: None)
    monkeypatch.setattr(gpu, "FAMILIES", ("attention",))
    options = gpu.parser().parse_args(["--device", "cpu", "--out", str(tmp_path)])
    return gpu.Run(options, {"device": "NVIDIA H200", "commit": "0" * 40}, 0.0, tmp_path)


def told(run: gpu.Run) -> dict[str, Any]:
    gpu.sanitizers(run, time.monotonic() + 280)
    return json.loads(run.path("sanitizer").read_text())["tools"]


@pytest.mark.skipif(ops.NATIVE_MISSING is not None, reason="the compiled extension is not installed")
def test_each_tool_is_told_as_it_ended(run: gpu.Run) -> None:
    tools = told(run)
    assert list(tools) == [f"{name}, attention" for name in TOOLS]
    clean, errors, late = tools.values()
    assert (clean["status"], clean["wrong"]) == ("clean", []), clean
    assert clean["cases"] == len(gpu_cases.tiny("attention"))
    assert errors["status"] == "errors"
    assert "Race reported" in errors["said"][-1]
    assert (late["status"], late["cases"]) == ("out of time", 0), "what was not run is not clean"
    assert run.failed


def test_every_tool_looks_at_the_kernels_of_both_families(
    run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "compute-sanitizer").write_text(TOOL.replace('memcheck) "$@" && echo', "memcheck) echo"))
    monkeypatch.setattr(gpu, "FAMILIES", ("recurrent", "attention"))
    assert set(told(run)) == {f"{name}, {family}" for name in TOOLS for family in gpu.FAMILIES}
    calls = (tmp_path / "compute-sanitizer.calls").read_text().splitlines()
    for name in TOOLS:
        for family in gpu.FAMILIES:
            (line,) = (c for c in calls if c.startswith(f"--tool {name} ") and f'"family": "{family}"' in c)
            options = json.loads(line.partition("bench.gpu.worker ")[2])
            assert (options["tiny"], options["check"], options["contestant"]) == (True, True, ["native"])


def test_small_cases_take_every_kernel_of_attention() -> None:
    """In 16 bits, which the CUDA C++ kernels take: both directions of the plain and of the general class, decoding,
    packed sequences, the widest heads."""
    cases = [case for case in gpu_cases.tiny("attention") if case.dtype != "float32"]
    plain, general = ([c for c in cases if (c.dim % 8 == 0) == aligned] for aligned in (True, False))
    assert {(c.mode, c.kind) for c in plain} >= {
        ("forward", "dense"), ("backward", "dense"), ("forward", "decode"), ("backward", "varlen"),
    }  # fmt: skip
    assert {c.dim for c in plain} == {64, 128, 256}
    assert {c.dtype for c in cases} == {"bfloat16", "float16"}
    assert {c.mode for c in general} == {"backward"}  # which goes forward first

"""What is asked of a wheel before it is published, and of whom the workflow asks it."""

from __future__ import annotations

import json
import re
import runpy
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
check = runpy.run_path(str(ROOT / "tests" / "wheels" / "check.py"))
SETUP = runpy.run_path(str(ROOT / "setup.py"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("names", "size", "fault"),
    [
        (["fastseq/_native.abi3.so", "fastseq/libfastseq.so"], 0, None),
        (["fastseq/__init__.py"], 0, "no native kernels"),
        (["fastseq/_native.abi3.so", "fastseq_kernels.libs/libgomp-1.so.1"], 0, "is not a library of fastseq"),
        (["fastseq/_native.abi3.so"], 21_000_000, "expected at most 20,000,000"),
        (["fastseq/_native.abi3.so", "fastseq/_native_cuda.abi3.so"], 21_000_000, None),
    ],
    ids=["good", "pure", "a second OpenMP", "too large", "CUDA kernels"],
)
def test_a_wheels_contents_are_checked(names, size, fault, tmp_path):
    with zipfile.ZipFile(tmp_path / "one.whl", "w") as made:
        for name in names:
            made.writestr(name, bytes(size // len(names)))
    found = check["faults"](tmp_path / "one.whl")
    assert (fault is None and found == []) or fault in found[0]


@pytest.mark.parametrize("sets", [["baseline", "amx_bf16"], list(SETUP["ISAS"]["x86_64"])], ids=["native", "all"])
def test_a_wheel_for_one_processor_is_refused(sets, tmp_path):
    wheel = tmp_path / "one-x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("fastseq/_native.abi3.so", b"")
        made.writestr("fastseq/_build.json", json.dumps({"instruction_sets": sets}))
    found = check["faults"](wheel)
    assert found == [] if len(sets) > 2 else "no kernels for avx2, avx512, avx512_bf16" in found[0]


def test_torch_is_the_oldest_that_the_package_takes_the_pinned_one_or_the_newest():
    oldest = re.search(r'"torch>=([\d.]+)"', PROJECT)[1]
    requirement = check["torch_requirement"]
    assert requirement("oldest") == f"torch=={oldest}.*"
    assert re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[0] == requirement("pinned")
    assert requirement("newest") == "torch"
    assert requirement("2.13.0") == "torch==2.13.0"
    assert f"torch=={oldest}." in re.search(r"^before-build.*", PROJECT, re.M)[0]  # what wheels are built against


def test_torchs_libraries_are_left_out_wherever_a_wheel_is_repaired():
    command = re.search(r"^repair-wheel-command.*", PROJECT, re.M)[0]
    excluded = re.findall(r"--exclude '(.+?)'", command)
    assert set(excluded) <= set(check["TORCHS"])
    assert {"libtorch*", "libc10*", "libgomp*"} <= set(excluded)


def test_the_workflow_tests_every_python_that_the_package_names():
    yaml = pytest.importorskip("yaml", reason="PyYAML, which reads the workflow, is not installed")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["python"] == re.findall(r"Python :: (3\.\d+)\"", PROJECT)
    assert matrix["torch"] == ["oldest", "pinned", "newest"]
    assert matrix["machine"] == [row["machine"] for row in jobs["wheel"]["strategy"]["matrix"]["include"]]
    assert set(jobs["publish"]["needs"]) == {"sdist", "test"}
    assert "refs/tags/v" in jobs["publish"]["if"]
    for path in re.findall(r"python ([\w/]+\.py)", str(jobs)):
        assert (ROOT / path).exists(), path


def test_the_suites_of_a_wheel_exist():
    for name in (*check["SUITES"], *check["NEEDED_BY_TESTS"]):
        assert (ROOT / name).exists(), name

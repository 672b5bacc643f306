"""``libfastseq.so``: the CPU kernels for programs without Python."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import needs_native

import fastseq
from fastseq import ops

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cpp"
LIBRARY = Path(fastseq.__file__).with_name("libfastseq.so")
pytestmark = needs_native


def run(*command, **environment):
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_defines_the_operators_that_python_defines():
    asked = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    operator, _, overload = name.partition(".")
    found[name] = str(getattr(getattr(torch.ops.fastseq, operator), overload or "default")._schema)
assert "fastseq" not in sys.modules
print(json.dumps(found))
"""
    found = json.loads(run(sys.executable, "-c", asked, LIBRARY, *ops.SCHEMAS).splitlines()[-1])
    for name in ops.SCHEMAS:
        operator, _, overload = name.partition(".")
        assert found[name] == str(getattr(getattr(torch.ops.fastseq, operator), overload or "default")._schema)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm, which lists a library's symbols, is not on PATH")
def test_it_asks_for_nothing_of_python_nor_of_one_torch():
    wanted = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", LIBRARY).splitlines()]
    assert "aoti_torch_get_data_ptr" in wanted
    assert [name for name in wanted if re.match("_?Py|_ZN?K?(T[VISC])?N?K?(2at|3c10|5torch)", name)] == []


@pytest.mark.full  # two compilations, a minute and a half
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")
def test_the_example_gives_pythons_numbers(tmp_path):
    root = EXAMPLE.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run(sys.executable, EXAMPLE / "package.py", tmp_path, PYTHONPATH=path)
    run("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DTORCH={torch.__path__[0]}")
    run("cmake", "--build", tmp_path / "build")
    program = tmp_path / "build" / "run_package"
    said = run(program, LIBRARY, tmp_path / "model.pt2", tmp_path / "example.pt")
    assert "largest difference to Python: " in said
    assert "not found" not in run("ldd", program)
    assert "libpython" not in run("ldd", program)

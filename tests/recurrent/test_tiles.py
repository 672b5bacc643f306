"""AMX's matrix tiles, on machines without them: a software model that refuses what the processor would. The scans of
bfloat16 and of bytes are computed through it by ``make sanitize``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import needs_native

import fastseq

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "sanitize" / "tile_model.h"
FAULTS = 16

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    program = tmp_path_factory.mktemp("tiles") / "faults"
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-iquotecsrc", f'-DFASTSEQ_TILE_MODEL="{MODEL}"']
    subprocess.run([*command, "-xc++", "tests/sanitize/tile_faults.cc", "-o", program], cwd=ROOT, check=True)
    return program


@needs_compiler
def test_the_model_multiplies_as_documented(faults):
    subprocess.run([faults, "0"], check=True)


@needs_compiler
@pytest.mark.parametrize("fault", range(1, FAULTS + 1))
def test_the_model_refuses(faults, fault):
    done = subprocess.run([faults, str(fault)], capture_output=True, text=True)
    assert done.returncode < 0, "it ended as if nothing were wrong"
    assert "FAILED tile model" in done.stdout


@needs_compiler
def test_the_instructions_are_the_chips(tmp_path):
    source = tmp_path / "tiles.cpp"
    source.write_text(
        '#include "core/tiles.h"\nusing namespace fastseq::baseline;\nvoid f(const TileShapes& s, void* p) {\n'
        "tile_configure(s); tile_zero<3>(); tile_load<4>(p, 64); tile_load<7>(p, 64); tile_multiply<3, 4, 7>();\n"
        "tile_multiply_bytes<3, 4, 7>(); tile_multiply_signed_bytes<3, 4, 7>();"
        "tile_store<3>(p, 64); tile_release(); }\n"
    )
    command = ["g++", "-std=c++17", "-O2", "-S", "-mamx-tile", "-mamx-bf16", "-iquotecsrc", source, "-o", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "unrecognized command-line option" in done.stderr:
        pytest.skip("this g++ does not know AMX")
    assert done.returncode == 0, done.stderr
    found = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith(("tile", "ldtile", "tdp"))]
    assert [line.split()[0] for line in found] == [
        "ldtilecfg", "tilezero", "tileloadd", "tileloadd", "tdpbf16ps", "tdpbusd", "tdpbssd",
        "tilestored", "tilerelease",
    ]  # fmt: skip
    for product in found[4:7]:
        assert product.endswith("%tmm7, %tmm4, %tmm3")  # B, A, C


@needs_native
def test_a_set_that_the_chip_lacks_is_refused():
    usable = {name for name in ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16") if _accepts(name)}
    flags = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    if " amx_tile" not in flags:
        assert "amx_bf16" not in usable
        with pytest.raises(RuntimeError, match="cannot use 'amx_bf16' here"):
            torch.ops.fastseq.native_isa("amx_bf16")
        assert torch.ops.fastseq.native_isa("auto") in usable
    assert fastseq.backends()


def _accepts(name):
    try:
        torch.ops.fastseq.native_isa(name)
    except RuntimeError:
        return False
    return True

"""The tests of GPU kernels run with ``--device cuda`` as they are: tried here without a GPU, as far as that goes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import devices
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Of every kind of draw one: weights, masks, lengths, packed sequences, modules, autograd, the largest helpers.
SOME = [
    "recurrent/test_triton_recurrent_interpreted.py::test_one_bias_alone[lstm-b_ih]",
    "recurrent/test_triton_recurrent_interpreted.py::test_padding_is_never_read[lstm-sequence]",
    "recurrent/test_triton_recurrent_interpreted.py::test_every_option_on_every_cell[lstm_projected-lengths+reset+reverse-step]",
    "recurrent/test_triton_norm_interpreted.py::test_all_options_at_once[lstm-False-step]",
    "package/test_triton_promises_interpreted.py::test_update_gate_at_one_keeps_the_state[step-torch.float16-triton]",
    "attention/test_triton_attention_interpreted.py::test_every_feature_alone[lengths]",
    "attention/test_triton_attention_interpreted.py::test_packed_sequences[sinks-torch.float32]",
    "attention/test_triton_attention_interpreted.py::test_what_lies_past_a_length_is_never_read[torch.bfloat16-2]",
    "attention/test_triton_attention_interpreted.py::test_the_public_functions_and_the_layer_reach_the_kernels",
]


def run(*arguments: str, without_hypothesis: bool = False) -> subprocess.CompletedProcess[str]:
    hidden = "import sys; sys.modules['hypothesis'] = None; " if without_hypothesis else "import sys; "
    program = [sys.executable, "-c", hidden + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    return subprocess.run(
        [*program, "-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, timeout=300, env=environment, cwd=TESTS.parent,
    )  # fmt: skip


@needs_triton
def test_the_suites_of_gpu_kernels_draw_every_tensor_on_the_device() -> None:
    done = run("--device", "pretend", *(str(TESTS / name) for name in SOME))
    assert re.search(rf"^{len(SOME)} passed", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_calls_go_to_the_kernels_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = torch.ops.fastseq.scan_forward
    assert devices.operator("scan_forward", "triton") is scan.triton
    assert devices.operator("scan_forward", "native") is scan.native
    monkeypatch.setattr(devices, "DEVICE", "cuda")
    assert devices.operator("scan_forward", "emulated") is scan.native
    monkeypatch.setattr(devices, "KERNELS", "native")

    messages = {
        "scan: the native CUDA kernels have no projection (w_hr)\nand a trace": pytest.skip.Exception,
        "a.cpp:9, attention: the CUDA C++ kernels of attention take bfloat16 and float16 alone": pytest.skip.Exception,
        "a.cpp:9, attention: the CUDA C++ kernels of attention take up to 256 features a head": pytest.skip.Exception,
        "attention: the native kernels read no pages (block_table)": pytest.skip.Exception,
        "scan: a CUDA kernel could not start": RuntimeError,
        "attention: lengths_q must be int64": RuntimeError,
    }
    for message, raised in messages.items():

        def refuse(*arguments: object, message: str = message) -> None:
            raise RuntimeError(message)

        monkeypatch.setattr(torch.ops.fastseq, "scan_forward", SimpleNamespace(native=refuse))
        with pytest.raises(raised) as seen:
            devices.operator("scan_forward", "triton")()
        assert str(seen.value) in message


@needs_triton
def test_a_tensor_left_on_the_cpu_is_found(tmp_path: Path) -> None:
    left = tmp_path / "test_left_behind.py"
    left.write_text(
        "import pytest, torch\nfrom attention_operators import dense, forward\n"
        "@pytest.mark.device('triton')\ndef test():\n"
        "    q, k, v = dense()\n    lengths = torch.tensor([1, 2], device='cpu')\n"
        "    forward(q, k, v, {'lengths_k': lengths}, 'triton')\n"
        "def test_of_the_cpu(): ...\n"
        "@pytest.mark.device('triton')\n@pytest.mark.interpreter_only\ndef test_of_the_interpreter(): ...\n"
    )
    done = run("--device", "pretend", "--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml"),
               "-p", "conftest", str(left))  # fmt: skip
    assert "1 failed, 2 deselected" in done.stdout, done.stdout + done.stderr
    assert "expected all tensors to be on one device" in done.stdout


@needs_triton
def test_without_hypothesis_its_tests_alone_are_skipped_and_only_off_the_cpu() -> None:
    drawn = (
        str(TESTS / "attention/test_triton_attention_interpreted.py") + "::test_no_tile_that_somebody_sees_is_left_out"
    )
    done = run("-rs", "--device", "pretend", drawn, without_hypothesis=True)
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert "hypothesis is not installed" in done.stdout
    done = run(drawn, without_hypothesis=True)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pip install hypothesis" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    done = run("--device", "cuda", str(TESTS / "test_readme.py"))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch finds no GPU" in done.stderr

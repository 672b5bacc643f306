"""DTensors, FSDP2 and the examples for several processes, on two processes of gloo.

What a check asks for is in distributed_worker.py, whose two processes run all of them once.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq.attn.dtensor import shared_heads

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
CHECKS = re.findall(r"^def check_(\w+)", WORKER.read_text(encoding="utf-8"), re.M)

needs_distributed = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch is built without torch.distributed, or without gloo",
)


def environment() -> dict[str, str]:
    """With the package under test, one thread a process, and no network but this machine's."""
    package = str(Path(fastseq.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@needs_distributed
def test_what_is_sharded_equals_what_is_whole(tmp_path):
    """One start of both processes for all checks: torch alone takes seconds to import."""
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert len(CHECKS) > 20
    for text in printed:
        passed = re.findall(r"^passed check_(\w+)", text, re.M)
        assert passed == CHECKS, text


def test_query_heads_are_divided_as_far_as_key_heads_allow():
    assert shared_heads(8, 4, 2) == 1  # two key heads each
    assert shared_heads(8, 2, 4) == 2  # two processes share a key head
    assert shared_heads(8, 1, 8) == 8
    assert shared_heads(12, 6, 4) is None  # three query heads of two key heads, of which one is cut through
    assert shared_heads(9, 3, 2) is None
    assert shared_heads(0, 0, 2) is None


def test_importing_fastseq_leaves_torch_distributed_tensor_alone():
    code = "import fastseq, sys; assert not [m for m in sys.modules if m.startswith('torch.distributed.tensor')]"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), timeout=120)


# --- examples ---------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> list[str]:
    """The command that starts an example of two processes, on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    return [*command, "--rdzv-endpoint", "localhost:0", *map(str, arguments)]


@needs_distributed
def test_context_parallel_attention_equals_one_process():
    command = torchrun(ROOT / "examples" / "context_parallel.py")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=180)
    assert done.returncode == 0, done.stderr
    for way in ("all_gather", "ring"):
        assert f"{way}: output and gradients equal those of one process" in done.stdout


@pytest.mark.full
@needs_distributed
def test_training_is_interrupted_and_goes_on_from_its_checkpoint(tmp_path):
    """Ctrl-C under DDP, then FSDP2 from the step that was saved, to a loss below the first."""
    command = torchrun(ROOT / "examples" / "distributed.py", "--checkpoints", tmp_path, "--steps")
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    first = subprocess.Popen([*command, "100000"], start_new_session=True, **settings)
    printed = ""
    try:
        for line in first.stdout:
            printed += line
            if line.startswith("step    10/"):
                os.killpg(first.pid, signal.SIGINT)  # as a terminal does
        first.wait(timeout=60)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    saved = [int(path.parent.name[5:]) for path in tmp_path.glob("step-*/.metadata")]
    assert len(saved) == 1, printed
    assert 10 <= saved[0] < 100000
    more = saved[0] + 5
    second = subprocess.run([*command, str(more), "--fsdp"], timeout=180, **settings)
    assert second.returncode == 0, second.stdout
    assert f"FSDP2 on 2 processes of cpu, 16 rows each; steps {saved[0]} to {more}" in second.stdout
    losses = [float(x) for x in re.findall(r"loss (\d+\.\d+)", printed + second.stdout)]
    assert losses[-1] < losses[0]
    assert (tmp_path / f"step-{more:06}" / ".metadata").exists()


def test_an_example_started_without_torchrun_says_how():
    clean = {key: value for key, value in environment().items() if key != "RANK"}
    path = ROOT / "examples" / "context_parallel.py"
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=clean, timeout=120)
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 2 examples/context_parallel.py" in done.stderr

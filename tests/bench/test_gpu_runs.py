"""The runner of the GPU benchmarks, driven on the CPU: its truths, its cases, and everything that can go wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import attention as gpu_attention
from bench.gpu import cases as gpu_cases
from bench.gpu import command as gpu
from bench.gpu import journal as gpu_journal
from bench.gpu import recurrent as gpu_recurrent
from bench.gpu import report as gpu_report
from bench.gpu import run as gpu_run
from bench.gpu import tables
from bench.gpu import worker as gpu_worker
from bench.gpu.cases import Heads, Layers
from bench.gpu.journal import Journal, supervise
from bench.peers import Entrant, Unavailable
from fastseq import cli

ROOT = Path(__file__).resolve().parents[2]
LSTM = Layers("training", "float32", "lstm", 4, 3, 8)


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", gpu_cases.FAMILIES)
def test_a_plan_begins_with_its_core_and_soon_has_every_value(family: str) -> None:
    plan = gpu_cases.plan(family)
    core = list(gpu_cases.recurrent_core() if family == "recurrent" else gpu_cases.attention_core())
    assert list(plan[: len(core)]) == core
    assert len({case.name for case in plan}) == len(plan)
    early: list[Any] = list(plan[:150])
    if family == "recurrent":
        assert {c.cell for c in early} == {"lstm", "gru", "rnn", "rnn_relu", "gru_reset_before"}
        assert {c.batch for c in early} == {1, 4, 16, 17, 64, 128}
        assert {c.hidden for c in early} == {64, 128, 192, 256, 512, 768, 1024}
        assert {c.steps for c in early} == {1, 128, 1024}
        assert {(c.layers, c.bidirectional, c.packed) for c in early} >= {(2, True, True), (1, True, False)}
        assert {c.dtype for c in early} == {"bfloat16", "float16", "float32"}
    else:
        assert {c.queries for c in early} >= {1, 50, 200, 512, 1024, 2048, 4096, 8192, 16384, 32768}
        assert {c.dim for c in early} == {64, 128, 256}
        assert {c.kind for c in early} == {"dense", "decode", "varlen"}
        assert {c.keys for c in early if c.kind == "decode"} == {8192, 16384, 32768, 65536}
        assert any(c.window for c in early)
        assert {c.mode for c in early} == {"forward", "backward"}
    assert {c.mode for c in early} == ({"inference", "training"} if family == "recurrent" else {"forward", "backward"})


@pytest.mark.parametrize("window", [0, 3, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_pairs_are_those_that_the_mask_shows(causal: bool, window: int) -> None:
    i, j = torch.arange(13)[:, None], torch.arange(13)
    seen = ((j <= i) & (j >= i - (window or 13))) if causal else torch.ones(13, 13, dtype=torch.bool)
    case = Heads("forward", "float32", "dense", 2, 4, 2, 13, 13, 8, causal, window if causal else 0)
    assert case.pairs == 2 * int(seen.sum())
    assert case.operations == 4 * 8 * case.pairs * 4


def test_operations_of_a_stack_are_its_products() -> None:
    case = Layers("inference", "float32", "gru", 5, 3, 8, 2, True)
    rows = 5 * 3
    first, second = 2 * rows * 24 * (8 + 8), 2 * rows * 24 * (16 + 8)
    assert case.operations == 2 * (first + second)
    assert dataclasses.replace(case, mode="training").operations == 3 * case.operations


# --- the truth --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_the_truth_of_some_heads_is_theirs(mode: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "ROWS", 16)
    case = Heads(mode, "float32", "dense", 3, 4, 2, 40, 40, 16, True, window)
    given = gpu_attention.inputs(case, "cpu")
    i, j = torch.arange(40)[:, None], torch.arange(40)
    seen = (j <= i) & (j >= i - window) if window else j <= i
    leaves = [t.double().requires_grad_() for t in (given.q, given.k, given.v)]
    o = F.scaled_dot_product_attention(*leaves, attn_mask=seen, enable_gqa=True)
    whole = {"o": o}
    if mode == "backward":
        whole = dict(zip(("d_q", "d_k", "d_v"), torch.autograd.grad(o, leaves, given.d_o.double()), strict=True))
    truth = gpu_attention.answers(case, given, "cpu", torch.float64)
    expected = gpu_attention.compared(case, whole)
    assert truth.keys() == expected.keys()
    for name in truth:
        torch.testing.assert_close(truth[name], expected[name].detach())


def test_one_element_that_is_not_finite_spoils_an_answer_wherever_it_is() -> None:
    case = Heads("forward", "float32", "dense", 4, 2, 2, 5, 5, 8)
    o = torch.zeros(4, 2, 5, 8)
    assert not gpu_attention.compared(case, {"o": o})["o"].isnan().any()
    o[1, 0, 2, 3] = torch.inf  # of no head that is compared
    assert (1, 0) not in gpu_attention.sampled(case)
    assert gpu_attention.compared(case, {"o": o})["o"].isnan().all()


def test_packed_layers_of_torch_answer_as_ours_with_lengths() -> None:
    case = dataclasses.replace(LSTM, packed=True, batch=5)
    given = gpu_recurrent.inputs(case, "cpu")
    theirs = gpu_recurrent.torch_entrant(case, given, "cpu")
    ours = gpu_recurrent.ours(case, given, "cpu")
    a, b = theirs.outputs(theirs.call()), ours.outputs(ours.call())
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-6, rtol=2e-5)


# --- one case ---------------------------------------------------------------------------------------------------------


class FakeClock:
    """Every call takes a second more than the one before; remembers whose were timed."""

    def __init__(self) -> None:
        self.timed: list[tuple[int, bool]] = []

    def __call__(self, call: Callable[[], object], calls: int, cold: bool) -> float:
        call()
        self.timed.append((calls, cold))
        return calls * (1.0 + len(self.timed) % 2)


def bench(*names: str, clock: Any = None, **settings: Any) -> gpu_run.Bench:
    return gpu_run.Bench("cpu", names, clock or FakeClock(), **settings)


def register(monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[..., Entrant], needs: str = "") -> None:
    both = dict.fromkeys(gpu_cases.FAMILIES, prepare)
    monkeypatch.setitem(gpu_run.RUNNERS, name, gpu_run.Runner(name, name, None, both, needs))


@pytest.mark.parametrize("family", gpu_cases.FAMILIES)
def test_the_small_cases_are_right_and_timed(family: str) -> None:
    for case in gpu_cases.tiny(family):
        clock = FakeClock()
        found = bench("reference", "torch", "math", clock=clock).measure(case)
        assert found.reason == ""
        assert found.entries["reference"].status == "timed", found.entries["reference"].reason
        assert len(found.entries["reference"].timings[""].times) == gpu_run.FEWEST
        for name, entry in found.entries.items():
            assert entry.status == "timed" or (entry.status == "unavailable" and entry.reason), name
        cold = getattr(case, "kind", "") == "decode"  # these alone with emptied caches
        assert {emptied for _, emptied in clock.timed} == {cold}


@pytest.mark.parametrize("cold", [False, True])
def test_the_clock_of_a_gpu_times_all_calls_and_nothing_else(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that takes 1 ms for a call and 5 ms for emptying the caches."""
    now = 0.0

    def passes(ms: float) -> None:
        nonlocal now
        now += ms

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = now

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: SimpleNamespace(zero_=lambda: passes(5)))
    assert gpu_run.measure.EventClock()(lambda: passes(1), 7, cold) == pytest.approx(7e-3)
    assert now == (7 + 7 * 5 if cold else 7)


def test_a_wrong_answer_is_recorded_and_never_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong(case: Any, given: Any, device: str) -> Entrant:
        right = gpu_recurrent.torch_entrant(case, given, device)

        def outputs(answer: Any) -> Any:
            return {name: tensor * 1.001 for name, tensor in right.outputs(answer).items()}

        return Entrant(lambda: (calls.append(1), right.call())[1], outputs)

    register(monkeypatch, "wrong", wrong)
    found = bench("wrong", "torch").measure(LSTM)
    assert found.entries["wrong"].status == "refused"
    assert "is off by 1.0e-03 of its largest value" in found.entries["wrong"].reason
    assert len(calls) == 1
    assert found.entries["torch"].status == "timed"
    assert found.ratio("torch", "wrong") is None


def test_what_fails_leaves_the_others_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(case: Any, given: Any, device: str) -> Entrant:
        raise torch.OutOfMemoryError("tried to allocate 1000 GiB\nand more lines")

    def not_for_this(case: Any, given: Any, device: str) -> Entrant:
        raise Unavailable("not this case")

    def breaks_later(case: Any, given: Any, device: str) -> Entrant:
        right, count = gpu_recurrent.torch_entrant(case, given, device), iter(range(100))

        def call() -> Any:
            if next(count) == 4:
                raise RuntimeError("gone")
            return right.call()

        return Entrant(call, right.outputs)

    register(monkeypatch, "large", no_memory)
    register(monkeypatch, "picky", not_for_this)
    register(monkeypatch, "absent", no_memory, needs="a_package_that_is_not_there")
    register(monkeypatch, "fragile", breaks_later)
    found = bench("large", "picky", "absent", "fragile", "torch", "triton").measure(LSTM)
    told = {name: (entry.status, entry.reason) for name, entry in found.entries.items()}
    assert told["large"] == ("refused", "out of memory: tried to allocate 1000 GiB")
    assert told["picky"] == ("unavailable", "not this case")
    assert told["absent"] == ("unavailable", "the package a_package_that_is_not_there is not installed")
    assert told["fragile"] == ("refused", "RuntimeError: gone")
    assert told["torch"] == ("timed", "")
    assert told["triton"][0] == "unavailable"


def test_a_case_that_cannot_be_set_up_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(gpu_recurrent, "answers", no_memory)
    assert bench("torch").measure(LSTM).reason == "out of memory: no room"


# --- processes that are lost ------------------------------------------------------------------------------------------

CHILD = """
import os, sys, time
from pathlib import Path
from bench.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]))
gone = {line["name"] for line in journal.lines() if line["event"] != "start"}
for name in sys.argv[2:]:
    if name in gone:
        continue
    journal.write("start", name)
    journal.now_at("someone")
    if name == "crash":
        print("a last word", flush=True)
        os._exit(3)
    if name in ("slow", "hang"):
        time.sleep(1 if name == "slow" else 600)
    journal.write("done", name, value=len(name))
"""


def child(tmp_path: Path, *names: str, seconds: float = 60, stall: float = 30, **more: Any) -> tuple[str, Journal]:
    journal = Journal(tmp_path / "journal.jsonl")
    command = [sys.executable, "-c", CHILD, str(journal.path), *names]
    until = time.monotonic() + seconds
    return supervise(command, journal, tmp_path / "log", until, stall, folder=ROOT, **more), journal


def test_a_crash_loses_what_was_running_and_the_rest_goes_on(tmp_path: Path) -> None:
    why, journal = child(tmp_path, "a", "crash", "b")
    assert why == ""
    assert list(journal.done()) == ["a", "b"]
    (lost,) = journal.lost()
    assert (lost["name"], lost["at"]) == ("crash", "someone")
    assert lost["reason"] == "the process ended with status 3: a last word"
    assert not lost["hung"]


def test_a_hang_is_ended(tmp_path: Path) -> None:
    why, journal = child(tmp_path, "a", "hang", "b", stall=3)
    assert why == ""
    assert list(journal.done()) == ["a", "b"]
    assert "it wrote nothing for 3 s" in journal.lost()[0]["reason"]
    assert journal.lost()[0]["hung"]


def test_a_machine_that_was_stopped_has_heard_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = 0.0

    def changed() -> None:  # a minute passes once the child has begun its slow part
        nonlocal passed
        passed = 60.0 * ("slow" in (tmp_path / "journal.jsonl").read_text())

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, sleep=time.sleep)
    monkeypatch.setattr(gpu_journal, "time", clock)
    why, journal = child(tmp_path, "a", "slow", "b", seconds=600, changed=changed)
    assert why == ""
    assert list(journal.done()) == ["a", "slow", "b"]
    assert journal.lost() == []


def test_at_the_end_of_the_time_a_child_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    why, journal = child(tmp_path, "a", "hang", "b", seconds=6)
    assert why == "out of time"
    assert time.monotonic() - began < 20
    assert list(journal.done()) == ["a"]


def test_a_command_that_never_starts_is_given_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    why = supervise(command, journal, tmp_path / "log", time.monotonic() + 60, 30)
    assert why == "the process ended with status 1: no such thing"


def test_who_hung_once_is_left_out_of_all_later_cases(tmp_path: Path) -> None:
    """And who crashed, of the case it crashed in, until it has three times."""
    first, second, third, *_ = (case.name for case in gpu_cases.tiny("recurrent"))
    journal = Journal(tmp_path / "journal.jsonl")
    for name, at, hung in ((first, "reference", True), (second, "torch", False)):
        journal.write("start", name)
        journal.write("lost", name, at=at, reason="gone", hung=hung)
    options = argparse.Namespace(
        journal=journal.path, check=True, device="cpu", family="recurrent", case=[first, second, third], tiny=True,
        until=float("inf"), contestant=["reference", "torch"], min_time=0.001,
    )  # fmt: skip
    gpu_worker.work(options)
    found = {name: line["case"]["contestants"] for name, line in journal.done().items()}
    assert list(found) == [first, second, third]
    told = {name: [entries[who]["status"] for who in ("reference", "torch")] for name, entries in found.items()}
    assert told == {
        first: ["refused", "checked"], second: ["unavailable", "refused"], third: ["unavailable", "checked"]
    }  # fmt: skip
    assert found[third]["reference"]["reason"] == f"left out since it was lost in {first}: gone"
    crashes = [{"name": "c", "at": "torch", "reason": "gone", "hung": False}] * gpu_worker.TRIES
    assert gpu_worker.given_up(crashes[1:]) == {}
    assert list(gpu_worker.given_up(crashes)) == ["torch"]


def test_a_role_that_no_device_has_yet_is_measured_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The persistent role of the Triton scan, where it can be had; what the tables ask for is as it was after it."""
    launch = pytest.importorskip("fastseq.kernels.recurrent.launch")
    assert "persistent" in gpu_run.DEFAULT["cuda"]
    runner, given = gpu_run.RUNNERS["persistent"], gpu_recurrent.inputs(LSTM, "cpu")
    seen = []
    monkeypatch.setattr(gpu_recurrent, "ours", lambda case, given, device: seen.append(launch.role))
    with runner.scope(LSTM):
        runner.prepare["recurrent"](LSTM, given, "cpu")
        assert seen == ["persistent"]
        for change, why in (({"steps": 1}, "one launch in any role"), ({"hidden": 8192}, "processors")):
            with pytest.raises(Unavailable, match=why):
                runner.prepare["recurrent"](dataclasses.replace(LSTM, **change), given, "cpu")
    assert launch.role is None


def test_both_exchanges_of_a_cluster_are_measured_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    roles, plans = [""], {"cluster_barrier": "role=cluster_barrier blocks=4", "": "role=cluster blocks=4"}
    monkeypatch.setattr(gpu_recurrent.ops, "NATIVE_CUDA_MISSING", None)
    monkeypatch.setattr(torch.ops.fastseq, "native_scan_role", lambda role, *shape: roles.append(role), raising=False)
    monkeypatch.setattr(torch.ops.fastseq, "native_scan_plan", lambda *problem: plans[roles[-1]], raising=False)
    assert "barrier" in gpu_run.DEFAULT["cuda"]
    runner, given = gpu_run.RUNNERS["barrier"], gpu_recurrent.inputs(LSTM, "cpu")
    seen = []
    monkeypatch.setattr(gpu_recurrent, "ours", lambda case, given, device: seen.append(roles[-1]))
    with runner.scope(LSTM):
        runner.prepare["recurrent"](LSTM, given, "cpu")
        plans["cluster_barrier"] = "role=step reason=clusters of blocks need compute capability 9.0"
        with pytest.raises(Unavailable, match="compute capability"):
            runner.prepare["recurrent"](LSTM, given, "cpu")
    assert seen == ["cluster_barrier"]
    assert roles[-1] == ""


def test_a_line_cut_short_is_no_line(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("start", "a")
    journal.write("done", "a")
    with journal.path.open("a") as file:
        file.write('{"event": "done", "na')
    assert list(journal.done()) == ["a"]


# --- the command ------------------------------------------------------------------------------------------------------


def run_gpu(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--tiny", "--min-time", "0.005", *arguments]


def read(folder: Path, what: str) -> dict[str, Any]:
    (path,) = folder.glob(f"*-{what}.json")
    return json.loads(path.read_text())


def test_the_whole_command_on_the_cpu(tmp_path: Path) -> None:
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    for name in ('--device', '--kernels'):\n        parser.addoption(name)\n"
    )
    tests = folder / "test_some.py"
    tests.write_text(
        "import os\ndef test_right(): ...\ndef test_wrong():\n    assert 1 == 2\n"
        "def test_lost():\n    os._exit(9)\ndef test_after(): ...\n"
    )
    command = run_gpu("--out", str(tmp_path), "--minutes", "3", "--contestant", "native", "reference", "torch",
                      "--test", str(tests), "--only", "tests", "recurrent")  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 1, done.stdout + done.stderr  # a test failed
    kernels = read(tmp_path, "tests")["kernels"]
    assert kernels["triton"]["reason"]
    if not kernels["native"]["reason"].startswith("the compiled extension"):
        counts, failures = kernels["native"]["counts"], kernels["native"]["failures"]
        assert (counts.pop("lost", 0), counts.get("passed")) in ((1, 2), (0, 2))
        assert {failure["name"].partition("::")[2] for failure in failures} == {"test_wrong", "test_lost"}
    recurrent = read(tmp_path, "recurrent")
    assert recurrent["complete"], recurrent["stopped"]
    assert len(recurrent["cases"]) == len(gpu_cases.tiny("recurrent"))
    assert recurrent["environment"]["sources"] == gpu_report.sources()
    line = next(line for line in recurrent["summary"] if line["backend"] == "reference" and line["peer"] == "best")
    assert line["of"] == "recurrent"
    known = [case for case in gpu_cases.tiny("recurrent") if case.cell != "gru_reset_before"]  # torch has none of it
    assert line["count"] == len(known), recurrent["cases"]
    assert "recurrent, reference: " in done.stdout


def test_sigterm_leaves_whole_files_of_what_was_done(tmp_path: Path) -> None:
    command = run_gpu("--out", str(tmp_path), "--minutes", "5", "--only", "recurrent", "--min-time", "20",
                      "--contestant", "torch")  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        for _ in range(600):
            if list(tmp_path.glob("*-recurrent.json")):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == cli.INTERRUPTED, said
    assert read(tmp_path, "recurrent")["complete"] is False
    assert read(tmp_path, "recurrent")["stopped"] == "stopped"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == gpu.NO_GPU == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "python -m bench gpu: torch finds no GPU on this machine (torch.cuda.is_available() is False)"
    ]


def test_a_plan_is_printed_with_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--plan", "--only", "attention", "--minutes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_cases.plan("attention")) + 1
    assert "later" not in lines[0]
    assert "later" in lines[-2]


def test_the_suites_that_run_on_a_gpu_are_found_in_every_folder() -> None:
    found = {Path(file).name for file in gpu.suites()}
    for name in ("recurrent", "recurrent_together", "attention", "promises"):
        assert f"test_triton_{name}_interpreted.py" in found
    assert "test_readme.py" not in found


def test_suites_run_on_the_kernels_that_have_their_operators() -> None:
    files = [
        "tests/recurrent/test_triton_recurrent_interpreted.py",
        "tests/recurrent/test_triton_norm_interpreted.py",
        "tests/attention/test_triton_attention_interpreted.py",
    ]
    assert gpu.suites_of("triton", "cuda", files) == files
    assert gpu.suites_of("triton", "cuda", ["tests/recurrent/test_cuda_recurrent_emulated.py"]) == []
    assert gpu.suites_of("native", "mps", files) == []


# --- the table of support ---------------------------------------------------------------------------------------------


def test_no_file_no_claim(tmp_path: Path) -> None:
    text = tables.support(tmp_path)
    assert text.count("not yet run on hardware") == len(tables.KERNELS)
    assert "×" not in text


def test_a_result_of_a_cpu_claims_nothing(tmp_path: Path) -> None:
    environment = {"device": "AMD EPYC", "driver": None, "commit": "0" * 40}
    (tmp_path / "amd-epyc-recurrent.json").write_text(json.dumps({"environment": environment, "summary": []}))
    assert tables.support(tmp_path) == tables.support(tmp_path / "nothing")


def test_files_of_a_gpu_are_told_with_commit_and_ratio(tmp_path: Path) -> None:
    environment = {"device": "NVIDIA H200", "driver": "580", "commit": "abcdef0123456789"}
    case = {"name": "c", "family": "attention", "group": "g", "reason": "", "contestants": {},
            "ratios": {"triton": {"cudnn": 0.8, "best": 0.8}}}  # fmt: skip
    timed = gpu_report.timings_document([case], environment, 1, "")
    lost = [{"name": "tests/attention/test_triton_attention_interpreted.py::b", "reason": "hung"}]
    parts = {"triton": {"reason": "", "tests": {"tests/attention/test_triton_attention_interpreted.py::a": "passed"},
                        "failures": [], "lost": lost}}  # fmt: skip
    (tmp_path / "nvidia-h200-attention.json").write_text(json.dumps(timed))
    (tmp_path / "nvidia-h200-tests.json").write_text(json.dumps(gpu_report.tests_document(parts, environment, False)))
    text = tables.support(tmp_path)
    (row,) = [line for line in text.splitlines() if line.startswith("| Triton, attention")]
    assert "tests: 1 passed, 1 lost (at abcdef0123)" in row
    assert "0.80× the best peer's speed over 1 cases, worst 0.80× `c` (at abcdef0123)" in row
    (row,) = [line for line in text.splitlines() if line.startswith("| Triton, recurrent")]
    assert "not yet run on hardware" in row


def test_a_file_is_named_after_its_device() -> None:
    assert gpu_report.slug("NVIDIA H200") == "nvidia-h200"
    assert os.sep not in gpu_report.slug("a/b c")

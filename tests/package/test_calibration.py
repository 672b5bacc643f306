"""Calibration: AUTO by what was measured on the user's machine, the file that holds it, and the command."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import needs_native
from torch._subclasses import FakeTensorMode

import fastseq
from fastseq import auto, backend, cli
from fastseq.__main__ import main
from fastseq.calibration import chosen, file, grid, measure, session, shown
from fastseq.calibration.calls import AttentionShape, ScanShape, Shape, from_values
from fastseq.calibration.file import CANNOT, LOST, PASSED, RAISED, WRONG, Entry, Timed, Trial, Verdict
from fastseq.calibration.session import CalibrationError, Progress, Session
from fastseq.ops import triton as ops_triton

LSTM = ScanShape("lstm", "float32", 50, 32, 8, 16)
HEADS = AttentionShape("float32", 1, 2, 2, 40, 40, 8, 8, causal=True)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(chosen, "_said", set())
    monkeypatch.setattr(chosen, "_unwritten", [])
    monkeypatch.setattr(chosen, "_ignored", False)  # a test of the bench may have run in this process
    backend.measured_anew()
    yield tmp_path / "cache" / "fastseq" / "calibration.json"
    backend.measured_anew()


def entry(*timed: tuple[Shape, dict[str, float]], of_kind: bool = True, machine: dict | None = None) -> Entry:
    """An entry of this machine's CPU, every kernel of which passed, with these times."""
    found = Entry(machine or file.machine("cpu", 0) or {}, "2026-11-30")
    for name in chosen.OURS:
        for shape, dtype in itertools.product((LSTM, HEADS), grid.FLOATS):
            found.tested.add((name, shape.op, dtype))
            found.tests[Trial(name, shape._replace(dtype=dtype))] = Verdict(PASSED)
    found.timed = {shape: Timed(of_kind, 0.0, times) for shape, times in timed}
    return found


def known(found: Entry) -> None:
    """Writes an entry, and has AUTO look at it."""
    file.update(found)
    backend.measured_anew()


def first(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    return fastseq.explain(call, *args, **options).splitlines()[0]


def lstm_runs_on(steps: int = 50, batch: int = 32, dtype: torch.dtype = torch.float32) -> str:
    """The first line of what explain() says of an LSTM in inference."""
    with torch.no_grad():
        return first(fastseq.nn.LSTM(8, 16, dtype=dtype), torch.randn(steps, batch, 8, dtype=dtype))


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("native", "torch_s", "spread", "taken"),
    [
        (1.0, 2.0, 0.0, "native"),
        (2.0, 1.0, 0.0, "torch"),
        (1.029, 1.0, 0.0, "native"),  # which AUTO's table names: nothing is 3% ahead of it
        (1.031, 1.0, 0.0, "torch"),
        (1.08, 1.0, 0.1, "native"),  # the rounds spread more than that
        (1.12, 1.0, 0.1, "torch"),
    ],
)
@needs_native
def test_a_backend_must_be_ahead_by_three_percent_and_by_more_than_the_rounds_spread(native, torch_s, spread, taken):
    found = entry((LSTM, {"native": native, "torch": torch_s}))
    found.timed[LSTM].spread = spread
    known(found)
    said = lstm_runs_on()
    assert f"runs on: {taken} (AUTO for cpu, scan, lstm float32: measured on this machine on 2026-11-30" in said
    assert "times as fast as" in said


@needs_native
def test_a_kernel_must_be_three_percent_ahead_of_torch_where_the_table_has_torch(monkeypatch):
    wrong = tuple(auto.Row("cpu", op, "", ("torch", "native", "reference"), "wrong") for op in ("scan", "attention"))
    monkeypatch.setattr(auto, "AUTO", wrong)
    for native, taken in ((0.98, "torch"), (0.96, "native")):
        known(entry((LSTM, {"native": native, "torch": 1.0})))
        assert f"runs on: {taken} " in lstm_runs_on()


@needs_native
def test_a_shape_of_a_model_counts_before_its_kind_and_for_no_other():
    known(entry((LSTM._replace(hidden=64), {"native": 2.0, "torch": 1.0})))
    known(entry((LSTM, {"native": 1.0, "torch": 2.0}), of_kind=False))
    assert "runs on: native (AUTO for cpu, scan, lstm float32 T50 B32 I8 H16: measured" in lstm_runs_on()
    assert "runs on: native " in lstm_runs_on(steps=64)  # rounded up to a power of two, the same
    assert "runs on: torch (AUTO for cpu, scan, lstm float32: measured" in lstm_runs_on(steps=65)
    assert "tested on every CPU run" in lstm_runs_on(dtype=torch.float64)  # which was not measured


@needs_native
@pytest.mark.parametrize(
    ("outcome", "other_dtype"), [(WRONG, "torch"), (LOST, "torch"), (RAISED, "native"), (CANNOT, "native")]
)
def test_a_kernel_that_failed_is_not_taken_however_fast_it_is(outcome, other_dtype, caplog):
    wide = LSTM._replace(dtype="float64")
    found = entry((LSTM, {"native": 1.0, "torch": 9.0}), (wide, {"native": 1.0, "torch": 9.0}))
    found.tests[Trial("native", wide)] = Verdict(PASSED)
    found.tested.add(("native", "scan", "float64"))
    found.tests[Trial("native", LSTM._replace(hidden=5))] = Verdict(outcome, "y is off by 3")
    known(found)
    said = lstm_runs_on()
    assert f"runs on: {'native' if outcome == CANNOT else 'torch'} " in said
    assert ("native failed its tests" in said) == (outcome != CANNOT)
    assert f"runs on: {other_dtype} " in lstm_runs_on(dtype=torch.float64)
    assert ("FAILED: native (scan)" in shown.told(found)) == (outcome != CANNOT)


@needs_native
def test_a_kernel_whose_self_tests_are_not_all_made_is_not_taken_on_trust(monkeypatch):
    monkeypatch.setattr(auto, "AUTO", (auto.Row("*", "scan", "", ("torch", "native", "reference"), "the table"),))
    found = entry((LSTM, {"native": 1.0, "torch": 9.0}))
    found.tested.discard(("native", "scan", "float32"))
    known(found)
    assert "the table" in lstm_runs_on()
    found = entry((LSTM, {"native": 1.0, "torch": 9.0}))
    found.tests = {Trial("native", HEADS): Verdict(PASSED)}  # of another operation
    file.remove(None)
    known(found)
    assert "the table" in lstm_runs_on()


@needs_native
def test_names_and_determinism_are_above_what_was_measured():
    known(entry((LSTM, {"native": 2.0, "torch": 1.0})))
    assert "runs on: torch " in lstm_runs_on()
    with fastseq.use_backend("native"):
        assert "runs on: native (named: native)" in lstm_runs_on()
    torch._C._set_deterministic_algorithms(True)  # as torch.use_deterministic_algorithms, which imports the compiler
    try:
        said = lstm_runs_on()
    finally:
        torch._C._set_deterministic_algorithms(False)
    assert "runs on: native (AUTO for cpu, scan: tested on every CPU run" in said


@needs_native
def test_what_explain_says_of_a_measured_call_is_what_runs():
    """The calls of other kinds keep the fast path."""
    slow = HEADS.kind("cpu")
    known(entry((LSTM, {"native": 2.0, "torch": 1.0}), (HEADS, {"native": 2.0, "torch": 1.0})))
    assert slow == "float32 short"
    layer, q = fastseq.nn.LSTM(8, 16), torch.randn(1, 2, 40, 8)
    many, one = torch.randn(50, 32, 8), torch.randn(1, 1, 8)
    mha = fastseq.nn.MultiheadAttention(16, 2).eval()
    x = torch.randn(40, 1, 16)
    calls: list[tuple[Callable[[], Any], str | None]] = [
        (lambda: layer(many), "aten::lstm"),
        (lambda: layer(one), None),
        (lambda: fastseq.nn.LSTM(8, 16, batch_first=True)(many.transpose(0, 1)), "aten::lstm"),
        (lambda: fastseq.attention(q, q, q, causal=True), "aten::scaled_dot_product_attention"),
        (lambda: fastseq.attention(q[:, :, :1], q, q, causal=True), None),
        (lambda: mha(x, x, x, need_weights=False), "aten::scaled_dot_product_attention"),
        (lambda: mha(x[:2], x, x, need_weights=False), None),
    ]
    with torch.no_grad():
        for call, runs in calls:
            with torch.profiler.profile() as profile:
                call()
            keys = {event.key for event in profile.key_averages()}
            of_torch = keys & {"aten::lstm", "aten::scaled_dot_product_attention"}
            assert of_torch == ({runs} if runs else set()), (keys, runs)
        with fastseq.use_backend("reference"):
            everything = [call() for call, _ in calls]
        for (call, _), wanted in zip(calls[:2] + calls[3:], everything[:2] + everything[3:], strict=True):
            torch.testing.assert_close(call(), wanted, atol=1e-5, rtol=1e-5)


@needs_native
def test_the_fast_path_is_kept_for_calls_of_kinds_that_stay_with_the_native_kernels(monkeypatch):
    known(entry((LSTM, {"native": 2.0, "torch": 1.0}), (HEADS, {"native": 2.0, "torch": 1.0})))
    taken: list[str] = []
    for module, name in ((fastseq.nn.recurrent.direct, "infer"), (fastseq.attn.direct.direct, "attend")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (taken.append(name), real(*a))[1])
    layer, q = fastseq.nn.LSTM(8, 16), torch.randn(1, 2, 40, 8)
    with torch.no_grad():
        layer(torch.randn(50, 32, 8))
        fastseq.attention(q, q, q, causal=True)
        assert taken == []
        layer(torch.randn(1, 1, 8))
        fastseq.attention(q[:, :, :1], q, q)
    assert taken == ["infer", "attend"]


@needs_native
def test_odd_arguments_get_the_same_errors_where_calls_are_divided():
    q = torch.randn(1, 2, 4, 8)
    layer = fastseq.nn.LSTM(8, 16)
    calls: list[Callable[[], Any]] = [
        lambda: layer(torch.randn(2, 3, 4, 8)), lambda: layer("x"), lambda: layer(torch.randn(8)),
        lambda: fastseq.nn.GRUCell(8, 16)(torch.randn(3, 9)), lambda: fastseq.nn.GRUCell(8, 16)(torch.tensor(1.0)),
        lambda: fastseq.attention(q, q, q, window=(1, 2, 3)), lambda: fastseq.attention(q, q, q, window=3),
        lambda: fastseq.attention(q, q, q, softcap="x"),
        lambda: fastseq.attention(q, q, None), lambda: fastseq.attention(q[0], q, q),
        lambda: fastseq.attention(q, q, q, mask="x"), lambda: fastseq.attention(q.int(), q, q),
        lambda: fastseq.nn.MultiheadAttention(16, 2).eval()(q[0], q[0], "x"),
    ]  # fmt: skip

    def errors() -> list[str]:
        said = []
        for call in calls:
            with torch.no_grad(), pytest.raises(Exception) as raised:  # noqa: PT011 - whichever, but the same
                call()
            said.append(f"{type(raised.value).__name__}: {raised.value}")
        return said

    plain = errors()
    known(entry((LSTM, {"native": 2.0, "torch": 1.0}), (HEADS, {"native": 2.0, "torch": 1.0})))
    assert backend.divided("scan")
    assert errors() == plain


@needs_native
@pytest.mark.parametrize("ahead", ["native", "torch"])
def test_a_compiled_model_goes_by_kinds_and_makes_one_graph_for_all_lengths(ahead: str) -> None:
    """Of few rows the other backend is ahead."""
    few = ScanShape("gru", "float32", 50, 2, 8, 16)
    behind = "torch" if ahead == "native" else "native"
    known(entry((few, {ahead: 2.0, behind: 1.0}), (few._replace(batch=32), {ahead: 1.0, behind: 2.0})))
    layer, graphs = fastseq.nn.GRU(8, 16), []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(str(graph.code))
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(layer, backend=counted, fullgraph=True, dynamic=True)
        for steps in (5, 9, 33):
            x = torch.randn(steps, 32, 8)
            torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    assert all(("layers_forward" in graph) == (ahead == "native") for graph in graphs)
    assert ahead == "torch" or len(graphs) == 1  # torch's own layer is traced again for each length


# --- a machine on which AUTO's rows are wrong -------------------------------------------------------------------------


def in_this_process(items: Sequence[session.Item]) -> Iterator[tuple[session.Item, dict[str, Any]]]:
    for item in items:
        yield item, measure.examine(item)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few small calls in this process, in place of many in children."""
    monkeypatch.setattr(session, "in_children", in_this_process)
    shapes: list[Shape] = [LSTM, LSTM._replace(cell="gru", steps=5), HEADS]
    monkeypatch.setattr(grid, "shapes", lambda device, ops: [s for s in shapes if s.op in ops])
    tests = [Trial("native", s._replace(training=True)) for s in (LSTM._replace(steps=3), HEADS)]
    monkeypatch.setattr(
        grid, "self_tests", lambda device, wanted: [t for t in tests if (t.shape.op, t.shape.dtype) in wanted]
    )


def timed_by(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """A machine on which a call takes each backend so long."""
    monkeypatch.setattr(measure, "in_turns", lambda calls, *_: ({name: seconds[name] for name in calls}, 0.0))


def calibrated(wanted: Sequence[Shape] | None = None, minutes: float = 5.0) -> Session:
    made = Session(CPU, time.monotonic() + 60 * minutes, wanted, work=in_this_process)
    made.complete = made.run()  # type: ignore[attr-defined]
    return made


@needs_native
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("table", "ahead"), [("torch", "native"), ("native", "torch")])
def test_a_machine_whose_rows_are_wrong_finds_the_right_ones(table, ahead, monkeypatch):
    other = {"torch": "native", "native": "torch"}[table]
    rows = tuple(auto.Row("*", op, "", (table, other, "reference"), "wrong here") for op in ("scan", "attention"))
    monkeypatch.setattr(auto, "AUTO", rows)
    backend.measured_anew()
    q = torch.randn(1, 2, 40, 8)
    assert f"runs on: {table} " in lstm_runs_on()
    timed_by(monkeypatch, {table: 2e-3, ahead: 1e-3})
    assert calibrated().complete
    with torch.no_grad():
        for said in (lstm_runs_on(), first(fastseq.attention, q, q, q, causal=True)):
            assert f"runs on: {ahead} " in said
            assert f"measured on this machine on {session.today()}; 2.00 times as fast as {table} over 1 shape" in said
        with torch.profiler.profile() as profile:
            fastseq.nn.LSTM(8, 16)(torch.randn(50, 32, 8))
    assert ("aten::lstm" in {event.key for event in profile.key_averages()}) == (ahead == "torch")
    assert main(["calibrate", "--forget"]) == 0
    backend.measured_anew()
    assert "wrong here" in lstm_runs_on()


@needs_native
@pytest.mark.usefixtures("small")
def test_a_kernel_with_wrong_numbers_is_found_and_not_used(monkeypatch, capsys):
    real = fastseq.recurrent.stack.FORWARD

    def wrong(*args: Any) -> Any:
        y, *rest = real(*args)
        return (y * 1.001, *rest)

    monkeypatch.setattr(fastseq.recurrent.stack, "FORWARD", wrong)
    for name in ("infer", "layers_forward"):
        monkeypatch.setattr(fastseq.direct, name, lambda *_: None)
    timed_by(monkeypatch, {"torch": 2e-3, "native": 1e-3})
    assert main(["calibrate", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "NOT USED: native, scan, float32: lstm float32 T3" in printed.out
    assert "is allowed" in printed.out
    assert "runs on: torch " in lstm_runs_on()
    q = torch.randn(1, 2, 40, 8)
    with torch.no_grad():
        assert "runs on: native " in first(fastseq.attention, q, q, q, causal=True)  # whose kernels are right


@needs_native
def test_self_tests_cover_every_kernel_dtype_and_cell_and_pass_here():
    tests = list(grid.self_tests("cpu", list(itertools.product(("scan", "attention"), grid.FLOATS))))
    assert {(t.backend, t.shape.op, t.shape.dtype) for t in tests} == {
        ("native", op, dtype) for op in ("scan", "attention") for dtype in grid.FLOATS
    }
    assert {t.shape.cell for t in tests if isinstance(t.shape, ScanShape)} == set(fastseq.ops.GATES)
    for test in tests:
        item = {"op": test.shape.op, "call": list(test.shape), "device": "cpu", "seconds": 0}
        out = measure.examine({**item, "backends": [test.backend]})["out"]
        assert out == {test.backend: Verdict(PASSED)}, test.shape.name


def test_every_kind_that_is_timed_has_a_shape_and_those_of_torch_come_first():
    for device in ("cpu", "cuda"):
        shapes = grid.shapes(device, ("scan", "attention"))
        kinds = [(shape.op, shape.kind(device)) for shape in shapes]
        first_turn = kinds[: len(set(kinds))]
        assert len(set(first_turn)) == len(first_turn)
        assert all(1 <= kinds.count(kind) <= 2 for kind in set(kinds))
        assert len(shapes) == len(set(shapes))
        for kind in (auto.ON_CHIP, auto.LONE_FP32) if device == "cuda" else ():
            assert any(kind in name for _, name in kinds)


def test_turns_are_fair_and_noise_is_told():
    """A clock on which native takes 1 s a call, torch 3 s, with a disturbance that comes and goes."""
    order: list[str] = []
    calls = {"native": lambda: None, "torch": lambda: None}
    names = {id(call): name for name, call in calls.items()}

    def clock(call: Callable[[], object], count: int, cold: bool = False, noise: float = 0.0) -> float:
        name = names[id(call)]
        order.append(name)
        disturbed = 1.0 + noise * (len(order) % 4 == 0)
        return count * disturbed * {"native": 1.0, "torch": 3.0}[name]

    times, spread = measure.in_turns(calls, clock, 0.1)
    assert (times, spread) == ({"native": 1.0, "torch": 3.0}, 0.0)
    rounds = order[6:]
    assert rounds.count("native") == rounds.count("torch") == measure.ROUNDS
    assert rounds[:4] == ["native", "torch", "torch", "native"]
    order.clear()
    times, spread = measure.in_turns(calls, lambda *a: clock(*a, noise=2.0), 0.1)
    assert spread > measure.NOISY
    assert order[6:].count("native") == 3 * measure.ROUNDS  # more rounds


# --- other devices, emulated ------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """An Ampere, and another, of a newer kind."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA, and has not even tensors that only say they are on a GPU")
    found = [
        SimpleNamespace(name=name, major=major, minor=0, multi_processor_count=108, total_memory=40 << 30)
        for name, major in (("an Ampere", 8), ("a Blackwell", 10))
    ]
    monkeypatch.setattr(file, "gpu", lambda index: found[index] if index < len(found) else None)
    monkeypatch.setattr(auto, "capability", lambda index: (found[index].major, 0))
    monkeypatch.setattr(backend, "operator_reason", lambda name, device, op="scan": None)
    monkeypatch.setattr(grid, "operator_reason", lambda name, device, op="scan": None)
    monkeypatch.setattr(ops_triton, "attention_reason", lambda q, v: None)
    return found


def machine_with(native: float, triton: float, wrong: str = "") -> session.Work:
    """Trials on a GPU on which torch takes 1 s, and a backend has wrong numbers."""

    def work(items: Sequence[session.Item]) -> Iterator[tuple[session.Item, dict[str, Any]]]:
        seconds = {"native": native, "triton": triton, "torch": 1.0, "reference": 50.0}
        for item in items:
            out = {name: [WRONG if name == wrong else PASSED, ""] for name in item["backends"]}
            right = [name for name in item["backends"] if name != wrong]
            times = {name: seconds[name] for name in right} if item["seconds"] else {}
            yield item, {"out": out, "times": times, "spread": 0.0}

    return work


def on_gpu(index: int, dtype: torch.dtype = torch.bfloat16, hidden: int = 512) -> str:
    with FakeTensorMode(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.nn asks for the addresses of the weights
        layer = fastseq.nn.LSTM(64, hidden, device=f"cuda:{index}", dtype=dtype)
        return first(layer, torch.empty(128, 64, 64, device=f"cuda:{index}", dtype=dtype))


@pytest.mark.parametrize(
    ("native", "triton", "wrong", "taken"),
    [
        (0.5, 0.4, "", "triton"),
        (0.5, 0.6, "", "native"),
        (0.5, 0.4, "triton", "native"),
        (0.98, 0.99, "", "torch"),
        (2.0, 3.0, "", "torch"),
    ],
)
def test_a_gpu_that_nobody_has_timed_takes_the_kernel_that_is_ahead_there(gpus, native, triton, wrong, taken):
    assert "not yet run on such a GPU" in on_gpu(0)
    device = torch.device("cuda", 0)
    made = Session(device, time.monotonic() + 60.0, work=machine_with(native, triton, wrong))
    assert made.run()
    said = on_gpu(0)
    assert f"scan on cuda sm_80 runs on: {taken} (AUTO for cuda sm_80, scan, lstm bfloat16: measured on this" in said
    with FakeTensorMode(), torch.no_grad():
        q = torch.empty(2, 8, 2048, 64, device="cuda:0", dtype=torch.float16)
        assert f"runs on: {taken} (AUTO for cuda sm_80, attention, float16: measured" in first(
            fastseq.attention, q, q, q
        )
        ours = [name for name in ("native", "triton") if name != wrong]
        fastest = min(ours, key={"native": native, "triton": triton}.__getitem__)
        said = first(fastseq.attention, q, q, q, softcap=9.0)  # which torch has not
        assert f"runs on: {fastest} " in said
    assert "not yet run on such a GPU" in on_gpu(1)  # of which nothing is known
    assert "an Ampere" in shown.in_one_line()


def test_a_new_driver_or_torch_makes_a_calibration_outdated(gpus, monkeypatch, caplog):
    made = Session(torch.device("cuda", 0), time.monotonic() + 60.0, work=machine_with(0.5, 0.6))
    made.run()
    assert "measured on this machine" in on_gpu(0)
    for name, value in (("_driver", lambda: "NVRM 999"), ("_build", lambda: "another")):
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO, "fastseq"):
            caplog.clear()
            patch.setattr(file, name, value)
            backend.measured_anew()
            for _ in range(3):
                assert "not yet run on such a GPU" in on_gpu(0)
            told = [r.getMessage() for r in caplog.records if "is ignored" in r.getMessage()]
            assert len(told) == 1
            assert f"{name[1:]} {made.entry.machine[name[1:]]} then, {value()} now" in told[0]
    backend.measured_anew()
    assert "measured on this machine" in on_gpu(0)


def test_calls_of_a_model_on_two_devices_are_measured_on_each(gpus, monkeypatch):
    seen: list[torch.device] = []

    def run(self: Session) -> bool:
        seen.append(self.device)
        assert self.wanted is not None
        return True

    monkeypatch.setattr(Session, "run", run)
    with fastseq.calibrate(progress=False) as made:
        for place in ("cpu", "cuda:0", "cuda:1", "cuda:1"):
            with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                q = torch.empty(2, 8, 64, 64, device=place)
                monkeypatch.setattr(fastseq.attn.autograd, "run", lambda name, call: (call.q, None))
                monkeypatch.setattr(fastseq.attn.eager, "attention", lambda call: call.q)
                fastseq.attention(q, q, q)
    assert seen == [CPU, torch.device("cuda", 0), torch.device("cuda", 1)]
    assert "an Ampere" in made.report
    with (
        pytest.raises(CalibrationError, match="no call that can be measured on cuda:0"),
        fastseq.calibrate(device="cuda:0", progress=False),
    ):
        fastseq.nn.GRU(3, 5)(torch.randn(4, 2, 3))


# --- recorded calls ---------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("small")
def test_the_calls_of_a_model_are_recorded_and_decide_for_its_shapes(monkeypatch):
    timed_by(monkeypatch, {"torch": 1e-3, "native": 2e-3})
    model = fastseq.nn.LSTM(8, 16, 2, bidirectional=True)
    mha = fastseq.nn.MultiheadAttention(16, 2).eval()
    x = torch.randn(20, 6, 8)
    with torch.no_grad():
        plain, attended = model(x)[0], mha(*3 * [torch.randn(7, 2, 16)], need_weights=False)
    with fastseq.calibrate(progress=False) as made, torch.no_grad():
        torch.testing.assert_close(model(x)[0], plain)  # the model runs as ever
        model(x)
        mha(*3 * [torch.randn(7, 2, 16)], need_weights=False)
    assert made.complete
    timed = {shape for known_here in file.read() for shape in known_here.timed}
    assert timed == {
        ScanShape("lstm", "float32", 20, 6, 8, 16, layers=2, directions=2),
        AttentionShape("float32", 2, 2, 2, 7, 7, 8, 8, bottom_right=False),
    }
    with torch.no_grad():
        assert "runs on: torch (AUTO for cpu, scan, lstm float32 T20 B6 I8 H16 L2 bi: measured" in first(model, x)
        assert "tested on every CPU run" in first(fastseq.nn.LSTM(8, 16), x)
        torch.testing.assert_close(model(x)[0], plain, atol=1e-5, rtol=1e-5)
    assert attended is not None


def test_a_model_that_raises_measures_nothing_and_leaves_nothing_behind(cache):

    def model() -> None:
        fastseq.nn.GRU(3, 5)(torch.randn(4, 2, 3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fastseq.calibrate(progress=False):
        model()
    assert not cache.exists()
    assert backend._decisions is None


def test_a_block_without_a_call_of_ours_says_so():
    with pytest.raises(CalibrationError, match="made no call that can be measured"), fastseq.calibrate():
        torch.nn.Linear(3, 3)(torch.randn(2, 3))
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(CalibrationError, match="of which no backend is named"), fastseq.calibrate():
        fastseq.attention(q, q, q, backend="torch")


def test_a_calibration_that_is_not_used_warns_and_bad_arguments_are_refused():
    with pytest.warns(UserWarning, match="measured nothing"):
        fastseq.calibrate()
    for minutes in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="minutes must be more than 0"):
            fastseq.calibrate(minutes)
    with pytest.raises(CalibrationError, match="no kernel of ours exists for meta"):
        fastseq.calibrate(1.0, device="meta").run()


# --- budget, interruption, resuming -----------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("small")
def test_a_run_whose_time_is_up_is_taken_up_by_the_next(monkeypatch):
    timed_by(monkeypatch, {"torch": 2e-3, "native": 1e-3})
    made: list[int] = []
    real, now = measure.examine, [0.0]

    def slow(item: session.Item) -> dict[str, Any]:
        made.append(1)
        now[0] += 10.0  # seconds, on a clock that stands still otherwise
        return real(item)

    monkeypatch.setattr(measure, "examine", slow)
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    runs = 0
    while True:
        runs += 1
        one = Session(CPU, now[0] + 15.0, work=in_this_process)
        if one.run():
            break
        assert runs < 9
    assert len(made) == 5  # two self-tests and three calls, none of them twice
    assert runs > 2
    made.clear()
    assert Session(CPU, now[0] + 15.0, work=in_this_process).run()  # nothing is left to do
    assert not made


@needs_native
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("after", range(5))
def test_an_interruption_in_any_phase_keeps_what_was_made(after, monkeypatch):
    timed_by(monkeypatch, {"torch": 2e-3, "native": 1e-3})

    def interrupted(items: Sequence[session.Item]) -> Iterator[tuple[session.Item, dict[str, Any]]]:
        for pair in in_this_process(items):
            if len(made.entry.tests) + len(made.entry.timed) == after:
                raise KeyboardInterrupt
            yield pair

    made = Session(CPU, time.monotonic() + 99.0, work=interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.run()
    (kept,) = file.read()
    assert len(kept.tests) + len(kept.timed) == after
    assert kept.tests == made.entry.tests
    assert calibrated().complete


def test_two_runs_on_one_device_do_not_disturb_each_other(cache):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    other = Session(CPU, time.monotonic() + 9.0)
    with other._alone(), pytest.raises(CalibrationError, match="another calibration of cpu is running"):
        Session(CPU, time.monotonic() + 9.0).run()


# --- children ---------------------------------------------------------------------------------------------------------


def child_that(code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Makes the trials run this code in place of the kernels."""
    script = tmp_path / "child.py"
    script.write_text("import json, os, signal, sys, time\nitems = json.loads(sys.argv[1])\n" + code)
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **rest: popen([sys.executable, script, command[-1]], **rest)
    )


ANSWER = """
for n, item in enumerate(items):
    for name in item["backends"]:
        print(json.dumps({"at": name}), flush=True)
        {fault}
    times = {name: 1.0 for name in item["backends"]} if item["seconds"] else {}
    out = {name: ["passed", ""] for name in item["backends"]}
    print(json.dumps({"result": {"out": out, "times": times, "spread": 0.0}}), flush=True)
"""


@needs_native
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("if name == 'native': os.kill(os.getpid(), signal.SIGILL)", "the trial died of SIGILL"),
        ("if name == 'native': time.sleep(60)", "no answer within 1 s"),
        ("if name == 'native': sys.exit('cannot go on')", "the trial ended: cannot go on"),
    ],
)
def test_a_kernel_that_crashes_or_hangs_is_not_used_and_torch_is_not_blamed(fault, said, monkeypatch, tmp_path):
    child_that(ANSWER.replace("{fault}", fault), monkeypatch, tmp_path)
    monkeypatch.setattr(session, "PATIENCE", 1.0)
    monkeypatch.setattr(grid, "self_tests", lambda device, wanted: [Trial("native", LSTM)])
    monkeypatch.setattr(grid, "shapes", lambda device, ops: [LSTM])
    made = Session(CPU, time.monotonic() + 60.0)
    assert made.run()
    assert made.entry.tests[Trial("native", LSTM)] == Verdict(LOST, said)
    assert made.entry.timed[LSTM].times == {"torch": 1.0}
    assert shown.faults(made.entry)
    assert "runs on: torch " in lstm_runs_on()


def test_children_that_cannot_start_blame_no_kernel(monkeypatch, tmp_path):
    child_that("raise ImportError('libtorch.so is gone')", monkeypatch, tmp_path)
    with pytest.raises(CalibrationError, match=r"no trial can be started: .*libtorch\.so is gone"):
        Session(CPU, time.monotonic() + 60.0).run()
    assert not [test for known_here in file.read() for test in known_here.tests]


# --- the file ---------------------------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    """A right document."""
    return json.loads(json.dumps({"format": file.FORMAT, "machines": [file._document(entry((LSTM, {"torch": 1.0})))]}))


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = good()
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "\x00\x01", "[" * 100_000, '{"format": "something else"}',
        changed(lambda d: d.pop("machines")),
        changed(lambda d: d.update(machines={"a": 1})),
        changed(lambda d: d.update(machines=[3])),
        changed(lambda d: d.update(format="fastseq calibration 999")),
        changed(lambda d: d["machines"][0].update(date="yesterday")),
        changed(lambda d: d["machines"][0].update(date=7)),
        changed(lambda d: d["machines"][0].update(machine=[1])),
        changed(lambda d: d["machines"][0].update(tested=[["native", "haircut", "float32"]])),
        changed(lambda d: d["machines"][0]["tests"][0].__setitem__(3, "perhaps")),
        changed(lambda d: d["machines"][0]["tests"][0].__setitem__(4, None)),
        changed(lambda d: d["machines"][0]["tests"][0].__setitem__(0, "numpy")),
        changed(lambda d: d["machines"][0]["timed"][0].__setitem__(1, ["lstm"])),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(0, "transformer")),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(1, "float8")),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(2, -50)),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(2, 10**30)),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(2, True)),
        changed(lambda d: d["machines"][0]["timed"][0][1].__setitem__(9, 1)),
        changed(lambda d: d["machines"][0]["timed"][0][4].update(torch=0.0)),
        changed(lambda d: d["machines"][0]["timed"][0][4].update(torch=-1.0)),
        changed(lambda d: d["machines"][0]["timed"][0][4].update(torch=float("nan"))),
        changed(lambda d: d["machines"][0]["timed"][0][4].update(torch=float("inf"))),
        changed(lambda d: d["machines"][0]["timed"][0][4].update(torch="fast")),
        changed(lambda d: d["machines"][0]["timed"][0][4].update({"rm -rf": 1.0})),
        changed(lambda d: d["machines"][0]["timed"][0].__setitem__(3, None)),
    ],
    ids=range(32),
)  # fmt: skip
def test_a_broken_file_is_ignored_with_one_line_in_the_log(text, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    backend.measured_anew()
    with caplog.at_level(logging.INFO, "fastseq"):
        for _ in range(3):
            assert "measured on this machine" not in lstm_runs_on()
    assert len([r for r in caplog.records if "is ignored" in r.getMessage()]) == 1
    assert "ignored" in shown.in_one_line()
    assert main(["calibrate", "--show"]) == 2
    assert main(["calibrate", "--forget"]) == 0
    assert file.read() == []


def test_a_right_document_is_read_as_it_was_written(cache):
    found = entry((LSTM, {"torch": 1.0, "native": 0.5}), (HEADS, {"torch": 2.0}))
    found.timed[HEADS].out = {"native": Verdict(RAISED, "RuntimeError: \u00e4")}
    file.update(found)
    assert file.read() == [found]
    assert cache.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["folder", "fifo", "huge", "latin-1"])
def test_what_is_no_file_of_ours_is_ignored(kind, cache, monkeypatch, caplog):
    cache.parent.mkdir(parents=True)
    if kind == "folder":
        cache.mkdir()
    elif kind == "fifo":
        os.mkfifo(cache)
    elif kind == "latin-1":
        cache.write_bytes(b'{"format": "\xe4"}')
    else:
        monkeypatch.setattr(file, "LARGEST_FILE", 10)
        cache.write_text(json.dumps(good()))
    backend.measured_anew()
    with caplog.at_level(logging.INFO, "fastseq"):
        assert "measured on this machine" not in lstm_runs_on()
    assert "is ignored" in caplog.text


def test_a_machine_of_another_kind_is_none_of_ours(caplog):
    here = file.machine("cpu", 0)
    assert here is not None
    known(entry((LSTM, {"native": 2.0, "torch": 1.0}), machine={**here, "device": "another processor"}))
    with caplog.at_level(logging.INFO, "fastseq"):
        assert "measured on this machine" not in lstm_runs_on()
        assert caplog.text == ""  # a home that several machines share
        known(entry((LSTM, {"native": 2.0, "torch": 1.0}), machine={**here, "torch": "1.0"}))
        assert "measured on this machine" not in lstm_runs_on()
    assert f"torch 1.0 then, {torch.__version__} now" in caplog.text
    assert "none for this machine" in shown.in_one_line()


def test_without_a_file_nothing_is_looked_at_and_nothing_logged(monkeypatch, caplog, cache):
    monkeypatch.setattr(file, "machine", lambda *_: pytest.fail("looked at the machine"))
    with caplog.at_level(logging.DEBUG, "fastseq"):
        lstm_runs_on()
    assert caplog.text == ""
    assert not cache.parent.exists()


@pytest.mark.parametrize("variable", ["", "relative/cache"])
def test_a_machine_without_a_home_is_no_fault(variable, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    backend.measured_anew()
    assert file.path() is None
    assert "runs on" in lstm_runs_on()
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        file.update(entry())
    assert cli.run("fastseq", lambda: main(["calibrate", "--minutes", "0.01", "--device", "cpu"])) == 2


@needs_native
@pytest.mark.usefixtures("small")
def test_where_the_cache_cannot_be_written_what_was_measured_counts_in_this_process(cache, monkeypatch, capsys):
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")  # also for root, whom no permission stops
    timed_by(monkeypatch, {"torch": 1e-3, "native": 2e-3})
    made = fastseq.calibrate(progress=False, device="cpu")
    with pytest.warns(UserWarning, match="counts in this process alone"):
        made.run()
    assert "runs on: torch " in lstm_runs_on()
    assert cli.run("fastseq", lambda: main(["calibrate", "--device", "cpu"])) == 2
    assert "cannot write" in (said := capsys.readouterr().err)
    assert "XDG_CACHE_HOME names another" in said


def test_processes_that_write_at_once_lose_nothing(cache):
    here = {"device": "d", "kind": "cpu"}
    shapes = [LSTM._replace(hidden=n) for n in range(1, 41)]

    def write(part: list[ScanShape]) -> None:
        for shape in part:
            file.update(entry((shape, {"torch": 1.0}), machine=here))

    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from fastseq.calibration import file
from fastseq.calibration.calls import ScanShape
for n in range(41, 61):
    timed = {{ScanShape("lstm", "float32", 50, 32, 8, n): file.Timed(True, 0.0, {{"torch": 1.0}})}}
    file.update(file.Entry({here!r}, "2026-11-30", timed=timed))
"""
    other = subprocess.Popen([sys.executable, "-c", code])
    threads = [threading.Thread(target=write, args=(shapes[n::2],)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    (found,) = file.read()
    assert {shape.hidden for shape in found.timed} == set(range(1, 61))  # type: ignore[union-attr]
    assert sorted(p.name for p in cache.parent.iterdir()) == ["calibration.json", "calibration.lock"]


def test_a_writer_that_is_stopped_leaves_the_old_file(cache, monkeypatch):
    file.update(entry((LSTM, {"torch": 1.0})))
    before = cache.read_text()

    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        file.update(entry((HEADS, {"torch": 1.0})))
    assert cache.read_text() == before
    assert sorted(p.name for p in cache.parent.iterdir()) == ["calibration.json", "calibration.lock"]


def test_shapes_are_what_they_were_after_json():
    for device in ("cpu", "cuda"):
        for shape in [*grid.shapes(device, ("scan", "attention")), HEADS._replace(mask="b11k", left=3)]:
            assert from_values(shape.op, json.loads(json.dumps(list(shape)))) == shape


# --- the command ------------------------------------------------------------------------------------------------------


MODEL = """
import fastseq, torch
def run():
    fastseq.nn.GRU(4, 8)(torch.randn(3, 2, 4))
def fails():
    raise RuntimeError("no weights here")
def nothing():
    pass
"""


def command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastseq", "calibrate", *arguments], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join(sys.path)}, **more,
    )  # fmt: skip


@needs_native
def test_the_command_measures_a_model_shows_it_and_forgets_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MODEL)
    done = command("--device", "cpu", "--model", "mine:run", "--minutes", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gru float32 T3 B2 I4 H8 training" in done.stdout
    assert "self-tests [" in done.stderr
    assert "timing [########################] 1/1 gru float32 T3 B2 I4 H8 training" in done.stderr
    assert "Traceback" not in done.stderr
    assert main(["calibrate", "--show"]) == 0
    assert capsys.readouterr().out == done.stdout
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["calibrate", "--device", "cpu", "--model", "mine:run"]) == 0  # all is there
    assert capsys.readouterr().out == done.stdout
    assert main(["calibrate", "--forget"]) == 0
    assert capsys.readouterr().out.startswith("1 calibration removed")
    assert file.read() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "mine:fails"], "RuntimeError: no weights here"),
        (["--model", "mine:nothing"], "made no call that can be measured"),
        (["--model", "mine"], "--model must be MODULE:FUNCTION, got 'mine'"),
        (["--model", "mine:none"], "has no attribute 'none'"),
        (["--model", "elsewhere:run"], "No module named 'elsewhere'"),
        (["--device", "gpu"], "give cpu, cuda or cuda:1"),
        (["--device", "cuda:99"], "no kernel of ours exists for cuda:99, or it is not here"),
        (["--device", "meta"], "no kernel of ours exists for meta"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["calibrate", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "x", "inf"])
def test_minutes_must_be_a_number_above_zero(minutes):
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", "--minutes", minutes])


@needs_native
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_ends_the_command_and_its_child_and_keeps_what_was_made(tmp_path, cache):
    started = subprocess.Popen(
        [sys.executable, "-m", "fastseq", "calibrate", "--device", "cpu", "--minutes", "3"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    until = time.monotonic() + 120.0
    while time.monotonic() < until and not any(known_here.tests for known_here in file.read()):
        time.sleep(0.1)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    running = children.read_text().split() if children.exists() else []
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "Traceback" not in errors
    assert any(known_here.tests for known_here in file.read())
    assert not [pid for pid in running if Path(f"/proc/{pid}").exists()]


def test_the_bar_is_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    bar = Progress(True)
    bar.begin("timing", 4)
    for name in "abcd":
        bar.step(name)
    bar.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["timing [........................] 0/4", "timing [########################] 4/4 d"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress(True)
    bar.begin("timing", 2)
    bar.step("a")
    bar.end()
    written = capsys.readouterr().err
    assert written.count("\r") == 2
    assert written.endswith("\n")

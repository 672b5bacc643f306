"""Which backend runs: the order of overrides, AUTO and its log, reasons, explain."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from support import needs_native

import fastseq
from fastseq import backend, functional
from fastseq.backend import AUTO, NAMES


def weights():
    return [torch.randn(15, 3), torch.randn(15, 5), torch.randn(15), torch.randn(15)]


def runs_on(**kwargs) -> str:
    """The backend that a call would run on."""
    text = fastseq.explain(functional.gru, torch.randn(4, 2, 3), None, weights(), **kwargs)
    return text.splitlines()[0].removeprefix("scan on cpu runs on: ").split()[0]


def test_argument_beats_the_block_and_the_block_beats_auto():
    first = runs_on()
    with fastseq.use_backend("reference"):
        assert runs_on() == "reference"
        assert runs_on(backend="torch") == "torch"
        with fastseq.use_backend("torch"):
            assert runs_on() == "torch"
        with fastseq.use_backend("auto"):
            assert runs_on() == first
        assert runs_on() == "reference"
    assert runs_on() == first


@needs_native
def test_what_explain_says_is_what_runs():
    x, w = torch.randn(4, 2, 3), weights()
    seen = {}
    for name in ("reference", "torch", "native"):
        with torch.profiler.profile() as profile, fastseq.use_backend(name):
            functional.gru(x, None, w)
        seen[name] = {event.key for event in profile.key_averages()}
        assert ("fastseq::scan_forward" in seen[name]) == (name == "native")
        assert ("aten::gru" in seen[name]) == (name == "torch")
    assert runs_on() == "native"


def test_block_gives_the_choice_back_after_an_error():
    before = backend.forced()
    with pytest.raises(ZeroDivisionError), fastseq.use_backend("reference"):
        _ = 1 / 0
    assert backend.forced() == before


def run_with(value: str, code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "FASTSEQ_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_environment_names_a_backend():
    code = "import fastseq, torch; print(fastseq.explain(fastseq.nn.GRU(3, 5), torch.randn(4, 2, 3)))"
    assert "scan on cpu runs on: reference (named: reference)" in run_with("reference", code).stdout
    assert "AUTO" in run_with("auto", code).stdout
    assert "AUTO" in run_with("", code).stdout
    failed = run_with("fast", code)
    assert failed.returncode != 0
    assert "FASTSEQ_BACKEND: unknown backend 'fast'; choose one of reference, torch, native, triton" in failed.stderr


@needs_native
def test_every_backend_has_a_reason_or_runs():
    for name, reason in fastseq.backends().items():
        with fastseq.use_backend(name):
            if name == "triton" or reason is not None:
                with pytest.raises(fastseq.BackendError, match="cannot run this scan"):
                    fastseq.nn.GRU(3, 5)(torch.randn(4, 2, 3))
            else:
                assert fastseq.nn.GRU(3, 5)(torch.randn(4, 2, 3))[0].isfinite().all()


def test_triton_says_where_it_can_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = backend.operator_reason("triton", "cpu")
    if importlib.util.find_spec("triton") is not None:
        assert "run on a GPU; on the CPU only under Triton's interpreter" in reason
        assert backend.operator_reason("triton", "cuda") is None
        assert "not on mps" in backend.operator_reason("triton", "mps")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'triton" in backend.operator_reason("triton", "cuda")


def test_importing_the_package_imports_no_kernels():
    code = "import fastseq, sys; assert not any(name.startswith('fastseq.kernels') for name in sys.modules)"
    assert run_with("", code).returncode == 0


def test_auto_has_a_row_for_every_device_and_names_only_backends():
    for device in ("cpu", "cuda", "mps", "meta"):
        for op in ("scan", "scan_bf16_batch", "attention"):
            row = backend.auto_row(device, op)
            assert row.because
            assert set(row.order) <= set(NAMES)
            assert row.order[-1] == "reference"  # which can do everything
    assert not any("triton" in row.order for row in AUTO)  # no kernel enters AUTO before it has run on hardware


@needs_native
@pytest.mark.parametrize("amx", [True, False])
def test_auto_gives_large_bf16_batches_to_torch_where_it_has_amx(amx: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "BF16_ROWS", 64 if amx else sys.maxsize)

    def first_line(layer, x):
        with torch.no_grad():
            return fastseq.explain(layer, x).splitlines()[0]

    layers = {torch.bfloat16: fastseq.nn.LSTM(8, 16).bfloat16(), torch.float32: fastseq.nn.LSTM(8, 16)}
    for (dtype, steps), expected in {
        (torch.bfloat16, 50): "torch" if amx else "native",
        (torch.bfloat16, 1): "native",
        (torch.float32, 50): "native",
    }.items():
        assert f"runs on: {expected} " in first_line(layers[dtype], torch.randn(steps, 32, 8, dtype=dtype))
    assert "runs on: native " in first_line(fastseq.nn.GRU(8, 16).bfloat16(), torch.randn(50, 32, 8).bfloat16())
    reset = torch.zeros(50, 32, dtype=torch.bool)  # which torch has not
    text = fastseq.explain(layers[torch.bfloat16], torch.randn(50, 32, 8).bfloat16(), reset=reset)
    assert "runs on: native " in text.splitlines()[0]


def test_auto_logs_a_fallback_once(monkeypatch, caplog):
    monkeypatch.setattr(backend, "AUTO", (backend.Row("*", "scan", ("torch", "reference"), "for this test"),))
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend, "_NATIVE_FIRST", False)
    layer = fastseq.nn.GRU(3, 5, reset_after=False)
    with caplog.at_level(logging.INFO, "fastseq"):
        for _ in range(3):
            layer(torch.randn(4, 2, 3))
    assert len([r for r in caplog.records if "reset gate before" in r.getMessage()]) == 1


def test_explain_computes_nothing_and_names_every_backend():
    layer = fastseq.nn.GRU(3, 5, reset_after=False)
    x = torch.randn(4, 2, 3)
    text = fastseq.explain(layer, x)
    for name in NAMES:
        assert name in text
    assert "torch has no GRU with the reset gate before the product" in text
    with torch.no_grad():
        assert fastseq.explain(layer, x) == text
    assert layer(x)[0].shape == (4, 2, 5)  # and the layer is as it was
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
    assert fastseq.explain(model, x) == text
    assert "reaches no operation of fastseq" in fastseq.explain(torch.nn.Linear(3, 3), x)
    q = torch.randn(1, 2, 4, 8)
    assert fastseq.explain(fastseq.attention, q, q, q).startswith("attention on cpu runs on:")

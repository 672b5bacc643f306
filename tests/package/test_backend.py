"""Which backend runs: the order of overrides, AUTO and its log, reasons, explain."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field

import pytest
import torch
from support import needs_native
from torch._subclasses import FakeTensorMode

import fastseq
from fastseq import auto, backend, functional
from fastseq.auto import AUTO
from fastseq.backend import NAMES
from fastseq.ops import triton as ops_triton


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
        assert ("fastseq::layers_forward" in seen[name]) == (name == "native")
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


KINDS = ("", *(row.kind for row in AUTO if row.kind))


def test_auto_has_a_row_for_every_device_and_names_only_backends():
    for device in ("cpu", "cuda sm_90", "cuda sm_80", "cuda", "mps", "meta"):
        for op, kind in itertools.product(("scan", "attention"), KINDS):
            row = auto.row(device, op, kind)
            assert row.because
            assert row.kind in ("", kind)
            assert set(row.order) <= set(NAMES)
            assert row.order[-1] == "reference"  # which can do everything
    assert len({(row.device, row.op, row.kind) for row in AUTO}) == len(AUTO)


def test_a_gpu_without_a_row_of_its_own_takes_that_of_cuda_and_no_kernel_of_ours():
    for op, kind in itertools.product(("scan", "attention"), KINDS):
        row = auto.row("cuda sm_80", op, kind)
        assert (row.device, row.order) == ("cuda", ("torch", "reference"))
        assert "not yet run on such a GPU" in row.because


def test_a_device_is_known_by_the_compute_capability_it_has_and_asked_once(monkeypatch):
    asked: list[int] = []

    def tell(index: int) -> tuple[int, int]:
        asked.append(index)
        return (9, 0) if index == 1 else (8, 6)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", tell)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(auto, "capability", functools.cache(auto.capability.__wrapped__))
    keys = [auto.device_key(torch.device(name)) for name in 2 * ("cpu", "cuda", "cuda:0", "cuda:1", "cuda:7")]
    assert keys == 2 * ["cpu", "cuda sm_86", "cuda sm_86", "cuda sm_90", "cuda"]  # of the last there is none
    assert sorted(asked) == [0, 1]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    auto.capability.cache_clear()
    assert auto.device_key(torch.device("cuda:1")) == "cuda"  # an AMD GPU, which torch calls cuda too


def on_hopper(call, *shapes, dtype=torch.bfloat16, **options) -> str:
    """The first line of what explain() says of a call on a GPU of compute capability 9.0."""
    with FakeTensorMode(), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.nn asks for the addresses of the weights
        call = call(dtype) if isinstance(call, Layer) else call
        tensors = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
        return fastseq.explain(call, *tensors, **options).splitlines()[0]


@dataclass
class Layer:
    """A layer that is made on a GPU, where there need not be one."""

    name: str
    hidden: int
    layers: int = 1
    inputs: int | None = None
    more: dict = field(default_factory=dict)

    def __call__(self, dtype):
        return getattr(fastseq.nn, self.name)(
            self.inputs or self.hidden, self.hidden, self.layers, device="cuda", dtype=dtype, **self.more
        )


@pytest.fixture
def hopper(monkeypatch):
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA, and has not even tensors that only say they are on a GPU")
    monkeypatch.setattr(auto, "capability", lambda index: (9, 0))
    monkeypatch.setattr(backend, "operator_reason", lambda name, device, op="scan": None)
    monkeypatch.setattr(ops_triton, "attention_reason", lambda q, v: None)


HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("layer", "steps", "batch", "dtype", "kind"),
    [
        (Layer("LSTM", 512), 128, 16, torch.bfloat16, ""),
        (Layer("LSTM", 512), 1, 16, HALF, auto.ONE_STEP),
        (Layer("LSTM", 512), 128, 16, HALF, auto.ON_CHIP),
        (Layer("LSTM", 512), 128, 17, HALF, ""),  # 8 does not divide the batch
        (Layer("LSTM", 512), 128, 256, HALF, ""),
        (Layer("LSTM", 500), 128, 16, HALF, ""),
        (Layer("LSTM", 512, inputs=40), 128, 16, HALF, ""),
        (Layer("LSTM", 512, 2), 128, 16, HALF, ""),
        (Layer("GRU", 512), 128, 16, HALF, ""),
        (Layer("GRU", 128, 2), 128, 17, HALF, auto.ON_CHIP),
        (Layer("GRU", 128, more={"reset_after": False}), 128, 17, HALF, ""),
        (Layer("RNN", 384), 128, 17, HALF, auto.ON_CHIP),
        (Layer("LSTM", 512), 128, 16, SINGLE, auto.LONE_FP32),
        (Layer("LSTM", 200), 128, 16, SINGLE, auto.LONE_FP32),
        (Layer("LSTM", 512, 2), 128, 16, SINGLE, ""),
        (Layer("LSTM", 128, 2), 128, 16, SINGLE, auto.ON_CHIP),
        (Layer("LSTM", 128), 128, 16, torch.bfloat16, ""),
        (Layer("LSTM", 512, more={"bidirectional": True}), 128, 16, SINGLE, ""),
    ],
    ids=str,
)
def test_hopper_has_kinds_of_scans(layer, steps, batch, dtype, kind):
    said = on_hopper(layer, (steps, batch, layer.inputs or layer.hidden), dtype=dtype)
    row = auto.row(auto.HOPPER, "scan", kind)
    assert said == f"scan on cuda sm_90 runs on: {row.order[0]} (AUTO for {row.title}: {row.because})"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("more", [{"recurrent_dropout": 0.1}, {"zoneout": 0.1}, {"norm": "layer"}], ids=str)
def test_kernels_with_options_that_have_not_run_on_hopper_are_not_taken_by_themselves(more):
    layer = Layer("LSTM", 512, more=more)
    assert on_hopper(layer, (128, 17, 512)).startswith(
        f"scan on cuda sm_90 runs on: reference (AUTO for cuda sm_90, scan, {auto.OPTIONS}: "
    )
    with fastseq.use_backend("triton"):
        assert on_hopper(layer, (128, 17, 512)).startswith("scan on cuda sm_90 runs on: triton")


def test_packed_sequences_are_of_no_kind_in_which_torch_is_ahead():
    for dtype, packed in itertools.product((HALF, SINGLE), (False, True)):
        kind = auto.scan_kind(auto.HOPPER, "lstm", dtype, 128, 16, 512, 512, 1, packed)
        assert (kind == "") == packed


@pytest.mark.usefixtures("hopper")
def test_what_torch_cannot_do_goes_on_to_a_kernel_of_ours_on_hopper():
    said = on_hopper(Layer("LSTM", 128), (128, 16, 128), dtype=HALF, return_all_states=True)
    assert f"runs on: native (AUTO for cuda sm_90, scan, {auto.ON_CHIP}: " in said


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("queries", "keys", "options", "kind"),
    [
        (2048, 2048, {}, ""),
        (2048, 2048, {"causal": True}, ""),
        (200, 200, {}, auto.SHORT),
        (1, 2048, {}, auto.DECODING),
        (1, 200, {}, auto.DECODING),
        (2048, 2048, {"window": (128, 0)}, auto.LIMITS),
        (2048, 2048, {"dropout_p": 0.1}, auto.UNTIMED),
        (2048, 2048, {"dropout_p": 0.1, "window": (128, 0)}, auto.UNTIMED),
    ],
    ids=str,
)
def test_hopper_has_kinds_of_attention(queries, keys, options, kind):
    said = on_hopper(fastseq.attention, (2, 8, queries, 64), (2, 2, keys, 64), (2, 2, keys, 64), **options)
    row = auto.row(auto.HOPPER, "attention", kind)
    assert said == f"attention on cuda sm_90 runs on: {row.order[0]} (AUTO for {row.title}: {row.because})"


@pytest.mark.usefixtures("hopper")
def test_attention_that_torch_does_not_know_or_is_trained_or_wide_on_hopper():
    shapes = ((2, 8, 2048, 64),) * 3
    assert "scan" not in on_hopper(fastseq.attention, *shapes)
    assert f"AUTO for cuda sm_90, attention, {auto.UNTIMED}" in on_hopper(fastseq.attention, *shapes, dtype=SINGLE)
    assert "runs on: triton " in on_hopper(fastseq.attention, *shapes, dtype=SINGLE, softcap=9.0)
    short = ((2, 8, 200, 64),) * 3
    assert "runs on: native " in on_hopper(fastseq.attention, *short, softcap=9.0)
    assert "native" not in on_hopper(fastseq.attention, *((2, 8, 2048, 264),) * 3)


@pytest.mark.usefixtures("hopper")
def test_a_wanted_gradient_is_a_kind_of_attention():
    with FakeTensorMode():
        q = torch.empty(2, 8, 2048, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        trained = fastseq.explain(lambda: fastseq.attention(q, q @ weight, q))
        assert f"AUTO for cuda sm_90, attention, {auto.TRAINING}: " in trained
        with torch.no_grad():
            assert "AUTO for cuda sm_90, attention: " in fastseq.explain(lambda: fastseq.attention(q, q @ weight, q))


@needs_native
@pytest.mark.parametrize("first", ["native", "torch"])
def test_the_way_back_runs_where_the_way_there_did(first, monkeypatch):
    monkeypatch.setattr(backend, "_NATIVE_FIRST", {"scan": False, "attention": False})
    x = torch.randn(4, 2, 8, 8, requires_grad=True)
    w = [torch.randn(24, 8), torch.randn(24, 8)]
    for op, call, gradient in (
        ("scan", lambda: functional.gru(x[0], None, w, has_biases=False)[0], "fastseq::layers_backward"),
        ("attention", lambda: fastseq.attention(x, x, x), "fastseq::attention_backward"),
    ):
        monkeypatch.setattr(auto, "AUTO", (auto.Row("*", op, "", (first, "reference"), "for this test"),))
        y = call()
        monkeypatch.setattr(auto, "AUTO", ())
        with torch.profiler.profile() as profile:
            y.sum().backward()
        assert (gradient in {event.key for event in profile.key_averages()}) == (first == "native")


def test_open_sizes_are_not_specialised_by_the_choice(monkeypatch):
    """A batch that torch.compile leaves open is of the kind that any batch is of."""
    monkeypatch.setattr(auto, "capability", lambda index: (9, 0))
    seen: list[str] = []

    def ask(x):
        device = auto.device_key(torch.device("cuda", 0))
        kind = auto.scan_kind(device, "lstm", HALF, x.shape[0], x.shape[1], 512, 512, 1, False)
        return x + {auto.ON_CHIP: 1, "": 2}[kind]

    def counted(graph, _):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(ask, backend=counted, fullgraph=True, dynamic=True)
    for batch in (16, 17, 24):
        assert bool((compiled(torch.zeros(5, batch)) == 2).all())
    assert len(seen) == 1
    assert bool((ask(torch.zeros(5, 16)) == 1).all())


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 50])
def test_scans_of_every_dtype_and_length_run_natively_on_the_cpu(dtype: torch.dtype, steps: int):
    with torch.no_grad():
        text = fastseq.explain(fastseq.nn.LSTM(8, 16).to(dtype), torch.randn(steps, 32, 8, dtype=dtype))
    assert "runs on: native " in text.splitlines()[0]


def test_auto_logs_a_fallback_once(monkeypatch, caplog):
    monkeypatch.setattr(auto, "AUTO", (auto.Row("*", "scan", "", ("torch", "reference"), "for this test"),))
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setitem(backend._NATIVE_FIRST, "scan", False)
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

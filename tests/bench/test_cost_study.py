"""The measurement of what length costs: who is measured, that work is equal, and where curves cross."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch

import bench.studies.cost
from bench import peak
from bench.__main__ import main
from bench.studies import findings
from bench.studies.cost import KINDS, MODES, RECURRENT, SHORT, WHOLE, Protocol, make

CPU = torch.device("cpu")
TINY = Protocol("cpu, 1 threads", width=16, heads=2, lengths=(16, 32), memory_lengths=(16, 64), min_time=0.001)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_does_what_its_mode_says(kind, mode):
    found = make(kind, mode, WHOLE, 32, TINY, CPU)()
    assert found.shape == (1, 32, 16)
    assert found.isfinite().all()
    assert not found.requires_grad
    if mode == "training":
        assert found.ne(0).any(-1).all(), "each step's input has a gradient"


@pytest.mark.parametrize("kind", RECURRENT)
def test_short_sequences_hold_as_many_steps(kind):
    assert make(kind, "forward", SHORT, 64, TINY, CPU)().shape == (4, 16, 16)


def test_attention_is_causal():
    layer = bench.studies.cost.CausalAttention(16, 2)
    x = torch.randn(1, 5, 16)
    changed = torch.cat([x[:, :-1], torch.randn(1, 1, 16)], 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0][:, :-1], layer(changed)[0][:, :-1])


def test_memory_is_what_a_call_takes():
    if not peak.CLEAR_REFS.exists():
        pytest.skip("the system does not tell the peak of resident memory")
    found = peak.in_a_process(peak.peak_of, functools.partial(torch.ones, 16 << 20, dtype=torch.uint8), CPU)
    assert 15 << 20 < found < 24 << 20


def test_a_quick_run_has_every_contestant_and_goes_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.studies.cost, "quick", lambda device: dataclasses.replace(TINY, device=device))
    monkeypatch.setattr(bench.studies.cost.peak, "in_a_process", lambda *_: {16: 1000, 64: 4000})
    path = tmp_path / "cost.json"
    arguments = ["cost", "--quick", "--device", "cpu", "--threads", "1", "--json", str(path)]
    assert main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["complete"]
    for mode in MODES:
        for kind in KINDS:
            assert list(findings.times(document, mode, kind, WHOLE)) == [16, 32]
            assert bool(findings.times(document, mode, kind, SHORT)) == (kind in RECURRENT)
            assert findings.peaks(document, mode, kind) == {16: 1000, 64: 4000}
    before = path.read_text()
    assert main(arguments) == 0
    assert path.read_text() == before
    assert main([*arguments, "--threads", "2"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_memory_is_measured_in_a_process_of_its_own():
    if not peak.CLEAR_REFS.exists():
        pytest.skip("the system does not tell the peak of resident memory")
    protocol = dataclasses.replace(TINY, width=64, memory_lengths=(16, 4096))
    found = peak.in_a_process(bench.studies.cost.peaks, "lstm", "training", protocol, CPU, 1)
    assert list(found) == [16, 4096]
    gates = 4096 * 4 * 64 * 4
    assert found[4096] > gates, "the gates that the backward pass needs"


def test_one_curve_overtakes_another_where_it_stays_above():
    assert findings.overtakes({1: 1.0, 2: 5.0, 4: 5.0}, {1: 2.0, 2: 2.0, 4: 2.0}) == 2
    assert findings.overtakes({1: 3.0, 2: 1.0, 4: 5.0}, {1: 2.0, 2: 2.0, 4: 2.0}) == 4
    assert findings.overtakes({1: 3.0, 2: 1.0}, {1: 2.0, 2: 2.0}) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threads", "0"], "positive"),
        (["--device", "warp"], "--device warp"),
        (["--json", "/no/where/x.json"], "folder"),
    ],
)
def test_bad_options_are_refused(options, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["cost", *options])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err

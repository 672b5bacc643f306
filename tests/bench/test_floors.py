"""The floor model of the Triton recurrent kernels."""

from __future__ import annotations

import itertools

import pytest

from bench.gpu import cases as gpu_cases
from bench.studies import model, model_attention


def test_more_work_never_takes_less() -> None:
    for cell in ("lstm", "gru"):
        for hidden in (64, 128, 512, 1024):
            floors = [model.floor(cell, "bf16", batch, hidden) for batch in (1, 64, 256, 4096)]
            assert all(a.step <= b.step for a, b in itertools.pairwise(floors))
            wide = model.floor(cell, "fp32", 64, hidden)
            assert wide.weights >= floors[1].weights


def test_a_step_streams_w_hh_from_l2_at_its_speed() -> None:
    floor = model.floor("lstm", "bf16", 64, 4096)
    assert floor.role == "step"
    assert floor.weights == pytest.approx(4 * 4096 * 4096 * 2 / model.H200.l2)


def test_the_table_has_a_line_for_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--batch", "1", "--hidden", "64", "1024"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + (len(model.tuning.GATES) - 1) * 2  # rnn_relu is as rnn_tanh
    assert "sequence" in lines[3]
    assert lines[3].endswith("0.0")
    assert "step" in lines[4]
    assert float(lines[4].split()[-1]) == pytest.approx(1e6 * model.H200.host, abs=0.05)


def test_waiting_for_each_other_takes_less_than_another_launch(capsys: pytest.CaptureFixture[str]) -> None:
    for cell in ("lstm", "gru_reset_before"):
        for batch, hidden in ((1, 256), (16, 512), (64, 1024)):
            step, persistent = (model.floor(cell, "bf16", batch, hidden, role=r) for r in ("step", "persistent"))
            assert step is not None
            assert persistent is not None
            assert persistent.synchronisation < step.synchronisation
    assert model.floor("lstm", "bf16", 16, 512, role="sequence") is None
    assert model.floor("lstm", "bf16", 4096, 8192, role="persistent") is None
    assert model.main(["--batch", "1", "--hidden", "512", "--role", "persistent"]) == 0
    assert capsys.readouterr().out.count("persistent") == len(model.tuning.GATES) - 1


def test_the_host_holds_nothing_up_that_another_role_cannot_take() -> None:
    """As the design notes say: on an H200 the persistent role can have every layer whose steps take less than their
    launches, but those of large batches, whose steps take at least half as long."""
    for cell, dtype, batch, hidden in itertools.product(
        ("rnn_tanh", "lstm", "gru", "gru_reset_before"), ("bf16", "fp32"), (1, 16, 17, 64, 128, 512, 2048),
        (64, 128, 192, 256, 512, 768, 1024, 2048, 4096),
    ):  # fmt: skip
        floor = model.floor(cell, dtype, batch, hidden)
        assert floor is not None
        if floor.host > floor.step and model.floor(cell, dtype, batch, hidden, role="persistent") is None:
            assert batch * hidden > 132 * 16 * 16, (cell, dtype, batch, hidden)
            assert floor.step > floor.host / 2, (cell, dtype, batch, hidden, floor.step, floor.host)


def test_attention_is_bound_by_products_when_long_and_by_bytes_when_decoding() -> None:
    long = gpu_cases.dense("forward", "bfloat16", 8192, 128, False)
    floor = model_attention.floor(long)
    assert floor.bound == "products"
    assert long.operations / floor.seconds == pytest.approx(model_attention.H200.product)
    causal = model_attention.floor(gpu_cases.dense("forward", "bfloat16", 8192, 128, True))
    assert causal.seconds == pytest.approx(floor.seconds / 2, rel=1e-3)
    decoding = gpu_cases.decode("bfloat16", 16, 65536, 128)
    assert model_attention.floor(decoding).bound == "bytes"
    cache = 2 * 16 * 8 * 65536 * 128 * 2
    assert model_attention.floor(decoding).seconds == pytest.approx(cache / model_attention.H200.copy, rel=1e-3)


def test_attention_has_a_line_for_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--attention", "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(gpu_cases.plan("attention")) + 2


def test_without_options_attention_follows_the_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main([]) == 0
    steps, attention = capsys.readouterr().out.split("\n\n")
    assert "lstm" in steps
    assert len(attention.splitlines()) == len(set(gpu_cases.attention_core())) + 2
    assert all(word in attention for word in ("products", "exp", "bytes", "attention_decode", "-backward-"))

"""The benchmark's cases of the layer MultiheadAttention: their truth, who takes part, and the rows they get."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import fastseq
from bench import cases, check, peers, readme, report, run, speed_figures
from bench.run import Entry, Options, Result, Timing

RESULTS = Path(report.__file__).parent / "results"
OPTIONS = [(), ("weights",), ("causal",), ("padded",), ("weights", "causal"), ("weights", "causal", "padded")]
MODES = ("inference", "training")

options = pytest.mark.parametrize("on", OPTIONS, ids=" ".join)
modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small(mode, on=(), dtype="float32"):
    return cases.Multihead(mode, dtype, 3, 7, 12, 4, **dict.fromkeys(on, True))


def checked(case, *contestants):
    return run.measure(case, [peers.OURS, *contestants], Options(threads=2), clock=False)


def by_hand(case, inputs):
    """softmax(q kᵀ/√D) v and what autograd makes of it, in float64; a head has D = E / heads neighbouring features."""
    leaves = {name: w.double().requires_grad_() for name, w in inputs.state.items()}
    x = inputs.x.double().requires_grad_()
    split = (x @ leaves["in_proj_weight"].T + leaves["in_proj_bias"]).chunk(3, -1)
    q, k, v = (part.reshape(case.batch, case.steps, case.heads, -1).transpose(1, 2) for part in split)
    scores = q @ k.transpose(2, 3) / (case.embed / case.heads) ** 0.5  # [B,H,T,T]
    for b in range(case.batch):
        for i in range(case.steps):
            for j in range(case.steps):
                if (case.causal and j > i) or (case.padded and j >= inputs.lengths[b]):
                    scores[b, :, i, j] = -torch.inf
    p = scores.softmax(-1)
    o = (p @ v).transpose(1, 2).reshape(case.batch, case.steps, case.embed)
    y = o @ leaves["out_proj.weight"].T + leaves["out_proj.bias"]
    answer = {"y": y} | ({"weights": p.mean(1)} if case.weights else {})
    if case.training:
        y.backward(inputs.dy.double())
        answer |= {"d_x": x.grad} | {f"d_{name}": w.grad for name, w in leaves.items()}
    return {name: tensor.detach() for name, tensor in answer.items()}


def test_the_grid_is_there_in_both_modes_and_every_type():
    names = set(cases.registry())
    shapes = ["B1-T1-E64-H4", "B1-T1-E512-H8", "B1-T16-E256-H8", "B8-T50-E512-H8", "B4-T200-E512-H8",
              "B1-T1024-E512-H8", "B8-T50-E512-H8-weights", "B4-T200-E512-H8-causal",
              "B4-T200-E512-H8-padded"]  # fmt: skip
    for mode in MODES:
        expected = {f"multihead-{mode}-{shape}" for shape in shapes}
        assert {case.name for case in cases.select([f"multihead-{mode}"])} == expected  # by default float32 only
        assert {f"{name}-{short}" for name in expected for short in ("bf16", "fp16")} <= names


@modes
@options
def test_the_truth_is_the_formula(mode, on):
    case = small(mode, on)
    inputs = cases.make_inputs(case)
    truth = check.standard(case, inputs, torch.float64)
    expected = by_hand(case, inputs)
    assert truth.keys() == expected.keys()
    assert max(check.errors(truth, expected).values()) < 1e-14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@modes
@options
def test_every_contestant_passes_its_check(mode, on, dtype):
    result = checked(small(mode, on, dtype), peers.PEERS["torch"], peers.PEERS["ort"])
    assert result.failed == [], [result.entries[who].reason for who in result.failed]
    assert [result.entries[who].status for who in ("fastseq", "torch")] == ["checked", "checked"]
    assert result.entries["fastseq"].backend in fastseq.backends()
    assert result.entries["ort"].status == "unavailable"
    assert result.entries["ort"].reason


@pytest.mark.parametrize(
    ("on", "changed"),
    [((), {"is_causal": True}), (("causal",), {"is_causal": False, "attn_mask": None}),
     (("padded",), {"key_padding_mask": None}), (("weights",), {"need_weights": False}),
     (("weights",), {"average_attn_weights": False})],
)  # fmt: skip
@modes
def test_a_layer_that_overlooks_an_option_is_refused(mode, on, changed, monkeypatch):
    right = fastseq.nn.MultiheadAttention.forward

    def overlooking(self, *args, **kwargs):
        return right(self, *args, **kwargs | changed)

    monkeypatch.setattr(fastseq.nn.MultiheadAttention, "forward", overlooking)
    assert checked(small(mode, on)).failed == ["fastseq"]


@modes
def test_torch_runs_with_its_fast_path_and_without(mode, monkeypatch):
    taken = []
    fused = torch._native_multi_head_attention
    monkeypatch.setattr(torch, "_native_multi_head_attention", lambda *args: taken.append(1) or fused(*args))
    found = {}
    case = small(mode)
    with torch.set_grad_enabled(case.training):
        for entrant in peers.torch_entrants(case, cases.make_inputs(case), 1):
            taken.clear()
            entrant.call()
            found[entrant.setting] = bool(taken)
    assert found == ({"": False} if case.training else {"fast path": True, "no fast path": False})


def test_weights_are_made_as_a_model_has_them_and_read_in_inference_mode():
    """Torch takes other ways with weights that were made in inference mode, which no user's are."""
    seen = []

    def prepare(case, inputs, threads):
        layer = peers.build_multihead(torch.nn, case, inputs.state, case.torch_dtype)

        def call():
            seen.append((layer.in_proj_weight.is_inference(), torch.is_inference_mode_enabled()))
            return layer(inputs.x, inputs.x, inputs.x, need_weights=False)

        yield peers.Entrant(call, lambda answer: {"y": answer[0]})

    assert checked(small("inference"), peers.Contestant("other", "other", prepare)).failed == []
    assert seen == [(False, True)]


def test_the_inputs_hold_what_the_options_speak_of():
    case = small("training", ("padded",))
    inputs = cases.make_inputs(case)
    assert inputs.lengths[0] == case.steps
    assert (inputs.lengths >= case.steps // 4).all()
    assert (inputs.lengths < case.steps).any()
    assert all(weight.abs().min() > 0 for weight in inputs.state.values())
    assert cases.make_inputs(small("inference")).lengths is None


def test_memory_is_warmed_up_on_the_same_options():
    case = cases.registry()["multihead-training-B4-T200-E512-H8-causal"]
    assert run.miniature(case) == dataclasses.replace(case, batch=1, steps=32)


# --- rows -----------------------------------------------------------------------------------------------------------


def made_up(name):
    """A result in which torch takes twice our time."""
    entries = {
        who: Entry("timed", timings={"": Timing(1, [median] * 2)}, backend=backend)
        for who, median, backend in (("fastseq", 1e-3, "native"), ("torch", 2e-3, None))
    }
    return Result(cases.registry()[name], {}, entries)


def document_of(results):
    environment = {"cpu": "a chip", "instruction_set": "avx2", "threads": 2, "date": "2026-01-02", "commit": "abc",
                   "versions": {"torch": "2.11", "onnxruntime": "1.2"}}  # fmt: skip
    return report.document([report.case_document(r) for r in results], Options(threads=2), True, environment)


def test_each_mode_has_a_row_and_each_option_one_that_is_folded():
    document = document_of([made_up(case.name) for case in cases.select(["multihead-*"])])
    shown, folded = readme.section(document, "x.json").split("<details>")
    for mode in MODES:
        assert f"| multihead {mode} fp32 | 9 | 2.00× | 2.00× `multihead-{mode}-B1-T1-E64-H4` | 2.00× |" in shown
        for group, count in (("plain", 6), ("weights", 1), ("causal", 1), ("padded", 1)):
            assert f"| multihead {group} {mode} fp32 | {count} | 2.00× |" in folded
    assert shown.count("| multihead ") == 2
    assert folded.count("| multihead ") == 8
    assert speed_figures.shorten("multihead-training-B4-T200-E512-H8-causal") == "B4 T200 E512 H8 causal"
    assert [exhibit.title for exhibit in speed_figures.ratios(document, "x.json")] == [
        "multihead inference fp32", "multihead training fp32"
    ]  # fmt: skip


def test_the_layer_counts_as_attention_where_kernels_are_listed():
    (case,) = document_of([made_up("multihead-training-B1-T16-E256-H8")])["cases"]
    assert speed_figures._subject(case) == "attention"


@pytest.mark.parametrize("name", ["cpu-full.json", "cpu-quick.json"])
def test_a_file_without_these_cases_has_no_row_of_them(name):
    document = json.loads((RESULTS / name).read_text())
    document["cases"] = [case for case in document["cases"] if not case["name"].startswith("multihead")]
    document["summary"] = [line for line in document["summary"] if not line["of"].startswith("multihead")]
    assert "| multihead" not in readme.section(document, name)
    titles = [exhibit.title for exhibit in speed_figures.ratios(document, name)]
    assert "attention forward fp32" in titles
    assert not any("multihead" in title for title in titles)

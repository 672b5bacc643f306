"""The benchmark: what it promises about its own numbers. Nothing here looks at how fast anything is."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import math

import pytest
import torch

import fastseq
from bench import cases, check, formats, peak, peers, report, run, session
from bench.__main__ import COMMANDS, main
from bench.run import Entry, Options, Result, Timing

CHECK_ONLY = Options(threads=2)
SMALL = "rnn-inference-T1-B1-I64-H64"
PRESENT = [peer for peer in peers.PEERS.values() if peer.missing() is None]

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="ONNX Runtime is not installed",
)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def result_of(name, times, **entry):
    """A result of made-up medians in seconds; None for a contestant that could not run."""
    entries = {
        who: Entry("timed", timings={"": Timing(1, [median] * 2)}, **entry) if median else Entry(reason="not made")
        for who, median in times.items()
    }
    return Result(cases.registry()[name], {}, entries)


# --- the registry ---------------------------------------------------------------------------------------------------


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in cases._all()]
    assert len(names) == len(set(names))
    assert len(set(cases._all())) == len(names)


def test_the_published_grids_are_all_there():
    names = set(cases.registry())
    for cell in ("rnn", "gru", "lstm", "gru_reset_before"):
        for mode in ("inference", "training"):
            assert {f"{cell}-{mode}-T{t}-B{b}-I{i}-H{h}" for t, b, i, h in cases.RECURRENT_GRID} <= names
    assert {"lstm-step-H64", "gru_cell-step-H512", "attention_decode-forward-B1-H1-Tk65536-D64"} <= names
    assert "attention-training-B1-H8-T4096-D64-causal-bf16" in names


def test_a_pattern_is_a_substring_or_a_glob():
    def chosen(*patterns, **how):
        return [case.name for case in cases.select(patterns, **how)]

    assert chosen("lstm-step-H64") == ["lstm-step-H64"]
    assert chosen("lstm-step") == [f"lstm-step-H{hidden}" for hidden in cases.STEP_HIDDEN]
    assert chosen("*step-H64") == [f"{cell}-step-H64" for cell in ("gru", "gru_cell", "lstm", "lstm_cell")]
    assert set(chosen("lstm-step", "gru-step")) == set(chosen("lstm-step")) | set(chosen("gru-step"))
    assert chosen("lstm-step-H64-bf16") == ["lstm-step-H64-bf16"]  # not a default case, but asked for
    assert chosen("lstm-step-H64", dtypes=["float16"]) == ["lstm-step-H64-fp16"]
    assert set(chosen(quick=True)) == cases.QUICK


def test_a_case_is_the_same_numbers_each_time_and_not_those_of_another():
    first, again, other = (
        cases.make_inputs(cases.registry()[name]) for name in ("gru-step-H64", "gru-step-H64", "gru_cell-step-H64")
    )
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.state["weight_hh_l0"], again.state["weight_hh_l0"])
    assert not torch.equal(first.x[0], other.x)


# --- truth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cases.QUICK))
def test_every_quick_case_passes_its_check(name):
    result = run.measure(cases.registry()[name], [peers.OURS, *PRESENT], CHECK_ONLY, clock=False)
    assert result.failed == [], [result.entries[who].reason for who in result.failed]
    assert result.entries["fastseq"].status == "checked"
    assert result.entries["fastseq"].backend in fastseq.backends()


def test_a_stack_passes_its_check_in_every_layer_and_direction():
    case = cases.Recurrent("training", "float32", "lstm", 9, 3, 5, 17, layers=2, directions=2)
    result = run.measure(case, [peers.OURS, peers.PEERS["torch"]], CHECK_ONLY, clock=False)
    assert result.failed == [], [result.entries[who].reason for who in result.failed]
    judge = check.Judge.of(case, cases.make_inputs(case))
    assert {"d_weight_hh_l1_reverse", "d_weight_ih_l0", "d_x", "h_n", "c_n"} <= judge.budget.keys()


@needs_onnx
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "lstm", "rnn"])
def test_onnx_runtime_agrees_with_our_float64_reference(cell):
    case = cases.Recurrent("inference", "float32", cell, 9, 3, 5, 17)
    inputs = cases.make_inputs(case)
    with fastseq.use_backend("reference"), torch.no_grad():
        wide = check.cast(inputs, torch.float64)
        reference = peers.layer_entrant(case, peers.build_layer(fastseq.nn, case, inputs.state, torch.float64), wide)
        truth = reference.outputs(reference.call())
    assert truth["y"].dtype == torch.float64
    for entrant in peers.onnx_entrants(case, inputs, threads=1):
        assert max(check.errors(entrant.outputs(entrant.call()), truth).values()) < 1e-6
    standard = check.standard(case, inputs, torch.float64)  # what the bench itself holds for true
    assert max(check.errors(standard, truth).values()) < 1e-14


@needs_onnx
def test_the_two_forms_of_gru_differ():
    """Else the test above would prove nothing."""
    after, before = (cases.Recurrent("inference", "float32", c, 9, 3, 5, 17) for c in ("gru", "gru_reset_before"))
    inputs = cases.make_inputs(after)
    truth = check.standard(before, inputs, torch.float64)
    assert min(check.errors(check.standard(after, inputs, torch.float64), truth).values()) > 1e-3


def test_an_error_that_is_missing_misshapen_or_not_finite_is_infinite():
    truth = {"y": torch.ones(2, 3, dtype=torch.float64)}
    assert check.errors({"y": torch.full((2, 3), 1.5)}, truth) == {"y": 0.5}
    for wrong in ({}, {"y": torch.ones(3, 2)}, {"y": torch.full((2, 3), math.nan)}):
        assert check.errors(wrong, truth) == {"y": math.inf}
        assert "y is off" in check.Judge(truth, {"y": 1.0}).fault(check.errors(wrong, truth))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_wrong_kernel_is_refused_and_its_time_not_told(mode, monkeypatch, tmp_path, capsys):
    right = fastseq.nn.LSTM.forward

    def slightly_wrong(self, *args, **kwargs):
        y, state = right(self, *args, **kwargs)
        return y * 1.0001, state

    monkeypatch.setattr(fastseq.nn.LSTM, "forward", slightly_wrong)
    path = tmp_path / "out.json"
    name = f"lstm-{mode}-T1-B1-I64-H64"
    assert main(["--case", name, "--peer", "torch", "--min-time", "0.001", "--json", str(path)]) == 1
    (case,) = json.loads(path.read_text())["cases"]
    ours, theirs = case["contestants"]["fastseq"], case["contestants"]["torch"]
    assert ours["status"] == "refused"
    assert "median_us" not in ours
    assert theirs["median_us"] > 0
    assert case["ratios"] == {"torch": None, "best": None}
    printed = capsys.readouterr().out
    assert f"refused: fastseq on {name}" in printed
    assert "×" not in printed


def test_a_contestant_that_raises_is_refused_and_the_others_are_measured(monkeypatch):
    def broken(case, inputs, threads):
        raise RuntimeError("no such luck")
        yield

    contestants = [peers.OURS, peers.Contestant("broken", "broken", broken)]
    result = run.measure(cases.registry()[SMALL], contestants, Options(threads=1, min_time=0.001))
    assert result.failed == ["broken"]
    assert result.entries["broken"].reason == "RuntimeError: no such luck"
    assert result.entries["fastseq"].timing is not None


def test_a_contestant_timed_alone_that_fails_later_is_refused_and_not_asked_again():
    asked = []

    def failing_later(case, inputs, threads):
        asked.append(case)
        if len(asked) == 2:
            raise RuntimeError("no longer")
        return peers.OURS.prepare(case, inputs, threads)

    contestants = [peers.OURS, peers.Contestant("late", "late", failing_later, alone=True)]
    options = Options(threads=1, min_time=0.001, pause=0.0)
    result = run.measure(cases.registry()[SMALL], contestants, options)
    assert len(asked) == 2 < run.PASSES
    assert result.failed == ["late"]
    assert result.entries["late"].timing is None
    assert result.entries["fastseq"].timing is not None


# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_ratio_is_the_peers_time_over_ours():
    result = result_of(SMALL, {"fastseq": 2e-6, "torch": 6e-6, "ort": 3e-6, "other": None})
    assert result.ratio("torch") == pytest.approx(3.0)
    assert result.ratio("ort") == pytest.approx(1.5)
    assert result.ratio("other") is None
    assert result.ratio("best") == pytest.approx(1.5)  # the fastest peer, not the kindest
    assert result_of(SMALL, {"fastseq": 2e-6}).ratio("best") is None


def test_the_fastest_setting_stands_for_a_contestant():
    entry = Entry("timed", timings={"padded": Timing(1, [3.0]), "loop": Timing(2, [4.0])})
    assert (entry.setting, entry.timing.median) == ("loop", 2.0)


def test_a_summary_is_geometric_and_names_the_worst():
    results = [
        result_of("rnn-inference-T1-B1-I64-H64", {"fastseq": 1.0, "torch": 4.0, "ort": 2.0}),
        result_of("rnn-inference-T1-B1-I128-H128", {"fastseq": 1.0, "torch": 1.0, "ort": 8.0}),
        result_of("gru-inference-T1-B1-I64-H64", {"fastseq": 1.0, "torch": 2.0, "ort": None}),
    ]
    found = {(line["of"], line["peer"]): line for line in report.summarize([report.case_document(r) for r in results])}
    assert found["rnn inference fp32", "torch"]["geomean"] == pytest.approx(2.0)
    assert found["rnn inference fp32", "ort"]["geomean"] == pytest.approx(4.0)
    assert found["rnn inference fp32", "best"]["geomean"] == pytest.approx(2**0.5)
    assert found["rnn inference fp32", "best"]["worst_case"] == "rnn-inference-T1-B1-I128-H128"
    assert found["recurrent inference fp32", "torch"]["geomean"] == pytest.approx(2.0)
    assert found["recurrent inference fp32", "ort"]["count"] == 2


def test_median_interquartile_range_and_least():
    blocks = [7 * seconds for seconds in (5.0, 1.0, 2.0, 4.0, 3.0)]  # of 7 calls each
    found = report.entry_document(Entry("timed", timings={"": Timing(7, blocks)}))
    assert [found[name] for name in ("median_us", "iqr_us", "least_us")] == pytest.approx([3e6, 2e6, 1e6])
    assert (found["rounds"], found["inner"]) == (5, 7)


def test_a_case_is_noisy_if_the_rounds_of_a_contestant_spread():
    for spread, noisy in ((0.05, False), (0.1, True)):
        entry = Entry("timed", timings={"": Timing(1, [1 - spread, 1 - spread, 1, 1 + spread, 1 + spread])})
        assert Result(cases.registry()[SMALL], {}, {"torch": entry}).noisy == noisy


def test_contestants_take_turns_in_an_order_that_moves_on():
    order = []
    timings = run.time_in_turns([lambda: order.append(0), lambda: order.append(1)], 1e-6)
    assert [len(timing.times) >= 3 for timing in timings] == [True, True]
    turns = set(itertools.pairwise(order))
    assert (0, 1) in turns
    assert (1, 0) in turns


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.234e-6, "1.23 µs"), (45.67e-6, "45.7 µs"), (9.999e-6, "10.0 µs"), (789e-6, "789 µs"), (0.9996e-3, "1.00 ms"),
     (0.024, "24.0 ms"), (12.3, "12.3 s")],
)  # fmt: skip
def test_durations_are_told_in_three_digits(seconds, text):
    assert formats.duration(seconds) == text


# --- what comes out -------------------------------------------------------------------------------------------------


def test_the_document_says_what_ran_where_and_how(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--case", SMALL, "--threads", "1", "--min-time", "0.001", "--peer", "torch"]
    assert main([*arguments, "--json", str(path), "--backend", "reference"]) == 0
    data = json.loads(path.read_text())
    assert data.keys() == {"schema", "complete", "command", "environment", "options", "cases", "summary", "notes"}
    assert (data["schema"], data["complete"]) == (report.SCHEMA, True)
    assert data["environment"].keys() >= {
        "cpu", "cpu_flags", "instruction_set", "threads", "versions", "commit", "date", "load"
    }  # fmt: skip
    assert data["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert data["options"] == {
        "threads": 1, "min_time": 0.001, "backend": "reference", "memory": False, "pause": 0.1
    }  # fmt: skip
    (case,) = data["cases"]
    assert case["name"] == SMALL
    assert case["shape"] == {
        "mode": "inference", "dtype": "float32", "cell": "rnn", "steps": 1, "batch": 1, "features": 64, "hidden": 64,
        "as_cell": False, "weights": "", "layers": 1, "directions": 1, "dropout": False, "norm": "",
    }  # fmt: skip
    ours, theirs = case["contestants"]["fastseq"], case["contestants"]["torch"]
    assert ours["backend"] == "reference"
    assert {
        "status",
        "errors",
        "median_us",
        "iqr_us",
        "least_us",
        "rounds",
        "inner",
        "setting",
        "settings",
    } <= ours.keys()
    assert set(ours["errors"]) == set(case["budget"]) == {"y", "h_n"}
    assert case["ratios"]["torch"] == case["ratios"]["best"] == pytest.approx(theirs["median_us"] / ours["median_us"])
    assert [line["of"] for line in data["summary"] if line["peer"] == "best"] == [
        "recurrent inference fp32", "rnn inference fp32"
    ]  # fmt: skip


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    calls = []

    def measure(case, *rest):
        calls.append(case)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run.measure(case, *rest)

    monkeypatch.setattr(session, "measure", measure)
    path = tmp_path / "out.json"
    arguments = ["--case", "rnn-inference-T1-B1", "--peer", "torch", "--min-time", "0.001"]
    assert main([*arguments, "--json", str(path)]) == 130
    data = json.loads(path.read_text())
    assert data["complete"] is False
    assert [case["name"] for case in data["cases"]] == [SMALL]
    printed = capsys.readouterr().out
    assert SMALL in printed
    assert "interrupted: 1 of 3 cases" in printed


def test_the_report_is_plain_text():
    """As in a file or a pipe: a line a case, columns aligned, with or without rich."""
    results = [report.case_document(result_of(SMALL, {"fastseq": 1e-6, "torch": 3e-6, "ort": None}))]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        report.print_report(report.document(results, CHECK_ONLY, True, {}))
    lines = said.getvalue().splitlines()
    header, row = (next(line for line in lines if line.startswith(start)) for start in ("case", SMALL))
    assert header.split() == ["case", "backend", "fastseq", "torch", "/", "torch", "spread"]
    assert row.split() == [SMALL, "–", "1.00", "µs", "3.00", "µs", "3.00×", "0%"]
    assert len(header) == len(row)


def test_list_prints_names_and_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr(session, "measure", None)
    assert main(["--list", "--quick"]) == 0
    assert set(capsys.readouterr().out.split()) == cases.QUICK


@pytest.mark.parametrize(
    "arguments",
    [["--case", "no-such-case"], ["--json", "/no/such/folder/out.json"], ["--dtype", "float16", "--quick"]],
)
def test_bad_arguments_are_told_before_anything_runs(arguments, monkeypatch, capsys):
    monkeypatch.setattr(session, "measure", None)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("python -m bench: ")


@pytest.mark.parametrize("arguments", [["--threads", "0"], ["--min-time", "nan"], ["--peer", "nobody"], ["nothing"]])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2


def test_help_lists_every_subcommand_with_its_first_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out.partition("subcommands")[2]
    for name, module in COMMANDS.items():
        first = importlib.import_module(module).__doc__.splitlines()[0]
        assert f"  {name:8} {first}" in listed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_subcommand_takes_the_rest_of_the_line(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"usage: python -m bench {name}" in capsys.readouterr().out


def test_peak_memory_counts_what_a_training_step_holds():
    case = cases.registry()["attention-training-B1-H8-T1024-D64"]
    if not peak.CLEAR_REFS.exists():
        pytest.skip("the system does not tell its high-water mark")
    found = peak.in_a_process(run.peak_bytes, case.name, "torch", Options(threads=1))
    assert found > 4 * 1024 * 8 * 64 * 4  # o and three gradients at least


def test_a_processor_is_told_by_its_generation_too():
    said = (
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t: fma avx2\n\nprocessor\t: 1\n"
    )
    facts = report.described_cpu(said)
    assert facts["model name"] == "AMD EPYC"
    assert report.generation(facts) == "family 25, model 17"
    assert report.generation(report.described_cpu("CPU part\t: 0xd0c\n")) is None


def test_readme_section_is_written_from_a_result_file(tmp_path):
    from bench.readme import main

    line = {"of": "recurrent inference fp32", "count": 2, "geomean": 1.5, "worst": 1.25, "worst_case": "gru-x"}
    document = {
        "complete": True,
        "environment": {
            "cpu": "a chip", "cpu_generation": "family 6, model 1", "instruction_set": "avx2",
            "threads": 2, "date": "2026-01-02T03:04:05", "commit": "abc",
            "versions": {"torch": "2.11", "onnxruntime": "1.2"},
        },
        "summary": [
            line | {"peer": "best"}, line | {"peer": "torch", "geomean": 3.0},
            line | {"of": "gru inference fp32", "peer": "best"},
        ],
        "cases": [{"noisy": False, "family": "recurrent inference fp32"}],
    }  # fmt: skip
    results, page = tmp_path / "cpu.json", tmp_path / "benchmarks.md"
    results.write_text(json.dumps(document))
    page.write_text("above\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nbelow\n")
    assert main([str(results), "--page", str(page)]) == 0
    text = page.read_text()
    shown, folded = text.split("<details>")
    assert "| recurrent inference fp32 | 2 | 1.50× | 1.25× `gru-x` | 3.00× |" in shown
    assert "| gru inference fp32 | 2 | 1.50× | 1.25× `gru-x` | – |" in folded
    assert text.startswith("above\n")
    assert text.endswith("<!-- bench:end -->\nbelow\n")
    assert "old" not in text
    assert "[cpu.json](cpu.json)" in text
    assert "a chip (family 6, model 1, avx2), 2 threads" in text
    results.write_text(json.dumps(document | {"complete": False}))
    assert main([str(results), "--page", str(page)]) == 2
    assert page.read_text() == text


def test_low_precision_is_compared_with_float64(tmp_path, capsys, monkeypatch):
    from bench.studies import precision

    monkeypatch.setattr(precision, "SHAPES", ((3, 2, 8, 16),))
    path = tmp_path / "precision.json"
    arguments = ["--cell", "lstm", "gru_reset_before", "--min-time", "0.01", "--json", str(path)]
    assert precision.main(arguments) == 0
    lstm, gru = (found["contestants"] for found in json.loads(path.read_text())["shapes"])
    for found in (lstm, gru):
        assert found["fastseq float32"]["error"] < 1e-5
        for kind in ("bfloat16", "int8"):
            assert 1e-5 < found[f"fastseq {kind}"]["error"] < 0.05
        assert all(one["us"] > 0 for one in found.values())
    assert 1e-5 < lstm["torch int8"]["error"] < 0.1
    assert "torch int8" not in gru
    assert "x best" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        precision.main(["--threads", "0"])


def test_smaller_weights_are_compared_on_a_trained_model(tmp_path, capsys):
    from bench.studies.weights import main

    path = tmp_path / "weights.json"
    assert main(["--steps", "2", "--width", "16", "--min-time", "0.01", "--json", str(path)]) == 0
    models = json.loads(path.read_text())["models"]
    assert [found["model"] for found in models] == ["gru", "lstm"]
    for found in models:
        measured = found["variants"]
        full = measured["fastseq float32"]["loss"]
        assert measured["torch float32"]["loss"] == pytest.approx(full, rel=1e-5)
        for variant in ("fastseq bfloat16", "fastseq int8", "fastseq int8 computed", "torch int8"):
            assert 0 < abs(measured[variant]["loss"] / full - 1) < 0.01
        assert all(one["step_us"] > 0 for one in measured.values())
    assert "fastseq int8" in capsys.readouterr().out
    for wrong in (["--steps", "0"], ["--json", str(tmp_path / "nowhere" / "x.json")]):
        with pytest.raises(SystemExit):
            main(wrong)

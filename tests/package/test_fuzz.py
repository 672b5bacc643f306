"""Drawn calls give what torch.nn gives: values, gradients, dtypes, layouts, and errors where torch has them.

Layers, cells, scaled_dot_product_attention, attention (beside its formula in eager torch) and MultiheadAttention are
drawn by hypothesis with all that a call can be: sizes, options, dtypes, modes, aliases, frozen parts, bad arguments,
and tensors that are views, negated, freed, on meta, or nothing but zeros (fuzz_cases.py). They run in a child process
(fuzz_run.py), which may die of one: the test then names it. A failing case is made smaller, printed, and run again by

    PYTHONPATH=.:tests .venv/bin/python tests/fuzz_run.py '{"family": ...}'

Another seed draws others; --fuzz-examples says how many, a few milliseconds each. An hour of them:

    make test-full ARGS="tests/package/test_fuzz.py --fuzz-seed 7 --fuzz-examples 6000"
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from fuzz_cases import FAMILIES, TOPICS, Case, argument_shapes, cases, make_others, parameter_names
from fuzz_run import DEADLY, Fault, Runner
from hypothesis import HealthCheck, given, seed, settings
from support import needs_native

pytestmark = needs_native


def has_nothing_to_see(case: Case) -> bool:
    return case["family"] == "mha" and 0 in (case["S"], case["B"])


def on_two_devices(case: Case) -> bool:
    """Some tensors of the call are on meta, others not."""
    meta = {name for name, kind in case.get("kinds", {}).items() if kind == "meta"}
    return bool(meta) and not meta.issuperset([*argument_shapes(case), *parameter_names(case), *make_others(case)])


ALLOWED: list[tuple[str, Callable[[Case, str, str], bool], str]] = [
    (
        "only torch raises",
        lambda case, what, text: what == "only torch raises" and "Need attn_mask if specifying" in text,
        "MultiheadAttention takes is_causal=True without an attn_mask beside it",
    ),
    (
        "a chip without bfloat16",
        lambda case, what, text: what.startswith("only torch raises") and "create a primitive descriptor" in text,
        "oneDNN, which torch's LSTM of 16 bits needs, has it on some chips alone",
    ),
    (
        "inference tensors",
        lambda case, what, text: what.startswith("only") and "Inference tensors cannot be saved" in text,
        "autograd keeps no inference tensor, and fastseq keeps other arguments for the backward pass than torch",
    ),
    (
        "zeros in 16 bits",
        lambda case, what, text: (
            what in ("value", "gradient")
            and case.get("cell") == "lstm"
            and case["dtype"].endswith("16")
            and "zero" in " ".join(case.get("kinds", {}).values())
        ),
        "torch's LSTM of 16 bits reads memory that a zero tensor does not have",
    ),
    (
        "zeros that torch would write to",
        lambda case, what, text: what == "only torch raises" and "ZeroTensors are immutable" in text,
        "torch's LSTM accumulates into the gradient of its state",
    ),
    (
        "no keys, or no batch",
        lambda case, what, text: what == "only torch raises" and has_nothing_to_see(case),
        "a query that sees no key attends to nothing; torch's layer cannot reshape no elements",
    ),
    (
        "appended keys under is_causal",
        lambda case, what, text: (
            case["family"] == "mha" and case["causal"] and (case["add_bias_kv"] or case["add_zero_attn"])
        ),
        "torch hides the keys that it appends from all but the last queries, and only where it drops attn_mask",
    ),
    (
        "attn_mask under is_causal",
        lambda case, what, text: (
            what == "only torch raises"
            and case["family"] == "mha"
            and case["causal"]
            and ("attn_mask" in text or case.get("kinds", {}).get("attn_mask") == "freed")
        ),
        "an attn_mask beside is_causal=True stands for the causal limit and is not looked at",
    ),
    (
        "float32 masks",
        lambda case, what, text: what == "only torch raises" and case.get("spoilt") == ["attn_mask", "dtype"],
        "a floating mask may be float32 whatever the dtype of the call",
    ),
    (
        "bad arguments",
        lambda case, what, text: what == "only ours raises" and "spoilt" in case and "ArgumentError" in text,
        "torch broadcasts, converts or ignores some arguments that do not fit",
    ),
    (
        "no features",
        lambda case, what, text: what == "only ours raises" and "has no features" in text and case["D"] == 0,
        "scores of no features have no scale: 1 / sqrt(0)",
    ),
    (
        "more than one device",
        lambda case, what, text: (
            what == "only ours raises" and on_two_devices(case) and "meta" in text.partition("; torch")[0]
        ),
        "torch looks at some of the devices only; where all are meta nothing raises",
    ),
]
"""Where a call may differ from torch's: what, when, why. See docs/limits.md."""


def unexplained(case: Case, faults: list[Fault]) -> list[Fault]:
    return [f for f in faults if not any(allowed(case, *f) for _, allowed, _ in ALLOWED)]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    child = Runner()
    yield child
    child.close()


def draw_and_compare(
    runner: Runner, family: str, topic: str, number: int, examples: int, transform: str | None = None
) -> None:
    """The calls of one seed, each held to torch's."""

    @seed(number)
    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck))
    @given(cases(family, topic, transform))
    def check(case: Case) -> None:
        faults = unexplained(case, runner.faults_of(case))
        assert not faults, "\n".join(f"{what}: {text}" for what, text in faults) + f"\n'{json.dumps(case)}'"

    check()


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_call_does_what_torch_does(runner, pytestconfig, family, topic):
    examples = pytestconfig.getoption("--fuzz-examples") or 50
    draw_and_compare(runner, family, topic, pytestconfig.getoption("--fuzz-seed"), examples)


@pytest.mark.full
@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_drawn_calls_do_what_torch_does(runner, pytestconfig, family, topic):
    examples = pytestconfig.getoption("--fuzz-examples") or 500
    draw_and_compare(runner, family, topic, pytestconfig.getoption("--fuzz-seed") + 1, examples)


@pytest.mark.full
@pytest.mark.parametrize("transform", ["vmap", "compile"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_drawn_call_may_be_mapped_or_compiled(runner, pytestconfig, family, transform):
    examples = pytestconfig.getoption("--fuzz-examples") or 10
    draw_and_compare(runner, family, "sizes", pytestconfig.getoption("--fuzz-seed"), min(examples, 1000), transform)


def test_a_case_that_ends_its_process_is_named(runner):
    assert runner.faults_of(DEADLY) == [("died", "the process ended, status -11")]
    assert runner.faults_of(DEADLY) == [("died", "the process ended, status -11")]  # another has taken its place

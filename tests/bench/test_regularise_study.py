"""The study of what a recurrence's options do to learning: what is trained, and what is said of it."""

from __future__ import annotations

import json

import pytest

import bench.studies.regularise
from bench import exhibits
from bench.__main__ import main
from bench.studies import figures
from bench.studies.regularise import OPTIONS, PLAIN, Protocol, chosen_rate, facts, goal, measure, plan, steps_to
from bench.studies.resume import key

TINY = Protocol(width=8, batch=2, length=6, steps=4, every=2, characters=200, held_out=60, rates=(1e-3, 1e-2), sweep_steps=2)  # fmt: skip  # noqa: E501


def test_a_quick_run_trains_every_option_and_a_second_one_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench.studies.regularise, "QUICK", TINY)
    path = tmp_path / "regularise.json"
    arguments = ["regularise", "--quick", "--json", str(path), "--threads", "1", "--seeds", "2"]
    assert main(arguments) == 0
    document = json.loads(path.read_text())
    assert document["complete"]
    assert [result["unit"] for result in document["results"]] == plan(TINY, 2)
    assert exhibits.kind_of(document) == "regularise"
    for result in document["results"]:
        assert len(result["held_out"]) == len(result["train"]) == (1 if result["unit"]["part"] == "sweep" else 2)
        assert result["rate"] in TINY.rates
    shown = figures.regularise(document)
    assert shown is not None
    assert len(shown.rows) == len(OPTIONS)
    assert "Compared with the plain layer, the lowest loss is" in facts(document)["said"]
    before = path.read_text()
    assert main(arguments) == 0
    assert path.read_text() == before
    assert "are in" in capsys.readouterr().err
    document["results"] = document["results"][:12]  # interrupted, after the sweep and two options of one seed
    assert len(figures.regularise(document).rows) == 2
    document["results"] = document["results"][:3]
    assert figures.regularise(document) is None


def test_a_plan_cut_short_is_balanced():
    units = plan(TINY, 3)
    assert len({key(unit) for unit in units}) == len(units)
    assert [unit["part"] for unit in units] == ["sweep"] * 10 + ["study"] * 15
    assert [unit["option"] for unit in units[10:15]] == list(OPTIONS)
    assert plan(TINY, 2) == units[: len(plan(TINY, 2))], "another seed only adds to the end"


def test_options_of_one_seed_begin_alike_and_draw_the_same_text():
    """So that an option that does nothing gives the plain layer's losses."""
    one = [1e-2]
    protocol = Protocol(**{**vars(TINY), "rates": one})
    plain, same = (measure({"part": "study", "option": o, "seed": 3}, protocol, []) for o in (PLAIN, PLAIN))
    assert plain == same
    OPTIONS["nothing"] = {"weight_dropout": 0.0, "zoneout": 0.0}
    try:
        assert measure({"part": "study", "option": "nothing", "seed": 3}, protocol, []) == plain
    finally:
        del OPTIONS["nothing"]
    for option in OPTIONS.keys() - {PLAIN}:
        assert measure({"part": "study", "option": option, "seed": 3}, protocol, [])["train"] != plain["train"]


def written(**losses: list[list[float]]) -> dict:
    """A document whose seeds have these held-out losses."""
    return {
        "protocol": {"every": 10},
        "results": [
            {"unit": {"part": "study", "option": option, "seed": seed}, "held_out": found}
            for option, seeds in losses.items()
            for seed, found in enumerate(seeds)
        ],
    }


def test_what_is_said_holds_for_every_seed():
    document = written(
        plain=[[2.5, 2.0, 2.4], [2.5, 2.1, 2.2]],
        zoneout=[[2.4, 1.9, 2.0], [2.4, 2.2, 2.1]],
        norm=[[2.1, 2.2, 2.5], [2.0, 2.2, 2.6]],
        weight_dropout=[[2.4, 2.1, 2.1], [2.6, 2.2, 2.2]],
    )
    assert goal(document) == pytest.approx(2.2)
    assert [steps_to(document, result, 2.2) for result in document["results"]] == [20, 20, 20, 20, 10, 10, 20, 20]
    below = bench.studies.regularise.below_plain(document, "lowest")
    assert below["weight_dropout"] == pytest.approx([-0.1, -0.1])
    assert bench.studies.regularise._compared(document, "last") == (
        "Compared with the plain layer, the loss at the end is lower with every seed: `zoneout=(0.05, 0.25)` (-0.250 "
        'nats); higher with every seed: `norm="layer"` (+0.250 nats); lower with some seeds: `weight_dropout=0.25` '
        "(-0.150 nats)."
    )
    assert bench.studies.regularise._sooner(document).startswith("A loss of 2.2 took 10 steps with")


def test_the_rate_is_the_one_with_the_lowest_loss():
    def swept(rate: float, losses: list[float], option: str = "norm") -> dict:
        return {"unit": {"part": "sweep", "option": option, "rate": rate}, "held_out": losses}

    results = [swept(0.1, [3.0, 2.1, 2.9]), swept(0.01, [3.0, 2.1]), swept(1.0, [2.2]), swept(1.0, [1.0], "plain")]
    assert chosen_rate(results, "norm") == 0.01

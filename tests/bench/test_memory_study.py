"""The study of memory: tasks have their answers where they say, runs go on after a kill, and models are of one size."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench.studies.memory
from bench.__main__ import main
from bench.studies import findings, learners, tasks
from bench.studies.memory import Protocol, chosen_rate, plan
from bench.studies.resume import OtherStudy, Study, key

ROOT = Path(__file__).resolve().parents[2]
TINY = Protocol(
    steps=3,
    batch=4,
    width=8,
    judged=16,
    distances=(2, 5),
    rates=(1e-3, 1e-2),
    sweep_steps=2,
    sweep_distances=(5,),
    text_steps=2,
    text_batch=2,
    text_width=8,
    text_sweep_steps=1,
    contexts=(1, 2, 5, 10),
    places=20,
    reach_sequences=4,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Protocol:
    """`memory --quick`, of next to nothing."""
    monkeypatch.setattr(bench.studies.memory, "QUICK", TINY)
    return TINY


def draws(task: str, distance: int) -> tasks.Batch:
    return tasks.TASKS[task].draw(16, distance, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("distance", [2, 9])
def test_recall_asks_for_the_marked_symbol_so_many_steps_before_the_end(distance):
    batch = draws("recall", distance)
    marked = batch.x[..., -1]
    assert torch.equal(marked.sum(1), torch.ones(16))
    assert marked[:, -1 - distance].eq(1).all()
    assert torch.equal(batch.x[:, -1 - distance, :-1].argmax(-1), batch.target[:, 0])


@pytest.mark.parametrize("distance", [5, 12])
def test_copying_asks_for_each_symbol_so_many_steps_after_it(distance):
    batch = draws("copying", distance)
    symbols = batch.x[:, : tasks.COPIED, :-1].argmax(-1)
    assert batch.x.shape[1] == distance + tasks.COPIED
    assert torch.equal(symbols, batch.target)
    assert batch.x[:, tasks.COPIED :, :-1].eq(0).all(), "the answer is shown"
    assert batch.x[:, distance, -1].eq(1).all()


def test_adding_asks_for_the_sum_of_the_marked_numbers():
    batch = draws("adding", 7)
    numbers, mark = batch.x.unbind(-1)
    assert mark[:, -1 - 7].eq(1).all()
    assert mark.sum(1).eq(2).all()
    torch.testing.assert_close((numbers * mark).sum(1), batch.target[:, 0])


@pytest.mark.parametrize("task", tasks.TASKS.values(), ids=lambda task: task.name)
def test_scores_are_one_for_the_answer_and_none_for_a_guess(task):
    target = task.draw(4096, 10, torch.Generator().manual_seed(2)).target
    if task.outputs == 1:
        right, guess = target[..., None], torch.ones(*target.shape, 1)
    else:
        right = torch.nn.functional.one_hot(target, task.outputs).float()
        guess = torch.nn.functional.one_hot(torch.zeros_like(target), task.outputs).float()
    assert task.score(right, target) == 1
    assert abs(task.score(guess, target)) < 0.05


@pytest.mark.parametrize("kind", learners.KINDS)
def test_models_of_a_task_have_one_size(kind):
    for features, outputs, width in ((9, 8, 32), (128, 128, 48)):
        size = learners.parameters(learners.of_size(learners.KINDS["attention"], features, outputs, width))
        ours = learners.parameters(learners.of_size(learners.KINDS[kind], features, outputs, width))
        assert ours == pytest.approx(size, rel=0.02)


def test_attention_of_the_study_sees_nothing_that_is_to_come():
    model = learners.of_size(learners.KINDS["attention"], 9, 8, 16)
    x = torch.randn(2, 6, 9)
    changed = torch.cat([x[:, :-1], torch.randn(2, 1, 9)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, 6)[:, :-1], model(changed, 6)[:, :-1])


def test_the_reach_is_the_norm_of_the_jacobian():
    """Against the Jacobian itself, of an RNN: a mean over many random vectors comes near its norm."""
    torch.manual_seed(3)
    model = learners.KINDS["rnn"].build(9, 8, 5)
    x = torch.randn(1, 8, 9).expand(4000, -1, -1)
    found = learners.reach(model, x, (1, 4))
    double = model.double()
    with torch.no_grad():
        embedded = double.embedded(x[:1].double())
    for k in (1, 4):
        state = double.hidden(embedded[:, :-k])[1].detach()
        jacobian = torch.autograd.functional.jacobian(
            lambda h, k=k: double.hidden(embedded[:, -k:], h)[0][0, -1], state
        )
        assert found["state"][k] == pytest.approx(float(jacobian.norm()) / 5**0.5, rel=0.05)
    jacobian = torch.autograd.functional.jacobian(lambda e: double.hidden(e)[0][0, -1], embedded)
    assert found["input"][4] == pytest.approx(float(jacobian[..., -5, :].norm()) / 5**0.5, rel=0.05)


def test_an_lstms_forget_bias_is_raised_and_nothing_else():
    torch.manual_seed(0)
    plain = learners.lstm(3, 4)
    torch.manual_seed(0)
    raised = learners.lstm(3, 4, 3.0)
    difference = {n: p - plain.state_dict()[n] for n, p in raised.state_dict().items()}
    assert difference.pop("bias_hh_l0").tolist() == pytest.approx([0] * 4 + [3] * 4 + [0] * 8)
    assert all(d.eq(0).all() for d in difference.values())


def test_a_plan_cut_short_is_balanced():
    units = plan(Protocol(), 3)
    assert len({key(unit) for unit in units}) == len(units)
    study = [unit for unit in units if unit["part"] == "study"]
    assert units[: len(units) - len(study)] == [unit for unit in units if unit["part"] == "sweep"]
    assert [unit["seed"] for unit in study] == sorted(unit["seed"] for unit in study)
    assert {unit["kind"] for unit in study[:6]} == set(learners.KINDS)
    assert plan(Protocol(), 2) == units[: len(plan(Protocol(), 2))], "another seed only adds to the end"


def test_the_rate_is_the_one_under_which_most_was_learned():
    def swept(rate: float, learned: float, kind: str = "rnn") -> dict:
        return {"unit": {"part": "sweep", "task": "recall", "kind": kind, "rate": rate}, "learned": learned}

    results = [swept(0.1, 0.5), swept(0.1, 0.1), swept(0.01, 0.4), swept(0.01, 0.4), swept(0.1, 1.0, "gru")]
    assert chosen_rate(results, "recall", "rnn") == 0.01
    assert chosen_rate(results, "recall", "gru") == 0.1


def test_a_quick_run_measures_everything_and_a_second_one_nothing(tiny, tmp_path, capsys):
    path = tmp_path / "memory.json"
    assert main(["memory", "--quick", "--json", str(path), "--threads", "1"]) == 0
    document = json.loads(path.read_text())
    assert document["complete"]
    assert len(document["results"]) == len(plan(tiny, 1))
    assert findings.tasks_in(document) == list(tasks.TASKS)
    assert findings.kinds(document, "text") == list(learners.KINDS)
    assert list(findings.by_context(document, "lstm", "loss")) == [1, 2, 5, 10]
    assert list(findings.reach(document, "lstm", "after", "state")) == [1, 2, 5, 10]
    before = path.read_text()
    assert main(["memory", "--quick", "--json", str(path), "--threads", "1"]) == 0
    assert path.read_text() == before
    assert "are in" in capsys.readouterr().err


def test_a_file_of_other_settings_is_neither_continued_nor_overwritten(tmp_path, capsys):
    path = tmp_path / "memory.json"
    Study(path, "python -m bench memory --quick", {"steps": 1}, 1).add({"n": 1}, {"score": 1.0})
    before = path.read_text()
    assert main(["memory", "--quick", "--json", str(path)]) == 2
    assert "other settings" in capsys.readouterr().err
    path.write_text("{}")
    assert main(["memory", "--quick", "--json", str(path)]) == 2
    assert path.read_text() == "{}"
    assert "score" in before


def test_the_same_seed_gives_the_same_result(tiny):
    unit = {"part": "sweep", "task": "recall", "kind": "gru", "distance": 5, "rate": 1e-2}
    first, second = (bench.studies.memory.measure(unit, tiny, []) for _ in range(2))
    assert first["score"] == second["score"]
    assert first["learned"] == pytest.approx(second["learned"])


def test_training_ends_early_once_solved_and_the_rest_counts_as_learned():
    protocol = dataclasses.replace(TINY, steps=400, batch=32, width=16, rates=(1e-2,))
    unit = {"part": "study", "task": "recall", "kind": "attention", "distance": 2, "seed": 0}
    found = bench.studies.memory.measure(unit, protocol, [])
    assert found["solved_at"] == found["steps"] < 400
    assert found["score"] > 0.95
    assert found["learned"] > 1 - found["steps"] / 400


def test_ctrl_c_keeps_what_was_done(tmp_path, capsys):
    def measure(unit):
        if unit["n"] == 2:
            raise KeyboardInterrupt
        return {"value": unit["n"]}

    study = Study(tmp_path / "s.json", "a study", {}, 1)
    assert not study.run([{"n": n} for n in range(4)], measure)
    document = json.loads((tmp_path / "s.json").read_text())
    assert [result["value"] for result in document["results"]] == [0, 1]
    assert not document["complete"]
    assert "continues from here" in capsys.readouterr().err
    again = Study(tmp_path / "s.json", "a study", {}, 1)
    measured = []
    assert again.run([{"n": n} for n in range(4)], lambda unit: measured.append(unit["n"]) or {"value": unit["n"]})
    assert measured == [2, 3]
    with pytest.raises(OtherStudy):
        Study(tmp_path / "s.json", "another", {}, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_goes_on_where_it_was(tmp_path):
    path = tmp_path / "s.json"
    program = f"""
import time
from pathlib import Path
from bench.studies.resume import Study
study = Study(Path({str(path)!r}), "a study", {{}}, 1)
study.run([{{"n": n}} for n in range(6)], lambda unit: time.sleep(0.3) or {{"by": "the first"}})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or len(json.loads(path.read_text())["results"]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
    assert child.wait(60) == -signal.SIGKILL
    kept = json.loads(path.read_text())["results"]
    assert 2 <= len(kept) < 6
    study = Study(path, "a study", {}, 1)
    assert study.run([{"n": n} for n in range(6)], lambda unit: {"by": "the second"})
    document = json.loads(path.read_text())
    assert document["complete"]
    assert document["results"][: len(kept)] == kept
    assert [r["unit"]["n"] for r in document["results"]] == list(range(6))
    assert [r["by"] for r in document["results"]] == ["the first"] * len(kept) + ["the second"] * (6 - len(kept))

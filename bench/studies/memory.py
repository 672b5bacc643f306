"""How far back each layer remembers: small models of one size, trained on tasks whose answer is a known distance back.

Recall, copying and adding at each distance, and the loss on real text as a function of the context given, with the
reach of the gradient before and after training. The learning rate is chosen for each task and kind of layer by the same
small sweep. Every result is written at once; the same command continues an interrupted run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bench.report import RESULTS
from bench.studies import learners, tasks
from bench.studies.resume import Unit, arguments, conduct

SOLVED, WINDOW = 0.99, 25
"""Training ends early once the mean score of the last 25 batches is 0.99: then nothing is left to learn."""

SWEEP_SEED = 1000


@dataclass(frozen=True)
class Protocol:
    """Everything a result depends on except its unit. Widths are attention's: the other kinds get as many
    parameters."""

    steps: int = 600
    batch: int = 32
    width: int = 32
    clip: float = 1.0
    judged: int = 512  # fresh sequences for the final score
    distances: tuple[int, ...] = (2, 5, 10, 25, 50, 100, 200)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    sweep_steps: int = 300
    sweep_distances: tuple[int, ...] = (10, 25)
    text_steps: int = 800
    text_batch: int = 8
    text_width: int = 48
    text_sweep_steps: int = 150
    contexts: tuple[int, ...] = tasks.CONTEXTS
    places: int = 2000  # held-out characters whose loss is measured
    reach_sequences: int = 64


QUICK = Protocol(
    steps=200,
    judged=256,
    distances=(2, 10, 50),
    rates=(1e-2,),
    text_steps=100,
    contexts=(1, 2, 5, 10, 25, 50, 100),
    places=500,
    reach_sequences=16,
)

TEXT = "text"


def plan(protocol: Protocol, seeds: int) -> list[Unit]:
    """Sweeps first, because they decide the learning rates, unless there is only one rate; then seed by seed, so that a
    run that is cut short is balanced."""
    names = [*tasks.TASKS, TEXT]
    units: list[Unit] = []
    for task in names if len(protocol.rates) > 1 else ():
        for distance in protocol.sweep_distances if task != TEXT else (max(protocol.contexts),):
            for rate in protocol.rates:
                units += [
                    {"part": "sweep", "task": task, "kind": kind, "distance": distance, "rate": rate}
                    for kind in learners.KINDS
                ]
    for seed in range(seeds):
        for task in names:
            for distance in distances(protocol, task):
                units += [
                    {"part": "study", "task": task, "kind": kind, "distance": distance, "seed": seed}
                    for kind in learners.KINDS
                ]
    return units


def distances(protocol: Protocol, task: str) -> tuple[int, ...]:
    """Those of the protocol that the task has; text has one unit, with every context in it."""
    if task == TEXT:
        return (max(protocol.contexts),)
    return tuple(k for k in tasks.TASKS[task].distances if k in protocol.distances)


def chosen_rate(results: list[dict[str, Any]], task: str, kind: str) -> float:
    """The rate of the sweep under which most was learned, on the mean over its distances; the smaller one of equals."""
    learned: dict[float, list[float]] = {}
    for result in results:
        unit = result["unit"]
        if (unit["part"], unit["task"], unit["kind"]) == ("sweep", task, kind):
            learned.setdefault(unit["rate"], []).append(result["learned"])
    return max(sorted(learned), key=lambda rate: statistics.fmean(learned[rate]))


def measure(unit: Unit, protocol: Protocol, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Train the unit's model and judge it."""
    sweep = unit["part"] == "sweep"
    if sweep or len(protocol.rates) == 1:
        rate = unit.get("rate", protocol.rates[0])
    else:
        rate = chosen_rate(results, unit["task"], unit["kind"])
    seed = SWEEP_SEED if sweep else unit["seed"]
    start = time.perf_counter()
    train = train_text if unit["task"] == TEXT else train_task
    return {"rate": rate} | train(unit, protocol, rate, seed, sweep) | {"seconds": time.perf_counter() - start}


def train_task(unit: Unit, protocol: Protocol, rate: float, seed: int, sweep: bool) -> dict[str, Any]:
    """``learned`` is the mean score over the steps allowed, those after an early end counted as solved."""
    task, distance = tasks.TASKS[unit["task"]], unit["distance"]
    steps = protocol.sweep_steps if sweep else protocol.steps
    torch.manual_seed(seed)
    model = learners.of_size(learners.KINDS[unit["kind"]], task.features, task.outputs, protocol.width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draw = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    solved_at = None
    while len(scores) < steps and solved_at is None:
        batch = task.draw(protocol.batch, distance, draw)
        predicted = model(batch.x, batch.target.size(1))
        learners.descend(model, optimizer, task.loss(predicted, batch.target), protocol.clip)
        scores.append(task.score(predicted.detach(), batch.target))
        if len(scores) >= WINDOW and statistics.fmean(scores[-WINDOW:]) >= SOLVED:
            solved_at = len(scores)
    fresh = task.draw(protocol.judged, distance, torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        score = task.score(model(fresh.x, fresh.target.size(1)), fresh.target)
    return {
        "score": score,
        "learned": (sum(max(s, 0.0) for s in scores) + steps - len(scores)) / steps,
        "steps": len(scores),
        "solved_at": solved_at,
        "parameters": learners.parameters(model),
    }


def train_text(unit: Unit, protocol: Protocol, rate: float, seed: int, sweep: bool) -> dict[str, Any]:
    """One model, trained on stretches as long as the longest context and so on every shorter one too; then its loss at
    held-out places of which it is shown the last n characters, for each n, and its gradient's reach."""
    longest, symbols = max(protocol.contexts), len(tasks.text()[2])
    steps = protocol.text_sweep_steps if sweep else protocol.text_steps
    torch.manual_seed(seed)
    model = learners.of_size(learners.KINDS[unit["kind"]], symbols, symbols, protocol.text_width)
    held_out = tasks.text()[1]
    stretches = held_out[: protocol.reach_sequences * (longest + 1)].view(-1, longest + 1)
    found: dict[str, Any] = {"parameters": learners.parameters(model), "steps": steps}
    if not sweep:
        found["reach_before"] = learners.reach(model, stretches, protocol.contexts)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draw = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        batch = tasks.characters(protocol.text_batch, longest, draw)
        loss = cross_entropy(model(batch.x, longest).flatten(0, 1), batch.target.flatten())
        learners.descend(model, optimizer, loss, protocol.clip)
        losses.append(loss.item())
    found["learned"] = -statistics.fmean(losses[-(steps // 3 or 1) :])
    return found if sweep else found | context_losses(model, held_out, protocol) | {
        "reach_after": learners.reach(model, stretches, protocol.contexts)
    }  # fmt: skip


@torch.no_grad()
def context_losses(model: learners.Learner, held_out: torch.Tensor, protocol: Protocol) -> dict[str, Any]:
    """``loss[n]``: mean nats a character where the last n characters are given, always of the same held-out places.
    ``excess[n]``: how much that is above the longest context's, and ``excess_error[n]``, the standard error of this
    difference, place by place."""
    longest = max(protocol.contexts)
    places = torch.linspace(longest, len(held_out) - 1, protocol.places).long()
    losses = {}
    for n in protocol.contexts:
        parts = [
            cross_entropy(
                model(held_out[some[:, None] + torch.arange(-n, 0)], 1)[:, 0], held_out[some], reduction="none"
            )
            for some in places.split(250)
        ]
        losses[n] = torch.cat(parts).double()
    over = {n: loss - losses[longest] for n, loss in losses.items()}
    return {
        "loss": {n: float(loss.mean()) for n, loss in losses.items()},
        "excess": {n: float(each.mean()) for n, each in over.items()},
        "excess_error": {n: float(each.std()) / len(places) ** 0.5 for n, each in over.items()},
    }


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments, 130 if it was interrupted."""
    quick = "fewer steps and distances, one seed, one learning rate"
    parser = arguments("memory", __doc__, quick, "in bench/results")
    parser.add_argument("--seeds", type=int, help="default: 3, with --quick 1; more may be added to a finished run")
    options = parser.parse_args(argv)
    seeds = options.seeds if options.seeds is not None else 1 if options.quick else 3
    if seeds < 1:
        parser.error("--seeds must be positive")
    path = options.json or RESULTS / f"cpu-memory-study{'-quick' * options.quick}.json"
    protocol = QUICK if options.quick else Protocol()
    return conduct(parser, options, path, protocol, plan(protocol, seeds),
                   lambda study, unit: measure(unit, protocol, study.results))  # fmt: skip

"""The results of the study of memory and the measurement of cost as numbers: means over seeds, reaches, crossings."""

from __future__ import annotations

import math
from typing import Any

from bench.exhibits import Document
from bench.studies.learners import KINDS
from bench.studies.tasks import TASKS

REMEMBERED = 0.9
"""A distance counts as remembered if every seed scored so much there, and at all shorter distances."""

FALLEN = 0.02
"""Nats a character: the loss has stopped falling once it is within this of its lowest."""

COST_LABELS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "attention": "attention"}


def label(kind: str) -> str:
    return KINDS[kind].label if kind in KINDS else kind


def studied(document: Document, task: str) -> list[dict[str, Any]]:
    """The results of a task's own units, without the sweep's."""
    return [r for r in document["results"] if r["unit"]["part"] == "study" and r["unit"]["task"] == task]


def kinds(document: Document, task: str) -> list[str]:
    """Kinds of layer with a result, in the study's order."""
    present = {r["unit"]["kind"] for r in studied(document, task)}
    return [kind for kind in KINDS if kind in present] + sorted(present - set(KINDS))


def seeds(document: Document) -> int:
    return len({r["unit"]["seed"] for r in document["results"] if r["unit"]["part"] == "study"})


def scores(document: Document, task: str, kind: str) -> dict[int, list[float]]:
    """Of each distance, the score of every seed."""
    found: dict[int, list[float]] = {}
    for r in studied(document, task):
        if r["unit"]["kind"] == kind:
            found.setdefault(r["unit"]["distance"], []).append(r["score"])
    return dict(sorted(found.items()))


def solved(document: Document, task: str, kind: str, distance: int) -> list[int | None]:
    """For each seed, after how many steps it was solved; None if it was not."""
    units = [r for r in studied(document, task) if (r["unit"]["kind"], r["unit"]["distance"]) == (kind, distance)]
    return [r["solved_at"] for r in units]


def remembered(document: Document, task: str, kind: str) -> int | None:
    """The longest distance remembered by every seed; None if there is none."""
    longest = None
    for distance, found in scores(document, task, kind).items():
        if min(found) < REMEMBERED:
            break
        longest = distance
    return longest


def rates(document: Document, task: str) -> dict[str, float]:
    """The learning rate that each kind of layer trained with."""
    return {r["unit"]["kind"]: r["rate"] for r in studied(document, task)}


def by_context(document: Document, kind: str, name: str) -> dict[int, list[float]]:
    """``loss``, ``excess`` or ``excess_error`` of every seed, by characters of context."""
    found: dict[int, list[float]] = {}
    for r in studied(document, "text"):
        if r["unit"]["kind"] == kind:
            for n, value in r[name].items():
                found.setdefault(int(n), []).append(value)
    return dict(sorted(found.items()))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def stops_falling(document: Document, kind: str) -> int:
    """The least context whose loss, averaged over seeds, is within FALLEN of the lowest."""
    losses = {n: mean(found) for n, found in by_context(document, kind, "loss").items()}
    return min(n for n, loss in losses.items() if loss <= min(losses.values()) + FALLEN)


def best_context(document: Document, kind: str) -> int:
    """The context with the lowest mean loss."""
    losses = {n: mean(found) for n, found in by_context(document, kind, "loss").items()}
    return min(losses, key=lambda n: losses[n])


def reach(document: Document, kind: str, when: str, of: str) -> dict[int, list[float]]:
    """Gains by distance, a value a seed. when: before or after training; of: state or input."""
    found: dict[int, list[float]] = {}
    for r in studied(document, "text"):
        if r["unit"]["kind"] == kind:
            for n, value in r[f"reach_{when}"].get(of, {}).items():
                found.setdefault(int(n), []).append(value)
    return dict(sorted(found.items()))


def faded(document: Document, kind: str, when: str, of: str, below: float = 0.01) -> int | None:
    """The least distance at which the gain (geometric mean over seeds) is below a hundredth of that at distance 1."""
    gains = {n: geometric(values) for n, values in reach(document, kind, when, of).items()}
    return next((n for n, gain in gains.items() if gain < below * gains[min(gains)]), None)


def geometric(values: list[float]) -> float:
    return math.exp(mean([math.log(max(v, 1e-300)) for v in values]))


# --- cost -----------------------------------------------------------------------------------------------------------


def times(document: Document, mode: str, kind: str, layout: str) -> dict[int, float]:
    """Seconds a call by length."""
    found = {}
    for r in document["results"]:
        if r["unit"]["part"] == "time" and r["unit"]["mode"] == mode:
            for one in r["times"]:
                if (one["kind"], one["layout"]) == (kind, layout):
                    found[r["unit"]["steps"]] = one["median_us"] / 1e6
    return dict(sorted(found.items()))


def peaks(document: Document, mode: str, kind: str) -> dict[int, int]:
    """Bytes by length."""
    for r in document["results"]:
        if r["unit"] == {"part": "memory", "mode": mode, "kind": kind} and r["peak_bytes"]:
            return {int(steps): count for steps, count in r["peak_bytes"].items()}
    return {}


def overtakes(slower: dict[int, float], faster: dict[int, float]) -> int | None:
    """From which length on, of those measured, ``slower`` takes longer, there and at all greater ones; None: never."""
    shared = sorted(slower.keys() & faster.keys())
    first = None
    for steps in reversed(shared):
        if slower[steps] <= faster[steps]:
            break
        first = steps
    return first


def tasks_in(document: Document) -> list[str]:
    """Tasks with a distance of which there are results."""
    return [task for task in TASKS if studied(document, task)]

"""What the options of a recurrent layer do to learning: an LSTM of characters on little text, with each of them.

The text is so short that the plain layer overfits: its loss on held-out text falls, and rises again. Each
option is trained for as many steps, from the same seeds, on the same draws of text. What their papers promise:

- dropout in the recurrence, dropout of weights, and zoneout: a lower loss on held-out text, which rises less (Gal and
  Ghahramani 2016; Merity et al. 2018; Krueger et al. 2017).
- layer normalisation: the same loss after fewer steps (Ba et al. 2016).

The learning rate is chosen for each option by the same small sweep, judged on a held-out part of its own. Every result
is written at once; the same command continues an interrupted run.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastseq
from bench.exhibits import Document
from bench.report import RESULTS
from bench.studies import tasks
from bench.studies.learners import Recurrent, descend, parameters
from bench.studies.resume import Unit, arguments, conduct

PLAIN, SWEEP_SEED = "plain", 1000

OPTIONS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "weight_dropout": {"weight_dropout": 0.25},
    "zoneout": {"zoneout": (0.05, 0.25)},
    "norm": {"norm": "layer"},
}


@dataclass(frozen=True)
class Protocol:
    """characters: of the text that is learned. held_out: characters that judge, and as many after them that judge the
    sweep. every: steps from one look at the held-out text to the next."""

    width: int = 128
    batch: int = 16
    length: int = 64
    steps: int = 1000
    every: int = 25
    clip: float = 1.0
    characters: int = 40_000
    held_out: int = 16_000
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    sweep_steps: int = 400


QUICK = Protocol(width=64, steps=100, every=10, characters=10_000, held_out=4_000, rates=(1e-2,))


def plan(protocol: Protocol, seeds: int) -> list[Unit]:
    """Sweeps first, because they decide the learning rates, unless there is only one rate; then seed by seed, so that a
    run that is cut short is balanced."""
    rates = protocol.rates if len(protocol.rates) > 1 else ()
    units: list[Unit] = [{"part": "sweep", "option": option, "rate": rate} for rate in rates for option in OPTIONS]
    return units + [{"part": "study", "option": option, "seed": seed} for seed in range(seeds) for option in OPTIONS]


def chosen_rate(results: list[dict[str, Any]], option: str) -> float:
    """The rate of the sweep with the lowest loss; the smaller one of equals."""
    swept = [r for r in results if (r["unit"]["part"], r["unit"]["option"]) == ("sweep", option)]
    found: float = min(swept, key=lambda r: (min(r["held_out"]), r["unit"]["rate"]))["unit"]["rate"]
    return found


def measure(unit: Unit, protocol: Protocol, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Train the unit's model. ``held_out`` and ``train``: mean nats a character at every look, the latter over the
    steps since the one before, with what the option drops."""
    sweep = unit["part"] == "sweep"
    if sweep or len(protocol.rates) == 1:
        rate = unit.get("rate", protocol.rates[0])
    else:
        rate = chosen_rate(results, unit["option"])
    seed, steps = (SWEEP_SEED, protocol.sweep_steps) if sweep else (unit["seed"], protocol.steps)
    train, others, symbols = tasks.text()
    train, judged = train[: protocol.characters], others[sweep * protocol.held_out :][: protocol.held_out]
    torch.manual_seed(seed)

    def layer(features: int, width: int) -> nn.RNNBase:
        return fastseq.nn.LSTM(features, width, batch_first=True, **OPTIONS[unit["option"]])

    model = Recurrent(layer, len(symbols), len(symbols), protocol.width)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    looks: dict[str, list[float]] = {"held_out": [], "train": []}
    for step in range(1, steps + 1):
        starts = torch.randint(len(train) - protocol.length, (protocol.batch, 1), generator=draw)
        places = starts + torch.arange(protocol.length)
        loss = cross_entropy(model(train[places], protocol.length).flatten(0, 1), train[places + 1].flatten())
        descend(model, optimizer, loss, protocol.clip)
        losses.append(loss.item())
        if step % protocol.every == 0:
            looks["held_out"].append(_loss(model, judged, protocol.length))
            looks["train"].append(statistics.fmean(losses[-protocol.every :]))
    return {"rate": rate, "parameters": parameters(model), **looks}


@torch.no_grad()
def _loss(model: Recurrent, text: Tensor, length: int) -> float:
    """Mean nats a character: over the second halves of stretches of twice the length, whose first halves are read."""
    rows = text[: len(text) // (2 * length) * 2 * length].view(-1, 2 * length)
    model.eval()
    predicted = model(rows[:, :-1], length)
    model.train()
    return float(cross_entropy(predicted.flatten(0, 1), rows[:, -length:].flatten()))


# --- what a run shows -----------------------------------------------------------------------------------------------


def label(option: str) -> str:
    """As it is written in a call: ``zoneout=(0.05, 0.25)``."""
    written = (f"{name}={json.dumps(v) if isinstance(v, str) else v}" for name, v in OPTIONS.get(option, {}).items())
    return ", ".join(written) or option


def studied(document: Document) -> dict[str, list[dict[str, Any]]]:
    """Of each option, in the study's order, the result of every seed."""
    found: dict[str, list[dict[str, Any]]] = {option: [] for option in OPTIONS}
    for result in document["results"]:
        if result["unit"]["part"] == "study":
            found.setdefault(result["unit"]["option"], []).append(result)
    return {option: results for option, results in found.items() if results}


def goal(document: Document) -> float:
    """A loss that every run reached: the greatest of their lowest, rounded up to a tenth."""
    lowest = [min(result["held_out"]) for results in studied(document).values() for result in results]
    return math.ceil(round(max(lowest) * 10, 6)) / 10


def steps_to(document: Document, result: dict[str, Any], loss: float) -> int:
    """After how many steps a look found the held-out loss at ``loss`` or below. It was, once."""
    first = next(n for n, found in enumerate(result["held_out"], 1) if found <= loss)
    return first * int(document["protocol"]["every"])


def below_plain(document: Document, of: str) -> dict[str, list[float]]:
    """Of each option but plain, how much lower its loss is, seed by seed. ``of``: ``lowest`` or ``last``."""
    value = min if of == "lowest" else lambda losses: losses[-1]
    losses = {
        option: {result["unit"]["seed"]: value(result["held_out"]) for result in results}
        for option, results in studied(document).items()
    }
    plain = losses.pop(PLAIN, {})
    found = {o: [plain[seed] - x for seed, x in seeds.items() if seed in plain] for o, seeds in losses.items()}
    return {option: differences for option, differences in found.items() if differences}


def facts(document: Document) -> dict[str, Any]:
    """What docs/choosing.md tells of a run."""
    protocol, plain = document["protocol"], studied(document)[PLAIN]
    return {
        "said": " ".join([_compared(document, "lowest"), _compared(document, "last"), _sooner(document)]),
        "plain_rises": f"{statistics.fmean(r['held_out'][-1] - min(r['held_out']) for r in plain):.2f}",
        "seeds": len(plain),
        "epochs": f"{protocol['steps'] * protocol['batch'] * protocol['length'] / protocol['characters']:.0f}",
        "rates": ", ".join(f"{rate:g}" for rate in protocol["rates"]),
    }


def _compared(document: Document, of: str) -> str:
    """A sentence or more: which options are better than plain with every seed, and which are not."""
    groups: dict[str, list[str]] = {
        "lower with every seed": [],
        "higher with every seed": [],
        "lower with some seeds": [],
    }
    better, worse, mixed = groups.values()
    for option, by in below_plain(document, of).items():
        group = better if min(by) > 0 else worse if max(by) < 0 else mixed
        group.append(f"`{label(option)}` ({-statistics.fmean(by):+.3f} nats)")
    what = "lowest loss" if of == "lowest" else "loss at the end"
    parts = [f"{how}: {', '.join(options)}" for how, options in groups.items() if options]
    return f"Compared with the plain layer, the {what} is {'; '.join(parts)}."


def _sooner(document: Document) -> str:
    """A sentence: how many steps a loss that all reached took, with layer normalisation and without."""
    found = {o: [steps_to(document, r, goal(document)) for r in each] for o, each in studied(document).items()}
    normed, plain = (statistics.fmean(found[option]) for option in ("norm", PLAIN))
    return f"A loss of {goal(document):.1f} took {normed:.0f} steps with `{label('norm')}`, and {plain:.0f} without."


def main(argv: Sequence[str]) -> int:
    """Entry point; 2 on bad arguments, 130 if it was interrupted."""
    quick = "fewer steps, less text, one seed, one learning rate"
    parser = arguments("regularise", __doc__, quick, "in bench/results")
    parser.add_argument("--seeds", type=int, help="default: 3, with --quick 1; more may be added to a finished run")
    options = parser.parse_args(argv)
    seeds = options.seeds if options.seeds is not None else 1 if options.quick else 3
    if seeds < 1:
        parser.error("--seeds must be positive")
    path = options.json or RESULTS / f"cpu-regularise{'-quick' * options.quick}.json"
    protocol = QUICK if options.quick else Protocol()
    return conduct(parser, options, path, protocol, plan(protocol, seeds),
                   lambda study, unit: measure(unit, protocol, study.results))  # fmt: skip

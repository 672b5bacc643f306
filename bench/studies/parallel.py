"""A recurrent layer evaluated in parallel over time: how many iterations it takes, and what one of them costs.

All states are guessed at once and made right by iterations. Each evaluates the cell at every step from the states of
the last one, and passes on what changed through the cell's derivative: all of it (Newton's method; Lim et al. 2024,
DEER), its diagonal (Gonzalez et al. 2024), or nothing of it (a step a time at worst). One sequence of text, forward;
every result is written at once, and the same command continues an interrupted run.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

import fastseq
from bench.exhibits import commit_of, device_of
from bench.report import RESULTS
from bench.run import time_in_turns
from bench.studies.resume import Study, Unit, arguments, conduct
from bench.studies.tasks import characters, text

LAYERS = {"rnn": fastseq.nn.RNN, "gru": fastseq.nn.GRU}
CARRIED = {"newton": "all of the derivative", "diagonal": "its diagonal", "none": "nothing"}
"""What an iteration passes on from step to step."""


@dataclass(frozen=True)
class Protocol:
    """tolerance: of every state, from the layer's own in float64. training: steps of the trained weights. most:
    iterations at most. min_time: seconds given to each way of a shape."""

    device: str
    widths: tuple[int, ...] = (64, 128)
    lengths: tuple[int, ...] = (256, 1024)
    tolerance: float = 1e-5
    training: int = 400
    most: int = 300
    min_time: float = 0.4


@functools.cache
def model(cell: str, hidden: int, training: int) -> tuple[Tensor, Any]:
    """Embedding [symbols, hidden] and layer, as initialised or after so many steps of learning the next character."""
    torch.manual_seed(0)
    symbols = len(text()[2])
    layer, head = LAYERS[cell](hidden, hidden, batch_first=True), nn.Linear(hidden, symbols)
    table = nn.Parameter(torch.randn(symbols, hidden))
    parameters = [table, *layer.parameters(), *head.parameters()]
    optimizer, generator = torch.optim.Adam(parameters, 0.003), torch.Generator().manual_seed(0)
    for _ in range(training):
        batch = characters(32, 100, generator)
        predicted = head(layer(embedding(batch.x, table))[0])
        optimizer.zero_grad()
        cross_entropy(predicted.flatten(0, 1), batch.target.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return table.detach(), layer.requires_grad_(False)


# --- an iteration -----------------------------------------------------------------------------------------------------


def cell_and_derivative(cell: str, x: Tensor, before: Tensor, layer: Any, carried: str) -> tuple[Tensor, Tensor | None]:
    """f(before) [T,H] of every step at once, and df/dbefore: [T,H,H], its diagonal [T,H], or None. x [T,G*H] is
    W_ih x + b_ih."""
    w = layer.weight_hh_l0
    whole = carried == "newton"

    def times_rows(factor: Tensor, rows: Tensor) -> Tensor:
        """diag(factor) rows, or its diagonal."""
        return factor[..., None] * rows if whole else factor * rows.diagonal()

    made = before @ w.T + layer.bias_hh_l0
    if cell == "rnn":
        h = torch.tanh(x + made)
        return h, None if carried == "none" else times_rows(1 - h * h, w)
    (x_r, x_z, x_n), (h_r, h_z, q) = x.chunk(3, -1), made.chunk(3, -1)
    w_r, w_z, w_n = w.chunk(3)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * q)
    h = n + z * (before - n)
    if carried == "none":
        return h, None
    slope = (1 - z) * (1 - n * n)
    derivative = times_rows((before - n) * z * (1 - z), w_z) + times_rows(slope * r, w_n)
    derivative += times_rows(slope * q * r * (1 - r), w_r)
    return h, derivative + (torch.diag_embed(z) if whole else z)


def walk(a: Tensor, b: Tensor) -> Tensor:
    """All d_t = a_t d_{t-1} + b_t [T,H] from d = 0, in log2 T rounds; a [T,H,H] or its diagonal [T,H]."""
    steps, reach = len(b), 1
    while reach < steps:
        late, early = a[reach:], b[:-reach]
        moved = (late @ early[..., None])[..., 0] if a.dim() == 3 else late * early
        b = torch.cat([b[:reach], b[reach:] + moved])
        if 2 * reach < steps:  # of the last round nothing is asked
            a = torch.cat([a[:reach], late @ a[:-reach] if a.dim() == 3 else late * a[:-reach]])
        reach *= 2
    return b


def iteration(cell: str, x: Tensor, states: Tensor, layer: Any, carried: str) -> Tensor:
    """Better states [T,H]."""
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    made, derivative = cell_and_derivative(cell, x, before, layer, carried)
    if derivative is None:
        return made
    wrong = made - states
    return states + walk(derivative, wrong)


def iterations(cell: str, x: Tensor, truth: Tensor, layer: Any, carried: str, protocol: Protocol) -> int | None:
    """How many it takes until every state is right, from zeros; None: more than ``protocol.most``, or never."""
    states = torch.zeros_like(truth)
    for count in range(1, protocol.most + 1):
        states = iteration(cell, x, states, layer, carried)
        if not states.isfinite().all():
            return None
        if (states - truth).abs().max() <= protocol.tolerance:
            return count
    return None


# --- the study --------------------------------------------------------------------------------------------------------


def plan(protocol: Protocol) -> list[Unit]:
    return [
        {"cell": cell, "trained": trained, "hidden": hidden, "steps": steps}
        for cell in LAYERS
        for trained in (False, True)
        for hidden in protocol.widths
        for steps in protocol.lengths
    ]


def measure(unit: Unit, protocol: Protocol) -> dict[str, Any]:
    """Iterations, in float64; microseconds of the layer and of an iteration, in float32 and in turns."""
    cell, steps = unit["cell"], unit["steps"]
    table, layer = model(cell, unit["hidden"], protocol.training if unit["trained"] else 0)
    held_out = text()[1][None, :steps]

    def inputs(dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Tensor]:
        own = LAYERS[cell](*2 * [unit["hidden"]], batch_first=True, dtype=dtype).requires_grad_(False)
        own.load_state_dict(layer.state_dict())
        x = embedding(held_out, table.to(dtype))
        return own, x, (x @ own.weight_ih_l0.T + own.bias_ih_l0)[0], own(x)[0][0]

    own, _, x, truth = inputs(torch.float64)
    counts = {carried: iterations(cell, x, truth, own, carried, protocol) for carried in CARRIED}
    own, given, x, truth = inputs(torch.float32)
    calls: list[Callable[[], Any]] = [lambda: own(given)]
    calls += [functools.partial(iteration, cell, x, truth, own, carried) for carried in CARRIED]
    with torch.inference_mode():
        timings = time_in_turns(calls, protocol.min_time)
    us = dict(zip(("layer", *CARRIED), (timing.median * 1e6 for timing in timings), strict=True))
    return {"iterations": counts, "us": us}


def table_of(document: dict[str, Any]) -> str:
    """The results in Markdown."""
    most = document["protocol"]["most"]
    rows = ["| layer | weights | H | T | " + " | ".join(f"passes on {name}" for name in CARRIED.values()) + " |"]
    rows.append("| --- " * (4 + len(CARRIED)) + "|")
    for result in document["results"]:
        unit, us, cells = result["unit"], result["us"], []
        for carried, count in result["iterations"].items():
            each = us[carried] / us["layer"]
            found = f"more than {most} × {_written(each)}"
            cells.append(found if count is None else f"{count} × {_written(each)} = {_written(count * each)}")
        weights = "trained" if unit["trained"] else "initial"
        rows.append(
            f"| {unit['cell'].upper()} | {weights} | {unit['hidden']} | {unit['steps']} | {' | '.join(cells)} |"
        )
    return "\n".join(rows)


def _written(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"


def facts(document: dict[str, Any]) -> dict[str, Any]:
    """What docs/choosing.md tells of a run."""

    def span(values: Iterable[int]) -> str:
        found = sorted(set(values))
        return f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])

    protocol, results = document["protocol"], document["results"]
    counts = {c: span(r["iterations"][c] or protocol["most"] for r in results) for c in ("newton", "diagonal")}
    return counts | {
        "table": table_of(document),
        "steps": " and ".join(map(str, protocol["lengths"])),
        "tolerance": f"{protocol['tolerance']:g}",
        "device": device_of(document),
        "threads": document["environment"]["threads"],
        "commit": commit_of(document),
    }


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments, 130 if it was interrupted."""
    parser = arguments("parallel", __doc__, "one small width and length", "in bench/results")
    options = parser.parse_args(argv)
    path = options.json or RESULTS / f"cpu-parallel{'-quick' * options.quick}.json"
    described = f"cpu, {options.threads} threads"
    protocol = Protocol(described, (64,), (256,), training=50, min_time=0.1) if options.quick else Protocol(described)

    def measured(study: Study, unit: Unit) -> dict[str, Any]:
        return measure(unit, protocol)

    status = conduct(parser, options, path, protocol, plan(protocol), measured)
    if status == 0:
        print(table_of(json.loads(path.read_text())))
    return status

"""What the report and docs/choosing.md show of memory, cost and smaller weights: figures with their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from bench.exhibits import Document, Exhibit, command_of
from bench.formats import duration, mebibytes, number
from bench.speed_figures import slug
from bench.studies import findings
from bench.studies import regularise as options
from bench.studies.cost import KINDS as COST_KINDS
from bench.studies.cost import MODES, RECURRENT, SHORT, WHOLE
from bench.studies.findings import COST_LABELS, label
from bench.studies.tasks import TASKS
from fastseq.demo import plots
from fastseq.demo.plots import Curve

DASHED = ("gru_reset_before", "lstm_forget")


def memory(document: Document) -> list[Exhibit]:
    """All that the study has results of."""
    found = [_distances(document, task) for task in findings.tasks_in(document)]
    if findings.studied(document, "text"):
        found += [_contexts(document), _reach(document, "state"), _reach(document, "input")]
    return [*found, _rates(document)] if found else []


def mean_range(values: Sequence[float], places: int = 2) -> str:
    """``0.93 (0.91 to 0.96)``; the mean alone if there is one value."""
    mean = f"{sum(values) / len(values):.{places}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{places}f} to {max(values):.{places}f})"


def _curve(kind: str, points: dict[int, list[float]], centre: Callable[[list[float]], float]) -> Curve:
    values = list(points.values())
    band = {"low": [min(v) for v in values], "high": [max(v) for v in values]} if max(map(len, values)) > 1 else {}
    return Curve(kind, label(kind), list(points), [centre(v) for v in values], dashed=kind in DASHED, **band)  # type: ignore[arg-type]


def _legend(figure: Any, axis: Any, columns: int = 3) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns)


def _distances(document: Document, task: str) -> Exhibit:
    kinds = findings.kinds(document, task)
    scored = {kind: findings.scores(document, task, kind) for kind in kinds}
    distances = sorted({distance for found in scored.values() for distance in found})
    far = {kind: findings.remembered(document, task, kind) for kind in kinds}

    def draw() -> Any:
        figure = plots.figure(5.6, 3.4)
        axis = figure.subplots()
        plots.draw_curves(axis, [_curve(kind, scored[kind], findings.mean) for kind in kinds])
        plots.logarithmic(axis, distances, "distance: steps back")
        axis.set_ylabel("score (1: solved, 0: a guess)")
        axis.set_ylim(-0.12, 1.06)
        _legend(figure, axis)
        return figure

    rows = []
    for kind in kinds:
        for distance, found in scored[kind].items():
            steps = [s for s in findings.solved(document, task, kind, distance) if s is not None]
            told = f"{statistics.median(steps):.0f} ({len(steps)} of {len(found)} seeds)" if steps else "–"
            rows.append([label(kind), str(distance), mean_range(found), told])
    return Exhibit(
        name=f"memory-{task}",
        title=f"Memory: {TASKS[task].title}",
        alt="Lines of score over distance. Solved by every seed up to a distance of: "
        + "; ".join(f"{label(kind)} {far[kind] if far[kind] is not None else 'none measured'}" for kind in kinds),
        header=["layer", "distance", "score: mean (least to greatest)", "steps until solved, median"],
        rows=rows,
        command=str(document["command"]),
        draw=draw,
        note=f"Score after at most {document['protocol']['steps']} steps; bands from the least to the greatest of "
        f"{findings.seeds(document)} seeds. Training ends early once a task is solved.",
    )


def _contexts(document: Document) -> Exhibit:
    kinds = findings.kinds(document, "text")
    losses = {kind: findings.by_context(document, kind, "loss") for kind in kinds}
    errors = {kind: findings.by_context(document, kind, "excess_error") for kind in kinds}

    def draw() -> Any:
        figure = plots.figure(5.6, 3.4)
        axis = figure.subplots()
        plots.draw_curves(axis, [_curve(kind, losses[kind], findings.mean) for kind in kinds])
        plots.logarithmic(axis, document["protocol"]["contexts"], "characters of context given")
        axis.set_ylabel("loss, nats a character")
        _legend(figure, axis)
        return figure

    excess = {kind: findings.by_context(document, kind, "excess") for kind in kinds}
    rows = []
    for kind in kinds:
        for n, found in losses[kind].items():
            above, error = findings.mean(excess[kind][n]), findings.mean(errors[kind][n])
            rows.append([label(kind), str(n), mean_range(found, 3), f"{above:+.3f} ± {error:.3f}"])
    return Exhibit(
        name="memory-text",
        title="Memory: the next character of real text",
        alt="Lines of held-out loss over characters of context. The loss stops falling at: "
        + "; ".join(f"{label(kind)} {findings.stops_falling(document, kind)}" for kind in kinds),
        header=["layer", "context", "loss: mean (least to greatest)", "above the longest context's (± standard error)"],
        rows=rows,
        command=str(document["command"]),
        draw=draw,
        note=f"Trained {document['protocol']['text_steps']} steps on the standard library's sources, in stretches of "
        f"{max(document['protocol']['contexts'])} characters; judged at {document['protocol']['places']:,} held-out "
        "places.",
    )


def _reach(document: Document, of: str) -> Exhibit:
    kinds = [kind for kind in findings.kinds(document, "text") if findings.reach(document, kind, "after", of)]
    moments = {"before": "at initialisation", "after": "after training"}
    gains = {when: {kind: findings.reach(document, kind, when, of) for kind in kinds} for when in moments}
    formula = "‖∂h(T) / ∂h(T−k)‖" if of == "state" else "‖∂output(T) / ∂input(T−k)‖"

    def draw() -> Any:
        figure = plots.figure(5.6, 3.4)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (when, title) in zip(axes, moments.items(), strict=True):
            plots.draw_curves(axis, [_curve(kind, gains[when][kind], findings.geometric) for kind in kinds])
            plots.logarithmic(axis, (1, 5, 25, 100, 400), "k: steps back")
            axis.set_yscale("log")
            axis.set_ylim(1e-12, 10)
            axis.set_title(title)
        axes[0].set_ylabel("gain, 1: as it was" if of == "state" else "gain")
        _legend(figure, axes[0])
        return figure

    rows = [
        [label(kind), str(k), *(number(findings.geometric(gains[when][kind][k]), 2) for when in moments)]
        for kind in kinds
        for k in gains["before"][kind]
    ]
    fading = {kind: findings.faded(document, kind, "after", of) for kind in kinds}
    told = "; ".join(f"{label(k)} {f'by {n}' if n else 'at no distance measured'}" for k, n in fading.items())
    return Exhibit(
        name=f"reach-{of}",
        title=f"The gradient's reach: {'from state to state' if of == 'state' else 'from input to output'}",
        alt=f"Lines of {formula} over k. After training it has fallen to a hundredth of its value at 1: {told}",
        header=["layer", "k", *moments.values()],
        rows=rows,
        command=str(document["command"]),
        draw=draw,
        note=f"{formula} on held-out text, root mean square over sequences and directions, geometric mean over seeds. "
        + (
            "An LSTM's h and c are taken together." if of == "state" else "Attention has no state: this is its measure."
        ),
    )


def _rates(document: Document) -> Exhibit:
    """The learning rate of each kind of layer, and how it was chosen; a table alone."""
    tasks = [*findings.tasks_in(document), *(["text"] if findings.studied(document, "text") else [])]
    chosen = {task: findings.rates(document, task) for task in tasks}
    sizes = {r["unit"]["kind"]: {} for r in document["results"]}  # type: dict[str, dict[str, int]]
    for r in document["results"]:
        sizes[r["unit"]["kind"]][r["unit"]["task"]] = r["parameters"]
    tried = ", ".join(f"{rate:g}" for rate in document["protocol"]["rates"])
    return Exhibit(
        name="rates",
        title="Learning rates and sizes",
        alt="",
        header=["layer", *(f"{task}: rate" for task in tasks), *(f"{task}: parameters" for task in tasks)],
        rows=[
            [label(kind), *(f"{chosen[task].get(kind, float('nan')):g}" for task in tasks),
             *(f"{sizes[kind].get(task, 0):,}" for task in tasks)]
            for kind in sizes
        ],
        command=str(document["command"]),
        note=f"Rates tried: {tried}, each for every layer and task, with a seed that the study does not use; the one "
        "under which most was learned trained all of that layer's models on that task.",
    )  # fmt: skip


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(document: Document) -> list[Exhibit]:
    """Time, memory, and the cost of taking one step after another."""
    modes = [mode for mode in MODES if findings.times(document, mode, "lstm", WHOLE)]
    found = [_times(document, mode) for mode in modes]
    found += [_sequential(document, mode) for mode in modes]
    return found + [_peaks(document, mode) for mode in MODES if findings.peaks(document, mode, "lstm")]


def _panel(curves: list[Curve], lengths: list[int], what: str, straight: bool = False) -> Any:
    """One panel over T; y logarithmic unless ``straight``."""
    figure = plots.figure(5.6, 3.3)
    axis = figure.subplots()
    plots.draw_curves(axis, curves)
    plots.logarithmic(axis, lengths, "T: steps")
    if straight:
        axis.axhline(1, color="#808080", linewidth=0.8)
    else:
        plots.logarithmic_values(axis, [y for curve in curves for y in curve.y])
    axis.set_ylabel(what)
    _legend(figure, axis, 4)
    return figure


def _times(document: Document, mode: str) -> Exhibit:
    taken = {kind: findings.times(document, mode, kind, WHOLE) for kind in COST_KINDS}
    lengths = sorted(taken["lstm"])
    passed = {kind: findings.overtakes(taken["attention"], taken[kind]) for kind in RECURRENT}
    told = "; ".join(f"{COST_LABELS[kind]}: {f'from {at:,} on' if at else 'never'}" for kind, at in passed.items())
    curves = [
        Curve(kind, COST_LABELS[kind], lengths, [1e6 * taken[kind][t] / t for t in lengths]) for kind in COST_KINDS
    ]
    return Exhibit(
        name=f"cost-{mode}",
        title=f"Cost of length: time, {mode}",
        alt=f"Lines of microseconds a step over the number of steps, {mode}. Attention is slower than: {told}",
        header=["T", *COST_LABELS.values(), *(f"attention / {COST_LABELS[kind]}" for kind in RECURRENT)],
        rows=[
            [f"{t:,}", *(duration(taken[kind][t]) for kind in COST_KINDS),
             *(f"{taken['attention'][t] / taken[kind][t]:.2f}×" for kind in RECURRENT)]
            for t in lengths
        ],
        command=str(document["command"]),
        draw=lambda: _panel(curves, lengths, "microseconds a step"),
        note=f"One layer, {document['protocol']['width']} wide, one sequence, on {document['protocol']['device']}. "
        "A flat line is a cost in proportion to T; attention's rises with T, because its work is T².",
    )  # fmt: skip


def _sequential(document: Document, mode: str) -> Exhibit:
    whole = {kind: findings.times(document, mode, kind, WHOLE) for kind in RECURRENT}
    short = {kind: findings.times(document, mode, kind, SHORT) for kind in RECURRENT}
    lengths = sorted(whole["lstm"])
    price = {kind: [whole[kind][t] / short[kind][t] for t in lengths] for kind in RECURRENT}
    curves = [Curve(kind, COST_LABELS[kind], lengths, price[kind]) for kind in RECURRENT]
    last = ", ".join(f"{COST_LABELS[kind]} {values[-1]:.1f} times" for kind, values in price.items())
    return Exhibit(
        name=f"sequential-{mode}",
        title=f"The cost of taking one step after another, {mode}",
        alt="Lines of the time of one sequence over that of as many steps in short sequences. "
        f"At {lengths[-1]:,} steps: {last}",
        header=["T", *(f"{COST_LABELS[kind]}: one sequence / short ones" for kind in RECURRENT)],
        rows=[[f"{t:,}", *(f"{price[kind][i]:.2f}×" for kind in RECURRENT)] for i, t in enumerate(lengths)],
        command=str(document["command"]),
        draw=lambda: _panel(curves, lengths, "one sequence / sequences of 16 steps", True),
        note="The same number of steps, once as one sequence and once as sequences of 16 steps side by side: equal "
        "work, but only the latter can be done at once. It is the price of a recurrent layer, whose steps cannot be "
        "parallelised.",
    )


def _peaks(document: Document, mode: str) -> Exhibit:
    taken = {kind: p for kind in COST_KINDS if (p := findings.peaks(document, mode, kind))}
    lengths = sorted(taken["lstm"])
    curves = [Curve(k, COST_LABELS[k], lengths, [taken[k][t] / 2**20 for t in lengths]) for k in taken]
    longest = ", ".join(f"{COST_LABELS[kind]} {mebibytes(found[lengths[-1]])}" for kind, found in taken.items())
    return Exhibit(
        name=f"peak-{mode}",
        title=f"Cost of length: memory, {mode}",
        alt=f"Lines of peak memory over the number of steps, {mode}. At {lengths[-1]:,} steps: {longest}",
        header=["T", *(COST_LABELS[kind] for kind in taken)],
        rows=[[f"{t:,}", *(mebibytes(found[t]) for found in taken.values())] for t in lengths],
        command=str(document["command"]),
        draw=lambda: _panel(curves, lengths, "peak, MiB"),
        note="Above what weights and inputs take. Attention keeps no matrix of scores, so its memory grows with T and "
        "not with T².",
    )


SHADES = {
    options.PLAIN: "",
    "recurrent_dropout": "rnn",
    "weight_dropout": "gru",
    "zoneout": "lstm",
    "norm": "attention",
}
"""Of each option the layer whose colour its line has."""


def regularise(document: Document) -> Exhibit | None:
    """The loss on held-out text over the steps, with each option; None if there is no result of it yet."""
    studied, protocol = options.studied(document), document["protocol"]
    if not studied:
        return None
    goal, every = options.goal(document), protocol["every"]
    lowest = {option: [min(r["held_out"]) for r in results] for option, results in studied.items()}

    def draw() -> Any:
        figure = plots.figure(5.6, 3.6)
        axis = figure.subplots()
        curves = []
        for option, results in studied.items():
            looks = list(zip(*(r["held_out"] for r in results), strict=True))
            steps = [every * n for n in range(1, len(looks) + 1)]
            middle, low, high = ([f(seeds) for seeds in looks] for f in (statistics.fmean, min, max))
            name = options.label(option)
            curves.append(Curve(SHADES.get(option, ""), name, steps, middle, low, high, marked=False))
        plots.draw_curves(axis, curves)
        axis.set_xlabel("training steps")
        axis.set_ylabel("held-out loss, nats a character")
        least = min(min(found) for found in lowest.values())
        axis.set_ylim(least - 0.05, least + 0.9)
        _legend(figure, axis, 2)
        return figure

    rows = []
    for option, results in studied.items():
        last, first = [r["held_out"][-1] for r in results], [options.steps_to(document, r, goal) for r in results]
        rates = " ".join(dict.fromkeys(f"{r['rate']:g}" for r in results))
        cells = [mean_range(lowest[option], 3), mean_range(last, 3), mean_range(first, 0)]
        rows.append([options.label(option), rates, *cells])
    looks, size = ["lowest held-out loss", "held-out loss at the end"], f"{protocol['batch']} x {protocol['length']}"
    told = "; ".join(f"{options.label(option)} {findings.mean(found):.2f}" for option, found in lowest.items())
    return Exhibit(
        name="regularise",
        title="Options of the recurrence on little text",
        alt=f"Lines of held-out loss over training steps, with each option. The lowest, mean over seeds: {told}",
        header=["option", "learning rate", *looks, f"steps to a loss of {goal:.1f}"],
        rows=rows,
        command=command_of(document),
        draw=draw,
        note=f"An LSTM, {protocol['width']} wide, trained on {protocol['characters']:,} characters for "
        f"{protocol['steps']:,} steps of {size}; judged every {every} steps. Bands and brackets from the least to the "
        f"greatest of {max(map(len, studied.values()))} seeds.",
    )


def weights(document: Document, name: str) -> Exhibit:
    """Loss and time of a step with smaller weights."""
    models = document["models"]

    def draw() -> Any:
        figure = plots.figure(5.6, 0.5 + 1.3 * len(models))
        for axis, found in zip(figure.subplots(len(models), 1, squeeze=False)[:, 0], models, strict=True):
            names = list(found["variants"])
            bars = axis.barh(range(len(names)), [found["variants"][n]["step_us"] for n in names],
                             color=[plots.colour(n.split()[0]) for n in names])  # fmt: skip
            axis.bar_label(bars, [f"loss {found['variants'][n]['loss']:.4f}" for n in names], padding=3, fontsize=7)
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set(title=f"{found['model']}, {found['width']} wide", xlabel="microseconds a step")
        return figure

    fastest = [min(found["variants"], key=lambda v: found["variants"][v]["step_us"]) for found in models]
    told = ", ".join(f"{found['model']}: {best}" for found, best in zip(models, fastest, strict=True))
    return Exhibit(
        name=slug(name),
        title="Smaller weights",
        alt=f"Bars of the time of one step by kind of weights; the fastest are {told}",
        header=["model", "weights", "loss, nats a character", "time of a step"],
        rows=[
            [found["model"], variant, f"{one['loss']:.4f}", f"{number(one['step_us'])} µs"]
            for found in models
            for variant, one in found["variants"].items()
        ],
        command=command_of(document),
        draw=draw,
    )

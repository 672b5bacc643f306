"""What the report shows of speed: ratios shape by shape, the share of the error budget used, and what ran where."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.exhibits import (
    Document,
    Exhibit,
    Results,
    command_of,
    commit_of,
    date_of,
    device_of,
    mebibytes,
    number,
    on_gpu,
)
from bench.peers import OURS, PEERS
from fastseq.demo import plots

NOT_RUN = "not yet run on hardware"

KERNELS = (
    ("native C++ (CPU)", "recurrent", "native", False),
    ("native C++ (CPU)", "attention", "native", False),
    ("CUDA C++", "recurrent", "native", True),
    ("CUDA C++", "attention", "native", True),
    ("Triton", "recurrent", "triton", True),
    ("Triton", "attention", "triton", True),
)
"""Every set of kernels of the package: name, subject, backend, whether it needs a GPU."""


def label(contestant: str) -> str:
    if contestant == OURS.name:
        return OURS.label
    return PEERS[contestant].label if contestant in PEERS else contestant


def peers_of(cases: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Name and label of those that have a ratio in some case."""
    names = dict.fromkeys(name for case in cases for name, ratio in case["ratios"].items() if ratio is not None)
    return {name: label(name) for name in names if name != "best"}


def ratios(document: Document, name: str) -> list[Exhibit]:
    """A figure for each family of cases, worst first."""
    families: dict[str, list[dict[str, Any]]] = {}
    for case in document["cases"]:
        if case["ratios"].get("best") is not None:
            families.setdefault(case.get("family") or case["group"], []).append(case)
    return [_family(document, name, family, cases) for family, cases in families.items()]


def _family(document: Document, name: str, family: str, cases: list[dict[str, Any]]) -> Exhibit:
    cases = sorted(cases, key=lambda case: case["ratios"]["best"])
    peers = peers_of(cases)
    worst = cases[0]
    mean = statistics.geometric_mean(case["ratios"]["best"] for case in cases)
    header = ["case", "fastseq", *peers.values(), *(f"{each} / fastseq" for each in peers.values()), "budget used"]
    rows = []
    for case in cases:
        entries = case["contestants"]
        row = [case["name"], *(_time(entries.get(each)) for each in (OURS.name, *peers))]
        row += [_times(case["ratios"].get(peer)) for peer in peers]
        used = budget_used(case, OURS.name)
        rows.append([*row, "–" if used is None else f"{used:.0%}"])
    return Exhibit(
        name=slug(f"{name}-{family}"),
        title=family,
        alt=f"Bars of {', '.join(peers.values())} time over fastseq time for {len(cases)} cases of {family} on "
        f"{device_of(document)}, worst first: the lowest is {worst['ratios']['best']:.2f} at {worst['name']}, the "
        f"geometric mean against the best peer {mean:.2f}, the highest {cases[-1]['ratios']['best']:.2f}.",
        header=header,
        rows=rows,
        command=command_of(document, name),
        draw=lambda: _bars(cases, peers),
        note=f"Above 1 fastseq is faster. Geometric mean against the best peer: {mean:.2f}×.",
    )


def _bars(cases: list[dict[str, Any]], peers: dict[str, str]) -> Any:
    figure = plots.figure(5.6, 0.9 + len(cases) * (0.16 * len(peers) + 0.1))
    axis = figure.subplots()
    shown = [(case["name"], {p: r for p in peers if (r := case["ratios"].get(p)) is not None}) for case in cases]
    plots.draw_ratios(axis, [(shorten(name), row) for name, row in shown], peers)
    axis.set_xlabel("time of peer / time of fastseq")
    figure.legend(loc="outside upper right", ncols=len(peers))
    return figure


def groups(cases: list[dict[str, Any]], title: str) -> Any:
    """All cases as one figure, a panel for each group, worst first."""
    peers = peers_of(cases)
    panels: dict[str, list[tuple[str, dict[str, float]]]] = {}
    for case in cases:
        row = {peer: ratio for peer in peers if (ratio := case["ratios"].get(peer)) is not None}
        panels.setdefault(case["group"], []).append((shorten(case["name"]), row))
    heights = [len(rows) * (0.16 * len(peers) + 0.1) + 0.5 for rows in panels.values()]
    figure = plots.figure(7, sum(heights) + 0.8)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (group, rows) in zip(axes, panels.items(), strict=True):
        plots.draw_ratios(axis, rows, {p: name for p, name in peers.items() if any(p in row for _, row in rows)})
        axis.set_title(group)
    handles = {name: h for axis in axes for h, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=len(handles))
    axes[-1].set_xlabel("time of peer / time of fastseq (above 1: fastseq is faster)")
    figure.suptitle(title, fontsize=10, x=0.02, ha="left")
    return figure


def shorten(name: str) -> str:
    """A case's name with spaces, without what its family says."""
    said = ("multihead", "inference", "training", "forward", "bf16", "fp32")
    words = [word for word in name.split("-") if word not in said]
    return " ".join(words).replace("attention ", "").replace("gru_reset_before", "gru before")


def budget_used(case: dict[str, Any], contestant: str) -> float | None:
    """The largest share of its allowance that the error of any tensor takes; the budget is twice torch's own error in
    that type, and a floor."""
    entry = case["contestants"].get(contestant)
    if entry is None or not case.get("budget"):
        return None
    shares = [e / case["budget"][t] for t, e in entry["errors"].items() if e is not None and case["budget"].get(t)]
    return max(shares, default=None)


def budgets(document: Document, name: str) -> Exhibit | None:
    """How much of the error budget each contestant uses, group by group."""
    groups: dict[str, dict[str, list[float]]] = {}
    for case in document["cases"]:
        for contestant in case["contestants"]:
            if (used := budget_used(case, contestant)) is not None:
                groups.setdefault(case["group"], {}).setdefault(contestant, []).append(used)
    names = list(dict.fromkeys(c for shares in groups.values() for c in shares))
    if OURS.name not in names:
        return None
    ordered = sorted(groups, key=lambda group: -max(groups[group].get(OURS.name, [0])))
    worst = {group: max(groups[group].get(OURS.name, [0])) for group in ordered}

    def draw() -> Any:
        figure = plots.figure(5.6, 0.9 + 0.22 * len(ordered))
        axis = figure.subplots()
        for contestant in reversed(names):
            points = [(max(groups[g][contestant]), row) for row, g in enumerate(ordered) if contestant in groups[g]]
            axis.plot(*zip(*points, strict=True), "o", color=plots.colour(contestant), markersize=5, alpha=0.85,
                      label=label(contestant))  # fmt: skip
        axis.axvline(1, color="#c0392b", linewidth=1)
        axis.set_xlim(0, max(1.1, *(1.05 * max(shares) for each in groups.values() for shares in each.values())))
        axis.set_yticks(range(len(ordered)), ordered)
        axis.set_ylim(len(ordered) - 0.5, -0.5)
        axis.set_xlabel("largest error / budget (1: what is allowed to fastseq)")
        axis.grid(axis="x")
        figure.legend(loc="outside upper right", ncols=len(names))
        return figure

    return Exhibit(
        name=slug(f"{name}-budgets"),
        title="Error budgets used",
        alt=f"Dots of the largest error over its budget for {len(ordered)} groups of cases. fastseq's largest is "
        f"{max(worst.values()):.0%}, of {ordered[0]}.",
        header=["group", *(f"{label(each)}, largest" for each in names), *(f"{label(each)}, median" for each in names)],
        rows=[
            [group, *(_share(groups[group].get(c), max) for c in names),
             *(_share(groups[group].get(c), statistics.median) for c in names)]
            for group in ordered
        ],
        command=command_of(document, name),
        draw=draw,
        note="An error is measured against the same computation in float64. The budget is twice the error of torch's "
        "own answer in the same type, plus a floor; a case that exceeds it is refused and not timed.",
    )  # fmt: skip


def peaks(document: Document, name: str) -> Exhibit | None:
    """Peak memory of a training step, where the run measured it."""
    cases = [c for c in document["cases"] if c["contestants"].get(OURS.name, {}).get("peak_bytes")]
    taken = {c["name"]: {n: e["peak_bytes"] for n, e in c["contestants"].items() if e.get("peak_bytes")} for c in cases}
    peers = {n: label(n) for n in dict.fromkeys(n for peak in taken.values() for n in peak) if n != OURS.name}
    if not peers:
        return None
    over = {n: {peer: peak[peer] / peak[OURS.name] for peer in peers if peer in peak} for n, peak in taken.items()}
    ordered = sorted((n for n in over if over[n]), key=lambda n: min(over[n].values()))

    def draw() -> Any:
        figure = plots.figure(5.6, 0.9 + len(ordered) * (0.16 * len(peers) + 0.1))
        axis = figure.subplots()
        plots.draw_ratios(axis, [(shorten(n), over[n]) for n in ordered], peers)
        axis.set_xlabel("peak memory of peer / of fastseq")
        figure.legend(loc="outside upper right", ncols=len(peers))
        return figure

    return Exhibit(
        name=slug(f"{name}-peaks"),
        title="Peak memory of a training step",
        alt=f"Bars of {', '.join(peers.values())} peak memory over fastseq's for {len(ordered)} cases; the lowest is "
        f"{min(over[ordered[0]].values()):.2f} at {ordered[0]}.",
        header=["case", "fastseq", *peers.values(), *(f"{each} / fastseq" for each in peers.values())],
        rows=[
            [n, *(mebibytes(taken[n][c]) if c in taken[n] else "–" for c in (OURS.name, *peers)),
             *(_times(over[n].get(peer)) for peer in peers)]
            for n in ordered
        ],
        command=command_of(document, name),
        draw=draw,
        note="Above 1 fastseq takes less. Above what inputs and weights take; each in a process of its own.",
    )  # fmt: skip


def ledger(results: Results) -> Exhibit:
    """Which kernels ran on which hardware, at which commit; those that never did are said to."""
    rows = []
    for kernels, subject, backend, gpu in KERNELS:
        found = []
        for name, document in results.speed.items():
            if on_gpu(document) != gpu:
                continue
            cases = [c for c in document["cases"] if _subject(c) == subject and _backend(c) == backend]
            passed = sum(c["contestants"][OURS.name]["status"] in ("timed", "checked") for c in cases)
            if cases:  # a list of what ran, and not of what was planned
                found.append(
                    [f"{kernels}, {subject}", device_of(document), f"{passed} of {len(cases)} cases right",
                     commit_of(document), date_of(document), name]
                )  # fmt: skip
        for name, document in results.tests.items() if gpu else ():
            counts = _outcomes(document, backend, subject)
            if counts:
                told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
                found.append([f"{kernels}, {subject}", device_of(document), f"tests: {told}", commit_of(document),
                              date_of(document), name])  # fmt: skip
        rows += found or [[f"{kernels}, {subject}", NOT_RUN, "–", "–", "–", "–"]]
    return Exhibit(
        name="hardware",
        title="Hardware ledger",
        alt="",
        header=["kernels", "hardware", "checked against float64", "commit", "date", "file"],
        rows=rows,
        command="python -m bench --json PATH",
        note="A row comes from a result file, or there is none: kernels without one have not run on such hardware.",
    )


def _outcomes(document: Document, backend: str, subject: str) -> dict[str, int]:
    """How the tests of some kernels came out, those that were skipped left out."""
    counts: dict[str, int] = {}
    for suite, outcomes in document["kernels"].get(backend, {}).get("suites", {}).items():
        if subject in suite:
            for outcome, count in outcomes.items():
                if outcome != "skipped":
                    counts[outcome] = counts.get(outcome, 0) + count
    return counts


def _subject(case: dict[str, Any]) -> str:
    named = str(case.get("family") or case.get("group") or case["name"])
    return "attention" if "attention" in named or "multihead" in named else "recurrent"


def _backend(case: dict[str, Any]) -> str | None:
    return case["contestants"].get(OURS.name, {}).get("backend")


def weights(document: Document, name: str) -> Exhibit:
    """What smaller weights cost and bring."""
    rows = [
        [found["model"], variant, f"{one['loss']:.4f}", f"{number(one['step_us'])} µs"]
        for found in document["models"]
        for variant, one in found["variants"].items()
    ]

    def draw() -> Any:
        models = document["models"]
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

    fastest = [min(found["variants"], key=lambda v: found["variants"][v]["step_us"]) for found in document["models"]]
    return Exhibit(
        name=slug(name),
        title="Smaller weights",
        alt="Bars of the time of one step by kind of weights; the fastest are "
        + ", ".join(f"{found['model']}: {best}" for found, best in zip(document["models"], fastest, strict=True)),
        header=["model", "weights", "loss, nats a character", "time of a step"],
        rows=rows,
        command=command_of(document, name),
        draw=draw,
    )


def summary_figure(document: Document) -> Any:
    """The README's plot: of each family the geometric mean against each peer, worst family first."""
    lines = [line for line in document["summary"] if line["of"] in {case.get("family") for case in document["cases"]}]
    peers = {line["peer"]: label(line["peer"]) for line in lines if line["peer"] != "best"}
    rows = {line["of"]: {p["peer"]: p["geomean"] for p in lines if p["of"] == line["of"] and p["peer"] in peers}
            for line in lines}  # fmt: skip
    figure = plots.figure(7, 0.8 + len(rows) * 0.42)
    axis = figure.subplots()
    plots.draw_ratios(axis, list(rows.items()), peers)
    axis.set_xlabel(f"time of peer / time of fastseq, geometric mean ({device_of(document)}, {date_of(document)})")
    figure.legend(loc="outside upper right", ncols=len(peers))
    return figure


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.removesuffix(".json").replace(".json-", "-")).lower()


def _time(entry: dict[str, Any] | None) -> str:
    from bench.report import duration

    if entry is None or "median_us" not in entry:
        return "–" if entry is None or entry["status"] == "unavailable" else str(entry["status"])
    return duration(entry["median_us"] / 1e6)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


def _share(shares: list[float] | None, of: Any) -> str:
    return "–" if not shares else f"{of(shares):.0%}"

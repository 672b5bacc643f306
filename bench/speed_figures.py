"""What the report shows of speed: ratios shape by shape, the share of the error budget used, and what ran where."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.exhibits import Document, Exhibit, Results, command_of, commit_of, date_of, device_of, on_gpu, outcomes
from bench.formats import NONE, mebibytes, number, time_of, times
from bench.peers import OURS, label
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

Rows = Sequence[tuple[str, Mapping[str, float]]]
"""For each bar group its name, and its ratio to each peer."""


def bars(rows: Rows, peers: Mapping[str, str], what: str, size: tuple[float, float] | None = None) -> Any:
    """A figure of bars of ``what``."""
    figure = plots.figure(*(size or (5.6, 0.9 + len(rows) * (0.16 * len(peers) + 0.1))))
    axis = figure.subplots()
    plots.draw_ratios(axis, rows, peers)
    axis.set_xlabel(what)
    figure.legend(loc="outside upper right", ncols=len(peers))
    return figure


def ratios(document: Document, name: str) -> list[Exhibit]:
    """A figure for each family of cases, slowest first."""
    families: dict[str, list[Document]] = {}
    for case in document["cases"]:
        if case["ratios"].get("best") is not None:
            families.setdefault(case.get("family") or case["group"], []).append(case)
    return [_family(document, name, family, cases) for family, cases in families.items()]


def _family(document: Document, name: str, family: str, cases: list[Document]) -> Exhibit:
    cases = sorted(cases, key=lambda case: case["ratios"]["best"])
    found = dict.fromkeys(peer for case in cases for peer, ratio in case["ratios"].items() if ratio is not None)
    peers = {peer: label(peer) for peer in found if peer != "best"}
    rows, drawn = [], []
    for case in cases:
        entries, own = case["contestants"], {peer: case["ratios"].get(peer) for peer in peers}
        used = budget_used(case, OURS.name)
        shown = [time_of(entries.get(each)) for each in (OURS.name, *peers)]
        rows.append([case["name"], *shown, *map(times, own.values()), NONE if used is None else f"{used:.0%}"])
        drawn.append((shorten(case["name"]), {peer: ratio for peer, ratio in own.items() if ratio is not None}))
    best = [case["ratios"]["best"] for case in cases]
    mean = statistics.geometric_mean(best)
    return Exhibit(
        name=slug(f"{name}-{family}"),
        title=family,
        alt=f"Bars of {', '.join(peers.values())} time over fastseq time for {len(cases)} cases of {family} on "
        f"{device_of(document)}, slowest first: the lowest is {best[0]:.2f} at {cases[0]['name']}, the "
        f"geometric mean against the best peer {mean:.2f}, the highest {best[-1]:.2f}.",
        header=["case", "fastseq", *peers.values(), *(f"{each} / fastseq" for each in peers.values()), "budget used"],
        rows=rows,
        command=command_of(document, name),
        draw=lambda: bars(drawn, peers, "time of peer / time of fastseq"),
        note=f"Above 1 fastseq is faster. Geometric mean against the best peer: {mean:.2f}×.",
    )


def shorten(name: str) -> str:
    """A case's name with spaces, without what its family says."""
    said = ("multihead", "inference", "training", "forward", "bf16", "fp32")
    words = [word for word in name.split("-") if word not in said]
    return " ".join(words).replace("attention ", "").replace("gru_reset_before", "gru before")


def budget_used(case: Document, contestant: str) -> float | None:
    """The largest share of its budget that the error of any tensor takes."""
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
    worst = {group: max(shares.get(OURS.name, [0])) for group, shares in groups.items()}
    ordered = sorted(groups, key=lambda group: -worst[group])

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

    def shares_of(of: Callable[[list[float]], float], group: str) -> Iterable[str]:
        return (f"{of(groups[group][c]):.0%}" if c in groups[group] else NONE for c in names)

    return Exhibit(
        name=slug(f"{name}-budgets"),
        title="Error budgets used",
        alt=f"Dots of the largest error over its budget for {len(ordered)} groups of cases. fastseq's largest is "
        f"{max(worst.values()):.0%}, of {ordered[0]}.",
        header=["group", *(f"{label(each)}, largest" for each in names), *(f"{label(each)}, median" for each in names)],
        rows=[[group, *shares_of(max, group), *shares_of(statistics.median, group)] for group in ordered],
        command=command_of(document, name),
        draw=draw,
        note="An error is measured against the same computation in float64. The budget is twice the error of torch's "
        "own answer in the same type, plus a floor; a case that exceeds it is refused and not timed.",
    )


def peaks(document: Document, name: str) -> Exhibit | None:
    """Peak memory of a training step, if the run measured it."""
    cases = [c for c in document["cases"] if c["contestants"].get(OURS.name, {}).get("peak_bytes")]
    taken = {c["name"]: {n: e["peak_bytes"] for n, e in c["contestants"].items() if e.get("peak_bytes")} for c in cases}
    peers = {n: label(n) for n in dict.fromkeys(n for peak in taken.values() for n in peak) if n != OURS.name}
    over = {n: {peer: peak[peer] / peak[OURS.name] for peer in peers if peer in peak} for n, peak in taken.items()}
    ordered = sorted((n for n in over if over[n]), key=lambda n: min(over[n].values()))
    if not ordered:
        return None
    return Exhibit(
        name=slug(f"{name}-peaks"),
        title="Peak memory of a training step",
        alt=f"Bars of {', '.join(peers.values())} peak memory over fastseq's for {len(ordered)} cases; the lowest is "
        f"{min(over[ordered[0]].values()):.2f} at {ordered[0]}.",
        header=["case", "fastseq", *peers.values(), *(f"{each} / fastseq" for each in peers.values())],
        rows=[
            [n, *(mebibytes(taken[n][c]) if c in taken[n] else NONE for c in (OURS.name, *peers)),
             *(times(over[n].get(peer)) for peer in peers)]
            for n in ordered
        ],
        command=command_of(document, name),
        draw=lambda: bars([(shorten(n), over[n]) for n in ordered], peers, "peak memory of peer / of fastseq"),
        note="Above 1 fastseq takes less. Above what inputs and weights take; each in a process of its own.",
    )  # fmt: skip


def ledger(results: Results) -> Exhibit:
    """Which kernels ran on which hardware, at which commit; kernels that never ran are listed as such."""
    rows = []
    for kernels, subject, backend, gpu in KERNELS:
        ran: list[tuple[str, str, Document]] = []
        for name, document in results.speed.items():
            cases = [c for c in document["cases"] if _subject(c) == subject and _backend(c) == backend]
            if on_gpu(document) == gpu and cases:  # what ran, not what was planned
                passed = sum(c["contestants"][OURS.name]["status"] in ("timed", "checked") for c in cases)
                ran.append((f"{passed} of {len(cases)} cases right", name, document))
        for name, document in results.tests.items() if gpu else ():
            counts = {o: n for o, n in outcomes(document, backend, subject).items() if o != "skipped"}
            told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
            ran += [(f"tests: {told}", name, document)] if counts else []
        title = f"{kernels}, {subject}"
        rows += [[title, device_of(d), told, commit_of(d), date_of(d), name] for told, name, d in ran]
        rows += [] if ran else [[title, NOT_RUN, NONE, NONE, NONE, NONE]]
    return Exhibit(
        name="hardware",
        title="Hardware ledger",
        alt="",
        header=["kernels", "hardware", "checked against float64", "commit", "date", "file"],
        rows=rows,
        command="python -m bench --json PATH",
        note="Every row comes from a result file: kernels without one have not run on such hardware.",
    )


def _subject(case: Document) -> str:
    named = str(case.get("family") or case.get("group") or case["name"])
    return "attention" if "attention" in named or "multihead" in named else "recurrent"


def _backend(case: Document) -> str | None:
    return case["contestants"].get(OURS.name, {}).get("backend")


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
        command=command_of(document, name),
        draw=draw,
    )


def summary_figure(document: Document) -> Any:
    """The plot of docs/benchmarks.md: for each family the geometric mean against each peer, slowest family first."""
    families = {case.get("family") for case in document["cases"]}
    rows: dict[str, dict[str, float]] = {}
    for line in document["summary"]:
        if line["of"] in families:
            own = rows.setdefault(line["of"], {})
            own |= {line["peer"]: line["geomean"]} if line["peer"] != "best" else {}
    peers = {peer: label(peer) for peer in dict.fromkeys(peer for row in rows.values() for peer in row)}
    what = f"time of peer / time of fastseq, geometric mean ({device_of(document)}, {date_of(document)})"
    return bars(list(rows.items()), peers, what, (7, 0.8 + len(rows) * 0.42))


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.removesuffix(".json").replace(".json-", "-")).lower()

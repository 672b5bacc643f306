"""What the report shows of speed: ratios shape by shape, the share of the error budget used, and what ran where."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from bench.exhibits import Document, Exhibit, Results, command_of, commit_of, date_of, device_of, on_gpu, outcomes
from bench.formats import NONE, mebibytes, time_of, times
from bench.peers import OURS, label
from bench.run import NOISY
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
    """A figure of bars of ``what``, by default as wide as a phone's page, so that its labels are not made smaller."""
    figure = plots.figure(*(size or (3.7, 0.9 + len(rows) * (0.16 * len(peers) + 0.1))))
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
        mark = " !" * bool(case.get("noisy"))
        rows.append([case["name"] + mark, *shown, *map(times, own.values()), NONE if used is None else f"{used:.0%}"])
        drawn.append((shorten(case["name"]) + mark, {peer: ratio for peer, ratio in own.items() if ratio is not None}))
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
        command=command_of(document),
        draw=lambda: bars(drawn, peers, "time of peer / time of fastseq"),
        note=f"Above 1 fastseq is faster. Geometric mean against the best peer: {mean:.2f}×."
        + f" !: noisy, its rounds spread by more than {NOISY:.0%}." * any(case.get("noisy") for case in cases),
    )


def about(document: Document) -> str:
    """What a file has cases of, in words."""
    named = {"recurrent layers" if _subject(case) == "recurrent" else "attention" for case in document["cases"]}
    ours = {"triton": "Triton", "native": "CUDA C++"}.get(document.get("backend", ""), document.get("backend"))
    return " and ".join(sorted(named, reverse=True)) + f" ({ours})" * bool(ours)


def noisy(document: Document) -> int:
    """How many cases of a file are noisy."""
    return sum(bool(case.get("noisy")) for case in document["cases"])


def summary(files: Sequence[tuple[str, Document]]) -> Exhibit | None:
    """A row a file: how far fastseq is ahead of the fastest other way, in how many cases, and where it is worst."""
    rows = []
    for name, document in files:
        best = {c["name"]: c["ratios"]["best"] for c in document["cases"] if c["ratios"].get("best") is not None}
        if best:
            worst, ahead = min(best, key=best.__getitem__), sum(ratio > 1 for ratio in best.values())
            row = [f"{device_of(document)}: {about(document)}", times(statistics.geometric_mean(best.values()))]
            rows.append([*row, f"{ahead} of {len(best)}", times(best[worst]), str(noisy(document)), worst, name])
    header = ["measured", "mean", "above 1", "lowest", "noisy", "lowest at", "file"]
    title, note = "Time of the fastest other way / time of fastseq", "Above 1 fastseq is faster. Means are geometric."
    return Exhibit("speed-of-all", title, "", header, rows, "python -m bench report", note=note) if rows else None


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
        figure = plots.figure(3.7, 0.9 + 0.22 * len(ordered))
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
        command=command_of(document),
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
        command=command_of(document),
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
    return "attention" if re.search("attention|multihead|^hf", named) else "recurrent"


def _backend(case: Document) -> str | None:
    return case["contestants"].get(OURS.name, {}).get("backend")


def slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.removesuffix(".json").replace(".json-", "-")).lower()

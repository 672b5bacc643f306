"""How this project's plots look, and the two kinds of them: bars of ratios, and curves with bands.

The demo, the README and the bench's reports draw with these alone. Everything here needs matplotlib.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS, TORCH, ORT = "#2b83ba", "#d9722e", "#8a7fd0"

COLOURS = {
    "fastseq": OURS,
    "torch": TORCH,
    "ort": ORT,
    "rnn": "#d9722e",
    "gru": "#2b83ba",
    "lstm": "#2a9d6e",
    "attention": "#b25fc4",
}
"""Of contestants and of layers; all of them show on white and on near black. A variant takes its layer's, dashed."""

INK, GRID = "#010203", "#040506"
"""Stand-ins in SVG that a page fills in: text and axes take its text's colour, grid lines a fainter one."""


@contextlib.contextmanager
def style(follow_page: bool = False) -> Iterator[None]:
    """Plots made and saved inside look alike. ``follow_page``: transparent, in the colours of the page around, which
    :func:`svg` fills in; else on white."""
    import matplotlib

    ink, grid = (INK, GRID) if follow_page else ("#222222", "#dddddd")
    settings: Any = {
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), ink),
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "figure.facecolor": "none" if follow_page else "white",
        "axes.facecolor": "none",
        "savefig.facecolor": "none" if follow_page else "white",
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "font.size": 8.5,
        "legend.fontsize": 8,
        "svg.fonttype": "none" if follow_page else "path",
        "svg.hashsalt": "fastseq",  # the same numbers give the same file
    }
    with matplotlib.rc_context(settings):
        yield


def colour(name: str) -> str:
    """A contestant's or a layer's; a variant, ``lstm_forget``, has its layer's."""
    return COLOURS.get(name) or COLOURS.get(name.split("_")[0]) or "#808080"


def figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


@dataclass
class Curve:
    """One line: its points, a band from ``low`` to ``high`` where given; ``name`` gives the colour."""

    name: str
    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False
    width: float = 1.6
    marked: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def draw_curves(axis: Any, curves: Sequence[Curve]) -> None:
    """The curves, later ones on top. What is not a number leaves a gap."""
    for curve in curves:
        shade = colour(curve.name)
        if curve.low:
            axis.fill_between(curve.x, curve.low, curve.high, color=shade, alpha=0.18, linewidth=0)
        dashes = (0, (4, 2)) if curve.dashed else "solid"
        marker = "o" if curve.marked else None
        axis.plot(curve.x, curve.y, color=shade, linestyle=dashes, linewidth=curve.width, marker=marker, markersize=3,
                  label=curve.label, **curve.options)  # fmt: skip
    axis.grid(axis="y")


def draw_ratios(
    axis: Any,
    rows: Sequence[tuple[str, Mapping[str, float]]],
    labels: Mapping[str, str],
    spans: Mapping[tuple[str, str], tuple[float, float]] | None = None,
    shade: str | None = None,
) -> None:
    """Horizontal bars of peer's time / ours, from 1, the peer's own speed, to the ratio; the worst row on top.

    Args:
        axis: a matplotlib axis; its x becomes logarithmic.
        rows: name of each row, and its ratios by peer.
        labels: the peers, in the order of a row's bars, and what the legend calls them.
        spans: of (row, peer), where half of the measurements lay.
        shade: of all bars, rather than each peer's own.
    """
    rows = sorted(rows, key=lambda row: min(row[1].values(), default=math.inf))
    ends = [1.0]
    present = [peer for peer in labels if any(peer in ratios for _, ratios in rows)]
    thick = 0.8 / max(1, len(present))
    for i, peer in enumerate(present):
        bars = [(row, name, ratios[peer]) for row, (name, ratios) in enumerate(rows) if peer in ratios]
        places = [row + (i - (len(present) - 1) / 2) * thick for row, _, _ in bars]
        axis.barh(places, [ratio - 1 for _, _, ratio in bars], thick * 0.9, left=1, color=shade or colour(peer),
                  label=labels[peer])  # fmt: skip
        for place, (_, name, ratio) in zip(places, bars, strict=True):
            low, high = (spans or {}).get((name, peer), (ratio, ratio))
            if spans:
                axis.plot((low, high), (place, place), color="#808080", linewidth=1)
            end, side, align = (max(ratio, high), 3, "left") if ratio >= 1 else (min(ratio, low), -3, "right")
            axis.annotate(f"{ratio:.2f}×", (end, place), (side, 0), textcoords="offset points", va="center",
                          ha=align, fontsize=7)  # fmt: skip
            ends += [ratio, end]
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(1, color="#808080", linewidth=0.8)
    axis.set_xscale("log")
    lowest, highest = min(ends), max(ends)
    room = 1.15 * (max(highest, 1.2) / lowest) ** 0.09  # for the number at a bar's end
    axis.set_xlim(lowest / room if lowest < 1 else 0.93, max(highest, 1.2) * room)
    finer = [*([0.8, 1.25] if highest < 1.5 else []), *([1.5] if highest < 6 else []), *([3] if highest < 25 else [])]
    candidates = sorted([0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, *finer])
    ticks = [t for t in candidates if lowest / room <= t <= highest * room]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.minorticks_off()
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")
    axis.set_axisbelow(True)


def logarithmic(axis: Any, values: Sequence[float], name: str) -> None:
    """x on a logarithmic scale with these values as its ticks."""
    axis.set_xscale("log")
    axis.set_xticks(list(values), [f"{v:,g}" if v < 1024 or v % 1024 else f"{v // 1024:g}k" for v in values])
    axis.minorticks_off()
    axis.set_xlabel(name)


def logarithmic_values(axis: Any, values: Sequence[float]) -> None:
    """y on a logarithmic scale that holds these values, its ticks plain numbers."""
    from matplotlib.ticker import LogLocator

    low, high = min(v for v in values if v > 0), max(values)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=()))


def svg(drawn: Any, name: str, alt: str) -> str:
    """The figure as one ``<svg>`` element to stand in a page: it scales, refers to nothing outside, takes the page's
    colours where it was drawn with ``style(follow_page=True)``, and tells ``alt`` to those who cannot see it."""
    from html import escape

    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    used = set(re.findall(r"""(?:url\(#|href="#)([^)"]+)""", text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r"""(url\(#|href="#)""", rf"\1{name}-", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()  # type: ignore[union-attr]
    head = f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}" style="--width:{width}pt">'
    return head + text[text.index(">") + 1 :].strip()

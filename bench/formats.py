"""Numbers as text, as every table and page of the bench shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NONE = "–"
"""Stands in a table where there is no value."""


def duration(seconds: float) -> str:
    """Three digits: 1.23 µs, 45.6 µs, 789 µs, 12.3 ms, 1.00 s."""
    unit, factor = next(((u, f) for u, f in (("µs", 1e6), ("ms", 1e3)) if seconds * f < 999.5), ("s", 1.0))
    value = seconds * factor
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def times(ratio: float | None) -> str:
    """A ratio: 1.23×."""
    return NONE if ratio is None else f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.1g}×"


def time_of(entry: Mapping[str, Any] | None, parts: int = 1) -> str:
    """The time of a contestant in a result file, over ``parts``; its status if it was not timed."""
    if entry is None or entry["status"] == "unavailable":
        return NONE
    return duration(entry["median_us"] / 1e6 / parts) if "median_us" in entry else str(entry["status"])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits; with an exponent only if the number is very small or very large."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{float(f'{value:.{digits}g}'):,f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{max(1, digits - 1)}g}"


def mebibytes(count: float) -> str:
    return number(count / 2**20) + " MiB"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """A table in Markdown; ``right``: all columns but the first are aligned right."""
    rule = ["---", *["---:" if right else "---"] * (len(header) - 1)]
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in row) for row in (header, rule, *rows)]

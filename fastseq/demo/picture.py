"""One picture of the demo: the loss curves laid over each other, and the speeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastseq.demo import plots
from fastseq.demo.race import Race


def draw(races: list[Race], path: Path, where: str) -> None:
    """Write the picture of ``races`` to ``path``; ``where`` names the machine.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with plots.style():
        figure = plots.figure(4.0 * (len(races) + 1), 3.6)
        axes = figure.subplots(1, len(races) + 1, squeeze=False)[0]
        for axis, race in zip(axes, races, strict=False):
            steps = range(1, race.done + 1)
            both = ((race.theirs, "torch", "torch.nn", 4.0), (race.ours, "fastseq", "fastseq", 1.0))
            plots.draw_curves(axis, [
                plots.Curve(name, label, steps, side.losses[: race.done], width=width, marked=False,
                            options={"alpha": 0.55 if name == "torch" else 1.0})
                for side, name, label, width in both
            ])  # fmt: skip
            axis.set(title=race.kind.title, xlabel="step")
            axis.text(0.97, 0.62, f"largest difference\n{max(race.differences):.2g} (relative)", ha="right", fontsize=8,
                      transform=axis.transAxes)  # fmt: skip
            axis.legend(loc="upper right")
        axes[0].set_ylabel("loss, nats a character")
        _speeds(axes[-1], races)
        figure.suptitle(f"One model, one seed, two engines — {where}", fontsize=11)
        figure.savefig(path, dpi=140)


def _speeds(axis: Any, races: list[Race]) -> None:
    """How many times torch.nn's speed in training, and where half of the turns lay."""
    rows: list[tuple[str, dict[str, float]]] = []
    spans = {}
    for race in races:
        low, middle, high = race.speedup
        if math.isnan(middle):
            rows.append((f"{race.kind.name}\ntoo few steps", {}))
            continue
        name = f"{race.kind.name}\n{race.tokens_per_second(race.ours) / 1000:.0f} k/s"
        rows.append((name, {"torch": middle}))
        spans[name, "torch"] = (low, high)
    plots.draw_ratios(axis, rows, {"torch": "torch.nn's time / fastseq's"}, spans, plots.OURS)
    axis.set(title="training speed, torch.nn = 1", xlabel="k/s: thousand characters a second")

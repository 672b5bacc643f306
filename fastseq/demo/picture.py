"""One picture of the demo: the loss curves laid over each other, and the speeds."""

from __future__ import annotations

import math
from pathlib import Path

from fastseq.demo.race import Race

TORCH, OURS = "#d95f02", "#1b6ca8"


def draw(races: list[Race], path: Path, where: str) -> None:
    """Write the picture of ``races`` to ``path``; ``where`` names the machine.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (len(races) + 1), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(races) + 1, squeeze=False)[0]
    for axis, race in zip(axes, races, strict=False):
        steps = range(1, race.done + 1)
        axis.plot(steps, race.theirs.losses[: race.done], color=TORCH, linewidth=3.5, alpha=0.55, label="torch.nn")
        axis.plot(steps, race.ours.losses[: race.done], color=OURS, linewidth=1.0, label="fastseq")
        axis.set(title=race.kind.title, xlabel="step")
        axis.text(0.97, 0.62, f"largest difference\n{max(race.differences):.2g} (relative)", ha="right", fontsize=8,
                  transform=axis.transAxes)  # fmt: skip
        axis.legend(frameon=False)
    axes[0].set_ylabel("loss, nats a character")

    bars = axes[-1]
    for i, race in enumerate(races):
        for side, color, shift in ((race.theirs, TORCH, -0.2), (race.ours, OURS, 0.2)):
            speed = race.tokens_per_second(side) / 1000
            bars.bar(i + shift, speed, 0.38, color=color, alpha=0.55 if side is race.theirs else 1.0)
        height = max(race.tokens_per_second(side) for side in (race.theirs, race.ours)) / 1000
        if math.isnan(height):
            bars.text(i, 0, "too few\nsteps", ha="center", va="bottom", fontsize=8)
        else:
            label = f"{race.speedup[1]:.2f}×"
            bars.annotate(label, (i, height), (0, 4), textcoords="offset points", ha="center", weight="bold")
    bars.set_xticks(range(len(races)), [race.kind.name for race in races])
    bars.set(title="training speed", ylabel="thousand characters a second")
    bars.margins(y=0.15)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One model, one seed, two engines — {where}", fontsize=11)
    figure.savefig(path, dpi=140)

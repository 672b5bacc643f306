"""Train one model twice, on torch.nn and on fastseq, in turns, so that a busy machine slows both alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastseq import explain
from fastseq.demo.data import Text
from fastseq.demo.models import Kind
from fastseq.patch import Report, patch

TURN = 5
"""Steps that one side takes before the other side's turn."""

FEWEST_TURNS = 4
"""A speed is the median of at least so many turns, or is not told."""

EARLY, EARLY_TOLERANCE = 30, 1e-3
STRETCH, STRETCH_TOLERANCE = 50, 2e-2
"""Losses agree when no step of the first 30 differs by more than 0.1%, and no mean of 50 steps after them by more than
2%. Training is chaotic: the LSTM of this demo, its weights moved by one rounding and run by torch twice, is 1% apart at
single steps a few hundred steps later, as two right answers are that differ by rounding."""


@dataclass
class Side:
    """One of the two: its model, and what was measured."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    turns: list[float] = field(default_factory=list)  # seconds a step, of each whole turn

    def take_turn(self, batches: list[tuple[Tensor, Tensor]], tell: Callable[[float], None]) -> None:
        synchronize(batches[0][0].device)
        start = time.perf_counter()
        for ids, following in batches:
            self.optimizer.zero_grad()
            scores, _ = self.model(ids)
            loss = cross_entropy(scores.flatten(0, 1), following.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses.append(loss.item())
            tell(self.losses[-1])
        synchronize(batches[0][0].device)
        self.turns.append((time.perf_counter() - start) / len(batches))


@dataclass
class Race:
    """What came of one model. ``theirs`` ran on torch.nn, ``ours`` on fastseq."""

    kind: Kind
    theirs: Side
    ours: Side
    report: Report
    runs_on: str
    steps: int
    interrupted: bool = False
    out_of_time: bool = False

    @property
    def done(self) -> int:
        """Steps that both sides took."""
        return min(len(self.theirs.losses), len(self.ours.losses))

    @property
    def differences(self) -> list[float]:
        """The relative difference between the two losses, step by step; infinite where one is not a number."""
        pairs = zip(self.theirs.losses, self.ours.losses, strict=False)
        return [_apart(theirs, ours) for theirs, ours in pairs]

    @property
    def early_difference(self) -> float:
        """The largest of the first steps."""
        return max(self.differences[:EARLY], default=0.0)

    @property
    def stretch_difference(self) -> float:
        """The largest relative difference between means of the later steps; 0 where there are too few."""
        means = []
        for start in range(EARLY, self.done - STRETCH + 1, STRETCH):
            sums = (sum(side.losses[start : start + STRETCH]) for side in (self.theirs, self.ours))
            means.append(_apart(*sums))
        return max(means, default=0.0)

    @property
    def agrees(self) -> bool:
        finite = all(map(math.isfinite, self.differences))
        return finite and self.early_difference <= EARLY_TOLERANCE and self.stretch_difference <= STRETCH_TOLERANCE

    def tokens_per_second(self, side: Side) -> float:
        """From the median turn, without the first, which warms up; NaN where there were too few."""
        turns = side.turns[1:]
        return self.kind.batch * self.kind.length / statistics.median(turns) if len(turns) >= FEWEST_TURNS else math.nan

    @property
    def speedup(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile over the turns of torch's time / fastseq's time."""
        ratios = [a / b for a, b in zip(self.theirs.turns, self.ours.turns, strict=False)][1:]
        if len(ratios) < FEWEST_TURNS:
            return math.nan, math.nan, math.nan
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, middle, high


def _apart(theirs: float, ours: float) -> float:
    difference = abs(theirs - ours) / max(abs(theirs), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def start(kind: Kind, text: Text, steps: int, device: torch.device, seed: int) -> Race:
    """Build the model twice from the same seed, and patch one of the two."""

    def side(name: str) -> Side:
        torch.manual_seed(seed)
        model = kind.build(len(text.symbols)).to(device)
        return Side(name, model, torch.optim.Adam(model.parameters(), kind.learning_rate))

    theirs, ours = side("torch.nn"), side("fastseq")
    report = patch(ours.model)
    sample = torch.zeros(kind.batch, kind.length, dtype=torch.int64, device=device)
    runs_on = explain(ours.model, sample).splitlines()[0]
    return Race(kind, theirs, ours, report, runs_on, steps)


def run(race: Race, text: Text, seed: int, seconds: float, tell: Callable[[int, float, float], None]) -> None:
    """Run the race; Ctrl-C or running out of ``seconds`` ends it early and leaves what was done.

    ``tell(steps, torch's loss, fastseq's loss)`` is called after each step of either side, with the losses of the last
    step that both have made.
    """
    device = next(race.ours.model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    longest_turn = 0.0

    def told(_: float) -> None:
        theirs, ours = (side.losses[race.done - 1] if race.done else math.nan for side in (race.theirs, race.ours))
        tell(len(race.theirs.losses) + len(race.ours.losses), theirs, ours)

    order = [race.theirs, race.ours]
    try:
        while race.done < race.steps:
            before = time.perf_counter()
            if before - start + longest_turn > seconds:
                race.out_of_time = True
                return
            n = min(TURN, race.steps - race.done) if race.done else 1  # the first one warms up
            batches = [text.batch(race.kind.batch, race.kind.length, generator) for _ in range(n)]
            batches = [(ids.to(device), following.to(device)) for ids, following in batches]
            for side in order:
                side.take_turn(batches, told)
            order.reverse()
            longest_turn = max(longest_turn, time.perf_counter() - before)
    except KeyboardInterrupt:
        race.interrupted = True


@torch.no_grad()
def held_out_bits(race: Race, text: Text) -> float:
    """Bits a character that the fastseq model needs for text it has not seen."""
    model, length = race.ours.model, race.kind.length
    rows = min(32, (len(text.held_out) - 1) // length)
    device = next(model.parameters()).device
    ids = text.held_out[: rows * length].view(rows, length).to(device)
    following = text.held_out[1 : rows * length + 1].view(rows, length).to(device)
    model.eval()
    scores, _ = model(ids)
    return cross_entropy(scores.flatten(0, 1), following.flatten()).item() / math.log(2)


@torch.no_grad()
def write(race: Race, text: Text, prompt: str, characters: int, seed: int) -> str:
    """Text that the fastseq model writes, one character at a time, from the prompt on."""
    model = race.ours.model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids, state, written = text.ids(prompt).unsqueeze(0).to(device), None, []
    for _ in range(characters):
        scores, state = model(ids, state)
        chances = torch.softmax(scores[0, -1].float().cpu() / 0.7, 0)
        if not torch.isfinite(chances).all():
            break
        ids = torch.multinomial(chances, 1, generator=generator).view(1, 1).to(device)
        written.append(text.symbols[int(ids)])
    return prompt + "".join(written)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

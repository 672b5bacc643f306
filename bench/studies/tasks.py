"""Tasks whose answer lies a known distance back: recall, copying, adding; and the next character of real text.

Every batch of the first three is drawn anew, so nothing can be memorised. A score is 1 if the task is solved and about
0 if the past is ignored: accuracy or explained variance, with chance subtracted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, mse_loss, one_hot

SYMBOLS = 8
COPIED = 5
"""Symbols of a copying sequence."""

LEAD = 5
"""Symbols before the marked one in recall."""

CONTEXTS = (1, 2, 5, 10, 25, 50, 100, 200, 400)
"""Characters of context at which next-character loss is measured."""


@dataclass(frozen=True)
class Batch:
    """x: [B,T,F] floats, or int64 [B,T] characters; the target belongs to the last ``target.size(1)`` steps: int64
    [B,n] classes, or floats [B,n]."""

    x: Tensor
    target: Tensor


@dataclass(frozen=True)
class Task:
    """features, outputs: the sizes of the model's input and output. ``draw(batch, distance, generator)``."""

    name: str
    title: str
    features: int
    outputs: int
    distances: tuple[int, ...]
    draw: Callable[[int, int, Generator], Batch]

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy, or mean squared error of a task that asks for a number. predicted [B,n,outputs]."""
        if self.outputs == 1:
            return mse_loss(predicted.squeeze(-1), target)
        return cross_entropy(predicted.flatten(0, 1), target.flatten())

    def score(self, predicted: Tensor, target: Tensor) -> float:
        """1 if every answer is right, 0 if they are no better than a guess, below 0 if they are worse."""
        if self.outputs == 1:
            return float(1 - mse_loss(predicted.squeeze(-1), target) / ADDING_VARIANCE)
        right = float((predicted.argmax(-1) == target).float().mean())
        return (right - 1 / SYMBOLS) / (1 - 1 / SYMBOLS)


def recall(batch: int, distance: int, generator: Generator) -> Batch:
    """Random symbols, one of them marked, ``distance`` steps before the end; at the end: which one was it?"""
    length = LEAD + 1 + distance
    symbols = torch.randint(SYMBOLS, (batch, length), generator=generator)
    mark = torch.zeros(batch, length, 1)
    mark[:, LEAD] = 1
    return Batch(torch.cat([one_hot(symbols, SYMBOLS).float(), mark], -1), symbols[:, LEAD : LEAD + 1])


def copying(batch: int, distance: int, generator: Generator) -> Batch:
    """Symbols, silence, a signal, and then each symbol again, ``distance`` steps after it came (Hochreiter and
    Schmidhuber 1997; Arjovsky et al. 2016)."""
    symbols = torch.randint(SYMBOLS, (batch, COPIED), generator=generator)
    x = torch.zeros(batch, distance + COPIED, SYMBOLS + 1)
    x[:, :COPIED, :SYMBOLS] = one_hot(symbols, SYMBOLS).float()
    x[:, distance, SYMBOLS] = 1
    return Batch(x, symbols)


def adding(batch: int, distance: int, generator: Generator) -> Batch:
    """Random numbers, two of them marked; at the end: their sum (Hochreiter and Schmidhuber 1997). The first marked one
    is ``distance`` steps back, the other anywhere after it."""
    numbers = torch.rand(batch, distance + 1, generator=generator)
    mark = torch.zeros(batch, distance + 1)
    mark[:, 0] = 1
    mark[torch.arange(batch), torch.randint(1, distance + 1, (batch,), generator=generator)] = 1
    return Batch(torch.stack([numbers, mark], -1), (numbers * mark).sum(1, keepdim=True))


ADDING_VARIANCE = 2 / 12
"""Of the sum of two numbers even in [0, 1): the error of the best constant answer."""


@functools.cache
def text() -> tuple[Tensor, Tensor, str]:
    """The standard library's sources as characters: int64 to train on and int64 held out, and the symbols."""
    from fastseq.demo import data

    loaded = data.load(None, 10_000)
    return loaded.train, loaded.held_out, loaded.symbols


def characters(batch: int, length: int, generator: Generator) -> Batch:
    """Stretches of the training text; after each of its characters: what is the next one?"""
    train, _, _ = text()
    starts = torch.randint(len(train) - length, (batch, 1), generator=generator)
    places = starts + torch.arange(length)
    return Batch(train[places], train[places + 1])


TASKS = {
    task.name: task
    for task in (
        Task("recall", "recall of a marked symbol", SYMBOLS + 1, SYMBOLS, (2, 5, 10, 25, 50, 100, 200), recall),
        Task("copying", f"copying of {COPIED} symbols", SYMBOLS + 1, SYMBOLS, (5, 10, 25, 50, 100, 200), copying),
        Task("adding", "adding two marked numbers", 2, 1, (5, 10, 25, 50, 100, 200), adding),
    )
}

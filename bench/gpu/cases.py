"""What is measured on a GPU: the cases, and the order in which a short run takes them.

The whole product of shapes, types and options is far more than a run has time for. So: first a core of what matters
most; then cases with values that no earlier case had; then the rest in an order that is shuffled but always the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product

from bench.cases import DTYPES, GATES, Attention, Case, Recurrent

FAMILIES = ("recurrent", "attention")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Layers(Case):
    """A stack of recurrent layers on a GPU, I = H, products of x included; ``inference`` or ``training``.

    cell: ``rnn`` (tanh), ``rnn_relu``, ``gru``, ``gru_reset_before``, ``lstm``. packed: sequences of T, and shorter.
    """

    cell: str
    steps: int
    batch: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False

    @property
    def name(self) -> str:
        more = f"-L{self.layers}" * (self.layers > 1) + "-bi" * self.bidirectional + "-packed" * self.packed
        return f"{self.cell}-{self.mode}-T{self.steps}-B{self.batch}-H{self.hidden}{more}-{DTYPES[self.dtype]}"

    @property
    def group(self) -> str:
        return f"{self.cell} {self.mode} {DTYPES[self.dtype]}"

    @property
    def family(self) -> str:
        return "recurrent"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def plain(self) -> Recurrent:
        """The layer and its inputs as a case of the CPU's benchmark, without lengths."""
        return Recurrent(self.mode, self.dtype, self.cell, self.steps, self.batch, self.hidden, self.hidden,
                         layers=self.layers, directions=self.directions)  # fmt: skip

    @property
    def operations(self) -> float:
        """Floating-point operations of the products; the backward pass has twice those of the forward pass."""
        wide = self.hidden + (self.layers - 1) * self.directions * self.hidden  # of x, layer by layer
        rows = 2.0 * self.steps * self.batch * GATES[self.cell] * self.hidden * self.directions
        return rows * (wide + self.layers * self.hidden) * (3 if self.training else 1)

    @property
    def bytes(self) -> float | None:
        return None

    @property
    def seconds(self) -> float:
        """What the case is expected to need, timing included: for the plan."""
        a_call = self.steps * self.layers * self.directions * 10e-6 * (3 if self.training else 1)
        return 1.0 + 25 * a_call + (0.5 if self.steps > 500 else 0.0)


@dataclass(frozen=True)
class Heads(Attention):
    """softmax(q kᵀ/√D) v on a GPU; ``forward``, or ``backward`` (the backward pass alone).

    kind: ``dense``; ``decode`` (one query, the last); ``varlen`` (a packed batch of B sequences, the longest of
    ``queries``). window: a query sees so many keys before it, and its own (0: all keys).
    """

    window: int = 0

    @property
    def family(self) -> str:
        return "attention"

    def _suffix(self) -> str:
        return f"-window{self.window}" * (self.window > 0) + f"-{DTYPES[self.dtype]}"

    @property
    def training(self) -> bool:
        return self.mode == "backward"

    def lengths(self) -> list[int]:
        """Sequences of a varlen case: from the longest down to a quarter of it, evenly."""
        if self.kind != "varlen":
            return [self.queries] * self.batch
        last = max(1, self.batch - 1)
        return [self.queries - (self.queries * 3 // 4) * b // last for b in range(self.batch)]

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key it sees, in the whole batch, for one head."""
        total = 0.0
        for queries in self.lengths():
            keys = queries if self.kind == "varlen" else self.keys
            if not self.causal:
                total += queries * keys
            else:
                seen = min(self.window + 1, keys) if self.window else keys
                early = min(queries, seen)  # these rows see 1, 2, ... keys (Tq = Tk)
                total += early * (early + 1) / 2 + (queries - early) * seen
        return total

    @property
    def operations(self) -> float:
        """Of the products: two in the forward pass, five in the backward."""
        return (10 if self.training else 4) * self.dim * self.pairs * self.heads

    @property
    def bytes(self) -> float:
        """Each input read once, each output written once."""
        size = 4 if self.dtype == "float32" else 2
        rows = sum(self.lengths())
        keys = rows if self.kind == "varlen" else self.batch * self.keys
        q, kv = rows * self.heads * self.dim, 2 * keys * self.kv_heads * self.dim
        return size * (4 * q + 2 * kv if self.training else 2 * q + kv)

    @property
    def seconds(self) -> float:
        """What the case is expected to need: its truth in float64 for a few heads, the check, and the timing."""
        return 1.5 + self.operations / self.heads * 3 / 10e12 + 40 * self.operations / 200e12 + 2 * (self.keys > 8000)


CELLS = ("lstm", "gru", "rnn", "rnn_relu", "gru_reset_before")
BATCHES, HIDDEN, STEPS = (1, 4, 16, 17, 64, 128), (64, 128, 192, 256, 512, 768, 1024), (1, 128, 1024)


def recurrent_core() -> Iterator[Layers]:
    """The cases cuDNN is best at, those it is not good at, and a single step."""
    for mode in ("inference", "training"):
        yield Layers(mode, "float16", "lstm", 1024, 16, 768)
        yield Layers(mode, "bfloat16", "lstm", 1024, 16, 512)
        yield Layers(mode, "bfloat16", "gru", 1024, 16, 512)
        yield Layers(mode, "bfloat16", "gru", 128, 64, 256)
        yield Layers(mode, "bfloat16", "lstm", 128, 17, 128)
        yield Layers(mode, "bfloat16", "lstm", 128, 64, 256, 2, True)
        yield Layers(mode, "float16", "lstm", 128, 64, 512, 1, False, True)
        yield Layers(mode, "float32", "lstm", 128, 64, 512)
        yield Layers(mode, "bfloat16", "gru_reset_before", 128, 16, 256)
        yield Layers(mode, "float16", "rnn", 128, 64, 256)
    yield Layers("inference", "bfloat16", "lstm", 1, 1, 512)
    yield Layers("inference", "bfloat16", "gru", 1, 64, 1024)


def recurrent_grid() -> Iterator[Layers]:
    """Everything. The GRU that resets before its product has one layer and one direction: torch has none to check a
    stack against. A sequence of one step is not packed."""
    for mode, dtype, cell, steps, batch, hidden, layers, both, packed in product(
        ("inference", "training"), (*HALVES, "float32"), CELLS, STEPS, BATCHES, HIDDEN, (1, 2), (False, True),
        (False, True),
    ):  # fmt: skip
        plain = layers == 1 and not both and not packed
        if (plain or cell != "gru_reset_before") and not (packed and steps == 1):
            yield Layers(mode, dtype, cell, steps, batch, hidden, layers, both, packed)


LENGTHS, DIMS = (50, 200, 512, 1024, 2048, 4096, 8192, 16384, 32768), (64, 128, 256)


def dense(mode: str, dtype: str, length: int, dim: int, causal: bool, window: int = 0, grouped: bool = True) -> Heads:
    """About 8k to 32k rows in all, 16 to 64 heads by their size, of which 8 hold keys where they are grouped."""
    heads = {64: 32, 128: 64, 256: 16}[dim] if length > 200 else 16
    batch = max(1, 8192 // length)
    return Heads(mode, dtype, "dense", batch, heads, 8 if grouped else heads, length, length, dim, causal, window)


def decode(dtype: str, batch: int, length: int, dim: int) -> Heads:
    return Heads("forward", dtype, "decode", batch, 32, 8, 1, length, dim)


def varlen(mode: str, dtype: str, length: int, dim: int, causal: bool) -> Heads:
    return Heads(mode, dtype, "varlen", 8, 16, 16, length, length, dim, causal)


def attention_core() -> Iterator[Heads]:
    """What others publish (D 128, 8k), then each case that is hard for us."""
    for mode in ("forward", "backward"):
        for causal in (False, True):
            yield dense(mode, "bfloat16", 8192, 128, causal)
    yield decode("bfloat16", 16, 8192, 128)
    yield decode("bfloat16", 16, 65536, 128)
    for mode in ("forward", "backward"):
        yield dense(mode, "bfloat16", 4096, 64, True)
        yield dense(mode, "bfloat16", 4096, 256, True)
        yield dense(mode, "bfloat16", 8192, 64, True, 512)
        yield dense(mode, "float16", 2048, 128, True, 0, False)
        yield varlen(mode, "bfloat16", 2048, 128, True)
        yield dense(mode, "bfloat16", 200, 64, False)
        yield dense(mode, "bfloat16", 50, 64, False)
    yield dense("forward", "bfloat16", 32768, 128, True)


def attention_grid() -> Iterator[Heads]:
    for mode, dtype, length, dim, causal, grouped in product(
        ("forward", "backward"), HALVES, LENGTHS, DIMS, (False, True), (True, False)
    ):
        yield dense(mode, dtype, length, dim, causal, 0, grouped)
        if causal and length > 1024:
            for window in (256, 1024):
                yield dense(mode, dtype, length, dim, causal, window, grouped)
        if grouped and 200 <= length <= 4096:
            yield varlen(mode, dtype, length, dim, causal)
    for dtype, batch, length, dim in product(HALVES, (16, 32, 64), (8192, 16384, 32768, 65536), (64, 128)):
        if batch * length * dim <= 16 * 65536 * 128:
            yield decode(dtype, batch, length, dim)


def _axes(case: Case) -> Iterator[tuple[object, ...]]:
    """The values of a case: each of its fields, by mode and, in the recurrent layers, cell."""
    fields = asdict(case)
    for name, value in fields.items():
        yield case.mode, fields.get("cell", fields.get("kind")), name, value


def ordered(core: Iterable[Case], grid: Iterable[Case]) -> list[Case]:
    """The core, then the rest by how many values each has that no earlier one had, then shuffled."""
    first = list(dict.fromkeys(core))
    chosen, seen = list(first), {axis for case in first for axis in _axes(case)}
    rest = sorted(dict.fromkeys(grid), key=lambda case: zlib.crc32(case.name.encode()))
    rest = [case for case in rest if case not in set(first)]
    later: list[Case] = []
    for least in (4, 3, 2, 1):  # those with most new values first, without sorting again after each
        later = []
        for case in rest:
            new = [axis for axis in _axes(case) if axis not in seen]
            if len(new) >= least:
                chosen.append(case)
                seen.update(new)
            else:
                later.append(case)
        rest = later
    return chosen + rest


@cache
def plan(family: str) -> tuple[Case, ...]:
    """Every case of a family, in the order of a run."""
    if family == "recurrent":
        return tuple(ordered(recurrent_core(), recurrent_grid()))
    return tuple(ordered(attention_core(), attention_grid()))


def tiny(family: str) -> tuple[Case, ...]:
    """Small cases of every kind for trying the runner, on a CPU too."""
    if family == "recurrent":
        return (
            Layers("inference", "float32", "lstm", 5, 3, 8),
            Layers("training", "float32", "gru", 4, 2, 8, 2, True),
            Layers("training", "float32", "lstm", 4, 3, 8, packed=True),
            Layers("inference", "float32", "gru_reset_before", 4, 2, 8),
            Layers("training", "bfloat16", "lstm", 4, 5, 40),
            Layers("training", "bfloat16", "gru", 64, 3, 16, 3),  # windows of time, layers side by side
        )
    return (
        Heads("forward", "float32", "dense", 2, 4, 2, 33, 33, 16, True),
        Heads("backward", "float32", "dense", 1, 4, 4, 40, 40, 16, True, 7),
        Heads("backward", "float32", "varlen", 3, 2, 2, 24, 24, 16, True),
        Heads("forward", "float32", "decode", 2, 4, 2, 1, 64, 16),
        Heads("forward", "bfloat16", "dense", 1, 4, 2, 70, 70, 64, True),
        Heads("backward", "bfloat16", "dense", 1, 4, 2, 70, 70, 64),
        Heads("backward", "float16", "dense", 1, 2, 1, 150, 150, 20, True, 40),  # rows of 40 bytes
        Heads("backward", "float16", "varlen", 3, 4, 2, 150, 150, 128, True),
        Heads("backward", "bfloat16", "dense", 1, 2, 1, 140, 140, 256, True),
        Heads("forward", "bfloat16", "dense", 1, 2, 1, 400, 400, 128),
        Heads("forward", "bfloat16", "decode", 2, 8, 2, 1, 600, 128),
    )


def chosen(family: str, patterns: Sequence[str], small: bool) -> list[Case]:
    """The plan, or what is in it and has one of ``patterns`` in its name."""
    cases = tiny(family) if small else plan(family)
    return [case for case in cases if not patterns or any(pattern in case.name for pattern in patterns)]

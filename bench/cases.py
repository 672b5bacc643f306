"""The registry: what is measured, under which name, on which inputs.

A case is a value: two equal cases have the same inputs, drawn from a seed that is the case's own name.
Letters: T time steps, B batch, I input features, H hidden units; in attention H heads, D features a head; E features
of an embedding, those of all heads.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

import torch
from torch import Tensor

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Data types and how they are written in names and tables."""


@dataclass(frozen=True)
class Case:
    """What all cases share. ``name`` is unique; ``group`` is the table it stands in; geometric means are given of each
    group and of each ``family``, a union of groups (empty: in none)."""

    mode: str
    dtype: str

    @property
    def name(self) -> str:
        raise NotImplementedError

    @property
    def group(self) -> str:
        raise NotImplementedError

    @property
    def family(self) -> str:
        raise NotImplementedError

    @property
    def default(self) -> bool:
        """Measured when nothing was asked for in particular."""
        raise NotImplementedError

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def _suffix(self) -> str:
        return "" if self.dtype == "float32" else f"-{DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Recurrent(Case):
    """A layer, or a stack of them, over a whole sequence (``inference``, ``training``), or one ``step`` of B = 1 that
    hands its state on; a cell in training has a batch and one step.

    cell: ``rnn`` (tanh), ``gru``, ``gru_reset_before`` or ``lstm``; as_cell: the layer's RNNCell, GRUCell, LSTMCell.
    weights: the matrices have only numbers of this smaller type, in everybody's copy, and fastseq is patched to use it
    (``fastseq.patch(weights=)``); the peers read them as float32.
    """

    cell: str
    steps: int
    batch: int
    features: int
    hidden: int
    as_cell: bool = False
    weights: str = ""
    layers: int = 1
    directions: int = 1

    @property
    def stacked(self) -> bool:
        return self.layers * self.directions > 1

    @property
    def name(self) -> str:
        if self.mode == "step":
            return f"{self.cell}{'_cell' if self.as_cell else ''}-step-H{self.hidden}{self._suffix()}"
        if self.as_cell:
            shape = f"B{self.batch}-I{self.features}-H{self.hidden}"
            return f"{self.cell}_cell-{self.mode}-{shape}{self._suffix()}"
        shape = f"T{self.steps}-B{self.batch}-I{self.features}-H{self.hidden}"
        if self.stacked:
            shape += f"-L{self.layers}" + "-bi" * (self.directions - 1)
        return f"{self.cell}{'_stack' * self.stacked}-{self.mode}-{shape}{self._suffix()}{self._weights('-')}"

    def _weights(self, before: str) -> str:
        return f"{before}{DTYPES[self.weights]}{before}weights" if self.weights else ""

    @property
    def group(self) -> str:
        what = "cell training" if self.as_cell and self.training else f"{'stack ' * self.stacked}{self.mode}"
        return f"{self.cell} {what} {DTYPES[self.dtype]}{self._weights(' ')}"

    @property
    def family(self) -> str:
        if self.mode == "step" or self.as_cell or self.stacked or self.cell == "gru_reset_before":
            return ""
        return f"recurrent {self.mode} {DTYPES[self.dtype]}{self._weights(' ')}"

    @property
    def default(self) -> bool:
        return self.dtype == "float32" and not self.weights


@dataclass(frozen=True)
class Attention(Case):
    """softmax(q kᵀ/√D) v; ``forward`` or ``training``.

    kind: ``dense``; ``decode`` (one query); ``mask`` (a boolean padding mask [B,1,1,Tk]); ``varlen`` (sequences of
    unequal length laid end to end, at most ``queries`` long).
    """

    kind: str
    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    causal: bool = False

    @property
    def name(self) -> str:
        heads = f"H{self.heads}" + (f"kv{self.kv_heads}" if self.kv_heads != self.heads else "")
        length = f"Tk{self.keys}" if self.kind == "decode" else f"T{self.queries}"
        what = "attention" if self.kind == "dense" else f"attention_{self.kind}"
        causal = "-causal" if self.causal else ""
        return f"{what}-{self.mode}-B{self.batch}-{heads}-{length}-D{self.dim}{causal}{self._suffix()}"

    @property
    def group(self) -> str:
        return f"attention {self.kind} {self.mode} {DTYPES[self.dtype]}"

    @property
    def family(self) -> str:
        return "" if self.kind == "varlen" else f"attention {self.mode} {DTYPES[self.dtype]}"

    @property
    def default(self) -> bool:
        return self.dtype in ("float32", "bfloat16")


@dataclass(frozen=True)
class Multihead(Case):
    """The layer MultiheadAttention on itself (x is query, key and value), batch first; ``inference`` or ``training``.

    weights: the mean over heads of the softmax is returned too, which is torch's default; causal: ``is_causal``, and
    the mask that torch wants beside it; padded: a boolean ``key_padding_mask``, for sequences of unequal length.
    """

    batch: int
    steps: int
    embed: int
    heads: int
    weights: bool = False
    causal: bool = False
    padded: bool = False

    @property
    def options(self) -> list[str]:
        return [name for name in ("weights", "causal", "padded") if getattr(self, name)]

    @property
    def name(self) -> str:
        shape = f"B{self.batch}-T{self.steps}-E{self.embed}-H{self.heads}"
        return "-".join(["multihead", self.mode, shape, *self.options]) + self._suffix()

    @property
    def group(self) -> str:
        return " ".join(["multihead", *(self.options or ["plain"]), self.mode, DTYPES[self.dtype]])

    @property
    def family(self) -> str:
        return f"multihead {self.mode} {DTYPES[self.dtype]}"

    @property
    def default(self) -> bool:
        return self.dtype == "float32"


RECURRENT_GRID = (
    (1, 1, 64, 64),
    (1, 1, 128, 128),
    (1, 1, 512, 512),
    (1, 32, 256, 256),
    (100, 1, 128, 128),
    (50, 32, 128, 128),
    (200, 8, 256, 256),
    (100, 32, 128, 128),
    (256, 16, 512, 512),
    (64, 128, 256, 256),
    (1000, 4, 40, 96),
)
"""(T, B, I, H)"""

STEP_HIDDEN = (64, 128, 512)

CELL_GRID = ((1, 64, 64), (32, 256, 256))
"""(B, I, H), in training"""

STACK_GRID = ((1, 1, 64, 64, 2, 1), (50, 32, 128, 128, 2, 1), (100, 8, 40, 96, 2, 2))
"""(T, B, I, H, layers, directions), in training"""

ATTENTION_GRID = (
    ("dense", 8, 8, 8, 50, 50, 64, False),
    ("dense", 4, 8, 8, 200, 200, 64, True),
    ("dense", 1, 8, 8, 1024, 1024, 64, False),
    ("dense", 1, 8, 8, 1024, 1024, 64, True),
    ("dense", 1, 8, 8, 1024, 1024, 128, False),
    ("dense", 1, 8, 8, 4096, 4096, 64, True),
    ("mask", 16, 12, 12, 128, 128, 64, False),
    ("varlen", 8, 8, 8, 512, 512, 64, False),
    ("varlen", 8, 8, 8, 512, 512, 64, True),
    ("decode", 1, 32, 32, 1, 4096, 128, False),
    ("decode", 1, 32, 8, 1, 4096, 128, False),
    ("decode", 1, 1, 1, 1, 65536, 64, False),
)
"""(kind, B, Hq, Hk, Tq, Tk, D, causal)"""

MULTIHEAD_GRID: tuple[tuple[tuple[int, int, int, int], dict[str, bool]], ...] = (
    ((1, 1, 64, 4), {}),
    ((1, 1, 512, 8), {}),
    ((1, 16, 256, 8), {}),
    ((8, 50, 512, 8), {}),
    ((4, 200, 512, 8), {}),
    ((1, 1024, 512, 8), {}),
    ((8, 50, 512, 8), {"weights": True}),
    ((4, 200, 512, 8), {"causal": True}),
    ((4, 200, 512, 8), {"padded": True}),
)
"""(B, T, E, heads), options"""

QUICK = frozenset(
    [f"{cell}-inference-{shape}" for cell in ("rnn", "gru", "lstm") for shape in
     ("T1-B1-I64-H64", "T100-B1-I128-H128", "T50-B32-I128-H128")]
    + [f"{cell}-training-T50-B32-I128-H128" for cell in ("rnn", "gru", "lstm")]
    + ["gru_reset_before-inference-T50-B32-I128-H128", "lstm-step-H64", "gru-step-H64", "lstm_cell-step-H64"]
    + ["attention-forward-B8-H8-T50-D64", "attention-forward-B4-H8-T200-D64-causal"]
    + ["attention-forward-B4-H8-T200-D64-causal-bf16", "attention-training-B4-H8-T200-D64-causal"]
    + ["attention_mask-forward-B16-H12-T128-D64", "attention_varlen-forward-B8-H8-T512-D64-causal"]
    + ["attention_decode-forward-B1-H32kv8-Tk4096-D128", "attention_decode-forward-B1-H32kv8-Tk4096-D128-bf16"]
    + ["multihead-inference-B1-T16-E256-H8", "multihead-inference-B4-T200-E512-H8-causal"]
    + ["multihead-training-B8-T50-E512-H8"]
)  # fmt: skip
"""The representative subset of ``--quick``."""


def _all() -> Iterator[Case]:
    for dtype in DTYPES:
        for cell in ("rnn", "gru", "lstm", "gru_reset_before"):
            for mode in ("inference", "training"):
                for shape in RECURRENT_GRID:
                    yield Recurrent(mode, dtype, cell, *shape)
        for cell in ("rnn", "gru", "lstm") if dtype == "float32" else ():
            for shape in RECURRENT_GRID:
                yield Recurrent("inference", dtype, cell, *shape, weights="bfloat16")
        for cell in ("gru", "lstm"):
            for as_cell in (False, True):
                for hidden in STEP_HIDDEN:
                    yield Recurrent("step", dtype, cell, 1, 1, hidden, hidden, as_cell)
        for cell in ("rnn", "gru", "lstm"):
            for shape_of_cell in CELL_GRID:
                yield Recurrent("training", dtype, cell, 1, *shape_of_cell, as_cell=True)
            for t, b, i, h, layers, directions in STACK_GRID:
                yield Recurrent("training", dtype, cell, t, b, i, h, layers=layers, directions=directions)
        for mode in ("forward", "training"):
            for shape_of_attention in ATTENTION_GRID:
                if not (shape_of_attention[0] == "decode" and mode == "training"):
                    yield Attention(mode, dtype, *shape_of_attention)
        for mode in ("inference", "training"):
            for shape_of_layer, options in MULTIHEAD_GRID:
                yield Multihead(mode, dtype, *shape_of_layer, **options)


@cache
def registry() -> dict[str, Case]:
    """Every case by its name."""
    cases: dict[str, Case] = {}
    for case in _all():
        assert case.name not in cases, case.name
        cases[case.name] = case
    assert cases.keys() >= QUICK
    return cases


def select(patterns: Iterable[str] = (), dtypes: Iterable[str] = (), quick: bool = False) -> list[Case]:
    """Cases in the registry's order: of the default data types unless ``dtypes`` names some, of the quick subset if
    asked, and matching any of ``patterns`` (a glob of the whole name where it has one of ``*?[``, else a substring).
    A pattern that matches none of the default cases is looked for among all.

    Raises:
        ValueError: a pattern that matches nothing, or an empty selection.
    """
    everything = list(registry().values())
    dtypes = set(dtypes)
    pool = [case for case in everything if (case.dtype in dtypes if dtypes else case.default)]
    if quick:
        pool = [case for case in pool if case.name in QUICK]
    chosen: set[str] = set()
    patterns = list(patterns)
    for pattern in patterns:
        found = {case.name for case in pool if _matches(case.name, pattern)}
        if not found and not dtypes and not quick:
            found = {case.name for case in everything if _matches(case.name, pattern)}
        if not found:
            raise ValueError(f"--case {pattern!r} matches none of these cases; --list shows their names")
        chosen |= found
    selected = [case for case in everything if case.name in chosen] if patterns else pool
    if not selected:
        raise ValueError(f"no case has the data types {sorted(dtypes)}" + (" in the quick subset" if quick else ""))
    return selected


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name


# --- inputs ---------------------------------------------------------------------------------------------------------


@dataclass
class RecurrentInputs:
    """x [T,B,I], h0 and c0 [layers * directions,B,H], dy [T,B,directions * H] (gradient of y, in training; of a cell's
    h), all in the case's dtype. Of a cell without the leading 1 and T. ``state``: the weights under the layer's names;
    c0: None but for an LSTM."""

    x: Tensor
    h0: Tensor
    c0: Tensor | None
    dy: Tensor
    state: dict[str, Tensor]


@dataclass
class AttentionInputs:
    """q [B,Hq,Tq,D], k and v [B,Hk,Tk,D], d_o as q; varlen: [total,H,D]. lengths int64 [B] for mask and varlen."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    lengths: Tensor | None


@dataclass
class MultiheadInputs:
    """x and dy [B,T,E] (dy: gradient of y, in training), lengths int64 [B] where padded; ``state`` holds the weights
    under the layer's names."""

    x: Tensor
    dy: Tensor
    lengths: Tensor | None
    state: dict[str, Tensor]


def recurrent_inputs(case: Recurrent) -> RecurrentInputs:
    """Draw the inputs of a recurrent case: unit normal x and dy, weights uniform in ±1/√H as torch's layers begin."""
    rng, dtype, hidden = case.generator(), case.torch_dtype, case.hidden
    gates = {"rnn": 1, "lstm": 4}.get(case.cell, 3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    def weight(*shape: int) -> Tensor:
        return ((torch.rand(*shape, generator=rng) * 2 - 1) / hidden**0.5).to(dtype)

    rows, width = gates * hidden, case.directions * hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(case.layers):
        for direction in range(case.directions):
            end = "" if case.as_cell else f"_l{layer}{'_reverse' * direction}"
            own = ((rows, width if layer else case.features), (rows, hidden), (rows,), (rows,))
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            shapes |= {name + end: shape for name, shape in zip(names, own, strict=True)}
    lead = () if case.as_cell else (case.layers * case.directions,)
    h0 = torch.tanh(normal(*lead, case.batch, hidden))
    c0 = normal(*lead, case.batch, hidden) if case.cell == "lstm" else None
    x = normal(case.batch, case.features) if case.as_cell else normal(case.steps, case.batch, case.features)
    dy = normal(*(() if case.as_cell else (case.steps,)), case.batch, width) if case.training else torch.empty(0)
    state = {name: weight(*shape) for name, shape in shapes.items()}
    if case.weights:
        smaller = getattr(torch, case.weights)
        state = {name: w.to(smaller).to(dtype) if w.dim() == 2 else w for name, w in state.items()}
    return RecurrentInputs(x, h0, c0, dy, state)


def attention_inputs(case: Attention) -> AttentionInputs:
    """Draw the inputs of an attention case: all unit normal; lengths from a quarter of the longest to all of it."""
    rng, dtype = case.generator(), case.torch_dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    lengths = None
    if case.kind in ("mask", "varlen"):
        lengths = _lengths(case.batch, case.keys, rng)
    if case.kind == "varlen":
        assert lengths is not None
        total = int(lengths.sum())
        q = normal(total, case.heads, case.dim)
        k, v = normal(total, case.kv_heads, case.dim), normal(total, case.kv_heads, case.dim)
    else:
        q = normal(case.batch, case.heads, case.queries, case.dim)
        k, v = (normal(case.batch, case.kv_heads, case.keys, case.dim) for _ in range(2))
    d_o = normal(*q.shape) if case.training else torch.empty(0)
    return AttentionInputs(q, k, v, d_o, lengths)


def multihead_inputs(case: Multihead) -> MultiheadInputs:
    """Draw the inputs of a case of MultiheadAttention: unit normal x and dy; weights uniform in ±√(3/E), so that q, k
    and v are of about unit variance, and so are scores; biases likewise, for none may be zero; lengths as attention's.
    """
    rng, dtype, embed = case.generator(), case.torch_dtype, case.embed

    def weight(*shape: int) -> Tensor:
        return ((torch.rand(*shape, generator=rng) * 2 - 1) * (3 / embed) ** 0.5).to(dtype)

    shape = (case.batch, case.steps, embed)
    x = torch.randn(*shape, generator=rng).to(dtype)
    dy = torch.randn(*shape, generator=rng).to(dtype) if case.training else torch.empty(0)
    shapes = {"in_proj_weight": (3 * embed, embed), "in_proj_bias": (3 * embed,)}
    shapes |= {"out_proj.weight": (embed, embed), "out_proj.bias": (embed,)}
    state = {name: weight(*shape) for name, shape in shapes.items()}
    return MultiheadInputs(x, dy, _lengths(case.batch, case.steps, rng) if case.padded else None, state)


def _lengths(batch: int, longest: int, rng: torch.Generator) -> Tensor:
    """int64 [batch]: from a quarter of the longest to all of it; the first is the longest."""
    lengths = torch.randint(longest // 4, longest + 1, (batch,), generator=rng)
    lengths[0] = longest
    return lengths

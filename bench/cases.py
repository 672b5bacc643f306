"""The registry: what is measured, under which name, on which inputs.

A case is a value: two equal cases have the same inputs, because their name is the seed.
Letters: T time steps, B batch, I input features, H hidden units; in attention H heads, D features a head; E features
of an embedding, those of all heads.
"""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastseq import ops

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""Data types and how they are written in names and tables."""


@dataclass(frozen=True)
class Case:
    """What all cases share.

    ``name`` is unique. ``group`` is the table that shows the case. ``family`` is a union of groups, or empty. Geometric
    means are given for each group and each family. ``default``: measured if the user does not choose data types.
    """

    mode: str
    dtype: str

    @property
    def name(self) -> str:
        raise NotImplementedError

    group = family = name
    default_dtypes: ClassVar[tuple[str, ...]] = ("float32",)

    @property
    def default(self) -> bool:
        return self.dtype in self.default_dtypes

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def generator(self, device: str = "cpu") -> torch.Generator:
        return torch.Generator(device).manual_seed(zlib.crc32(self.name.encode()))

    def _suffix(self) -> str:
        return "" if self.dtype == "float32" else f"-{DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Recurrent(Case):
    """A layer, or a stack of layers, over a whole sequence (``inference``, ``training``), or one ``step`` of B = 1 that
    passes its state to the next call. A cell in training has a batch and one step. ``streams-each`` and
    ``streams-batch``: one step of B sessions of twice as many, by fastseq.Streams; other B of them at each of T calls,
    then the first again. Peers step ``each`` session by itself, or a ``batch`` whose sessions stay the same.

    cell: ``rnn`` (tanh), ``rnn_relu``, ``gru``, ``gru_reset_before`` or ``lstm``. as_cell: use RNNCell, GRUCell or
    LSTMCell. weights: all values of the matrices are exact in this smaller type, for every contestant; fastseq is
    patched to use it (``fastseq.patch(weights=)``), the peers read them as float32. option: of :data:`OPTIONS`; what is
    drawn has so small a probability that it changes nothing; gains of norms are 0.3, with which roundings do not grow.
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
    option: str = ""

    @property
    def norm(self) -> str:
        return self.option.replace("-norm", "") if "-norm" in self.option else ""

    @property
    def beside(self) -> str:
        """What the peers of streams do; empty in other modes."""
        return self.mode.partition("streams-")[2]

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
        if self.beside:
            return f"{self.mode}-{self.cell}-B{self.batch}-I{self.features}-H{self.hidden}{self._suffix()}"
        if self.stacked:
            shape += f"-L{self.layers}" + "-bi" * (self.directions - 1)
        what = f"{self.option}{self.option and '-'}{self.cell}{'_stack' * self.stacked}-{self.mode}"
        return f"{what}-{shape}{self._suffix()}{self._weights('-')}"

    def _weights(self, before: str) -> str:
        return f"{before}{DTYPES[self.weights]}{before}weights" if self.weights else ""

    @property
    def group(self) -> str:
        what = "cell training" if self.as_cell and self.training else f"{'stack ' * self.stacked}{self.mode}"
        return f"{self.cell} {self.option}{self.option and ' '}{what} {DTYPES[self.dtype]}{self._weights(' ')}"

    @property
    def family(self) -> str:
        if self.mode not in MODES or self.as_cell or self.stacked or self.option or self.cell == "gru_reset_before":
            return ""
        return f"recurrent {self.mode} {DTYPES[self.dtype]}{self._weights(' ')}"

    @property
    def default(self) -> bool:
        return super().default and not self.weights


@dataclass(frozen=True)
class Attention(Case):
    """softmax(q kᵀ/√D) v; ``forward`` or ``training``.

    kind: ``dense``; ``decode`` (one query); ``mask`` (a boolean padding mask [B,1,1,Tk]); ``varlen`` (a packed batch of
    sequences of unequal length, at most ``queries`` long).
    """

    default_dtypes: ClassVar = ("float32", "bfloat16")

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


@dataclass(frozen=True)
class Multihead(Case):
    """The layer MultiheadAttention in self-attention (x is query, key and value), batch first; ``inference`` or
    ``training``.

    weights: also return the mean over heads of the softmax, which is torch's default. causal: ``is_causal`` and the
    mask that torch requires with it. padded: a boolean ``key_padding_mask``, for sequences of unequal length.
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


@dataclass(frozen=True)
class Model(Case):
    """A small random model of Hugging Face transformers: ``forward``, ``training`` or ``generate`` (16 tokens after the
    prompt, greedily). option: ``padded`` on the right, for sequences of unequal length; a ``static`` cache, four times
    as long as the prompt. Contestants are implementations of the model's attention."""

    kind: str
    batch: int
    steps: int
    option: str = ""
    family = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, ["hf", self.mode, self.kind, f"B{self.batch}-T{self.steps}", self.option]))

    @property
    def group(self) -> str:
        return f"hf {self.mode} {DTYPES[self.dtype]}"


MODES = ("inference", "training")

RECURRENT_GRID = (
    (1, 1, 64, 64), (1, 1, 128, 128), (1, 1, 512, 512), (1, 32, 256, 256), (100, 1, 128, 128), (50, 32, 128, 128),
    (200, 8, 256, 256), (100, 32, 128, 128), (256, 16, 512, 512), (64, 128, 256, 256), (1000, 4, 40, 96),
)  # fmt: skip
"""(T, B, I, H)"""

OPTIONS = ("recurrent-dropout", "zoneout", "recompute", "layer-norm", "joint-norm")
OPTIONS_GRID = ((100, 1, 128, 128), (50, 32, 128, 128), (200, 8, 256, 256))

STEP_HIDDEN = (64, 128, 512)
STREAMS_GRID = (("lstm", 256, 64, 128), ("lstm", 16, 64, 128), ("gru", 256, 64, 128), ("gru", 64, 128, 256))
"""(cell, B, I, H)"""

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

VOCABULARY = 512
MODEL_GRID = (
    ("forward", "llama", 2, 512, ""), ("forward", "llama", 4, 256, "padded"), ("forward", "bert", 8, 128, "padded"),
    ("forward", "gemma2", 2, 512, ""), ("forward", "gpt_oss", 2, 512, ""), ("forward", "modernbert", 2, 512, ""),
    ("training", "llama", 2, 512, ""), ("training", "gemma2", 2, 512, ""), ("training", "modernbert", 2, 512, ""),
    ("generate", "llama", 1, 256, ""), ("generate", "llama", 1, 256, "static"), ("generate", "gemma2", 1, 256, ""),
)  # fmt: skip
"""(mode, model, B, T, option), where transformers is installed"""

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
        for cell, mode, shape in product(("rnn", "gru", "lstm", "gru_reset_before"), MODES, RECURRENT_GRID):
            yield Recurrent(mode, dtype, cell, *shape)
        for cell, shape in product(("rnn", "gru", "lstm") if dtype == "float32" else (), RECURRENT_GRID):
            yield Recurrent("inference", dtype, cell, *shape, weights="bfloat16")
        for option, cell, mode, shape in product(OPTIONS, ("rnn", "gru", "lstm"), MODES, OPTIONS_GRID):
            if (mode == "training" or "norm" in option) and (cell == "gru" or option != "joint-norm"):
                yield Recurrent(mode, dtype, cell, *shape, option=option)
        for cell, as_cell, hidden in product(("gru", "lstm"), (False, True), STEP_HIDDEN):
            yield Recurrent("step", dtype, cell, 1, 1, hidden, hidden, as_cell)
        for (cell, b, i, h), mode in product(STREAMS_GRID, ("streams-each", "streams-batch")):
            yield Recurrent(mode, dtype, cell, 8, b, i, h)
        for cell in ("rnn", "gru", "lstm"):
            for shape_of_cell in CELL_GRID:
                yield Recurrent("training", dtype, cell, 1, *shape_of_cell, as_cell=True)
            for t, b, i, h, layers, directions in STACK_GRID:
                yield Recurrent("training", dtype, cell, t, b, i, h, layers=layers, directions=directions)
        for mode, shape_of_attention in product(("forward", "training"), ATTENTION_GRID):
            if not (shape_of_attention[0] == "decode" and mode == "training"):
                yield Attention(mode, dtype, *shape_of_attention)
        for mode, (shape_of_layer, options) in product(MODES, MULTIHEAD_GRID):
            yield Multihead(mode, dtype, *shape_of_layer, **options)
    for mode, *shape_of_model in MODEL_GRID if importlib.util.find_spec("transformers") else ():
        yield Model(mode, "float32", *shape_of_model)  # type: ignore[arg-type]


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
    """Cases in the registry's order.

    dtypes: the default ones of each case unless some are named. patterns: a case must match one of them; a pattern with
    one of ``*?[`` is a glob of the whole name, any other a substring. A pattern that matches none of the default cases
    is searched among all cases. quick: only the quick subset.

    Raises:
        ValueError: a pattern that matches nothing, or an empty selection.
    """
    everything = list(registry().values())
    dtypes = set(dtypes)
    pool = [case for case in everything if (case.dtype in dtypes if dtypes else case.default)]
    pool = [case for case in pool if not quick or case.name in QUICK]
    chosen: set[str] = set()
    patterns = list(patterns)
    for pattern in patterns:
        glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
        found = {case.name for case in pool if fnmatchcase(case.name, glob)}
        if not found and not dtypes and not quick:
            found = {case.name for case in everything if fnmatchcase(case.name, glob)}
        if not found:
            raise ValueError(f"--case {pattern!r} matches none of these cases; --list shows their names")
        chosen |= found
    selected = [case for case in everything if case.name in chosen] if patterns else pool
    if not selected:
        raise ValueError(f"no case has the data types {sorted(dtypes)}" + (" in the quick subset" if quick else ""))
    return selected


@dataclass
class LayerInputs:
    """All in the case's dtype; ``state``: the weights under the layer's names; lengths: int64 [B] where padded.

    A recurrent layer: x [T,B,I], dy [T,B,directions * H] (gradient of y, in training; of a cell's h), h0 and an LSTM's
    c0 [layers * directions,B,H]. A cell has no leading 1 and no T. MultiheadAttention: x and dy [B,T,E].
    """

    x: Tensor
    dy: Tensor
    state: dict[str, Tensor]
    h0: Tensor | None = None
    c0: Tensor | None = None
    lengths: Tensor | None = None


@dataclass
class AttentionInputs:
    """q [B,Hq,Tq,D], k and v [B,Hk,Tk,D], d_o as q; varlen: [total,H,D]. lengths int64 [B] for mask and varlen."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_o: Tensor
    lengths: Tensor | None


@dataclass
class ModelInputs:
    """tokens int64 [B,T], mask bool [B,T] where padded, dy [B,T,vocabulary] (gradient of the logits, in training)."""

    tokens: Tensor
    mask: Tensor | None
    dy: Tensor


Inputs = LayerInputs | AttentionInputs | ModelInputs


class Draw:
    """Random tensors in the data type of a case, from the seed of its name."""

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.rng, self.dtype = case.generator(device), case.torch_dtype
        self.device, self.training = device, case.training

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.rng, device=self.device).to(self.dtype)

    def weights(self, shapes: Mapping[str, tuple[int, ...]], bound: float) -> dict[str, Tensor]:
        """Uniform in ± bound."""
        drawn = {n: torch.rand(*shape, generator=self.rng, device=self.device) for n, shape in shapes.items()}
        return {name: ((weight * 2 - 1) * bound).to(self.dtype) for name, weight in drawn.items()}

    def gradient(self, *shape: int) -> Tensor:
        """Unit normal in training; else empty."""
        return self.normal(*shape) if self.training else torch.empty(0)

    def lengths(self, batch: int, longest: int) -> Tensor:
        """int64 [batch]: from a quarter of the longest to all of it; the first is the longest."""
        lengths = torch.randint(longest // 4, longest + 1, (batch,), generator=self.rng)
        lengths[0] = longest
        return lengths


def make_inputs(case: Case) -> Inputs:
    """The case's inputs, the same at each call."""
    if isinstance(case, Recurrent):
        return recurrent_inputs(case)
    if isinstance(case, Model):
        draw, shape = Draw(case), (case.batch, case.steps)
        tokens = torch.randint(3, VOCABULARY, shape, generator=draw.rng)
        mask = torch.arange(case.steps) < draw.lengths(*shape)[:, None] if case.option == "padded" else None
        return ModelInputs(tokens, mask, draw.gradient(*shape, VOCABULARY))
    return multihead_inputs(case) if isinstance(case, Multihead) else attention_inputs(case)  # type: ignore[arg-type]


GATES = ops.GATES | {"rnn": 1}


def recurrent_inputs(case: Recurrent, device: str = "cpu") -> LayerInputs:
    """Draw the inputs of a recurrent case: unit normal x and dy, weights uniform in ±1/√H as torch's layers begin."""
    draw, hidden, width = Draw(case, device), case.hidden, case.directions * case.hidden
    rows = GATES[case.cell] * hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, direction in product(range(case.layers), range(case.directions)):
        end = "" if case.as_cell else f"_l{layer}{'_reverse' * direction}"
        shapes |= {f"weight_ih{end}": (rows, width if layer else case.features), f"weight_hh{end}": (rows, hidden)}
        shapes |= {f"bias_ih{end}": (rows,), f"bias_hh{end}": (rows,)}
    lead, steps = ((), ()) if case.as_cell else ((case.layers * case.directions,), (case.steps,))
    h0 = torch.tanh(draw.normal(*lead, case.batch, hidden))
    c0 = draw.normal(*lead, case.batch, hidden) if case.cell == "lstm" else None
    x = draw.normal(*steps, case.batch, case.features)
    dy = draw.gradient(*steps, case.batch, width)
    state = draw.weights(shapes, hidden**-0.5)
    if case.weights:
        smaller = getattr(torch, case.weights)
        state = {name: w.to(smaller).to(w.dtype) if w.dim() == 2 else w for name, w in state.items()}
    return LayerInputs(x, dy, state, h0, c0)


def attention_inputs(case: Attention) -> AttentionInputs:
    """Draw the inputs of an attention case: all unit normal; lengths from a quarter of the longest to all of it."""
    draw = Draw(case)
    lengths = draw.lengths(case.batch, case.keys) if case.kind in ("mask", "varlen") else None
    packed = int(lengths.sum()) if lengths is not None and case.kind == "varlen" else None
    q, k, v = draw_heads(draw, case, packed)
    return AttentionInputs(q, k, v, draw.gradient(*q.shape), lengths)


def draw_heads(draw: Draw, case: Any, packed: int | None) -> list[Tensor]:
    """q, k and v: unit normal; [packed,heads,D] for a packed batch of so many rows, else [B,heads,T,D]."""

    def one(heads: int, length: int) -> Tensor:
        if packed is not None:
            return draw.normal(packed, heads, case.dim)
        return draw.normal(case.batch, heads, length, case.dim)

    return [one(case.heads, case.queries), one(case.kv_heads, case.keys), one(case.kv_heads, case.keys)]


def multihead_inputs(case: Multihead) -> LayerInputs:
    """Draw the inputs of a case of MultiheadAttention: unit normal x and dy; weights uniform in ±√(3/E), so that q, k,
    v and the scores have about unit variance; biases the same, for none may be zero; lengths as attention's."""
    draw, embed = Draw(case), case.embed
    x, dy = draw.normal(case.batch, case.steps, embed), draw.gradient(case.batch, case.steps, embed)
    shapes: dict[str, tuple[int, ...]] = {"in_proj_weight": (3 * embed, embed), "in_proj_bias": (3 * embed,)}
    shapes |= {"out_proj.weight": (embed, embed), "out_proj.bias": (embed,)}
    state = draw.weights(shapes, (3 / embed) ** 0.5)
    lengths = draw.lengths(case.batch, case.steps) if case.padded else None
    return LayerInputs(x, dy, state, lengths=lengths)

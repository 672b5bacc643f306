"""How fast a transformer's encoder runs in evaluation: patched, beside torch's fused kernel and torch.compile.

A call is one layer of torch.nn.TransformerEncoder, or a TransformerDecoderLayer, without gradients. ``padded``:
sequences of a quarter of the longest to all of it, with the bool mask that makes torch skip the padding (not with the
norm first); ``causal``: with its mask. Contestants share their weights, are checked against float64 and take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from bench.cases import DTYPES, Case, Draw
from bench.check import Judge
from bench.formats import duration, markdown, times
from bench.peers import Contestant, Entrant, Outputs, Unavailable
from bench.run import Options, Result
from bench.studies import turns


@dataclass(frozen=True)
class Encoder(Case):
    """A layer over [B,T,E]; ``decoder``: nn.TransformerDecoderLayer, whose memory has as many positions."""

    batch: int
    steps: int
    embed: int
    heads: int
    width: int
    activation: str = "relu"
    option: str = ""
    norm_first: bool = False
    decoder: bool = False
    family = ""

    @property
    def name(self) -> str:
        shape = f"B{self.batch}-T{self.steps}-E{self.embed}-H{self.heads}-F{self.width}-{self.activation}"
        options = f"{'-norm_first' * self.norm_first}{self.option and '-'}{self.option}{self._suffix()}"
        return f"{'decoder' if self.decoder else 'encoder'}-{shape}{options}"

    @property
    def group(self) -> str:
        return f"{'decoder' if self.decoder else 'encoder'} {self.option or 'plain'} {DTYPES[self.dtype]}"


SHAPES = ((8, 128, 256, 4, 1024), (8, 128, 256, 4, 2048), (32, 64, 512, 8, 2048), (1, 512, 512, 8, 2048),
          (8, 256, 768, 12, 3072))  # fmt: skip


def grid() -> list[Encoder]:
    made = [
        Encoder("inference", "float32", *shape, "gelu" if shape[4] == 4 * shape[2] else "relu", option, norm_first)
        for shape in SHAPES for norm_first in (False, True) for option in ("", "padded", "causal")
    ]  # fmt: skip
    made += [Encoder("inference", "float32", *shape, decoder=True) for shape in SHAPES]
    made += [Encoder("inference", "float32", *shape) for shape in ((1, 16, 64, 4, 256), (1, 64, 512, 8, 2048))]
    return made + [Encoder("inference", "bfloat16", *shape) for shape in SHAPES]


@dataclass
class Inputs:
    model: nn.Module
    x: Tensor
    memory: Tensor
    options: dict[str, Any]

    def call(self, model: nn.Module) -> Outputs:
        return {"y": model(self.x, self.memory) if self.memory.numel() else model(self.x, **self.options)}


def drawn(case: Encoder) -> Inputs:
    """Unit normal inputs; weights as torch's layers begin, biases and norms moved off zero and one."""
    draw, shape = Draw(case), (case.batch, case.steps, case.embed)
    kind = nn.TransformerDecoderLayer if case.decoder else nn.TransformerEncoderLayer
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(1 << 30, (), generator=draw.rng)))
        layer: Any = kind(case.embed, case.heads, case.width, activation=case.activation, batch_first=True,
                     norm_first=case.norm_first)  # fmt: skip
        for p in layer.parameters():
            p.data += 0.02 * torch.randn_like(p)
    model = (layer if case.decoder else nn.TransformerEncoder(layer, 1)).to(case.torch_dtype).eval()
    options: dict[str, Any] = {}
    if case.option == "padded":
        options["src_key_padding_mask"] = torch.arange(case.steps) >= draw.lengths(case.batch, case.steps)[:, None]
    elif case.option == "causal":
        options["mask"] = torch.ones(case.steps, case.steps, dtype=torch.bool).triu(1)
    return Inputs(model, draw.normal(*shape), draw.normal(*shape) if case.decoder else torch.empty(0), options)


def truth(inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """By torch's own layer; padding is what it makes of it."""
    model, memory = copy.deepcopy(inputs.model).to(dtype), inputs.memory.to(dtype)
    return Inputs(model, inputs.x.to(dtype), memory, inputs.options).call(model)


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def fastseq_entrants(case: Encoder, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    model = sharing(inputs.model)
    fastseq.patch(model)
    yield Entrant(lambda: inputs.call(model), lambda y: y)


def torch_entrants(case: Encoder, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    yield Entrant(lambda: inputs.call(inputs.model), lambda y: y)


def compiled_entrants(case: Encoder, inputs: Inputs, threads: int) -> Iterator[Entrant]:
    if case.option == "padded":
        raise Unavailable("torch.compile breaks its graph where the encoder looks at the mask")
    torch._dynamo.reset()
    model: Any = torch.compile(sharing(inputs.model))
    yield Entrant(lambda: inputs.call(model), lambda y: y)


CONTESTANTS = (
    Contestant("fastseq", "fastseq", fastseq_entrants),
    Contestant("torch", "torch", torch_entrants),
    Contestant("compile", "torch.compile", compiled_entrants),
)


def measured(case: Encoder, options: Options, contestants: Sequence[Contestant]) -> Result:
    inputs = drawn(case)
    judge = Judge.by(lambda dtype: truth(inputs, dtype), case)
    return turns.compare(case, inputs, judge, contestants, options)[0]


def main(argv: Sequence[str]) -> int:
    """Entry point of ``python -m bench encoders``; 1 where an answer was wrong."""
    parser = turns.parser("encoders", __doc__)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes a minute a case")
    given = parser.parse_args(argv)
    cases, options = turns.chosen(given, grid()), Options(given.threads, given.min_time)
    with torch.inference_mode():
        found = [measured(case, options, CONTESTANTS[: 2 if given.no_compile else 3]) for case in cases]
    rows = [
        [r.case.name, duration(timing.median), times(r.ratio("torch")), times(r.ratio("compile"))]
        for r in found if (timing := r.entries["fastseq"].timing) is not None
    ]  # fmt: skip
    print("\n".join(markdown(["a call", "fastseq", "vs torch", "vs torch.compile"], rows, right=True)))
    return turns.conclude(given, options, found)

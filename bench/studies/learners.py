"""The small models that studies train, one layer kind each, all of one size; a step of it; how far gradients reach."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastseq

EMBEDDED = 32
"""Features that a recurrent layer gets a step."""

HEADS, BLOCKS = 4, 2


class Recurrent(nn.Module):
    """An input map, one recurrent layer, an output map. x: int64 [B,T] or floats [B,T,features]."""

    def __init__(self, layer: Callable[[int, int], nn.RNNBase], features: int, outputs: int, width: int) -> None:
        super().__init__()
        self.embed = embedding(features, EMBEDDED)
        self.layer = layer(EMBEDDED, width)
        self.read = nn.Linear(width, outputs)

    def embedded(self, x: Tensor) -> Tensor:
        """[B,T,EMBEDDED]: the inputs to which the gradient's reach is measured."""
        return self.embed(x)

    def hidden(self, embedded: Tensor, state: object = None) -> tuple[Tensor, object]:
        """The layer's output [B,T,H] and its last state."""
        return self.layer(embedded, state)

    def forward(self, x: Tensor, last: int) -> Tensor:
        """Predictions at the last steps: [B,last,outputs]."""
        return self.read(self.hidden(self.embedded(x))[0][:, -last:])


class Block(nn.Module):
    """Attention to earlier positions, then a small network for each position (pre-norm, Vaswani et al. 2017)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = fastseq.nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, need_weights=False, is_causal=True)[0]
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Two causal blocks over the inputs with sines for positions, which need no parameters and have no largest
    length."""

    def __init__(self, features: int, outputs: int, width: int) -> None:
        super().__init__()
        self.embed = embedding(features, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, outputs)

    def embedded(self, x: Tensor) -> Tensor:
        """[B,T,width]: inputs with their positions."""
        y = self.embed(x)
        return y + positions(y.size(1), y.size(2))

    def hidden(self, embedded: Tensor, state: object = None) -> tuple[Tensor, object]:
        """The last block's output [B,T,width]; there is no state."""
        return self.norm(self.blocks(embedded)), None

    def forward(self, x: Tensor, last: int) -> Tensor:
        """Predictions at the last steps: [B,last,outputs]."""
        return self.read(self.hidden(self.embedded(x))[0][:, -last:])


Learner = Recurrent | Attention


def embedding(features: int, width: int) -> nn.Module:
    """The map from characters (more than 32 features) or from a step's features; drawn from N(0, 1) in both cases."""
    if features > EMBEDDED:
        return nn.Embedding(features, width)
    linear = nn.Linear(features, width, bias=False)
    nn.init.normal_(linear.weight)
    return linear


def positions(length: int, width: int) -> Tensor:
    """Sines and cosines of 1 to 10,000 steps a radian: [length,width]."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def lstm(features: int, width: int, forget: float = 0.0) -> nn.RNNBase:
    """An LSTM as torch initialises it, with ``forget`` added to the forget gate's bias."""
    layer = fastseq.nn.LSTM(features, width, batch_first=True)
    bias = layer.get_parameter("bias_hh_l0")
    with torch.no_grad():
        bias[width : 2 * width] += forget
    return layer


@dataclass(frozen=True)
class Kind:
    """A layer kind of the study. ``build(features, outputs, width)``."""

    name: str
    label: str
    build: Callable[[int, int, int], Learner]


def _recurrent(name: str, label: str, layer: Callable[[int, int], nn.RNNBase]) -> Kind:
    return Kind(name, label, lambda features, outputs, width: Recurrent(layer, features, outputs, width))


KINDS = {
    kind.name: kind
    for kind in (
        _recurrent("rnn", "RNN", lambda i, h: fastseq.nn.RNN(i, h, batch_first=True)),
        _recurrent("gru", "GRU", lambda i, h: fastseq.nn.GRU(i, h, batch_first=True)),
        _recurrent(
            "gru_reset_before",
            "GRU, reset before the product",
            lambda i, h: fastseq.nn.GRU(i, h, batch_first=True, reset_after=False),
        ),
        _recurrent("lstm", "LSTM", lstm),
        _recurrent("lstm_forget", "LSTM, forget bias + 3", lambda i, h: lstm(i, h, 3.0)),
        Kind("attention", "attention", Attention),
    )
}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def of_size(kind: Kind, features: int, outputs: int, attention_width: int) -> Learner:
    """A model of this kind with as many parameters, to the nearest width, as attention of that width has."""

    def count(kind: Kind, width: int) -> int:
        with torch.device("meta"):
            return parameters(kind.build(features, outputs, width))

    if kind.name == "attention":
        return kind.build(features, outputs, attention_width)
    size, width = count(KINDS["attention"], attention_width), 1
    while count(kind, width + 1) <= size:
        width += 1
    nearest = min(width, width + 1, key=lambda width: abs(count(kind, width) - size))
    return kind.build(features, outputs, nearest)


# --- the gradient's reach -------------------------------------------------------------------------------------------


def reach(model: Learner, x: Tensor, distances: tuple[int, ...]) -> dict[str, dict[int, float]]:
    """How strongly the last output depends on what was ``k`` steps back, for each distance k: root mean square gain.

    ``input``: ∂out_T/∂in_{T−k}, where ``in`` is the layer's input at a step and ``out`` its output.
    ``state``: ∂h_T/∂h_{T−k}, for an LSTM by everything it carries, (h, c); a recurrent layer only. A gain is the
    Frobenius norm of the Jacobian, of the mean square over sequences, divided by √H: 1 for the identity. Norms are
    estimated from one random vector a sequence, for E‖vᵀJ‖² = ‖J‖² where v is drawn from N(0, 1); in float64, because
    they would underflow.
    """
    draw = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        embedded = model.embedded(x.double() if x.is_floating_point() else x)
    whole = embedded.clone().requires_grad_()
    last = model.hidden(whole)[0][:, -1]
    v = torch.randn(last.shape, generator=draw, dtype=last.dtype)
    (gradient,) = torch.autograd.grad(last, whole, v)
    found = {"input": {k: _gain(gradient[:, -1 - k], last.size(1)) for k in distances if k < x.size(1)}}
    if isinstance(model, Attention):
        return found
    found["state"] = {}
    for k in (k for k in distances if k < x.size(1)):
        with torch.no_grad():
            state = model.hidden(embedded[:, :-k])[1]
        carried = [part.requires_grad_() for part in (state if isinstance(state, tuple) else (state,))]
        last = model.hidden(embedded[:, -k:], tuple(carried) if isinstance(state, tuple) else carried[0])[0][:, -1]
        gradients = torch.autograd.grad(last, carried, v)
        found["state"][k] = _gain(torch.cat([g[0] for g in gradients], -1), last.size(1))
    return found


def _gain(gradient: Tensor, width: int) -> float:
    """gradient [B,·] of one random vector a sequence."""
    return math.sqrt(float(gradient.square().sum(-1).mean()) / width)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, clip: float) -> None:
    """One step of training; the norm of all gradients together is at most ``clip``."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()

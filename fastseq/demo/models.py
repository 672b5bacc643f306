"""The demo's three small character models, written with torch.nn alone, as a user's own would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


class Recurrent(nn.Module):
    """Characters in, scores of the next character out, through one GRU or LSTM."""

    def __init__(self, cell: type[nn.RNNBase], symbols: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.layer = cell(width, width, batch_first=True)  # type: ignore[call-arg, arg-type]
        self.read = nn.Linear(width, symbols)

    def forward(self, ids: Tensor, state: object = None) -> tuple[Tensor, object]:
        """ids [B,T] -> scores [B,T,symbols] and the state to go on from."""
        hidden, state = self.layer(self.embed(ids), state)
        return self.read(hidden), state


class Block(nn.Module):
    """A transformer block: what each position gathers from those before it, then a small network of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,T,width], mask [T,T] (True: may not look) -> [B,T,width]"""
        seen = self.norm1(x)
        x = x + self.attention(seen, seen, seen, attn_mask=mask, is_causal=True, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Characters in, scores of the next character out, through causal attention over at most ``length`` of them."""

    mask: Tensor

    def __init__(self, symbols: int, width: int, heads: int, blocks: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.place = nn.Embedding(length, width)
        for table in (self.embed, self.place):
            nn.init.normal_(table.weight, std=0.1)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, symbols)
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, ids: Tensor, state: object = None) -> tuple[Tensor, object]:
        """ids [B,T] -> scores [B,T,symbols] and the characters seen, which are its state."""
        length = len(self.mask)
        new = ids.size(1)
        if isinstance(state, Tensor):
            ids = torch.cat([state, ids], 1)
        ids = ids[:, -length:]
        t = ids.size(1)
        x = self.embed(ids) + self.place.weight[:t]
        for block in self.blocks:
            x = block(x, self.mask[:t, :t])
        return self.read(self.norm(x))[:, -new:], ids


@dataclass(frozen=True)
class Kind:
    """A model of the demo: how to build it for a number of symbols, what it is, and how it trains."""

    name: str
    title: str
    build: Callable[[int], nn.Module]
    batch: int
    length: int
    steps: int
    learning_rate: float = 4e-3


KINDS = {
    kind.name: kind
    for kind in (
        Kind("gru", "GRU, 192 wide", partial(Recurrent, nn.GRU, width=192), 32, 64, 500),
        Kind("lstm", "LSTM, 192 wide", partial(Recurrent, nn.LSTM, width=192), 32, 64, 500, 3e-3),
        Kind(
            "attention",
            "attention, 2 blocks, 4 heads, 128 wide",
            partial(Attention, width=128, heads=4, blocks=2, length=128),
            16,
            128,
            350,
            3e-3,
        ),
    )
}

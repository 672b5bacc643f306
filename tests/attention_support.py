"""What the tests of attention share: drawn calls, named features, and a peer that computes in its own dtype."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import fastseq
from fastseq.attn.reference import visible_pairs


class DecodingStep(torch.nn.Module):
    """Appends to a cache, and attends to all of it."""

    def __init__(self, cache: fastseq.KVCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.append(k, v)
        return fastseq.attention(q, cache=self.cache, causal=True)


@st.composite
def calls(pick):
    """q, k, v in float64 and the reference's options: shapes and a combination of every dense feature."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    flip = st.booleans()
    batch, kv_heads, group = pick(st.integers(1, 3)), pick(st.integers(1, 2)), pick(st.integers(1, 3))
    queries, keys = pick(st.integers(1, 9)), pick(st.integers(0, 9))
    features, values = pick(st.integers(1, 5)), pick(st.integers(1, 5))
    heads = kv_heads * group
    torch.manual_seed(pick(st.integers(0, 2**31)))
    q, k = draw(batch, heads, queries, features), draw(batch, kv_heads, keys, features)
    v = draw(batch, kv_heads, keys, values)
    options: dict[str, Any] = {"scale": pick(st.sampled_from([0.3, 1.0])), "causal": pick(flip)}
    options["bottom_right"] = pick(flip)
    options["window_left"] = pick(st.integers(-1, 4))
    options["window_right"] = pick(st.integers(-1, 4))
    options["softcap"] = pick(st.sampled_from([0.0, 1.5]))
    if pick(flip):
        options["bias"] = draw(batch, heads, queries, keys).masked_fill(
            torch.rand(batch, heads, queries, keys) < 0.2, -math.inf
        )
    if pick(flip):
        options["mask"] = torch.rand(batch, heads, queries, keys) < 0.6
    if pick(flip):
        options["sinks"] = draw(heads)
    if pick(flip):
        options["alibi_slopes"] = torch.rand(heads)
    if pick(flip):
        options["lengths_q"] = torch.randint(0, queries + 1, (batch,))
    if pick(flip):
        options["lengths_k"] = torch.randint(0, keys + 1, (batch,))
    if pick(flip) and (options["causal"] or max(options["window_left"], options["window_right"]) >= 0):
        options["prefix_lengths"] = torch.randint(0, keys + 1, (batch,))
    return q, k, v, options


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal-top-left": {"causal": True, "align": "top_left"},
    "window": {"window": (5, 3)},
    "causal-window": {"causal": True, "window": (9, -1)},
    "mask": {"mask": "pairs"},
    "padding": {"mask": "keys"},
    "bias": {"bias": "heads"},
    "bias-of-keys": {"bias": "keys"},
    "bias-and-mask": {"bias": "pairs", "mask": "pairs", "causal": True},
    "lengths": {"lengths_q": True, "lengths_k": True, "causal": True},
    "prefix": {"prefix_lengths": True, "causal": True},
    "prefix-window": {"prefix_lengths": True, "window": (5, 3), "lengths_k": True, "align": "top_left"},
    "alibi": {"alibi_slopes": True, "causal": True},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True, "causal": True},
    "everything": {
        "causal": True, "window": (20, -1), "softcap": 3.0, "sinks": True, "alibi_slopes": True, "bias": "pairs",
        "mask": "pairs", "lengths_k": True, "prefix_lengths": True,
    },
}  # fmt: skip
"""Named options of ``fastseq.attention``; :func:`options_of` puts tensors where they name one."""

TORCH_LACKS = ("softcap", "sinks", "everything")
"""Features that torch's attention cannot express."""


def options_of(feature: str, q: Tensor, k: Tensor) -> dict[str, Any]:
    """The options of a named feature, for these shapes; tensors in float64 where they are floating."""
    options = dict(FEATURES[feature])
    batch, heads, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    shapes = {
        "pairs": (batch, heads, queries, keys),
        "heads": (heads, queries, keys),
        "keys": (batch, 1, 1, keys),
    }
    if "mask" in options:
        options["mask"] = torch.rand(shapes[options["mask"]]) < 0.7
        options["mask"][0, 0, -1] = options["mask"].shape[2] == 1  # one row of all sees nothing
    if "bias" in options:
        options["bias"] = torch.randn(shapes[options["bias"]], dtype=torch.float64)
    if "sinks" in options:
        options["sinks"] = torch.randn(heads, dtype=torch.float64)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = 0.5 ** torch.arange(1, heads + 1).float()
    if "lengths_q" in options:
        options["lengths_q"] = torch.randint(0, queries + 1, (batch,))
    if "lengths_k" in options:
        options["lengths_k"] = torch.randint(0, keys + 1, (batch,))
    if "prefix_lengths" in options:
        options["prefix_lengths"] = torch.randint(0, keys + 1, (batch,))
    return options


def peer(
    q: Tensor, k: Tensor, v: Tensor, *, bias=None, mask=None, causal=False, align="bottom_right", window=None,
    softcap=0.0, sinks=None, alibi_slopes=None, lengths_q=None, lengths_k=None,
    prefix_lengths=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a user would write with torch today: each step of the formula in q's own dtype, softmax by torch."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q.shape[-1] ** -0.5 * (q @ k.transpose(-2, -1))
    left, right = window or (-1, -1)
    at, visible = visible_pairs(
        q, k, mask=mask, lengths_q=lengths_q, lengths_k=lengths_k, prefix_lengths=prefix_lengths, causal=causal,
        bottom_right=align == "bottom_right", window_left=left, window_right=right,
    )  # fmt: skip
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(q.dtype)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * (at.i + at.shift - at.j).abs()
    seen = torch.ones_like(scores, dtype=torch.bool) if visible is None else visible.expand_as(scores)
    empty = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~(seen | empty), -math.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(scores.to(wide), -1)
    weights = torch.softmax(scores, -1)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(wide)[:, None])
        weights = weights * torch.exp(lse - total).unsqueeze(-1).to(q.dtype)
        rows = empty.squeeze(-1)
        alone = sinks.to(wide)[:, None].expand_as(lse)
        if at.row_is_real is not None:
            alone = alone.masked_fill(~at.row_is_real.squeeze(-1), -math.inf)
        return (weights @ v).masked_fill(empty, 0.0), torch.where(rows, alone, total)
    return (weights @ v).masked_fill(empty, 0.0), lse.masked_fill(empty.squeeze(-1), -math.inf)

"""The attention operators of one backend held to the reference: calls, named features, and the error rule.

The peer of the error rule is the formula as a user of torch would write it, in the inputs' own dtype.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
import torch.nn.functional as F
from devices import COUNTS, operator
from fastseq.kernels.attention.layout import empty_as
from support import assert_within_budget, error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastseq.attn.call import OPTIONS
from fastseq.attn.random import keep_mask
from fastseq.attn.reference import attention as reference

PLAIN: dict[str, Any] = {
    "scale": 0.25, "causal": False, "bottom_right": True, "window_left": -1, "window_right": -1, "softcap": 0.0,
    "dropout_p": 0.0,
}  # fmt: skip
DENSE = (2, 4, 2, 33, 65, 24, 17)  # B, Hq, Hk, Tq, Tk, D, Dv
Options = dict[str, Any]


def arguments(options: Options) -> list[Any]:
    return [{**PLAIN, **options}.get(name) for name in OPTIONS]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str = "native") -> tuple[Tensor, Tensor]:
    return operator("attention_forward", backend)(q, k, v, *arguments(options))


def backward(
    d_o: Tensor, dlse: Tensor | None, q, k, v, o, lse, options: Options, backend: str = "native"
) -> tuple[Tensor, ...]:
    call = operator("attention_backward", backend)
    return call(d_o, dlse, q, k, v, o, lse, *arguments(options), options.get("bias") is not None)


def eager(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """o, every step in q's dtype. Packed: one sequence at a time."""
    x = {**PLAIN, **options}
    if x.get("cu_seqlens_q") is not None:
        parts, ends_q, ends_k = [], x.pop("cu_seqlens_q").tolist(), x.pop("cu_seqlens_k").tolist()
        for b in range(len(ends_q) - 1):
            own_q, own_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
            if x.get("prefix_lengths") is not None:
                x["prefix_lengths"] = options["prefix_lengths"][b : b + 1]
            one = eager(*(t.transpose(0, 1)[None] for t in (q[own_q], k[own_k], v[own_k])), **x, batch=b)
            parts.append(one[0].transpose(0, 1))
        rest = q.new_zeros(q.shape[0] - ends_q[-1], q.shape[1], v.shape[2])
        return torch.cat([*parts, rest])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    rows = x["lengths_q"][:, None, None, None] if x.get("lengths_q") is not None else q.shape[2]
    columns = x["lengths_k"][:, None, None, None] if x.get("lengths_k") is not None else k.shape[2]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    diagonal = i + (columns - rows if x["bottom_right"] else 0)
    near = torch.ones_like(diagonal - j, dtype=torch.bool)
    if x["causal"]:
        near = near & (j <= diagonal)
    if x["window_left"] >= 0:
        near = near & (diagonal - j <= x["window_left"])
    if x["window_right"] >= 0:
        near = near & (j - diagonal <= x["window_right"])
    if x.get("prefix_lengths") is not None:
        near = near | (j < x["prefix_lengths"][:, None, None, None])
    visible = near & (i < rows) & (j < columns) & (x["mask"] if x.get("mask") is not None else True)
    scores = q @ k.transpose(-2, -1) * x["scale"]
    if x["softcap"] > 0:
        scores = x["softcap"] * torch.tanh(scores / x["softcap"])
    if x.get("bias") is not None:
        visible = visible & (x["bias"] != -math.inf)
        scores = scores + x["bias"].masked_fill(x["bias"] == -math.inf, 0).to(q.dtype)
    if x.get("alibi_slopes") is not None:
        scores = scores - (x["alibi_slopes"][:, None, None] * (diagonal - j).abs()).to(q.dtype)
    least = -1e4 if q.dtype == torch.float16 else -1e30
    scores = scores.masked_fill(~visible, least)
    if x.get("sinks") is not None:
        sinks = x["sinks"].to(q.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1) if scores.shape[-1] else scores
    weights = weights.masked_fill(~visible, 0)
    if x["dropout_p"] > 0:
        b = torch.arange(q.shape[0])[:, None, None, None] + x.get("batch", 0)
        h = torch.arange(q.shape[1])[:, None, None]
        kept = keep_mask(x["seed"], x["dropout_p"], b, h, i, j)
        weights = weights.masked_fill(~kept, 0) / (1 - x["dropout_p"])
    return weights @ v


def gradients(function: Any, q, k, v, options: Options, dtype: torch.dtype | None, d_o: Tensor, dlse: Tensor | None):
    """Outputs of a differentiable attention and its gradients of q, k, v, bias and sinks (those that there are)."""
    options = {**PLAIN, **options}
    leaves = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().to(dtype or x.dtype).requires_grad_())
        return leaves[-1]

    q, k, v = leaf(q), leaf(k), leaf(v)
    for name in ("bias", "sinks"):
        if options.get(name) is not None:
            options[name] = leaf(options[name])
    result = function(q, k, v, **options)
    o, lse = result if isinstance(result, tuple) else (result, None)
    loss = (o * d_o.to(o.dtype)).sum()
    if dlse is not None and lse is not None:
        real = lse.isfinite()
        loss = loss + (lse.where(real, 0) * dlse.to(lse.dtype).where(real, 0)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return o.detach(), None if lse is None else lse.detach(), grads


def operator_gradients(q, k, v, options: Options, d_o: Tensor, backend: str) -> list[Tensor]:
    """The operators' gradients of q, k, v, bias and sinks (those that there are)."""
    o, lse = forward(q, k, v, options, backend)
    found = backward(d_o, None, q, k, v, o, lse, options, backend)
    return list(compress(found, [True] * 3 + [options.get(name) is not None for name in ("bias", "sinks")]))


def math_path(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None,
              bias: Tensor | None = None, **_: Any) -> Tensor:  # fmt: skip
    if causal:
        shape = (q.shape[2], k.shape[2])
        mask = torch.ones(shape, dtype=torch.bool).tril(shape[1] - shape[0])
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            q, k, v, mask if bias is None else bias, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def in_own_dtype(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return reference(q, k, v, **options)[0]


def assert_as_good_as(
    peer: Any,
    draw: Callable[[], Sequence[Tensor]],
    options: Options | Callable[[Tensor, Tensor], Options],
    backend: str,
    times: float = 2,
) -> None:
    """Gradients of q, k, v, and of a bias and sinks where there are any, within the budget: so many times the peer's.

    The errors are means over a few draws: that of one draw may be small by luck, the peer's too.
    """
    draws = 4 if backend == "native" else 2  # interpreters are slow
    found: dict[str, list[tuple[float, float, float]]] = {}
    for _ in range(draws):
        q, k, v = draw()
        given = {"scale": q.shape[-1] ** -0.5, **(options(q, k) if callable(options) else options)}
        d_o = torch.randn(*q.shape[:-1], v.shape[-1], dtype=torch.float32).to(q.dtype)
        *_, truth = gradients(reference, q, k, v, given, torch.float64, d_o, None)
        *_, theirs = gradients(peer, q, k, v, given, None, d_o, None)
        ours = operator_gradients(q, k, v, given, d_o, backend)
        names = ["dq", "dk", "dv", *(f"d{name}" for name in ("bias", "sinks") if given.get(name) is not None)]
        for name, got, other, true in zip(names, ours, theirs, truth, strict=True):
            assert got.dtype == other.dtype, name
            ulps = 64 if got.dtype == torch.float64 else 32 if name in ("dbias", "dsinks") else 4
            floor = ulps * torch.finfo(got.dtype).eps * float(true.abs().max())
            found.setdefault(name, []).append((error(got, true), error(other, true), floor))
    for name, rows in found.items():
        ours_mean, theirs_mean, floor = (sum(column) / draws for column in zip(*rows, strict=True))
        budget = times * theirs_mean + floor
        assert ours_mean <= budget, f"{name}: error {ours_mean:.3g} over the budget of {budget:.3g}"


def assert_right(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    with_dlse: bool = False,
    backend: str = "native",
    repeat: bool = True,
) -> None:
    """Outputs and gradients are within budget, finite, and the same bits when asked again (if ``repeat``)."""
    COUNTS[f"calls of attention, there and back, held to the reference ({backend})"] += 1
    o, lse = forward(q, k, v, options, backend)
    d_o = torch.randn(o.shape, dtype=torch.float32).to(o.dtype)
    dlse = torch.randn(lse.shape, dtype=lse.dtype) if with_dlse else None
    true_o, true_lse, true_grads = gradients(reference, q, k, v, options, torch.float64, d_o, dlse)
    # Where lse takes part, the peer is the reference in q's dtype: eager torch has no lse to differentiate.
    peer_o, _, peer_grads = gradients(reference if with_dlse else eager, q, k, v, options, None, d_o, dlse)
    assert_within_budget(o, peer_o, true_o, "o")
    assert_lies_as(q, o, "o")

    assert torch.equal(lse.isinf(), true_lse.isinf()), "lse: -inf in other places than the truth"
    half = q.dtype in (torch.bfloat16, torch.float16)
    real = true_lse.isfinite()
    floor = {torch.float64: 1e-13, torch.float32: 2e-6}.get(q.dtype, 2e-5) * (1 + true_lse[real].abs())
    assert ((lse[real].double() - true_lse[real]).abs() <= floor).all(), "lse"

    grads = backward(d_o, dlse, q, k, v, o, lse, options, backend)
    wanted = [True] * 3 + [options.get(name) is not None for name in ("bias", "sinks")]
    names, ours = list(compress(("dq", "dk", "dv", "dbias", "dsinks"), wanted)), list(compress(grads, wanted))
    for name, got, peer, truth in zip(names, ours, peer_grads, true_grads, strict=True):
        assert got.dtype == peer.dtype
        # A gradient may be 0 by cancellation (of one key, of a bias that all keys share), and a peer's luckily exact.
        # The terms that cancel are of the order of 1 here, and those of a sum over rows err independently.
        terms = lse.numel() if name in ("dbias", "dsinks") else 1
        floor = (8 if half else 64) * torch.finfo(q.dtype).eps * max(1.0, float(truth.abs().max())) * math.sqrt(terms)
        budget = 2 * error(peer, truth) + (floor if got.dtype == q.dtype else max(floor, 1e-6))
        assert error(got, truth) <= budget, f"{name}: error {error(got, truth):.3g} over the budget of {budget:.3g}"
    for name, x, got in zip(("dq", "dk", "dv"), (q, k, v), grads, strict=False):
        assert_lies_as(x, got, name)
    if not repeat:
        return
    again = backward(d_o, dlse, q, k, v, o, lse, options, backend)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "another gradient the second time"
    assert all(torch.equal(a, b) for a, b in zip((o, lse), forward(q, k, v, options, backend), strict=True))


def assert_lies_as(x: Tensor, result: Tensor, name: str) -> None:
    """The result's dimensions are in memory in the order of x's. A single row has no stride that matters."""
    like = empty_as(x, result.shape[-1])
    strides = [[s for n, s in zip(y.shape, y.stride(), strict=True) if n > 1] for y in (result, like)]
    assert strides[0] == strides[1], f"{name} has strides {result.stride()} beside {x.stride()}"


def dense(shape=DENSE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, hq, hk, tq, tk, d, dv = shape
    sizes = (b, hq, tq, d), (b, hk, tk, d), (b, hk, tk, dv)
    return tuple(torch.randn(s, dtype=torch.float32).to(dtype) for s in sizes)  # type: ignore[return-value]


def packed(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, spare: int = 0):
    q = torch.randn(sum(lengths_q) + spare, 4, 24).to(dtype)
    k, v = torch.randn(sum(lengths_k) + spare, 2, 24).to(dtype), torch.randn(sum(lengths_k) + spare, 2, 17).to(dtype)
    cu = {n: torch.tensor([0, *x]).cumsum(0).int() for n, x in (("q", lengths_q), ("k", lengths_k))}
    return q, k, v, {"cu_seqlens_q": cu["q"], "cu_seqlens_k": cu["k"]}


def feature(name: str, dtype: torch.dtype, shape=DENSE) -> Options:
    b, hq, _, tq, tk, _, _ = shape
    mask = torch.rand(b, 1, tq, tk) < 0.6
    mask[0, 0, tq // 2] = False
    makers: dict[str, Callable[[], Options]] = {
        "plain": lambda: {},
        "negative scale": lambda: {"scale": -0.3},
        "causal": lambda: {"causal": True},
        "causal, top left": lambda: {"causal": True, "bottom_right": False},
        "window": lambda: {"window_left": 9, "window_right": 3},
        "window, causal": lambda: {"window_left": 9, "causal": True, "bottom_right": False},
        "softcap": lambda: {"softcap": 2.0},
        "bias": lambda: {"bias": torch.randn(b, hq, tq, tk).to(dtype)},
        "bias, broadcast over batch and queries": lambda: {"bias": torch.randn(1, hq, 1, tk)},
        "bias, broadcast over heads and keys": lambda: {"bias": torch.randn(b, 1, tq, 1).to(dtype)},
        "bias, one number": lambda: {"bias": torch.randn(1, 1, 1, 1), "mask": mask},
        "bias of -inf": lambda: {"bias": torch.randn(b, 1, tq, tk).masked_fill(~mask, -math.inf).to(dtype)},
        "mask": lambda: {"mask": mask},
        "mask of keys": lambda: {"mask": torch.rand(b, 1, 1, tk) < 0.6},
        "mask of queries": lambda: {"mask": torch.rand(1, hq, tq, 1) < 0.6},
        "mask, keys first in memory": lambda: {"mask": mask.transpose(2, 3).contiguous().transpose(2, 3)},
        "sinks": lambda: {"sinks": torch.randn(hq).to(dtype), "mask": mask},
        "sinks in float32": lambda: {"sinks": torch.randn(hq), "causal": True, "bottom_right": False},
        "alibi": lambda: {"alibi_slopes": torch.rand(hq)},
        "lengths": lambda: {
            "lengths_q": torch.randint(0, tq + 1, (b,)), "lengths_k": torch.randint(0, tk + 1, (b,)), "causal": True,
        },
        "prefix": lambda: {"prefix_lengths": torch.randint(0, tk + 1, (b,)), "causal": True},
        "prefix, window": lambda: {
            "prefix_lengths": torch.randint(0, tk + 1, (b,)), "window_left": 9, "window_right": 3,
            "bottom_right": False,
        },
        "dropout": lambda: {"dropout_p": 0.3, "seed": torch.tensor([0x1234567890ABCDEF])},
    }  # fmt: skip
    return makers[name]()


FEATURES = [
    "plain", "negative scale", "causal", "causal, top left", "window", "window, causal", "softcap", "bias",
    "bias, broadcast over batch and queries", "bias, broadcast over heads and keys", "bias, one number",
    "bias of -inf", "mask", "mask of keys", "mask of queries", "mask, keys first in memory", "sinks",
    "sinks in float32", "alibi", "lengths", "prefix", "prefix, window", "dropout",
]  # fmt: skip


def draw(rng: random.Random, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Options]:
    group, hk, b = rng.choice([1, 1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 2, 3])
    tq, tk = rng.choice([1, 3, 7, 9, 33, 65, 130]), rng.choice([1, 2, 17, 64, 129, 259])
    d = rng.choice([1, 7, 16, 33, 64])
    shape = (b, hk * group, hk, tq, tk, d, rng.choice([d, 5, 48]))
    q, k, v = dense(shape, dtype)
    options: Options = {"scale": d**-0.5}
    for name in rng.sample(FEATURES, rng.choice([2, 3, 4])):
        options |= feature(name, dtype, shape)
    layouts = [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
               lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
               lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2]]  # fmt: skip
    return *(rng.choice(layouts)(x) for x in (q, k, v)), options


def assert_past_a_length_is_never_read(queries: int, dtype: torch.dtype, backend: str = "native") -> None:
    """Whatever lies past a length has no part in any result, not even as a NaN; a sequence without keys gives zeros."""
    options = {"lengths_q": torch.tensor([queries, queries - 1]), "lengths_k": torch.tensor([61, 0])}
    q, k, v = dense((2, 2, 1, queries, 70, 16, 16), dtype)
    d_o = torch.randn(2, 2, queries, 16).to(dtype)
    results = []
    for junk in (0.0, math.nan, math.inf):
        q[1, :, queries - 1 :], d_o[1, :, queries - 1 :] = junk, junk
        k[0, :, 61:], v[0, :, 61:], k[1], v[1] = junk, junk, junk, junk
        o, lse = forward(q, k, v, options, backend)
        results.append((o, lse, *backward(d_o, None, q, k, v, o, lse, options, backend)[:3]))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    o, lse, dq, dk, dv = results[0]
    assert not o[1].any()
    assert (lse[1] == -math.inf).all()
    assert not any(x[1].any() for x in (dq, dk, dv))

"""Attention on a GPU: inputs, the truth of a few heads, and the contestants.

A truth of all heads in float64 would take longer than the whole run. It is computed for at most three pairs of a
sequence and a head of keys (the first, the last and a middle one), with all heads of queries that share it. An answer
is compared there, and must be finite everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from bench.cases import AttentionInputs, Draw, draw_heads
from bench.gpu.cases import Heads
from bench.peers import Entrant, Outputs, Unavailable
from bench.peers import cumulative as ends_of

ROWS = 2048
"""Rows of the score matrix that the truth holds at a time."""


def inputs(case: Heads, device: str) -> AttentionInputs:
    """q [B,Hq,Tq,D], k and v [B,Hk,Tk,D], d_o as q; varlen [total,H,D]: all unit normal."""
    draw = Draw(case, device)
    q, k, v = draw_heads(draw, case, sum(case.lengths()) if case.kind == "varlen" else None)
    return AttentionInputs(q, k, v, draw.gradient(*q.shape), None)


def sampled(case: Heads) -> list[tuple[int, int]]:
    """(sequence, head of keys) that are compared."""
    b, h = case.batch, case.kv_heads
    return list(dict.fromkeys([(0, 0), (b - 1, h - 1), (b // 2, h // 2)]))[: 1 if case.queries > 8192 else 3]


def places(case: Heads) -> list[tuple[Any, Any]]:
    """How to index the sampled heads of queries, and of keys, in a whole tensor: each [heads,T,D] after `pick`."""
    group, ends = case.heads // case.kv_heads, [0]
    found: list[tuple[Any, Any]] = []
    for length in case.lengths():
        ends.append(ends[-1] + length)
    for b, h in sampled(case):
        own, key = slice(h * group, (h + 1) * group), slice(h, h + 1)
        if case.kind == "varlen":
            rows = slice(ends[b], ends[b + 1])
            found.append(((rows, own), (rows, key)))
        else:
            found.append(((b, own), (b, key)))
    return found


def pick(case: Heads, tensor: Tensor, place: Any) -> Tensor:
    part = tensor[place]
    return part.transpose(0, 1) if case.kind == "varlen" else part


def attend(case: Heads, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor | None, dtype: torch.dtype) -> Outputs:
    """The formula and its gradients, step by step in ``dtype``; q, d_o [group,Tq,D], k and v [1,Tk,D]."""
    q, k, v = (t.to(dtype) for t in (q, k, v))
    shift = k.shape[1] - q.shape[1]
    j = torch.arange(k.shape[1], device=q.device)
    o = torch.empty_like(q)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    sums = torch.float64 if dtype == torch.float64 else torch.float32  # of parts, as in one large product
    dk, dv = dk.to(sums), dv.to(sums)
    for head in range(q.shape[0]):
        for start in range(0, q.shape[1], ROWS):
            rows = slice(start, start + ROWS)
            scores = q[head, rows] @ k[0].T * case.dim**-0.5
            i = torch.arange(start, start + scores.shape[0], device=q.device)[:, None] + shift
            if case.causal:
                hidden = j > i if not case.window else (j > i) | (j < i - case.window)
                scores = scores.masked_fill(hidden, -torch.inf)
            weights = scores.softmax(-1)
            o[head, rows] = weights @ v[0]
            if d_o is not None:
                g = d_o[head, rows].to(dtype)
                dv[0] += (weights.T @ g).to(sums)
                dp = g @ v[0].T
                ds = weights * (dp - (dp * weights).sum(-1, keepdim=True)) * case.dim**-0.5
                dq[head, rows] = ds @ k[0]
                dk[0] += (ds.T @ q[head, rows]).to(sums)
    return {"o": o} if d_o is None else {"d_q": dq, "d_k": dk.to(dtype), "d_v": dv.to(dtype)}


def answers(case: Heads, given: AttentionInputs, device: str, dtype: torch.dtype) -> Outputs:
    """The truth, or the formula in another dtype, of the sampled heads: each tensor flat, heads one after another."""
    parts: dict[str, list[Tensor]] = {}
    for own, key in places(case):
        d_o = pick(case, given.d_o, own) if case.training else None
        q, k, v = pick(case, given.q, own), pick(case, given.k, key), pick(case, given.v, key)
        for name, tensor in attend(case, q, k, v, d_o, dtype).items():
            parts.setdefault(name, []).append(tensor.flatten())
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def compared(case: Heads, outputs: Outputs) -> Outputs:
    """A contestant's answer at the sampled heads; all NaN if any value of the whole answer is not finite."""
    found = {}
    for name, tensor in outputs.items():
        of_keys = name in ("d_k", "d_v")
        found[name] = torch.cat([pick(case, tensor, place[of_keys]).flatten() for place in places(case)])
        if not bool(tensor.isfinite().all()):
            found[name] = torch.full_like(found[name], torch.nan)
    return found


def entrant(case: Heads, function: Callable[..., Any], given: AttentionInputs) -> Entrant:
    """One call of ``function(q, k, v)``; in a backward case, the backward pass of a call made before."""
    if not case.training:
        return Entrant(lambda: function(given.q, given.k, given.v), lambda o: compared(case, {"o": o}))
    leaves = [tensor.clone().requires_grad_() for tensor in (given.q, given.k, given.v)]
    with torch.enable_grad():
        o = function(*leaves)
    return Entrant(
        lambda: torch.autograd.grad(o, leaves, given.d_o, retain_graph=True),
        lambda grads: compared(case, dict(zip(("d_q", "d_k", "d_v"), grads, strict=True))),
    )


def cumulative(case: Heads, device: str) -> Tensor:
    return ends_of(torch.tensor(case.lengths(), device=device))


def ours(case: Heads, given: AttentionInputs, device: str) -> Entrant:
    """fastseq.attention on the backend in force."""
    options: dict[str, Any] = {"causal": case.causal}
    if case.window:
        options["window"] = (case.window, 0)
    if case.kind == "varlen":
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = cumulative(case, device)
    return entrant(case, partial(fastseq.attention, **options), given)


def sdpa(kernel: str) -> Callable[[Heads, AttentionInputs, str], Entrant]:
    """torch's scaled_dot_product_attention made to use one of its kernels (``MATH``, ``CUDNN_ATTENTION``, ...)."""

    def prepare(case: Heads, given: AttentionInputs, device: str) -> Entrant:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if case.window or case.kind == "varlen":
            raise Unavailable("scaled_dot_product_attention has no window and no packed sequences")
        chosen = [getattr(SDPBackend, kernel)]
        grouped = case.heads != case.kv_heads

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

        try:
            return entrant(case, run, given)
        except RuntimeError as error:
            raise unavailable(error) from error

    return prepare


def unavailable(error: RuntimeError) -> Exception:
    """Whether an error means that a forced kernel of torch cannot run this: it then says that there is no kernel."""
    nothing = any(words in str(error) for words in ("available kernel", "No viable backend"))
    return Unavailable(str(error).splitlines()[0]) if nothing else error


def varlen_entrant(case: Heads, given: AttentionInputs, device: str) -> Entrant:
    """torch.nn.attention.varlen: FlashAttention on packed sequences."""
    if case.kind != "varlen":
        raise Unavailable("for packed sequences")
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = cumulative(case, device), max(case.lengths())
    window = (-1, 0) if case.causal else (-1, -1)
    return entrant(case, lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest, window_size=window), given)


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 4096  # every shape is compiled; past the limit it would run uncompiled
    attention: Callable[..., Any] = flex_attention
    return torch.compile(attention, dynamic=False)


def flex_entrant(case: Heads, given: AttentionInputs, device: str) -> Entrant:
    """FlexAttention, compiled; on the cases it is made for and worth compiling: windows, the largest causal cases, and
    decoding."""
    if case.kind == "varlen" or not (case.window or case.kind == "decode" or (case.causal and case.keys >= 8192)):
        raise Unavailable("FlexAttention is measured on windows, decoding, and causal cases from 8192 on")
    from torch.nn.attention.flex_attention import create_block_mask

    left = case.window or case.keys

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - left)

    mask = create_block_mask(visible, None, None, case.queries, case.keys, device=device) if case.causal else None
    grouped = case.heads != case.kv_heads
    return entrant(case, partial(compiled_flex(), block_mask=mask, enable_gqa=grouped), given)

"""Attention: torch's ``scaled_dot_product_attention``, and the same with everything later models ask of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import auto
from fastseq import backend as backends
from fastseq.attn import autocast, int8, pages
from fastseq.attn import autograd as autograd_attention
from fastseq.attn import checks as checks_attention
from fastseq.attn import direct as direct_attention
from fastseq.attn import dtensor as dtensor_attention
from fastseq.attn import eager as eager_attention
from fastseq.attn import prefix as shared_prefix
from fastseq.attn.cache import KVCache
from fastseq.attn.call import AttentionCall, is_limited, scale_of, tensors_of, with_four_dimensions
from fastseq.attn.reference import attention_weights
from fastseq.calibration.calls import attention_shape
from fastseq.checks import ArgumentError
from fastseq.dtensor import any_dtensor, in_eager
from fastseq.ops import attention as ops_attention
from fastseq.ops import triton as ops_triton

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastseq.attn.options import Options


@overload
def attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, return_lse: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    align: str = "bottom_right",
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    lengths_q: Tensor | None = None,
    lengths_k: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    cache: KVCache | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: NoReturn,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale + bias) v; Vaswani et al. 2017.

    The score of query i and key j is s = scale · q[i]·k[j]; then softcap · tanh(s / softcap); then + bias[i, j];
    then − alibi_slopes · |i + shift − j|. Key j is visible where ``causal`` and ``window`` allow it or
    j < ``prefix_lengths``, and where j < ``lengths_k``, and where ``mask`` is True. A row that sees no key gives 0 and
    has zero gradients. ``align`` sets shift, the key that the diagonal meets at query 0: 0 for ``"top_left"``, Tk − Tq
    for ``"bottom_right"`` (of each sequence's own lengths, where they vary).

    Args:
        q: ``[B, Hq, Tq, D]``; float64, float32, bfloat16 or float16; any strides.
        k: ``[B, Hk, Tk, D]``, q's dtype; Hk divides Hq, each of its heads serves Hq / Hk of q's.
        v: ``[B, Hk, Tk, Dv]``, q's dtype.
        bias: added to the scores; broadcastable to ``[B, Hq, Tq, Tk]``, q's dtype or float32; has a gradient.
        mask: bool, broadcastable to ``[B, Hq, Tq, Tk]``; True: query i may look at key j.
        causal: a query sees keys j <= i + shift.
        align: ``"bottom_right"`` or ``"top_left"``.
        window: (left, right): a query sees i + shift − left <= j <= i + shift + right; −1 for no limit.
        softcap: bound of the scores before bias, 0 for none; Gemma 2, 2024.
        sinks: ``[Hq]``, one more logit in each softmax's denominator that carries no value; Xiao et al. 2023. q's
            dtype or float32; has a gradient.
        alibi_slopes: ``[Hq]``, q's dtype or float32, constants; Press et al. 2021.
        lengths_q, lengths_k: int ``[B]``: positions from there on are padding, never read; o is 0 there.
        prefix_lengths: int ``[B]``, beside ``causal`` or ``window``: keys j < prefix_lengths[b] are seen by every query
            of sequence b whatever these two say, as in a prefix-LM; Raffel et al. 2020. Packed too.
        prefix: k ``[Hk, P, D]`` and v ``[Hk, P, Dv]``: keys that every query of every sequence sees before its own, a
            system prompt; read once for the batch. Limits, bias, mask and lengths are of the other keys. Not together
            with alibi_slopes.
        cu_seqlens_q, cu_seqlens_k: int32 ``[B + 1]``, running sums of lengths from 0: q, k and v are then packed,
            ``[total, H, D]``, sequence after sequence. Not together with bias, mask or lengths.
        block_table: int32 ``[B, pages]``: k and v are then a cache in pages, pools ``[P, page, Hk, D]`` and
            ``[P, page, Hk, Dv]`` that all sequences share, and key j of sequence b is row j % page of page
            block_table[b, j // page]; Kwon et al. 2023. ``lengths_k`` must say how many keys each sequence has; what
            the table names past them is never looked at. Tk is pages · page. q may be packed by ``cu_seqlens_q``
            alone. The Triton kernels and the native ones on the CPU read the pages where they lie; for any other
            backend, a gradient or dropout the keys are gathered first.
        cache: a :class:`fastseq.KVCache` in the place of k, v and their lengths; q's batch is its batch. Queries are
            aligned with the end of each sequence; a cache with ``window`` limits what they see to that. Of int8 the
            native kernels on the CPU read it where it lies; others get it widened to q's dtype.
        scale: 1 / sqrt(D) by default.
        dropout_p: chance in [0, 1] of each weight to be dropped, the kept ones scaled by 1 / (1 − dropout_p). Drawn
            from torch's default generator: the same after the same ``torch.manual_seed``.
        return_lse: also return the logarithm of each row's denominator.
        backend: ``reference``, ``torch``, ``native`` or ``triton``; by default the one in force.

    Returns:
        o ``[B, Hq, Tq, Dv]`` (packed ``[total_q, Hq, Dv]``) in q's dtype, dense, its dimensions in memory in the order
        of q's (features innermost), so that ``o.transpose(1, 2).view(B, Tq, Hq * Dv)`` works where q was made by
        ``x.view(B, Tq, Hq, D).transpose(1, 2)``; with ``return_lse`` also lse ``[B, Hq, Tq]``
        (packed ``[Hq, total_q]``), float32, float64 for float64; −inf where a row sees neither key nor sink. Both
        have gradients, to any order.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit; the message names the argument.
        BackendError: the backend that was named cannot do this; or torch's ``context_parallel`` is on.

    Under autocast q, k and v take its dtype; bias, sinks and alibi_slopes of the other 16-bit dtype take float32.

    Example:
        >>> q, k, v = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
        >>> o, lse = attention(q, k, v, causal=True, window=(3, 0), return_lse=True)
        >>> o.shape, lse.shape
        (torch.Size([2, 8, 5, 16]), torch.Size([2, 8, 5]))

        One token each for two sequences of 37 and 5 keys, in pages of 16:

        >>> pool_k, pool_v = torch.randn(10, 16, 2, 16), torch.randn(10, 16, 2, 16)
        >>> table = torch.tensor([[7, 2, 4], [9, 0, 0]], dtype=torch.int32)
        >>> attention(q[:, :, :1], pool_k, pool_v, block_table=table, lengths_k=torch.tensor([37, 5])).shape
        torch.Size([2, 8, 1, 16])
    """
    k_scale = v_scale = None
    if unknown:
        checks_attention.refuse_keyword("attention", unknown, checks_attention.MEANT_FOR_ATTENTION)
    if cache is not None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a fastseq.KVCache, got {type(cache).__name__}")
        given = {"k": k, "v": v, "lengths_k": lengths_k, "cu_seqlens_k": cu_seqlens_k, "block_table": block_table}
        top_left = None if align == "bottom_right" else align
        of_positions = {"bias": bias, "mask": mask, "prefix_lengths": prefix_lengths, "align": top_left}
        (k, v, k_scale, v_scale), lengths_k, block_table, window = cache.arguments(window, given, of_positions)
    elif k is None or v is None:
        raise TypeError("attention: k and v are missing; give both, or cache= in their place")
    short = alibi_slopes is cu_seqlens_q is cu_seqlens_k is prefix_lengths is prefix is None
    short = short and backend is None and dropout_p == 0.0 and not return_lse and align in ("bottom_right", "top_left")
    if short:
        plain = sinks is lengths_q is lengths_k is block_table is None
        kept = () if plain else (sinks, lengths_q, lengths_k, block_table, k_scale, v_scale)
        o = direct_attention.attend(
            q, k, v, bias, mask, (scale, causal, align == "bottom_right", window, softcap, True), kept
        )  # fmt: skip
        if o is not None:
            return o
    q, k, v, bias, sinks, alibi_slopes = autocast.cast_inputs(q, k, v, bias, sinks, alibi_slopes)
    if k_scale is None:
        checks_attention.check_tensors(("q", "k", "v"), q, k, v)
    else:
        int8.check_query(q, k)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if block_table is not None:
        checks_attention.check_paged(q, k, v, block_table, lengths_k, cu_seqlens_q, cu_seqlens_k, cache is not None)
        block_table = block_table.to(torch.int32)
    if packed and block_table is not None:
        checks_attention.check_no_dense(bias=bias, mask=mask, lengths_q=lengths_q)
    elif packed:
        checks_attention.check_packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, bias=bias, mask=mask, lengths_q=lengths_q, lengths_k=lengths_k
        )
    else:
        if block_table is None:
            checks_attention.check_dense(q, k, v)
        shape = (*q.shape[:3], k.shape[2] if block_table is None else block_table.shape[1] * k.shape[1])
        if lengths_q is not None:
            checks_attention.check_lengths("lengths_q", lengths_q, q, shape[2])
        if lengths_k is not None:
            checks_attention.check_lengths("lengths_k", lengths_k, q, shape[3])
        if bias is not None:
            checks_attention.check_pairs("bias", bias, q, shape, is_bool=False)
            bias = with_four_dimensions(bias)
        if mask is not None:
            checks_attention.check_pairs("mask", mask, q, shape, is_bool=True)
            mask = with_four_dimensions(mask)
    if packed:
        cu_seqlens_q, cu_seqlens_k = _to(cu_seqlens_q, torch.int32), _to(cu_seqlens_k, torch.int32)
    if not (lengths_q is lengths_k is None):
        lengths_q, lengths_k = _to(lengths_q, torch.int64), _to(lengths_k, torch.int64)
    if sinks is not None:
        checks_attention.check_per_head("sinks", sinks, q, q.shape[1])
    if alibi_slopes is not None:
        checks_attention.check_per_head("alibi_slopes", alibi_slopes, q, q.shape[1])
        checks_attention.check_alibi(alibi_slopes)
        alibi_slopes = alibi_slopes.to(torch.promote_types(q.dtype, torch.float32))
    checks_attention.check_numbers(scale, softcap, dropout_p)
    bottom_right = checks_attention.check_align(align)
    left, right = checks_attention.check_window(window)
    if prefix_lengths is not None:
        if not causal and left < 0 and right < 0:
            raise ArgumentError(
                "prefix_lengths needs causal=True or a window, got neither: every query sees every key; leave it out"
            )
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        longest = shape[3] if not packed else k.shape[0] if block_table is None else block_table.shape[1] * k.shape[1]
        checks_attention.check_lengths("prefix_lengths", prefix_lengths, q, longest, batch)
        prefix_lengths = prefix_lengths.to(torch.int64)
    call = AttentionCall(
        q, k, v, bias, mask, sinks, alibi_slopes, lengths_q, lengths_k, prefix_lengths, cu_seqlens_q, cu_seqlens_k,
        block_table, k_scale, v_scale, scale=scale_of(q, scale), causal=bool(causal), bottom_right=bottom_right,
        window_left=left, window_right=right, softcap=float(softcap), dropout_p=float(dropout_p),
    )  # fmt: skip
    if prefix is None:
        o, lse = _attend(call, return_lse, backend)
    else:
        shared_prefix.check(prefix, call)
        o, lse = shared_prefix.attend(call, prefix, lambda part: _attend(part, True, backend))
    return (o, lse) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``, argument for argument.

    It differs in one thing: a row that sees no key gives 0 and has zero gradients, whatever the mask's dtype.

    Args:
        query: ``[..., Hq, L, E]``, or ``[L, E]``; float64, float32, bfloat16 or float16.
        key: ``[..., H, S, E]``; leading dimensions broadcast with query's.
        value: ``[..., H, S, Ev]``.
        attn_mask: broadcastable to ``[..., Hq, L, S]``; bool (True: may look), or floating (query's dtype or float32)
            and added to the scores. Under autocast it may be of either 16-bit dtype.
        dropout_p: chance of each weight to be dropped, in [0, 1]; applied whenever it is not 0.
        is_causal: key j is visible to query i where j <= i, counted from the top left. Not together with attn_mask.
        scale: 1 / sqrt(E) by default.
        enable_gqa: H may be a divisor of Hq; each of its heads then serves Hq / H of query's.

    Returns:
        ``[..., Hq, L, Ev]`` in query's dtype, its dimensions in memory in the order of query's. Nested tensors are
        given to torch's own function, and so is a call inside of torch's ``context_parallel`` that names no backend.

    Raises:
        ArgumentError: shapes, dtypes, devices or values that do not fit; the message names the argument.
        BackendError: the backend in force was named and cannot do this.

    Example:
        >>> query, key = torch.randn(3, 4, 5, 16), torch.randn(3, 4, 9, 16)
        >>> scaled_dot_product_attention(query, key, key, attn_mask=torch.rand(5, 9) < 0.5).shape
        torch.Size([3, 4, 5, 16])
    """
    if unknown:
        meant = checks_attention.MEANT_FOR_TORCH
        checks_attention.refuse_keyword("scaled_dot_product_attention", unknown, meant)
    if isinstance(query, Tensor) and query.is_nested:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if dropout_p == 0.0 and not (is_causal and attn_mask is not None):
        bias, mask = (None, attn_mask) if getattr(attn_mask, "dtype", None) is torch.bool else (attn_mask, None)
        done = direct_attention.attend(
            query, key, value, bias, mask, (scale, is_causal, False, None, 0.0, enable_gqa)
        )  # fmt: skip
        if done is not None:
            return done
    if backends.context_parallel() and backends.forced() in (None, "torch"):
        return F.scaled_dot_product_attention(  # which is torch's distributed one there
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    names = ("query", "key", "value")
    query, key, value, attn_mask = autocast.cast_inputs(query, key, value, attn_mask)
    checks_attention.check_tensors(names, query, key, value)
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in zip(names, (query, key, value), strict=True))
        raise ArgumentError(f"query, key and value must be at least 2-D [..., L, E], got {shapes}")
    checks_attention.check_sizes(names, query, key, value)
    checks_attention.check_numbers(scale, 0.0, dropout_p)
    bottom_right = False
    if attn_mask is not None:
        if is_causal:
            raise ArgumentError("attn_mask must not be given with is_causal=True; put the causal limit into the mask")
        limit = _causal_limit(attn_mask)
        if limit is not None:
            is_causal, bottom_right, attn_mask = True, limit == "LOWER_RIGHT", None
    shape = None
    if not (
        query.dim() == key.dim() == value.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and (attn_mask is None or attn_mask.dim() <= 4)
    ):
        query, key, value, attn_mask, shape = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    bias, mask = None, None
    if attn_mask is not None:
        is_bool = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool
        checks_attention.check_pairs("attn_mask", attn_mask, query, (*query.shape[:3], key.shape[2]), is_bool)
        attn_mask = with_four_dimensions(attn_mask)
        bias, mask = (None, attn_mask) if is_bool else (attn_mask, None)
    call = AttentionCall(
        query, key, value, bias, mask, scale=scale_of(query, scale), causal=bool(is_causal), bottom_right=bottom_right,
        dropout_p=float(dropout_p),
    )  # fmt: skip
    o, _ = _attend(call)
    return o if shape is None else o.reshape(*shape, *o.shape[-2:])


def attention_and_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` (top-left aligned), and the matrix that multiplies v.

    No fused kernel forms that matrix, so AUTO leaves both to torch's products; a backend named by hand computes o, and
    the reference the weights beside it.

    Args:
        q, k, v: ``[B, H, Tq, D]``, ``[B, H, Tk, D]``, ``[B, H, Tk, Dv]``.
        bias, mask, causal, dropout_p, backend: as :func:`attention`.

    Returns:
        o ``[B, H, Tq, Dv]`` and weights ``[B, H, Tq, Tk]``, after dropout; 0 in a row that sees no key.

    Raises:
        ArgumentError, BackendError: as :func:`attention`.
    """
    q, k, v, bias = autocast.cast_inputs(q, k, v, bias)
    checks_attention.check_tensors(("q", "k", "v"), q, k, v)
    checks_attention.check_dense(q, k, v)
    checks_attention.check_numbers(None, 0.0, dropout_p)
    backends.check_not_context_parallel()
    shape = (*q.shape[:3], k.shape[2])
    if bias is not None:
        checks_attention.check_pairs("bias", bias, q, shape, is_bool=False)
    if mask is not None:
        checks_attention.check_pairs("mask", mask, q, shape, is_bool=True)
    named = backends.forced(backend) is not None

    def reasons(name: str) -> str | None:
        if name in ("reference", "torch"):
            return None
        return _operator_reason(name, q, v) if named else "its kernels do not return the weights (need_weights=True)"

    name = backends.resolve("attention", "", auto.device_key(q.device), reasons, backend)
    call = AttentionCall(q, k, v, bias, mask, scale=scale_of(q, None), causal=causal, dropout_p=dropout_p)
    if name == "torch":
        return eager_attention.attention_and_weights(call)
    call = call._replace(seed=_seed(q) if dropout_p > 0.0 else None)
    weights = attention_weights(
        q, k, bias=bias, mask=mask, seed=call.seed, scale=call.scale, causal=causal, bottom_right=False,
        dropout_p=dropout_p,
    )  # fmt: skip
    if name == "reference":
        return weights @ v, weights
    call = call._replace(bias=with_four_dimensions(bias), mask=with_four_dimensions(mask))
    return autograd_attention.run(name, call)[0], weights


def _to(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _operator_reason(name: str, q: Tensor, v: Tensor) -> str | None:
    """Why an operator backend cannot run attention of these; None where it can."""
    if name == "triton":
        return ops_triton.attention_reason(q, v)
    reason = backends.operator_reason(name, q.device.type, "attention")
    if reason is None and q.device.type == "cuda":
        reason = ops_attention.native_cuda_reason(q.dtype, q.shape[-1], v.shape[-1])
    return reason


def _causal_limit(mask: object) -> str | None:
    """The variant's name of a ``torch.nn.attention.bias.CausalBias``; None of anything else. Its module, which imports
    torch._dynamo, is imported only for masks that may be one."""
    if type(mask) is Tensor or not hasattr(mask, "variant"):
        return None
    from torch.nn.attention.bias import CausalBias

    return mask.variant.name if isinstance(mask, CausalBias) else None


def _seed(q: Tensor) -> Tensor:
    """The key of this call's dropout mask, from torch's default generator of q's device: no synchronisation."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def _four_dimensions(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """Whatever leading dimensions there are as one batch and one of heads; and what the result's are to be."""
    flat = q.dim() == k.dim() == v.dim() == 2
    shapes = [list(x.shape) for x in (q, k, v)]
    q, k, v = (x.unsqueeze(0) if x.dim() == 2 else x for x in (q, k, v))
    heads_q, heads_k = q.shape[-3], k.shape[-3]
    try:
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        if not enable_gqa:
            (heads_k,) = torch.broadcast_shapes((heads_k,), v.shape[-3:-2])
            (heads_q,) = torch.broadcast_shapes((heads_q,), (heads_k,))
    except RuntimeError:
        hint = "" if enable_gqa else "; grouped heads need enable_gqa=True"
        raise ArgumentError(
            f"the leading dimensions of query, key and value must broadcast, got {shapes[0]}, {shapes[1]} and "
            f"{shapes[2]}{hint}"
        ) from None
    if enable_gqa:
        checks_attention.check_heads(heads_q, heads_k, v.shape[-3])
    shape = () if flat else (*lead, heads_q)

    def as_batch(x: Tensor, heads: int) -> Tensor:
        x = x.expand(*lead, heads, *x.shape[-2:])
        return x.unsqueeze(0) if len(lead) == 0 else x.flatten(0, len(lead) - 1)

    if mask is not None:
        is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
        checks_attention.check_pairs("attn_mask", mask, q, (*shape, q.shape[-2], k.shape[-2]), is_bool)
        if mask.dim() >= 4 and len(lead) > 1:
            alike = math.prod(mask.shape[:-3]) == 1
            mask = mask.flatten(0, -4) if alike else as_batch(mask, mask.shape[-3])
    return as_batch(q, heads_q), as_batch(k, heads_k), as_batch(v, heads_k), mask, shape


def _attend(call: AttentionCall, return_lse: bool = False, backend: str | None = None) -> tuple[Tensor, Any]:
    """Choose the backend and run it: o and lse, which may be None where ``return_lse`` is not set."""
    backends.check_not_context_parallel()
    if any_dtensor(tensors_of(call)):
        arguments: tuple = call, lambda shard: _attend(shard, return_lse, backend)
        attend = dtensor_attention.attend
        return in_eager(attend, *arguments) if call.dropout_p > 0.0 else attend(*arguments)
    q, k, v = call.q, call.k, call.v
    device, kind = auto.device_key(q.device), ""
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if device in auto.ATTENTION_KINDS:
        kind = auto.attention_kind(
            q.dtype,
            q.shape[-2],
            k.shape[-2],
            untimed=call.dropout_p > 0.0
            or not (call.block_table is call.k_scale is None)
            or not (call.bias is call.mask is call.alibi_slopes is call.prefix_lengths is None),
            limits=is_limited(call),
            training=training,
        )
    shape = attention_shape(call, training) if backends.wants_description(q.device) else None

    def reasons(name: str) -> str | None:
        if name == "reference":
            return None
        return eager_attention.torch_reason(call, return_lse) if name == "torch" else _operator_reason(name, q, v)

    name = backends.resolve("attention", kind, device, reasons, backend, shape and (shape, q.device))
    if call.dropout_p > 0.0 and name != "torch":
        call = call._replace(seed=_seed(q))
    if not (call.block_table is call.k_scale is None) and not autograd_attention.reads_cache(name, call):
        call = call if call.block_table is None else pages.gather(call)
        if call.k_scale is not None:
            call = int8.widen(call, torch.float32 if name == "reference" else q.dtype)
    return (eager_attention.attention(call), None) if name == "torch" else autograd_attention.run(name, call)


checks_attention.hide_unknown(attention)
checks_attention.hide_unknown(scaled_dot_product_attention)

"""Models of Hugging Face transformers on fastseq's attention.

import fastseq
fastseq.integrations.transformers.register()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastseq")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastseq.checks import ArgumentError
from fastseq.functional import attention
from fastseq.integrations import own_kernels_hidden

with own_kernels_hidden():
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

from fastseq.integrations import caches
from fastseq.integrations.caches import Cache as Cache
from fastseq.integrations.masks import Limits, LimitsMask, TracedLimits, limits, read, read_traced, traced_limits

RESERVED = ("eager", "sdpa", "flash", "flex_attention", "paged|", "/")
"""Parts of a name by which transformers takes an implementation for one of its own."""
REFUSED = ("indices", "block_indices")
"""Keywords of models that choose their keys by an index: such a model masks the other keys itself for eager and sdpa
alone, and leaves it to any other implementation to look only at these."""


def register(name: str = "fastseq") -> None:
    """Make ``attn_implementation=name`` run attention by :func:`fastseq.attention`.

    Every model of transformers that takes its attention from ``AttentionInterface`` can then be made, loaded or
    switched (``model.set_attn_implementation(name)``) to it, for training, inference and ``generate``. Causal and
    sliding limits, chunks, padding, packed documents and caches come as limits and lengths, without the matrix
    [B, 1, Tq, Tk], where the model's mask is made of transformers' own mask functions; any other mask comes as the
    matrix. A query that may look at no key gives 0. Calling it again changes nothing.

    Args:
        name: what models are to call it; none of transformers' own names.

    Raises:
        ArgumentError: a name that transformers takes for one of its own.
        ImportError: transformers is too old.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register()
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        ...                      vocab_size=50)
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="fastseq")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 50])
    """
    if not isinstance(name, str) or not name or any(part in name for part in RESERVED):
        raise ArgumentError(
            f"name must be a text without any of {', '.join(map(repr, RESERVED))}, by which transformers knows its own "
            f"implementations, got {name!r}; leave it out for 'fastseq'"
        )
    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise ImportError(
            f"transformers {transformers.__version__} is too old: its mask functions know no q_offset; "
            f"pip install -U transformers"
        )
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | TracedLimits | None:
    """The mask of one kind of layers, as ``transformers.masking_utils.sdpa_mask`` makes it, or a :class:`LimitsMask` in
    its place. None says that every query sees every key."""
    matrix = partial(
        masking_utils.sdpa_mask, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, device=device,
        **{**kwargs, "allow_is_causal_skip": False},
    )  # fmt: skip
    if isinstance(attention_mask, TracedLimits):
        return attention_mask
    if use_vmap or getattr(attention_mask, "ndim", 2) != 2:
        return matrix()
    tracing = masking_utils.is_tracing(attention_mask)
    if tracing and not torch.compiler.is_dynamo_compiling():
        return matrix()
    if tracing:
        skips = (kwargs.get("allow_is_causal_skip", False), allow_is_bidirectional_skip)
        pattern = read_traced(mask_function, skips, kwargs.get("local_size"), kwargs.get("config"))
    else:
        pattern = read(mask_function)
    if pattern is None:
        return matrix()
    if isinstance(q_offset, Tensor) and q_offset.is_cpu and not tracing:
        q_offset = int(q_offset)
    seen = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if seen is not None:
        seen = seen[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    said = traced_limits if tracing else limits
    found = said(pattern, batch_size, (q_length, kv_length), (q_offset, kv_offset), seen)
    if found is None:
        return matrix()
    if allow_is_bidirectional_skip and not found.options and found.cu_seqlens is None:
        return None
    if tracing:
        return TracedLimits(found, matrix, (batch_size, 1, q_length, kv_length))
    return LimitsMask(found, matrix, (batch_size, 1, q_length, kv_length), torch.device(device))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | TracedLimits | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """One call of attention by a layer of transformers.

    Args:
        query, key, value: [B, Hq, Tq, D], [B, Hk, Tk, D], [B, Hk, Tk, Dv].
        attention_mask: what :func:`make_mask` gave; or a mask of the user's or the model's own, broadcastable to
            [B, Hq, Tq, Tk]: bool (True: may look) or floating (added to the scores).
        options: ``softcap``, ``s_aux`` [Hq], ``sinks`` [B, Hq, Tq, 1], ``position_bias``. What else transformers hands
            over says what the mask says, or is not for attention.

    Returns:
        o [B, Tq, Hq, Dv], and None in place of the weights, which no fused kernel forms.

    Raises:
        ArgumentError: an option that changes the result and that is not known here.
    """
    _check(module, options)
    given = {
        "scale": scaling,
        "softcap": options.get("softcap") or 0.0,
        "sinks": options.get("s_aux"),
        "dropout_p": dropout if module.training else 0.0,
    }
    bias, sinks = options.get("position_bias"), options.get("sinks")
    if query.shape[0] != key.shape[0]:
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    mask: Any = attention_mask
    if isinstance(key, caches.CachedTensor):
        in_place = caches.arguments(key, query, mask) if bias is sinks is None else None
        if in_place is not None:
            return _dense(query, None, None, None, None, None, given | in_place), None
        key, value = caches.dense(key), caches.dense(value)
    if isinstance(mask, (LimitsMask, TracedLimits)):
        found = mask.limits if mask.shape[2:] == (query.shape[2], key.shape[2]) else None
        if found is None or (found.cu_seqlens is not None and not (bias is sinks is None)):
            mask = mask.matrix()
        elif found.cu_seqlens is not None:
            return _packed(query, key, value, found, given), None
        else:
            key, value = key[:, :, : found.keys], value[:, :, : found.keys]
            bias = None if bias is None else bias[..., : found.keys]
            given |= found.options
            mask = None
    elif mask is None and query.shape[2] > 1:
        given["causal"] = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        given["align"] = "top_left"
    return _dense(query, key, value, mask, bias, sinks, given), None


def _check(module: torch.nn.Module, options: dict[str, Any]) -> None:
    for name in REFUSED:
        if options.get(name) is not None:
            raise ArgumentError(
                f"{type(module).__name__} chooses its keys by {name}=, which fastseq does not take; "
                f"use attn_implementation='sdpa' for this model"
            )
    if options.get("output_attentions"):
        transformers.utils.logging.get_logger(__name__).warning_once(
            "fastseq's attention does not form the weights, so output_attentions=True gets None for them; "
            "use attn_implementation='eager' for a model whose weights are to be read."
        )


def _dense(
    query: Tensor, key: Any, value: Any, mask: Any, bias: Any, sinks: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """Attention of a batch, [B, Tq, Hq, Dv], with what is added to its scores, and a sink for each query. Key and value
    are None where ``given`` has a cache."""
    if mask is not None and mask.dtype == torch.bool:
        given["mask"] = mask
    elif mask is not None:
        bias = mask if bias is None else bias + mask
    if bias is not None:
        given["bias"] = bias if bias.dtype in (query.dtype, torch.float32) else bias.to(query.dtype)
    if sinks is None:
        o: Any = attention(query, key, value, **given)
    else:
        o, lse = attention(query, key, value, return_lse=True, **given)
        o = o * torch.sigmoid(lse.unsqueeze(-1) - sinks).to(o.dtype)  # the keys' part of the denominator
    return o.transpose(1, 2).contiguous()


def _packed(query: Tensor, key: Tensor, value: Tensor, found: Limits, given: dict[str, Any]) -> Tensor:
    """Attention within the sequences that a batch is cut into, [B, T, Hq, Dv]."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    ends: dict[str, Any] = {"cu_seqlens_q": found.cu_seqlens, "cu_seqlens_k": found.cu_seqlens}
    o: Any = attention(q, k, v, **given, **found.options, **ends)
    return o.unflatten(0, (query.shape[0], query.shape[2])).contiguous()

"""A cache of transformers over :class:`fastseq.KVCache`: attention reads it where it lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from fastseq.attn import int8, pages
from fastseq.attn.cache import KVCache
from fastseq.attn.call import AttentionCall
from fastseq.checks import ArgumentError
from fastseq.integrations.masks import LimitsMask


class Cache(cache_utils.Cache):
    """Keys and values of every layer of a model, for ``generate(past_key_values=...)`` or ``model(cache=...)``.

    Layers with full attention have a contiguous :class:`fastseq.KVCache`, those with a sliding window a ring of its
    length. With ``attn_implementation="fastseq"`` each step reads them in place; any other implementation gets copies.
    It is for inference: it takes no keys that want a gradient.

    Args:
        config: the model's.
        capacity: positions a sequence in layers with full attention; None: they grow.
        dtype: of what is kept, by default the model's; ``torch.int8`` for numbers with a scale a token and head.

    Raises:
        ArgumentError: a kind of layers that is not known here; later, keys that want a gradient, or more positions than
            ``capacity``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        ...                      vocab_size=50, bos_token_id=0, eos_token_id=1)
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="fastseq")
        >>> tokens = model.generate(torch.tensor([[2, 3]]), past_key_values=Cache(config), max_new_tokens=4,
        ...                         min_new_tokens=4)
        >>> tokens.shape
        torch.Size([1, 6])
    """

    def __init__(self, config: Any, *, capacity: int | None = None, dtype: torch.dtype | None = None) -> None:
        layers = cache_utils.DynamicCache(config=config).layers
        super().__init__(layers=[_made(layer, capacity, dtype) for layer in layers])


def _made(layer: Any, capacity: int | None, dtype: torch.dtype | None) -> Any:
    """The layer in the place of one of ``DynamicCache``."""
    if type(layer) is cache_utils.DynamicLayer:
        return Layer(dtype, capacity=capacity)
    if type(layer) is cache_utils.DynamicSlidingWindowLayer:
        return Layer(dtype, window=layer.sliding_window)
    if type(layer) is cache_utils.DummyLayer:
        return layer
    raise ArgumentError(
        f"config has layers that keep a {type(layer).__name__}; fastseq's cache has full attention and sliding windows "
        "alone: leave past_key_values out for transformers' own cache"
    )


class Layer(cache_utils.CacheLayerMixin):
    """One layer's keys and values. All sequences are of one length, padding included."""

    def __init__(self, dtype: torch.dtype | None, *, capacity: int | None = None, window: int | None = None) -> None:
        super().__init__()
        self.dtype, self.capacity, self.window = dtype, capacity, window
        self.is_sliding = window is not None
        self.is_croppable = not self.is_sliding
        self.cumulative_length = 0
        self.cache: KVCache | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, dim = key_states.shape
        self.cache = KVCache(
            batch, heads, dim, dim_v=value_states.shape[-1], capacity=self.capacity, window=self.window,
            dtype=self.dtype or key_states.dtype, device=key_states.device,
        )  # fmt: skip
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends; what attention then gets are tensors that stand for the cache. At first the cache holds nothing else
        than what is given, and attention gets that."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ArgumentError("fastseq's cache keeps no gradient: call the model under torch.no_grad()")
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        assert self.cache is not None
        length, offset = self.get_mask_sizes(key_states.shape[2])
        self.cache.append(*(x.to(self.dtype) if self._converts() else x for x in (key_states, value_states)))
        first, self.cumulative_length = self.cumulative_length == 0, offset + length
        if first:
            return key_states, value_states
        rows = Rows(self.cache, length, self.cumulative_length, key_states.dtype)
        found = CachedTensor(rows, 0, key_states), CachedTensor(rows, 1, value_states)
        return (dense(found[0]), dense(found[1])) if torch.compiler.is_compiling() else found

    def _converts(self) -> bool:
        return self.dtype is not None and self.dtype != torch.int8

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        before = self.cumulative_length if self.window is None else min(self.cumulative_length, self.window - 1)
        return before + query_length, self.cumulative_length - before

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None and self.capacity is None else self.window or self.capacity or -1

    def reset(self) -> None:
        self.cumulative_length = 0
        if self.cache is not None:
            self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest -tokens_to_remove positions."""
        if tokens_to_remove == 0 or self.cache is None:
            return
        if self.window is not None or not -self.cumulative_length <= tokens_to_remove < 0:
            raise ArgumentError(
                f"crop({tokens_to_remove}): a layer with a sliding window has forgotten what it would need, and any "
                f"other takes from -{self.cumulative_length}, its length, to 0"
            )
        self.cumulative_length += tokens_to_remove
        self.cache.lengths += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.cache is not None:
            self.batch_select_indices(torch.arange(self.cache.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.cache is not None:
            self.cache = selected(self.cache, indices.to(self.cache.k.device))


def selected(cache: KVCache, sequences: Tensor) -> KVCache:
    """A contiguous cache, or a ring, of these sequences, which may come in any order and more than once."""
    new = KVCache(
        len(sequences), cache.heads, cache.dim, dim_v=cache.dim_v, capacity=cache.capacity, window=cache.window,
        page_size=cache.page_size, dtype=cache.k.dtype, device=cache.k.device,
    )  # fmt: skip
    own = sequences
    if cache.table is not None:
        own = cache.table[sequences].flatten().long()
        new.table = torch.arange(len(own), dtype=torch.int32, device=own.device).view(len(sequences), -1)
        new.free = new.table.flatten().clone()
        new.first = cache.first[sequences]
    for name in ("k", "v", "k_scale", "v_scale"):
        x = getattr(cache, name)
        setattr(new, name, None if x is None else x[own])
    new.lengths = cache.lengths[sequences]
    return new


class Rows:
    """The newest ``count`` of ``length`` positions of a cache, in this dtype."""

    def __init__(self, cache: KVCache, count: int, length: int, dtype: torch.dtype) -> None:
        self.cache, self.count, self.length, self.dtype = cache, count, length, dtype
        self.copies: tuple[Tensor, Tensor] | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies, [B, H, count, D] each."""
        if self.copies is None:
            if int(self.cache.lengths[0]) != self.length:
                raise RuntimeError("these keys are of an earlier step: the cache has moved on")
            (k, v, k_scale, v_scale), lengths, table, _ = self.cache.arguments(None, {}, {})
            call = AttentionCall(k, k, v, lengths_k=lengths, block_table=table, k_scale=k_scale, v_scale=v_scale)
            call = call if table is None else pages.gather(call)
            call = call if k_scale is None else int8.widen(call, self.dtype)
            end = int(lengths[0])
            k, v = (x[:, :, end - self.count : end].to(self.dtype) for x in (call.k, call.v))
            self.copies = k, v
        return self.copies


class CachedTensor(Tensor):
    """Keys or values [B, H, count, D] that lie in a cache. Whatever reads them but fastseq's attention gets a copy."""

    rows: Rows
    which: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[CachedTensor], rows: Rows, which: int, like: Tensor) -> CachedTensor:
        shape = (*like.shape[:2], rows.count, like.shape[3])
        x = Tensor._make_wrapper_subclass(cls, shape, dtype=rows.dtype, device=like.device)
        x.rows, x.which = rows, which
        return x

    def dense(self) -> Tensor:
        return self.rows.read()[self.which]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = torch.utils._pytree.tree_map(
            lambda x: dense(x) if isinstance(x, Tensor) else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def dense(x: Tensor) -> Tensor:
    """A copy of what stands for a cache; any other tensor as it is."""
    return x.dense() if isinstance(x, CachedTensor) else x


def arguments(key: CachedTensor, query: Tensor, mask: Any) -> dict[str, Any] | None:
    """What attention is told for it to read the cache in place; None where it needs copies: of a mask that is a matrix,
    of padding in a ring, and of lengths that are not the cache's."""
    cache, queries, keys = key.rows.cache, query.shape[2], key.shape[2]
    options: dict[str, Any] = {}
    if isinstance(mask, LimitsMask) and mask.shape[2:] == (queries, keys) and mask.limits is not None:
        if mask.limits.cu_seqlens is not None or mask.limits.keys != keys or "lengths_k" in mask.limits.options:
            return None
        options |= mask.limits.options
    elif mask is not None or queries > 1:
        return None
    if options.pop("align", None) == "top_left" and queries != keys:
        return None
    if cache.window is not None:
        left, right = options.pop("window", (-1, -1))
        if left not in (-1, cache.window - 1) or right > 0 or "mask" in options:
            return None
    elif "mask" in options:
        options["mask"] = torch.nn.functional.pad(options["mask"], (0, cache.k.shape[2] - keys))
    return {**options, "cache": cache}

"""The keywords of ``fastseq.attention``, for type checkers."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from fastseq.attn.cache import KVCache


class Options(TypedDict, total=False):
    """All but return_lse, on which the result's type depends."""

    bias: Tensor | None
    mask: Tensor | None
    causal: bool
    align: str
    window: tuple[int, int] | None
    softcap: float
    sinks: Tensor | None
    alibi_slopes: Tensor | None
    lengths_q: Tensor | None
    lengths_k: Tensor | None
    prefix_lengths: Tensor | None
    prefix: tuple[Tensor, Tensor] | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    block_table: Tensor | None
    cache: KVCache | None
    scale: float | None
    dropout_p: float
    backend: str | None

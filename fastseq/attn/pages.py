"""A cache of keys and values in pages, laid out as the operators take them that know no pages."""

from __future__ import annotations

import torch
from torch import Tensor


def gather(
    k: Tensor, v: Tensor, block_table: Tensor, lengths_k: Tensor, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The pages of each sequence, one after another; differentiable, and nothing waits for the device.

    Args:
        k: ``[P, page, Hk, D]``; v: ``[P, page, Hk, Dv]``.
        block_table: int32 ``[B, pages]``; anything past a sequence's keys.
        lengths_k: int64 ``[B]``.
        packed: whether the queries are.

    Returns:
        k ``[B, Hk, pages * page, D]``, v, lengths_k and None; packed: k ``[B * pages * page, Hk, D]``, of which the
        rows past the last sequence's are spare, v, None and cu_seqlens_k int32 ``[B + 1]``.
    """
    batch, pages = block_table.shape
    page = k.shape[1]
    used = torch.arange(pages, device=k.device) * page < lengths_k[:, None]
    table = torch.where(used, block_table, 0).to(torch.int64)
    if not packed:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))
        return k, v, lengths_k, None
    cu_seqlens_k = torch.nn.functional.pad(lengths_k.cumsum(0), (1, 0))  # [B + 1]
    row = torch.arange(batch * pages * page, device=k.device)
    b = torch.searchsorted(cu_seqlens_k[1:], row, right=True).clamp(max=max(batch - 1, 0))
    j = (row - cu_seqlens_k[b]).clamp(max=max(pages * page - 1, 0))
    k, v = (x[table[b, j // page], j % page] for x in (k, v))
    return k, v, None, cu_seqlens_k.to(torch.int32)

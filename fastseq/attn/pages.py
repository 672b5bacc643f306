"""A cache of keys and values in pages, laid out as the operators take them that know no pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall


def gather(call: AttentionCall) -> AttentionCall:
    """The call with the pages of each sequence one after another; differentiable, and nothing waits for the device.

    Args:
        call: k ``[P, page, Hk, D]``, v ``[P, page, Hk, Dv]``, lengths_k ``[B]`` and block_table int32 ``[B, pages]``,
            which holds anything past a sequence's keys; q may be packed. Scales of int8 are pools as k is.

    Returns:
        The call with k ``[B, Hk, pages * page, D]`` and v alike; where q is packed, with k
        ``[B * pages * page, Hk, D]``, of which the rows past the last sequence's are spare, v alike, and cu_seqlens_k
        in place of lengths_k.
    """
    lengths_k, block_table = call.lengths_k, call.block_table
    assert lengths_k is not None
    assert block_table is not None
    batch, pages = block_table.shape
    page = call.k.shape[1]
    used = torch.arange(pages, device=lengths_k.device) * page < lengths_k[:, None]
    table = torch.where(used, block_table, 0).to(torch.int64)
    if call.cu_seqlens_q is None:
        return _replaced(call, lambda x: x[table].flatten(1, 2).transpose(1, 2))
    cu_seqlens_k = torch.nn.functional.pad(lengths_k.cumsum(0), (1, 0))  # [B + 1]
    row = torch.arange(batch * pages * page, device=lengths_k.device)
    b = torch.searchsorted(cu_seqlens_k[1:], row, right=True).clamp(max=max(batch - 1, 0))
    j = (row - cu_seqlens_k[b]).clamp(max=max(pages * page - 1, 0))
    call = _replaced(call, lambda x: x[table[b, j // page], j % page])
    return call._replace(lengths_k=None, cu_seqlens_k=cu_seqlens_k.to(torch.int32))


def _replaced(call: AttentionCall, gathered: Callable[[Tensor], Tensor]) -> AttentionCall:
    pools = {name: getattr(call, name) for name in ("k", "v", "k_scale", "v_scale")}
    found: dict[str, Any] = {name: gathered(x) for name, x in pools.items() if x is not None}
    return call._replace(**found, block_table=None)

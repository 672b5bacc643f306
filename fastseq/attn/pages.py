"""A cache of keys and values in pages, laid out as the operators take them that know no pages."""

from __future__ import annotations

import torch

from fastseq.attn.call import AttentionCall


def gather(call: AttentionCall) -> AttentionCall:
    """The call with the pages of each sequence one after another; differentiable, and nothing waits for the device.

    Args:
        call: k ``[P, page, Hk, D]``, v ``[P, page, Hk, Dv]``, lengths_k ``[B]`` and block_table int32 ``[B, pages]``,
            which holds anything past a sequence's keys; q may be packed.

    Returns:
        The call with k ``[B, Hk, pages * page, D]`` and v alike; where q is packed, with k
        ``[B * pages * page, Hk, D]``, of which the rows past the last sequence's are spare, v alike, and cu_seqlens_k
        in place of lengths_k.
    """
    k, v, lengths_k, block_table = call.k, call.v, call.lengths_k, call.block_table
    assert lengths_k is not None
    assert block_table is not None
    batch, pages = block_table.shape
    page = k.shape[1]
    used = torch.arange(pages, device=k.device) * page < lengths_k[:, None]
    table = torch.where(used, block_table, 0).to(torch.int64)
    if call.cu_seqlens_q is None:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))
        return call._replace(k=k, v=v, block_table=None)
    cu_seqlens_k = torch.nn.functional.pad(lengths_k.cumsum(0), (1, 0))  # [B + 1]
    row = torch.arange(batch * pages * page, device=k.device)
    b = torch.searchsorted(cu_seqlens_k[1:], row, right=True).clamp(max=max(batch - 1, 0))
    j = (row - cu_seqlens_k[b]).clamp(max=max(pages * page - 1, 0))
    k, v = (x[table[b, j // page], j % page] for x in (k, v))
    return call._replace(k=k, v=v, block_table=None, lengths_k=None, cu_seqlens_k=cu_seqlens_k.to(torch.int32))

"""Which plain calls on the CPU go to the native kernels, where measurements send some of them elsewhere.

Nothing is checked before: what is odd about a call is left to the general path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastseq.attn.call import AttentionCall, with_four_dimensions
from fastseq.backend import divided, native_for
from fastseq.calibration.calls import DTYPE_NAMES, AttentionShape, attention_shape


def takes_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, settings: tuple
) -> bool:  # fmt: skip
    """Whether a call of attention goes to the native kernels; arguments as of ``fastseq.attn.direct.attend``."""
    if not divided("attention") or not all(isinstance(x, Tensor) and x.dim() == 4 for x in (q, k, v)):
        return False
    if not all(x is None or (isinstance(x, Tensor) and x.dim() <= 4) for x in (bias, mask)):
        return False
    _, causal, bottom_right, window, softcap, _ = settings
    if window is not None and not (isinstance(window, tuple) and [type(limit) for limit in window] == [int, int]):
        return False
    if type(causal) is not bool or type(softcap) not in (float, int):
        return False
    left, right = window or (-1, -1)
    call = AttentionCall(
        q, k, v, with_four_dimensions(bias), with_four_dimensions(mask), causal=causal, bottom_right=bottom_right,
        window_left=left, window_right=right, softcap=softcap,
    )  # fmt: skip
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    sizes = q.shape, k.shape, v.shape, None if bias is None else bias.shape, None if mask is None else mask.shape
    key = q.dtype, sizes, causal, bottom_right, window, softcap > 0.0, wanted
    return native_for(key, lambda: attention_shape(call, wanted))


def takes_layer(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, heads: int, batch_first: bool, causal: bool
) -> bool:  # fmt: skip
    """Whether a call of a MultiheadAttention without gradients goes to the one native call."""
    if not divided("attention") or not (isinstance(query, Tensor) and isinstance(key, Tensor)):
        return False
    if not query.dim() == key.dim() == 3 or type(causal) is not bool:
        return False
    (batch, queries), keys = query.shape[:2], key.shape[1]
    if not batch_first:
        batch, queries, keys = queries, batch, key.shape[0]
    dim, of = query.shape[-1] // heads, "bhqk"
    dtype = DTYPE_NAMES.get(query.dtype, "")
    made = AttentionShape(
        dtype, batch, heads, heads, queries, keys, dim, dim, causal, False, mask=of if mask is not None else "",
        bias=of if bias is not None else "",
    )  # fmt: skip
    return native_for(made, lambda: made)

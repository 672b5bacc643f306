"""What autocast makes of a call of attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KEPT = (torch.float64, torch.int8)  # by autocast: int8 stands beside its scales


def cast_inputs(q: Tensor, k: Tensor, v: Tensor, *added: Tensor | None) -> tuple[Any, ...]:
    """q, k and v in autocast's dtype where it is on, as autocast does for torch's own attention. What is added to the
    scores, which need not have q's dtype, is widened to float32: rounded to autocast's dtype, as torch does, a mask of
    finfo(float32).min would be -inf."""
    if not isinstance(q, Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v, *added
    dtype = torch.get_autocast_dtype(q.device.type)
    cast = (x.to(dtype) if isinstance(x, Tensor) and x.dtype not in _KEPT else x for x in (q, k, v))
    halves = {torch.bfloat16, torch.float16} - {dtype}
    return *cast, *(x.float() if isinstance(x, Tensor) and x.dtype in halves else x for x in added)

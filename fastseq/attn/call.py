"""One call of attention as one object: its fields are the operators' arguments, in their order.

A new option of attention is a field here; the schemas (``fastseq/ops/schemas.py``) and the places of arguments in them
are made of these fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # setup.py reads this file where torch cannot be imported
    from torch import Tensor


class AttentionCall(NamedTuple):
    """Arguments that were checked. Shapes and dtypes are those of the operator: ``fastseq/ops/schemas.py``."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None
    lengths_q: Tensor | None = None
    lengths_k: Tensor | None = None
    prefix_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    seed: Tensor | None = None
    scale: float = 1.0
    causal: bool = False
    bottom_right: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0


_SCHEMA_TYPES = {"Tensor | None": "Tensor?"}
_TYPES = {name: str(getattr(t, "__forward_arg__", t)) for name, t in AttentionCall.__annotations__.items()}

SCHEMA = {name: f"{_SCHEMA_TYPES.get(_TYPES[name], _TYPES[name])} {name}" for name in AttentionCall._fields}
"""Each field as the operators' schemas declare it."""

OPTIONS = AttentionCall._fields[3:]
"""All but q, k and v."""

OPTIONS_SCHEMA = ", ".join(SCHEMA[name] for name in OPTIONS)

TENSORS = tuple(name for name in AttentionCall._fields if _TYPES[name].startswith("Tensor"))
"""The fields that hold tensors; they come first."""

PER_SEQUENCE = tuple(name for name in TENSORS if "lengths" in name)
"""The fields of one number a sequence, [B]."""


def tensors_of(fields: Sequence) -> Sequence:
    """Of a call's fields the tensors, None where one is absent; the call is
    ``AttentionCall(*tensors_of(call), *settings_of(call))``."""
    return fields[: len(TENSORS)]


def settings_of(fields: Sequence) -> Sequence:
    """Of a call's fields all that are no tensors."""
    return fields[len(TENSORS) :]


def is_limited(call: AttentionCall) -> bool:
    """Whether anything but ``causal`` and the mask says which keys are seen."""
    return (
        call.window_left >= 0
        or call.window_right >= 0
        or not (call.lengths_q is call.lengths_k is call.prefix_lengths is call.cu_seqlens_q is None)
    )


def with_four_dimensions(x: Tensor | None) -> Tensor | None:
    """A bias or a mask with the dimensions that it broadcasts along."""
    return x if x is None or x.dim() == 4 else x.reshape((1,) * (4 - x.dim()) + tuple(x.shape))


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale that a user gave, or 1 / sqrt(D)."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)

"""Smaller copies of a layer's weight matrices, for inference that is bound by reading them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = ("bfloat16", "int8")
"""bfloat16: each weight rounded to 8 significant bits. int8: each row times a float32 scale, its largest weight 127."""


class _Source:
    """What a copy was made from. The memory is kept alive with it, so that its address cannot be another tensor's."""

    def __init__(self, weight: Tensor | None) -> None:
        self.weight = weight
        self.memory = None if weight is None else weight.detach()
        self.address = 0 if weight is None else weight.data_ptr()
        self.version = _version(weight)

    def is_still(self, weight: Tensor | None) -> bool:
        if weight is not self.weight:
            return False
        return weight is None or (weight.data_ptr() == self.address and _version(weight) == self.version)


def _version(weight: Tensor | None) -> int:
    return 0 if weight is None or weight.is_inference() else weight._version


class CompressedWeights:
    """Copies of one layer's float32 matrices, made at the first use and again when a weight has changed.

    A change is noticed by the tensor's identity, address and version: whatever goes through autograd's book-keeping
    (an optimizer, ``load_state_dict``, ``copy_``), not by writing through ``.data`` or ``.numpy()``.

    Args:
        kind: one of :data:`KINDS`.
    """

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"weights: got {kind!r}, accepted is one of {', '.join(map(repr, KINDS))}")
        self.kind = kind
        self._made: tuple[list[_Source], list[Tensor], list[Tensor]] | None = None

    def of(self, weights: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        """The weights with each matrix replaced by its copy, and the scales of int8 ones; matrices of another dtype
        than float32 stay as they are.

        Args:
            weights: matrices ``[rows, K]`` and biases ``[rows]`` in the layer's order; None where absent.

        Returns:
            the list with copies, and float32 scales ``[rows]``, one for each int8 matrix.
        """
        made = self._made
        if made is None or not all(s.is_still(w) for s, w in zip(made[0], weights, strict=True)):
            compressed, scales = [], []
            with torch.no_grad():
                for weight in weights:
                    copy, scale = self._compress(weight)
                    compressed.append(copy)
                    if scale is not None:
                        scales.append(scale)
            sources = [_Source(weight) for weight in weights]
            made = self._made = (sources, compressed, scales)  # at once: other threads may be reading
        return made[1], made[2]

    def _compress(self, weight: Any) -> tuple[Any, Tensor | None]:
        if weight is None or weight.dim() != 2 or weight.dtype is not torch.float32:
            return weight, None
        if self.kind == "bfloat16":
            return weight.to(torch.bfloat16), None
        scale = weight.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale

    def __getstate__(self) -> dict[str, Any]:  # a copy of the layer has weights of its own
        return {"kind": self.kind, "_made": None}

"""The parameters of a recurrent layer's normalisations (``norm=``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.recurrent.normed import weight_sizes


class NormedLayer(nn.RNNBase):
    """A recurrent layer that may have normalisations, whose parameters come after torch's."""

    norm: str | None = None  # on the class, so that a torch.nn layer whose class is swapped needs nothing more

    def _cell(self) -> str:
        raise NotImplementedError

    def _set_norm(self, norm: str | None) -> None:
        if norm is None:
            return
        self.norm = norm
        like: Any = self._flat_weights[0]
        for name, size in self._norm_sizes().items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=like.dtype, device=like.device)))
        self._reset_norms()

    def _norm_sizes(self) -> dict[str, int]:
        """The parameters in their flat order, with their sizes."""
        if self.norm is None:
            return {}
        own = weight_sizes(self._cell(), self.norm, self.hidden_size)
        ends = [f"_l{n}{back}" for n in range(self.num_layers) for back in ("", "_reverse")[: 1 + self.bidirectional]]
        return {name + end: size for end in ends for name, size in own.items()}

    def _norm_weights(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._norm_sizes()]

    def _reset_norms(self) -> None:
        for name in self._norm_sizes():
            nn.init.constant_(getattr(self, name), 0.0 if "_bias_" in name else 1.0)

    def reset_parameters(self) -> None:
        """Torch's; gains of normalisations become 1, and their shifts 0."""
        super().reset_parameters()
        self._reset_norms()

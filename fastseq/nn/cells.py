"""RNNCell, GRUCell and LSTMCell: one step of a recurrent layer, drop-in for torch.nn's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastseq import checks, functional
from fastseq.nn.recurrent import _Native


class _Cell(_Native):
    def _weights(self) -> list[Tensor]:
        own: Any = self._parameters  # asking the module for each takes longer than the arithmetic
        weights = own.values() if list(own) == _CELL_WEIGHTS else [getattr(self, name) for name in _CELL_WEIGHTS]
        return [w for w in weights if w is not None]


_CELL_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]


class RNNCell(_Cell, nn.RNNCell):
    """One step of an RNN, drop-in for :class:`torch.nn.RNNCell`: input ``[B, I]`` or ``[I]``, hx ``[B, H]``."""

    def forward(self, input: Tensor, hx: Tensor | None = None, state_mask: Tensor | None = None) -> Tensor:
        """Returns the new hidden state. ``state_mask``, shaped as hx, multiplies what the product reads of hx."""
        if state_mask is None:
            done = self._in_one_call(_CELL_WEIGHTS, input, hx, None, "rnn_" + self.nonlinearity, "cell")
            if done is not None:
                return done[0]
        return functional.rnn_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, nonlinearity=self.nonlinearity,
            state_mask=state_mask,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward


class GRUCell(_Cell, nn.GRUCell):
    """One step of a GRU, drop-in for :class:`torch.nn.GRUCell`, with ``reset_after`` as :class:`GRU`'s."""

    reset_after: bool = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        reset_after: bool = True,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        if not reset_after:
            self.reset_after = False

    def extra_repr(self) -> str:
        """Torch's, and reset_after where it differs from torch's form."""
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None, state_mask: Tensor | None = None) -> Tensor:
        """Returns the new hidden state. ``state_mask``, shaped as hx, multiplies what the products read of hx."""
        if state_mask is None:
            name = "gru" if self.reset_after else "gru_reset_before"
            done = self._in_one_call(_CELL_WEIGHTS, input, hx, None, name, "cell")
            if done is not None:
                return done[0]
        return functional.gru_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, reset_after=self.reset_after,
            state_mask=state_mask,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward


class LSTMCell(_Cell, nn.LSTMCell):
    """One step of an LSTM, drop-in for :class:`torch.nn.LSTMCell`: hx is ``(h, c)``, each ``[B, H]``; with
    ``input_forget`` as :class:`LSTM`'s."""

    input_forget: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        input_forget: bool = False,
    ) -> None:
        chunks = 3 if input_forget else 4
        super(nn.LSTMCell, self).__init__(input_size, hidden_size, bias, chunks, device, dtype)
        if input_forget:
            self.input_forget = True

    def extra_repr(self) -> str:
        """Torch's, and input_forget where it differs from torch's form."""
        return super().extra_repr() + (", input_forget=True" if self.input_forget else "")

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, state_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the new ``(h, c)``. ``state_mask``, shaped as h, multiplies what the product reads of h."""
        if state_mask is None:
            h, c = checks.lstm_state(hx)
            name = "lstm_coupled" if self.input_forget else "lstm"
            done = self._in_one_call(_CELL_WEIGHTS, input, h, c, name, "cell")
            if done is not None:
                return done[0], done[1]
        return functional.lstm_cell(
            input, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, input_forget=self.input_forget,
            state_mask=state_mask,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward

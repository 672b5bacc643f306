"""The ``torch`` backend of the recurrent layers: what torch.nn itself would run, where it can express the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

if TYPE_CHECKING:
    from fastseq.recurrent.functional import Stack

_TORCH = {"rnn_tanh": "rnn_tanh", "rnn_relu": "rnn_relu", "gru": "gru", "lstm": "lstm"}


def torch_reason(stack: Stack, lengths: Tensor | None, reset: Tensor | None, want_states: bool) -> str | None:
    """Why torch's own layers cannot run this stack; None where they can."""
    if stack.cell not in _TORCH:
        return "torch has no GRU with the reset gate before the product (reset_after=False)"
    if reset is not None:
        return "torch has no reset="
    if want_states:
        return "torch does not return every c_t (return_all_states=True)"
    if lengths is not None and torch.compiler.is_compiling():
        return "torch packs sequences on the host, which torch.compile cannot trace"
    if lengths is not None and lengths.numel() and bool((lengths == 0).any()):
        return "torch cannot pack a sequence of length 0"
    return None


def torch_stack(
    stack: Stack,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the whole stack through torch: x ``[T, B, I]`` to y, h_n, c_n; x and y ``[rows, N]`` with batch_sizes."""
    function = getattr(torch._VF, _TORCH[stack.cell])
    state = h0 if c0 is None else (h0, c0)
    tail = (stack.has_biases, stack.num_layers, stack.dropout, stack.training, stack.bidirectional)
    if batch_sizes is not None:
        y, *last = function(x, batch_sizes, state, list(weights), *tail)
        return y, last[0], last[1] if c0 is not None else None
    if lengths is None:
        y, *last = function(x, state, list(weights), *tail, False)
        return y, last[0], last[1] if c0 is not None else None
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    state = h0[:, order] if c0 is None else (h0[:, order], c0[:, order])
    data, *last = function(packed.data, packed.batch_sizes, state, list(weights), *tail)
    y, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes, order, back), total_length=x.shape[0])
    return y, last[0][:, back], last[1][:, back] if c0 is not None else None


def autocast_dtype(stack: Stack, x: Tensor, h0: Tensor | None, c0: Tensor | None, packed: bool) -> torch.dtype:
    """The dtype that a layer or cell computes in under autocast: autocast's, but where torch's returns a wider one.

    On the CPU torch has no fused GRU, no fused cell of gates, and no fused LSTM of a packed batch. It makes their
    products in autocast's dtype and the rest in the state's, so a float32 state stays float32.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    lstm = stack.cell == "lstm" and not stack.projected
    if x.device.type == "cpu" and (stack.cell.startswith("gru") or (lstm and (stack.is_cell or packed))):
        for state in (x if h0 is None else h0, x if c0 is None and h0 is None else c0):
            dtype = carried_dtype(dtype, state)
    return dtype


def carried_dtype(dtype: torch.dtype, state: Tensor | None) -> torch.dtype:
    """The dtype of a state that starts as ``state`` and meets products of ``dtype``; float64 is the caller's."""
    if state is None or not state.is_floating_point() or state.dtype == torch.float64:
        return dtype
    return torch.promote_types(dtype, state.dtype)


def autocast(
    dtype: torch.dtype, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    """Everything in ``dtype``, as autocast does for torch's own recurrent layers; float64 stays."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    states = (None if s is None else cast(s) for s in (h0, c0))
    return cast(x), *states, [cast(w) for w in weights]  # type: ignore[return-value]

"""The ``torch`` backend of the recurrent layers: what torch.nn itself would run, where it can express the call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastseq import ops
from fastseq.recurrent.call import RecurrentCall


def torch_reason(call: RecurrentCall) -> str | None:
    """Why torch's own layers cannot run this call; None where they can."""
    if ops.NOT_IN_TORCH[call.cell]:
        return ops.NOT_IN_TORCH[call.cell]
    if call.reset is not None:
        return "torch has no reset="
    if call.state_mask is not None or call.draws_mask:
        return "torch has no state_mask (recurrent_dropout)"
    if any(call.zoneout):
        return "torch has no zoneout"
    if call.norm is not None:
        return "torch has no layer normalisation within its recurrent layers (norm=)"
    if call.want_states:
        return "torch does not return every c_t (return_all_states=True)"
    ends = call.lengths if call.batch_sizes is None else call.batch_sizes
    if ends is not None and torch.compiler.is_compiling():
        return "torch packs sequences on the host, which torch.compile cannot trace"
    if ends is not None and ends.numel() and bool((ends == 0).any()):
        return "torch cannot pack a sequence of length 0"
    return None


def torch_stack(call: RecurrentCall, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run the whole stack through torch: x ``[T, B, I]`` to y, h_n, c_n; x and y ``[rows, N]`` with batch_sizes."""
    x, h0, c0, lengths = call.x, call.h0, call.c0, call.lengths
    h0 = x.new_zeros(call.rows, batch, call.weights[1].shape[1]) if h0 is None else h0
    c0 = x.new_zeros(call.rows, batch, call.hidden) if ops.HAS_C[call.cell] and c0 is None else c0
    function = getattr(torch._VF, call.cell)
    weights = list(call.weights)
    state = h0 if c0 is None else (h0, c0)
    tail = (call.has_biases, call.num_layers, call.dropout, call.training, call.bidirectional)
    if call.batch_sizes is not None:
        y, *last = function(x, call.batch_sizes, state, weights, *tail)
        return y, last[0], last[1] if c0 is not None else None
    if lengths is None:
        y, *last = function(x, state, weights, *tail, False)
        return y, last[0], last[1] if c0 is not None else None
    packed = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
    order, back = packed.sorted_indices, packed.unsorted_indices
    assert order is not None
    assert back is not None
    state = h0[:, order] if c0 is None else (h0[:, order], c0[:, order])
    data, *last = function(packed.data, packed.batch_sizes, state, weights, *tail)
    y, _ = pad_packed_sequence(PackedSequence(data, packed.batch_sizes, order, back), total_length=x.shape[0])
    return y, last[0][:, back], last[1][:, back] if c0 is not None else None


def autocast_dtype(call: RecurrentCall) -> torch.dtype:
    """The dtype that a layer or cell computes in under autocast: autocast's, but where torch's returns a wider one.

    On the CPU torch has no fused GRU, no fused cell of gates, and no fused LSTM of a packed batch. It makes their
    products in autocast's dtype and the rest in the state's, so a float32 state stays float32.
    """
    x, h0, c0 = call.x, call.h0, call.c0
    dtype = torch.get_autocast_dtype(x.device.type)
    uneven = call.batch_sizes is not None or call.lengths is not None
    lstm = ops.HAS_C[call.cell] and not call.projected
    if x.device.type == "cpu" and (call.cell.startswith("gru") or (lstm and (call.is_cell or uneven))):
        for state in (x if h0 is None else h0, x if c0 is None and h0 is None else c0):
            dtype = carried_dtype(dtype, state)
    return dtype


def carried_dtype(dtype: torch.dtype, state: Tensor | None) -> torch.dtype:
    """The dtype of a state that starts as ``state`` and meets products of ``dtype``; float64 is the caller's."""
    if state is None or not state.is_floating_point() or state.dtype == torch.float64:
        return dtype
    return torch.promote_types(dtype, state.dtype)


def autocast(call: RecurrentCall) -> None:
    """Everything in :func:`autocast_dtype`, as autocast does for torch's own recurrent layers; float64 stays."""
    dtype = autocast_dtype(call)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    call.x, call.weights = cast(call.x), [cast(w) for w in call.weights]
    call.norm_weights = [cast(w) for w in call.norm_weights]
    for name in ("h0", "c0", "reset_h", "reset_c", "state_mask"):
        state = getattr(call, name)
        setattr(call, name, None if state is None else cast(state))

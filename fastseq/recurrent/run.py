"""Runs a call of a stack of layers: checks, the choice of a backend, layers and directions one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import auto, autograd, checks, ops
from fastseq import backend as backends
from fastseq.dtensor import any_dtensor, in_eager
from fastseq.recurrent import dtensor, eager, normed, onnx, packed, recompute, reference, stack
from fastseq.recurrent.autograd import DIFFERENTIABLE, FORWARD, Scan, Walk
from fastseq.recurrent.call import RecurrentCall, Result, shape_of
from fastseq.recurrent.layout import state_in, state_out, steps_in, steps_out


def run(call: RecurrentCall, backend: str | None) -> Result:
    """Check the arguments, choose the backend, run the stack; results are laid out as the input. Changes ``call``."""
    beside = call.h0, call.c0, call.reset_h, call.reset_c, call.state_mask, call.lengths, call.reset
    if any_dtensor((call.x, *call.weights, *call.norm_weights, *beside)):
        arguments: tuple = call, lambda shard: run(shard, backend)
        return in_eager(dtensor.run, *arguments) if call.draws else dtensor.run(*arguments)
    c_dtype = _cast_as_autocast(call)
    checks.check_input(call.x, call.weights[0], call.batch_first)
    # Packed data are laid out as a layer's already.
    layout, rank = ("layer", 3) if call.batch_sizes is not None else (call.layout, call.x.dim())
    steps, batch = _check_and_lay_out(call, layout, rank)
    name = _choose(call, backend, steps, batch)
    if call.draws_mask:
        ones = call.x.new_ones(call.rows, batch, call.weights[1].shape[1])
        call.state_mask = F.dropout(ones, call.recurrent_dropout, True)
    if name == "torch":
        y, h_n, c_n = eager.torch_stack(call, batch)
        states = None
    elif name == "onnx":
        y, h_n, c_n, states = onnx.stack(call)
    elif call.batch_sizes is not None:
        y, h_n, c_n, states = _packed(name, call)
    else:
        y, h_n, c_n, states = _padded(name, call)
    if states is not None:
        states = states.to(y.dtype)
    if c_dtype is not None and c_n is not None and c_n.dtype != torch.float64:
        c_n = c_n.to(c_dtype)
    h_n, c_n = (state_out(layout, rank, s) for s in (h_n, c_n))
    return steps_out(layout, rank, y), h_n, c_n, steps_out(layout, rank, states)


def _cast_as_autocast(call: RecurrentCall) -> torch.dtype | None:
    """Under autocast, casts the call's tensors. Returns c_n's dtype where torch's is not that of the other results."""
    device = call.weights[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # autocast knows no meta device
        return None
    c_dtype = None
    if call.projected and device == "cpu":  # torch's c is not projected, and so stays as it came
        c_dtype = eager.carried_dtype(torch.get_autocast_dtype("cpu"), call.x if call.c0 is None else call.c0)
    eager.autocast(call)
    return c_dtype


def _check_and_lay_out(call: RecurrentCall, layout: str, rank: int) -> tuple[int, int]:
    """Checks all but the input, and lays the call's tensors out as ``[T, B, I]``; returns T and B."""
    checks.check_weights(call.weights, call.names, call.x)
    checks.check_layers(call.num_layers, call.directions, call.weights, call.names)
    normed.check(call)
    if call.reset is not None:
        checks.check_reset(call.reset, call.x)
    unbatched = rank == 2
    call.x, call.reset = (steps_in(layout, rank, t) for t in (call.x, call.reset))
    if call.batch_sizes is not None:
        checks.check_batch_sizes(call.batch_sizes, call.x, call.lengths, call.reset)
        steps, batch = call.batch_sizes.shape[0], packed.sequences(call.batch_sizes)
    else:
        steps, batch = call.x.shape[0], call.x.shape[1]
    if call.lengths is not None:
        if unbatched and isinstance(call.lengths, Tensor):
            checks.check_dense("lengths", call.lengths)
            call.lengths = call.lengths.reshape(-1)
        checks.check_lengths(call.lengths, batch, steps, call.x)
        call.lengths = call.lengths.to(torch.int64)

    def given(name: str, state: Tensor | None, size: int) -> Tensor | None:
        if state is None:
            return None
        checks.check_state(name, state, (call.rows, size) if unbatched else (call.rows, batch, size), call.x)
        return state_in(layout, rank, state)

    call.h0 = given("h_0" if ops.HAS_C[call.cell] else "hx", call.h0, call.weights[1].shape[1])
    call.c0 = given("c_0", call.c0, call.hidden)
    call.state_mask = given("state_mask", call.state_mask, call.weights[1].shape[1])
    if call.reset_h is not None and call.reset is None:
        raise checks.ArgumentError("reset_state is what reset puts in the state's place: give reset too")
    call.reset_h = given("reset_state", call.reset_h, call.weights[1].shape[1])
    call.reset_c = given("reset_state's c", call.reset_c, call.hidden)
    checks.check_probability("recurrent_dropout", call.recurrent_dropout)
    checks.check_zoneout(call.zoneout)
    if call.draws_mask and call.state_mask is not None:
        raise checks.ArgumentError("recurrent_dropout draws a state_mask in training: give one of the two alone")
    return steps, batch


def _choose(call: RecurrentCall, backend: str | None, steps: int, batch: int) -> str:
    """The name of the backend, or ``onnx`` while a model is exported to it."""
    x = call.x
    if backends.exporting_onnx() and backends.forced(backend) is None and call.batch_sizes is None:
        return "onnx"
    usual = backend is None and x.is_cpu and x.dtype is not torch.bfloat16 and not backends.tracing()
    usual = usual and _native_reason(call) is None
    served = _served(call) and backends.divided("scan")  # by smaller copies, which no other kernels read
    if usual and (backends.native_scan_in_general() or served):
        return "native"
    device = auto.device_key(x.device)
    uneven = call.lengths is not None or call.batch_sizes is not None
    kind = auto.scan_kind(device, call.cell, x.dtype, steps, batch, x.shape[-1], call.hidden, call.rows, uneven)
    asked = (shape_of(call, steps, batch), x.device) if backends.wants_description(x.device) else None
    return backends.resolve("scan", kind, device, lambda name: _reason(name, call), backend, asked)


def _reason(name: str, call: RecurrentCall) -> str | None:
    """Why a backend cannot run this call; None where it can."""
    if name == "reference":
        return None
    if name == "torch":
        return eager.torch_reason(call)
    if name == "triton" or call.x.is_cuda:
        given = {
            "state_mask (recurrent_dropout)": call.state_mask is not None or call.draws_mask,
            "zoneout": any(call.zoneout),
            "reset_state": call.reset_h is not None,
            "layer normalisation (norm=)": call.norm is not None,
        }
        lacking = [option for option, is_given in given.items() if is_given and option in _NOT_ON_A_GPU[name]]
        if lacking:
            return f"{_GPU_KERNELS[name]} have no {' and no '.join(lacking)}"
    if (reason := _native_reason(call, "Triton" if name == "triton" else "native")) is not None:
        return reason
    if name == "triton" and call.x.dtype is torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    if name == "native" and call.x.device.type == "cuda":
        if call.x.dtype is torch.float64:
            return "the native CUDA kernels take float32, bfloat16 and float16, not float64"
        if call.projected:
            return "the native CUDA kernels have no projection (proj_size): it needs a second exchange at each step"
    return backends.operator_reason(name, call.x.device.type)


_GPU_KERNELS = {"native": "the native CUDA kernels", "triton": "the Triton kernels"}
_NOT_ON_A_GPU = {
    "native": ("state_mask (recurrent_dropout)", "zoneout", "reset_state", "layer normalisation (norm=)"),
    "triton": ("layer normalisation (norm=)",),
}
"""Options that a backend has no GPU kernels for."""


def _native_reason(call: RecurrentCall, kernels: str = "native") -> str | None:
    """Why no kernels of ours, on the CPU or a GPU, can run this call; None where they can."""
    if call.state_mask is not None and autograd.is_differentiated(call.state_mask):
        return f"the {kernels} kernels compute no gradient of state_mask"
    if call.norm is not None and (any(call.zoneout) or call.reset_h is not None):
        return f"the {kernels} kernels have no zoneout and no reset_state beside norm="
    if call.zoneout[1] and call.projected:
        return f"the {kernels} kernels have no zoneout of c beside a projection (proj_size)"
    if call.zoneout[0] and not call.training and call.cell.startswith("rnn") and backends.keeps_a_tape():
        return f"the {kernels} kernels compute no gradient of an RNN with zoneout in evaluation"
    return None


def _served(call: RecurrentCall) -> bool:
    """Whether smaller copies of the weights may serve a call (:class:`fastseq.nn.compressed.Served`)."""
    return (
        call.norm is None and hasattr(call.weights, "infer") and not torch.is_grad_enabled() and not backends.tracing()
    )


def _padded(name: str, call: RecurrentCall) -> Result:
    """A stack over x ``[T, B, I]``: in one call where the backend takes it whole, else layer after layer."""
    if name == "native" and _served(call) and (done := call.weights.infer(call)) is not None:  # type: ignore[attr-defined]
        return done
    if call.norm is None and stack.suits(name, call.x):
        return recompute.run(call) if call.recompute and recompute.suits(call) else stack.run(call)
    ys, h_n, c_n, states = _layers(name, call, [call.x], [(call.lengths, call.reset)])
    return ys[0], h_n, c_n, states[0]


def _packed(name: str, call: RecurrentCall) -> Result:
    """A stack over the data of a packed batch, in as few padded parts as its memory allows; y and c_t packed too."""
    assert call.batch_sizes is not None
    data = call.x
    whole = call.recompute or _served(call)
    parts = packed.whole(data, call.batch_sizes) if whole else packed.cut(data, call.batch_sizes)
    xs, sizes = zip(*packed.pad(parts, data), strict=True)
    lengths = [None if n is None else n.to(data.device) for n in sizes]
    ys: Sequence[Tensor]
    states: Sequence[Tensor | None]
    if len(parts) == 1:
        call.x, call.lengths = xs[0], lengths[0]
        one, h_n, c_n, all_c = _padded(name, call)
        ys, states = [one], [all_c]
    else:
        ys, h_n, c_n, states = _layers(name, call, xs, [(n, None) for n in lengths])

    def pack(values: Sequence[Tensor | None]) -> Tensor | None:
        rows = [part.pack(v, n) for part, v, n in zip(parts, values, sizes, strict=True) if v is not None]
        return torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None

    y = pack(ys)
    assert y is not None
    return y, h_n, c_n, pack(states)


def _layers(
    name: str, call: RecurrentCall, xs: Sequence[Tensor], uneven: Sequence[packed.Uneven]
) -> tuple[Sequence[Tensor], Tensor, Tensor | None, Sequence[Tensor | None]]:
    """Layer after layer, both directions of each, dropout between layers; over the parts ``xs`` of a batch, of each of
    which ``uneven`` has lengths and resets."""
    h_start, c_start = (call.rows * [None] if s is None else s.unbind(0) for s in (call.h0, call.c0))
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    states: list[Sequence[Tensor | None]] = []
    for layer in range(call.num_layers):
        outputs: list[Sequence[Tensor]] = []
        states = []
        last = layer == call.num_layers - 1
        for direction in range(call.directions):
            index = layer * call.directions + direction
            walk = _walk(_WALKS[call.cell, direction == 1, name], call, index, call.want_states and last)
            ys, h, c, all_c = packed.chain(walk, xs, uneven, h_start[index], c_start[index], direction == 1)
            outputs.append(ys)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                states.append(all_c)
        xs = [_beside(parts) for parts in zip(*outputs, strict=True)]
        if call.dropout and call.training and not last:
            xs = [F.dropout(x, call.dropout, True) for x in xs]
    all_states: Sequence[Tensor | None] = [None] * len(xs)
    if call.want_states and states and states[0][0] is not None:
        all_states = [_beside(parts) for parts in zip(*states, strict=True)]
    return xs, _stacked(h_n), _stacked(c_n) if c_n else None, all_states


def _walk(walk: Walk, call: RecurrentCall, index: int, want_states: bool) -> packed.Walk:
    """The scan of one layer and direction, as :func:`packed.chain` calls it."""
    weights = call.weights_of(index)

    def run(x: Tensor, uneven: packed.Uneven, h: Tensor | None, c: Tensor | None) -> Result:
        # The sequences of a part of a packed batch are its first ones.
        own = (call.reset_h, call.reset_c, call.state_mask)
        reset_h, reset_c, mask = (None if s is None else s[index, : x.shape[1]] for s in own)
        shares = call.zoneout_shares(*x.shape[:2])
        if call.norm is not None:
            state = (h, c, *uneven, mask, reset_h, reset_c, *shares)
            return normed.scan(walk, call.norm, x, weights, normed.weights_of(call, index), state, want_states)
        options = (*uneven, mask, *shares)
        if x.is_cpu and stack.suits(walk.backend, x):
            given = [w for w in weights if w is not None]
            return stack.scan(walk, x, (h, c, reset_h, reset_c), options, given, want_states)
        return scan(walk, (x, *weights, h, c, reset_h, reset_c, *options), want_states)

    return run


_WALKS = {way: Walk(*way) for way in itertools.product(ops.GATES, (False, True), backends.NAMES)}  # made once


def _beside(directions: Sequence[Tensor]) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(list(directions), -1)


def _stacked(states: list[Tensor]) -> Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


def scan(walk: Walk, inputs: Sequence[Any], want_states: bool = False) -> Result:
    """One layer and direction on a backend, of :class:`Inputs`; results as :func:`fastseq.recurrent.reference.scan`."""
    cell, reverse, backend = walk
    if backend == "reference" or autograd.needs_reference():
        return reference.scan(*inputs, cell=cell, reverse=reverse)
    recorded = torch.is_grad_enabled() and autograd.wants_gradient(inputs[:DIFFERENTIABLE])
    # A trace holds no Function of Python's, and must be the same with gradients and without.
    if not backends.tracing() and (recorded or autograd.functorch_active()):
        found = autograd.apply(Scan, *inputs, *walk)
    else:
        found = FORWARD[backend](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    return found[:4] if ops.HAS_C[cell] else (found[0], found[1], None, None)

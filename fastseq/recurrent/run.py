"""Runs a call of a stack of layers: checks, the choice of a backend, layers and directions one after the other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import auto, autograd, checks, direct, ops
from fastseq import backend as backends
from fastseq.recurrent import eager, layers, packed, reference
from fastseq.recurrent.autograd import FORWARD, Layer, Scan, Walk
from fastseq.recurrent.call import RecurrentCall, Result


def run(call: RecurrentCall, backend: str | None) -> Result:
    """Check the arguments, choose the backend, run the stack; results are laid out as the input. Changes ``call``."""
    c_dtype = _cast_as_autocast(call)
    checks.check_input(call.x, call.weights[0], call.batch_first)
    unbatched = call.x.dim() == 2 and call.batch_sizes is None
    swap = call.batch_first and call.x.dim() == 3
    steps, batch = _check_and_lay_out(call, unbatched, swap)
    name = _choose(call, backend, steps, batch)
    if name == "torch":
        y, h_n, c_n = eager.torch_stack(call, batch)
        states = None
    elif call.batch_sizes is not None:
        y, h_n, c_n, states = _packed(name, call)
    else:
        y, h_n, c_n, states = _padded(name, call)
    if states is not None:
        states = states.to(y.dtype)
    if c_dtype is not None and c_n is not None and c_n.dtype != torch.float64:
        c_n = c_n.to(c_dtype)
    if unbatched:
        y, h_n = y.squeeze(1), h_n.squeeze(1)
        c_n, states = (None if s is None else s.squeeze(1) for s in (c_n, states))
    elif swap:
        y, states = y.transpose(0, 1), None if states is None else states.transpose(0, 1)
    return y, h_n, c_n, states


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


def _check_and_lay_out(call: RecurrentCall, unbatched: bool, swap: bool) -> tuple[int, int]:
    """Checks all but the input, and lays the call's tensors out as ``[T, B, I]``; returns T and B."""
    checks.check_weights(call.weights, call.names, call.x)
    checks.check_layers(call.num_layers, call.directions, call.weights, call.names)
    if call.reset is not None:
        checks.check_reset(call.reset, call.x)
    if unbatched:
        call.x = call.x.unsqueeze(1)
        call.reset = None if call.reset is None else call.reset.unsqueeze(1)
    elif swap:
        call.x = call.x.transpose(0, 1)
        call.reset = None if call.reset is None else call.reset.transpose(0, 1)
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
        return state.unsqueeze(1) if unbatched else state

    call.h0 = given("h_0" if call.cell == "lstm" else "hx", call.h0, call.weights[1].shape[1])
    call.c0 = given("c_0", call.c0, call.hidden)
    return steps, batch


def _choose(call: RecurrentCall, backend: str | None, steps: int, batch: int) -> str:
    """The name of the backend."""
    x = call.x
    usual = backend is None and x.is_cpu and x.dtype is not torch.bfloat16 and not backends.tracing()
    if usual and backends.native_scan():
        return "native"
    device = auto.device_key(x.device)
    uneven = call.lengths is not None or call.batch_sizes is not None
    kind = auto.scan_kind(device, call.cell, x.dtype, steps, batch, x.shape[-1], call.hidden, call.rows, uneven)
    return backends.resolve("scan", kind, device, lambda name: _reason(name, call), backend)


def _reason(name: str, call: RecurrentCall) -> str | None:
    """Why a backend cannot run this call; None where it can."""
    if name == "reference":
        return None
    if name == "torch":
        return eager.torch_reason(call)
    if name == "triton" and call.x.dtype is torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    if name == "native" and call.x.device.type == "cuda":
        if call.x.dtype is torch.float64:
            return "the native CUDA kernels take float32, bfloat16 and float16, not float64"
        if call.projected:
            return "the native CUDA kernels have no projection (proj_size): it needs a second exchange at each step"
    return backends.operator_reason(name, call.x.device.type)


def _padded(name: str, call: RecurrentCall) -> Result:
    """A stack over x ``[T, B, I]``: in one call where the backend takes it whole, else layer after layer."""
    if layers.suits(name, call):
        return layers.run(call)
    ys, h_n, c_n, states = _layers(name, call, [call.x], [call.lengths])
    return ys[0], h_n, c_n, states[0]


def _packed(name: str, call: RecurrentCall) -> Result:
    """A stack over the data of a packed batch, in as few padded parts as its memory allows; y and c_t packed too."""
    assert call.batch_sizes is not None
    data = call.x
    parts = packed.cut(data, call.batch_sizes)
    xs, sizes = zip(*packed.pad(parts, data), strict=True)
    lengths = [None if n is None else n.to(data.device) for n in sizes]
    ys: Sequence[Tensor]
    states: Sequence[Tensor | None]
    if len(parts) == 1:
        call.x, call.lengths = xs[0], lengths[0]
        one, h_n, c_n, all_c = _padded(name, call)
        ys, states = [one], [all_c]
    else:
        ys, h_n, c_n, states = _layers(name, call, xs, lengths)

    def pack(values: Sequence[Tensor | None]) -> Tensor | None:
        rows = [part.pack(v, n) for part, v, n in zip(parts, values, sizes, strict=True) if v is not None]
        return torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None

    y = pack(ys)
    assert y is not None
    return y, h_n, c_n, pack(states)


def _layers(
    name: str, call: RecurrentCall, xs: Sequence[Tensor], lengths: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Tensor, Tensor | None, Sequence[Tensor | None]]:
    """Layer after layer, both directions of each, dropout between layers; over the parts ``xs`` of a batch."""
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
            ys, h, c, all_c = packed.chain(walk, xs, lengths, h_start[index], c_start[index], direction == 1)
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
    return lambda x, lengths, h, c: scan(walk, (x, *weights, h, c, lengths, call.reset), want_states)


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
    if backends.tracing():  # a trace holds no Function of Python's, and must be the same with gradients and without
        found = FORWARD[backend](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    elif torch.compiler.is_compiling() or autograd.functorch_active():
        if autograd.functorch_active() or (torch.is_grad_enabled() and autograd.wants_gradient(inputs[:8])):
            found = autograd.apply(Scan, *inputs, *walk)
        else:
            found = FORWARD[backend](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    elif torch.is_grad_enabled() and autograd.wants_gradient(inputs[:8]):
        return _recorded(walk, inputs, want_states)
    else:
        found = FORWARD[backend](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    return found[:4] if cell == "lstm" else (found[0], found[1], None, None)


def _recorded(walk: Walk, inputs: Sequence[Any], want_states: bool) -> Result:
    """A scan in eager mode, to be differentiated."""
    x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset = inputs
    want_states = want_states and walk.cell == "lstm"
    plain = lengths is None and reset is None and w_hr is None and not want_states
    fast = plain and walk.backend == "native" and x.is_cpu and direct.is_plain()
    if not fast:
        x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset = map(autograd.unwrapped, inputs)
    weights = (w_ih, w_hh) if b_ih is None else (w_ih, w_hh, b_ih, b_hh)
    found = _apply(x, h0, c0, (lengths, reset, want_states), w_hr, (walk, "scan", fast), *weights)
    return (*found, *(None,) * (4 - len(found)))


_apply = autograd.recorder(Layer)


def layer_in_one_call(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], cell: str, layout: str
) -> tuple[Tensor, ...] | None:
    """y, h_n and an LSTM's c_n of a layer of one direction, to be differentiated; of a cell the new h and c. Nothing is
    checked before. None where the native call does not take the arguments. For eager mode with gradients on, where the
    native kernels are in force."""
    if not isinstance(x, Tensor) or len(weights) not in (2, 4) or not direct.is_plain():
        return None
    if not autograd.wants_gradient((x, *weights, h0, c0)):
        return None
    return _apply(x, h0, c0, _NOTHING_MORE, None, _native_walk(cell, layout), *weights)


_NOTHING_MORE = (None, None, False)  # neither lengths nor reset, and no states are wanted


@functools.lru_cache
def _native_walk(cell: str, layout: str) -> tuple[Walk, str, bool]:
    return Walk(cell, False, "native"), layout, True

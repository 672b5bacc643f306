"""RNN, GRU and LSTM over stacks of layers: what lies above the scan (layers, directions, dropout, layouts)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq import auto, checks, ops
from fastseq import backend as backends
from fastseq.autograd import FORWARD, EagerScan, Scan, apply, functorch_active, needs_reference, wants_gradient
from fastseq.recurrent import eager, layers, packed, reference, training

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Stack(NamedTuple):
    """How layers are stacked. ``weights`` come flat, a layer and direction at a time, in torch's order:
    w_ih, w_hh, then b_ih, b_hh with biases, then w_hr with a projection."""

    cell: str
    num_layers: int = 1
    has_biases: bool = True
    dropout: float = 0.0
    training: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    projected: bool = False
    is_cell: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """What the weights of one layer and direction are called."""
        biases = ("bias_ih", "bias_hh") * self.has_biases
        return ("weight_ih", "weight_hh", *biases, *("weight_hr",) * self.projected)

    @property
    def directions(self) -> int:
        """1, or 2 where bidirectional."""
        return 2 if self.bidirectional else 1

    def hidden(self, weights: Sequence[Tensor]) -> int:
        """Units of a layer and direction."""
        return weights[1].shape[0] // ops.GATES[self.cell]

    def of(self, weights: Sequence[Tensor], index: int) -> Weights:
        """w_ih, w_hh, b_ih, b_hh, w_hr of the ``index``-th layer and direction; None for those absent."""
        width = 2 + 2 * self.has_biases + self.projected
        w = weights[index * width : (index + 1) * width]
        b_ih, b_hh = w[2:4] if self.has_biases else (None, None)
        return w[0], w[1], b_ih, b_hh, w[-1] if self.projected else None


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman RNN, h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh); Elman 1990.

    Args:
        input: ``[T, B, I]``, ``[B, T, I]`` with ``batch_first``, or ``[T, I]``; float64, float32, bfloat16 or float16.
        hx: ``[num_layers * directions, B, H]`` (no B when unbatched), or None for zeros.
        weights: flat, as ``torch.nn.RNN._flat_weights``: a layer and direction at a time w_ih ``[H, I]``,
            w_hh ``[H, H]``, and with ``has_biases`` b_ih ``[H]``, b_hh ``[H]``.
        nonlinearity: phi, ``"tanh"`` or ``"relu"``.
        lengths: int ``[B]``: from step ``lengths[b]`` on the output is 0 and the state stands still.
        reset: bool ``[T, B]`` (``[B, T]`` with ``batch_first``, ``[T]`` unbatched): the state is cleared before a step.
        batch_sizes: int64 ``[T]`` on the CPU, in place of lengths and reset: the input is packed, ``[rows, I]``, as the
            data of a ``PackedSequence`` with these batch_sizes, and so is the output.
        backend: overrides the choice of backend for this call.

    Returns:
        The output ``[T, B, directions * H]`` (laid out as the input) and the last state, shaped as ``hx``.

    Raises:
        ArgumentError: an argument's shape, dtype, device or value does not fit; the message says which and how.
        BackendError: the named backend cannot run this.

    Example:
        >>> import torch
        >>> from fastseq.functional import rnn
        >>> y, h_n = rnn(torch.randn(7, 2, 3), None, [torch.randn(5, 3), torch.randn(5, 5)], has_biases=False)
        >>> y.shape, h_n.shape
        (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """
    checks.check_nonlinearity(nonlinearity)
    stack = Stack(f"rnn_{nonlinearity}", num_layers, has_biases, dropout, training, bidirectional, batch_first)
    return run(stack, input, hx, None, weights, lengths, reset, False, backend, batch_sizes)[:2]


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit; Cho et al. 2014. Gates r, z and candidate n, h_t = z * h_{t-1} + (1 - z) * n.

    Args:
        reset_after: True: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)), torch's and cuDNN's form; False:
            n = tanh(W_in x + b_in + W_hn (r * h) + b_hn), the form of the paper and ONNX's default.
        input, hx, weights, lengths, reset, batch_sizes, backend and the rest: as :func:`rnn`, with w_ih ``[3H, I]``,
            w_hh ``[3H, H]``, blocks r, z, n.

    Returns:
        The output ``[T, B, directions * H]`` and the last state.

    Raises:
        ArgumentError, BackendError: as :func:`rnn`.
    """
    cell = "gru" if reset_after else "gru_reset_before"
    stack = Stack(cell, num_layers, has_biases, dropout, training, bidirectional, batch_first)
    return run(stack, input, hx, None, weights, lengths, reset, False, backend, batch_sizes)[:2]


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    has_biases: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    projected: bool = False,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    return_all_states: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Long short-term memory; Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000.

    c_t = f * c_{t-1} + i * g, h_t = o * tanh(c_t), and with a projection (Sak et al. 2014) h_t = W_hr (o * tanh(c_t)).

    Args:
        hx: ``(h_0, c_0)``, ``[num_layers * directions, B, P]`` and ``[num_layers * directions, B, H]``, or None.
        projected: each layer and direction has a w_hr ``[P, H]`` after its biases; otherwise P = H.
        return_all_states: also return every c_t of the last layer.
        input, weights, lengths, reset, batch_sizes, backend and the rest: as :func:`rnn`, with w_ih ``[4H, I]``,
            w_hh ``[4H, P]``, blocks i, f, g, o.

    Returns:
        The output ``[T, B, directions * P]`` and ``(h_n, c_n)``; with ``return_all_states`` also c
        ``[T, B, directions * H]``, laid out as the output.

    Raises:
        ArgumentError, BackendError: as :func:`rnn`.
    """
    h0, c0 = checks.lstm_state(hx)
    stack = Stack("lstm", num_layers, has_biases, dropout, training, bidirectional, batch_first, projected)
    y, h_n, c_n, states = run(stack, input, h0, c0, weights, lengths, reset, return_all_states, backend, batch_sizes)
    assert c_n is not None
    return (y, (h_n, c_n), states) if states is not None else (y, (h_n, c_n))


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`rnn`: input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``; returns the new state."""
    checks.check_nonlinearity(nonlinearity)
    return _cell(f"rnn_{nonlinearity}", input, hx, None, (w_ih, w_hh, b_ih, b_hh), backend)[0]


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    backend: str | None = None,
) -> Tensor:
    """One step of :func:`gru`: input ``[B, I]`` or ``[I]``, hx ``[B, H]`` or ``[H]``; returns the new state."""
    return _cell("gru" if reset_after else "gru_reset_before", input, hx, None, (w_ih, w_hh, b_ih, b_hh), backend)[0]


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: input ``[B, I]`` or ``[I]``, hx a pair ``[B, H]`` or ``[H]``; returns ``(h, c)``."""
    h, c = checks.lstm_state(hx)
    h, c = _cell("lstm", input, h, c, (w_ih, w_hh, b_ih, b_hh), backend)
    assert c is not None
    return h, c


def _cell(
    cell: str,
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: tuple[Tensor | None, ...],
    backend: str | None,
) -> tuple[Tensor, Tensor | None]:
    checks.check_cell_input(x, weights[0])  # type: ignore[arg-type]
    present = [w for w in weights if w is not None]
    if len(present) not in (2, 4):
        raise checks.ArgumentError("b_ih and b_hh come together: give both or neither")
    stack = Stack(cell, has_biases=len(present) == 4, is_cell=True)
    for name, state in (("h_0" if cell == "lstm" else "hx", h), ("c_0", c)):
        if state is not None:
            checks.check_tensor(name, state)
    h, c = (None if s is None else s.unsqueeze(0) for s in (h, c))
    _, h_n, c_n, _ = run(stack, x.unsqueeze(0), h, c, present, None, None, False, backend)
    return h_n[0], None if c_n is None else c_n[0]


def run(
    stack: Stack,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    want_states: bool,
    backend: str | None,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Check the arguments, choose the backend, run the stack; y, h_n, c_n and all c_t come laid out as the input."""
    w_ih, w_hh = weights[0], weights[1]
    c_dtype: torch.dtype | None = None
    if not w_ih.is_meta and torch.is_autocast_enabled(w_ih.device.type):  # autocast knows no meta device
        if stack.projected and w_ih.device.type == "cpu":  # torch's c is not projected, and so stays as it came
            c_dtype = eager.carried_dtype(torch.get_autocast_dtype("cpu"), x if c0 is None else c0)
        dtype = eager.autocast_dtype(stack, x, h0, c0, not (batch_sizes is lengths is None))
        x, h0, c0, weights = eager.autocast(dtype, x, h0, c0, weights)
        w_ih, w_hh = weights[0], weights[1]
    checks.check_input(x, w_ih, stack.batch_first)
    checks.check_weights(weights, stack.names, x)
    checks.check_layers(stack.num_layers, stack.directions, weights, stack.names)
    unbatched = x.dim() == 2 and batch_sizes is None
    swap = stack.batch_first and x.dim() == 3
    if reset is not None:
        checks.check_reset(reset, x)
    if unbatched:
        x = x.unsqueeze(1)
        reset = None if reset is None else reset.unsqueeze(1)
    elif swap:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    if batch_sizes is not None:
        checks.check_batch_sizes(batch_sizes, x, lengths, reset)
        steps, batch = batch_sizes.shape[0], packed.sequences(batch_sizes)
    else:
        steps, batch = x.shape[0], x.shape[1]
    if lengths is not None:
        if unbatched and isinstance(lengths, Tensor):
            checks.check_dense("lengths", lengths)
            lengths = lengths.reshape(-1)
        checks.check_lengths(lengths, batch, steps, x)
        lengths = lengths.to(torch.int64)

    lstm = stack.cell == "lstm"
    hidden = stack.hidden(weights)
    rows = stack.num_layers * stack.directions
    h0 = _given("h_0" if lstm else "hx", h0, rows, batch, w_hh.shape[1], x, unbatched)
    c0 = _given("c_0", c0, rows, batch, hidden, x, unbatched)

    usual = backend is None and x.is_cpu and x.dtype is not torch.bfloat16 and not backends.tracing()
    if usual and backends.native_scan():
        name = "native"
    else:
        device = auto.device_key(x.device)
        ends = lengths if batch_sizes is None else batch_sizes
        kind = auto.scan_kind(device, stack.cell, x.dtype, steps, batch, x.shape[-1], hidden, rows, ends is not None)
        name = backends.resolve("scan", kind, device, lambda n: _reason(n, stack, x, ends, reset, want_states), backend)
    if name == "torch":
        h0 = x.new_zeros(rows, batch, w_hh.shape[1]) if h0 is None else h0
        c0 = x.new_zeros(rows, batch, hidden) if lstm and c0 is None else c0
        y, h_n, c_n = eager.torch_stack(stack, x, h0, c0, weights, lengths, batch_sizes)
        states = None
    elif batch_sizes is not None:
        y, h_n, c_n, states = _packed(name, stack, x, h0, c0, weights, batch_sizes, want_states)
    else:
        y, h_n, c_n, states = _padded(name, stack, x, h0, c0, weights, lengths, reset, want_states)
    if want_states and states is not None:
        states = states.to(y.dtype)
    if c_dtype is not None and c_n is not None and c_n.dtype != torch.float64:
        c_n = c_n.to(c_dtype)
    if unbatched:
        y, h_n = y.squeeze(1), h_n.squeeze(1)
        c_n, states = (None if s is None else s.squeeze(1) for s in (c_n, states))
    elif swap:
        y, states = y.transpose(0, 1), None if states is None else states.transpose(0, 1)
    return y, h_n, c_n, states


def _given(
    name: str, state: Tensor | None, rows: int, batch: int, size: int, x: Tensor, unbatched: bool
) -> Tensor | None:
    """The initial state that was given, checked, as ``[rows, B, size]``."""
    if state is None:
        return None
    checks.check_state(name, state, (rows, size) if unbatched else (rows, batch, size), x)
    return state.unsqueeze(1) if unbatched else state


def _padded(
    name: str,
    stack: Stack,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    reset: Tensor | None,
    want_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A stack over x ``[T, B, I]``: in one call where the backend takes it whole, else layer after layer."""
    if layers.suits(name, x, stack.hidden(weights)):
        return layers.run(stack, x, h0, c0, weights, lengths, reset, want_states)
    ys, h_n, c_n, states = _layers(name, stack, [x], h0, c0, weights, [lengths], reset, want_states)
    return ys[0], h_n, c_n, states[0]


def _packed(
    name: str,
    stack: Stack,
    data: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor,
    want_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """A stack over the data of a packed batch, in as few padded parts as its memory allows; y and c_t packed too."""
    parts = packed.cut(data, batch_sizes)
    xs, sizes = zip(*packed.pad(parts, data), strict=True)
    lengths = [None if n is None else n.to(data.device) for n in sizes]
    ys: Sequence[Tensor]
    states: Sequence[Tensor | None]
    if len(parts) == 1:
        one, h_n, c_n, all_c = _padded(name, stack, xs[0], h0, c0, weights, lengths[0], None, want_states)
        ys, states = [one], [all_c]
    else:
        ys, h_n, c_n, states = _layers(name, stack, xs, h0, c0, weights, lengths, None, want_states)

    def pack(values: Sequence[Tensor | None]) -> Tensor | None:
        rows = [part.pack(v, n) for part, v, n in zip(parts, values, sizes, strict=True) if v is not None]
        return torch.cat(rows) if len(rows) > 1 else rows[0] if rows else None

    y = pack(ys)
    assert y is not None
    return y, h_n, c_n, pack(states)


def _layers(
    name: str,
    stack: Stack,
    xs: Sequence[Tensor],
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Sequence[Tensor | None],
    reset: Tensor | None,
    want_states: bool,
) -> tuple[Sequence[Tensor], Tensor, Tensor | None, Sequence[Tensor | None]]:
    """Layer after layer, both directions of each, dropout between layers; over the parts ``xs`` of a batch."""
    rows = stack.num_layers * stack.directions
    h_start, c_start = (rows * [None] if s is None else s.unbind(0) for s in (h0, c0))
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    states: list[Sequence[Tensor | None]] = []
    for layer in range(stack.num_layers):
        outputs: list[Sequence[Tensor]] = []
        states = []
        last = layer == stack.num_layers - 1
        for direction in range(stack.directions):
            index = layer * stack.directions + direction
            walk = _walk(name, stack.of(weights, index), reset, stack.cell, direction == 1, want_states and last)
            ys, h, c, all_c = packed.chain(walk, xs, lengths, h_start[index], c_start[index], direction == 1)
            outputs.append(ys)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
                states.append(all_c)
        xs = [_beside(parts) for parts in zip(*outputs, strict=True)]
        if stack.dropout and stack.training and not last:
            xs = [F.dropout(x, stack.dropout, True) for x in xs]
    all_states: Sequence[Tensor | None] = [None] * len(xs)
    if want_states and states and states[0][0] is not None:
        all_states = [_beside(parts) for parts in zip(*states, strict=True)]
    return xs, _stacked(h_n), _stacked(c_n) if c_n else None, all_states


def _walk(
    name: str, weights: Weights, reset: Tensor | None, cell: str, reverse: bool, want_states: bool
) -> packed.Walk:
    """The scan of one layer and direction, as :func:`packed.chain` calls it."""
    return lambda x, lengths, h, c: scan(name, x, *weights, h, c, lengths, reset, cell, reverse, want_states)


def _beside(directions: Sequence[Tensor]) -> Tensor:
    return directions[0] if len(directions) == 1 else torch.cat(list(directions), -1)


def _stacked(states: list[Tensor]) -> Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


def scan(
    name: str,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    cell: str,
    reverse: bool,
    want_states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer and direction on a backend; arguments as :func:`fastseq.reference.scan`."""
    inputs = (x, w_ih, w_hh, b_ih, b_hh, w_hr, h0, c0, lengths, reset)
    if name == "reference" or needs_reference():
        return reference.scan(*inputs, cell=cell, reverse=reverse)
    plain = lengths is None and reset is None and w_hr is None and not want_states
    if plain and name == "native" and x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        weights = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
        done = training.layer(x, h0, c0, weights, cell, "scan", reverse)
        if done is not None:
            return done[0], done[1], done[2] if cell == "lstm" else None, None
    if backends.tracing():  # a trace holds no Function of Python's, and must be the same with gradients and without
        found = FORWARD[name](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    elif functorch_active() or (torch.is_grad_enabled() and wants_gradient(inputs[:8])):
        function = Scan if torch.compiler.is_compiling() or functorch_active() else EagerScan
        found = apply(function, *inputs, cell, reverse, name)
    else:
        found = FORWARD[name](*inputs, ops.NUMBER[cell], reverse, False, want_states)
    return found[:4] if cell == "lstm" else (found[0], found[1], None, None)


def _reason(
    name: str, stack: Stack, x: Tensor, lengths: Tensor | None, reset: Tensor | None, want_states: bool
) -> str | None:
    """Why a backend cannot run this stack; None where it can."""
    if name == "reference":
        return None
    if name == "torch":
        return eager.torch_reason(stack, lengths, reset, want_states)
    if name == "triton" and x.dtype is torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, not float64"
    if name == "native" and x.device.type == "cuda":
        if x.dtype is torch.float64:
            return "the native CUDA kernels take float32, bfloat16 and float16, not float64"
        if stack.projected:
            return "the native CUDA kernels have no projection (proj_size): it needs a second exchange at each step"
    return backends.operator_reason(name, x.device.type)

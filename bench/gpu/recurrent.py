"""Recurrent layers on a GPU: inputs, the truth, and the contestants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from bench.check import ResetBeforeGRU
from bench.gpu.cases import Layers
from bench.peers import Entrant, Outputs, Unavailable
from fastseq import ops

GATES = {"rnn": 1, "rnn_relu": 1, "lstm": 4, "gru": 3, "gru_reset_before": 3}


@dataclass
class LayersInputs:
    """x [T,B,H], dy [T,B,directions*H] (training), lengths int64 [B] on the CPU (packed, longest first), weights by the
    layer's names."""

    x: Tensor
    dy: Tensor
    lengths: Tensor | None
    state: dict[str, Tensor]


def inputs(case: Layers, device: str) -> LayersInputs:
    """Unit normal x and dy, weights uniform in ±1/√H."""
    rng = torch.Generator(device).manual_seed(case.generator().initial_seed())
    directions = 2 if case.bidirectional else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device).to(case.torch_dtype)

    def weight(*shape: int) -> Tensor:
        drawn = torch.rand(*shape, generator=rng, device=device) * 2 - 1
        return (drawn / case.hidden**0.5).to(case.torch_dtype)

    rows, state = GATES[case.cell] * case.hidden, {}
    for layer in range(case.layers):
        width = case.hidden * (directions if layer else 1)
        for end in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (rows, width), "weight_hh": (rows, case.hidden), "bias_ih": (rows,)}
            for name, shape in {**shapes, "bias_hh": (rows,)}.items():
                state[f"{name}_l{layer}{end}"] = weight(*shape)
    lengths = None
    if case.packed:
        lengths = torch.linspace(case.steps, max(1, case.steps // 4), case.batch).long()
    dy = normal(case.steps, case.batch, directions * case.hidden) if case.training else torch.empty(0)
    return LayersInputs(normal(case.steps, case.batch, case.hidden), dy, lengths, state)


def build(library: Any, case: Layers, state: dict[str, Tensor], dtype: torch.dtype, device: str) -> nn.Module:
    """The stack of ``library`` (torch.nn or fastseq.nn) with these weights."""
    options: dict[str, Any] = {"num_layers": case.layers, "bidirectional": case.bidirectional}
    kind = "GRU" if case.cell.startswith("gru") else case.cell.removesuffix("_relu").upper()
    if case.cell == "gru_reset_before":
        options["reset_after"] = False
    if case.cell == "rnn_relu":
        options["nonlinearity"] = "relu"
    layer = getattr(library, kind)(case.hidden, case.hidden, dtype=dtype, device=device, **options)
    layer.load_state_dict({name: weight.to(dtype) for name, weight in state.items()})
    if isinstance(layer, nn.RNNBase):
        layer.flatten_parameters()
    return layer.train(case.training)


def entrant(case: Layers, run: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor, dy: Tensor, layer: nn.Module,
            pad: Callable[[Tensor], Tensor] = lambda y: y) -> Entrant:  # fmt: skip
    """One call; in training with the walk back into x and every weight. ``pad`` brings a peer's y to [T,B,N]."""

    def named(answer: tuple[Tensor, Any]) -> Outputs:
        y, state = answer
        outputs = {"y": pad(y)}
        return outputs | ({"h_n": state[0], "c_n": state[1]} if isinstance(state, tuple) else {"h_n": state})

    if not case.training:
        return Entrant(lambda: run(x), named)
    x = x.clone().requires_grad_()
    parameters = dict(layer.named_parameters())
    leaves = [x, *parameters.values()]

    def train() -> tuple[Any, Any]:
        answer = run(x)
        grads = torch.autograd.grad(answer[0], leaves, dy)
        return answer, grads

    def gradients(answer: tuple[Any, Any]) -> Outputs:
        names = ["d_x", *(f"d_{name}" for name in parameters)]
        return named(answer[0]) | dict(zip(names, answer[1], strict=True))

    return Entrant(train, gradients)


def ours(case: Layers, given: LayersInputs, device: str) -> Entrant:
    """fastseq.nn on the backend in force; unequal lengths by ``lengths=``."""
    layer = build(fastseq.nn, case, given.state, case.torch_dtype, device)
    lengths = None if given.lengths is None else given.lengths.to(device)
    options = {} if lengths is None else {"lengths": lengths}
    return entrant(case, lambda x: layer(x, **options), given.x, given.dy, layer)


BARRIER = "cluster_barrier"
"""The role of the CUDA C++ scan that is there to be measured beside ``cluster``."""


@contextlib.contextmanager
def in_role(role: str | None) -> Iterator[None]:
    """The Triton scan, or the CUDA C++ one, takes a role inside the ``with`` block; with None as its tables say."""
    if role is None or (role == BARRIER and ops.NATIVE_CUDA_MISSING is not None):
        yield
        return
    if role == BARRIER:
        torch.ops.fastseq.native_scan_role(role, 0, 0, 0)
        try:
            yield
        finally:
            torch.ops.fastseq.native_scan_role("", 0, 0, 0)
        return
    from fastseq.kernels import recurrent_launch

    before, recurrent_launch.role = recurrent_launch.role, role
    try:
        yield
    finally:
        recurrent_launch.role = before


def persistent(case: Layers, given: LayersInputs, device: str) -> Entrant:
    """:func:`ours` in the role in force, where the device can have it: tells whether the tables should ask for it."""
    if case.steps == 1:
        raise Unavailable("a single step is one launch in any role")
    from fastseq.kernels import recurrent_launch

    try:
        cell = "rnn_tanh" if case.cell == "rnn" else case.cell
        recurrent_launch.tile(cell, given.x, case.hidden, False, case.training)
    except ValueError as reason:
        raise Unavailable(str(reason)) from None
    return ours(case, given, device)


def barrier(case: Layers, given: LayersInputs, device: str) -> Entrant:
    """:func:`ours` with a barrier of the cluster a step, where both ways fit: tells which exchange is the faster."""
    cell = "rnn_tanh" if case.cell == "rnn" else case.cell
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(given.x.dtype)
    kind = kind or ("tf32" if torch.ops.fastseq.one_tf32_product() else "fp32")
    for backward in (False, True)[: 1 + case.training]:
        plan = torch.ops.fastseq.native_scan_plan(cell, kind, backward, case.hidden, case.batch, [])
        if not plan.startswith(f"role={BARRIER} "):
            raise Unavailable(plan.partition("reason=")[2])
    return ours(case, given, device)


def torch_entrant(case: Layers, given: LayersInputs, device: str, dtype: torch.dtype | None = None) -> Entrant:
    """torch.nn: cuDNN on a GPU. Packing the input and unpacking y are not timed."""
    dtype = dtype or case.torch_dtype
    if case.cell == "gru_reset_before":
        raise Unavailable("torch has no GRU that resets before the product")
    layer = build(nn, case, given.state, dtype, device)
    x, dy = given.x.to(dtype), given.dy.to(dtype)
    if given.lengths is None:
        return entrant(case, layer, x, dy, layer)
    packed = nn.utils.rnn.pack_padded_sequence(x, given.lengths)
    d_packed = nn.utils.rnn.pack_padded_sequence(dy, given.lengths).data if case.training else dy
    sizes = packed.batch_sizes

    def unpack(data: Tensor) -> Tensor:
        whole = nn.utils.rnn.PackedSequence(data, sizes)
        return nn.utils.rnn.pad_packed_sequence(whole, total_length=case.steps)[0]

    def run(data: Tensor) -> tuple[Tensor, Any]:
        y, state = layer(nn.utils.rnn.PackedSequence(data, sizes))
        return y.data, state

    made = entrant(case, run, packed.data, d_packed, layer, unpack)
    if case.training:
        inner = made.outputs
        made.outputs = lambda answer: {n: unpack(t) if n == "d_x" else t for n, t in inner(answer).items()}
    return made


def flashrnn_entrant(case: Layers, given: LayersInputs, device: str) -> Entrant:
    """FlashRNN's fused kernels, with the product of x by torch. Biases are added in one, which an LSTM and a plain RNN
    allow."""
    plain = case.layers == 1 and not case.bidirectional and not case.packed
    if case.cell not in ("lstm", "rnn") or not plain or case.dtype == "float32":
        raise Unavailable("FlashRNN is measured on one layer of an LSTM or plain RNN in 16 bits")
    from flashrnn import flashrnn  # type: ignore[import-not-found]

    gates, hidden = GATES[case.cell], case.hidden
    layer = build(nn, case, given.state, case.torch_dtype, device)
    w_ih, w_hh, b_ih, b_hh = (layer.get_parameter(f"{n}_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def run(x: Tensor) -> tuple[Tensor, Any]:
        rows = nn.functional.linear(x, w_ih).transpose(0, 1)
        rows = rows.reshape(case.batch, case.steps, gates, 1, hidden)
        states, last = flashrnn(
            rows, w_hh.reshape(gates, 1, hidden, hidden), (b_ih + b_hh).reshape(gates, 1, hidden),
            function="lstm" if case.cell == "lstm" else "elman", backend="cuda_fused",
        )  # fmt: skip
        ends = [s.reshape(1, case.batch, hidden) for s in last]
        y = states[0].reshape(case.batch, case.steps, hidden).transpose(0, 1)  # states [S,B,T,heads,D]
        return y, tuple(ends[:2]) if case.cell == "lstm" else ends[0]

    return entrant(case, run, given.x, given.dy, layer)


def answers(case: Layers, given: LayersInputs, device: str, dtype: torch.dtype) -> Outputs:
    """torch's answer, and gradients, computed in ``dtype``: in float64 the truth."""
    with torch.set_grad_enabled(case.training):
        if case.cell == "gru_reset_before":
            layer = ResetBeforeGRU(given.state, dtype)
            h0 = torch.zeros(1, case.batch, case.hidden, dtype=dtype, device=device)
            made = entrant(case, lambda x: layer(x, h0), given.x.to(dtype), given.dy.to(dtype), layer)
        else:
            made = torch_entrant(case, given, device, dtype)
        return {name: tensor.detach() for name, tensor in made.outputs(made.call()).items()}

"""Recurrent layers on a GPU: inputs, the truth, and the contestants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from bench.cases import GATES, LayerInputs, recurrent_inputs
from bench.check import ResetBeforeGRU
from bench.gpu.cases import Layers
from bench.peers import Entrant, Outputs, Unavailable, build_layer, entrant, named_states
from fastseq import ops


def inputs(case: Layers, device: str) -> LayerInputs:
    """Those of the plain case; lengths, int64 [B] on the CPU where packed, from all steps down to a quarter."""
    drawn = recurrent_inputs(case.plain, device)
    if case.packed:
        drawn.lengths = torch.linspace(case.steps, max(1, case.steps // 4), case.batch).long()
    return drawn


def one_call(
    case: Layers, run: Callable[[Tensor], Any], x: Tensor, dy: Tensor, layer: nn.Module,
    named: Callable[[Any], Outputs] = named_states, unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Entrant:  # fmt: skip
    """One call; in training with the gradients of x and every weight."""
    gradient = dy if case.training else None
    return entrant(run, {"x": x}, named, gradient, layer, unpack=unpack, differentiate=torch.autograd.grad)


def ours(case: Layers, given: LayerInputs, device: str) -> Entrant:
    """fastseq.nn on the backend in force; unequal lengths by ``lengths=``."""
    layer = build_layer(fastseq.nn, case.plain, given.state, case.torch_dtype)
    options = {} if given.lengths is None else {"lengths": given.lengths.to(device)}
    return one_call(case, lambda x: layer(x, **options), given.x, given.dy, layer)


BARRIER = "cluster_barrier"
"""The role of the CUDA C++ scan that exists to be measured beside ``cluster``."""


@contextlib.contextmanager
def in_role(role: str | None) -> Iterator[None]:
    """The Triton scan, or the CUDA C++ one, takes a role inside the ``with`` block; None: the role of its tables."""
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
    from fastseq.kernels.recurrent import launch as recurrent_launch

    before, recurrent_launch.role = recurrent_launch.role, role
    try:
        yield
    finally:
        recurrent_launch.role = before


def persistent(case: Layers, given: LayerInputs, device: str) -> Entrant:
    """:func:`ours` in the role in force, if the device can run it: shows whether the tables should choose it."""
    if case.steps == 1:
        raise Unavailable("a single step is one launch in any role")
    from fastseq.kernels.recurrent import launch as recurrent_launch

    try:
        recurrent_launch.tile(kernel_cell(case), given.x, case.hidden, False, case.training)
    except ValueError as reason:
        raise Unavailable(str(reason)) from None
    return ours(case, given, device)


def barrier(case: Layers, given: LayerInputs, device: str) -> Entrant:
    """:func:`ours` with a barrier of the cluster in each step, if forward and backward fit: shows which exchange is
    faster."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(given.x.dtype)
    kind = kind or ("tf32" if torch.ops.fastseq.one_tf32_product() else "fp32")
    for backward in (False, True)[: 1 + case.training]:
        plan = torch.ops.fastseq.native_scan_plan(kernel_cell(case), kind, backward, case.hidden, case.batch, [])
        if not plan.startswith(f"role={BARRIER} "):
            raise Unavailable(plan.partition("reason=")[2])
    return ours(case, given, device)


def kernel_cell(case: Layers) -> str:
    """The kernels' name of the cell."""
    return "rnn_tanh" if case.cell == "rnn" else case.cell


def torch_entrant(case: Layers, given: LayerInputs, device: str, dtype: torch.dtype | None = None) -> Entrant:
    """torch.nn: cuDNN on a GPU. Packing the input and unpacking y are not timed."""
    dtype = dtype or case.torch_dtype
    if case.cell == "gru_reset_before":
        raise Unavailable("torch has no GRU that resets before the product")
    layer = build_layer(nn, case.plain, given.state, dtype)
    x, dy = given.x.to(dtype), given.dy.to(dtype)
    if given.lengths is None:
        return one_call(case, layer, x, dy, layer)
    packed = nn.utils.rnn.pack_padded_sequence(x, given.lengths)
    d_packed = nn.utils.rnn.pack_padded_sequence(dy, given.lengths).data if case.training else dy
    sizes = packed.batch_sizes

    def unpack(data: Tensor) -> Tensor:
        whole = nn.utils.rnn.PackedSequence(data, sizes)
        return nn.utils.rnn.pad_packed_sequence(whole, total_length=case.steps)[0]

    def run(data: Tensor) -> tuple[Tensor, Any]:
        y, state = layer(nn.utils.rnn.PackedSequence(data, sizes))
        return y.data, state

    def named(answer: tuple[Tensor, Any]) -> Outputs:
        return named_states((unpack(answer[0]), answer[1]))

    return one_call(case, run, packed.data, d_packed, layer, named, unpack)


def flashrnn_entrant(case: Layers, given: LayerInputs, device: str) -> Entrant:
    """FlashRNN's fused kernels, with the product of x by torch. The two biases are added into one, which is right for
    an LSTM and a plain RNN."""
    plain = case.layers == 1 and not case.bidirectional and not case.packed
    if case.cell not in ("lstm", "rnn") or not plain or case.dtype == "float32":
        raise Unavailable("FlashRNN is measured on one layer of an LSTM or plain RNN in 16 bits")
    from flashrnn import flashrnn  # type: ignore[import-not-found]

    gates, hidden = GATES[case.cell], case.hidden
    layer = build_layer(nn, case.plain, given.state, case.torch_dtype)
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

    return one_call(case, run, given.x, given.dy, layer)


def answers(case: Layers, given: LayerInputs, device: str, dtype: torch.dtype) -> Outputs:
    """torch's answer, and gradients, computed in ``dtype``: in float64 the truth."""
    with torch.set_grad_enabled(case.training):
        if case.cell == "gru_reset_before":
            layer = ResetBeforeGRU(given.state, dtype)
            h0 = torch.zeros(1, case.batch, case.hidden, dtype=dtype, device=device)
            made = one_call(case, lambda x: layer(x, h0), given.x.to(dtype), given.dy.to(dtype), layer)
        else:
            made = torch_entrant(case, given, device, dtype)
        return {name: tensor.detach() for name, tensor in made.outputs(made.call()).items()}

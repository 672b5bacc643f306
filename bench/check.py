"""The truth of a case, and how far from it an answer may be.

The truth is computed in float64 from the very numbers the contestants get: torch's layer or attention where it has
one, and for the GRU that resets before its product the recurrence below. An answer's error is the largest difference
from the truth over the truth's largest magnitude, tensor by tensor. It may be at most twice the error of torch in the
contestants' own data type, and a floor where torch happens to be nearly exact.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Attention, AttentionInputs, Case, Multihead, MultiheadInputs, Recurrent, RecurrentInputs
from bench.peers import (
    Entrant,
    Inputs,
    Outputs,
    build_layer,
    build_multihead,
    layer_entrant,
    multihead_entrant,
    sdpa_entrant,
    torch_loop,
)

FLOOR = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-10}
"""8 units in the last place of float32, half of one of bfloat16, one of float16."""


class ResetBeforeGRU(nn.Module):
    """h' = z h + (1 - z) tanh(W_in x + b_in + W_hn (r h) + b_hn), r and z as in any GRU; called as torch.nn.GRU."""

    def __init__(self, state: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        for name, weight in state.items():
            self.register_parameter(name, nn.Parameter(weight.to(dtype)))

    def forward(self, x: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        rows = 2 * h0.shape[-1]  # those of r and z
        h, outputs = h0[0], []
        for x_t in F.linear(x, w_ih, b_ih):
            r, z = torch.sigmoid(x_t[:, :rows] + F.linear(h, w_hh[:rows], b_hh[:rows])).chunk(2, 1)
            h = z * h + (1 - z) * torch.tanh(x_t[:, rows:] + F.linear(r * h, w_hh[rows:], b_hh[rows:]))
            outputs.append(h)
        return torch.stack(outputs), h[None]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs in another data type; weights are cast when the layer is built."""
    tensors = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    floats = {n: t.to(dtype) for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return dataclasses.replace(inputs, **floats)  # type: ignore[arg-type]


def standard(case: Case, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    """torch's answer (and gradients) to a case, computed in ``dtype``."""
    inputs = cast(inputs, dtype)
    entrant: Entrant
    if isinstance(case, Recurrent):
        assert isinstance(inputs, RecurrentInputs)
        if case.cell == "gru_reset_before":
            layer: nn.Module = ResetBeforeGRU(inputs.state, dtype)
        else:
            layer = build_layer(nn, case, inputs.state, dtype)
        entrant = layer_entrant(case, layer, inputs)
    elif isinstance(case, Multihead):
        assert isinstance(inputs, MultiheadInputs)
        entrant = multihead_entrant(case, build_multihead(nn, case, inputs.state, dtype), inputs)
    else:
        assert isinstance(case, Attention)
        assert isinstance(inputs, AttentionInputs)
        if case.kind == "varlen":
            entrant = torch_loop(case, inputs)
        else:
            entrant = sdpa_entrant(case, F.scaled_dot_product_attention, inputs)
    with torch.set_grad_enabled(case.training):
        return {name: tensor.detach() for name, tensor in entrant.outputs(entrant.call()).items()}


def errors(outputs: Outputs, truth: Outputs) -> dict[str, float]:
    """Largest difference over largest magnitude of each tensor of ``truth``; inf where one is missing, of another
    shape, or not finite."""
    found = {}
    for name, true in truth.items():
        answer = outputs.get(name)
        if answer is None or answer.shape != true.shape or not bool(answer.isfinite().all()):
            found[name] = float("inf")
            continue
        scale = max(float(true.abs().max()), torch.finfo(torch.float32).tiny)
        found[name] = float((answer.detach().double() - true).abs().max()) / scale
    return found


@dataclasses.dataclass
class Judge:
    """Holds a case's truth, and the error torch itself makes in the case's data type."""

    truth: Outputs
    budget: dict[str, float]

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Judge:
        truth = standard(case, inputs, torch.float64)
        own = errors(standard(case, inputs, case.torch_dtype), truth)
        return cls(truth, {name: 2 * error + FLOOR[case.dtype] for name, error in own.items()})

    def fault(self, found: dict[str, float], looseness: float = 0.0) -> str | None:
        """What is wrong with an answer of these errors; None where it is right."""
        over = {name: e for name, e in found.items() if not e <= self.budget[name] + looseness}
        if not over:
            return None
        name = max(over, key=lambda name: over[name] / self.budget[name])
        return f"{name} is off by {over[name]:.1e} of its largest value; {self.budget[name] + looseness:.1e} is allowed"

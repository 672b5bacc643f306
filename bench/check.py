"""The truth of a case, and how far from it an answer may be.

The truth is computed in float64 from the numbers that the contestants get: by torch's layer or attention, for the GRU
that resets before its product by the recurrence below, and for a normalised layer by a loop over its equations. The
error of a tensor is its largest difference from the truth over the truth's largest magnitude. It may be at most twice
the error of torch in the contestants' data type, plus a floor for cases in which torch is nearly exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import AttentionInputs, Case, Inputs, LayerInputs, Recurrent
from bench.peers import Outputs, layer_entrant, loop_entrants, torch_entrants, torch_loop

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
    if isinstance(case, Recurrent) and case.cell == "gru_reset_before":
        assert isinstance(inputs, LayerInputs)
        entrant = layer_entrant(case, ResetBeforeGRU(inputs.state, dtype), inputs)
    elif isinstance(case, Recurrent) and case.norm:
        entrant = next(loop_entrants(case, inputs, 1))
    elif getattr(case, "kind", "") == "varlen":
        assert isinstance(inputs, AttentionInputs)
        entrant = torch_loop(case, inputs)  # type: ignore[arg-type]
    else:
        entrant = next(torch_entrants(case, inputs, 1))
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
    """Holds a case's truth, and the error allowed: twice that of torch in the case's data type, plus a floor."""

    truth: Outputs
    budget: dict[str, float]

    @classmethod
    def by(cls, answer: Callable[[torch.dtype], Outputs], case: Case) -> Judge:
        """From a function that gives the right answer, computed in a data type."""
        truth = answer(torch.float64)
        own = errors(answer(case.torch_dtype), truth)
        return cls(truth, {name: 2 * error + FLOOR[case.dtype] for name, error in own.items()})

    @classmethod
    def of(cls, case: Case, inputs: Inputs) -> Judge:
        return cls.by(lambda dtype: standard(case, inputs, dtype), case)

    def fault(self, found: dict[str, float]) -> str | None:
        """What is wrong with an answer of these errors; None if it is right."""
        over = {name: e for name, e in found.items() if not e <= self.budget[name]}
        if not over:
            return None
        name = max(over, key=lambda name: over[name] / self.budget[name])
        return f"{name} is off by {over[name]:.1e} of its largest value; {self.budget[name]:.1e} is allowed"

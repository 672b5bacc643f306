"""What each layer costs as sequences grow: time and peak memory of RNN, GRU, LSTM and attention from 16 to 16k steps.

One layer of one width, one sequence, forward and training, on the device at hand; the recurrent layers also with the
same number of steps as many short sequences, which shows what it costs that time steps cannot run in parallel. The
contestants of a length take turns. Every result is written at once; the same command continues an interrupted run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import fastseq
from bench import peak
from bench.report import RESULTS
from bench.run import time_in_turns
from bench.studies.resume import Unit, arguments, conduct

KINDS = ("rnn", "gru", "lstm", "attention")
RECURRENT = {"rnn": fastseq.nn.RNN, "gru": fastseq.nn.GRU, "lstm": fastseq.nn.LSTM}
MODES = ("forward", "training")

WHOLE, SHORT = "one sequence", "short sequences"
"""The shape of the steps: [1,T], or [T/16,16], for which a recurrent layer takes 16 steps, whatever T is."""

SHORT_STEPS = 16


@dataclass(frozen=True)
class Protocol:
    """min_time: seconds given to each contestant of a length. device: its name, or ``cpu`` and its threads."""

    device: str
    width: int = 256
    heads: int = 4
    lengths: tuple[int, ...] = tuple(16 << i for i in range(11))
    memory_lengths: tuple[int, ...] = tuple(16 << 2 * i for i in range(6))
    min_time: float = 0.4


def quick(device: str) -> Protocol:
    return Protocol(device, lengths=(16, 64, 256, 1024), memory_lengths=(64, 1024), min_time=0.05)


class CausalAttention(nn.Module):
    """A layer of attention with the recurrent layers' call."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer = fastseq.nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.layer(x, x, x, need_weights=False, is_causal=True)[0], None


def make(kind: str, mode: str, layout: str, steps: int, protocol: Protocol, device: torch.device) -> Callable[[], Any]:
    """One call of the layer on fresh memory: forward without gradients, or forward and backward with all of them."""
    torch.manual_seed(0)
    width = protocol.width
    layer: nn.Module = (
        CausalAttention(width, protocol.heads)
        if kind == "attention"
        else RECURRENT[kind](width, width, batch_first=True)
    )
    layer = layer.to(device)
    batch, length = (1, steps) if layout == WHOLE else (steps // SHORT_STEPS, SHORT_STEPS)
    x = torch.randn(batch, length, width, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def forward() -> Any:
        with torch.inference_mode():
            y = layer(x)[0]
        wait()
        return y

    def training() -> Any:
        x.grad = None
        layer.zero_grad()
        layer(x)[0].backward(dy)
        wait()
        return x.grad

    if mode == "forward":
        layer.eval()
        return forward
    x.requires_grad_()
    dy = torch.randn(batch, length, width, device=device)
    return training


def plan(protocol: Protocol) -> list[Unit]:
    """Short lengths first; memory, which needs processes of its own, last."""
    units: list[Unit] = [{"part": "time", "mode": mode, "steps": t} for t in protocol.lengths for mode in MODES]
    return units + [{"part": "memory", "mode": mode, "kind": kind} for mode in MODES for kind in KINDS]


def measure(unit: Unit, protocol: Protocol, device: torch.device, threads: int) -> dict[str, Any]:
    if unit["part"] == "time":
        return {"times": times(unit["mode"], unit["steps"], protocol, device)}
    found = None
    if peak.measurable(device):
        found = peak.in_a_process(peaks, unit["kind"], unit["mode"], protocol, device, threads)
    return {"peak_bytes": found}


def times(mode: str, steps: int, protocol: Protocol, device: torch.device) -> list[dict[str, Any]]:
    """All contestants of a length, in turns: microseconds a call, and which backend ran."""
    contestants = [
        (kind, layout) for layout in (WHOLE, SHORT) for kind in KINDS if layout == WHOLE or kind in RECURRENT
    ]
    calls = [make(kind, mode, layout, steps, protocol, device) for kind, layout in contestants]
    said = [fastseq.explain(call).splitlines()[0] for call in calls]
    timings = time_in_turns(calls, protocol.min_time)
    return [
        {"kind": kind, "layout": layout, "ran": ran, "rounds": len(timing.times)}
        | {"median_us": timing.median * 1e6, "iqr_us": timing.iqr * 1e6}
        for (kind, layout), timing, ran in zip(contestants, timings, said, strict=True)
    ]


# --- memory ---------------------------------------------------------------------------------------------------------


def peaks(kind: str, mode: str, protocol: Protocol, device: torch.device, threads: int) -> dict[int, int]:
    """By length, the peak of two calls above what inputs and weights take; gradients and everything saved count."""
    torch.set_num_threads(threads)
    make(kind, mode, WHOLE, SHORT_STEPS, protocol, device)()  # code and thread stacks
    lengths = protocol.memory_lengths
    return {n: peak.peak_of(make(kind, mode, WHOLE, n, protocol, device), device) for n in lengths}


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments, 130 if it was interrupted."""
    parser = arguments(
        "cost", __doc__, "up to 1024 steps, in half a minute", "in bench/results, named after the device"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = options.json or RESULTS / f"{name.lower().replace(' ', '-')}-cost{'-quick' * options.quick}.json"
    described = f"cpu, {options.threads} threads" if device.type == "cpu" else name
    protocol = quick(described) if options.quick else Protocol(described)
    return conduct(parser, options, path, protocol, plan(protocol),
                   lambda study, unit: measure(unit, protocol, device, options.threads))  # fmt: skip

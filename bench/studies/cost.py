"""What each layer costs as sequences grow: time and peak memory of RNN, GRU, LSTM and attention from 16 to 16k steps.

One layer of one width, one sequence, forward and training, on the device at hand; the recurrent layers also with the
same number of steps laid out as many short sequences, which tells what it costs that time cannot be parallelised. The
contestants of a length take turns. Every result is written at once; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastseq
from bench import peak
from bench.report import RESULTS, unwritable
from bench.run import time_in_turns
from bench.studies.resume import OtherStudy, Study, Unit

KINDS = ("rnn", "gru", "lstm", "attention")
RECURRENT = {"rnn": fastseq.nn.RNN, "gru": fastseq.nn.GRU, "lstm": fastseq.nn.LSTM}
MODES = ("forward", "training")

WHOLE, SHORT = "one sequence", "short sequences"
"""How the steps are laid out: [1,T], or [T/16,16], which a recurrent layer walks in 16 steps, whatever T is."""

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
    """Short lengths first; memory, which takes processes of their own, last."""
    units: list[Unit] = [{"part": "time", "mode": mode, "steps": t} for t in protocol.lengths for mode in MODES]
    return units + [{"part": "memory", "mode": mode, "kind": kind} for mode in MODES for kind in KINDS]


def measure(unit: Unit, protocol: Protocol, device: torch.device, threads: int) -> dict[str, Any]:
    if unit["part"] == "time":
        return {"times": times(unit["mode"], unit["steps"], protocol, device)}
    return {"peak_bytes": in_subprocess(unit["kind"], unit["mode"], protocol, device, threads)}


def times(mode: str, steps: int, protocol: Protocol, device: torch.device) -> list[dict[str, Any]]:
    """All contestants of a length, in turns: microseconds a call, and which backend ran."""
    contestants = [
        (kind, layout) for layout in (WHOLE, SHORT) for kind in KINDS if layout == WHOLE or kind in RECURRENT
    ]
    calls = [make(kind, mode, layout, steps, protocol, device) for kind, layout in contestants]
    said = [fastseq.explain(call).splitlines()[0] for call in calls]
    timings = time_in_turns(calls, protocol.min_time)
    return [
        {"kind": kind, "layout": layout, "ran": ran, "rounds": timing.rounds}
        | {"median_us": timing.median * 1e6, "iqr_us": timing.iqr * 1e6}
        for (kind, layout), timing, ran in zip(contestants, timings, said, strict=True)
    ]


# --- memory ---------------------------------------------------------------------------------------------------------


def in_subprocess(
    kind: str, mode: str, protocol: Protocol, device: torch.device, threads: int
) -> dict[int, int] | None:
    """Bytes by length; None where the system does not tell (on the CPU it takes Linux)."""
    if device.type == "cpu" and not peak.CLEAR_REFS.exists():
        return None
    handed = json.dumps([kind, mode, dataclasses.asdict(protocol), str(device), threads])
    command = [sys.executable, "-m", "bench.studies.cost", handed]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if found.returncode:
        raise RuntimeError(f"measuring the memory of {kind}, {mode}: {found.stderr.strip()[-500:]}")
    return json.loads(found.stdout)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[dict[str, int]]:
    """What memory rose by at most, inside: ``found["bytes"]`` afterwards."""
    found: dict[str, int] = {}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found["bytes"] = torch.cuda.max_memory_allocated() - before
        return
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier is used again, and unseen
    before = peak.status("VmRSS")
    peak.CLEAR_REFS.write_text("5")
    yield found
    found["bytes"] = peak.status("VmHWM") - before


def child(handed: str) -> dict[int, int]:
    """Peak of two calls at each length above what inputs and weights take; gradients and everything saved count."""
    kind, mode, protocol, device, threads = json.loads(handed)
    torch.set_num_threads(threads)
    settings, where = Protocol(**protocol), torch.device(device)
    make(kind, mode, WHOLE, SHORT_STEPS, settings, where)()  # code and thread stacks
    peaks = {}
    for steps in settings.memory_lengths:
        call = make(kind, mode, WHOLE, steps, settings, where)
        with watched(where) as found:
            for _ in range(2):
                call()
        peaks[steps] = found["bytes"]
        del call
    return peaks


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments, 130 where it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 1024 steps, in half a minute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: in bench/results, named after the device")
    parser.add_argument("--restart", action="store_true", help="throw away what the file holds")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error("--threads must be positive")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device}: {str(error).splitlines()[0]}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = options.json or RESULTS / f"{name.lower().replace(' ', '-')}-cost{'-quick' * options.quick}.json"
    if refusal := unwritable(path):
        parser.error(f"--json {refusal}")
    torch.set_num_threads(options.threads)
    described = f"cpu, {options.threads} threads" if device.type == "cpu" else name
    protocol = quick(described) if options.quick else Protocol(described)
    try:
        command = "python -m bench cost" + " --quick" * options.quick
        study = Study(path, command, dataclasses.asdict(protocol), options.threads, options.restart)
    except OtherStudy as error:
        print(f"python -m bench cost: {error}", file=sys.stderr)
        return 2
    if not study.run(plan(protocol), lambda unit: measure(unit, protocol, device, options.threads)):
        return 130
    return 0


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))

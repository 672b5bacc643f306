"""What smaller weights cost and gain: loss on held-out text and time of a step, of trained character models.

Trains the demo's GRU and LSTM on the standard library's sources, then runs each with its float32 weights, with
``fastseq.patch(weights="bfloat16")``, with ``weights="int8"``, with ``compute=`` of both, and through torch's dynamic
quantisation.

With --grid instead: fastseq with bfloat16 weights beside torch and ONNX Runtime in float32 on every shape of the
recurrent grid, all with weights that are exact in bfloat16, so that all are compared with one truth. These are the
cases of ``python -m bench --case bf16-weights``.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastseq
from bench.cases import select
from bench.peers import OURS, PEERS
from bench.report import environment, unwritable, write_json
from bench.run import Options, time_in_turns
from bench.session import run
from fastseq import cli
from fastseq.demo import data
from fastseq.demo.models import Recurrent

MODELS = ("gru", "lstm")
HELD_OUT = 40_000
"""Characters of held-out text over which the loss is averaged."""


def main(argv: list[str]) -> int:
    """Entry point; 2 on bad arguments, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m bench weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="training steps of each model (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="hidden units (default: %(default)s)")
    parser.add_argument("--grid", action="store_true", help="the recurrent grid, beside the peers in float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--min-time", type=float, default=1.0, metavar="SECONDS", help="for timing each variant")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.width < 1 or options.threads < 1 or not options.min_time > 0:
        parser.error("--steps, --width, --threads and --min-time must be positive")
    if options.json is not None and (refusal := unwritable(options.json)):
        parser.error(f"--json {refusal}")
    if options.grid:
        contestants = [OURS, *(peer for peer in PEERS.values() if peer.missing() is None)]
        return run(select(["bf16-weights"]), contestants, Options(options.threads, options.min_time), options.json)
    torch.set_num_threads(options.threads)
    found = []
    try:
        for name in MODELS:
            found.append(compare(name, options.width, options.steps, options.min_time))
            _print(found[-1])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return cli.INTERRUPTED
    if options.json is not None:
        made = {"command": shlex.join(["python", "-m", "bench", "weights", *argv]), "steps": options.steps}
        write_json(options.json, {**made, "environment": environment(options.threads), "models": found})
    return 0


def compare(name: str, width: int, steps: int, min_time: float) -> dict[str, Any]:
    """Train the model and measure its variants: losses in nats a character, microseconds of a step of one character
    through the recurrent layer."""
    torch.manual_seed(0)
    text = data.load(None, 1000)
    model = Recurrent(nn.GRU if name == "gru" else nn.LSTM, len(text.symbols), width)
    fastseq.patch(model)
    _train(model, text, steps)
    fastseq.unpatch(model)
    models = variants(model.eval())
    ids = text.held_out[: HELD_OUT + 1]
    rows, length = 8, (len(ids) - 1) // 8
    x = ids[: rows * length].view(rows, length)
    target = ids[1 : rows * length + 1].view(rows, length)
    calls = [_step(each.layer, width) for each in models.values()]  # type: ignore[arg-type]
    with torch.inference_mode():
        losses = [float(cross_entropy(each(x)[0].flatten(0, 1), target.flatten())) for each in models.values()]
        times = [timing.median * 1e6 for timing in time_in_turns(calls, min_time)]
    return {
        "model": name,
        "width": width,
        "parameters": sum(p.numel() for p in model.layer.parameters()),
        "variants": {
            variant: {"loss": loss, "step_us": time} for variant, loss, time in zip(models, losses, times, strict=True)
        },
    }


def variants(model: nn.Module) -> dict[str, nn.Module]:
    """The model as torch runs it, as fastseq runs it, and with smaller weights in each."""
    found: dict[str, nn.Module] = {"torch float32": model}
    for label, weights, compute in (
        ("float32", None, None),
        ("bfloat16", "bfloat16", None),
        ("int8", "int8", None),
        ("bf16 computed", None, "bfloat16"),
        ("int8 computed", None, "int8"),
    ):
        found[f"fastseq {label}"] = copy.deepcopy(model)
        fastseq.patch(found[f"fastseq {label}"], weights=weights, compute=compute)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["torch int8"] = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.GRU, nn.LSTM}, dtype=torch.qint8
        )
    return found


def _train(model: nn.Module, text: Any, steps: int) -> None:
    from rich.progress import track

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in track(range(steps), description="training", transient=True):
        ids, following = text.batch(32, 64, generator)
        optimizer.zero_grad()
        cross_entropy(model(ids)[0].flatten(0, 1), following.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _step(layer: nn.Module, width: int) -> Callable[[], object]:
    x: Tensor = torch.randn(1, 1, width)
    state: Any = layer(x)[1]

    def step() -> object:
        nonlocal state
        with torch.inference_mode():
            y, state = layer(x, state)
        return y

    return step


def _print(found: dict[str, Any]) -> None:
    measured = found["variants"]
    full, fastest = measured["fastseq float32"], measured["torch int8"]
    print(f"{found['model']}, {found['width']} wide, {found['parameters']:,} weights in the layer")
    print(f"  {'':<22}{'loss':>9}{'over float32':>14}{'step':>12}{'float32 / it':>14}{'torch int8 / it':>17}")
    for name, one in measured.items():
        over = one["loss"] / full["loss"] - 1
        print(
            f"  {name:<22}{one['loss']:>9.4f}{over:>+14.3%}{one['step_us']:>9.1f} µs"
            f"{full['step_us'] / one['step_us']:>13.2f}x{fastest['step_us'] / one['step_us']:>16.2f}x"
        )

"""``python -m fastseq demo``: train the same models on torch.nn and on fastseq, and see that only the speed differs."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from pathlib import Path

import torch

import fastseq
from fastseq import cli
from fastseq.backend import forced
from fastseq.demo import data, race
from fastseq.demo.console import progress
from fastseq.demo.models import KINDS, Kind
from fastseq.demo.race import Race

LONGEST = 45.0
"""Seconds that one model may train unless --steps was given, so that all three end within three minutes."""

PROMPT = "def "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--model", choices=[*KINDS, "all"], default="all", help="which model to train (default: all)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this file (default: Python's own sources)")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="training steps of each model (default: what fits a minute)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="for the results (demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the models and the batches (default: 0)")


def main(options: argparse.Namespace) -> int:
    """Run the demo. Returns the exit status: 0 losses agree, 1 they do not, 2 bad options, 130 Ctrl-C."""
    kinds = list(KINDS.values()) if options.model == "all" else [KINDS[options.model]]
    try:
        device = _device(options.device)
        text = data.load(options.text, 2 * max(kind.length for kind in kinds))
        out = _folder(options.out)
        _known_backend()
    except data.DataError as error:
        return _refused(error)
    except KeyboardInterrupt:
        return _stopped("before any training")
    races: list[Race] = []
    interrupted = False
    try:
        _introduce(text, device)
        for kind in kinds:
            result = _one(kind, text, options, device)
            interrupted = result.interrupted
            if result.done:
                races.append(result)
                _show(result, text, out, options.seed)
            if interrupted:
                break
    except fastseq.BackendError as error:  # FASTSEQ_BACKEND names one that cannot run here
        return _refused(error)
    except KeyboardInterrupt:
        interrupted = True
    try:
        _save(races, text, out, device)
    except KeyboardInterrupt:
        return _stopped(f"not all results are in {out}")
    if interrupted:
        return _stopped(f"what was done so far is in {out}" if races else "no step was done by both sides")
    print(f"\n{verdict(races)}")
    return 0 if all(result.agrees for result in races) else 1


def verdict(races: list[Race]) -> str:
    """The last line: do the losses agree, and how much faster was it."""
    wrong = [result for result in races if not result.agrees]
    if wrong:
        names = ", ".join(result.kind.name for result in wrong)
        return (
            f"VERDICT: the losses of {names} DIFFER by more than rounding explains: please report this, "
            "with the output of python -m fastseq doctor"
        )
    timed = [f"{r.kind.name} {r.speedup[1]:.2f}x" for r in races if not math.isnan(r.speedup[1])]
    line = "VERDICT: same losses; training speed beside torch.nn: "
    line += ", ".join(timed) if timed else "too few steps to tell"
    if all("runs on: torch" in result.runs_on for result in races):
        line += "\nfastseq had none of its own kernels here and used torch's: python -m fastseq doctor tells why"
    return line


def _one(kind: Kind, text: data.Text, options: argparse.Namespace, device: torch.device) -> Race:
    steps = options.steps or kind.steps
    print(f"\n{kind.title}; {steps} steps of {kind.batch} x {kind.length} characters", flush=True)
    result = race.start(kind, text, steps, device, options.seed)
    names = ", ".join(changed.name for changed in result.report.changed)
    print(f"  fastseq.patch(model) changed {names}; {result.runs_on.partition(' (')[0]}", flush=True)
    with progress(kind.name, 2 * steps) as update:

        def tell(done: int, theirs: float, ours: float) -> None:
            losses = ["..." if math.isnan(loss) else f"{loss:.3f}" for loss in (theirs, ours)]
            update(done, f"loss {' | '.join(losses)}")

        race.run(result, text, options.seed, math.inf if options.steps else LONGEST, tell)
    return result


def _introduce(text: data.Text, device: torch.device) -> None:
    size = len(text.train) + len(text.held_out)
    print("fastseq demo: the same model on torch.nn and on fastseq, from the same seed, on the same batches")
    print(f"  text    {text.source}: {size:,} characters, {len(text.symbols)} symbols")
    print(f"  on      {_where(device)}")
    print(f"  method  turns of {race.TURN} steps; speed: the median turn after the first; ratio: the median of theirs")
    print(
        f"          losses agree when no step of the first {race.EARLY} is {_percent(race.EARLY_TOLERANCE)} apart, and "
        f"no mean of {race.STRETCH} later ones {_percent(race.STRETCH_TOLERANCE)}:\n"
        "          training enlarges the rounding in which two right answers differ"
    )
    if device.type == "cpu" and (load := _load()) > 1.5:
        print(f"  beware  other programs keep this machine busy ({load:.1f} a core): expect few steps and poor speeds")


def _show(result: Race, text: data.Text, out: Path, seed: int) -> None:
    for side in (result.theirs, result.ours):
        first, last = side.losses[0], sum(side.losses[-10:]) / len(side.losses[-10:])
        speed = result.tokens_per_second(side)
        shown = "" if math.isnan(speed) else f"{speed:>10,.0f} characters/s"
        print(f"  {side.name:<9}{shown}  loss {first:.3f} -> {last:.3f}")
    low, middle, high = result.speedup
    if math.isnan(middle):
        print(f"  too few steps for a speed: it takes {race.FEWEST_TURNS * race.TURN + 1}")
    else:
        print(f"  fastseq trains {middle:.2f} times as fast as torch.nn ({low:.2f} to {high:.2f} in half of the turns)")
    agree = "agree" if result.agrees else "DO NOT AGREE"
    far = f"{_percent(result.early_difference)} in the first {min(race.EARLY, result.done)} steps"
    if result.done >= race.EARLY + race.STRETCH:
        far += f", {_percent(max(result.differences))} in any of all {result.done}, "
        far += f"{_percent(result.stretch_difference)} in any mean of {race.STRETCH}"
    print(f"  losses {agree}: apart by at most {far}")
    if result.out_of_time:
        print(f"  ended after {result.done} of {result.steps} steps to stay short; --steps {result.steps} does all")
    bits = race.held_out_bits(result, text)
    written = race.write(result, text, PROMPT, 600, seed)
    path = out / f"sample-{result.kind.name}.txt"
    cli.write_text(path, written + "\n")
    print(f"  {bits:.2f} bits a character on text it has not seen; it writes ({path}):")
    lines = [line[:100].rstrip() for line in written.splitlines() if len(line[:100].strip()) > 2]
    for line in lines[:5]:
        print(f"    | {line}")


def _save(races: list[Race], text: data.Text, out: Path, device: torch.device) -> None:
    if not races:
        return
    record = {
        "fastseq": fastseq.__version__,
        "torch": torch.__version__,
        "where": _where(device),
        "text": text.source,
        "tolerances": {"early": race.EARLY_TOLERANCE, "stretch": race.STRETCH_TOLERANCE},
        "models": {
            result.kind.name: {
                "runs_on": result.runs_on,
                "steps": result.done,
                "agrees": result.agrees,
                "largest_relative_difference": {
                    f"in the first {race.EARLY} steps": _finite(result.early_difference),
                    "in any step": _finite(max(result.differences)),
                    f"in any mean of {race.STRETCH} steps": _finite(result.stretch_difference),
                },
                "characters_per_second": {
                    side.name: _finite(result.tokens_per_second(side)) for side in (result.theirs, result.ours)
                },
                "speedup": dict(zip(("low", "median", "high"), map(_finite, result.speedup), strict=True)),
                "losses": {side.name: side.losses for side in (result.theirs, result.ours)},
            }
            for result in races
        },
    }
    numbers, image = out / "results.json", out / "demo.png"
    cli.write_text(numbers, json.dumps(record, indent=1) + "\n")
    print(f"\nnumbers: {numbers}")
    try:
        from fastseq.demo.picture import draw

        draw(races, image, _where(device))
        print(f"picture: {image}")
    except ImportError:
        print("picture: none, as matplotlib is not installed: pip install matplotlib")
    except Exception as error:
        print(f"picture: none: {type(error).__name__}: {error}")


def _refused(error: Exception) -> int:
    print(f"fastseq demo: {error}", file=sys.stderr)
    return cli.USAGE


def _stopped(what: str) -> int:
    print(f"\nstopped by Ctrl-C; {what}", file=sys.stderr)
    return cli.INTERRUPTED


def _known_backend() -> None:
    try:
        forced()
    except ValueError as error:
        raise data.DataError(str(error)) from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise data.DataError(f"--device {name}: {reason}; python -m fastseq doctor tells what is here") from None
    return device


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.DataError(f"--out {path}: cannot make this folder: {error.strerror or error}") from None
    return path


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{device} ({platform.machine()}), {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def _load() -> float:
    """Processes that want to run, a core, over the last minute; 0 where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return 0.0


def _percent(value: float) -> str:
    return f"{value * 100:.2g}%"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value

"""The command line: ``python -m bench`` measures cases; ``python -m bench NAME`` runs a subcommand."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastseq
from bench.cases import DTYPES, QUICK, select
from bench.peers import OURS, PEERS, Contestant
from bench.report import unwritable
from bench.run import Options
from bench.session import run
from fastseq import cli
from fastseq.backend import forced
from fastseq.calibration import chosen

COMMANDS = {
    "report": "bench.page",
    "readme": "bench.readme",
    "support": "bench.support",
    "gpu": "bench.gpu.command",
    "auto": "bench.gpu.auto",
    "tune": "bench.gpu.tune",
    "memory": "bench.studies.memory",
    "regularise": "bench.studies.regularise",
    "cost": "bench.studies.cost",
    "parallel": "bench.studies.parallel",
    "weights": "bench.studies.weights",
    "precision": "bench.studies.precision",
    "model": "bench.studies.model",
    "fit": "bench.studies.fit",
    "decoding": "bench.studies.decoding",
    "encoders": "bench.studies.encoders",
}
"""Subcommands and their modules: ``main(argv)`` gives the exit status, the docstring's first line describes it."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every case against a float64 truth, then time fastseq beside its peers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--case", nargs="+", default=[], metavar="PATTERN", action="extend",
                     help="only cases whose name contains one of these, or matches a glob (* ? [])")  # fmt: skip
    out.add_argument("--dtype", nargs="+", default=[], choices=DTYPES, action="extend",
                     help="data types (default: float32, and bfloat16 for the functions of attention)")  # fmt: skip
    out.add_argument("--peer", nargs="+", choices=PEERS, action="extend",
                     help="whom to measure against (default: all)")  # fmt: skip
    out.add_argument("--quick", action="store_true", help=f"{len(QUICK)} representative cases in under a minute")
    out.add_argument("--list", action="store_true", help="print the names of the cases chosen, and end")
    out.add_argument("--threads", type=_positive(int), default=torch.get_num_threads(), help="default: %(default)s")
    out.add_argument("--backend", choices=[*fastseq.backends(), "auto"], help="fastseq's backend (default: its choice)")
    out.add_argument("--min-time", type=_positive(float), metavar="SECONDS",
                     help="time given to each contestant of a case (default: 1, with --quick 0.15)")  # fmt: skip
    out.add_argument("--memory", action="store_true", help="also peak memory of training, each in its own process")
    out.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, case by case")
    return out


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    convert.__name__ = f"positive {kind.__name__}"  # argparse's message names it
    return convert


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        status: int = importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
        return status
    options_parser = parser()
    if argv and not argv[0].startswith("-"):
        options_parser.error(f"no subcommand {argv[0]!r}; there is: {', '.join(COMMANDS)}")
    if {"-h", "--help"} & set(argv):
        described = {name: (importlib.import_module(module).__doc__ or "") for name, module in COMMANDS.items()}
        listed = [f"  {name:8} {text.splitlines()[0]}" for name, text in described.items()]
        options_parser.epilog = "\n".join(["subcommands, as first argument:", *listed])
    arguments = options_parser.parse_args(argv)
    try:
        cases = select(arguments.case, arguments.dtype, arguments.quick)
        contestants = [OURS, *_peers(arguments.peer)]
        if arguments.json is not None and (refusal := unwritable(arguments.json)):
            raise ValueError(refusal)
        forced()
        chosen.ignore()  # what is timed is AUTO's table
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return cli.USAGE
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    min_time = arguments.min_time or (0.15 if arguments.quick else 1.0)
    options = Options(arguments.threads, min_time, arguments.backend, arguments.memory)
    return run(cases, contestants, options, arguments.json)


def _peers(names: Sequence[str] | None) -> list[Contestant]:
    """The peers named, or the default ones that are installed."""
    chosen = []
    for name in dict.fromkeys(names or PEERS):
        missing = PEERS[name].missing()
        if missing is None:
            chosen.append(PEERS[name])
        elif names:
            raise ValueError(f"--peer {name}: the package {missing} is not installed; pip install {missing}")
        else:
            print(f"{PEERS[name].label} is left out: the package {missing} is not installed", file=sys.stderr)
    return chosen


if __name__ == "__main__":
    if sys.stderr is not None:
        faulthandler.enable()  # for its stack of signals: see fastseq/__main__.py
    raise SystemExit(cli.run("python -m bench", main))

"""The command line: ``python -m bench`` runs cases; ``python -m bench NAME`` hands over to a module of that name.

A module that has ``main(argv: list[str]) -> int`` is a subcommand, and the first line of its docstring is its
description. bench/gpu/command.py is ``gpu``.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import inspect
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import bench
import fastseq
from bench.cases import DTYPES, QUICK, Case, select
from bench.peers import DEFAULT_PEERS, OURS, PEERS, Contestant
from bench.report import Printer, cell, document, environment, plot, print_report, times, unwritable, write_json
from bench.run import Options, Result, measure
from fastseq import cli
from fastseq.backend import forced

REFUSED, USAGE, INTERRUPTED = 1, cli.USAGE, cli.INTERRUPTED
"""Exit statuses: a wrong answer or a crash in some case; bad arguments, or a result that cannot be written; Ctrl-C."""


def subcommands() -> dict[str, Callable[[list[str]], int]]:
    """The modules of bench, bench.gpu and bench.studies that have a ``main``."""
    found = [module.name for module in pkgutil.walk_packages(bench.__path__, "bench.") if not module.ispkg]
    modules = [importlib.import_module(name) for name in found if not name.endswith("__main__")]
    names = {module: module.__name__.replace("gpu.command", "gpu").rpartition(".")[2] for module in modules}
    return {name: module.main for module, name in names.items() if hasattr(module, "main")}


def parser(commands: dict[str, Callable[[list[str]], int]]) -> argparse.ArgumentParser:
    described = {name: (inspect.getdoc(inspect.getmodule(main)) or "") for name, main in commands.items()}
    listed = [f"  {name:8} {text.splitlines()[0]}" for name, text in described.items()]
    out = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every case against a float64 truth, then time fastseq beside its peers.",
        epilog="\n".join(["subcommands, as first argument:", *listed]) if listed else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    out.add_argument("--case", nargs="+", default=[], metavar="PATTERN", action="extend",
                     help="only cases whose name contains one of these, or matches a glob (* ? [])")  # fmt: skip
    out.add_argument("--dtype", nargs="+", default=[], choices=DTYPES, action="extend",
                     help="data types (default: float32, and bfloat16 for the functions of attention)")  # fmt: skip
    out.add_argument("--peer", nargs="+", choices=PEERS, action="extend",
                     help=f"whom to measure against (default: {' '.join(DEFAULT_PEERS)})")  # fmt: skip
    out.add_argument("--quick", action="store_true", help=f"{len(QUICK)} representative cases in under a minute")
    out.add_argument("--list", action="store_true", help="print the names of the cases chosen, and end")
    out.add_argument("--threads", type=_positive(int), default=torch.get_num_threads(), help="default: %(default)s")
    out.add_argument("--backend", choices=[*fastseq.backends(), "auto"], help="fastseq's backend (default: its choice)")
    out.add_argument("--min-time", type=_positive(float), metavar="SECONDS",
                     help="time given to each contestant of a case (default: 1, with --quick 0.15)")  # fmt: skip
    out.add_argument("--memory", action="store_true", help="also peak memory of training, each in its own process")
    out.add_argument("--json", type=Path, metavar="PATH", help="write everything measured, case by case")
    out.add_argument("--plot", type=Path, metavar="PATH", help="draw the ratios (.png, .svg, .pdf; needs matplotlib)")
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
    commands = subcommands()
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    options_parser = parser(commands)
    if argv and not argv[0].startswith("-"):
        options_parser.error(f"no subcommand {argv[0]!r}; there is: {', '.join(commands) or 'none'}")
    arguments = options_parser.parse_args(argv)
    try:
        cases = select(arguments.case, arguments.dtype, arguments.quick)
        contestants = [OURS, *_peers(arguments.peer)]
        _can_write(arguments.json, arguments.plot)
        forced()
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return USAGE
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    options = Options(
        threads=arguments.threads,
        min_time=arguments.min_time or (0.15 if arguments.quick else 1.0),
        backend=arguments.backend,
        memory=arguments.memory,
    )
    return run(cases, contestants, options, arguments.json, arguments.plot)


def _peers(names: Sequence[str] | None) -> list[Contestant]:
    """The peers named, or the default ones that are installed."""
    chosen = []
    for name in dict.fromkeys(names or DEFAULT_PEERS):
        missing = PEERS[name].missing()
        if missing is None:
            chosen.append(PEERS[name])
        elif names:
            raise ValueError(f"--peer {name}: the package {missing} is not installed; pip install {missing}")
        else:
            print(f"{PEERS[name].label} is left out: the package {missing} is not installed", file=sys.stderr)
    return chosen


def _can_write(json_path: Path | None, plot_path: Path | None) -> None:
    """Found out now and not after an hour."""
    for path in (json_path, plot_path):
        if path is not None and (refusal := unwritable(path)):
            raise ValueError(refusal)
    if plot_path is not None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ValueError("--plot needs the package matplotlib; pip install matplotlib") from None
        kinds = Figure().canvas.get_supported_filetypes()
        if plot_path.suffix[1:].lower() not in kinds:
            raise ValueError(f"--plot {plot_path}: the name must end in one of {', '.join('.' + k for k in kinds)}")


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    options: Options,
    json_path: Path | None = None,
    plot_path: Path | None = None,
) -> int:
    """Measure all cases, then report; on Ctrl-C report what there is."""
    printer = Printer()
    environ = environment(options)
    printer.line(
        f"{environ['cpu']}, {environ['instruction_set'] or 'no native kernels'}, {options.threads} threads, "
        f"torch {environ['versions']['torch']}; {len(cases)} cases, each checked before it is timed"
    )
    if environ["load"] > 0.5 * environ["cpus"]:
        printer.line(f"noise: other programs keep this machine busy (load {environ['load']:.1f} at the start)")
    results: list[Result] = []
    interrupted = False
    try:
        with progress(len(cases)) as (begin, done):
            for case in cases:
                begin(case)
                results.append(measure(case, contestants, options))
                done(results[-1])
                if json_path is not None:
                    complete = len(results) == len(cases)
                    write_json(json_path, document(results, options, complete, environ), last=complete)
    except KeyboardInterrupt:
        interrupted = True
        if json_path is not None:
            write_json(json_path, document(results, options, False, environ))
    except cli.CannotWrite:
        print_report(results, printer)  # what would be lost
        raise
    print_report(results, printer)
    if plot_path is not None:
        plot(results, plot_path, f"fastseq on {environ['cpu']}, {options.threads} threads")
    if interrupted:
        printer.line(f"interrupted: {len(results)} of {len(cases)} cases were measured")
        return INTERRUPTED
    return REFUSED if any(result.failed for result in results) else 0


@contextlib.contextmanager
def progress(count: int) -> Iterator[tuple[Callable[[Case], None], Callable[[Result], None]]]:
    """(begin, done), to be called around each case: a bar on a terminal, a line a case elsewhere; on stderr."""
    started, number = time.monotonic(), 0

    def line(result: Result) -> None:
        nonlocal number
        number += 1
        ratio = result.ratio("best")
        told = cell(result.entries[OURS.name]) + (f", {times(ratio)} the best peer's speed" if ratio else "")
        clock = f"{time.monotonic() - started:.0f} s"
        print(f"[{number}/{count}, {clock}] {result.case.name}: {told}", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield lambda case: None, line
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda case: None, line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # drawn by itself only rarely: the bar's thread would be a contestant's neighbour
    with Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=1) as bar:
        task = bar.add_task("", total=count)
        yield (lambda case: bar.update(task, description=case.name)), (lambda result: bar.advance(task))


if __name__ == "__main__":
    if sys.stderr is not None:
        faulthandler.enable()  # for its stack of signals: see fastseq/__main__.py
    raise SystemExit(cli.run("python -m bench", main))

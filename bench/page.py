"""One HTML page of all result files; or, with --docs, docs/choosing.md and the figures of README and docs.

The page loads nothing from anywhere, and is light or dark as the reader's machine is.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import speed_figures as speed
from bench.exhibits import Document, Exhibit, Results, command_of, commit_of, date_of, device_of, load, measured
from bench.formats import NONE
from bench.report import RESULTS
from bench.studies import choosing, figures
from fastseq import cli
from fastseq.demo import plots


@dataclass
class Section:
    """A part of the page: its exhibits with their drawings (empty if an exhibit is a table alone)."""

    name: str
    title: str
    lines: Sequence[str]
    exhibits: Sequence[tuple[Exhibit, str]]


def render(folder: Path, command: str) -> str:
    """The page of all result files in a folder.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
        ValueError: the folder has no result file.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    results = load(folder)
    if not results.all:
        raise ValueError(f"{folder} holds no result file; make one, for example by `python -m bench memory --quick`")
    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    devices = dict.fromkeys(device_of(document) for document in results.all.values())
    summary = f"{len(results.all)} result files, measured on {', '.join(devices)}. Every figure has its table under it."
    with plots.style(follow_page=True):
        shown = sections(results)
    page: str = jinja.get_template("page.html.j2").render(sections=shown, summary=summary, command=command)
    return page


def sections(results: Results) -> list[Section]:
    """In reading order, of speed files the quietest first; a section without results is left out."""
    made: list[Section] = []

    def add(name: str, title: str, exhibits: Sequence[Exhibit | None], lines: Sequence[str] = ()) -> None:
        there = [e for e in exhibits if e is not None]
        drawn = [(e, plots.svg(e.draw(), e.name, e.alt) if e.draw else "") for e in there]
        if drawn:
            made.append(Section(name, title, lines, drawn))

    def fullest(found: Mapping[str, Document]) -> list[tuple[str, Document]]:
        return sorted(found.items(), key=lambda pair: -measured(pair[1]))

    def each(kind: str, title: str, name: str, document: Document, exhibits: Sequence[Exhibit | None]) -> None:
        add(f"{kind}-{speed.slug(name)}", title, exhibits, _about(name, document))

    quietest = sorted(fullest(results.speed), key=lambda pair: speed.noisy(pair[1]) / max(1, measured(pair[1])))
    add("summary", "Summary", [speed.summary(quietest)])
    for name, document in quietest:
        title = f"{device_of(document)}: {speed.about(document)}, {measured(document)} cases"
        each("speed", title, name, document, [*speed.ratios(document, name), speed.peaks(document, name)])
    add("ledger", "Which kernels ran where", [speed.ledger(results)])
    add("budgets", "Errors and budgets", [speed.budgets(document, name) for name, document in results.speed.items()])
    for name, document in fullest(results.memory):
        each("study", "What layers remember", name, document, figures.memory(document))
    for name, document in fullest(results.cost):
        each("cost", "What length costs", name, document, figures.cost(document))
    for name, document in fullest(results.regularise):
        each("options", "Dropout, zoneout and normalisation", name, document, [figures.regularise(document)])
    add("weights", "Smaller weights", [figures.weights(document, name) for name, document in results.weights.items()])
    add("environment", "Where each file was measured", [_environments(results)])
    return made


def _about(name: str, document: Document) -> list[str]:
    """Where and when a file was measured, and what a reader must know beside the numbers."""
    lines = [f"{name}: {device_of(document)}, {date_of(document)}, at commit {commit_of(document)}."]
    if not document.get("complete", True):
        lines.append("The run was cut short: this is what it had measured by then.")
    return [*lines, *document.get("notes", ())]


def _environments(results: Results) -> Exhibit:
    rows = []
    for name, document in results.all.items():
        env = document["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in env.get("versions", {}).items())
        cpu = f"{env.get('threads')} threads of {env.get('cpus')}, {env.get('instruction_set')}"
        load = f"{env['load']:.1f}" if isinstance(env.get("load"), (int, float)) else NONE
        date = str(env.get("date", NONE))
        rows.append([name, device_of(document), cpu, load, versions, commit_of(document), date, command_of(document)])
    rows += [[name, "not read", reason, *[NONE] * 5] for name, reason in results.unread.items()]
    return Exhibit(
        name="environments",
        title="Where each file was measured",
        alt="",
        header=["file", "hardware", "CPU", "load at start", "versions", "commit", "date", "command"],
        rows=rows,
        command="python -m bench report",
    )


def main(argv: list[str]) -> int:
    """Entry point of ``python -m bench report``; 2 on bad arguments or if there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="PATH", help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="write docs/choosing.md and the figures of docs instead")
    options = parser.parse_args(argv)
    try:
        if options.docs:
            written = choosing.write(options.results)
        else:
            command = command_of({"command": shlex.join(["python", "-m", "bench", "report", *argv])})
            cli.write_text(options.out, render(options.results, command))
            written = [options.out]
    except ImportError as error:
        print(f"python -m bench report needs the package {error.name}; pip install {error.name}", file=sys.stderr)
        return cli.USAGE
    except (OSError, ValueError) as error:
        print(f"python -m bench report: {error}", file=sys.stderr)
        return cli.USAGE
    print("wrote " + ", ".join(str(path) for path in written))
    return 0

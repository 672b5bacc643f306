"""The report as one HTML page: nothing is loaded from anywhere, light or dark as the reader's machine is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import speed_figures
from bench.exhibits import Document, Exhibit, Results, command_of, commit_of, date_of, device_of, load, measured
from bench.studies import figures as study_figures
from fastseq.demo import plots

TEMPLATES = Path(__file__).resolve().parent


@dataclass
class Section:
    """A part of the page: its exhibits with their drawings (empty where an exhibit is a table alone)."""

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
    jinja = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    devices = dict.fromkeys(device_of(document) for document in results.all.values())
    summary = f"{len(results.all)} result files, measured on {', '.join(devices)}. Every figure has its table under it."
    with plots.style(follow_page=True):
        shown = sections(results)
    page: str = jinja.get_template("page.html.j2").render(sections=shown, summary=summary, command=command)
    return page


def sections(results: Results) -> list[Section]:
    """In reading order; a section without results is left out."""
    made = [
        *(_section(f"speed-{speed_figures.slug(name)}", f"Speed: {_titled(name)}", _told(name, document),
                   [*speed_figures.ratios(document, name), *_peaks(document, name)])
          for name, document in _fullest_first(results.speed)),
        _section("ledger", "Hardware ledger", [], [speed_figures.ledger(results)]),
        _section("budgets", "Error budgets", [],
                 [b for name, document in results.speed.items() if (b := speed_figures.budgets(document, name))]),
        *(_section(f"study-{speed_figures.slug(name)}", f"Memory: {_titled(name)}", _told(name, document),
                   study_figures.memory(document))
          for name, document in _fullest_first(results.memory)),
        *(_section(f"cost-{speed_figures.slug(name)}", f"Cost of length: {_titled(name)}", _told(name, document),
                   study_figures.cost(document))
          for name, document in _fullest_first(results.cost)),
        _section("weights", "Smaller weights", [],
                 [speed_figures.weights(document, name) for name, document in results.weights.items()]),
        _section("environment", "Environment", [], [_environments(results)]),
    ]  # fmt: skip
    return [section for section in made if section.exhibits]


def _fullest_first(found: dict[str, Document]) -> list[tuple[str, Document]]:
    return sorted(found.items(), key=lambda pair: -measured(pair[1]))


def _peaks(document: Document, name: str) -> list[Exhibit]:
    found = speed_figures.peaks(document, name)
    return [found] if found else []


def _titled(name: str) -> str:
    return name.removesuffix(".json")


def _told(name: str, document: Document) -> list[str]:
    """Where and when, and what a reader must know beside the numbers."""
    lines = [f"{name}: {device_of(document)}, {date_of(document)}, at commit {commit_of(document)}."]
    if not document.get("complete", True):
        lines.append("The run was cut short: what it had measured by then is shown.")
    return [*lines, *document.get("notes", ())]


def _section(name: str, title: str, lines: Sequence[str], exhibits: Sequence[Exhibit]) -> Section:
    return Section(name, title, lines, [(exhibit, drawing(exhibit)) for exhibit in exhibits])


def drawing(exhibit: Exhibit) -> str:
    """The exhibit's figure as an element of the page; nothing where it has none."""
    return plots.svg(exhibit.draw(), exhibit.name, exhibit.alt) if exhibit.draw else ""


def _environments(results: Results) -> Exhibit:
    rows = []
    for name, document in results.all.items():
        environment = document["environment"]
        versions = ", ".join(f"{package} {version}" for package, version in environment.get("versions", {}).items())
        told = (
            f"{environment.get('threads')} threads of {environment.get('cpus')}, {environment.get('instruction_set')}"
        )
        load_average = environment.get("load")
        load_told = f"{load_average:.1f}" if isinstance(load_average, (int, float)) else "–"
        rows.append([name, device_of(document), told, load_told, versions, commit_of(document),
                     str(environment.get("date", "–")), command_of(document, name)])  # fmt: skip
    rows += [[name, "not read", reason, "–", "–", "–", "–", "–"] for name, reason in results.unread.items()]
    return Exhibit(
        name="environments",
        title="Where each file was measured",
        alt="",
        header=["file", "hardware", "CPU", "load at start", "versions", "commit", "date", "command"],
        rows=rows,
        command="python -m bench report",
    )

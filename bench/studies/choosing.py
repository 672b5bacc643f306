"""docs/choosing.md, docs/parallel.md and the figures of docs and README, made from the committed result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import speed_figures
from bench.exhibits import Document, Exhibit, Results, commit_of, date_of, device_of, load, measured, on_gpu
from bench.peers import label
from bench.studies import figures as study_figures
from bench.studies import findings, regularise
from bench.studies import parallel as in_parallel
from bench.studies.cost import RECURRENT, WHOLE
from fastseq import cli
from fastseq.demo import plots

ROOT = Path(__file__).resolve().parents[2]

SHOWN = (
    "memory-recall",
    "memory-copying",
    "memory-adding",
    "memory-text",
    "reach-state",
    "cost-training",
    "regularise",
)
"""Exhibits of docs/choosing.md."""


def sources(results: Results) -> tuple[Any, ...]:
    """The studies of memory, of cost, of evaluation in parallel and of options that docs describe: each a file's name
    and what it holds, the fullest ones.

    Raises:
        ValueError: one of them is missing, or was cut short.
    """
    found: list[Any] = []
    for kind in ("memory", "cost", "parallel", "regularise"):
        files: dict[str, Document] = getattr(results, kind)
        name = max(files, key=lambda name: measured(files[name]), default=None)
        if name is None or not files[name]["complete"]:
            raise ValueError(f"docs need a whole run of `python -m bench {kind}` among the results")
        found += [name, files[name]]
    return tuple(found)


def summary_figure(document: Document) -> Any:
    """The plot of docs/benchmarks.md: for each family the geometric mean against each peer, slowest family first."""
    families = {case.get("family") for case in document["cases"]}
    rows: dict[str, dict[str, float]] = {}
    for line in document["summary"]:
        if line["of"] in families:
            own = rows.setdefault(line["of"], {})
            own |= {line["peer"]: line["geomean"]} if line["peer"] != "best" else {}
    peers = {peer: label(peer) for peer in dict.fromkeys(peer for row in rows.values() for peer in row)}
    what = f"time of peer / time of fastseq, geometric mean\n({device_of(document)}, {date_of(document)})"
    size = (4.8, 0.9 + len(rows) * 0.38)  # narrow, so that its labels can be read on a phone
    return speed_figures.bars(list(rows.items()), peers, what, size)


def facts(results: Results) -> dict[str, Any]:
    """Every value that the page's template may name."""
    memory_file, memory, cost_file, cost, parallel_file, parallel, options_file, options = sources(results)
    tasks = findings.tasks_in(memory)
    kinds = findings.kinds(memory, "text")
    label = findings.label
    far = {task: {kind: findings.remembered(memory, task, kind) for kind in kinds} for task in tasks}
    drawn = [*study_figures.memory(memory), *study_figures.cost(cost), study_figures.regularise(options)]
    exhibits = {each.name: each for each in drawn if each is not None}
    passed = {
        mode: {
            findings.COST_LABELS[kind]: findings.overtakes(
                findings.times(cost, mode, "attention", WHOLE), findings.times(cost, mode, kind, WHOLE)
            )
            for kind in RECURRENT
        }
        for mode in ("forward", "training")
    }
    rows = [
        {
            "layer": label(kind),
            "far": {task: far[task][kind] for task in tasks},
            "farthest": {task: max(findings.scores(memory, task, kind)) for task in tasks},
            "stops": findings.stops_falling(memory, kind),
            "best": findings.best_context(memory, kind),
            "loss": f"{min(map(findings.mean, findings.by_context(memory, kind, 'loss').values())):.3f}",
            "faded_before": findings.faded(memory, kind, "before", "input"),
            "faded_after": findings.faded(memory, kind, "after", "input"),
        }
        for kind in kinds
    ]
    return {
        "memory_file": memory_file,
        "cost_file": cost_file,
        "parallel_file": parallel_file,
        "parallel": in_parallel.facts(parallel),
        "options_file": options_file,
        "options": regularise.facts(options),
        "memory": memory,
        "cost": cost,
        "tasks": tasks,
        "kinds": dict(zip(kinds, rows, strict=True)),
        "rows": rows,
        "lowest": min(rows, key=lambda row: float(str(row["loss"])))["layer"],
        "seeds": findings.seeds(memory),
        "passed": passed,
        "lengths": cost["protocol"]["lengths"],
        "exhibits": exhibits,
        "device": device_of(memory),
        "threads": memory["environment"]["threads"],
        "commit": commit_of(memory),
        "date": date_of(memory),
        "cost_device": device_of(cost),
        "cost_threads": cost["environment"]["threads"],
        "cost_commit": commit_of(cost),
        "remembered": findings.REMEMBERED,
        "fallen": findings.FALLEN,
        "rates": ", ".join(f"{rate:g}" for rate in memory["protocol"]["rates"]),
        "parameters": _sizes(memory),
        "shown": [name for name in SHOWN if name in exhibits],
    }


def _sizes(memory: Document) -> dict[str, tuple[int, int]]:
    """Least and greatest number of parameters of the models of each task."""
    found: dict[str, list[int]] = {}
    for r in memory["results"]:
        found.setdefault(r["unit"]["task"], []).append(r["parameters"])
    return {task: (min(sizes), max(sizes)) for task, sizes in found.items()}


def text(results: Results, page: str = "choosing") -> str:
    """docs/choosing.md, or ``parallel``, as it must read for these results."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
                        lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)  # fmt: skip
    made: str = jinja.get_template(f"{page}.md.j2").render(**facts(results))
    return made


def write(folder: Path, root: Path = ROOT) -> list[Path]:
    """Write docs/choosing.md and docs/parallel.md, and the figures of docs; returns what was written.

    Raises:
        ValueError: a result file that they need is missing.
    """
    results = load(folder)
    figures = root / "docs" / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    known = facts(results)
    written = [root / "docs" / f"{page}.md" for page in ("choosing", "parallel")]
    for page in written:
        cli.write_text(page, text(results, page.stem))
    with plots.style():
        for name in known["shown"]:
            exhibit: Exhibit = known["exhibits"][name]
            if exhibit.draw is not None:
                written.append(_save(exhibit.draw(), figures / f"{name}.svg"))
        on_cpus = {name: each for name, each in results.speed.items() if not on_gpu(each)}
        speed = max(on_cpus.values(), key=measured, default=None)
        if speed is not None:
            written.append(_save(summary_figure(speed), figures / "speed.svg"))
    return written


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path

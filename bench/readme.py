"""Writes the tables of docs/benchmarks.md from a result file: ``python -m bench readme bench/results/NAME.json``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from bench.formats import markdown, times
from bench.report import ROOT, Document
from fastseq import cli

PAGE = ROOT / "docs" / "benchmarks.md"


def replaced(text: str, name: str, between: str) -> str:
    """A page in which the text between its markers of this name is replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    first, last = text.index(begin) + len(begin), text.index(end)
    return f"{text[:first]}\n{between}\n{text[last:]}"


def section(document: Document, path: str) -> str:
    """The text between the markers: where it was measured, a line for each family, and folded one for each group."""
    environment = document["environment"]
    lines = {(line["of"], line["peer"]): line for line in document["summary"]}
    peers = list(dict.fromkeys(peer for _, peer in lines if peer != "best"))
    versions = environment["versions"]
    details = ", ".join(filter(None, (environment.get("cpu_generation"), environment["instruction_set"])))
    families = {case["family"] for case in document["cases"]}
    rows: dict[bool, list[list[str]]] = {True: [], False: []}  # of a family; of a group
    for (of, peer), line in lines.items():
        if peer == "best":
            means = [times(lines.get((of, name), {}).get("geomean")) for name in peers]
            worst = f"{times(line['worst'])} `{line['worst_case']}`"
            rows[of in families].append([of, str(line["count"]), times(line["geomean"]), worst, *means])
    header = ["", "cases", "best peer: geometric mean", "worst", *(f"vs {peer}" for peer in peers)]
    out = [
        f"Measured on {environment['cpu']} ({details}), {environment['threads']} threads, torch "
        f"{versions['torch']}, ONNX Runtime {versions['onnxruntime']}, {environment['date'][:10]}, at commit "
        f"{(environment['commit'] or 'unknown')[:10]}; every case is in [{Path(path).name}]({path}).",
        "",
        *markdown(header, rows[True]),
    ]
    if rows[False]:
        folded = markdown(header, rows[False])
        out += ["", "<details><summary>Cell by cell, and kind by kind</summary>", "", *folded, "", "</details>"]
    noisy = sum(case["noisy"] for case in document["cases"])
    if noisy:
        out += ["", f"Rounds spread widely in {noisy} of {len(document['cases'])} cases: the machine was not idle."]
    return "\n".join(out)


def main(argv: list[str]) -> int:
    """Entry point; 2 if the file is not a complete result."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__)
    parser.add_argument("file", type=Path, help="a result file that `python -m bench --json` wrote")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.file.read_text())
        if not document["complete"]:
            raise ValueError("the run was cut short")
        text = section(document, os.path.relpath(options.file, options.page.parent))
        page = replaced(options.page.read_text(), "bench", text)
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench readme: {options.file}: {error}", file=sys.stderr)
        return cli.USAGE
    cli.write_text(options.page, page)
    return 0

"""Writes the README's speed section from a result file: ``python -m bench readme bench/results/NAME.json``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.report import times
from fastseq import cli

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = Path(__file__).resolve().parent.parent / "README.md"


def section(document: dict[str, Any], path: str) -> str:
    """The text between the markers: where it was measured, a line for each family, and folded one for each group."""
    environment = document["environment"]
    lines = {(line["of"], line["peer"]): line for line in document["summary"]}
    peers = list(dict.fromkeys(peer for _, peer in lines if peer != "best"))
    versions = environment["versions"]
    details = ", ".join(filter(None, (environment.get("cpu_generation"), environment["instruction_set"])))
    out = [
        f"Measured on {environment['cpu']} ({details}), {environment['threads']} threads, torch "
        f"{versions['torch']}, ONNX Runtime {versions['onnxruntime']}, {environment['date'][:10]}, at commit "
        f"{(environment['commit'] or 'unknown')[:10]}; every case is in [{path}]({path}).",
        "",
    ]
    head = ["| | cases | best peer: geometric mean | worst | " + " | ".join(f"vs {peer}" for peer in peers) + " |"]
    head += ["| --- | --- | --- | --- | " + " | ".join("---" for _ in peers) + " |"]
    families = {case["family"] for case in document["cases"]}
    rows: dict[bool, list[str]] = {True: [], False: []}  # of a family; of a group
    for (of, peer), line in lines.items():
        if peer == "best":
            means = (lines.get((of, name)) for name in peers)
            cells = [times(other["geomean"] if other else None) for other in means]
            worst = f"{times(line['worst'])} `{line['worst_case']}`"
            rows[of in families].append(
                f"| {of} | {line['count']} | {times(line['geomean'])} | {worst} | " + " | ".join(cells) + " |"
            )
    out += head + rows[True]
    if rows[False]:
        out += ["", "<details><summary>Cell by cell, and kind by kind</summary>", "", *head, *rows[False]]
        out += ["", "</details>"]
    noisy = sum(case["noisy"] for case in document["cases"])
    out += ["", f"Rounds spread widely in {noisy} of {len(document['cases'])} cases: the machine was not idle."] * (
        noisy > 0
    )
    return "\n".join(out)


def main(argv: list[str]) -> int:
    """Entry point; 2 where the file is not a complete result."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__)
    parser.add_argument("file", type=Path, help="a result file that `python -m bench --json` wrote")
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.file.read_text())
        if not document["complete"]:
            raise ValueError("the run was cut short")
        shown = options.file.resolve()
        home = options.readme.resolve().parent
        text = section(document, str(shown.relative_to(home) if shown.is_relative_to(home) else shown.name))
        readme = options.readme.read_text()
        begin, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench readme: {options.file}: {error}", file=sys.stderr)
        return 2
    cli.write_text(options.readme, f"{readme[:begin]}\n{text}\n{readme[end:]}")
    return 0

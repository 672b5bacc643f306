"""Writes the tables of GPUs in docs/benchmarks.md and docs/gpu.md from the result files.

Kernels are listed as run on a GPU only if bench/results holds that GPU's files. The tables name the commit, how many
tests passed, and the speed beside the best peer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu import tables
from bench.readme import PAGE, replaced
from bench.report import RESULTS, ROOT
from bench.studies import model
from fastseq import cli


def main(argv: list[str]) -> int:
    """Entry point; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench support", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "gpu.md")
    options = parser.parse_args(argv)
    try:
        page = replaced(options.page.read_text(), "gpu", tables.speed(options.results))
        docs = replaced(options.docs.read_text(), "support", tables.support(options.results))
        docs = replaced(docs, "floors", model.floors(options.results))
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench support: {error}", file=sys.stderr)
        return cli.USAGE
    cli.write_text(options.page, page)
    cli.write_text(options.docs, docs)
    return 0

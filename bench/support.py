"""Writes the README's tables of GPUs, and those of docs/gpu.md, from the result files.

Kernels are listed as run on a GPU only if bench/results holds that GPU's files. The tables name the commit, how many
tests passed, and the speed beside the best peer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.gpu import tables
from bench.readme import README, replaced
from bench.report import RESULTS, ROOT
from bench.studies import model
from fastseq import cli


def main(argv: list[str]) -> int:
    """Entry point; 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench support", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "gpu.md")
    options = parser.parse_args(argv)
    try:
        readme = replaced(options.readme.read_text(), "support", tables.support(options.results))
        readme = replaced(readme, "gpu", tables.speed(options.results))
        docs = replaced(options.docs.read_text(), "floors", model.floors(options.results))
    except (OSError, ValueError, KeyError) as error:
        print(f"python -m bench support: {error}", file=sys.stderr)
        return cli.USAGE
    cli.write_text(options.readme, readme)
    cli.write_text(options.docs, docs)
    return 0

"""Run all examples, or those that are named, each in a process of its own, as `make examples` does.

    python examples/run.py [NAME...]

An example whose packages are not installed is skipped, and said to be. examples/cpp, which is compiled, is not among
them: docs/recipes/cpp.md has its commands.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
FREE_PORT = ["--rdzv-endpoint", "localhost:0"]
SHORT = {"stream_server.py": ("--clients", "32", "--seconds", "1"), "distributed.py": ("--steps", "30")}
"""Arguments of those that would run for longer."""


def examples(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".py", ".ipynb") and path != FOLDER / "run.py")


def code(notebook: Path) -> str:
    """The code cells of a notebook as one program."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def missing(path: Path) -> list[str]:
    """The packages that an example names in its line `pip install ... .` and that are not installed."""
    named = re.search(r"pip install (.*) \.", path.read_text(encoding="utf-8"))
    return [name for name in named[1].split() if importlib.util.find_spec(name) is None] if named else []


def command(path: Path) -> list[str]:
    if path.suffix == ".ipynb":
        return [sys.executable, "-c", code(path)]
    several = [*TORCHRUN, *FREE_PORT] if "torchrun" in path.read_text(encoding="utf-8") else []
    return [sys.executable, *several, str(path), *SHORT.get(path.name, ())]


def main(argv: list[str], folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of files, without .py or .ipynb")
    wanted = parser.parse_args(argv).names
    paths = {path.stem: path for path in examples(folder)}
    if unknown := sorted(set(wanted) - set(paths)):
        parser.error(f"{', '.join(unknown)}: expected {', '.join(paths)}")
    failed = []
    for name, path in paths.items():
        if wanted and name not in wanted:
            continue
        if lacking := missing(path):
            print(f"\n==> {path.name}: skipped; pip install {' '.join(lacking)}", flush=True)
            continue
        print(f"\n==> {path.name}", flush=True)
        start = time.monotonic()
        quiet = {"MPLBACKEND": "agg"}  # no window
        with tempfile.TemporaryDirectory() as away:  # for what an example writes
            done = subprocess.run(command(path), cwd=away, env={**os.environ, **quiet}, check=False)
        if done.returncode:
            failed.append(path.name)
        print(f"({time.monotonic() - start:.0f} s)")
    if failed:
        print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m fastseq doctor | calibrate | demo``."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys

import torch

from fastseq import __version__, cli

COMMANDS = {
    "doctor": "what works on this machine, what does not, and the command that fixes it",
    "calibrate": "measure on this machine which backend is ahead, for AUTO to go by",
    "demo": "train small models on torch.nn and on fastseq, side by side",
}
MODULES = {"calibrate": "calibration.command"}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastseq",
        description="Fast RNN, GRU, LSTM and attention layers for PyTorch.",
        epilog="\n".join(f"{name:<10} {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastseq {__version__}, torch {torch.__version__}")
    what = "followed by its own options; COMMAND --help lists them"
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=what)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help(sys.stderr)
        return cli.USAGE
    # Only the command's own module is imported: the doctor must run where another part is broken.
    module = importlib.import_module(f"fastseq.{MODULES.get(chosen.command, chosen.command)}")
    own = argparse.ArgumentParser(prog=f"python -m fastseq {chosen.command}", description=COMMANDS[chosen.command])
    module.add_arguments(own)
    return module.main(own.parse_args(chosen.options))


if __name__ == "__main__":
    if sys.stderr is not None:
        # It also gives signals a stack of their own. Matrix products of oneDNN before 3.11.2 (torch 2.11: 3.10) point
        # the stack register into the heap: Ctrl-C in the middle of a torch.nn.LSTM would corrupt it now and then
        # (github.com/uxlfoundation/oneDNN/issues/4845).
        faulthandler.enable()
    sys.exit(cli.run("python -m fastseq", main))

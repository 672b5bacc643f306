"""What setup.py wrote down of the build, in ``_build.json`` beside this file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any


def record() -> dict[str, Any]:
    """The whole of it; empty where there is none, as in a checkout that was never built."""
    try:
        found = json.loads(Path(__file__).with_name("_build.json").read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def reason(part: str) -> str | None:
    """Why ``"cpu"`` or ``"cuda"`` was not built; None if it was, or if nobody knows."""
    found: str | None = record().get("reasons", {}).get(part)
    return found


def warn_without_kernels(missing: str) -> None:
    """Warn that the native kernels are not here, unless that is what the installation was asked for.

    pip shows nothing of what a build prints, so the first import is where a user can learn of it.
    """
    if not record().get("pure_is_expected", False):
        warnings.warn(
            f"fastseq has no native kernels here, so its layers run on torch's, at torch's speed. Why: "
            f"{reason('cpu') or missing}. Fix: run `python -m fastseq doctor`, which shows the command. "
            f"(An installation with FASTSEQ_BUILD=none is silent.)",
            RuntimeWarning,
            stacklevel=3,
        )

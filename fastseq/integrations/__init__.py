"""Other packages' models on fastseq's kernels. Each module is imported when it is first asked for, and needs the
package that it is named after."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

NAMES = ("onnx", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in NAMES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there is: {', '.join(NAMES)}")


@contextlib.contextmanager
def own_kernels_hidden() -> Iterator[None]:
    """In a checkout, the folder of our kernels has the name of a package that transformers looks for at its import.
    Python started there would find ours, which refuses to be imported by that name."""
    found = None if "kernels" in sys.modules else importlib.util.find_spec("kernels")
    origin = None if found is None else found.origin
    hides = origin is not None and origin.endswith(".py") and "fastseq.kernels" in Path(origin).read_text()
    if hides:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # as if there were none
    try:
        yield
    finally:
        if hides:
            del sys.modules["kernels"]


def transformers_here() -> str:
    """The version of transformers, and how its models run here; for the doctor."""
    if importlib.util.find_spec("transformers") is None:
        return "not installed"
    how = "fastseq.integrations.transformers.register(), then attn_implementation='fastseq'"
    return f"{importlib.metadata.version('transformers')}; its models run on fastseq after {how}"

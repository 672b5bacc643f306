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
    own = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    found = importlib.util.find_spec("kernels") if "kernels" not in sys.modules and own.exists() else None
    hides = found is not None and found.origin is not None and Path(found.origin).resolve() == own
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

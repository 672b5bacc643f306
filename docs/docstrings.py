"""Makes docstrings, which have Sphinx's roles and one "Example:" each, what mkdocstrings reads.

It also hides ``**unknown`` in signatures, which is there for the messages of errors alone.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """:class:`X` becomes `X`; the examples a section of code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each object."""
        if obj.docstring is not None:
            text = re.sub(r":(?:class|func|meth|mod|data|attr):`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", text)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called once for each function."""
        if "unknown" in func.parameters:
            del func.parameters["unknown"]

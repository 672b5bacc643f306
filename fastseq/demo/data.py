"""Real text that is on every machine, the Python standard library's own sources, as a stream of character ids."""

from __future__ import annotations

import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MOST_CHARACTERS = 2_000_000
"""How much text is read at most: more than the demo can train on."""

MOST_SYMBOLS = 128
"""Size of the vocabulary at most; rarer characters become one symbol, so that a book in Chinese trains too."""

UNKNOWN = "\ufffd"
_SKIPPED = ("site-packages", "dist-packages", "test", "idlelib", "encodings", "pydoc_data")


class DataError(Exception):
    """The text cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Text:
    """A text as ids. ``train`` int64 [N], ``held_out`` int64 [M]; ``symbols[id]`` is the character."""

    source: str
    symbols: str
    train: Tensor
    held_out: Tensor

    def ids(self, text: str) -> Tensor:
        """The ids of ``text``, int64 [len(text)]; characters that the vocabulary lacks take the last symbol's."""
        index = {symbol: i for i, symbol in enumerate(self.symbols)}
        return torch.tensor([index.get(character, len(self.symbols) - 1) for character in text], dtype=torch.int64)

    def batch(self, size: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random stretches and what follows each of their characters: int64 [size, length] twice."""
        starts = torch.randint(len(self.train) - length, (size, 1), generator=generator)
        positions = starts + torch.arange(length)
        return self.train[positions], self.train[positions + 1]


def load(path: Path | None, shortest: int) -> Text:
    """The text of ``path``, or of the standard library, cut into training text and the last twentieth held out.

    Args:
        path: a text file in UTF-8 (what is not UTF-8 is replaced), or None.
        shortest: how many characters each of the two parts must have at least.

    Raises:
        DataError: the file is missing, empty, unreadable or too short.
    """
    source, text = ("Python's standard library", _standard_library()) if path is None else (str(path), _file(path))
    cut = len(text) - max(len(text) // 20, shortest)
    if cut < shortest:
        raise DataError(f"{source}: {len(text):,} characters are too few, the demo needs at least {2 * shortest:,}")
    counts = Counter(text)
    symbols = sorted(symbol for symbol, _ in counts.most_common(MOST_SYMBOLS - 1) if symbol != UNKNOWN)
    encoded = Text(source, "".join(symbols) + UNKNOWN, torch.empty(0), torch.empty(0))
    ids = encoded.ids(text)
    return Text(encoded.source, encoded.symbols, ids[:cut], ids[cut:])


def _file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(4 * MOST_CHARACTERS)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give --text a text file, or leave it out") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    text = raw.decode("utf-8", errors="replace")[:MOST_CHARACTERS]
    if not text.strip():
        raise DataError(f"{path}: the file holds no text")
    return text.replace("\r\n", "\n")


def _standard_library() -> str:
    folder = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("*/*.py")):
        if path.parent.name in _SKIPPED and path.parent != folder:
            continue
        try:
            parts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        size += len(parts[-1])
        if size >= MOST_CHARACTERS:
            break
    if not parts:
        raise DataError(f"{folder}: this Python has no library sources to read; give a text file with --text FILE")
    return "\n".join(parts)[:MOST_CHARACTERS]
